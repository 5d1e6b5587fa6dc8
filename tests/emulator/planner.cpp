// Reads cases, one a line, and prints what the plan says of each: kernel, tile and reason, with tabs between. For a
// case with alternatives=1 so many lines as there are, and an empty one. "tuning" alone asks for the table: a line for
// the defaults (0), and one for each architecture.
#include <iostream>
#include <iterator>
#include <sstream>

#include "case.h"

namespace {

void print(const sepconv::Explanation& plan) {
  std::cout << plan.kernel << '\t' << plan.tile << '\t' << plan.reason << '\n';
}

void print_table() {
  const auto print_row = [](int capability, const sepconv::cuda::Tuning& row) {
    std::cout << capability;
    sepconv::cuda::Tuning::each(row, [](const char* name, double value) { std::cout << ' ' << name << '=' << value; });
    std::cout << '\n';
  };
  print_row(0, {});
  for (const sepconv::cuda::Tuning& row : sepconv::cuda::kTunings) print_row(row.capability, row);
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    if (line == "tuning") {
      print_table();
      continue;
    }
    std::istringstream in(line);
    const emulator::Arguments arguments({std::istream_iterator<std::string>(in), {}});
    const emulator::Case c = emulator::read_case(arguments);
    if (arguments.number("alternatives", 0)) {
      for (const auto& plan : emulator::make_alternatives(c, arguments)) print(sepconv::cuda::explain(c.map, plan));
      std::cout << '\n';
      continue;
    }
    const bool separable = emulator::is_separable(arguments);
    print(sepconv::cuda::explain(
        c.map, separable ? emulator::make_separable_plan(c, emulator::read_pointwise(arguments, c), arguments)
                         : emulator::make_plan(c, arguments)));
  }
}
