// OverlapAxis (csrc/core/overlap.h) against all pairs of taps and outputs, on random axes; built and run by
// test_overlap.py.
#include "core/overlap.h"

#include <algorithm>
#include <cstdio>
#include <random>

namespace {

using sepconv::OverlapAxis;
using sepconv::Span;

// What is wrong with the overlap of one axis; null if nothing is.
const char* fault(int64_t size, int64_t kernel, int64_t outputs, int64_t stride, int64_t pad, int64_t dilation,
                  bool keep_outputs) {
  const OverlapAxis axis(size, kernel, outputs, stride, pad, dilation, keep_outputs);
  const auto is_pixel = [](int64_t position, int64_t size) { return position >= 0 && position < size; };
  Span taps{kernel, 0}, touched{outputs, 0};
  for (int64_t p = 0; p < outputs; ++p) {
    for (int64_t r = 0; r < kernel; ++r) {
      if (!is_pixel(p * stride + r * dilation - pad, size)) continue;
      taps = {std::min(taps.begin, r), std::max(taps.end, r + 1)};
      touched = {std::min(touched.begin, p), std::max(touched.end, p + 1)};
    }
  }
  if (taps.begin >= taps.end) return axis.is_empty() ? nullptr : "something meets nothing";
  if (keep_outputs) touched = {0, outputs};
  if (axis.taps.begin != taps.begin || axis.taps.end != taps.end) return "the taps";
  if (axis.outputs.begin != touched.begin || axis.outputs.end != touched.end) return "the outputs";
  if (axis.pixels.begin < 0 || axis.pixels.end > size || axis.pixels.count() < 0) return "the pixels";
  if (axis.pad_before < 0 || axis.pad_after < 0) return "the padding";
  const int64_t pixels = axis.pixels.count(), padded = pixels + axis.pad_before + axis.pad_after;
  if ((padded - (taps.count() - 1) * dilation - 1) / axis.stride + 1 != touched.count()) return "the number of outputs";
  for (int64_t p = 0; p < touched.count(); ++p) {
    for (int64_t r = 0; r < taps.count(); ++r) {
      const int64_t whole = (p + touched.begin) * stride + (r + taps.begin) * dilation - pad;
      const int64_t part = p * axis.stride + r * dilation - axis.pad_before;
      if (is_pixel(whole, size) != is_pixel(part, pixels)) return "which tap meets a pixel";
      if (is_pixel(whole, size) && whole != part + axis.pixels.begin) return "which pixel a tap meets";
    }
  }
  return nullptr;
}

}  // namespace

int main() {
  std::mt19937 generator(1);
  const auto number = [&](int64_t least, int64_t most) {
    return least + static_cast<int64_t>(generator() % (most - least + 1));
  };
  for (int i = 0; i < 200000; ++i) {
    const int64_t size = number(0, 9), kernel = number(1, 5), stride = number(1, 12), dilation = number(1, 14);
    const int64_t pad = number(0, 20), reach = size + pad + number(0, 20) - (kernel - 1) * dilation - 1;
    if (reach < 0) continue;
    for (const bool keep_outputs : {false, true}) {
      const int64_t outputs = reach / stride + 1;
      if (const char* what = fault(size, kernel, outputs, stride, pad, dilation, keep_outputs)) {
        std::printf("%s: size %ld, kernel %ld, outputs %ld, stride %ld, pad %ld, dilation %ld, keep_outputs %d\n", what,
                    static_cast<long>(size), static_cast<long>(kernel), static_cast<long>(outputs),
                    static_cast<long>(stride), static_cast<long>(pad), static_cast<long>(dilation), keep_outputs);
        return 1;
      }
    }
  }
}
