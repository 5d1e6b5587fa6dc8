// Which 1x1 convolutions the products of pointwise/product.h take: a pure function of the call.
#pragma once

#include "core/conv_shape.h"

namespace sepconv::cpu {

// A matrix product over whole images.
inline bool is_matrix_product(const ConvShape& s) {
  return s.is_pointwise() && s.stride_h == 1 && s.stride_w == 1 && s.H == s.P && s.W == s.Q;
}

// What the products can do: float32, every output reads a pixel.
bool product_can(Map, const ConvShape&, DType);

// Why they are the best for what they can do, of dense images in `layout`; null where torch's call is. `threads`:
// torch's.
const char* product_is_best(Map, const ConvShape&, Layout layout, int threads);

// Whether the product is so small that half types are best multiplied in float32, copies and all.
bool is_small_for_half(Map, const ConvShape&);

}  // namespace sepconv::cpu
