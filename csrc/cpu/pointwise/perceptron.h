// The door of two 1x1 products in one pass, with or without a LayerNorm before them: the second half of a ConvNeXt
// block, or a transformer's. float32, dense NHWC pixels; raw memory in, raw memory out. Results do not depend on the
// number of threads; in a task of another kernel, all runs in line.
//
//   h = activation(bias + hidden n),  n = x or (x - mean) / sqrt(variance + eps) over each pixel's channels
//   y = activation(bias + project h + residual)
//
// A norm's own scale and shift belong into the weight and the bias of `hidden`, a layer scale into those of `project`.
#pragma once

#include "cpu/pointwise/product.h"

namespace sepconv::cpu {

struct PerceptronShape {
  int64_t pixels = 0, C = 0, M = 0, K = 0;  // x [pixels, C], h [pixels, M], y [pixels, K]
  bool norm = false;
  float eps = 0;
};

struct PerceptronMemory {
  const float* x = nullptr;
  const float* hidden = nullptr;  // product_pack() of [M, C]
  Epilogue hidden_epilogue;
  const float* project = nullptr;  // product_pack() of [K, M]
  Epilogue project_epilogue;
  const float* residual = nullptr;  // like y, or null
  float* y = nullptr;               // may be the residual, and where K is C also x
};

void perceptron_forward(const PerceptronShape&, const PerceptronMemory&);

}  // namespace sepconv::cpu
