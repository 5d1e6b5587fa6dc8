// The types that kernels load and store.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/conv_shape.h"

namespace sepconv::cpu {

// Storage types of 16 bits; arithmetic happens in float.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// The type that sums are kept in.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls body(T{}) with the storage type of the dtype.
template <typename Body>
void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32: return body(float{});
    case DType::float64: return body(double{});
    case DType::float16: return body(float16{});
    case DType::bfloat16: return body(bfloat16{});
  }
}

}  // namespace sepconv::cpu
