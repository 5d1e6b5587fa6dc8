#include "ops/checks.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <array>
#include <limits>

#include "core/activation.h"
#include "core/operand_layout.h"
#include "cpu/pointwise/product.h"
#include "ops/inverted_residual.h"
#include "ops/packed.h"

namespace sepconv {
// A tensor may outlive its memory: FSDP and offloading free it by resizing the storage.
void check_storage(const char* name, const at::Tensor& t) {
  if (t.numel() == 0) return;
  const at::IntArrayRef sizes = t.sizes(), strides = t.strides();  // taken once: Tensor::size(dim) checks at every call
  int64_t last = t.storage_offset();
  for (size_t dim = 0; dim < sizes.size(); ++dim) last += (sizes[dim] - 1) * strides[dim];
  const size_t needed = static_cast<size_t>(last + 1) * t.element_size(), bytes = t.storage().nbytes();
  TORCH_CHECK(needed <= bytes, name, " of size ", sizes, " and strides ", strides, " needs a storage of ", needed,
              " bytes, but its storage has ", bytes);
}

namespace {

using at::IntArrayRef;
using at::Tensor;

using Four = std::array<int64_t, 4>;

// The four sizes and strides of a tensor, [N, C, H, W] or [K, C / groups, R, S]. Where it has no batch or no height,
// they are those that unsqueeze() would give it.
struct Image {
  Four size, stride;

  Image(IntArrayRef sizes, IntArrayRef strides, bool sequence) {
    const size_t channel = sizes.size() - (sequence ? 2 : 3), last = sizes.size() - 1;
    size = {1, sizes[channel], 1, sizes[last]};
    stride = {sizes[channel] * strides[channel], strides[channel], sizes[last] * strides[last], strides[last]};
    if (!sequence) size[2] = sizes[last - 1], stride[2] = strides[last - 1];
    if (channel == 1) size[0] = sizes[0], stride[0] = strides[0];
  }
  Image(const Tensor& t, bool sequence) : Image(t.sizes(), t.strides(), sequence) {}

  bool suggests_channels_last() const {
    return c10::is_channels_last_strides_2d(IntArrayRef(size), IntArrayRef(stride));
  }
  operator Strides() const { return {stride[0], stride[1], stride[2], stride[3]}; }
};

// The layout of a fresh image.
Layout fresh_layout(bool channels_last) { return channels_last ? Layout::nhwc : Layout::nchw; }

// True if the four dimensions, taken from the innermost out, follow each other without gaps or overlaps.
bool is_dense(const Four& size, const Four& stride) {
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
Strides dense_strides_like(const Image& asked) {
  if (is_dense(asked.size, asked.stride)) return asked;
  return dense_strides(asked.size[1], asked.size[2], asked.size[3], fresh_layout(asked.suggests_channels_last()));
}

// The dimensions that a result has.
Result result_of(const Four& size, const Strides& s, bool batched, bool sequence) {
  Result result;
  const auto add = [&](int64_t count, int64_t stride) {
    result.size.push_back(count), result.stride.push_back(stride);
  };
  if (batched) add(size[0], s.n);
  add(size[1], s.c);
  if (!sequence) add(size[2], s.h);
  add(size[3], s.w);
  return result;
}

Result output_of(const ConvShape& s, bool batched, bool sequence) {
  return result_of({s.N, s.K, s.P, s.Q}, s.y, batched, sequence);
}

void check_image_rank(size_t rank, bool sequence) {
  if (sequence) {
    TORCH_CHECK(rank == 3 || rank == 2, "input must have 3 or 2 dimensions, but has ", rank);
  } else {
    TORCH_CHECK(rank == 4 || rank == 3, "input must have 4 dimensions, but has ", rank, " (3 for one without a batch)");
  }
}

void check_weight_rank(const char* name, size_t rank, bool sequence) {
  const size_t expected = sequence ? 3 : 4;
  TORCH_CHECK(rank == expected, name, " must have ", expected, " dimensions, but has ", rank);
}

void check_tensor(const char* name, const Tensor& t, const Tensor& reference, const char* reference_name) {
  TORCH_CHECK(t.layout() == at::kStrided, name, " must be a dense tensor, but has layout ", t.layout());
  TORCH_CHECK(t.device() == reference.device(), name, " is on device ", t.device(), ", but ", reference_name,
              " is on device ", reference.device());
  TORCH_CHECK(t.scalar_type() == reference.scalar_type(), name, " has dtype ", t.scalar_type(), ", but ",
              reference_name, " has dtype ", reference.scalar_type());
  check_storage(name, t);
}

void check_packable(const char* name, const Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kFloat, name, " must be float32, but is ", t.scalar_type());
  TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, but has ", t.dim());
}

void check_entries(const char* name, IntArrayRef values, size_t entries, int64_t minimum) {
  TORCH_CHECK(values.size() == entries, name, " must have ", entries,
              entries == 1 ? " entry, but has " : " entries (height, width), but has ", values.size());
  for (const int64_t v : values) TORCH_CHECK(v >= minimum, name, " must be at least ", minimum, ", but is ", values);
}

// One output dimension; the rule of every convolution: floor((size + padding - extent) / stride) + 1.
int64_t output_size(const char* weight_name, const char* name, int64_t padded_size, int64_t kernel, int64_t stride,
                    int64_t dilation) {
  const int64_t extent = dilation * (kernel - 1) + 1;
  TORCH_CHECK(padded_size >= extent, weight_name, " of ", name, " ", kernel, " with dilation ", dilation, " spans ",
              extent, " pixels, but the padded input has a ", name, " of ", padded_size);
  return (padded_size - extent) / stride + 1;
}

// So that no extent overflows: a kernel, too, has fewer than 2^31 rows.
constexpr int64_t kMost = int64_t{1} << 31;

// One dimension of a call with zeros around its image.
struct Axis {
  int64_t size, kernel, dilation, before, after;
};

// The same call with taps and zeros nearer to the image, where they are 2^31 and more away and the output has the
// image's size (before a stride). Only the tap that lies nearest to its output pixel can meet the image. It keeps its
// distance, or stays outside; the others stay outside.
Axis nearer(Axis a) {
  if (a.kernel == 1) return a.dilation = 1, a;
  const int64_t farthest = std::max({a.dilation, a.before, a.after});
  if (farthest < kMost) return a;
  const bool overflows = farthest > std::numeric_limits<int64_t>::max() / 2 / a.kernel;
  if (a.dilation < 2 * a.size || overflows || a.before + a.after != a.dilation * (a.kernel - 1)) return a;
  const int64_t nearest = (a.before + a.dilation / 2) / a.dilation;
  const int64_t distance = std::clamp(a.before - nearest * a.dilation, -a.size, a.size);
  a.dilation = std::max<int64_t>(2 * a.size, 1);
  a.before = nearest * a.dilation + distance;
  a.after = a.dilation * (a.kernel - 1) - a.before;
  return a;
}

// F.pad's rules: a reflection has no edge twice, and neither it nor a circle goes round more than once.
void check_padding_mode(PaddingMode mode, const char* name, int64_t size, int64_t before, int64_t after) {
  if (mode == PaddingMode::zeros || (before == 0 && after == 0)) return;
  const auto stop = [&](const char* rule) {
    TORCH_CHECK(false, "padding of mode ", name_of(mode), " must be ", rule, " input's ", name, ", ", size, ", but is ",
                before, " before it and ", after, " after it");
  };
  const int64_t most = std::max(before, after);
  if (mode == PaddingMode::reflect && most >= size) stop("less than");
  if (mode == PaddingMode::circular && most > size) stop("at most");
  TORCH_CHECK(size > 0, "input must have a ", name, " of at least 1 to be padded, but has 0");
}

// Everything that follows from two sizes and the arguments, tensors unseen.
ConvShape check_geometry(IntArrayRef input_size, IntArrayRef weight_size, const ConvArgs& args,
                         const char* weight_name = "weight") {
  const bool sequence = args.for_sequences();
  check_image_rank(input_size.size(), sequence);
  check_weight_rank(weight_name, weight_size.size(), sequence);
  const size_t entries = sequence ? 1 : 2;
  check_entries("stride", args.stride, entries, 1);
  check_entries("dilation", args.dilation, entries, 1);
  const IntArrayRef padding = args.padding;
  if (sequence) {
    TORCH_CHECK(padding.size() == 1 || padding.size() == 2, "padding must have 1 entry or 2 (left, right), but has ",
                padding.size());
  } else {
    TORCH_CHECK(padding.size() == 2 || padding.size() == 4,
                "padding must have 2 entries (height, width) or 4 (top, bottom, left, right), but has ",
                padding.size());
  }
  for (const int64_t p : padding) TORCH_CHECK(p >= 0, "padding must be at least 0, but is ", padding);
  TORCH_CHECK(args.groups >= 1, "groups must be at least 1, but is ", args.groups);

  const Four input = Image(input_size, input_size, sequence).size,
             weight = Image(weight_size, weight_size, sequence).size;
  const int64_t C = input[1], K = weight[0], R = weight[2], S = weight[3];
  TORCH_CHECK(R >= 1 && S >= 1, weight_name, " must have a kernel of at least 1x1, but has ", R, "x", S);
  TORCH_CHECK(K >= args.groups, weight_name, " must have at least groups = ", args.groups, " output channels, but has ",
              K);
  TORCH_CHECK(K % args.groups == 0, "groups = ", args.groups, " must divide the ", K, " output channels of ",
              weight_name);
  TORCH_CHECK(C == weight[1] * args.groups, "input must have ", weight[1] * args.groups, " channels (", weight_name,
              "'s ", weight[1], " times groups = ", args.groups, "), but has ", C);
  TORCH_CHECK(C >= 1, "input must have at least 1 channel, but has ", C);

  // What a sequence has no entry for is the one row's: stride and dilation of 1, no padding.
  const bool asymmetric = padding.size() > entries;
  const int64_t stride_h = sequence ? 1 : args.stride[0], stride_w = args.stride.back();
  const int64_t pad_top = sequence ? 0 : padding[0], pad_bottom = sequence ? 0 : padding[asymmetric ? 1 : 0];
  const int64_t pad_left = padding[asymmetric ? padding.size() - 2 : entries - 1], pad_right = padding.back();

  check_padding_mode(args.padding_mode, "height", input[2], pad_top, pad_bottom);
  check_padding_mode(args.padding_mode, "width", input[3], pad_left, pad_right);
  const Axis height = nearer({input[2], R, sequence ? 1 : args.dilation[0], pad_top, pad_bottom});
  const Axis width = nearer({input[3], S, args.dilation.back(), pad_left, pad_right});
  for (const Axis& a : {height, width}) {
    TORCH_CHECK(a.before < kMost && a.after < kMost, "padding must be below 2^31, but is ", padding);
    TORCH_CHECK(a.dilation < kMost, "dilation must be below 2^31, but is ", args.dilation);
  }

  ConvShape shape;
  shape.N = input[0], shape.C = C, shape.H = input[2], shape.W = input[3];
  shape.K = K, shape.R = R, shape.S = S;
  shape.groups = args.groups;
  shape.dilation_h = height.dilation, shape.dilation_w = width.dilation;
  shape.pad_h = height.before, shape.pad_w = width.before;
  const int64_t rows = shape.H + height.before + height.after, columns = shape.W + width.before + width.after;
  shape.P = output_size(weight_name, "height", rows, R, stride_h, shape.dilation_h);
  shape.Q = output_size(weight_name, "width", columns, S, stride_w, shape.dilation_w);
  // A stride that leads past the image leads nowhere: as large as the image it does the same, and overflows nothing.
  shape.stride_h = std::min(stride_h, rows), shape.stride_w = std::min(stride_w, columns);
  return shape;
}

void check_grad_output(const Tensor& grad_output, const Result& expected) {
  TORCH_CHECK(grad_output.sizes() == IntArrayRef(expected.size), "grad_output must have size ",
              IntArrayRef(expected.size), ", but has ", grad_output.sizes());
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

Checked check_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const ConvArgs& args) {
  check_tensor("input", input, input, "input");
  check_tensor("weight", weight, input, "input");
  ConvShape shape = check_geometry(input.sizes(), weight.sizes(), args);
  check_bias("bias", bias, input, shape.K, "weight");
  const bool sequence = args.for_sequences();
  const Image x(input, sequence), w(weight, sequence);
  shape.x = x, shape.w = w;
  shape.y =
      dense_strides(shape.K, shape.P, shape.Q, fresh_layout(x.suggests_channels_last() || w.suggests_channels_last()));
  return {shape, output_of(shape, input.dim() == weight.dim(), sequence)};
}

// A tensor that lies beside the result, or is it.
static void check_like_result(const char* name, const Tensor& t, const Result& result, const Tensor& input) {
  check_tensor(name, t, input, "input");
  TORCH_CHECK(t.sizes() == IntArrayRef(result.size), name, " must have the result's size ", IntArrayRef(result.size),
              ", but has ", t.sizes());
}

void check_residual(const Tensor& residual, const Result& result, const Tensor& input) {
  check_like_result("residual", residual, result, input);
}

Checked check_grad_input(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_size,
                         IntArrayRef input_stride, const ConvArgs& args) {
  check_tensor("grad_output", grad_output, grad_output, "grad_output");
  check_tensor("weight", weight, grad_output, "grad_output");
  ConvShape shape = check_geometry(input_size, weight.sizes(), args);
  const bool sequence = args.for_sequences(), batched = static_cast<int64_t>(input_size.size()) == weight.dim();
  check_grad_output(grad_output, output_of(shape, batched, sequence));
  check_strides_rank("input_stride", input_size, input_stride);
  shape.x = dense_strides_like(Image(input_size, input_stride, sequence));
  shape.w = Image(weight, sequence);
  shape.y = Image(grad_output, sequence);
  return {shape, result_of({shape.N, shape.C, shape.H, shape.W}, shape.x, batched, sequence)};
}

Checked check_grad_weight(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_size,
                          IntArrayRef weight_stride, const ConvArgs& args) {
  check_tensor("grad_output", grad_output, grad_output, "grad_output");
  check_tensor("input", input, grad_output, "grad_output");
  ConvShape shape = check_geometry(input.sizes(), weight_size, args);
  const bool sequence = args.for_sequences(), batched = input.dim() == static_cast<int64_t>(weight_size.size());
  check_grad_output(grad_output, output_of(shape, batched, sequence));
  check_strides_rank("weight_stride", weight_size, weight_stride);
  shape.x = Image(input, sequence);
  shape.w = dense_strides_like(Image(weight_size, weight_stride, sequence));
  shape.y = Image(grad_output, sequence);
  return {shape, result_of({shape.K, shape.channels_per_group(), shape.R, shape.S}, shape.w, true, sequence)};
}

void packed::check_weight(const Tensor& weight) {
  check_tensor("weight", weight, weight, "weight");
  check_packable("weight", weight);
  TORCH_CHECK(weight.size(2) == 1 && weight.size(3) == 1, "weight must have a kernel of 1x1, but has ", weight.size(2),
              "x", weight.size(3));
}

Tensor packed::refuse_pointwise(const Tensor& input, const Tensor& packed, const std::optional<Tensor>&,
                                const std::optional<Tensor>&, int64_t, IntArrayRef, std::string_view) {
  TORCH_CHECK(false, "a product with a packed weight runs on the CPU, but got input on ", input.device(),
              " and packed on ", packed.device(), ": freeze the model on that device instead");
}

Checked packed::check_pointwise(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& residual, int64_t out_channels, IntArrayRef stride,
                                const Tensor* output) {
  check_tensor("input", input, input, "input");
  check_packable("input", input);
  check_tensor("packed", packed, input, "input");
  check_entries("stride", stride, 2, 1);
  const std::array<int64_t, 3> panels{(out_channels + 15) / 16, input.size(1), 16};
  TORCH_CHECK(packed.sizes() == IntArrayRef(panels) && packed.is_contiguous(), "packed must be contiguous, of size ",
              IntArrayRef(panels), " (", out_channels, " output and ", input.size(1), " input channels), but has size ",
              packed.sizes(), " and strides ", packed.strides());
  ConvShape shape =
      check_geometry(input.sizes(), {out_channels, input.size(1), 1, 1}, {stride, {0, 0}, {1, 1}, /*groups=*/1});
  check_bias("bias", bias, input, shape.K, "packed");
  const Image x(input, false);
  shape.x = x;
  shape.y = dense_strides(shape.K, shape.P, shape.Q, fresh_layout(x.suggests_channels_last()));
  const Result result = output_of(shape, /*batched=*/true, /*sequence=*/false);
  if (residual && residual->defined()) check_residual(*residual, result, input);
  if (output != nullptr) {
    check_like_result("output", *output, result, input);
    shape.y = Image(*output, false);
    TORCH_CHECK(cpu::product_can_write(shape),
                "output must have dense planes, or dense channels and pixels at one distance, but has strides ",
                output->strides());
  }
  return {shape, result};
}

CheckedSeparable check_separable(const Tensor& input, const Tensor& depthwise_weight,
                                 const std::optional<Tensor>& depthwise_bias, const Tensor& pointwise_weight,
                                 const std::optional<Tensor>& pointwise_bias, IntArrayRef stride, IntArrayRef padding,
                                 IntArrayRef dilation) {
  check_tensor("input", input, input, "input");
  check_tensor("depthwise_weight", depthwise_weight, input, "input");
  check_tensor("pointwise_weight", pointwise_weight, input, "input");
  check_image_rank(input.dim(), /*sequence=*/false);
  check_weight_rank("depthwise_weight", depthwise_weight.dim(), /*sequence=*/false);
  check_weight_rank("pointwise_weight", pointwise_weight.dim(), /*sequence=*/false);
  check_entries("stride", stride, 2, 1);  // one entry would speak of a sequence
  const Image x(input, false), w_d(depthwise_weight, false), w_p(pointwise_weight, false);
  const IntArrayRef wd = depthwise_weight.sizes(), wp = pointwise_weight.sizes();
  const int64_t C = x.size[1], middle = wd[0];
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
  d.x = x, d.w = w_d;
  d.y = dense_strides(d.K, d.P, d.Q, fresh_layout(x.suggests_channels_last() || w_d.suggests_channels_last()));
  const Four size{d.N, d.K, d.P, d.Q}, strides{d.y.n, d.y.c, d.y.h, d.y.w};
  const std::array<int64_t, 2> one{1, 1}, zero{0, 0};
  p = check_geometry(size, wp, {one, zero, one, 1}, "pointwise_weight");
  p.x = d.y, p.w = w_p;
  p.y =
      dense_strides(p.K, p.P, p.Q,
                    fresh_layout(Image(size, strides, false).suggests_channels_last() || w_p.suggests_channels_last()));
  const bool batched = input.dim() == 4;
  return {shape, output_of(d, batched, false), output_of(p, batched, false)};
}

CheckedInvertedResidual check_inverted_residual(const inverted_residual::Call& c) {
  for (const std::string_view name :
       {c.expand_activation, c.depthwise_activation, c.squeeze_activation, c.project_activation}) {
    parse_activation(name);
  }
  is_hard_gate(c.gate);
  const auto present = [](const std::optional<Tensor>& t) { return t && t->defined(); };
  const auto symbolic = [](const Tensor& t) { return t.unsafeGetTensorImpl()->has_symbolic_sizes_strides(); };
  const auto numbers = [](c10::SymIntArrayRef values) { return c10::asIntArrayRefSlowOpt(values).has_value(); };
  if (symbolic(c.input) || symbolic(c.depthwise_weight) || symbolic(c.project_weight) || !numbers(c.stride) ||
      !numbers(c.padding) || !numbers(c.dilation)) {
    return {};
  }
  const IntArrayRef stride = C10_AS_INTARRAYREF_SLOW(c.stride), padding = C10_AS_INTARRAYREF_SLOW(c.padding),
                    dilation = C10_AS_INTARRAYREF_SLOW(c.dilation);
  const Tensor& input = c.input;
  check_tensor("input", input, input, "input");
  check_image_rank(input.dim(), /*sequence=*/false);
  check_entries("stride", stride, 2, 1);
  const auto check_product = [&](const char* name, const Tensor& weight, int64_t inputs, const char* before) {
    check_tensor(name, weight, input, "input");
    check_weight_rank(name, weight.dim(), /*sequence=*/false);
    TORCH_CHECK(weight.size(2) == 1 && weight.size(3) == 1, name, " must have a kernel of 1x1, but has size ",
                weight.sizes());
    TORCH_CHECK(weight.size(1) == inputs, name, " must have ", inputs, " input channels, as ", before, " has, but has ",
                weight.size(1));
    return weight.size(0);
  };
  const int64_t C = input.size(-3);
  int64_t E = C;
  if (present(c.expand_weight)) {
    E = check_product("expand_weight", *c.expand_weight, C, "input");
    check_bias("expand_bias", c.expand_bias, input, E, "expand_weight");
  } else {
    TORCH_CHECK(!present(c.expand_bias), "expand_bias needs an expand_weight, which is None");
  }
  check_tensor("depthwise_weight", c.depthwise_weight, input, "input");
  check_weight_rank("depthwise_weight", c.depthwise_weight.dim(), /*sequence=*/false);
  TORCH_CHECK(c.depthwise_weight.size(0) == E && c.depthwise_weight.size(1) == 1, "depthwise_weight must have size [",
              E, ", 1, R, S], but has ", c.depthwise_weight.sizes());
  check_bias("depthwise_bias", c.depthwise_bias, input, E, "depthwise_weight");
  CheckedInvertedResidual checked;
  at::DimVector between(input.sizes());
  between[between.size() - 3] = E;
  checked.depthwise =
      check_geometry(between, c.depthwise_weight.sizes(), {stride, padding, dilation, E}, "depthwise_weight");
  checked.M = 0;
  TORCH_CHECK(present(c.squeeze_weight) == present(c.excite_weight),
              "squeeze_weight and excite_weight come together, but ",
              present(c.squeeze_weight) ? "excite_weight" : "squeeze_weight", " is None");
  if (present(c.squeeze_weight)) {
    checked.M = check_product("squeeze_weight", *c.squeeze_weight, E, "depthwise_weight");
    check_bias("squeeze_bias", c.squeeze_bias, input, checked.M, "squeeze_weight");
    const int64_t gates = check_product("excite_weight", *c.excite_weight, checked.M, "squeeze_weight");
    TORCH_CHECK(gates == E, "excite_weight must have ", E, " output channels, as depthwise_weight has, but has ",
                gates);
    check_bias("excite_bias", c.excite_bias, input, E, "excite_weight");
  } else {
    TORCH_CHECK(!present(c.squeeze_bias), "squeeze_bias needs a squeeze_weight, which is None");
    TORCH_CHECK(!present(c.excite_bias), "excite_bias needs an excite_weight, which is None");
  }
  const int64_t K = check_product("project_weight", c.project_weight, E, "depthwise_weight");
  check_bias("project_bias", c.project_bias, input, K, "project_weight");
  checked.C = C, checked.K = K;
  const ConvShape& d = checked.depthwise;
  TORCH_CHECK(!c.residual || (K == C && d.P == d.H && d.Q == d.W), "a residual needs an output of input's size [", C,
              ", ", d.H, ", ", d.W, "], but it is [", K, ", ", d.P, ", ", d.Q, "]");
  return checked;
}

Checked check_spatial_separable(const Tensor& input, const Tensor& column, const Tensor& row, IntArrayRef padding) {
  check_tensor("input", input, input, "input");
  check_image_rank(input.dim(), /*sequence=*/false);
  const Image x(input, false);
  const int64_t C = x.size[1];
  const auto check_filter = [&](const char* name, const char* length, const Tensor& filter) {
    check_tensor(name, filter, input, "input");
    const bool one_for_all = filter.dim() == 1 || (filter.dim() == 2 && filter.size(0) == 1);
    TORCH_CHECK(one_for_all || (filter.dim() == 2 && filter.size(0) == C), name, " must have size [", C, ", ", length,
                "], one filter a channel of input, or [1, ", length, "], but has ", filter.sizes());
  };
  check_filter("column", "R", column);
  check_filter("row", "S", row);
  ConvShape shape = check_geometry(input.sizes(), {C, 1, column.size(-1), row.size(-1)}, {{1, 1}, padding, {1, 1}, C},
                                   "column and row");
  shape.x = x;
  shape.y = dense_strides(C, shape.P, shape.Q, fresh_layout(x.suggests_channels_last()));
  return {shape, output_of(shape, input.dim() == 4, false)};
}

Tensor as_image(const Tensor& t, bool sequence) {
  if (t.dim() == 4) return t;
  const Tensor rows = sequence ? t.unsqueeze(-2) : t;
  return rows.dim() == 3 ? rows.unsqueeze(0) : rows;
}

Result Result::laid_out(const Strides& s, bool sequence) const {
  const bool batched = size.size() == (sequence ? 3 : 4);
  return {size, result_of({}, s, batched, sequence).stride};
}

Tensor Result::empty(const Tensor& like) const { return at::empty_strided(size, stride, like.options()); }

Tensor Result::with_strides(const Tensor& computed) const {
  if (computed.strides() == IntArrayRef(stride)) return computed;
  for (int64_t dim = 0; dim < computed.dim(); ++dim) {
    if (computed.size(dim) > 1 && computed.stride(dim) != stride[dim]) return {};
  }
  return computed.as_strided_(computed.sizes(), stride);
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

const char* name_of(Activation a) { return kActivationNames[static_cast<int>(a)]; }

Activation parse_activation(std::string_view name) {
  return static_cast<Activation>(parse_name("activation", name, kActivationNames));
}

bool is_hard_gate(std::string_view name) {
  constexpr const char* kGates[] = {"sigmoid", "hardsigmoid"};
  return parse_name("gate", name, kGates) == 1;
}

PaddingMode parse_padding_mode(std::string_view name) {
  return static_cast<PaddingMode>(parse_name("padding_mode", name, kPaddingModeNames));
}

bool has_kernel_dtype(const Tensor& t) {
  const at::ScalarType type = t.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

const char* no_kernel_for(const Tensor& input, size_t dims) {
  if (!has_kernel_dtype(input)) return "no kernel for this dtype";
  const int64_t channel = input.dim() - 1 - static_cast<int64_t>(dims);
  return (channel == 0 || channel == 1) && input.sym_sizes()[channel] == 0 ? "an image without channels" : nullptr;
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
