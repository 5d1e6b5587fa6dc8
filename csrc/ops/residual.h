// The op conv2d_residual, activation(conv2d(input, weight, bias) + residual), made of conv2d: where no kernel adds the
// residual itself, and for the derivatives.
#pragma once

#include "ops/ops.h"

namespace sepconv::residual {

// By the op conv2d; differentiable when called above the autograd key.
SignatureOf<ops::conv2d_residual> composite;

// By ATen's own functions, differentiable.
SignatureOf<ops::conv2d_residual> by_aten;

}  // namespace sepconv::residual
