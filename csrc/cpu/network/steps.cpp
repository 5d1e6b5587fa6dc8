// The table of steps: what each kind makes of the sizes that it reads, and which kernel runs it. A new kind is a size,
// a run and a line of the table, beside its shape in sepconv_ext/graph/program.py.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cpu/depthwise/depthwise_rows.h"
#include "cpu/kernels.h"
#include "cpu/network/pixels.h"
#include "cpu/network/program.h"
#include "cpu/pointwise/perceptron.h"
#include "cpu/pointwise/product.h"
#include "cpu/pointwise/product_windows.h"
#include "cpu/separable/inverted_residual.h"

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
  const auto pieces = [&step](int64_t length, int64_t stride, int64_t inside) {
    const int64_t whole = length / stride + 1, more = (length + stride - 1) / stride + 1;
    return step.ceil == 0 || (more - 1) * stride >= inside ? whole : more;
  };
  if (rows < 0 || columns < 0) {
    throw std::invalid_argument("an image of " + text(in) + " is smaller than a kernel of " + std::to_string(step.R) +
                                " x " + std::to_string(step.S) + " (dilated, less the padding)");
  }
  return {in.N, pieces(rows, step.stride_h, in.H + step.top), pieces(columns, step.stride_w, in.W + step.left),
          channels};
}

Size convolved(const Step& step, const Size* in, int64_t channels) {
  const Size out = windows(step, in[0], channels);
  if (step.reads.size() > 1) demand_equal(out, in[1], "the output and its residual");
  return out;
}
Size product_size(const Step& step, const Size* in) { return convolved(step, in, step.K); }
Size depthwise_size(const Step& step, const Size* in) { return windows(step, in[0], in[0].C); }
Size grouped_size(const Step& step, const Size* in) {
  if (in[0].C % step.groups != 0 || !depthwise_rows_can(in[0].C / step.groups)) {
    throw std::invalid_argument(std::to_string(in[0].C) + " channels in " + std::to_string(step.groups) +
                                " groups: a group must have 2, 4, 8 or a multiple of 16");
  }
  return windows(step, in[0], in[0].C);
}
Size slice_size(const Step& step, const Size* in) {
  if (step.begin + step.K > in[0].C) {
    throw std::invalid_argument("channels " + std::to_string(step.begin) + " to " +
                                std::to_string(step.begin + step.K) + " of an image " + text(in[0]));
  }
  return {in[0].N, in[0].H, in[0].W, step.K};
}
Size concat_size(const Step& step, const Size* in) {
  Size whole = in[0];
  for (size_t i = 1; i < step.reads.size(); ++i) {
    demand_equal(in[0], {in[i].N, in[i].H, in[i].W, in[0].C}, "what is put together, but for channels,");
    whole.C += in[i].C;
  }
  return whole;
}
Size interleave_size(const Step& step, const Size* in) {
  Size whole = same(step, in);
  whole.C *= static_cast<int64_t>(step.reads.size());
  return whole;
}
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
int64_t group_of(const Step& s, const Size& in) {
  return s.kind->name == std::string_view("depthwise") ? 1 : in.C / s.groups;
}
int64_t depthwise_constants(const Step& s, const Size* in) {
  const int64_t weight = depthwise_packed_floats(in[0].C, s.R, s.S) * group_of(s, in[0]);
  return std::max(end_of(s.weight, weight), end_of(s.bias, in[0].C));
}
int64_t channel_constants(const Step& s, const Size* in) {
  return std::max(end_of(s.weight, in[0].C), end_of(s.bias, in[0].C));
}

// ---- runs ----

Epilogue epilogue(const Call& call) { return {call.constant(call.step.bias), call.step.activation}; }
Residual residual(const Call& call) {
  if (call.step.reads.size() < 2) return {};
  return {call.read[1], strides_of(call.out, call.pitch[1])};
}
Pixels pixels(const Call& call, int i) { return {call.read[i], call.pitch[i]}; }
Written written(const Call& call) { return {call.write, call.out_pitch}; }

void run_product(const Call& call) {
  product_forward_packed(call.shape, call.read[0], call.constant(call.step.weight), epilogue(call), residual(call),
                         call.write);
}
void run_convolution(const Call& call) {
  windows_forward(call.shape, call.read[0], call.constant(call.step.weight), epilogue(call), residual(call),
                  call.write);
}
DepthwiseShape depthwise_shape(const Step& s, const Size& in, const Size& out) {
  return {in.H,   in.W,         out.H,        out.W,          s.R, s.S, s.stride_h, s.stride_w, s.top,
          s.left, s.dilation_h, s.dilation_w, group_of(s, in)};
}
void run_depthwise(const Call& call) {
  depthwise_rows_forward(call.out.N, call.out.C, depthwise_shape(call.step, call.in[0], call.out),
                         {call.read[0], call.pitch[0]}, call.constant(call.step.weight), epilogue(call),
                         {call.write, call.out_pitch});
}
void run_slice(const Call& call) {
  copy_channels(call.out, {call.read[0] + call.step.begin, call.pitch[0]}, written(call));
}
void run_concat(const Call& call) {
  int64_t offset = 0;
  for (size_t i = 0; i < call.step.reads.size(); offset += call.in[i++].C) {
    const Written to{call.write + offset, call.out_pitch};
    if (call.read[i] != to.data) copy_channels(call.in[i], pixels(call, static_cast<int>(i)), to);
  }
}
void run_interleave(const Call& call) {
  Pixels from[kMostReads] = {};
  const int count = static_cast<int>(call.step.reads.size());
  for (int i = 0; i < count; ++i) from[i] = pixels(call, i);
  interleave(call.in[0], count, from, written(call));
}
void run_mean(const Call& call) { mean(call.in[0], call.read[0], call.write); }
void run_add(const Call& call) { add(call.out, pixels(call, 0), pixels(call, 1), call.step.activation, written(call)); }
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

// ---- blocks ----

// The sizes of e, d and y (cpu/separable/inverted_residual.h).
struct BlockSizes {
  Size expanded, convolved, projected;
  BlockSizes(const Block& b, const Size* in) : expanded(b.expand ? product_size(*b.expand, in) : in[0]) {
    convolved = b.depthwise->kind->size(*b.depthwise, &expanded);
    projected = windows(*b.project, convolved, b.project->K);
  }
};
Size block_size(const Step& step, const Size* in) {
  const Size out = BlockSizes(step.block, in).projected;
  if (step.reads.size() > 1) demand_equal(out, in[1], "the output and its residual");
  return out;
}
int64_t block_constants(const Step& step, const Size* in) {
  const Block& b = step.block;
  const BlockSizes sizes(b, in);
  int64_t end =
      std::max(depthwise_constants(*b.depthwise, &sizes.expanded), product_constants(*b.project, &sizes.convolved));
  if (b.expand) end = std::max(end, product_constants(*b.expand, in));
  if (b.squeeze) {
    const Size squeezed{in[0].N, 1, 1, b.squeeze->K};
    end = std::max({end, product_constants(*b.squeeze, &sizes.convolved), product_constants(*b.excite, &squeezed)});
    if (b.excite->K != sizes.convolved.C) throw std::invalid_argument("a gate has not one number a channel");
  }
  return end;
}
void run_block(const Call& call) {
  const Block& b = call.step.block;
  const BlockSizes sizes(b, call.in);
  InvertedResidualShape shape;
  shape.N = call.in[0].N, shape.C = call.in[0].C, shape.E = sizes.expanded.C, shape.K = call.out.C;
  shape.depthwise = depthwise_shape(*b.depthwise, sizes.expanded, sizes.convolved);
  const auto weight = [&](const Step& step) { return call.constant(step.weight); };
  const auto end = [&](const Step& step) { return Epilogue{call.constant(step.bias), step.activation}; };
  InvertedResidualMemory m;
  m.x = call.read[0], m.x_pixel = call.pitch[0], m.y = call.write, m.y_pixel = call.out_pitch;
  if (call.step.reads.size() > 1) m.residual = call.read[1], m.residual_pixel = call.pitch[1];
  if (b.expand) m.expand = weight(*b.expand), m.expand_epilogue = end(*b.expand);
  m.depthwise = weight(*b.depthwise), m.depthwise_epilogue = end(*b.depthwise);
  if (b.squeeze) {
    shape.M = b.squeeze->K;
    m.squeeze = weight(*b.squeeze), m.squeeze_epilogue = end(*b.squeeze);
    m.excite = weight(*b.excite), m.excite_bias = call.constant(b.excite->bias);
    m.gate = b.hard_gate ? Gate::hardsigmoid : Gate::sigmoid;
  }
  m.project = weight(*b.project), m.project_epilogue = end(*b.project);
  inverted_residual_forward(shape, m);
}

// ---- two products ----

Size hidden_size(const Step& step, const Size* in) { return product_size(*step.perceptron.hidden, in); }
Size perceptron_size(const Step& step, const Size* in) {
  const Size hidden = hidden_size(step, in),
             out = windows(*step.perceptron.project, hidden, step.perceptron.project->K);
  if (step.reads.size() > 1) demand_equal(out, in[1], "the output and its residual");
  return out;
}
int64_t perceptron_constants(const Step& step, const Size* in) {
  const Size hidden = hidden_size(step, in);
  return std::max(product_constants(*step.perceptron.hidden, in), product_constants(*step.perceptron.project, &hidden));
}
void run_perceptron(const Call& call) {
  const auto& [norm, hidden, project] = call.step.perceptron;
  PerceptronShape shape;
  shape.pixels = call.in[0].N * call.in[0].pixels(), shape.C = call.in[0].C, shape.M = hidden->K, shape.K = call.out.C;
  if (norm) shape.norm = true, shape.eps = norm->eps;
  PerceptronMemory m;
  m.x = call.read[0], m.residual = residual(call).data, m.y = call.write;
  m.hidden = call.constant(hidden->weight), m.hidden_epilogue = {call.constant(hidden->bias), hidden->activation};
  m.project = call.constant(project->weight), m.project_epilogue = {call.constant(project->bias), project->activation};
  perceptron_forward(shape, m);
}

// ---- the table ----

constexpr Kind kKinds[] = {
    {"product", 1, 2, product_size, product_constants, run_product, 0b10, false, 0b11, true},
    {"conv", 1, 2, product_size, product_constants, run_convolution, 0b10, true, 0b11, true},
    {"depthwise", 1, 1, depthwise_size, depthwise_constants, run_depthwise, 0, false, 0b1, true},
    {"grouped", 1, 1, grouped_size, depthwise_constants, run_depthwise, 0, false, 0b1, true},
    {"slice", 1, 1, slice_size, no_constants, run_slice, 0, false, 0b1, true},
    {"concat", 1, kMostReads, concat_size, no_constants, run_concat, 0, false, ~0u, true},
    {"interleave", 2, kMostReads, interleave_size, no_constants, run_interleave, 0, false, ~0u, true},
    {"mean", 1, 1, mean_size, no_constants, run_mean},
    {"add", 2, 2, same, no_constants, run_add, 0b11, false, 0b11, true},
    {"mul", 2, 2, same, no_constants, run_multiply, 0b11},
    {"gate", 2, 2, gate_size, no_constants, run_gate, 0b01},
    {"affine", 1, 1, same, channel_constants, run_affine, 0b01},
    {"layer_norm", 1, 1, same, channel_constants, run_layer_norm, 0b01},
    {"activate", 1, 1, same, no_constants, run_activate, 0b01},
    {"clamp", 1, 1, same, no_constants, run_clamp, 0b01},
    {"max_pool", 1, 1, depthwise_size, no_constants, run_max_pool, 0, false, 0b1, true},
    {"mean_pool", 1, 1, depthwise_size, no_constants, run_mean_pool, 0, false, 0b1, true},
    {"padded_mean_pool", 1, 1, depthwise_size, no_constants, run_padded_mean_pool, 0, false, 0b1, true},
    {"dense", 1, 1, same, no_constants, run_dense, 0, true, 0b1},
};

constexpr Kind kBlock{"inverted_residual", 1, 2, block_size, block_constants, run_block, 0, false, 0b11, true};
constexpr Kind kPerceptron{"perceptron", 1, 2, perceptron_size, perceptron_constants, run_perceptron, 0b11};

}  // namespace

const Kind& block_kind() { return kBlock; }
const Kind& perceptron_kind() { return kPerceptron; }

const Kind& kind_of(std::string_view name) {
  for (const Kind& kind : kKinds) {
    if (name == kind.name) return kind;
  }
  throw std::invalid_argument("unknown step '" + std::string(name) + "'");
}

}  // namespace sepconv::cpu::network
