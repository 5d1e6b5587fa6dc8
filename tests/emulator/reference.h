// The three maps in float64, by their definition: what every kernel's result is compared with.
#pragma once

#include <vector>

#include "../../csrc/activation.h"
#include "../../csrc/conv_shape.h"
#include "tensor.h"

namespace emulator {

// One element of a result: the exact value, and the sum of the magnitudes of its terms, which bounds the rounding error.
struct Expected {
  double value = 0, magnitude = 0;
  int64_t terms = 0;
};

// Elements in the order of the result's logical dimensions. a and b are the map's two operands: (x, w), (grad_y, w) or
// (grad_y, x). bias may be null.
std::vector<Expected> reference(sepconv::Map, const sepconv::ConvShape&, const Buffer& a, const Buffer& b,
                                const Buffer* bias, sepconv::Activation);

}  // namespace emulator
