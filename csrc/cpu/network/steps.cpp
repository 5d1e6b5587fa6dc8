// The table of steps: what each kind makes of the sizes that it reads, and which kernel runs it. A new kind is a size, a
// run and a line of the table, beside its shape in sepconv_ext/graph/program.py.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cpu/kernels.h"
#include "cpu/network/convolution.h"
#include "cpu/network/pixels.h"
#include "cpu/network/program.h"
#include "cpu/pointwise/product.h"

namespace sepconv::cpu::network {
namespace {

std::string text(const Size& s) {
  const auto n = [](int64_t value) { return std::to_string(value); };
  return "[" + n(s.N) + ", " + n(s.C) + ", " + n(s.H) + ", " + n(s.W) + "]";
}

void demand_equal(const Size& a, const Size& b, const char* what) {
  if (a != b)
    throw std::invalid_argument(std::string(what) + " must be of one size, but are " + text(a) + " and " + text(b));
}

// ---- sizes ----

Size same(const Step& step, const Size* in) {
  for (size_t i = 1; i < step.reads.size(); ++i) demand_equal(in[0], in[i], "the values");
  return in[0];
}

Size windows(const Step& step, const Size& in, int64_t channels) {
  const int64_t rows = in.H + step.top + step.bottom - step.dilation_h * (step.R - 1) - 1;
  const int64_t columns = in.W + step.left + step.right - step.dilation_w * (step.S - 1) - 1;
  if (rows < 0 || columns < 0) {
    throw std::invalid_argument("an image of " + text(in) + " is smaller than a kernel of " + std::to_string(step.R) +
                                " x " + std::to_string(step.S) + " (dilated, less the padding)");
  }
  return {in.N, rows / step.stride_h + 1, columns / step.stride_w + 1, channels};
}

Size convolved(const Step& step, const Size* in, int64_t channels) {
  const Size out = windows(step, in[0], channels);
  if (step.reads.size() > 1) demand_equal(out, in[1], "the output and its residual");
  return out;
}
Size product_size(const Step& step, const Size* in) { return convolved(step, in, step.K); }
Size depthwise_size(const Step& step, const Size* in) { return windows(step, in[0], in[0].C); }
Size mean_size(const Step&, const Size* in) { return {in[0].N, 1, 1, in[0].C}; }
Size gate_size(const Step&, const Size* in) {
  demand_equal({in[0].N, 1, 1, in[0].C}, in[1], "the channels and their gate");
  return in[0];
}

// ---- constants: where those end that a step reads ----

int64_t end_of(int64_t offset, int64_t count) { return offset == kAbsent ? 0 : offset + count; }

int64_t no_constants(const Step&, const Size*) { return 0; }
int64_t product_constants(const Step& s, const Size* in) {
  return std::max(end_of(s.weight, product_packed_floats(s.K, s.R * s.S * in[0].C)), end_of(s.bias, s.K));
}
int64_t depthwise_constants(const Step& s, const Size* in) {
  return std::max(end_of(s.weight, s.R * s.S * in[0].C), end_of(s.bias, in[0].C));
}
int64_t channel_constants(const Step& s, const Size* in) {
  return std::max(end_of(s.weight, in[0].C), end_of(s.bias, in[0].C));
}

// ---- runs ----

Epilogue epilogue(const Call& call) { return {call.constant(call.step.bias), call.step.activation}; }
const float* residual(const Call& call) { return call.step.reads.size() > 1 ? call.read[1] : nullptr; }

void run_product(const Call& call) {
  product_forward_packed(call.shape, call.read[0], call.constant(call.step.weight), epilogue(call),
                         {residual(call), call.shape.y}, call.write);
}
void run_convolution(const Call& call) {
  convolution(call.shape, call.read[0], call.constant(call.step.weight), epilogue(call), residual(call), call.write);
}
void run_depthwise(const Call& call) {
  ConvShape shape = call.shape;
  shape.groups = shape.C;
  shape.w = {1, 1, shape.S * shape.C, shape.C};  // [R, S, C]
  depthwise_nhwc_forward(shape, DType::float32, call.read[0], call.constant(call.step.weight), epilogue(call),
                         call.write);
}
void run_mean(const Call& call) { mean(call.in[0], call.read[0], call.write); }
void run_add(const Call& call) {
  add(call.out.elements(), call.read[0], call.read[1], call.step.activation, call.write);
}
void run_multiply(const Call& call) {
  multiply(call.out.elements(), call.read[0], call.read[1], call.step.activation, call.write);
}
void run_gate(const Call& call) {
  scale(call.out, call.read[0], {call.read[1], call.out.C}, call.step.activation, call.write);
}
void run_affine(const Call& call) {
  scale(call.out, call.read[0], {call.constant(call.step.weight), 0, call.constant(call.step.bias)},
        call.step.activation, call.write);
}
void run_layer_norm(const Call& call) {
  layer_norm(call.out, call.read[0], call.step.eps, call.constant(call.step.weight), call.constant(call.step.bias),
             call.write);
}
void run_activate(const Call& call) { activate(call.out.elements(), call.read[0], call.step.activation, call.write); }
void run_clamp(const Call& call) {
  const Step& s = call.step;
  clamp(call.out.elements(), call.read[0], {s.factor, s.shift, s.low, s.high}, call.write);
}
void run_max_pool(const Call& call) { max_pool(call.shape, call.read[0], call.write); }
void run_mean_pool(const Call& call) { mean_pool(call.shape, false, call.read[0], call.write); }
void run_padded_mean_pool(const Call& call) { mean_pool(call.shape, true, call.read[0], call.write); }
void run_dense(const Call& call) { to_nhwc(call.out, call.read[0], call.shape.x, call.write); }

// ---- the table ----

constexpr Kind kKinds[] = {
    {"product", 1, 2, product_size, product_constants, run_product, 0b10},
    {"conv", 1, 2, product_size, product_constants, run_convolution, 0b10, true},
    {"depthwise", 1, 1, depthwise_size, depthwise_constants, run_depthwise},
    {"mean", 1, 1, mean_size, no_constants, run_mean},
    {"add", 2, 2, same, no_constants, run_add, 0b11},
    {"mul", 2, 2, same, no_constants, run_multiply, 0b11},
    {"gate", 2, 2, gate_size, no_constants, run_gate, 0b01},
    {"affine", 1, 1, same, channel_constants, run_affine, 0b01},
    {"layer_norm", 1, 1, same, channel_constants, run_layer_norm, 0b01},
    {"activate", 1, 1, same, no_constants, run_activate, 0b01},
    {"clamp", 1, 1, same, no_constants, run_clamp, 0b01},
    {"max_pool", 1, 1, depthwise_size, no_constants, run_max_pool},
    {"mean_pool", 1, 1, depthwise_size, no_constants, run_mean_pool},
    {"padded_mean_pool", 1, 1, depthwise_size, no_constants, run_padded_mean_pool},
    {"dense", 1, 1, same, no_constants, run_dense, 0, true},
};

}  // namespace

const Kind& kind_of(std::string_view name) {
  for (const Kind& kind : kKinds) {
    if (name == kind.name) return kind;
  }
  throw std::invalid_argument("unknown step '" + std::string(name) + "'");
}

}  // namespace sepconv::cpu::network
