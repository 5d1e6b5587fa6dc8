// Each fault is a single byte or a single number, in plain code: what it takes the fuzzer to find the least of its
// kind.
#include "planted.h"

#include <cstring>
#include <memory>

namespace fuzz {
namespace {

using emulator::Buffer;

unsigned char* bytes_of(Buffer& buffer) { return static_cast<unsigned char*>(buffer.data()); }

volatile unsigned char read;  // what is read has to be used

void read_past_the_end(Buffer& operand, Buffer&) { read = bytes_of(operand)[operand.bytes()]; }
void read_before_the_begin(Buffer& operand, Buffer&) { read = bytes_of(operand)[-1]; }
void write_past_the_end(Buffer&, Buffer& result) { bytes_of(result)[result.bytes()] = 0; }
void write_an_operand(Buffer& operand, Buffer&) { bytes_of(operand)[operand.bytes() / 2] ^= 1; }
void leave_a_number_out(Buffer&, Buffer& result) { std::memset(bytes_of(result) + result.bytes() - 4, 0xFF, 4); }
void sum_a_number_twice(Buffer&, Buffer& result) { reinterpret_cast<float*>(result.data())[0] *= 1.001f; }

void read_freed_scratch(Buffer&, Buffer&) {
  std::unique_ptr<unsigned char[]> scratch(new unsigned char[64]);
  const unsigned char* kept = scratch.get();
  scratch.reset();
  read = kept[1];
}

void read_a_gap(Buffer& operand, Buffer& result) {  // a sum over all of the memory, gaps included
  float sum = 0;
  const float* numbers = static_cast<const float*>(operand.data());
  for (size_t i = 0; i < operand.bytes() / sizeof(float); ++i) sum += numbers[i];
  static_cast<float*>(result.data())[0] += 0 * sum;
}

}  // namespace

const PlantedFault planted_faults[kPlantedFaults] = {
    {"a read past the end", read_past_the_end},
    {"a read before the begin", read_before_the_begin},
    {"a write past the end", write_past_the_end},
    {"an operand written to", write_an_operand},
    {"a number left out", leave_a_number_out},
    {"a number off by a thousandth", sum_a_number_twice},
    {"a read of freed scratch memory", read_freed_scratch},
    {"a read of what lies between the elements", read_a_gap},
};

}  // namespace fuzz
