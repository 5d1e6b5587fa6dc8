#include "cpu/plan_channels_last.h"

namespace sepconv::cpu {
namespace {

// Measured thresholds: depthwise-nhwc.md and the last paragraph of grouped.md (benchmarks/notes).
constexpr int64_t kLanes = 16;
constexpr int64_t kChannelsInPart = 32, kPartialChannels = 96, kPixelsOfPartialChannels = 10'000;
constexpr int64_t kStridedChannels = 480, kStridedPixels = 19 * 19, kMultiplierPixels = 16 * 16;
// oneDNN multiplies bfloat16 without widening, but so many numbers of a 3x3 take each thread here as long as a call.
constexpr int64_t kBfloat16Outputs = 280'000, kBfloat16OutputsStrided = 190'000, kBfloat16Gradients = 400'000;
constexpr int64_t kBfloat16TapsStrided = 7 * 7, kMostTaps = 13 * 13;
constexpr int64_t kPadding = 6;
// grouped.md, "channels_last".
constexpr int64_t kWideGroup = 8, kTapsOfWideGroup = 3 * 3;

// oneDNN's depthwise kernel pads by up to kPadding, before as much as behind but for what strides leave over. Of more,
// with a dilation, it runs a reference, 16 times as long; of uneven padding torch is given a padded copy.
bool onednn_pads(const ConvShape& s) {
  const auto pads = [](int64_t size, int64_t before, int64_t stride, int64_t outputs, int64_t reach) {
    const int64_t behind = (outputs - 1) * stride + reach + 1 - size - before;
    return before <= kPadding && before - stride < behind && behind <= before;
  };
  return pads(s.H, s.pad_h, s.stride_h, s.P, (s.R - 1) * s.dilation_h) &&
         pads(s.W, s.pad_w, s.stride_w, s.Q, (s.S - 1) * s.dilation_w);
}

// Of bfloat16, whose gradients by the input with a stride take oneDNN 30 to 120 times as long as they do here.
bool much_is_multiplied(Map map, const ConvShape& s, bool gaps, int threads) {
  switch (map) {
    case Map::forward:
      return s.output_elements() > threads * (is_strided(s) ? kBfloat16OutputsStrided : kBfloat16Outputs);
    case Map::grad_input: return !is_strided(s) && !gaps && s.input_elements() > threads * kBfloat16Gradients;
    case Map::grad_weight: return false;
  }
  return false;
}

}  // namespace

bool are_groups_last(const ConvShape& s) {
  const int64_t group = s.channels_per_group();
  return s.groups > 1 && s.K == s.C && (group == 2 || group == 4 || group == 8) && !(is_strided(s) && is_dilated(s));
}

const char* onednn_is_faster_groups_last(Map map, const ConvShape& s, const Torch& torch) {
  const bool has_avx512 = torch.bfloat16, one_tap = s.R == 1 && s.S == 1;
  if (s.channels_per_group() < kWideGroup) return nullptr;
  if (map == Map::grad_weight) {
    return has_avx512 || is_strided(s) ? nullptr : "groups of 8 channels last, by the weight: oneDNN is faster";
  }
  if (s.R * s.S > kTapsOfWideGroup || is_dilated(s)) {
    return "groups of 8 channels last, of more than 3x3 taps or dilated: oneDNN is faster";
  }
  if (map == Map::grad_input && is_strided(s) && one_tap) {
    return "groups of 8 channels last, 1x1 with a stride, by the input: oneDNN is faster";
  }
  return map == Map::forward || has_avx512 ? nullptr : "groups of 8 channels last, by the input: oneDNN is faster";
}

const char* onednn_is_faster_channels_last(Map map, const ConvShape& s, DType dtype, bool gaps, const Torch& torch) {
  const int64_t taps = s.R * s.S, pixels = s.P * s.Q;
  const bool forward = map == Map::forward, has_avx512 = torch.bfloat16;  // which oneDNN's kernels of bfloat16 need
  const bool short_sums = dtype == DType::float32 && is_strided(s) && taps <= 3 * 3 && pixels >= kMultiplierPixels;
  if (s.K != s.C && map == Map::grad_input && !short_sums) return nullptr;
  if (s.K != s.C) return "a multiplier on channels_last: oneDNN is faster";
  if (map == Map::grad_weight && s.C < kLanes) return "15 channels last or fewer, by the weight: oneDNN is faster";
  if (!onednn_pads(s)) return nullptr;
  const bool much = s.N * pixels > kPixelsOfPartialChannels;
  if (has_avx512 && s.C > kLanes / 2 && s.C < kLanes && much) {
    return "9 to 15 channels last of many pixels, with AVX-512: oneDNN is faster";
  }
  if (dtype == DType::bfloat16 && taps <= 3 * 3 && much_is_multiplied(map, s, gaps, torch.threads)) {
    return "bfloat16 3x3 on many channels_last pixels: oneDNN multiplies without widening";
  }
  if (dtype == DType::bfloat16 && forward && is_strided(s) && taps > kBfloat16TapsStrided && taps <= kMostTaps) {
    return "bfloat16 8x8 to 13x13 on channels_last with a stride: oneDNN multiplies without widening";
  }
  const bool between = s.C > kChannelsInPart && s.C < kPartialChannels;
  if (map == Map::grad_input && has_avx512 && between && s.C % (2 * kLanes) != 0 && dtype == DType::float32 &&
      is_strided(s) && taps <= 3 * 3 && s.N * s.H * s.W > kPixelsOfPartialChannels) {
    return "many pixels of channels last that fill no pairs of vectors, strided, by the input: oneDNN is faster";
  }
  if (!forward) return nullptr;
  if (s.stride_h > 1 && s.C >= kStridedChannels && pixels >= kStridedPixels) {
    return "many channels last, strided: oneDNN is faster";
  }
  const bool partial = between && s.C % kLanes != 0;
  if (has_avx512 && partial && !is_strided(s) && much) {
    return "many pixels of channels last that fill no whole vectors: oneDNN is faster";
  }
  return nullptr;
}

}  // namespace sepconv::cpu
