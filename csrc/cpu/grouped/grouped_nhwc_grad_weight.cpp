// Convolution in groups of 2, 4 or 8 channels that make as many, of float32 images whose channels are dense: gradient
// by the weight. Images, rows and pixels may lie apart in any way.
//
//   grad_w[k, i, r, s] = sum over n, p, q of grad_y[n, p, q, k] * x[n, p * stride_h - pad_h + r * dilation_h,
//                        q * stride_w - pad_w + s * dilation_w, i-th channel of k's group]
//
// Loop-to-data map. Lanes are neighbouring channels k. A task is one vector of them, or one kernel row of one where
// there are few vectors. It goes through the images by bands of some output rows, and over a band once for each kernel
// row (and four channels of a group): the sums of that row's taps stay in registers, and a vector of x, whose lanes
// are moved to those of their group, meets the grad_y of every tap of three that see it. Then they are added to the
// task's sums, so that a long sum is a sum of short ones. The order of additions depends on the shape alone.
//
// Floor: R x S x group multiply-adds a number of grad_y at the rate of the registers, or the bytes of both images.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/grouped/grouped_nhwc_grad_weight.cpp"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void grouped_nhwc_grad_weight(const ConvShape& shape, const float* grad_y, const float* x, float* grad_w) {
  if (shape.weight_elements() == 0) return;
  SEPCONV_BEST_ISA(group_weights)(shape, grad_y, x, grad_w);
}

}  // namespace sepconv::cpu
#else

inline constexpr int64_t kShortSum = 64;  // output pixels of a band, about
inline constexpr int kTogether = 4;       // channels of a group whose sums are in registers

// Lanes of which each holds channel `kI` of its group, of `count` lanes that are read. A group wider than a vector has
// its channels at `x`, and one in vectors begins at x itself.
template <int kGroup, int kI, int... kLane>
SEPCONV_INLINE Vector<float> channel_of_group(const float* x, int count, std::integer_sequence<int, kLane...>) {
  constexpr int L = sizeof...(kLane);
  if constexpr (kGroup > L) {
    return broadcast<float>(x[kI]);
  } else {
    const Vector<float> v = count == L ? load(x) : load_first(x, count);
    return __builtin_shufflevector(v, v, (kLane / kGroup * kGroup + kI)...);
  }
}

SEPCONV_INLINE void add_lanes(float* to, Vector<float> sums) { store(to, load(to) + sums); }

// The sums of kernel row `r` over the output rows [p0, p1) of one image.
struct GroupRows {
  const ConvShape& k;
  const float *grad_y, *x;  // the image's first pixel, of the vector's channels; x: of its first group's
  int lanes;
  int64_t p0, p1, r;
};

template <int kGroup, int kFirst, int... kI>
SEPCONV_INLINE void add_pixel(Vector<float>* sums, Vector<float> g, const float* x, int lanes,
                              std::integer_sequence<int, kI...>) {
  using Lanes = std::make_integer_sequence<int, kLanes<float>>;
  ((sums[kI] += g * channel_of_group<kGroup, kFirst + kI>(x, lanes, Lanes())), ...);
}

// One tap of any: sums[i] is that of channel kFirst + i of the group.
template <int kGroup, int kFirst, int kCount>
void add_tap(const GroupRows& a, int64_t s, float* total) {
  const ConvShape& k = a.k;
  Vector<float> sums[kCount] = {};
  const int64_t left = s * k.dilation_w - k.pad_w;
  const int64_t from = left < 0 ? (-left + k.stride_w - 1) / k.stride_w : 0;
  const int64_t to = k.W > left ? std::min(k.Q, (k.W - 1 - left) / k.stride_w + 1) : 0;
  for (int64_t p = a.p0; p < a.p1; ++p) {
    const int64_t h = p * k.stride_h - k.pad_h + a.r * k.dilation_h;
    if (h < 0 || h >= k.H) continue;
    const float* g = a.grad_y + p * k.y.h + from * k.y.w;
    const float* x = a.x + h * k.x.h + (from * k.stride_w + left) * k.x.w;
    for (int64_t q = from; q < to; ++q, g += k.y.w, x += k.stride_w * k.x.w) {
      const Vector<float> value = a.lanes == kLanes<float> ? load(g) : load_first(g, a.lanes);
      add_pixel<kGroup, kFirst>(sums, value, x, a.lanes, std::make_integer_sequence<int, kCount>());
    }
  }
  for (int i = 0; i < kCount; ++i) add_lanes(total + i * kLanes<float>, sums[i]);
}

// Input column j meets the outputs j + pad_w - s of the three taps s of a row.
template <int kGroup, int kFirst, int kCount, int... kI>
SEPCONV_INLINE void add_column(Vector<float> (&sums)[3][kCount], const GroupRows& a, const float* x, const float* g,
                               int64_t q, std::integer_sequence<int, kI...>) {
  using Lanes = std::make_integer_sequence<int, kLanes<float>>;
  const Vector<float> values[kCount] = {channel_of_group<kGroup, kFirst + kI>(x, a.lanes, Lanes())...};
#pragma GCC unroll 3
  for (int s = 0; s < 3; ++s) {
    if (q - s < 0 || q - s >= a.k.Q) continue;
    const float* const at = g - s * a.k.y.w;
    const Vector<float> value = a.lanes == kLanes<float> ? load(at) : load_first(at, a.lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sums[s][i] += value * values[i];
  }
}

// Three taps that are neighbours, of whole vectors, where all outputs exist.
template <int kGroup, int kFirst, int kCount, int... kI>
SEPCONV_INLINE void add_columns(Vector<float> (&sums)[3][kCount], const float* x, int64_t x_step, const float* g,
                                int64_t g_step, int64_t count, std::integer_sequence<int, kI...>) {
  using Lanes = std::make_integer_sequence<int, kLanes<float>>;
  for (; count > 0; --count, x += x_step, g += g_step) {
    const Vector<float> values[kCount] = {channel_of_group<kGroup, kFirst + kI>(x, kLanes<float>, Lanes())...};
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {
      const Vector<float> value = load(g - s * g_step);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) sums[s][i] += value * values[i];
    }
  }
}

template <int kGroup, int kFirst, int kCount>
void add_three_taps(const GroupRows& a, float* total) {
  using Channels = std::make_integer_sequence<int, kCount>;
  const ConvShape& k = a.k;
  Vector<float> sums[3][kCount] = {};
  // Columns whose three outputs exist: all of them with j + pad_w in [2, Q).
  const int64_t begin = std::clamp<int64_t>(2 - k.pad_w, 0, k.W), end = std::clamp(k.Q - k.pad_w, begin, k.W);
  for (int64_t p = a.p0; p < a.p1; ++p) {
    const int64_t h = p - k.pad_h + a.r * k.dilation_h;
    if (h < 0 || h >= k.H) continue;
    const float* x = a.x + h * k.x.h;
    const float* g = a.grad_y + p * k.y.h + k.pad_w * k.y.w;  // of column 0 and tap 0
    const bool whole = a.lanes == kLanes<float>;
    for (int64_t j = 0; j < k.W; ++j) {
      if (whole && j == begin && end > begin) {
        add_columns<kGroup, kFirst, kCount>(sums, x + j * k.x.w, k.x.w, g + j * k.y.w, k.y.w, end - begin, Channels());
        j = end;
        if (j == k.W) break;
      }
      add_column<kGroup, kFirst>(sums, a, x + j * k.x.w, g + j * k.y.w, j + k.pad_w, Channels());
    }
  }
  for (int s = 0; s < 3; ++s) {
    for (int i = 0; i < kCount; ++i) add_lanes(total + (s * kGroup + i) * kLanes<float>, sums[s][i]);
  }
}

template <int kGroup, int kFirst = 0>
void add_kernel_row(const GroupRows& a, float* total) {
  constexpr int kCount = std::min(kGroup, kTogether), L = kLanes<float>;
  if (a.k.S == 3 && a.k.stride_h == 1 && a.k.stride_w == 1 && a.k.dilation_w == 1) {
    add_three_taps<kGroup, kFirst, kCount>(a, total + kFirst * L);
  } else {
    for (int64_t s = 0; s < a.k.S; ++s) add_tap<kGroup, kFirst, kCount>(a, s, total + (s * kGroup + kFirst) * L);
  }
  if constexpr (kFirst + kCount < kGroup) add_kernel_row<kGroup, kFirst + kCount>(a, total);
}

struct GroupWeights {
  const ConvShape& k;
  const float *grad_y, *x;
  float* grad_w;
  int64_t row_parts;  // 1, or R

  template <int kGroup>
  void run(int64_t c, int64_t r0, int64_t r1) const {
    constexpr int64_t L = kLanes<float>;
    const int lanes = static_cast<int>(std::min(L, k.K - c));
    const int64_t row = k.S * kGroup;  // sums of a kernel row, vectors
    std::vector<float> total((r1 - r0) * row * L);
    const int64_t band = std::max<int64_t>(1, kShortSum / std::max<int64_t>(k.Q, 1));
    for (int64_t n = 0; n < k.N; ++n) {
      GroupRows rows{k, grad_y + n * k.y.n + c, x + n * k.x.n + (kGroup > L ? c / kGroup * kGroup : c), lanes, 0, 0, 0};
      for (rows.p0 = 0; rows.p0 < k.P; rows.p0 = rows.p1) {
        rows.p1 = std::min(k.P, rows.p0 + band);
        for (rows.r = r0; rows.r < r1; ++rows.r) {
          add_kernel_row<kGroup>(rows, total.data() + (rows.r - r0) * row * L);
        }
      }
    }
    for (int64_t t = 0; t < (r1 - r0) * row; ++t) {
      float* const to = grad_w + c * k.w.n + t % kGroup * k.w.c + (r0 + t / row) * k.w.h + t % row / kGroup * k.w.w;
      for (int lane = 0; lane < lanes; ++lane) to[lane * k.w.n] = total[t * L + lane];
    }
  }

  void operator()(int64_t task) const {
    const int64_t c = task / row_parts * kLanes<float>, part = task % row_parts;
    const int64_t r0 = row_parts == 1 ? 0 : part, r1 = row_parts == 1 ? k.R : part + 1;
    switch (k.channels_per_group()) {
      case 2: return run<2>(c, r0, r1);
      case 4: return run<4>(c, r0, r1);
      default: return run<8>(c, r0, r1);
    }
  }
};

inline void group_weights(const ConvShape& k, const float* grad_y, const float* x, float* grad_w) {
  const int64_t vectors = (k.K + kLanes<float> - 1) / kLanes<float>, threads = num_threads();
  const int64_t row_parts = threads == 1 || vectors >= 4 * threads ? 1 : k.R;
  parallel(vectors * row_parts, GroupWeights{k, grad_y, x, grad_w, row_parts});
}

#endif
