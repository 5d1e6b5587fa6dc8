// The plan is an ordered list of rules (kRules). The first rule whose kernel can run the call, and that has a reason to
// take it, decides. What they share is a Question.
//
// oneDNN is behind torch's own call. The rules that give a call to it hold in float32 and, where they say so, in
// bfloat16 if the processor has instructions for it. In float64 and other half types torch has slow loops, and the
// kernels of this package win by factors, but for groups of many channels in float64. Dense half types without
// kernels of oneDNN's are multiplied in float32.
#include "cpu/plan.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "cpu/plan_channels_last.h"
#include "cpu/plan_copies.h"
#include "cpu/plan_pointwise.h"
#include "cpu/torch_faults.h"

namespace sepconv::cpu {
namespace {

// Measured thresholds. Each block names the page of benchmarks/notes that has the figures; the record of the depthwise
// ones is benchmarks/results/2026-11-22-epyc-2cores.

// pointwise.md. Up to these sizes a product is faster in registers than through a matrix library: images of one pixel
// (where the library's blocking finds nothing to block), and products that take less time than a library's call.
constexpr int64_t kFewPixels = 32, kFewProducts = 16 * 1024;

// host-time.md. Multiply-adds that a kernel here does in the time that a call of oneDNN costs before it computes
// anything, and in the time that it takes to go from one plane to the next.
constexpr int64_t kCallProducts = 128 * 1024, kPlaneProducts = 256;
// The same for the lanes of one weight's gradient, which are added up for each image.
constexpr int64_t kWeightProducts = 24;

// depthwise-nchw.md, "blocks of channels". Vectors of 16 channels of both images, and of one row of them, that fit some
// cache. A sequence is one row, and needs less beside it.
constexpr int64_t kBlockedImage = 16 * 1024, kBlockedRow = 4096, kBlockedSequence = 20'000;
// Pixels up to which blocks of channels are the best: until vectors along rows are well filled, and planes so large
// that 16 of them lie far apart. That takes longer with a stride, as nothing has to be taken apart here. It takes
// longer in half types, which are widened once here, and in grad_weight, where no lanes have to be added up here.
constexpr int64_t kBlockedHalf = 56 * 56;
constexpr int64_t kBlockedUnstrided = 16 * 16, kBlockedUnstridedWide = 28 * 28;  // wide: of more than 7x7 taps
constexpr int64_t kBlockedStrided = 64 * 64, kBlockedStridedForward = 28 * 28;   // forward: of up to 3x3 taps
constexpr int64_t kBlockedGradWeight = 28 * 28, kBlockedGradWeightMuch = 80 * 80;
constexpr int64_t kMuchChannels = 64;

// depthwise-nchw.md, "vectors along rows". Up to this size a plane, with its padding, is copied whole into the
// first-level cache.
constexpr int64_t kSmallPlane = 40;

// depthwise-nchw.md and the last paragraph of grouped.md. oneDNN multiplies faster where there is much to multiply.
constexpr int64_t kManyTaps = 7 * 7, kManyTapsOfBlocks = 8 * 8, kMostTaps = 13 * 13;
constexpr int64_t kTapsOnAnyPlane = 9 * 9, kMediumPlane = 28 * 28, kLanes = 16;
// Where no blocks are taken, its reordering is cheap on tiny planes: vectors along rows are mostly padding.
constexpr int64_t kTinyPlane = 10 * 10;
// sequences.md.
constexpr int64_t kShortSequence = 128, kShortFilter = 3, kLongFilter = 31;

// grouped.md. Channels of a group up to which vectors along rows beat oneDNN's products on large planes.
constexpr int64_t kGroupPixels = 28 * 28, kGroupChannels = 8, kGroupChannelsStridedGradInput = 16;
constexpr int64_t kGroupChannelsStridedGradWeight = 4, kGroupChannelsOfOneTap = 4;
// Of half types, which cost the kernels here nothing, against torch's float32 call; and those that are worth copying
// from channels_last for it.
constexpr int64_t kHalfGroupPixels = 14 * 14, kHalfGroupChannels = 8, kHalfGroupChannelsCopied = 4;
// grouped.md, "half types without kernels". Channels of a group from which float32's product pays for two copies.
constexpr int64_t kWidenedChannels = 32, kWidenedChannelsOfOneTap = 16;
// In float64 torch calls a matrix library for each group.
constexpr int64_t kFloat64GroupChannels = 32, kFloat64GroupChannelsOfOneTap = 16;

// A call whose images are dense, both in `layout` (see plan()).
struct Question {
  Map map;
  const ConvShape& s;
  Layout layout;
  DType dtype;
  bool strict;
  const Torch& torch;
  bool gaps = false;  // grad_output has gaps or repeats itself: torch's own call would copy it first
  bool torch_may = !strict && torch_fault(map, s, dtype) == nullptr;  // torch's own call is allowed, and sound
};

// 1x1.

bool is_pixel(const ConvShape& s) { return s.H == 1 && s.W == 1; }

bool pointwise_can_run(const Question& q) {
  const ConvShape& s = q.s;
  if (!s.is_pointwise() || (s.C > 1 && s.w.c != 1)) return false;
  return is_pixel(s) ? s.P == 1 && s.Q == 1 : is_matrix_product(s);
}

const char* pointwise_is_best(const Question& q) {
  const bool few = is_pixel(q.s) ? q.s.N <= kFewPixels : q.s.input_elements() * q.s.K <= kFewProducts;
  return few ? "1x1 on few pixels: sums in registers" : nullptr;
}

// A product of half types that float32 takes in less time than oneDNN takes before it computes anything.
bool small_can_run(const Question& q) {
  return !q.strict && is_half(q.dtype) && is_matrix_product(q.s) && product_can(q.map, q.s, DType::float32);
}
const char* small_is_best(const Question& q) {
  return is_small_for_half(q.map, q.s) ? "1x1 of half types, small: in float32, rounded once" : nullptr;
}

bool product_can_run(const Question& q) { return product_can(q.map, q.s, q.dtype); }
const char* product_is_best(const Question& q) { return cpu::product_is_best(q.map, q.s, q.layout, q.torch.threads); }
const char* torch_may_not(const Question& q) { return q.torch_may ? nullptr : "1x1: a matrix product over pixels"; }

bool is_product(const Question& q) { return is_matrix_product(q.s); }
bool is_product_torch_may(const Question& q) { return q.torch_may && is_matrix_product(q.s); }

// Why torch's call is the best for a 1x1 of whole images; null where at::mm is. With several threads torch's
// convolution takes oneDNN itself, while MKL in some virtual machines stays with one.
const char* torchs_product_is_best(const Question& q) {
  if (q.map == Map::forward) return "1x1: oneDNN's product is as fast, and adds the bias on its way";
  if (q.map == Map::grad_weight && q.layout != Layout::nhwc) {
    return "1x1 on planes: oneDNN sums over the batch in one product";
  }
  return q.dtype == DType::float32 ? "1x1: torch's product is as fast, and takes all threads everywhere" : nullptr;
}

const char* matmul_is_best(const Question&) { return "1x1, one group, stride 1: a matrix product over pixels"; }

// Blocks of channels. They turn 16 channels (with AVX-512, less else) into tiles: of few channels, or of just more than
// a block, most lanes would be empty.

bool nchw_blocked_can_run(const Question& q) {
  const ConvShape& s = q.s;
  if (q.layout != Layout::nchw || !s.is_depthwise() || s.K != s.C || q.dtype == DType::float64) return false;
  if (ceil_div(s.C, kLanes) * kLanes * 3 > s.C * 4) return false;
  if (s.stride_h > 2 || s.stride_w > 2 || (is_strided(s) && is_dilated(s))) return false;
  if (q.map != Map::grad_weight) {
    // A dilation with its padding may widen the tiles without end.
    return s.H * (s.W + 2 * s.pad_w) + s.P * (s.Q + (s.S - 1) * s.dilation_w) <= kBlockedImage;
  }
  const bool is_sequence = s.R == 1;
  const bool counted = s.S == 3 || s.S == 5 || s.S == 7 || (s.S == 4 && is_sequence);
  const int64_t vectors = s.R * (s.W + 2 * s.pad_w) + s.Q;
  return !is_dilated(s) && counted && (s.R == s.S || is_sequence) &&
         vectors <= (is_sequence ? kBlockedSequence : kBlockedRow);
}

int64_t most_pixels_of_blocks(const Question& q) {
  const int64_t taps = q.s.R * q.s.S;
  if (q.map == Map::grad_weight) {
    return q.s.C >= kMuchChannels || taps > 3 * 3 ? kBlockedGradWeightMuch : kBlockedGradWeight;
  }
  if (q.dtype != DType::float32) return kBlockedHalf;
  if (is_strided(q.s)) return q.map == Map::forward && taps <= 3 * 3 ? kBlockedStridedForward : kBlockedStrided;
  return taps <= 7 * 7 ? kBlockedUnstrided : kBlockedUnstridedWide;
}

const char* nchw_blocked_is_best(const Question& q) {
  const bool any_size = q.map == Map::grad_weight && is_strided(q.s);
  const bool best = any_size || std::max(q.s.H * q.s.W, q.s.P * q.s.Q) <= most_pixels_of_blocks(q);
  return best ? "depthwise: planes turned into blocks of channels, in cache" : nullptr;
}

bool takes_blocks(const Question& q) { return nchw_blocked_can_run(q) && nchw_blocked_is_best(q) != nullptr; }

// torch's own call, by oneDNN.

bool is_tiny(Map map, const ConvShape& s) {
  const int64_t weights = s.K * s.channels_per_group() * s.R * s.S, products = s.N * s.P * s.Q * weights;
  const bool adds_lanes = map == Map::grad_weight && !s.is_depthwise();
  const int64_t beside = s.K * kPlaneProducts + (adds_lanes ? weights * kWeightProducts : 0);
  return products + s.N * beside <= kCallProducts;
}

const char* onednn_is_faster_nchw(const Question& q) {
  const ConvShape& s = q.s;
  if (q.dtype != DType::float32 || s.K != s.C) return nullptr;
  const int64_t taps = s.R * s.S, pixels = s.P * s.Q;
  const bool blocked = takes_blocks(q), much = taps > kTapsOnAnyPlane || pixels < kMediumPlane;
  if (q.map == Map::forward && taps >= (blocked ? kManyTapsOfBlocks : kManyTaps) && taps <= kMostTaps && much) {
    return "10x10 to 13x13, or on small planes from 7x7 (8x8 where blocks of channels are taken): oneDNN is faster "
           "forward";
  }
  if (blocked) return nullptr;
  if (pixels <= kTinyPlane && (q.map != Map::grad_weight || taps <= 3 * 3)) {
    return "planes of up to 10x10: oneDNN is faster";
  }
  if (s.R == 1 && s.P == 1 && pixels <= kShortSequence) {
    if (q.map == Map::grad_weight && taps <= kShortFilter) return "short sequences, 3 taps: oneDNN is faster";
    if (q.map == Map::grad_input && taps >= kLongFilter) return "short sequences, 31 taps: oneDNN is faster";
  }
  return nullptr;
}

// A 1x1 leaves little to compute for what it loads, and a strided one loads pixels that it does not use.
int64_t most_channels_of_groups(Map map, const ConvShape& s) {
  const bool one_tap = s.R == 1 && s.S == 1;
  if (!is_strided(s)) return one_tap ? kGroupChannelsOfOneTap : kGroupChannels;
  switch (map) {
    case Map::forward: return one_tap ? 0 : kGroupChannels;
    case Map::grad_input: return one_tap ? kGroupChannels : kGroupChannelsStridedGradInput;
    case Map::grad_weight: return kGroupChannelsStridedGradWeight;
  }
  return 0;
}

const char* onednn_is_faster_grouped(const Question& q) {
  const ConvShape& s = q.s;
  if (q.dtype == DType::float32 && q.layout == Layout::nhwc && are_groups_last(s)) {
    return onednn_is_faster_groups_last(q.map, s, q.torch);
  }
  const bool large_planes = q.layout == Layout::nchw && s.P * s.Q >= kGroupPixels;
  if (large_planes && s.channels_per_group() <= most_channels_of_groups(q.map, s)) return nullptr;
  return "groups of several channels: oneDNN's products are faster, but of few channels on large contiguous planes";
}

const char* products_are_faster_float64(const Question& q) {
  const bool one_tap = q.s.R == 1 && q.s.S == 1;
  if (q.s.channels_per_group() < (one_tap ? kFloat64GroupChannelsOfOneTap : kFloat64GroupChannels)) return nullptr;
  const bool faster = one_tap || q.map != Map::forward;
  return faster ? "float64 groups of many channels: torch's products are faster" : nullptr;
}

// Of a half type without kernels of oneDNN's, which torch multiplies one number at a time.
bool has_slow_loops(const Question& q) { return is_half(q.dtype) && !q.torch.has_kernels(q.dtype); }

// Why torch's own call would be the faster one; null where it would not.
const char* torch_is_faster(const Question& q) {
  if (is_tiny(q.map, q.s) || has_slow_loops(q)) return nullptr;
  if (q.s.groups == 1 && q.s.C > 1) return "a dense convolution: oneDNN's matrix kernels are faster";
  if (q.dtype == DType::float64 && !q.s.is_depthwise()) return products_are_faster_float64(q);
  if (q.dtype != DType::float32 && q.dtype != DType::bfloat16) return nullptr;
  if (!q.s.is_depthwise()) return onednn_is_faster_grouped(q);
  if (q.layout != Layout::nhwc) return onednn_is_faster_nchw(q);
  return onednn_is_faster_channels_last(q.map, q.s, q.dtype, q.gaps, q.torch);
}

bool torch_may(const Question& q) { return q.torch_may; }

// Depthwise has kernels here, and few channels a group.
bool widening_can_run(const Question& q) { return !q.strict && has_slow_loops(q) && !q.s.is_depthwise(); }

const char* widening_is_best(const Question& q) {
  const ConvShape& s = q.s;
  const bool one_tap = s.R == 1 && s.S == 1;
  const bool many = s.channels_per_group() >= (one_tap ? kWidenedChannelsOfOneTap : kWidenedChannels);
  if (!is_matrix_product(s) && (!many || is_tiny(q.map, s))) return nullptr;
  return "half types without kernels of oneDNN's for this processor: in float32, rounded once";
}

// A half type's weight gradient that torch may get wrong, and gets right in float32.
bool float32_can_run(const Question& q) {
  return !q.strict && !q.torch_may && is_half(q.dtype) && q.map == Map::grad_weight && !q.s.is_depthwise() &&
         torch_fault(q.map, q.s, DType::float32) == nullptr;
}

// Groups of few channels, whose weight gradient in a half type the kernel for planes makes faster.
bool are_few_in_groups(const ConvShape& s, int64_t most) {
  return s.groups > 1 && s.channels_per_group() <= most && s.P * s.Q >= kHalfGroupPixels;
}

const char* float32_is_best(const Question& q) {
  if (q.layout != Layout::nhwc && are_few_in_groups(q.s, kHalfGroupChannels)) return nullptr;
  if (torch_is_faster({q.map, q.s, q.layout, DType::float32, q.strict, q.torch}) == nullptr) return nullptr;
  return "torch 2.14.1 returns NaN at random in half types: its float32 call, rounded";
}

// Half types for which float32 has the kernel for groups of channels_last, and oneDNN is slower or may not be asked.
bool groups_in_float32_can_run(const Question& q) {
  const bool half = is_half(q.dtype) && (has_slow_loops(q) || q.map == Map::grad_weight);
  return !q.strict && half && q.layout == Layout::nhwc && are_groups_last(q.s);
}
const char* groups_in_float32_is_best(const Question& q) {
  return onednn_is_faster_groups_last(q.map, q.s, q.torch) ? nullptr
                                                           : "groups of few channels last: in float32, rounded";
}

// The rest.

bool nhwc_can_run(const Question& q) { return q.s.is_depthwise() && q.s.K == q.s.C && q.layout == Layout::nhwc; }
const char* nhwc_is_best(const Question&) { return "depthwise on channels_last images: vectors of channels"; }

bool grouped_nhwc_can_run(const Question& q) {
  return q.dtype == DType::float32 && q.layout == Layout::nhwc && are_groups_last(q.s);
}
const char* grouped_nhwc_is_best(const Question&) {
  return "groups of few channels on channels_last images: vectors of channels";
}

bool nchw_3x3_can_run(const Question& q) {
  const ConvShape& s = q.s;
  if (q.layout != Layout::nchw || q.map == Map::grad_weight) return false;
  if (!s.is_depthwise() || s.K != s.C || q.dtype == DType::float64) return false;
  if (s.R != 3 || s.S != 3 || s.stride_h != s.stride_w || is_dilated(s)) return false;
  if (q.map == Map::forward) return s.stride_h <= 2;
  return s.stride_h == 1 && s.pad_h <= 2 && s.pad_w <= 2;
}

const char* nchw_3x3_is_best(const Question& q) {
  const ConvShape& s = q.s;
  const bool small = std::max({s.H, s.W, s.P, s.Q, s.pad_h, s.pad_w}) <= kSmallPlane;
  return small ? "3x3 depthwise on small planes: copied, padded, into cache" : nullptr;
}

bool always(const Question&) { return true; }
const char* grouped_is_left(const Question& q) {
  return q.s.is_depthwise() ? "depthwise: vectors of pixels" : "groups of several channels: vectors of pixels";
}

struct Rule {
  Kernel kernel;
  const char* name;  // as counted and explained
  bool (*can_run)(const Question&);
  const char* (*is_best)(const Question&);  // the reason; null where a later rule is better
};

constexpr Rule kRules[] = {
    {Kernel::pointwise, "cpu_pointwise", pointwise_can_run, pointwise_is_best},
    {Kernel::in_float32, "aten", groups_in_float32_can_run, groups_in_float32_is_best},
    {Kernel::in_float32, "aten", widening_can_run, widening_is_best},
    {Kernel::in_float32, "aten", small_can_run, small_is_best},
    {Kernel::pointwise_product, "cpu_pointwise_product", product_can_run, product_is_best},
    {Kernel::pointwise_product, "cpu_pointwise_product", product_can_run, torch_may_not},
    {Kernel::aten, "aten", is_product_torch_may, torchs_product_is_best},
    {Kernel::pointwise_matmul, "cpu_pointwise_matmul", is_product, matmul_is_best},
    {Kernel::aten, "aten", torch_may, torch_is_faster},
    {Kernel::in_float32, "aten", float32_can_run, float32_is_best},
    {Kernel::depthwise_nhwc, "cpu_depthwise_nhwc", nhwc_can_run, nhwc_is_best},
    {Kernel::grouped_nhwc, "cpu_grouped_nhwc", grouped_nhwc_can_run, grouped_nhwc_is_best},
    {Kernel::depthwise_nchw_blocked, "cpu_depthwise_nchw_blocked", nchw_blocked_can_run, nchw_blocked_is_best},
    {Kernel::depthwise_nchw_3x3, "cpu_depthwise_nchw_3x3", nchw_3x3_can_run, nchw_3x3_is_best},
    {Kernel::grouped_planes, "cpu_grouped_planes", always, grouped_is_left},
};

Plan plan_dense(const Question& q) {
  for (const Rule& rule : kRules) {
    if (!rule.can_run(q)) continue;
    if (const char* reason = rule.is_best(q)) return {rule.kernel, rule.name, reason};
  }
  return {};  // not reached: the last rule takes every call
}

// grouped.md, "small planes": groups that the kernel for channels_last takes, with a copy there and one back.
bool are_small_planes_of_groups(Map map, const ConvShape& s, DType dtype, const Torch& torch) {
  return dtype == DType::float32 && call_layout(map, s) == Layout::nchw && s.P * s.Q < kGroupPixels &&
         are_groups_last(s) && onednn_is_faster_groups_last(map, s, torch) == nullptr;
}

// In which layout the call is made.
Layout layout_of(Map map, const ConvShape& s, DType dtype, const Torch& torch) {
  if (are_small_planes_of_groups(map, s, dtype, torch)) return Layout::nhwc;
  const bool from_planes = map == Map::grad_weight && is_half(dtype) && !s.is_depthwise() &&
                           are_few_in_groups(s, kHalfGroupChannelsCopied) && !are_groups_last(s);
  return from_planes ? Layout::nchw : call_layout(map, s);
}

}  // namespace

Plan plan(Map map, const ConvShape& s, DType dtype, bool strict, const Torch& torch) {
  const Layout layout = layout_of(map, s, dtype, torch);
  const ConvShape dense = with_copies(s, {layout, true, true, false, true});
  const ImageShape y = output_image(s);
  const bool copied = own_layout(y) != Layout::strided && own_layout(y) != layout;  // for any kernel
  const bool gaps = map == Map::grad_input && !copied && !is_dense(layout, y);
  Plan chosen = plan_dense({map, dense, layout, dtype, strict, torch, gaps});
  if (chosen.kernel == Kernel::in_float32) {
    chosen.name = plan_dense({map, dense, layout, DType::float32, strict, torch}).name;
  }
  chosen.copies.layout = layout;
  chosen.copies.x = !takes(chosen.kernel, map, dtype, layout, input_image(s));
  chosen.copies.y = !takes(chosen.kernel, map, dtype, layout, output_image(s));
  chosen.copies.all_images =
      chosen.is_torchs() || chosen.kernel == Kernel::pointwise || chosen.kernel == Kernel::pointwise_matmul;
  // What the product writes is not any view: a gradient takes its operand's strides.
  if (chosen.kernel == Kernel::pointwise_product) {
    if (map == Map::grad_input) chosen.copies.x = !is_dense(layout, input_image(s));
    if (map == Map::forward) chosen.copies.y = !is_dense(layout, output_image(s));
    chosen.copies.weight = map == Map::grad_weight && s.C > 1 && s.w.c != 1;
  }
  return chosen;
}

}  // namespace sepconv::cpu
