// Reads cases, one a line, and prints what the plan says of each: kernel, tile and reason, with tabs between.
#include <iostream>
#include <iterator>
#include <sstream>

#include "case.h"

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream in(line);
    const emulator::Arguments arguments({std::istream_iterator<std::string>(in), {}});
    const emulator::Case c = emulator::read_case(arguments);
    const bool separable = emulator::is_separable(arguments);
    const sepconv::Explanation plan = sepconv::cuda::explain(
        c.map, separable ? emulator::make_separable_plan(c, emulator::read_pointwise(arguments, c), arguments)
                         : emulator::make_plan(c, arguments));
    std::cout << plan.kernel << '\t' << plan.tile << '\t' << plan.reason << '\n';
  }
}
