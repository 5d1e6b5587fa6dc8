#include "cpu/plan.h"

#include <algorithm>

#include "cpu/plan_pointwise.h"
#include "cpu/torch_faults.h"

namespace sepconv::cpu {
namespace {

constexpr Plan planes(const char* reason) { return {Kernel::planes, "cpu_planes", reason}; }
constexpr Plan small_planes(const char* reason) { return {Kernel::small_planes, "cpu_small_planes", reason}; }
constexpr Plan blocked(const char* reason) { return {Kernel::blocked, "cpu_blocked", reason}; }
constexpr Plan depthwise_nhwc(const char* reason) { return {Kernel::depthwise_nhwc, "cpu_depthwise_nhwc", reason}; }
constexpr Plan pointwise(const char* reason) { return {Kernel::pointwise, "cpu_pointwise", reason}; }
constexpr Plan product(const char* reason) { return {Kernel::product, "cpu_product", reason}; }
constexpr Plan matmul(const char* reason) { return {Kernel::matmul, "cpu_matmul", reason}; }
constexpr Plan aten(const char* reason) { return {Kernel::aten, "aten", reason}; }
constexpr Plan aten_float32(const char* reason) { return {Kernel::aten_float32, "aten", reason}; }

// Below, a call's images are dense, both in `layout` (see plan()).

// Up to these sizes a product is faster in registers than through a matrix library: images of one pixel (where the
// library's blocking finds nothing to block), and products that take less time than a library's call.
constexpr int64_t kFewPixels = 32;
constexpr int64_t kFewProducts = 16 * 1024;

bool is_small_product(const ConvShape& s) {
  if (!s.is_pointwise() || (s.C > 1 && s.w.c != 1)) return false;
  if (s.H == 1 && s.W == 1) return s.P == 1 && s.Q == 1 && s.N <= kFewPixels;
  return is_matrix_product(s) && s.input_elements() * s.K <= kFewProducts;
}

// What the blocked kernels can do. They turn blocks of 16 channels (with AVX-512, less else) into tiles: of few
// channels, or of just more than a block, most lanes would be empty.
bool blocked_can(Map map, const ConvShape& s, DType dtype) {
  if (!s.is_depthwise() || s.K != s.C || dtype == DType::float64) return false;
  if ((s.C + 15) / 16 * 16 * 3 > s.C * 4) return false;
  const bool strided = s.stride_h > 1 || s.stride_w > 1, dilated = s.dilation_h > 1 || s.dilation_w > 1;
  if (s.stride_h > 2 || s.stride_w > 2 || (strided && dilated)) return false;
  if (map != Map::grad_weight) {
    // The tiles of both images, which a dilation with its padding may widen without end, fit some cache.
    return s.H * (s.W + 2 * s.pad_w) + s.P * (s.Q + (s.S - 1) * s.dilation_w) <= 16 * 1024;
  }
  const bool counted = s.S == 3 || s.S == 5 || s.S == 7 || (s.S == 4 && s.R == 1);
  // The tiles of one row fit some cache, which those of a sequence need less.
  const int64_t vectors = s.R * (s.W + 2 * s.pad_w) + s.Q, most = s.R == 1 ? 20000 : 4096;
  return !dilated && counted && (s.R == s.S || s.R == 1) && vectors <= most;
}

// Up to which planes they are the best here: until vectors along rows are well filled, and planes so large that 16 of
// them lie far apart. That takes longer with a stride, as nothing has to be taken apart here, in half types, which are
// widened once here, and in grad_weight, where no lanes have to be added up here. All measured (benchmarks/notes).
bool blocked_is_best(Map map, const ConvShape& s, DType dtype) {
  if (!blocked_can(map, s, dtype)) return false;
  const int64_t taps = s.R * s.S, pixels = std::max(s.H * s.W, s.P * s.Q);
  const bool strided = s.stride_h > 1 || s.stride_w > 1;
  if (map == Map::grad_weight) return strided || pixels <= (s.C >= 64 || taps > 9 ? 80 * 80 : 28 * 28);
  if (dtype != DType::float32) return pixels <= 56 * 56;
  if (strided) return pixels <= (map == Map::forward && taps <= 9 ? 28 * 28 : 64 * 64);
  return pixels <= (taps <= 7 * 7 ? 16 * 16 : 28 * 28);
}

// Multiply-adds that a kernel here does in the time that a call of oneDNN costs before it computes anything, and in the
// time that it takes to go from one plane to the next.
constexpr int64_t kCallProducts = 128 * 1024, kPlaneProducts = 256;

bool is_tiny(const ConvShape& s) {
  const int64_t products = s.output_elements() * s.channels_per_group() * s.R * s.S;
  return products + s.N * s.K * kPlaneProducts <= kCallProducts;
}

// Depthwise, contiguous images: oneDNN multiplies faster where there is much to multiply; and where the blocked kernels
// are not taken, what its reordering costs it is little on tiny planes, where vectors along rows are mostly padding.
const char* onednn_is_faster_nchw(Map map, const ConvShape& s, DType dtype) {
  if (dtype != DType::float32 || s.K != s.C) return nullptr;
  const int64_t taps = s.R * s.S, pixels = s.P * s.Q;
  const bool blocked = blocked_is_best(map, s, dtype), much = taps > 9 * 9 || pixels < 28 * 28;
  if (map == Map::forward && taps >= (blocked ? 8 * 8 : 7 * 7) && taps <= 13 * 13 && much) {
    return "10x10 to 13x13, or on small planes from 7x7 (8x8 where blocks of channels are taken): oneDNN is faster "
           "forward";
  }
  if (blocked) return nullptr;
  if (pixels <= 10 * 10 && (map != Map::grad_weight || taps <= 9)) return "planes of up to 10x10: oneDNN is faster";
  if (s.R == 1 && s.P == 1 && pixels <= 128) {
    if (map == Map::grad_weight && taps <= 3) return "short sequences, 3 taps: oneDNN is faster";
    if (map == Map::grad_input && taps >= 31) return "short sequences, 31 taps: oneDNN is faster";
  }
  return nullptr;
}

const char* onednn_is_faster_channels_last(Map map, const ConvShape& s, DType dtype) {
  const int64_t taps = s.R * s.S, pixels = s.P * s.Q;
  if (s.K != s.C) return map == Map::grad_input ? nullptr : "a multiplier on channels_last: oneDNN is faster";
  if (s.C < 16 || (s.C == 16 && map == Map::forward)) return "16 channels last or fewer: oneDNN is faster";
  if (dtype == DType::bfloat16 && taps <= 9 && pixels > 28 * 28) {
    return "bfloat16 3x3 on large channels_last images: oneDNN multiplies without widening";
  }
  if (map == Map::forward) {
    if (s.dilation_h > 1 || s.dilation_w > 1) return "dilated channels_last: oneDNN is faster";
    if (s.stride_h > 1 && s.C >= 480 && pixels >= 19 * 19) return "many channels last, strided: oneDNN is faster";
    if (s.C < 96 && s.C % 16 != 0 && pixels > 28 * 28) return "few channels last, no whole vectors: oneDNN is faster";
  }
  return nullptr;
}

// Channels of a group up to which vectors along rows beat oneDNN's products on large planes. A 1x1 leaves little to
// compute for what it loads, and a strided one loads pixels that it does not use.
int64_t most_channels_of_planes(Map map, const ConvShape& s) {
  const bool strided = s.stride_h > 1 || s.stride_w > 1, one_tap = s.R == 1 && s.S == 1;
  if (!strided) return one_tap ? 4 : 8;
  switch (map) {
    case Map::forward: return one_tap ? 0 : 8;
    case Map::grad_input: return one_tap ? 8 : 16;
    case Map::grad_weight: return 4;
  }
  return 0;
}

// Why oneDNN, which is behind ATen, is the faster one for this call; null where it is not. Every rule here was measured
// (benchmarks/notes), in float32 and, where it says so, in bfloat16: the only types that oneDNN has kernels for
// here. In float64 and float16 ATen has slow loops, and the kernels of this package win by factors.
const char* onednn_is_faster(Map map, const ConvShape& s, Layout layout, DType dtype) {
  if (dtype != DType::float32 && dtype != DType::bfloat16) return nullptr;
  const bool channels_last = layout == Layout::nhwc;
  if (!s.is_depthwise()) {
    if (!channels_last && s.P * s.Q >= 28 * 28 && s.channels_per_group() <= most_channels_of_planes(map, s))
      return nullptr;
    return "groups of several channels: oneDNN's products are faster, but of few channels on large contiguous planes";
  }
  return channels_last ? onednn_is_faster_channels_last(map, s, dtype) : onednn_is_faster_nchw(map, s, dtype);
}

// Why the fourth op is made of two calls; null where the fused kernel was measured faster (benchmarks/notes). In
// float64 and float16 ATen's loops are slow, and the fused kernel wins by factors.
const char* two_calls_are_faster(const ConvShape& depthwise, const ConvShape& pointwise, DType dtype) {
  if (dtype != DType::float32 && dtype != DType::bfloat16) return nullptr;
  const ConvShape& d = depthwise;
  const bool measured = d.R == d.S && (d.R == 3 || d.R == 5) && d.dilation_h == 1 && d.dilation_w == 1 && d.K == d.C;
  if (!measured)
    return "another kernel than 3x3 or 5x5, a dilation or a multiplier: the fused depthwise stage is not made for it";
  const bool channels_last = output_layout(pointwise) == Layout::nhwc, strided = d.stride_h > 1 || d.stride_w > 1;
  if (dtype == DType::bfloat16 && (channels_last || strided || d.C > 128)) {
    return "bfloat16: oneDNN multiplies without widening";
  }
  const int64_t pixels = d.P * d.Q, products = pointwise.output_elements() * d.C;
  const bool small = pixels <= 20 * 20 && (d.R == 5 || products >= 30'000'000);
  if (!channels_last && (small || (pixels <= 28 * 28 && d.C >= 8 * pointwise.K))) {
    return "small planes: blocks of channels and oneDNN's product, one after the other, are faster";
  }
  return nullptr;
}

// Why torch's call is the best for a 1x1 of whole images; null where at::mm is. With several threads torch's
// convolution takes oneDNN itself, while MKL in some virtual machines stays with one.
const char* torchs_product_is_best(Map map, Layout layout, DType dtype) {
  if (map == Map::forward) return "1x1: oneDNN's product is as fast, and adds the bias on its way";
  if (map == Map::grad_weight && layout != Layout::nhwc)
    return "1x1 on planes: oneDNN sums over the batch in one product";
  return dtype == DType::float32 ? "1x1: torch's product is as fast, and takes all threads everywhere" : nullptr;
}

// Up to this size a plane, with its padding, is copied whole into the first-level cache.
constexpr int64_t kSmallPlane = 40;

bool small_planes_take(Map map, const ConvShape& s, DType dtype) {
  if (!s.is_depthwise() || s.K != s.C || dtype == DType::float64 || map == Map::grad_weight) return false;
  if (s.R != 3 || s.S != 3 || s.stride_h != s.stride_w || s.dilation_h != 1 || s.dilation_w != 1) return false;
  if (map == Map::forward ? s.stride_h > 2 : s.stride_h > 1 || s.pad_h > 2 || s.pad_w > 2) return false;
  return std::max({s.H, s.W, s.P, s.Q, s.pad_h, s.pad_w}) <= kSmallPlane;
}

// Why torch's own call would be the faster one, if it is sound; null where it would not.
const char* torch_is_faster(Map map, const ConvShape& s, Layout layout, DType dtype) {
  if (is_tiny(s)) return nullptr;
  if (s.groups == 1 && s.C > 1) return "a dense convolution: oneDNN's matrix kernels are faster";
  return onednn_is_faster(map, s, layout, dtype);
}

bool is_half(DType dtype) { return dtype == DType::float16 || dtype == DType::bfloat16; }

// A half type's weight gradient that torch may get wrong, and gets right in float32.
bool is_sound_in_float32(Map map, const ConvShape& s, DType dtype) {
  return is_half(dtype) && map == Map::grad_weight && !s.is_depthwise() &&
         torch_fault(map, s, DType::float32) == nullptr;
}

// Whether that costs less than the kernels here: not for groups of few channels on planes, where half types cost them
// nothing (0.2 to 1.0 of the time).
bool float32_is_faster(Map map, const ConvShape& s, Layout layout) {
  const bool few = s.groups > 1 && s.channels_per_group() <= 8 && s.P * s.Q >= 14 * 14;
  return (layout == Layout::nhwc || !few) && torch_is_faster(map, s, layout, DType::float32) != nullptr;
}

Plan plan_dense(Map map, const ConvShape& s, Layout layout, DType dtype, bool strict, int threads) {
  if (is_small_product(s)) return pointwise("1x1 on few pixels: sums in registers");
  const bool torch_may = !strict && torch_fault(map, s, dtype) == nullptr;
  if (product_can(map, s, dtype)) {
    if (const char* reason = product_is_best(map, s, layout, threads)) return product(reason);
    if (!torch_may) return product("1x1: a matrix product over pixels");
  }
  if (is_matrix_product(s)) {
    const char* reason = torchs_product_is_best(map, layout, dtype);
    if (torch_may && reason != nullptr) return aten(reason);
    return matmul("1x1, one group, stride 1: a matrix product over pixels");
  }
  if (torch_may) {
    if (const char* reason = torch_is_faster(map, s, layout, dtype)) return aten(reason);
  } else if (!strict && is_sound_in_float32(map, s, dtype) && float32_is_faster(map, s, layout)) {
    return aten_float32("torch 2.14.1 returns NaN at random in half types: its float32 call, rounded");
  }
  if (s.is_depthwise() && s.K == s.C && layout == Layout::nhwc) {
    return depthwise_nhwc("depthwise on channels_last images: vectors of channels");
  }
  if (layout == Layout::nchw && blocked_is_best(map, s, dtype)) {
    return blocked("depthwise: planes turned into blocks of channels, in cache");
  }
  if (layout == Layout::nchw && small_planes_take(map, s, dtype)) {
    return small_planes("3x3 depthwise on small planes: copied, padded, into cache");
  }
  if (s.is_depthwise()) return planes("depthwise: vectors of pixels");
  return planes("groups of several channels: vectors of pixels");
}

// Every pixel is the same one: a gradient behind sum or mean.
bool is_one_pixel(const ImageShape& image) {
  const bool rows_are = image.rows <= 1 || image.strides.h == 0,
             columns_are = image.columns <= 1 || image.strides.w == 0;
  return image.rows * image.columns > 1 && rows_are && columns_are;
}

// The kernel reads or writes this image where it is.
bool takes(Kernel kernel, Map map, DType dtype, Layout layout, const ImageShape& image) {
  switch (kernel) {
    case Kernel::planes:
    case Kernel::small_planes:
    case Kernel::blocked:
    case Kernel::depthwise_nhwc: return is_dense_along(layout, image);
    case Kernel::product: return is_dense_along(layout, image) || is_one_pixel(image);
    case Kernel::pointwise:
      return image.rows * image.columns == 1 ? is_dense_along(Layout::nhwc, image) : is_dense(layout, image);
    case Kernel::matmul:  // in half types one product over all pixels, for which bindings.cpp copies what it has to
      return (map == Map::grad_weight && is_half(dtype)) || is_dense(layout, image);
    case Kernel::aten:
    case Kernel::aten_float32:  // torch copies, but takes an expanded channels_last batch for NCHW
      return layout != Layout::nhwc || !is_expanded_batch(image) || image.strides.c != 1;
    default: return is_dense(layout, image);
  }
}

}  // namespace

Plan plan(Map map, const ConvShape& s, DType dtype, bool strict, int threads) {
  const Layout layout = call_layout(map, s);
  Plan chosen = plan_dense(map, with_copies(s, {layout, true, true, false, true}), layout, dtype, strict, threads);
  chosen.copies.layout = layout;
  chosen.copies.x = !takes(chosen.kernel, map, dtype, layout, input_image(s));
  chosen.copies.y = !takes(chosen.kernel, map, dtype, layout, output_image(s));
  chosen.copies.all_images =
      chosen.is_torchs() || chosen.kernel == Kernel::pointwise || chosen.kernel == Kernel::matmul;
  if (chosen.kernel == Kernel::product) {  // what it writes is not any view: a gradient takes its operand's strides
    if (map == Map::grad_input) chosen.copies.x = !is_dense(layout, input_image(s));
    if (map == Map::forward) chosen.copies.y = !is_dense(layout, output_image(s));
    chosen.copies.weight = map == Map::grad_weight && s.C > 1 && s.w.c != 1;
  }
  return chosen;
}

Plan plan_separable(const SeparableShape& s, DType dtype, bool strict) {
  const ConvShape &d = s.depthwise, &p = s.pointwise;
  if (!strict) {
    if (const char* reason = two_calls_are_faster(d, p, dtype)) return {Kernel::composite, "composite", reason};
  }
  return {Kernel::separable, "cpu_separable", "the intermediate stays in cache", separable_copies(d, output_layout(p))};
}

}  // namespace sepconv::cpu
