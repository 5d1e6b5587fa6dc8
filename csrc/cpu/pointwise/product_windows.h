// The door of dense convolutions with a packed weight: float32, one group, zero padding, any stride and dilation.
// Results do not depend on the number of threads; in a task of another kernel, all runs in line.
#pragma once

#include "cpu/pointwise/product.h"

namespace sepconv::cpu {

// `x` has any strides; `y` and the residual (which may be y) are NHWC, with pixels at one distance. `packed` is what
// product_pack() makes of the weight as a matrix [K, R * S * C].
void windows_forward(const ConvShape&, const float* x, const float* packed, const Epilogue&, const Residual&, float* y);

}  // namespace sepconv::cpu
