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

}  // namespace sepconv::cuda
