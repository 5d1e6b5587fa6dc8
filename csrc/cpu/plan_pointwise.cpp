// torch has two calls for a 1x1 of float32, and takes MKL's product for whole images, one thread and fewer than 16
// images; else oneDNN's convolution. That one copies NCHW into blocks of channels, and keeps threads idle where images
// are few. MKL's product runs at the same rate as the products here, which therefore win where it is called badly: on
// small calls, in gradients by the input (where torch goes through columns), and on large weights of few pixels.
//
// All limits were measured with AVX-512, one and two threads, 1 and 8 images (benchmarks/notes/pointwise.md).
#include "cpu/plan_pointwise.h"

#include <algorithm>

namespace sepconv::cpu {
namespace {

// Multiply-adds that take about as long as what a call of torch's costs beside its product.
constexpr int64_t kSmallForward = 1'500'000, kSmallGradient = 600'000;
// The same where MKL has blocks of pixels enough: few channels cost it less a block (pointwise.md, "small calls").
constexpr int64_t kSmallForwardMkl = 300'000, kPixelsOfMkl = 28 * 28;
// The same in half types, where oneDNN's call costs more, and two copies stand before float32's product.
constexpr int64_t kSmallForwardHalf = 600'000, kSmallGradientHalf = 500'000;
// Fewer outputs take the product as long as so many: NCHW pixels are packed all the same, and lanes of channels_last
// are idle. MKL has code of its own for them (pointwise.md, "few outputs").
constexpr int64_t kLeastOutputs = 16;

// A batch that lies in the second-level cache in most layers.
constexpr int64_t kFewPixels = 28 * 28 + 240, kSomePixels = 8 * 14 * 14 + 32, kManyPixels = 56 * 56;

struct Sizes {
  int64_t C, K, image, pixels;  // pixels: of all images
  explicit Sizes(const ConvShape& s) : C(s.C), K(s.K), image(s.P * s.Q), pixels(s.N * s.P * s.Q) {}
  int64_t weights() const { return C * K; }
};

bool torch_takes_mkl(const ConvShape& s, int threads) {
  return threads == 1 && s.N < 16 && s.stride_h == 1 && s.stride_w == 1;
}

// Multiply-adds of the product here, idle lanes and all.
int64_t products_of(Map map, const Sizes& s, bool channels_last, bool against_mkl) {
  const bool packs_for_all = map == Map::forward || (map == Map::grad_weight && !channels_last);
  return s.pixels * s.C * (against_mkl && packs_for_all ? std::max(s.K, kLeastOutputs) : s.K);
}

bool beats_mkl(Map map, const Sizes& s, bool channels_last) {
  switch (map) {
    case Map::forward: return false;
    case Map::grad_input:
      if (channels_last) return s.pixels >= 14 * 14 && s.weights() <= 700'000;
      return s.K <= s.C && (s.weights() <= 150'000 || (2 * s.K <= s.C && s.weights() <= 300'000));
    case Map::grad_weight: return s.weights() >= 1'500'000 && s.pixels <= 100;
  }
  return false;
}

bool beats_onednn_nchw(Map map, const Sizes& s) {
  switch (map) {
    case Map::forward: return s.K <= 1536;
    case Map::grad_input: return s.weights() <= 140'000;
    case Map::grad_weight:
      if (s.pixels == s.image) return s.image > 7 * 7 || s.K <= s.C;
      return s.image >= kManyPixels || s.weights() <= 16'000 || 4 * s.K <= s.C;
  }
  return false;
}

bool beats_onednn_channels_last(Map map, const Sizes& s) {
  const bool one_image = s.pixels == s.image;
  switch (map) {
    case Map::forward:
      return (s.pixels <= kFewPixels && s.K <= 2 * s.C) || (s.pixels <= kSomePixels && s.weights() <= 100'000);
    case Map::grad_input:
      return s.pixels <= (one_image ? kManyPixels : kSomePixels) && (s.K <= 3 * s.C || s.weights() <= 12'000);
    case Map::grad_weight:
      if (one_image && s.image > 7 * 7) return s.pixels <= (s.weights() <= 4000 ? kManyPixels : kFewPixels);
      return s.pixels <= 400 && s.K <= s.C;
  }
  return false;
}

}  // namespace

bool product_can(Map map, const ConvShape& s, DType dtype) {
  if (!s.is_pointwise() || dtype != DType::float32) return false;
  const bool reads_pixels = (s.P - 1) * s.stride_h < s.H && (s.Q - 1) * s.stride_w < s.W;
  return map == Map::grad_input ? is_matrix_product(s) : reads_pixels;
}

bool is_small_for_half(Map map, const ConvShape& s) {
  const int64_t products = s.N * s.P * s.Q * s.C * s.K;
  return products <= (map == Map::forward ? kSmallForwardHalf : kSmallGradientHalf);
}

const char* product_is_best(Map map, const ConvShape& s, Layout layout, int threads) {
  const Sizes sizes(s);
  const bool channels_last = layout == Layout::nhwc, against_mkl = torch_takes_mkl(s, threads);
  const bool many_pixels = against_mkl && sizes.pixels >= kPixelsOfMkl;
  const int64_t small = map != Map::forward ? kSmallGradient : many_pixels ? kSmallForwardMkl : kSmallForward;
  if (products_of(map, sizes, channels_last, against_mkl) <= small) {
    return "1x1: a product so small that a call of torch's costs more";
  }
  if (!is_matrix_product(s)) {
    const bool some = !channels_last || map == Map::forward || sizes.pixels <= kSomePixels;
    return some ? "1x1 with a stride: pixels are packed as they are read" : nullptr;
  }
  if (against_mkl) {
    return beats_mkl(map, sizes, channels_last) ? "1x1: MKL's product, as torch calls it, is slower" : nullptr;
  }
  const bool beats = channels_last ? beats_onednn_channels_last(map, sizes) : beats_onednn_nchw(map, sizes);
  return beats ? "1x1: oneDNN would copy into blocks of channels, or leave threads idle" : nullptr;
}

}  // namespace sepconv::cpu
