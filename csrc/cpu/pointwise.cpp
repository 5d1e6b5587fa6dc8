// Pointwise convolution of images of one pixel (the squeeze-and-excite layers): a small matrix product, where the call of a
// matrix library costs more than the arithmetic.
//
// Loop-to-data map. A pixel is one image of the batch, x is [N, C] and w is [K, C], both dense along C, where vectors lie.
// A task is a range of output channels (of input channels for grad_input). Inside it a block of sums stays in registers:
//   forward       4 pixels x 4 output channels, summed along vectors of C, lanes added up at the end;
//                 where C is short, the weight is turned to [C, K] first and vectors lie along K
//   grad_input    4 pixels x 2 vectors of C, summed over K
//   grad_weight   4 output channels x 2 vectors of C, summed over N
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "pointwise.cpp"
#include "foreach_isa.h"

namespace sepconv::cpu {

void pointwise_forward(const ConvShape& shape, DType dtype, const void* x, const void* w, const Epilogue& epilogue,
                       void* y) {
  SEPCONV_BEST_ISA(forward)(shape, dtype, x, w, epilogue, y);
}

void pointwise_grad_input(const ConvShape& shape, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  SEPCONV_BEST_ISA(grad_input)(shape, dtype, grad_y, w, grad_x);
}

void pointwise_grad_weight(const ConvShape& shape, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  SEPCONV_BEST_ISA(grad_weight)(shape, dtype, grad_y, x, grad_w);
}

}  // namespace sepconv::cpu
#else

inline constexpr int64_t kTaskProducts = 128 * 1024;  // multiply-adds that are worth waking a thread for

// How many of `items` make a task, when all of them together are `products` multiply-adds. A multiple of `step`.
inline int64_t items_per_task(int64_t items, int64_t products, int64_t step) {
  const int64_t tasks = std::max<int64_t>(1, products / kTaskProducts);
  return (items + tasks * step - 1) / (tasks * step) * step;
}

// Runs body(begin, end) over [0, items) in tasks of `grain` items.
template <typename Body>
inline void for_ranges(int64_t items, int64_t grain, const Body& body) {
  parallel((items + grain - 1) / grain,
           [&](int64_t task) { body(task * grain, std::min(items, (task + 1) * grain)); });
}

// ---- forward ----

template <typename T>
struct Forward {
  using A = accumulate_t<T>;
  const T *x, *w, *bias;
  T* y;
  int64_t N, C, x_pixel, w_row, y_pixel;
  Activation activation;

  // Outputs [k, k + kK) of pixels [n, n + kN).
  template <int kN, int kK>
  void block(int64_t n, int64_t k) const {
    const T *xs = x + n * x_pixel, *ws = w + k * w_row;
    Vector<A> sums[kN][kK] = {};
    int64_t c = 0;
    for (; c + kLanes<A> <= C; c += kLanes<A>) {
      Vector<A> rows[kK];
      for (int j = 0; j < kK; ++j) rows[j] = load(ws + j * w_row + c);
      for (int i = 0; i < kN; ++i) {
        const Vector<A> pixel = load(xs + i * x_pixel + c);
        for (int j = 0; j < kK; ++j) sums[i][j] += pixel * rows[j];
      }
    }
    if (c < C) {
      const int rest = static_cast<int>(C - c);
      Vector<A> rows[kK];
      for (int j = 0; j < kK; ++j) rows[j] = load_first(ws + j * w_row + c, rest);
      for (int i = 0; i < kN; ++i) {
        const Vector<A> pixel = load_first(xs + i * x_pixel + c, rest);
        for (int j = 0; j < kK; ++j) sums[i][j] += pixel * rows[j];
      }
    }
    for (int i = 0; i < kN; ++i) {
      for (int j = 0; j < kK; ++j) {
        const A sum = sum_lanes<A>(sums[i][j]) + (bias ? load_one(bias + k + j) : A(0));
        store_one(y + (n + i) * y_pixel + k + j, activate(activation, sum));
      }
    }
  }

  template <int kK>
  void outputs(int64_t k) const {
    int64_t n = 0;
    for (; n + 4 <= N; n += 4) block<4, kK>(n, k);
    for (; n < N; ++n) block<1, kK>(n, k);
  }

  void operator()(int64_t begin, int64_t end) const {
    int64_t k = begin;
    for (; k + 4 <= end; k += 4) outputs<4>(k);
    for (; k < end; ++k) outputs<1>(k);
  }
};

// ---- gradients, and forward over few channels ----

// out[i, c] = activation(bias[c] + sum over t of scale(i, t) * rows[t, c]), for vectors of c.
template <typename T>
struct WeightedRows {
  using A = accumulate_t<T>;
  const T *scale, *rows;
  T* out;
  int64_t outs, terms, C;
  int64_t scale_out, scale_term, row, out_row;  // strides in elements
  const T* bias = nullptr;
  Activation activation = Activation::identity;

  // Rows [i, i + kI) of out, kVectors vectors from c on, the last of which holds `rest` numbers.
  template <int kI, int kVectors>
  void block(int64_t i, int64_t c, int rest) const {
    Vector<A> sums[kI][kVectors] = {};
    for (int64_t t = 0; t < terms; ++t) {
      Vector<A> values[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const T* p = rows + t * row + c + v * kLanes<A>;
        values[v] = v + 1 < kVectors || rest == kLanes<A> ? load(p) : load_first(p, rest);
      }
      for (int j = 0; j < kI; ++j) {
        const Vector<A> factor = broadcast<A>(load_one(scale + (i + j) * scale_out + t * scale_term));
        for (int v = 0; v < kVectors; ++v) sums[j][v] += factor * values[v];
      }
    }
    for (int j = 0; j < kI; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = c + v * kLanes<A>;
        const int count = v + 1 < kVectors ? kLanes<A> : rest;
        const Vector<A> offset = bias ? load_first(bias + column, count) : Vector<A>{};
        const Vector<A> value = activate_lanes<A>(activation, sums[j][v] + offset);
        T* p = out + (i + j) * out_row + column;
        if (count == kLanes<A>) {
          store(p, value);
        } else {
          store_first(p, value, count);
        }
      }
    }
  }

  template <int kI>
  void columns(int64_t i, int64_t begin, int64_t end) const {
    int64_t c = begin;
    for (; c + 2 * kLanes<A> <= end; c += 2 * kLanes<A>) block<kI, 2>(i, c, kLanes<A>);
    for (; c < end; c += kLanes<A>) block<kI, 1>(i, c, static_cast<int>(std::min<int64_t>(kLanes<A>, end - c)));
  }

  void tile(int64_t i_begin, int64_t i_end, int64_t c_begin, int64_t c_end) const {
    int64_t i = i_begin;
    for (; i + 4 <= i_end; i += 4) columns<4>(i, c_begin, c_end);
    for (; i < i_end; ++i) columns<1>(i, c_begin, c_end);
  }
};

template <typename T>
void forward_few_channels(const ConvShape& s, const void* x, const void* w, const Epilogue& epilogue, void* y) {
  const std::unique_ptr<T[]> turned(new T[s.C * s.K]);  // [C, K]
  for (int64_t k = 0; k < s.K; ++k) {
    for (int64_t c = 0; c < s.C; ++c) turned[c * s.K + k] = static_cast<const T*>(w)[k * s.w.n + c];
  }
  const WeightedRows<T> body{static_cast<const T*>(x), turned.get(), static_cast<T*>(y), s.N, s.C, s.K, s.x.n, 1, s.K,
                             s.y.n, static_cast<const T*>(epilogue.bias), epilogue.activation};
  for_ranges(s.K, items_per_task(s.K, s.N * s.C * s.K, 2 * kLanes<accumulate_t<T>>),
             [&](int64_t begin, int64_t end) { body.tile(0, s.N, begin, end); });
}

inline void forward(const ConvShape& s, DType dtype, const void* x, const void* w, const Epilogue& epilogue, void* y) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (s.C < 2 * kLanes<accumulate_t<T>>) return forward_few_channels<T>(s, x, w, epilogue, y);
    const Forward<T> body{static_cast<const T*>(x), static_cast<const T*>(w), static_cast<const T*>(epilogue.bias),
                          static_cast<T*>(y), s.N, s.C, s.x.n, s.w.n, s.y.n, epilogue.activation};
    for_ranges(s.K, items_per_task(s.K, s.N * s.C * s.K, 4), body);
  });
}

inline void grad_input(const ConvShape& s, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const WeightedRows<T> body{static_cast<const T*>(grad_y), static_cast<const T*>(w), static_cast<T*>(grad_x),
                               s.N, s.K, s.C, s.y.n, 1, s.w.n, s.x.n};
    for_ranges(s.C, items_per_task(s.C, s.N * s.C * s.K, 2 * kLanes<accumulate_t<T>>),
               [&](int64_t begin, int64_t end) { body.tile(0, s.N, begin, end); });
  });
}

inline void grad_weight(const ConvShape& s, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const WeightedRows<T> body{static_cast<const T*>(grad_y), static_cast<const T*>(x), static_cast<T*>(grad_w),
                               s.K, s.N, s.C, 1, s.y.n, s.x.n, s.w.n};
    for_ranges(s.K, items_per_task(s.K, s.N * s.C * s.K, 4),
               [&](int64_t begin, int64_t end) { body.tile(begin, end, 0, s.C); });
  });
}

#endif
