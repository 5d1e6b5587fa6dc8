// What a padding mode other than zeros adds to the gradient by the weight: the products in the padding, to what a
// kernel for zero padding has summed. float32 and float64 only, which are summed in their own type.
//
// Loop-to-data map. Where channels are dense (depthwise, channels_last), a task is one tap and one vector of channels.
// Else a task is one filter plane, tap by tap; a vector holds neighbouring columns where both images have them dense.
// An image's products are summed first, then the images, in a fixed order.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/borders/borders_grad_weight.cpp"
#include "cpu/borders/borders.h"

#include "cpu/kernels.h"

namespace sepconv::cpu {

// The products of one tap in the padding.
struct PaddingTap {
  int64_t r, s;
  std::vector<ProductRun> runs;
};

}  // namespace sepconv::cpu

#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void borders_grad_weight(const ConvShape& s, PaddingMode mode, DType dtype, const void* grad_y, const void* x,
                         void* grad_w) {
  const PaddedAxes axes(s, mode);
  std::vector<PaddingTap> taps;
  for (int64_t r = 0; r < s.R; ++r) {
    for (int64_t t = 0; t < s.S; ++t) {
      PaddingTap tap{r, t, padding_products(axes, r, t, s.x, s.y)};
      if (!tap.runs.empty()) taps.push_back(std::move(tap));
    }
  }
  SEPCONV_BEST_ISA(add_padding_products)(s, taps, dtype, grad_y, x, grad_w);
}

}  // namespace sepconv::cpu
#else

// One tap of one vector of channels.
template <typename T>
struct ChannelProducts {
  const ConvShape& shape;
  const std::vector<PaddingTap>& taps;
  const T *grad_y, *x;
  T* grad_w;
  int64_t blocks;  // of channels
  void operator()(int64_t task) const {
    constexpr int kCount = kLanes<T>;
    const PaddingTap& tap = taps[task / blocks];
    const int64_t c = task % blocks * kCount;
    const int count = static_cast<int>(std::min<int64_t>(kCount, shape.C - c));
    Vector<T> total{};
    for (int64_t n = 0; n < shape.N; ++n) {
      Vector<T> sum{};
      for (const ProductRun& run : tap.runs) {
        const T *from_y = grad_y + n * shape.y.n + run.y + c, *from_x = x + n * shape.x.n + run.x + c;
        for (int64_t i = 0; i < run.count; ++i, from_y += run.y_step, from_x += run.x_step) {
          sum += load_first(from_y, count) * load_first(from_x, count);
        }
      }
      total += sum;
    }
    for (int i = 0; i < count; ++i) grad_w[(c + i) * shape.w.n + tap.r * shape.w.h + tap.s * shape.w.w] += total[i];
  }
};

// All taps of one filter plane.
template <typename T>
struct PlaneProducts {
  const ConvShape& shape;
  const std::vector<PaddingTap>& taps;
  const T *grad_y, *x;
  T* grad_w;
  void operator()(int64_t task) const {
    const int64_t ins = shape.channels_per_group(), k = task / ins, m = task % ins;
    const T* from_y = grad_y + k * shape.y.c;
    const T* from_x = x + (k / shape.outputs_per_group() * ins + m) * shape.x.c;
    T* filter = grad_w + k * shape.w.n + m * shape.w.c;
    for (const PaddingTap& tap : taps) {
      T total = 0;
      for (int64_t n = 0; n < shape.N; ++n) {
        T sum = 0;
        for (const ProductRun& run : tap.runs) {
          sum += products(run, from_y + n * shape.y.n + run.y, from_x + n * shape.x.n + run.x);
        }
        total += sum;
      }
      filter[tap.r * shape.w.h + tap.s * shape.w.w] += total;
    }
  }

 private:
  SEPCONV_INLINE T products(const ProductRun& run, const T* y, const T* x) const {
    T sum = 0;
    if (run.y_step == 1 && run.x_step == 1) {
      constexpr int kCount = kLanes<T>;
      Vector<T> sums{};
      int64_t i = 0;
      for (; i + kCount <= run.count; i += kCount) sums += load(y + i) * load(x + i);
      const int left = static_cast<int>(run.count - i);
      if (left > 0) sums += load_first(y + i, left) * load_first(x + i, left);
      return sum_lanes<T>(sums);
    }
    for (int64_t i = 0; i < run.count; ++i) sum += y[i * run.y_step] * x[i * run.x_step];
    return sum;
  }
};

template <typename T>
void add_padding_products_typed(const ConvShape& s, const std::vector<PaddingTap>& taps, const T* grad_y, const T* x,
                                T* grad_w) {
  if (s.is_depthwise() && s.K == s.C && s.C > 1 && s.x.c == 1 && s.y.c == 1) {
    const int64_t blocks = (s.C + kLanes<T> - 1) / kLanes<T>;
    parallel(static_cast<int64_t>(taps.size()) * blocks, ChannelProducts<T>{s, taps, grad_y, x, grad_w, blocks});
  } else {
    parallel(s.K * s.channels_per_group(), PlaneProducts<T>{s, taps, grad_y, x, grad_w});
  }
}

inline void add_padding_products(const ConvShape& s, const std::vector<PaddingTap>& taps, DType dtype,
                                 const void* grad_y, const void* x, void* grad_w) {
  if (dtype == DType::float64) {
    using T = double;
    add_padding_products_typed(s, taps, static_cast<const T*>(grad_y), static_cast<const T*>(x),
                               static_cast<T*>(grad_w));
  } else {
    using T = float;
    add_padding_products_typed(s, taps, static_cast<const T*>(grad_y), static_cast<const T*>(x),
                               static_cast<T*>(grad_w));
  }
}

#endif
