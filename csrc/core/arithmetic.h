// Whole numbers that every plan and kernel reckons with: quotients, sizes of elements, limits of indices.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/conv_shape.h"
#include "core/host_device.h"

namespace sepconv {

// The smallest number of parts of size b that cover a.
template <typename A, typename B>
SEPCONV_HOST_DEVICE constexpr std::common_type_t<A, B> ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

constexpr bool is_half(DType dtype) { return dtype == DType::float16 || dtype == DType::bfloat16; }
// Bytes of an element, and of the type that its sums are kept in.
constexpr int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : is_half(dtype) ? 2 : 4; }
constexpr int64_t acc_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// Kernels with 32-bit indices take numbers below this one.
inline constexpr int64_t kNarrowLimit = int64_t{1} << 31;

}  // namespace sepconv
