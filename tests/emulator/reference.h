// The three maps in float64, by their definition: what every kernel's result is compared with.
#pragma once

#include <vector>

#include "core/activation.h"
#include "core/conv_shape.h"
#include "core/padding_mode.h"
#include "tensor.h"

namespace emulator {

// One element of a result: the exact value, and the sum of the magnitudes of its terms, which bounds the rounding
// error.
struct Expected {
  double value = 0, magnitude = 0;
  int64_t terms = 0;
  double inherited = 0;  // error that the operands themselves may have

  // What roundings alone can explain, of a kernel that reads and writes `dtype`.
  double bound(sepconv::DType) const;
};

// Elements in the order of the result's logical dimensions. a and b are the map's two operands: (x, w), (grad_y, w) or
// (grad_y, x). bias may be null, and so may what is added before the activation.
std::vector<Expected> reference(sepconv::Map, const sepconv::ConvShape&, sepconv::PaddingMode, const Buffer& a,
                                const Buffer& b, const Buffer* bias, sepconv::Activation,
                                const Buffer* residual = nullptr);

// The depthwise convolution of such a result, whose errors it inherits.
std::vector<Expected> reference_depthwise(const sepconv::ConvShape&, const std::vector<Expected>& x, sepconv::DType,
                                          const Buffer& weight, const Buffer* bias, sepconv::Activation);

// The 1x1 convolution of what the map forward gave for a depthwise stage, whose errors it inherits; `residual` is added
// before the activation, or null.
std::vector<Expected> reference_pointwise(const sepconv::ConvShape& pointwise, const std::vector<Expected>& depthwise,
                                          sepconv::DType, const Buffer& weight, const Buffer* bias, sepconv::Activation,
                                          const Buffer* residual = nullptr);

// The same for a column and a row filter: [C or 1, 1, 1, R] and [C or 1, 1, 1, S].
std::vector<Expected> spatial_reference(const sepconv::ConvShape&, const Buffer& x, const Buffer& column,
                                        const Buffer& row, bool shared_column, bool shared_row);

}  // namespace emulator
