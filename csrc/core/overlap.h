// The part of a convolution in which filter and image overlap.
//
// Padding and dilation cost a kernel memory and time, as it walks or copies the padded image. Where they are far beyond
// the image's size, most taps of the filter meet nothing but padding, whatever the output, or most outputs do, whatever
// the tap. Without these taps, outputs and the rows that nobody reads, it is the same convolution of about the image's
// size:
//
//   tap r and output p meet  if  0 <= p * stride + r * dilation - pad < size
//
// What meets nothing is known beforehand: such an output is the bias, and such a tap's or pixel's gradient is zero.
// No torch header is seen here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "core/conv_shape.h"
#include "core/padding_mode.h"

namespace sepconv {

// Positions from begin to end - 1.
struct Span {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};

// One axis: the positions that are left, the zeros before and after the pixels, and the step from output to output.
struct OverlapAxis {
  Span pixels, taps, outputs;
  int64_t pad_before = 0, pad_after = 0, stride = 1;

  // Taps from the first to the last that meets a pixel, and outputs likewise, or all of them.
  OverlapAxis(int64_t size, int64_t kernel, int64_t all_outputs, int64_t step, int64_t pad, int64_t dilation,
              bool keep_outputs) {
    taps = {kernel, 0}, outputs = {all_outputs, 0};
    for (int64_t r = 0; r < kernel; ++r) {
      const int64_t offset = r * dilation - pad;  // of output 0
      const int64_t first = offset >= 0 ? 0 : (-offset - 1) / step + 1;
      const int64_t end = offset >= size ? 0 : std::min(all_outputs, (size - 1 - offset) / step + 1);
      if (first >= end) continue;
      taps = {std::min(taps.begin, r), r + 1};
      outputs = {std::min(outputs.begin, first), std::max(outputs.end, end)};
    }
    if (is_empty()) return;
    if (keep_outputs) outputs = {0, all_outputs};
    // The first and the last position that is read; a pixel where it is in the image.
    const int64_t first = outputs.begin * step + taps.begin * dilation - pad,
                  last = (outputs.end - 1) * step + (taps.end - 1) * dilation - pad;
    pixels = {std::clamp<int64_t>(first, 0, size), std::clamp<int64_t>(last + 1, 0, size)};
    pad_before = pixels.begin - first, pad_after = last + 1 - pixels.end;
    stride = outputs.count() == 1 ? 1 : step;  // of one output it has no meaning
  }

  bool is_empty() const { return taps.begin >= taps.end; }
};

// Both axes.
struct Overlap {
  OverlapAxis h, w;

  // The overlap of a call that is worth being made smaller: along one axis it reads far more than there is, and not all
  // of it is needed.
  static std::optional<Overlap> worth_taking(const ConvShape& s, PaddingMode mode) {
    const bool far = is_far(s.H, s.R, s.P, s.stride_h, s.dilation_h) || is_far(s.W, s.S, s.Q, s.stride_w, s.dilation_w);
    if (!far || mode != PaddingMode::zeros) return std::nullopt;  // the other modes pad by an image's size at most
    Overlap o(s, /*keep_outputs=*/false);
    // Outputs are left out where that spares half of them: those that stay are copied to their places.
    const bool spares = o.h.outputs.count() * o.w.outputs.count() * 2 <= s.P * s.Q;
    if (!o.is_empty() && !spares) o = Overlap(s, /*keep_outputs=*/true);
    const bool same = o.h.taps.count() == s.R && o.w.taps.count() == s.S && o.h.outputs.count() == s.P &&
                      o.w.outputs.count() == s.Q && o.h.stride == s.stride_h && o.w.stride == s.stride_w;
    return same ? std::nullopt : std::make_optional(o);
  }

  bool is_empty() const { return h.is_empty() || w.is_empty(); }

  // The call's shape without the rest.
  ConvShape of(ConvShape s) const {
    s.H = h.pixels.count(), s.R = h.taps.count(), s.P = h.outputs.count();
    s.W = w.pixels.count(), s.S = w.taps.count(), s.Q = w.outputs.count();
    s.pad_h = h.pad_before, s.pad_w = w.pad_before;
    s.stride_h = h.stride, s.stride_w = w.stride;
    return s;
  }

 private:
  Overlap(const ConvShape& s, bool keep_outputs)
      : h(s.H, s.R, s.P, s.stride_h, s.pad_h, s.dilation_h, keep_outputs),
        w(s.W, s.S, s.Q, s.stride_w, s.pad_w, s.dilation_w, keep_outputs) {}

  static bool is_far(int64_t size, int64_t kernel, int64_t outputs, int64_t stride, int64_t dilation) {
    const int64_t read = (outputs - 1) * stride + (kernel - 1) * dilation + 1;
    return std::max(read, stride) > 2 * size + 16;
  }
};

}  // namespace sepconv
