#include "aten_route.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/TensorSubclassLikeUtils.h>

#include <array>
#include <vector>

#include "spatial_passes.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sepconv::aten {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

const std::array<SymInt, 2> kNoPadding{0, 0};

// ATen pads both sides alike. Padding of (top, bottom, left, right) becomes the part that both sides share, and what is
// missing at each side, in the order of constant_pad_nd (left, right, top, bottom).
struct Padding {
  std::array<SymInt, 2> shared;
  std::array<SymInt, 4> extra;
  bool asymmetric = false;

  explicit Padding(SymIntArrayRef padding) {
    if (padding.size() == 2) {
      shared = {padding[0], padding[1]};
      return;
    }
    const SymInt &top = padding[0], &bottom = padding[1], &left = padding[2], &right = padding[3];
    shared = {top.min(bottom), left.min(right)};
    extra = {left - shared[1], right - shared[1], top - shared[0], bottom - shared[0]};
    asymmetric = extra[0] != 0 || extra[1] != 0 || extra[2] != 0 || extra[3] != 0;
  }

  Tensor apply(const Tensor& image) const { return asymmetric ? at::constant_pad_nd_symint(image, extra, 0) : image; }
};

// A CPU tensor of addresses without memory: all zeros to read, and never to be written. The addresses are mapped once:
// to unmap them would interrupt every thread of the process (5 us and more a call).
std::optional<Tensor> addresses_only(at::IntArrayRef size, at::IntArrayRef stride, size_t bytes,
                                     const at::TensorOptions& options) {
#if defined(__linux__)
  static constexpr size_t kBytes = size_t{1} << 34;
  static void* const begin = mmap(nullptr, kBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin != MAP_FAILED && bytes <= kBytes) return at::from_blob(begin, size, stride, options);
#endif
  return std::nullopt;
}

// as_strided() from the begin of the memory on, without its two calls through the dispatcher.
Tensor view_of_memory(const Tensor& t, at::IntArrayRef size, at::IntArrayRef stride) {
  Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(),
                                                         t.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, /*storage_offset=*/0);
  return view;
}

// The input for ATen's grad_input, and the weight for its grad_weight, which wants them for their sizes and layout and
// never reads their values: grad_output itself where that has both, else a view of its memory where that is large
// enough. Memory allocated for it would push the result onto fresh pages, or out of the cache (1024@10x10 on a CPU: 12%
// of the time; 1024 in 64 groups @28x28, stride 2: 3 of 4 ms).
Tensor layout_only(SymIntArrayRef size, SymIntArrayRef stride, const Tensor& grad_output) {
  const auto sizes = c10::asIntArrayRefSlowOpt(size), strides = c10::asIntArrayRefSlowOpt(stride);
  if (sizes && strides && grad_output.has_storage() && !at::isTensorSubclassLike(grad_output)) {
    if (grad_output.sizes() == *sizes && grad_output.strides() == *strides) return grad_output;
    const size_t bytes = at::detail::computeStorageNbytes(*sizes, *strides, grad_output.element_size());
    if (bytes <= grad_output.storage().nbytes()) return view_of_memory(grad_output, *sizes, *strides);
    if (grad_output.is_cpu()) {
      if (const auto addresses = addresses_only(*sizes, *strides, bytes, grad_output.options())) return *addresses;
    }
  }
  return at::empty_strided_symint(size, stride, grad_output.options());
}

// The results of ATen's backward that are asked for, (by input, by weight).
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                    const SymInt& groups, bool by_input, bool by_weight) {
  const std::array<SymInt, 2> no_output_padding{0, 0};
  auto grads =
      at::convolution_backward_symint(grad_output, input, weight, c10::nullopt, stride, padding, dilation,
                                      /*transposed=*/false, no_output_padding, groups, {by_input, by_weight, false});
  return {std::get<0>(grads), std::get<1>(grads)};
}

// The strides in which ATen is asked for the gradient of a weight: channels_last if the weight is, else contiguous. For
// a permuted weight of float64 or float16 torch 2.14.1 raises "grad_weight must be contiguous": one of its functions
// ignores the strides of dimensions of size 1, another does not.
std::vector<SymInt> grad_weight_strides(SymIntArrayRef size, SymIntArrayRef stride) {
  const SymInt &C = size[1], R = size[2], S = size[3];
  const std::vector<SymInt> contiguous{C * R * S, R * S, S, 1}, channels_last{R * S * C, 1, S * C, C};
  return SymIntArrayRef(stride) == SymIntArrayRef(channels_last) ? channels_last : contiguous;
}

// (left, right, top, bottom), as torch's padding functions take it.
std::array<SymInt, 4> sides_of(SymIntArrayRef padding) {
  const bool four = padding.size() == 4;
  return {padding[four ? 2 : 1], padding[four ? 3 : 1], padding[0], padding[four ? 1 : 0]};
}

}  // namespace

Tensor pad(const Tensor& image, SymIntArrayRef padding, PaddingMode mode) {
  return at::pad_symint(image, sides_of(padding), kPaddingModeNames[static_cast<int>(mode)]);
}

namespace {

// The gradient of circular padding along one dimension, for which torch has no function: the image's part of `padded`, and
// what stands before and after it added to the other end.
Tensor unwrap(const Tensor& padded, int64_t dim, const SymInt& size, const SymInt& before, const SymInt& after) {
  Tensor sum = padded.slice_symint(dim, before, before + size);
  const auto add = [&](const SymInt& from, const SymInt& count, const SymInt& at) {
    if (count == 0) return;
    std::vector<SymInt> around(2 * (4 - dim));  // from the last dimension on
    around[2 * (3 - dim)] = at, around[2 * (3 - dim) + 1] = size - at - count;
    sum = sum + at::constant_pad_nd_symint(padded.slice_symint(dim, from, from + count), around, 0);
  };
  add(0, before, size - before);
  add(before + size, after, 0);
  return sum;
}

}  // namespace

Tensor fold(const Tensor& grad_padded, const Tensor& image, SymIntArrayRef padding, PaddingMode mode) {
  const std::array<SymInt, 4> sides = sides_of(padding);
  if (mode == PaddingMode::reflect) return at::reflection_pad2d_backward_symint(grad_padded, image, sides);
  if (mode == PaddingMode::replicate) return at::replication_pad2d_backward_symint(grad_padded, image, sides);
  const Tensor rows = unwrap(grad_padded, 2, image.sym_size(2), sides[2], sides[3]);
  return unwrap(rows, 3, image.sym_size(3), sides[0], sides[1]);
}

Tensor activate(const Tensor& t, Activation activation) {
  switch (activation) {
    case Activation::identity: return t;
    case Activation::relu: return at::relu(t);
    case Activation::relu6: return at::hardtanh(t, 0, 6);
    case Activation::leaky_relu: return at::leaky_relu(t, kLeakySlope);
    case Activation::gelu: return at::gelu(t);
    case Activation::silu: return at::silu(t);
    case Activation::hardswish: return at::hardswish(t);
    case Activation::sigmoid: return at::sigmoid(t);
    case Activation::tanh: return at::tanh(t);
  }
  return t;
}

Tensor activate_in_place(Tensor t, Activation activation) {
  if (t.requires_grad() || at::isTensorSubclassLike(t)) return activate(t, activation);  // vmap has no rule for gelu_
  switch (activation) {
    case Activation::identity: return t;
    case Activation::relu: return at::relu_(t);
    case Activation::relu6: return at::hardtanh_(t, 0, 6);
    case Activation::leaky_relu: return at::leaky_relu_(t, kLeakySlope);
    case Activation::gelu: return at::gelu_(t);
    case Activation::silu: return at::silu_(t);
    case Activation::hardswish: return at::hardswish_(t);
    case Activation::sigmoid: return at::sigmoid_(t);
    case Activation::tanh: return at::tanh_(t);
  }
  return t;
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, SymIntArrayRef stride,
              SymIntArrayRef padding, SymIntArrayRef dilation, const SymInt& groups, Activation activation,
              PaddingMode mode) {
  if (mode != PaddingMode::zeros) {
    return conv2d(pad(input, padding, mode), weight, bias, stride, kNoPadding, dilation, groups, activation);
  }
  const Padding sides(padding);
  const Tensor output =
      at::conv2d_symint(sides.apply(input), weight, bias, stride, SymIntArrayRef(sides.shared), dilation, groups);
  return activate_in_place(output, activation);
}

Tensor separable_conv2d(const separable::Call& c) {
  const std::array<SymInt, 2> one{1, 1}, zero{0, 0};
  const SymInt channels = c.input.dim() == 4 ? c.input.sym_size(1) : SymInt(1);  // torch complains of the rank
  const Tensor intermediate = conv2d(c.input, c.depthwise_weight, c.depthwise_bias, c.stride, c.padding, c.dilation,
                                     channels, c.depthwise_activation);
  return conv2d(intermediate, c.pointwise_weight, c.pointwise_bias, one, zero, one, 1, c.pointwise_activation);
}

Tensor conv2d_grad_input(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                         SymIntArrayRef input_stride, SymIntArrayRef stride, SymIntArrayRef padding,
                         SymIntArrayRef dilation, const SymInt& groups, PaddingMode mode) {
  if (mode != PaddingMode::zeros) {
    const Tensor image = layout_only(input_size, input_stride, grad_output);
    const std::array<SymInt, 4> sides = sides_of(padding);  // left, right, top, bottom
    const SymInt &C = input_size[1], H = input_size[2] + sides[2] + sides[3], W = input_size[3] + sides[0] + sides[1];
    const bool channels_last = image.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    const std::array<SymInt, 4> size{input_size[0], C, H, W};
    const std::array<SymInt, 4> strides =
        channels_last ? std::array<SymInt, 4>{C * H * W, 1, W * C, C} : std::array<SymInt, 4>{C * H * W, H * W, W, 1};
    const Tensor grad = conv2d_grad_input(grad_output, weight, size, strides, stride, kNoPadding, dilation, groups);
    return fold(grad, image, padding, mode);
  }
  const Padding sides(padding);
  const Tensor input = layout_only(input_size, input_stride, grad_output);
  const Tensor grad = std::get<0>(
      backward(grad_output, sides.apply(input), weight, stride, sides.shared, dilation, groups, true, false));
  if (!sides.asymmetric) return grad;
  return grad.narrow_symint(2, sides.extra[2], input_size[2]).narrow_symint(3, sides.extra[0], input_size[3]).clone();
}

Tensor conv2d_grad_weight(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size,
                          SymIntArrayRef weight_stride, SymIntArrayRef stride, SymIntArrayRef padding,
                          SymIntArrayRef dilation, const SymInt& groups, PaddingMode mode) {
  if (mode != PaddingMode::zeros) {
    return conv2d_grad_weight(grad_output, pad(input, padding, mode), weight_size, weight_stride, stride, kNoPadding,
                              dilation, groups);
  }
  const Padding sides(padding);
  const Tensor weight = layout_only(weight_size, grad_weight_strides(weight_size, weight_stride), grad_output);
  return std::get<1>(
      backward(grad_output, sides.apply(input), weight, stride, sides.shared, dilation, groups, false, true));
}

Tensor onednn_product(const Tensor& image, const Tensor& weight, const std::optional<Tensor>& bias) {
  const bool possible = at::hasMKLDNN() && at::globalContext().userEnabledMkldnn() && image.numel() != 0;
  if (!possible) return at::conv2d(image, weight, bias);
  // Called by name, oneDNN reads the bias as if it were dense.
  const auto dense_bias = bias && bias->defined() ? std::optional<Tensor>(bias->contiguous()) : std::nullopt;
  return at::mkldnn_convolution(image, weight, dense_bias, {0, 0}, {1, 1}, {1, 1}, 1);
}

std::tuple<Tensor, Tensor> conv2d_both_grads(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                             const SymInt& groups) {
  const auto strides = grad_weight_strides(weight.sym_sizes(), weight.sym_strides());
  const bool permuted = weight.sym_strides() != SymIntArrayRef(strides);
  return backward(grad_output, input, permuted ? weight.contiguous() : weight, stride, padding, dilation, groups, true,
                  true);
}

Tensor spatial_separable_conv2d(const Tensor& input, const Tensor& column, const Tensor& row, SymIntArrayRef padding) {
  const SpatialPasses passes(input.sym_size(1), column, row, padding);
  const Tensor between = conv2d(input, passes.column, std::nullopt, passes.one, passes.column_padding, passes.one,
                                passes.groups, Activation::identity);
  return conv2d(between, passes.row, std::nullopt, passes.one, passes.row_padding, passes.one, passes.groups,
                Activation::identity);
}

}  // namespace sepconv::aten
