#include "ops/matmul.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_addmm_activation.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include "core/activation.h"
#include "core/operand_layout.h"
#include "ops/aten_route.h"

namespace sepconv::matmul {
namespace {

using at::Tensor;

// An image is [N*H*W, C] for channels_last, N times [C, H*W] else.

// Images of one pixel lie both ways: one product over the batch then beats one an image.
bool by_planes(const ConvShape& s) {
  return s.H * s.W > 1 && input_layout(s) == Layout::nchw && output_layout(s) == Layout::nchw;
}

Tensor pixels(const Tensor& image) { return image.permute({0, 2, 3, 1}).reshape({-1, image.size(1)}); }
Tensor planes(const Tensor& image) { return image.reshape({image.size(0), image.size(1), -1}); }
Tensor channels(const Tensor& image) { return image.transpose(0, 1).reshape({image.size(1), -1}); }
Tensor matrix(const Tensor& weight) { return weight.reshape({weight.size(0), weight.size(1)}); }

// The bias is the product's addend, so that a half type is rounded once. Returns the activation that is left to do.
Activation forward(const ConvShape& shape, const Tensor& input, const Tensor& weight, const Tensor& bias,
                   Activation activation, const Tensor& output) {
  const Tensor w = matrix(weight);
  if (by_planes(shape)) {
    Tensor y = planes(output);
    const Tensor ws = w.unsqueeze(0).expand({shape.N, -1, -1});
    if (bias.defined()) {
      at::baddbmm_out(y, bias.view({1, -1, 1}), ws, planes(input));
    } else {
      at::bmm_out(y, ws, planes(input));
    }
  } else {
    Tensor y = pixels(output);
    if (bias.defined() && activation == Activation::relu) {
      at::_addmm_activation_out(y, bias, pixels(input), w.t());
      return Activation::identity;
    }
    if (bias.defined()) {
      at::addmm_out(y, bias, pixels(input), w.t());
    } else {
      at::mm_out(y, pixels(input), w.t());
    }
  }
  return activation;
}

void grad_input(const ConvShape& shape, const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input) {
  const Tensor w = matrix(weight);
  if (by_planes(shape)) {
    Tensor gx = planes(grad_input);
    at::bmm_out(gx, w.t().unsqueeze(0).expand({shape.N, -1, -1}), planes(grad_output));
  } else {
    Tensor gx = pixels(grad_input);
    at::mm_out(gx, pixels(grad_output), w);
  }
}

void grad_weight(const ConvShape& shape, const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight) {
  // In half types one product sums over the whole batch, for which planes are copied side by side: a sum of rounded
  // products would be less exact than torch's.
  const bool planes_apart = call_layout(Map::grad_weight, shape) == Layout::nchw && shape.H * shape.W > 1;
  Tensor gw = matrix(grad_weight);  // a view: the last two dimensions are of size 1
  if (by_planes(shape) && grad_output.element_size() > 2) {
    const Tensor per_image = at::bmm(planes(grad_output), planes(input).transpose(1, 2));
    at::sum_out(gw, per_image, at::IntArrayRef{0});
  } else if (planes_apart) {
    at::mm_out(gw, channels(grad_output), channels(input).t());
  } else {
    at::mm_out(gw, pixels(grad_output).t(), pixels(input));
  }
}

}  // namespace

void run(const Call& c, const Tensor& result) {
  const Tensor first = as_image(*c.first, c.args.for_sequences()), second = as_image(*c.second, c.args.for_sequences()),
               out = as_image(result, c.args.for_sequences());
  switch (c.map) {
    case Map::forward:
      aten::activate_in_place(out, forward(c.shape, first, second, c.bias ? *c.bias : Tensor(), c.activation, out));
      return;
    case Map::grad_input: return grad_input(c.shape, first, second, out);
    case Map::grad_weight: return grad_weight(c.shape, first, second, out);
  }
}

}  // namespace sepconv::matmul
