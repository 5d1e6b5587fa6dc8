// Each fault names its kind, wider than the calls that were seen to fail, and the cause where that is known. One leaves
// the list when its test in tests/test_torch_faults.py passes with torch's own call.
//
// Two faults are not of a shape and are kept out by aten_route.cpp: "grad_weight must be contiguous", which
// torch 2.14.1 raises for a permuted weight of float64 and float16, and weights in channels_last with unusual strides
// of dimensions of size 1, which it misreads. There torch is given the layout and the strides that it has itself.
#include "cpu/torch_faults.h"

#include <algorithm>

#include "core/arithmetic.h"

namespace sepconv::cpu {
namespace {

// oneDNN copies every stride-th pixel of channels_last images into a workspace. Its step there is a block of 8 or 16
// channels, also where the image has fewer: the last pixels are written past the workspace's end (oneDNN issue 6035).
// Seen as a corrupted heap, wrong values, and threads that wait for ever. An image of planes is safe in itself, but is
// read as channels_last where the weight is.
bool strided_1x1_of_few_channels(Map map, const ConvShape& s, DType dtype) {
  const bool strided = s.stride_h > 1 || s.stride_w > 1;
  return map == Map::grad_weight && dtype != DType::float64 && s.R == 1 && s.S == 1 && strided &&
         s.channels_per_group() < 16;
}

// Seen in bfloat16 on processors with AVX-512: dense, and of few channels in channels_last, at random; groups with a
// dilation gave garbage. Its kernels multiply pairs of pixels, and the odd one out with memory that nobody has set.
bool weight_gradient_of_half_types(Map map, const ConvShape&, DType dtype) {
  return map == Map::grad_weight && is_half(dtype);
}

// Seen in bfloat16 on processors with its instructions: 2 channels of 31x31 and 8 channels of 1x15, in every order but
// NCHW. 32 channels are two of the vectors that those kernels work in.
bool depthwise_of_half_types_and_few_channels(Map, const ConvShape& s, DType dtype) {
  return is_half(dtype) && s.is_depthwise() && s.C < 32;
}

// oneDNN's dense kernels for AVX-512 read outside of an image of one pixel whose strides say both NCHW and
// channels_last, where the padding is wide (pytorch issue 195394). Reported by others; not seen with AVX2.
bool dense_on_one_pixel(Map, const ConvShape& s, DType) {
  return s.groups == 1 && s.H == 1 && s.W == 1 && (s.R > 1 || s.S > 1);
}

// Seen in bfloat16 on a processor with AMX: rows of 8 taps over 8 and 12 channels a group were wrong at every size,
// over 16 and 24 with a stride of 4. Its kernels put the taps of a row beside their channels, up to 32 of these.
bool forward_of_half_types_and_wide_filters(Map map, const ConvShape& s, DType dtype) {
  const int64_t channels = s.channels_per_group();
  return map == Map::forward && is_half(dtype) && !s.is_depthwise() && s.S >= 8 && channels >= 8 && channels < 32;
}

// Seen in bfloat16 with AVX-512 and with AMX: an output of one column with a stride, whatever the channels (2 columns,
// 3 taps, stride 2, padding 1). Depthwise with a multiplier is wrong in half of such shapes; one output a channel has
// kernels of its own there, and was right in 3,470 of 3,470.
bool forward_of_half_types_to_one_column(Map map, const ConvShape& s, DType dtype) {
  const bool one_output_a_channel = s.is_depthwise() && s.K == s.C;
  return map == Map::forward && is_half(dtype) && !one_output_a_channel && s.S > 1 && s.Q == 1 && s.stride_w > 1;
}

// oneDNN's dense kernel for AVX-512 (jit:avx512_core) expects a row of the output that sees every row of the filter.
// Where there is none (31x31 on 14x7), it writes past the gradient: a corrupted heap, or wrong values. Seen in float32,
// NCHW, from ten output rows on: 163 of 163 faults in 7,500 random calls were of this kind.
bool weight_gradient_of_tall_filters(Map map, const ConvShape& s, DType dtype) {
  if (map != Map::grad_weight || dtype != DType::float32 || s.groups != 1 || s.R == 1) return false;
  const int64_t above = std::min(ceil_div(s.pad_h, s.stride_h), s.P - 1);  // rows that also see padding above
  const int64_t end = above * s.stride_h - s.pad_h + (s.R - 1) * s.dilation_h + 1;
  return above * s.stride_h < s.pad_h || end > s.H;
}

struct Fault {
  bool (*hits)(Map, const ConvShape&, DType);
  const char* what;
};

constexpr Fault kFaults[] = {
    {strided_1x1_of_few_channels,
     "torch 2.14.1 writes past its memory: the weight gradient of a strided 1x1 of few channels"},
    {weight_gradient_of_half_types, "torch 2.14.1 returns NaN at random: weight gradients of half types"},
    {depthwise_of_half_types_and_few_channels,
     "torch 2.14.1 may never return: depthwise of half types and few channels last"},
    {forward_of_half_types_and_wide_filters,
     "torch 2.14.1 is wrong: half types, 8 to 31 channels a group and 8 taps a row or more"},
    {forward_of_half_types_to_one_column, "torch 2.14.1 is wrong: half types and a stride to one output column"},
    {weight_gradient_of_tall_filters,
     "torch 2.14.1 writes past its memory: the weight gradient of a filter taller than what it is laid on"},
    {dense_on_one_pixel, "torch 2.14.1 may read outside of the image: dense kernels on images of one pixel"},
};

}  // namespace

const char* torch_fault(Map map, const ConvShape& shape, DType dtype) {
  for (const Fault& fault : kFaults) {
    if (fault.hits(map, shape, dtype)) return fault.what;
  }
  return nullptr;
}

}  // namespace sepconv::cpu
