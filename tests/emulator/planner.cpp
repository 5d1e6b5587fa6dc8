// Reads cases, one a line, and prints which kernel the plan takes for each: what gives the tests their names.
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
    std::cout << (separable ? emulator::make_separable_plan(c, emulator::read_pointwise(arguments, c), arguments).name
                            : emulator::make_plan(c, arguments).name)
              << '\n';
  }
}
