// The door of dense convolutions with a packed weight: float32, one group, zero padding.
#pragma once

#include "cpu/network/program.h"

namespace sepconv::cpu::network {

// `x` has any strides; `y` and the residual (or null) are dense NHWC. `packed` is what product_pack() makes of the weight
// as a matrix [K, R * S * C].
void convolution(const ConvShape&, const float* x, const float* packed, const Epilogue&, const float* residual,
                 float* y);

}  // namespace sepconv::cpu::network
