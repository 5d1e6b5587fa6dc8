// Depthwise convolution (multiplier 1) of planes whose columns are dense: gradient by the weight. plan.cpp says of
// which. Images, planes and rows may lie apart in any way.
//
// Loop-to-data map. A unit is one vector of channels of some strips of images n, a strip being as many rows of grad_y
// as have their tiles (depthwise_nchw_blocked.h) in the second-level cache. Strip by strip the planes of x and grad_y
// are turned into tiles, x with zeros around it, while those of the next strip are fetched. The sums of a few rows of
// the filter, a vector of channels for each tap, stay in registers while some pixels of grad_y go by; then they are
// added to the strip's, and those to the unit's in the end, so that a long sum is a sum of short ones. Where there are
// few channels, the strips are shared among several units, whose sums are added at the end, in order: all this depends
// on the shape alone, and the result not on the number of threads.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/depthwise/depthwise_nchw_blocked_grad_weight.cpp"
#include "cpu/depthwise/depthwise_nchw_blocked.h"

#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void depthwise_nchw_blocked_grad_weight(const ConvShape& s, DType dtype, const void* grad_y, const void* x,
                                        void* grad_w) {
  if (s.weight_elements() == 0) return;
  SEPCONV_BEST_ISA(grad_weight)(s, dtype, grad_y, x, grad_w);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/scratch_simd.h"
#include "cpu/simd/transpose_simd.h"

#include "cpu/depthwise/depthwise_nchw_blocked_simd.h"

inline constexpr int64_t kShortSum = 32;  // pixels, about; up to twice as many along a row

struct ProductsArgs {
  const float *image, *grads;
  int64_t P, Q;
  int64_t row, row_step, column_step;  // numbers between tile rows, and between what neighbours in grad_y meet
  int64_t sum_rows, sum_columns;       // pixels of grad_y whose products are added one by one
  float* sums;                         // [R, S, lane]
};

// The sums of the filter's rows from kFirst on, as many at a time as registers hold.
template <int kR, int kS, int kFirst = 0>
SEPCONV_INLINE void add_rows(const ProductsArgs& a) {
  constexpr int kFit = std::max(1, (SEPCONV_ISA_LEVEL == 2 ? 25 : 12) / kS);
  constexpr int kRows = std::min(kFit, kR - kFirst);
  float* const total = a.sums + kFirst * kS * kLane;
  for (int64_t top = 0; top < a.P; top += a.sum_rows) {
    for (int64_t left = 0; left < a.Q; left += a.sum_columns) {
      const int64_t bottom = std::min(a.P, top + a.sum_rows), right = std::min(a.Q, left + a.sum_columns);
      Floats sums[kRows][kS];
#pragma GCC unroll 32
      for (int i = 0; i < kRows * kS; ++i) sums[i / kS][i % kS] = Floats{};
      for (int64_t p = top; p < bottom; ++p) {
        const float* grads = a.grads + (p * a.Q + left) * kLane;
        const float* x = a.image + kFirst * a.row + p * a.row_step + left * a.column_step;
        for (int64_t q = left; q < right; ++q, x += a.column_step, grads += kLane) {
          const Floats g = load(grads);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
            for (int s = 0; s < kS; ++s) sums[r][s] += load(x + r * a.row + s * kLane) * g;
          }
        }
      }
#pragma GCC unroll 32
      for (int i = 0; i < kRows * kS; ++i) store(total + i * kLane, load(total + i * kLane) + sums[i / kS][i % kS]);
    }
  }
  if constexpr (kFirst + kRows < kR) add_rows<kR, kS, kFirst + kRows>(a);
}

template <int kR, int kS>
void add_products(const ProductsArgs& a) {
  add_rows<kR, kS>(a);
}

using AddProducts = void (*)(const ProductsArgs&);

inline AddProducts add_products_for(int64_t R, int64_t S) {
  switch (S) {
    case 3: return R == 1 ? add_products<1, 3> : add_products<3, 3>;
    case 4: return add_products<1, 4>;
    case 5: return R == 1 ? add_products<1, 5> : add_products<5, 5>;
    default: return R == 1 ? add_products<1, 7> : add_products<7, 7>;
  }
}

SEPCONV_INLINE void add_and_clear(float* total, float* part, int64_t count) {
  for (int64_t i = 0; i < count; i += kLane) {
    store(total + i, load(total + i) + load(part + i));
    store(part + i, Floats{});
  }
}

// How the work is cut, by the shape alone.
struct Cut {
  static constexpr int64_t kTiles = 192 << 10;  // bytes
  static constexpr int64_t kUnits = 32;         // aimed at

  int64_t columns_after, rows, strips, vectors, parts;

  explicit Cut(const ConvShape& k) {
    columns_after = std::max<int64_t>(0, (k.Q - 1) * k.stride_w + k.S - k.pad_w - k.W);
    const int64_t a_row = (k.stride_h * (k.pad_w + k.W + columns_after) + k.Q) * kVectorBytes;
    strips = ceil_div(k.P, std::max<int64_t>(1, kTiles / a_row));
    rows = ceil_div(k.P, strips);
    strips = ceil_div(k.P, rows);
    vectors = ceil_div(k.C, kLane);
    parts = std::clamp<int64_t>(kUnits / vectors, 1, k.N * strips);
  }
};

// One strip of one image, of one vector of channels.
template <typename T>
struct Strip {
  int lanes;
  int64_t rows;           // of grad_y
  int64_t before, after;  // rows of the tile of x before and after the image
  int64_t h, count;       // the image's rows between them
  const T *x, *grad_y;

  Strip(const ConvShape& k, const Cut& cut, int64_t c, int64_t n, int64_t strip, const T* images, const T* grads) {
    const int64_t p = strip * cut.rows;
    lanes = static_cast<int>(std::min<int64_t>(kLane, k.C - c));
    rows = std::min(cut.rows, k.P - p);
    const int64_t begin = p * k.stride_h - k.pad_h, end = begin + (rows - 1) * k.stride_h + k.R;
    h = std::clamp<int64_t>(begin, 0, k.H);
    count = std::clamp<int64_t>(end, h, k.H) - h;
    before = std::max<int64_t>(0, std::min(h, end) - begin), after = end - begin - before - count;
    x = images + n * k.x.n + c * k.x.c + h * k.x.h;
    grad_y = grads + n * k.y.n + c * k.y.c + p * k.y.h;
  }
};

template <typename T>
struct BlockedGradWeight {
  const ConvShape& s;
  const T *grad_y, *x;
  T* grad_w;
  Cut cut;
  BlockedTile tile, grad_tile;
  int64_t units, tasks;
  std::unique_ptr<float[]> sums;  // [vector, part, R, S, lane]

  BlockedGradWeight(const ConvShape& k, const T* grads, const T* images, T* result)
      : s(k),
        grad_y(grads),
        x(images),
        grad_w(result),
        cut(k),
        tile((cut.rows - 1) * k.stride_h + k.R, k.W, k.pad_w, cut.columns_after),
        grad_tile(cut.rows, k.Q, 0, 0),
        units(cut.vectors * cut.parts),
        tasks(blocked_tasks(k, units)),
        sums(new float[units * k.R * k.S * kLane]()) {}

  void operator()(int64_t task) const {
    const int64_t count = s.R * s.S * kLane;
    const Scratch memory((tile.size() + grad_tile.size()) * kLane + count);
    float* const image = memory.data();
    float* const grads = image + tile.size() * kLane;
    float* const strip_sums = grads + grad_tile.size() * kLane;
    const AddProducts add_products = add_products_for(s.R, s.S);
    ProductsArgs a;
    a.image = image, a.grads = grads, a.sums = strip_sums, a.Q = s.Q;
    a.sum_columns = ceil_div(s.Q, ceil_div(s.Q, 2 * kShortSum)), a.sum_rows = std::max<int64_t>(1, kShortSum / s.Q);
    a.row = tile.columns * kLane, a.row_step = s.stride_h * a.row, a.column_step = s.stride_w * kLane;
    for (int64_t unit = units * task / tasks, end = units * (task + 1) / tasks; unit < end; ++unit) {
      const int64_t c = unit / cut.parts * kLane, part = unit % cut.parts;
      const int64_t all = s.N * cut.strips, first = all * part / cut.parts, last = all * (part + 1) / cut.parts;
      float* const unit_sums = sums.get() + unit * count;
      for (int64_t i = first; i < last; ++i) {
        const Strip<T> strip = strip_at(c, i);
        a.P = strip.rows;
        if (cut.strips > 1) {  // else they are zero from the start
          std::fill_n(image, strip.before * a.row, 0.0f);
          std::fill_n(image + (strip.before + strip.count) * a.row, strip.after * a.row, 0.0f);
        }
        turn_planes_in(image + strip.before * a.row, strip.x, s.x.c, strip.lanes, tile.places.data(), x_runs(strip));
        turn_planes_in(grads, strip.grad_y, s.y.c, strip.lanes, grad_tile.places.data(), grad_runs(strip));
        if (i + 1 < last) {
          const Strip<T> next = strip_at(c, i + 1);
          fetch_planes(next.x, s.x.c, next.lanes, x_runs(next));
          fetch_planes(next.grad_y, s.y.c, next.lanes, grad_runs(next));
        }
        add_products(a);
        add_and_clear(unit_sums, strip_sums, count);
      }
      if (cut.parts == 1) store_sums(unit);
    }
  }

  // Adds the parts up, and stores the sums of the channels in vector v.
  void store_sums(int64_t v) const {
    const int64_t taps = s.R * s.S, count = taps * kLane;
    float* const total = sums.get() + v * cut.parts * count;
    for (int64_t part = 1; part < cut.parts; ++part) add_and_clear(total, total + part * count, count);
    const int lanes = static_cast<int>(std::min<int64_t>(kLane, s.C - v * kLane));
    T* const to = grad_w + v * kLane * s.w.n;
    if (s.w.w == 1 && s.w.h == s.S) return turn_out(to, s.w.n, lanes, total, taps);
    for (int i = 0; i < lanes; ++i) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        store_one(to + i * s.w.n + tap / s.S * s.w.h + tap % s.S * s.w.w, total[tap * kLane + i]);
      }
    }
  }

 private:
  PlaneRuns x_runs(const Strip<T>& strip) const { return {strip.count, s.W, s.x.h}; }
  PlaneRuns grad_runs(const Strip<T>& strip) const { return {strip.rows, s.Q, s.y.h}; }
  Strip<T> strip_at(int64_t c, int64_t i) const {
    return Strip<T>(s, cut, c, i / cut.strips, i % cut.strips, x, grad_y);
  }
};

inline void grad_weight(const ConvShape& s, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      const BlockedGradWeight<T> kernel(s, static_cast<const T*>(grad_y), static_cast<const T*>(x),
                                        static_cast<T*>(grad_w));
      parallel(kernel.tasks, kernel);
      for (int64_t v = 0; kernel.cut.parts > 1 && v < kernel.cut.vectors; ++v) kernel.store_sums(v);
    }
  });
}
#endif
