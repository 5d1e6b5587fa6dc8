#include "checks.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>

#include "operand_layout.h"

namespace sepconv {
namespace {

using at::IntArrayRef;
using at::Tensor;

// Four sizes and strides of a tensor, as the kernels want them.
Strides strides_of(const Tensor& t) {
  const IntArrayRef s = t.strides();
  return {s[0], s[1], s[2], s[3]};
}

// The layout of a fresh image.
Layout fresh_layout(bool channels_last) { return channels_last ? Layout::nhwc : Layout::nchw; }

bool suggests_channels_last(const Tensor& t) { return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast; }

// True if the four dimensions, taken from the innermost out, follow each other without gaps or overlaps.
bool is_dense(IntArrayRef size, IntArrayRef stride) {
  std::array<int, 4> order{0, 1, 2, 3};
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    return size[a] != 1 && (size[b] == 1 || stride[a] < stride[b]);  // dimensions of size 1 have no say: last
  });
  int64_t expected = 1;
  for (const int d : order) {
    if (size[d] == 1) continue;
    if (stride[d] != expected) return false;
    expected *= size[d];
  }
  return true;
}

// The strides asked for if a tensor of this size with them has neither gaps nor overlaps; else the nearest dense ones.
Strides dense_strides_like(IntArrayRef size, IntArrayRef stride) {
  if (is_dense(size, stride)) return {stride[0], stride[1], stride[2], stride[3]};
  return dense_strides(size[1], size[2], size[3], fresh_layout(c10::is_channels_last_strides_2d(size, stride)));
}

Tensor empty(std::array<int64_t, 4> size, const Strides& s, const Tensor& like) {
  return at::empty_strided(size, std::array<int64_t, 4>{s.n, s.c, s.h, s.w}, like.options());
}

void check_rank(const char* name, size_t rank) {
  TORCH_CHECK(rank == 4, name, " must have 4 dimensions, but has ", rank);
}

void check_tensor(const char* name, const Tensor& t, const Tensor& reference, const char* reference_name) {
  TORCH_CHECK(t.layout() == at::kStrided, name, " must be a dense tensor, but has layout ", t.layout());
  TORCH_CHECK(t.device() == reference.device(), name, " is on device ", t.device(), ", but ", reference_name,
              " is on device ", reference.device());
  TORCH_CHECK(t.scalar_type() == reference.scalar_type(), name, " has dtype ", t.scalar_type(), ", but ",
              reference_name, " has dtype ", reference.scalar_type());
}

void check_pair(const char* name, IntArrayRef values, int64_t minimum) {
  TORCH_CHECK(values.size() == 2, name, " must have 2 entries (height, width), but has ", values.size());
  TORCH_CHECK(values[0] >= minimum && values[1] >= minimum, name, " must be at least ", minimum, ", but is ", values);
}

// One output dimension; the rule of every convolution: floor((size + padding - extent) / stride) + 1.
int64_t output_size(const char* weight_name, const char* name, int64_t size, int64_t padding, int64_t kernel,
                    int64_t stride, int64_t dilation) {
  const int64_t extent = dilation * (kernel - 1) + 1;
  TORCH_CHECK(size + padding >= extent, weight_name, " of ", name, " ", kernel, " with dilation ", dilation, " spans ",
              extent, " pixels, but the padded input has a ", name, " of ", size + padding);
  return (size + padding - extent) / stride + 1;
}

// F.pad's rules: a reflection has no edge twice, and neither it nor a circle goes round more than once.
void check_padding_mode(PaddingMode mode, const char* name, int64_t size, int64_t before, int64_t after) {
  if (mode == PaddingMode::zeros || (before == 0 && after == 0)) return;
  const auto stop = [&](const char* rule) {
    TORCH_CHECK(false, "padding of mode ", kPaddingModeNames[static_cast<int>(mode)], " must be ", rule, " input's ",
                name, ", ", size, ", but is ", before, " before it and ", after, " after it");
  };
  const int64_t most = std::max(before, after);
  if (mode == PaddingMode::reflect && most >= size) stop("less than");
  if (mode == PaddingMode::circular && most > size) stop("at most");
  TORCH_CHECK(size > 0, "input must have a ", name, " of at least 1 to be padded, but has 0");
}

// Everything that follows from two sizes and the arguments, tensors unseen.
ConvShape check_geometry(IntArrayRef input, IntArrayRef weight, const ConvArgs& args,
                         const char* weight_name = "weight") {
  check_rank("input", input.size());
  check_rank(weight_name, weight.size());
  check_pair("stride", args.stride, 1);
  check_pair("dilation", args.dilation, 1);
  const IntArrayRef padding = args.padding;
  TORCH_CHECK(padding.size() == 2 || padding.size() == 4,
              "padding must have 2 entries (height, width) or 4 (top, bottom, left, right), but has ", padding.size());
  for (const int64_t p : padding) TORCH_CHECK(p >= 0, "padding must be at least 0, but is ", padding);
  TORCH_CHECK(args.groups >= 1, "groups must be at least 1, but is ", args.groups);
  // So that no extent overflows: a kernel, too, has fewer than 2^31 rows.
  constexpr int64_t kMost = int64_t{1} << 31;
  const auto check_most = [](const char* name, IntArrayRef values) {
    for (const int64_t v : values) TORCH_CHECK(v < kMost, name, " must be below 2^31, but is ", values);
  };
  check_most("stride", args.stride), check_most("padding", padding), check_most("dilation", args.dilation);

  const int64_t C = input[1], K = weight[0], R = weight[2], S = weight[3];
  TORCH_CHECK(R >= 1 && S >= 1, weight_name, " must have a kernel of at least 1x1, but has ", R, "x", S);
  TORCH_CHECK(K >= args.groups, weight_name, " must have at least groups = ", args.groups, " output channels, but has ",
              K);
  TORCH_CHECK(K % args.groups == 0, "groups = ", args.groups, " must divide the ", K, " output channels of ",
              weight_name);
  TORCH_CHECK(C == weight[1] * args.groups, "input must have ", weight[1] * args.groups, " channels (", weight_name,
              "'s ", weight[1], " times groups = ", args.groups, "), but has ", C);
  TORCH_CHECK(C >= 1, "input must have at least 1 channel, but has ", C);

  const bool asymmetric = padding.size() == 4;
  const int64_t pad_top = padding[0], pad_bottom = asymmetric ? padding[1] : padding[0];
  const int64_t pad_left = asymmetric ? padding[2] : padding[1], pad_right = asymmetric ? padding[3] : padding[1];

  check_padding_mode(args.padding_mode, "height", input[2], pad_top, pad_bottom);
  check_padding_mode(args.padding_mode, "width", input[3], pad_left, pad_right);

  ConvShape shape;
  shape.N = input[0], shape.C = C, shape.H = input[2], shape.W = input[3];
  shape.K = K, shape.R = R, shape.S = S;
  shape.groups = args.groups;
  shape.stride_h = args.stride[0], shape.stride_w = args.stride[1];
  shape.dilation_h = args.dilation[0], shape.dilation_w = args.dilation[1];
  shape.pad_h = pad_top, shape.pad_w = pad_left;
  shape.P = output_size(weight_name, "height", shape.H, pad_top + pad_bottom, R, shape.stride_h, shape.dilation_h);
  shape.Q = output_size(weight_name, "width", shape.W, pad_left + pad_right, S, shape.stride_w, shape.dilation_w);
  return shape;
}

void check_grad_output(const Tensor& grad_output, const ConvShape& shape) {
  const std::array<int64_t, 4> expected{shape.N, shape.K, shape.P, shape.Q};
  TORCH_CHECK(grad_output.sizes() == IntArrayRef(expected), "grad_output must have size ", IntArrayRef(expected),
              ", but has ", grad_output.sizes());
}

void check_bias(const char* name, const std::optional<Tensor>& bias, const Tensor& input, int64_t outputs,
                const char* weight_name) {
  if (!bias || !bias->defined()) return;
  check_tensor(name, *bias, input, "input");
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == outputs, name, " must have size [", outputs,
              "], one value an output channel of ", weight_name, ", but has ", bias->sizes());
}

void check_strides_rank(const char* name, IntArrayRef size, IntArrayRef stride) {
  TORCH_CHECK(size.size() == stride.size(), name, " must have as many entries as its size, ", size.size(), ", but has ",
              stride.size());
}

}  // namespace

ConvShape check_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        const ConvArgs& args) {
  check_tensor("input", input, input, "input");
  check_tensor("weight", weight, input, "input");
  ConvShape shape = check_geometry(input.sizes(), weight.sizes(), args);
  check_bias("bias", bias, input, shape.K, "weight");
  shape.x = strides_of(input);
  shape.w = strides_of(weight);
  shape.y = dense_strides(shape.K, shape.P, shape.Q,
                          fresh_layout(suggests_channels_last(input) || suggests_channels_last(weight)));
  return shape;
}

ConvShape check_grad_input(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_size,
                           IntArrayRef input_stride, const ConvArgs& args) {
  check_tensor("grad_output", grad_output, grad_output, "grad_output");
  check_tensor("weight", weight, grad_output, "grad_output");
  ConvShape shape = check_geometry(input_size, weight.sizes(), args);
  check_grad_output(grad_output, shape);
  check_strides_rank("input_stride", input_size, input_stride);
  shape.x = dense_strides_like(input_size, input_stride);
  shape.w = strides_of(weight);
  shape.y = strides_of(grad_output);
  return shape;
}

ConvShape check_grad_weight(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_size,
                            IntArrayRef weight_stride, const ConvArgs& args) {
  check_tensor("grad_output", grad_output, grad_output, "grad_output");
  check_tensor("input", input, grad_output, "grad_output");
  ConvShape shape = check_geometry(input.sizes(), weight_size, args);
  check_grad_output(grad_output, shape);
  check_strides_rank("weight_stride", weight_size, weight_stride);
  shape.x = strides_of(input);
  shape.w = dense_strides_like(weight_size, weight_stride);
  shape.y = strides_of(grad_output);
  return shape;
}

SeparableShape check_separable(const Tensor& input, const Tensor& depthwise_weight,
                               const std::optional<Tensor>& depthwise_bias, const Tensor& pointwise_weight,
                               const std::optional<Tensor>& pointwise_bias, IntArrayRef stride, IntArrayRef padding,
                               IntArrayRef dilation) {
  check_tensor("input", input, input, "input");
  check_tensor("depthwise_weight", depthwise_weight, input, "input");
  check_tensor("pointwise_weight", pointwise_weight, input, "input");
  check_rank("input", input.dim());
  check_rank("depthwise_weight", depthwise_weight.dim());
  check_rank("pointwise_weight", pointwise_weight.dim());
  const IntArrayRef wd = depthwise_weight.sizes(), wp = pointwise_weight.sizes();
  const int64_t C = input.size(1), middle = wd[0];
  TORCH_CHECK(C >= 1, "input must have at least 1 channel, but has ", C);
  TORCH_CHECK(wd[1] == 1, "depthwise_weight must have size [C * multiplier, 1, R, S], but has ", wd);
  TORCH_CHECK(middle >= C && middle % C == 0, "depthwise_weight must have a multiple of input's ", C,
              " channels as its output channels, but has ", middle);
  TORCH_CHECK(wp[2] == 1 && wp[3] == 1, "pointwise_weight must have size [K, C * multiplier, 1, 1], but has ", wp);
  TORCH_CHECK(wp[1] == middle, "pointwise_weight must have ", middle,
              " input channels, as many as depthwise_weight has output channels, but has ", wp[1]);
  check_bias("depthwise_bias", depthwise_bias, input, middle, "depthwise_weight");
  check_bias("pointwise_bias", pointwise_bias, input, wp[0], "pointwise_weight");

  SeparableShape shape;
  ConvShape &d = shape.depthwise, &p = shape.pointwise;
  d = check_geometry(input.sizes(), wd, {stride, padding, dilation, C}, "depthwise_weight");
  d.x = strides_of(input), d.w = strides_of(depthwise_weight);
  d.y = dense_strides(d.K, d.P, d.Q,
                      fresh_layout(suggests_channels_last(input) || suggests_channels_last(depthwise_weight)));
  const std::array<int64_t, 4> size{d.N, d.K, d.P, d.Q}, strides{d.y.n, d.y.c, d.y.h, d.y.w};
  const std::array<int64_t, 2> one{1, 1}, zero{0, 0};
  p = check_geometry(size, wp, {one, zero, one, 1}, "pointwise_weight");
  p.x = d.y, p.w = strides_of(pointwise_weight);
  p.y = dense_strides(p.K, p.P, p.Q,
                      fresh_layout(c10::is_channels_last_strides_2d(IntArrayRef(size), IntArrayRef(strides)) ||
                                   suggests_channels_last(pointwise_weight)));
  return shape;
}

void check_sequence(const Tensor& input, const Tensor& weight) {
  TORCH_CHECK(input.dim() == 2 || input.dim() == 3, "input must have 3 or 2 dimensions, but has ", input.dim());
  TORCH_CHECK(weight.dim() == 3, "weight must have 3 dimensions, but has ", weight.dim());
}

ConvShape check_spatial_separable(const Tensor& input, const Tensor& column, const Tensor& row, IntArrayRef padding) {
  check_tensor("input", input, input, "input");
  check_rank("input", input.dim());
  const int64_t C = input.size(1);
  const auto check_filter = [&](const char* name, const char* length, const Tensor& filter) {
    check_tensor(name, filter, input, "input");
    TORCH_CHECK(filter.dim() == 2 && (filter.size(0) == C || filter.size(0) == 1), name, " must have size [", C, ", ",
                length, "], one filter a channel of input, or [1, ", length, "], but has ", filter.sizes());
  };
  check_filter("column", "R", column);
  check_filter("row", "S", row);
  ConvShape shape = check_geometry(input.sizes(), {C, 1, column.size(1), row.size(1)}, {{1, 1}, padding, {1, 1}, C},
                                   "column and row");
  shape.x = strides_of(input);
  shape.y = dense_strides(C, shape.P, shape.Q, fresh_layout(suggests_channels_last(input)));
  return shape;
}

Tensor empty_output(const ConvShape& s, const Tensor& like) { return empty({s.N, s.K, s.P, s.Q}, s.y, like); }
Tensor empty_grad_input(const ConvShape& s, const Tensor& like) { return empty({s.N, s.C, s.H, s.W}, s.x, like); }
Tensor empty_grad_weight(const ConvShape& s, const Tensor& like) {
  return empty({s.K, s.channels_per_group(), s.R, s.S}, s.w, like);
}

namespace {

// The place of a name in a list of them, or a ValueError that lists them.
template <int kCount>
int parse_name(const char* argument, std::string_view name, const char* const (&names)[kCount]) {
  for (int i = 0; i < kCount; ++i) {
    if (name == names[i]) return i;
  }
  std::string known = names[0];
  for (int i = 1; i < kCount; ++i) known += std::string(", ") + names[i];
  TORCH_CHECK_VALUE(false, argument, " must be one of ", known, ", but is '", name, "'");
}

}  // namespace

Activation parse_activation(std::string_view name) {
  return static_cast<Activation>(parse_name("activation", name, kActivationNames));
}

PaddingMode parse_padding_mode(std::string_view name) {
  return static_cast<PaddingMode>(parse_name("padding_mode", name, kPaddingModeNames));
}

bool has_kernel_dtype(const Tensor& t) {
  const at::ScalarType type = t.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::float32;
    case at::kDouble: return DType::float64;
    case at::kHalf: return DType::float16;
    case at::kBFloat16: return DType::bfloat16;
    default: TORCH_CHECK(false, "dtype must be float32, float64, float16 or bfloat16, but is ", t.scalar_type());
  }
}

}  // namespace sepconv
