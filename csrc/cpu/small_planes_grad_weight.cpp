// Depthwise convolution (multiplier 1) of small dense planes: gradient by the weight.
//
// Loop-to-data map. A task is a range of channels c, each with all its images n. Planes of x and grad_y are copied to scratch
// memory as in small_planes.cpp, zero behind every row. `add_columns` holds the sums of some kernel columns, a vector for each
// tap, in registers while a whole plane goes by in blocks of 7, 5 or 1 rows of grad_y x 1 vector; an input vector is taken
// once for all kernel rows. The lanes of a sum are added once a channel: one order, whatever the number of threads.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "small_planes_grad_weight.cpp"
#include "small_planes.h"

#include "foreach_isa.h"

namespace sepconv::cpu {

void small_planes_grad_weight(const ConvShape& s, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  if (s.weight_elements() == 0) return;
  SEPCONV_BEST_ISA(small_grad_weight)(s, dtype, grad_y, x, grad_w);
}

}  // namespace sepconv::cpu
#else

#include "planes_simd.h"

#include "small_planes_simd.h"

struct ProductsArgs {
  const float *x, *grad;
  int64_t pitch, row_step, row_phase, grad_pitch;
  int64_t columns;
  int64_t sevens, fives, ones;  // blocks of that many rows
  float* sums;                  // [kS, kR, lane]
};

template <int kR, int kStride, int kFirst, int kColumns, int kCount>
SEPCONV_INLINE void add_rows(Floats (&sums)[kColumns][kR], const float*& x, const float*& grad, const ProductsArgs& a) {
  Floats g[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i, grad += a.grad_pitch) g[i] = load_once(grad);
#pragma GCC unroll 8
  for (int s = 0; s < kColumns; ++s) {
#pragma GCC unroll 2
    for (int f = 0; f < kStride; ++f) {
      constexpr int kMost = (kR + kStride - 1) / kStride;
      const int taps = (kR - f + kStride - 1) / kStride;
      const float* in = x + (kFirst + s) % kStride * a.pitch + (kFirst + s) / kStride + f * a.row_phase;
#pragma GCC unroll 16
      for (int i = 0; i < kCount + kMost - 1; ++i) {
        if (i >= kCount + taps - 1) continue;
        const Floats v = load_once(in);
        in += a.row_step;
#pragma GCC unroll 8
        for (int t = 0; t < kMost; ++t) {
          if (t < taps && i >= t && i - t < kCount) sums[s][t * kStride + f] += v * g[i - t];
        }
      }
    }
  }
  x += kCount * a.row_step;
}

// One plane, for the kernel columns from kFirst on, as many at a time as registers hold.
template <int kR, int kStride, int kFirst = 0>
SEPCONV_INLINE void add_columns(const ProductsArgs& a) {
  constexpr int kFit = SEPCONV_ISA_LEVEL == 2 ? (kR == 7 ? 2 : 3) : 1;
  constexpr int kColumns = std::min(kFit, kR - kFirst);
  Floats sums[kColumns][kR];
  float* const table = a.sums + kFirst * kR * kLane;
#pragma GCC unroll 32
  for (int i = 0; i < kColumns * kR; ++i) sums[i / kR][i % kR] = load(table + i * kLane);
  for (int64_t q = 0; q < a.columns; q += kLane) {
    const float *x = a.x + q, *grad = a.grad + q;
    for (int64_t i = 0; i < a.sevens; ++i) add_rows<kR, kStride, kFirst, kColumns, 7>(sums, x, grad, a);
    for (int64_t i = 0; i < a.fives; ++i) add_rows<kR, kStride, kFirst, kColumns, 5>(sums, x, grad, a);
    for (int64_t i = 0; i < a.ones; ++i) add_rows<kR, kStride, kFirst, kColumns, 1>(sums, x, grad, a);
  }
#pragma GCC unroll 32
  for (int i = 0; i < kColumns * kR; ++i) store(table + i * kLane, sums[i / kR][i % kR]);
  if constexpr (kFirst + kColumns < kR) add_columns<kR, kStride, kFirst + kColumns>(a);
}

template <int kR, int kStride>
void add_products(const ProductsArgs& a) {
  add_columns<kR, kStride>(a);
}

using AddProducts = void (*)(const ProductsArgs&);

inline AddProducts add_products_for(int64_t taps, int64_t stride) {
  switch (stride * 10 + taps) {
    case 13: return add_products<3, 1>;
    case 15: return add_products<5, 1>;
    case 17: return add_products<7, 1>;
    case 23: return add_products<3, 2>;
    case 25: return add_products<5, 2>;
    default: return add_products<7, 2>;
  }
}

template <typename T>
struct SmallGradWeight {
  const ConvShape& s;
  const T *grad_y, *x;
  T* grad_w;
  Frame frame, grad_frame;
  int64_t tasks, batch;
  ProductsArgs args;
  AddProducts add;

  SmallGradWeight(const ConvShape& shape, const T* grads, const T* images, T* result)
      : s(shape),
        grad_y(grads),
        x(images),
        grad_w(result),
        frame(s.H, s.W, s.stride_h, s.pad_h, s.pad_w, ceil_div(s.R, s.stride_h), ceil_div(s.S, s.stride_w), s.P, s.Q,
              kLane),
        grad_frame(s.P, s.Q, 1, 0, 0, 1, 1, s.P, s.Q, kLane),
        tasks(small_planes_tasks(s, s.C)),
        batch(std::clamp<int64_t>(kScratch / ((frame.size + grad_frame.size) * static_cast<int64_t>(sizeof(float))), 1,
                                  std::min(kMaxBatch, s.N))),
        args{},
        add(add_products_for(s.R, s.stride_h)) {
    args.pitch = frame.pitch, args.row_step = frame.row_step, args.row_phase = frame.row_phase;
    args.grad_pitch = grad_frame.pitch;
    args.columns = s.Q;
    // As many rows as can be in blocks of 7 and 5: then, as many in blocks of 7 as can be.
    args.ones = s.P;
    for (int64_t fives = 0; fives * 5 <= s.P; ++fives) {
      const int64_t ones = (s.P - fives * 5) % 7;
      if (ones < args.ones) args.ones = ones, args.fives = fives;
    }
    args.sevens = (s.P - args.fives * 5 - args.ones) / 7;
  }

  void operator()(int64_t task) const {
    const int64_t x_size = frame.scratch(batch, kLane), grad_size = grad_frame.scratch(batch, kLane);
    const Scratch memory(x_size + grad_size + s.R * s.S * kLane);
    float* const scratch = memory.data() + frame.shift;
    float* const grads = memory.data() + x_size;
    ProductsArgs a = args;
    a.sums = grads + grad_size;
    for (int64_t c = s.C * task / tasks; c < s.C * (task + 1) / tasks; ++c) {
      std::fill_n(a.sums, s.R * s.S * kLane, 0.0f);
      for (int64_t n = 0; n < s.N; n += batch) {
        const int64_t count = std::min(batch, s.N - n);
        for (int64_t i = 0; i < count; ++i) {
          copy_in(scratch + i * frame.size, x + (n + i) * s.x.n + c * s.x.c, frame);
          copy_in(grads + i * grad_frame.size, grad_y + (n + i) * s.y.n + c * s.y.c, grad_frame);
        }
        for (int64_t i = 0; i < count; ++i) {
          a.x = scratch + i * frame.size;
          a.grad = grads + i * grad_frame.size;
          add(a);
        }
      }
      for (int64_t i = 0; i < s.R * s.S; ++i) {
        store_one(grad_w + c * s.w.n + i % s.R * s.w.h + i / s.R * s.w.w, sum_lanes<float>(load(a.sums + i * kLane)));
      }
    }
  }
};

inline void small_grad_weight(const ConvShape& s, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      const SmallGradWeight<T> planes(s, static_cast<const T*>(grad_y), static_cast<const T*>(x),
                                      static_cast<T*>(grad_w));
      parallel(planes.tasks, planes);
    }
  });
}
#endif
