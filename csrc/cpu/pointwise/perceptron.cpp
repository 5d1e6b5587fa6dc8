// Two products of float32 in one pass, after a LayerNorm or not: the hidden layer stays in the second-level cache.
//
// Loop-to-data map. Lanes are channels. A task has some pixels and goes through them by bands: it normalises a band's
// pixels into a buffer, multiplies them by the first weight into a second one, and that by the second weight into y.
// Where the weights are large and the pixels few, reading the weights is what costs: threads then share the channels of
// one product after the other instead of the pixels.
//
// Floor: the multiply-adds of the two products at the rate of the registers, or the bytes of their weights.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/pointwise/perceptron.cpp"
#include "cpu/pointwise/perceptron.h"

#include "cpu/pointwise/product_shared.h"
#include "cpu/simd/thread_scratch.h"

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void perceptron_forward(const PerceptronShape& shape, const PerceptronMemory& memory) {
  if (shape.pixels * shape.K == 0) return;
  SEPCONV_BEST_ISA(run)(shape, memory);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

#include "cpu/pointwise/product_simd.h"

#include "cpu/pointwise/product_rows_simd.h"

inline constexpr int64_t kHiddenBytes = 384 << 10;  // of a band's hidden layer, if it has kLeastPixels
inline constexpr int64_t kLeastPixels = 14 * 4;
inline constexpr int64_t kLargeWeight = 1 << 20;  // bytes of both weights, which are better read for many pixels
inline constexpr int64_t kManyPixels = 14 * 14;

// A pixel's channels with mean 0 and variance 1.
inline void normalise(const float* x, int64_t C, float eps, float* to) {
  constexpr int64_t L = kLanes<float>;
  const int rest = static_cast<int>(C % L);
  const int64_t whole = C - rest;
  const float share = 1.0f / static_cast<float>(C);
  Vector<float> sum{}, other{};
  int64_t c = 0;
  for (; c + 2 * L <= whole; c += 2 * L) sum += load(x + c), other += load(x + c + L);
  for (; c < whole; c += L) sum += load(x + c);
  if (rest > 0) sum += load_first(x + whole, rest);
  const Vector<float> mean = broadcast<float>(sum_lanes<float>(sum + other) * share);
  sum = other = Vector<float>{};
  for (c = 0; c + 2 * L <= whole; c += 2 * L) {
    const Vector<float> a = load(x + c) - mean, b = load(x + c + L) - mean;
    sum += a * a, other += b * b;
  }
  for (; c < whole; c += L) {
    const Vector<float> a = load(x + c) - mean;
    sum += a * a;
  }
  for (int64_t i = whole; i < C; ++i) {
    const float a = x[i] - mean[0];
    sum[0] += a * a;
  }
  const float variance = sum_lanes<float>(sum + other) * share;
  const Vector<float> scale = broadcast<float>(1.0f / std::sqrt(variance + eps));
  for (c = 0; c < whole; c += L) store(to + c, (load(x + c) - mean) * scale);
  if (rest > 0) store_first(to + whole, (load_first(x + whole, rest) - mean) * scale, rest);
}

struct Normalise {
  const PerceptronShape& s;
  const float* x;
  float* to;
  int64_t parts;
  void operator()(int64_t task) const {
    const Part part(s.pixels, parts, task);
    for (int64_t i = part.begin; i < part.end; ++i) normalise(x + i * s.C, s.C, s.eps, to + i * s.C);
  }
};

struct PerceptronTask {
  const PerceptronShape& s;
  const PerceptronMemory& m;
  int64_t parts, most;  // pixels of a band

  Outputs outputs(float* data, int64_t row, const Epilogue& epilogue) const {
    Outputs y{data, row};
    y.column_bias = static_cast<const float*>(epilogue.bias), y.activation = epilogue.activation;
    return y;
  }

  void operator()(int64_t task) const {
    const Part part(s.pixels, parts, task);
    const Pieces bands(part.end - part.begin, most);
    ThreadScratch scratch(ScratchUse::ring);
    const int64_t largest = bands.begin(1);
    float* const hidden = scratch.take(largest * (s.M + (s.norm ? s.C : 0)));
    float* const normal = hidden + largest * s.M;
    for (int64_t band = 0; band < bands.count; ++band) {
      const int64_t first = part.begin + bands.begin(band), count = bands.begin(band + 1) - bands.begin(band);
      const float* x = m.x + first * s.C;
      if (s.norm) {
        for (int64_t i = 0; i < count; ++i) normalise(x + i * s.C, s.C, s.eps, normal + i * s.C);
        x = normal;
      }
      multiply_all({x, s.C, 1}, {m.hidden, s.C}, outputs(hidden, s.M, m.hidden_epilogue), count, s.M);
      Outputs y = outputs(m.y + first * s.K, s.K, m.project_epilogue);
      if (m.residual != nullptr) y.residual = m.residual + first * s.K, y.residual_row = s.K;
      multiply_all({hidden, s.M, 1}, {m.project, s.M}, y, count, s.K);
    }
  }
};

inline ConvShape product_shape(int64_t pixels, int64_t C, int64_t K) {
  ConvShape s;
  s.N = s.H = s.P = s.R = s.S = 1;
  s.W = s.Q = pixels;
  s.C = C;
  s.K = K;
  s.x = {pixels * C, 1, pixels * C, C};
  s.y = {pixels * K, 1, pixels * K, K};
  return s;
}

// The products one after another, each shared by the threads as it likes.
inline void run_apart(const PerceptronShape& s, const PerceptronMemory& m) {
  ThreadScratch scratch(ScratchUse::image);
  float* const hidden = scratch.take(s.pixels * (s.M + (s.norm ? s.C : 0)));
  const float* x = m.x;
  if (s.norm) {
    float* const normal = hidden + s.pixels * s.M;
    const int64_t parts = parts_of(s.pixels * s.C);
    parallel(parts, Normalise{s, m.x, normal, parts});
    x = normal;
  }
  product_forward_packed(product_shape(s.pixels, s.C, s.M), x, m.hidden, m.hidden_epilogue, {}, hidden);
  const ConvShape second = product_shape(s.pixels, s.M, s.K);
  product_forward_packed(second, hidden, m.project, m.project_epilogue, {m.residual, second.y}, m.y);
}

inline void run(const PerceptronShape& s, const PerceptronMemory& m) {
  const int64_t weights = (s.C + s.K) * s.M * int64_t{sizeof(float)};
  const int64_t parts = std::min(parts_of(s.pixels * (s.C + s.K) * s.M), ceil_div(s.pixels, kLeastPixels));
  const bool large = weights > kLargeWeight;
  if (num_threads() > 1 && (parts == 1 || (large && s.pixels / parts < kManyPixels / 2))) return run_apart(s, m);
  int64_t most = std::max(kLeastPixels, kHiddenBytes / (s.M * int64_t{sizeof(float)}));
  if (large) most = std::max(most, kManyPixels);
  parallel(parts, PerceptronTask{s, m, parts, most});
}

#endif
