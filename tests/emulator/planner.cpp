// Reads cases, one a line, and prints which kernel the plan takes for each: what gives the tests their names.
#include <iostream>
#include <iterator>
#include <sstream>

#include "case.h"

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream in(line);
    const emulator::Arguments arguments({std::istream_iterator<std::string>(in), {}});
    std::cout << emulator::make_plan(emulator::read_case(arguments), arguments).name << '\n';
  }
}
