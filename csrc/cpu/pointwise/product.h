// The doors of the 1x1 products: float32, one group, a matrix product over pixels. As those of kernels.h: raw memory,
// strides in elements in the ConvShape, results that do not depend on the number of threads.
//
// What is written is channels_last (dense channels, pixels at one distance) or has dense planes; what is read has any
// strides, the weight too. The convolution may have a stride, except in grad_input. grad_w has dense rows.
#pragma once

#include <cstdint>

#include "core/conv_shape.h"
#include "core/epilogue.h"

namespace sepconv::cpu {

void product_forward(const ConvShape&, const float* x, const float* w, const Epilogue&, float* y);
void product_grad_input(const ConvShape&, const float* grad_y, const float* w, float* grad_x);
void product_grad_weight(const ConvShape&, const float* grad_y, const float* x, float* grad_w);
bool product_can_write(const ConvShape&);  // whether y is so

// A weight packed once: [K, C] -> [ceil(K / kPanelColumns), C, kPanelColumns], zero beyond K, the same for every
// instruction set.
inline constexpr int64_t kPanelColumns = 16;
constexpr int64_t product_packed_floats(int64_t K, int64_t C) {
  return (K + kPanelColumns - 1) / kPanelColumns * kPanelColumns * C;
}
void product_pack(int64_t K, int64_t C, const float* w, int64_t w_output, int64_t w_term, float* packed);

// What is added before the activation. It may be y itself.
struct Residual {
  const float* data = nullptr;  // of the output's size; or null
  Strides strides;              // such as y may have
};
void product_forward_packed(const ConvShape&, const float* x, const float* packed, const Epilogue&, const Residual&,
                            float* y);

}  // namespace sepconv::cpu
