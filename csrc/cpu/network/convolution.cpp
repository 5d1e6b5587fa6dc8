// A dense convolution as a product over windows: some output rows at a time, the windows of their pixels are written one
// after another, and then multiplied by the weight as pixels of a 1x1 convolution are.
//
// Loop-to-data map. A task is a band of output rows of one image, whose windows stay in the second-level cache. Floor:
// the product's; the windows cost R * S numbers moved for each number of the input.
#include "cpu/network/convolution.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/pointwise/product.h"
#include "cpu/simd/thread_scratch.h"

namespace sepconv::cpu::network {
namespace {

constexpr int64_t kNearWindows = 256 << 10;  // bytes of a band's windows
constexpr int64_t kLeastPixels = 28;         // of a band, so that the product has whole blocks

struct Bands {
  const ConvShape& s;
  const float *x, *packed;
  Epilogue epilogue;
  const float* residual;
  float* y;
  int64_t rows, per_image;

  int64_t terms() const { return s.R * s.S * s.C; }

  // Row r of the window of output pixel (p, q), [S, C].
  void window_row(const float* image, int64_t row, int64_t column, float* to) const {
    for (int64_t t = 0; t < s.S; ++t, column += s.dilation_w, to += s.C) {
      if (row < 0 || row >= s.H || column < 0 || column >= s.W) {
        std::fill_n(to, s.C, 0.0f);
        continue;
      }
      const float* from = image + row * s.x.h + column * s.x.w;
      if (s.x.c == 1) {
        std::memcpy(to, from, s.C * sizeof(float));
      } else {
        for (int64_t c = 0; c < s.C; ++c) to[c] = from[c * s.x.c];
      }
    }
  }

  void operator()(int64_t task) const {
    const int64_t n = task / per_image, begin = task % per_image * rows, end = std::min(begin + rows, s.P);
    const float* image = x + n * s.x.n;
    ThreadScratch scratch(ScratchUse::windows);
    float* const windows = scratch.take((end - begin) * s.Q * terms());
    float* to = windows;
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t q = 0; q < s.Q; ++q) {
        for (int64_t r = 0; r < s.R; ++r, to += s.S * s.C) {
          window_row(image, p * s.stride_h - s.pad_h + r * s.dilation_h, q * s.stride_w - s.pad_w, to);
        }
      }
    }
    const int64_t pixels = (end - begin) * s.Q, offset = (n * s.P + begin) * s.Q * s.K;
    ConvShape product;
    product.N = 1, product.C = terms(), product.H = product.P = 1, product.W = product.Q = pixels;
    product.K = s.K, product.R = product.S = 1;
    product.x = {pixels * terms(), 1, pixels * terms(), terms()};
    product.y = {pixels * s.K, 1, pixels * s.K, s.K};
    product_forward_packed(product, windows, packed, epilogue,
                           {residual == nullptr ? nullptr : residual + offset, product.y}, y + offset);
  }
};

}  // namespace

void convolution(const ConvShape& s, const float* x, const float* packed, const Epilogue& epilogue,
                 const float* residual, float* y) {
  if (s.output_elements() == 0) return;
  Bands bands{s, x, packed, epilogue, residual, y, 0, 0};
  const int64_t per_row = s.Q * bands.terms() * int64_t{sizeof(float)};
  const int64_t near = std::max(kNearWindows / per_row, (kLeastPixels + s.Q - 1) / s.Q);
  const int64_t shared = (s.P * s.N + num_threads() - 1) / num_threads();
  bands.rows = std::clamp<int64_t>(near, 1, std::min(s.P, std::max<int64_t>(shared, 1)));
  bands.per_image = (s.P + bands.rows - 1) / bands.rows;
  const auto run = [](void* context, int64_t task) { (*static_cast<const Bands*>(context))(task); };
  parallel_tasks(s.N * bands.per_image, run, &bands);
}

}  // namespace sepconv::cpu::network
