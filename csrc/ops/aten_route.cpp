#include "ops/aten_route.h"

#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv1d.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/pad.h>
#include <ATen/ops/reflection_pad1d_backward.h>
#include <ATen/ops/reflection_pad2d_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/replication_pad1d_backward.h>
#include <ATen/ops/replication_pad2d_backward.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tanh.h>

#include <array>
#include <utility>
#include <vector>

#include "core/activation.h"
#include "ops/checks.h"
#include "ops/spatial_passes.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sepconv::aten {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

constexpr std::string_view kZeros = "zeros";

using Entries = c10::SymDimVector;  // one a spatial dimension, or two

// The spatial dimensions of a call: 2 for images, 1 for sequences.
size_t dims_of(SymIntArrayRef stride) { return stride.size(); }

Entries no_padding(SymIntArrayRef stride) { return Entries(dims_of(stride), SymInt(0)); }

// The zeros before and after a spatial dimension, of padding with one entry a dimension or two.
std::pair<const SymInt&, const SymInt&> sides(SymIntArrayRef padding, size_t dims, size_t dim) {
  if (padding.size() == dims) return {padding[dim], padding[dim]};
  return {padding[2 * dim], padding[2 * dim + 1]};
}

// The same for all dimensions as torch's padding functions take it: the last one first.
Entries sides_from_last(SymIntArrayRef padding, size_t dims) {
  Entries all;
  for (size_t dim = dims; dim-- > 0;) {
    const auto [before, after] = sides(padding, dims, dim);
    all.push_back(before), all.push_back(after);
  }
  return all;
}

// ATen pads both sides alike. Other padding becomes the part that both sides share, and what is missing at each side,
// in the order of constant_pad_nd.
struct Padding {
  Entries shared, extra;
  bool asymmetric = false;

  Padding(SymIntArrayRef padding, size_t dims) {
    if (padding.size() == dims) {
      shared = Entries(padding.begin(), padding.end());
      return;
    }
    extra = sides_from_last(padding, dims);
    for (size_t dim = 0; dim < dims; ++dim) {
      SymInt &before = extra[2 * (dims - 1 - dim)], &after = extra[2 * (dims - 1 - dim) + 1];
      shared.push_back(before.min(after));
      before = before - shared[dim], after = after - shared[dim];
      asymmetric = asymmetric || before != 0 || after != 0;
    }
  }

  Tensor apply(const Tensor& image) const { return asymmetric ? at::constant_pad_nd_symint(image, extra, 0) : image; }
};

// Addresses without memory behind them: all zeros to read, and never to be written. They are mapped once: to unmap them
// would interrupt every thread of the process (5 us and more a call). Without bytes where that is not to be had.
const c10::Storage& addresses_only() {
  static const c10::Storage addresses = [] {
#if defined(__linux__)
    constexpr size_t kBytes = size_t{1} << 34;
    void* const begin = mmap(nullptr, kBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin != MAP_FAILED) {
      return c10::Storage(c10::Storage::use_byte_size_t(), kBytes, at::DataPtr(begin, c10::DeviceType::CPU));
    }
#endif
    return c10::Storage(c10::Storage::use_byte_size_t(), 0, at::DataPtr(nullptr, c10::DeviceType::CPU));
  }();
  return addresses;
}

// A tensor like `t` from the begin of `memory` on: as_strided(), without its two calls through the dispatcher.
Tensor view_of(c10::Storage memory, const Tensor& t, at::IntArrayRef size, at::IntArrayRef stride) {
  Tensor view =
      at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(memory), t.key_set(), t.dtype());
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
    if (bytes <= grad_output.storage().nbytes()) return view_of(grad_output.storage(), grad_output, *sizes, *strides);
    if (grad_output.is_cpu() && bytes <= addresses_only().nbytes()) {
      return view_of(addresses_only(), grad_output, *sizes, *strides);
    }
  }
  return at::empty_strided_symint(size, stride, grad_output.options());
}

// Strides without gaps, of an image in torch's channels_last or of anything else in the order of its dimensions.
Entries dense_strides(const Entries& size, at::MemoryFormat format) {
  if (format == at::MemoryFormat::ChannelsLast) {
    return {size[1] * size[2] * size[3], SymInt(1), size[3] * size[1], size[1]};
  }
  Entries strides(size.size(), SymInt(1));
  for (size_t dim = size.size() - 1; dim-- > 0;) strides[dim] = strides[dim + 1] * size[dim + 1];
  return strides;
}

// The results of ATen's backward that are asked for, (by input, by weight). It knows batches only.
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                    const ops::Args& args, bool by_input, bool by_weight) {
  const bool batched = input.dim() == weight.dim();
  const auto batch = [&](const Tensor& t) { return batched ? t : t.unsqueeze(0); };
  auto [grad_input, grad_weight, none] = at::convolution_backward_symint(
      batch(grad_output), batch(input), weight, c10::nullopt, args.stride, args.padding, args.dilation,
      /*transposed=*/false, no_padding(args.stride), args.groups, {by_input, by_weight, false});
  return {batched || !by_input ? grad_input : grad_input.squeeze(0), grad_weight};
}

// The strides in which ATen is asked for the gradient of a weight: channels_last if the weight is, else contiguous. For
// a permuted weight of float64 or float16 torch 2.14.1 raises "grad_weight must be contiguous": one of its functions
// ignores the strides of dimensions of size 1, another does not.
Entries grad_weight_strides(SymIntArrayRef size, SymIntArrayRef stride) {
  const Entries sizes(size.begin(), size.end());
  if (size.size() == 4) {
    const Entries channels_last = dense_strides(sizes, at::MemoryFormat::ChannelsLast);
    if (stride == SymIntArrayRef(channels_last)) return channels_last;
  }
  return dense_strides(sizes, at::MemoryFormat::Contiguous);
}

// A weight in channels_last, with torch's own strides for dimensions of size 1. torch 2.14.1 goes by others where the
// input is channels_last too: groups of 3x1 or 1x3 filters were wrong, forward and gradient by the input.
Tensor with_plain_strides(const Tensor& weight) {
  constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;
  if (weight.dim() != 4 || at::isTensorSubclassLike(weight) || !weight.is_contiguous(kChannelsLast)) return weight;
  const Entries strides = dense_strides(Entries(weight.sym_sizes().begin(), weight.sym_sizes().end()), kChannelsLast);
  const bool plain = weight.is_contiguous() || weight.sym_strides() == SymIntArrayRef(strides);
  return plain ? weight : weight.as_strided_symint(weight.sym_sizes(), strides);
}

}  // namespace

Tensor pad(const Tensor& image, SymIntArrayRef padding, size_t dims, PaddingMode mode) {
  return at::pad_symint(image, sides_from_last(padding, dims), name_of(mode));
}

namespace {

// The gradient of circular padding along the dimension `from_last` (1 is the last one), for which torch has no
// function: the image's part of `padded`, and what stands before and after it added to the other end.
Tensor unwrap(const Tensor& padded, int64_t from_last, const SymInt& size, const SymInt& before, const SymInt& after) {
  Tensor sum = padded.slice_symint(-from_last, before, before + size);
  const auto add = [&](const SymInt& from, const SymInt& count, const SymInt& at) {
    if (count == 0) return;
    std::vector<SymInt> around(2 * from_last);
    around[2 * (from_last - 1)] = at, around[2 * (from_last - 1) + 1] = size - at - count;
    sum = sum + at::constant_pad_nd_symint(padded.slice_symint(-from_last, from, from + count), around, 0);
  };
  add(0, before, size - before);
  add(before + size, after, 0);
  return sum;
}

// The gradient by the image of one by the padded image; `image` is there for its size and layout alone.
Tensor fold(const Tensor& grad_padded, const Tensor& image, SymIntArrayRef padding, size_t dims, PaddingMode mode) {
  const Entries around = sides_from_last(padding, dims);
  const bool sequence = dims == 1;
  switch (mode) {
    case PaddingMode::reflect:
      return sequence ? at::reflection_pad1d_backward_symint(grad_padded, image, around)
                      : at::reflection_pad2d_backward_symint(grad_padded, image, around);
    case PaddingMode::replicate:
      return sequence ? at::replication_pad1d_backward_symint(grad_padded, image, around)
                      : at::replication_pad2d_backward_symint(grad_padded, image, around);
    default: break;
  }
  Tensor grad = grad_padded;
  for (size_t dim = 0; dim < dims; ++dim) {
    grad = unwrap(grad, dim + 1, image.sym_size(-1 - static_cast<int64_t>(dim)), around[2 * dim], around[2 * dim + 1]);
  }
  return grad;
}

}  // namespace

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
              SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups, std::string_view activation,
              std::string_view padding_mode) {
  const size_t dims = dims_of(stride);
  const PaddingMode mode = parse_padding_mode(padding_mode);
  if (mode != PaddingMode::zeros) {
    const Tensor padded = pad(input, padding, dims, mode);
    return conv2d(padded, weight, bias, stride, no_padding(stride), dilation, groups, activation, kZeros);
  }
  const Padding zeros(padding, dims);
  const SymIntArrayRef shared = zeros.shared;
  const Tensor image = zeros.apply(input);
  const Tensor output =
      dims == 1 ? at::conv1d_symint(image, weight, bias, stride, shared, dilation, groups)
                : at::conv2d_symint(image, with_plain_strides(weight), bias, stride, shared, dilation, groups);
  return activate_in_place(output, parse_activation(activation));
}

Tensor conv2d_grad_input(const Tensor& grad_output, const Tensor& weight, SymIntArrayRef input_size,
                         SymIntArrayRef input_stride, SymIntArrayRef stride, SymIntArrayRef padding,
                         SymIntArrayRef dilation, SymInt groups, std::string_view padding_mode) {
  const size_t dims = dims_of(stride), first = input_size.size() - dims;
  const Tensor image = layout_only(input_size, input_stride, grad_output);
  const PaddingMode mode = parse_padding_mode(padding_mode);
  if (mode != PaddingMode::zeros) {
    Entries size(input_size.begin(), input_size.end());
    for (size_t dim = 0; dim < dims; ++dim) {
      const auto [before, after] = sides(padding, dims, dim);
      size[first + dim] = size[first + dim] + before + after;
    }
    const Entries strides = dense_strides(size, image.suggest_memory_format());
    const Tensor grad =
        conv2d_grad_input(grad_output, weight, size, strides, stride, no_padding(stride), dilation, groups, kZeros);
    return fold(grad, image, padding, dims, mode);
  }
  const Padding zeros(padding, dims);
  Tensor grad = std::get<0>(backward(grad_output, zeros.apply(image), with_plain_strides(weight),
                                     {stride, zeros.shared, dilation, groups}, true, false));
  if (!zeros.asymmetric) return grad;
  for (size_t dim = 0; dim < dims; ++dim) {
    grad = grad.narrow_symint(first + dim, zeros.extra[2 * (dims - 1 - dim)], input_size[first + dim]);
  }
  return grad.clone();
}

Tensor conv2d_grad_weight(const Tensor& grad_output, const Tensor& input, SymIntArrayRef weight_size,
                          SymIntArrayRef weight_stride, SymIntArrayRef stride, SymIntArrayRef padding,
                          SymIntArrayRef dilation, SymInt groups, std::string_view padding_mode) {
  const size_t dims = dims_of(stride);
  const PaddingMode mode = parse_padding_mode(padding_mode);
  if (mode != PaddingMode::zeros) {
    const Tensor padded = pad(input, padding, dims, mode);
    return conv2d_grad_weight(grad_output, padded, weight_size, weight_stride, stride, no_padding(stride), dilation,
                              groups, kZeros);
  }
  const Padding zeros(padding, dims);
  const Tensor weight = layout_only(weight_size, grad_weight_strides(weight_size, weight_stride), grad_output);
  return std::get<1>(
      backward(grad_output, zeros.apply(input), weight, {stride, zeros.shared, dilation, groups}, false, true));
}

std::tuple<Tensor, Tensor> conv2d_both_grads(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             const ops::Args& args) {
  const auto strides = grad_weight_strides(weight.sym_sizes(), weight.sym_strides());
  const bool permuted = weight.sym_strides() != SymIntArrayRef(strides);
  return backward(grad_output, input, permuted ? weight.contiguous() : weight, args, true, true);
}

Tensor spatial_separable_conv2d(const Tensor& input, const Tensor& column, const Tensor& row, SymIntArrayRef padding) {
  const SpatialPasses passes(input.sym_size(-3), column, row, padding);
  return passes.run(input, conv2d);
}

}  // namespace sepconv::aten
