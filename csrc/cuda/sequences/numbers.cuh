// Whole numbers of a call, as a kernel reads them: of 32 or 64 bits, without a copy that would be a launch.
#pragma once

#include "core/causal_shape.h"
#include "cuda/device/common.cuh"

namespace sepconv::cuda {

__device__ __forceinline__ int64_t number_at(const WholeNumbers& numbers, int64_t offset) {
  if (numbers.wide) return static_cast<const int64_t*>(numbers.data)[offset];
  return static_cast<const int32_t*>(numbers.data)[offset];
}

// The remainder that is not negative, of any number.
__device__ __forceinline__ uint32_t remainder_of(int64_t number, const FastDiv& by) {
  if (number >= 0 && number < kNarrowLimit) {
    auto rest = static_cast<uint32_t>(number);
    by.split(rest);
    return rest;
  }
  const int64_t divisor = by.divisor, rest = number % divisor;
  return static_cast<uint32_t>(rest < 0 ? rest + divisor : rest);
}

// The run of equal numbers that a position is in, found on a walk along the positions of one sequence.
struct Run {
  const WholeNumbers& numbers;
  const int64_t first;  // where the sequence's numbers begin
  const int before;     // positions ahead of the first one that belong to the first run: the states'
  int position = 0;
  int age = 0;  // so many positions back the run goes on, or as far as `begin` looked
  int64_t number = 0;

  __device__ __forceinline__ Run(const WholeNumbers& all, int64_t n, int ahead)
      : numbers(all), first(n * all.n), before(ahead) {}

  __device__ __forceinline__ void begin(int at) {
    position = max(at, 0);
    age = at > 0 ? 0 : before;
    number = number_at(numbers, first + position * numbers.l);
  }
  __device__ __forceinline__ void advance(int to) {
    while (position < to) {
      ++position;
      const int64_t next = number_at(numbers, first + position * numbers.l);
      age = next == number ? age + 1 : 0;
      number = next;
    }
  }
};

}  // namespace sepconv::cuda
