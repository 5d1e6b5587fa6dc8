// What stands outside of the image, and which results of a convolution depend on it.
//
// The kernels know zero padding only. A mode other than zeros runs one of them and then a border kernel (borders.cpp,
// borders.cu), which computes again, with the pixels that the mode puts outside, just the results that depend on them:
//   forward      the outputs whose window leaves the image
//   grad_input   the pixels that stand in the padding once more
//   grad_weight  adds the products of the taps that lie in the padding
// In each dimension they are the first few and the last few, so that they form a frame.
//
// No torch header is seen here: kernels, on every device, include this file.
#pragma once

#include <cstdint>

#include "core/conv_shape.h"
#include "core/host_device.h"

namespace sepconv {

enum class PaddingMode : int { zeros, reflect, replicate, circular };

inline constexpr const char* kPaddingModeNames[] = {"zeros", "reflect", "replicate", "circular"};
inline constexpr int kPaddingModeCount = sizeof(kPaddingModeNames) / sizeof(kPaddingModeNames[0]);

// The first few and the last few of the positions in one dimension.
struct Ends {
  int64_t leading = 0, trailing = 0;
  bool any() const { return leading + trailing > 0; }
};

// Positions from begin to end - 1.
struct Range {
  int64_t begin = 0, end = 0;
};

// One dimension of a padded convolution. Tap t of output o meets position o * stride + t * dilation - pad, which is in
// the image from 0 to size - 1.
struct PaddedAxis {
  PaddingMode mode = PaddingMode::zeros;
  int64_t size = 0, outputs = 0, taps = 0, stride = 1, pad = 0, dilation = 1;

  SEPCONV_HOST_DEVICE int64_t position(int64_t output, int64_t tap) const {
    return output * stride + tap * dilation - pad;
  }

  // The pixel that stands at a position. Padding is below size (reflect), at most size (circular): one step is enough.
  SEPCONV_HOST_DEVICE int64_t source(int64_t position) const {
    if (position >= 0 && position < size) return position;
    const bool before = position < 0;
    switch (mode) {
      case PaddingMode::reflect: return before ? -position : 2 * (size - 1) - position;
      case PaddingMode::circular: return before ? position + size : position - size;
      default: return before ? 0 : size - 1;
    }
  }

  // The positions outside of the image that some tap meets.
  SEPCONV_HOST_DEVICE int64_t positions_before() const { return outputs > 0 && pad > 0 ? pad : 0; }
  SEPCONV_HOST_DEVICE int64_t positions_after() const {
    const int64_t last = position(outputs - 1, taps - 1);
    return outputs > 0 && last >= size ? last - size + 1 : 0;
  }

  // The positions before the image at which a pixel stands, and those after it.
  SEPCONV_HOST_DEVICE Range images_before(int64_t pixel) const {
    const int64_t count = positions_before();
    switch (mode) {
      case PaddingMode::reflect: return pixel >= 1 && pixel <= count ? Range{-pixel, -pixel + 1} : Range{};
      case PaddingMode::circular: return size - pixel <= count ? Range{pixel - size, pixel - size + 1} : Range{};
      default: return pixel == 0 ? Range{-count, 0} : Range{};
    }
  }
  SEPCONV_HOST_DEVICE Range images_after(int64_t pixel) const {
    const int64_t count = positions_after(), back = size - 1 - pixel;
    switch (mode) {
      case PaddingMode::reflect: return back >= 1 && back <= count ? Range{size - 1 + back, size + back} : Range{};
      case PaddingMode::circular: return pixel < count ? Range{pixel + size, pixel + size + 1} : Range{};
      default: return back == 0 ? Range{size, size + count} : Range{};
    }
  }

  // The outputs for which the taps from first to last are not all in the image.
  SEPCONV_HOST_DEVICE Ends outputs_outside(int64_t first, int64_t last) const {
    const int64_t entered = first_output_at(pad - first * dilation);
    const int64_t left = first_output_at(size + pad - last * dilation);
    return {entered, outputs - (left > entered ? left : entered)};
  }
  SEPCONV_HOST_DEVICE Ends outputs_outside() const { return outputs_outside(0, taps - 1); }

  // The pixels that may have images; one more than has where a reflection leaves the edge itself out.
  SEPCONV_HOST_DEVICE Ends pixels_with_images() const {
    const int64_t before = positions_before(), after = positions_after();
    int64_t leading = before, trailing = after;
    if (mode == PaddingMode::circular) leading = after, trailing = before;
    if (mode == PaddingMode::reflect) leading += before > 0, trailing += after > 0;
    if (mode == PaddingMode::replicate) leading = before > 0, trailing = after > 0;
    if (leading > size) leading = size;
    return {leading, trailing < size - leading ? trailing : size - leading};
  }

 private:
  // The first output whose window begins no earlier than `offset` pixels further than that of output 0.
  SEPCONV_HOST_DEVICE int64_t first_output_at(int64_t offset) const {
    const int64_t first = offset > 0 ? (offset + stride - 1) / stride : 0;
    return first < outputs ? first : outputs;
  }
};

struct PaddedAxes {
  PaddedAxis h, w;

  PaddedAxes(const ConvShape& s, PaddingMode mode)
      : h{mode, s.H, s.P, s.R, s.stride_h, s.pad_h, s.dilation_h},
        w{mode, s.W, s.Q, s.S, s.stride_w, s.pad_w, s.dilation_w} {}
};

// What of a call's result depends on the padding.
enum class BorderExtent : int { none, some, all };

inline BorderExtent border_extent(Map map, const ConvShape& shape, PaddingMode mode) {
  if (mode == PaddingMode::zeros) return BorderExtent::none;
  const PaddedAxes axes(shape, mode);
  const bool written = map == Map::grad_input;
  const Ends h = written ? axes.h.pixels_with_images() : axes.h.outputs_outside();
  const Ends w = written ? axes.w.pixels_with_images() : axes.w.outputs_outside();
  if (!h.any() && !w.any()) return BorderExtent::none;
  if (map == Map::grad_weight) return BorderExtent::some;
  const bool all = h.leading + h.trailing >= (written ? shape.H : shape.P) ||
                   w.leading + w.trailing >= (written ? shape.W : shape.Q);
  return all ? BorderExtent::all : BorderExtent::some;
}

}  // namespace sepconv
