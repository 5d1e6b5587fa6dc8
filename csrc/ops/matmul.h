// A 1x1 convolution without a stride as torch's matrix products, on views of the images: for both devices.
#pragma once

#include "ops/call.h"

namespace sepconv::matmul {

// One of the three maps, into `result`: bias and ReLU as the product's own epilogue where torch's product has one.
void run(const Call&, const at::Tensor& result);

}  // namespace sepconv::matmul
