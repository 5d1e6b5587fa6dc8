// Pointwise convolution of few pixels (the squeeze-and-excite layers, and tiny images): a matrix product so small that
// the call of a matrix library costs more than the arithmetic.
//
// Loop-to-data map. Each map is one of two products over dense rows, in both layouts; a block of sums stays in
// registers:
//   DotRows       out[i, j] = sum over t of a[i, t] * b[j, t]          4 x 4 outputs, vectors along t, lanes added up
//   last WeightedRows  out[i, v] = sum over t of scale[i, t] * rows[t, v]   4 x 2 vectors of outputs
// where
//   channels_last (one row a pixel)     forward DotRows, over few channels WeightedRows of the turned weight;
//                                       grad_input, grad_weight WeightedRows
//   NCHW (one row a plane)              forward, grad_input WeightedRows, image by image; grad_weight DotRows
// A task is a range of output rows or columns.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/pointwise/pointwise.cpp"
#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

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

#include "cpu/simd/activate_simd.h"

// `count` numbers at p, zero in the other lanes; a whole vector where it can be.
template <typename T>
SEPCONV_INLINE Vector<accumulate_t<T>> load_up_to(const T* p, int count) {
  return count == kLanes<accumulate_t<T>> ? load(p) : load_first(p, count);
}

inline constexpr int64_t kTaskProducts = 128 * 1024;  // multiply-adds that are worth waking a thread for

// How many of `items` make a task, when all of them together are `products` multiply-adds. A multiple of `step`.
inline int64_t items_per_task(int64_t items, int64_t products, int64_t step) {
  const int64_t tasks = std::max<int64_t>(1, products / kTaskProducts);
  return (items + tasks * step - 1) / (tasks * step) * step;
}

// Runs body(begin, end) over [0, items) in tasks of `grain` items.
template <typename Body>
inline void for_ranges(int64_t items, int64_t grain, const Body& body) {
  parallel((items + grain - 1) / grain, [&](int64_t task) { body(task * grain, std::min(items, (task + 1) * grain)); });
}

// out[i * out_i + j] = activation(bias[j] + sum over batches and t of a[i, t] * b[j, t]).
template <typename T>
struct DotRows {
  using A = accumulate_t<T>;
  const T *a, *b, *bias;
  T* out;
  int64_t rows_a, terms, a_row, b_row, out_i;  // strides in elements
  int64_t batches = 1, a_batch = 0, b_batch = 0;
  Activation activation = Activation::identity;

  template <int kI, int kJ>
  SEPCONV_INLINE void add(Vector<A> (&sums)[kI][kJ], const T* as, const T* bs, int count) const {
    Vector<A> columns[kJ];
    for (int j = 0; j < kJ; ++j) columns[j] = load_up_to(bs + j * b_row, count);
    for (int i = 0; i < kI; ++i) {
      const Vector<A> row = load_up_to(as + i * a_row, count);
      for (int j = 0; j < kJ; ++j) sums[i][j] += row * columns[j];
    }
  }

  // Outputs [i, i + kI) x [j, j + kJ).
  template <int kI, int kJ>
  void block(int64_t i, int64_t j) const {
    Vector<A> sums[kI][kJ] = {};
    for (int64_t batch = 0; batch < batches; ++batch) {
      const T *as = a + batch * a_batch + i * a_row, *bs = b + batch * b_batch + j * b_row;
      int64_t t = 0;
      for (; t + kLanes<A> <= terms; t += kLanes<A>) add(sums, as + t, bs + t, kLanes<A>);
      if (t < terms) add(sums, as + t, bs + t, static_cast<int>(terms - t));
    }
    for (int di = 0; di < kI; ++di) {
      for (int dj = 0; dj < kJ; ++dj) {
        const A sum = sum_lanes<A>(sums[di][dj]) + (bias ? load_one(bias + j + dj) : A(0));
        store_one(out + (i + di) * out_i + j + dj, activate(activation, sum));
      }
    }
  }

  template <int kJ>
  void columns(int64_t j) const {
    int64_t i = 0;
    for (; i + 4 <= rows_a; i += 4) block<4, kJ>(i, j);
    for (; i < rows_a; ++i) block<1, kJ>(i, j);
  }

  // Columns [begin, end) of out.
  void operator()(int64_t begin, int64_t end) const {
    int64_t j = begin;
    for (; j + 4 <= end; j += 4) columns<4>(j);
    for (; j < end; ++j) columns<1>(j);
  }
};

// out[i, v] = activation(bias + sum over t of scale(i, t) * rows[t, v]), the bias by column v or by row i.
template <typename T>
struct WeightedRows {
  using A = accumulate_t<T>;
  const T *scale, *rows;
  T* out;
  int64_t outs, terms, columns;
  int64_t scale_out, scale_term, row, out_row;  // strides in elements
  const T* bias = nullptr;
  bool bias_by_row = false;
  Activation activation = Activation::identity;

  // Rows [i, i + kI) of out, kVectors vectors from v on, the last of which holds `rest` numbers.
  template <int kI, int kVectors>
  void block(int64_t i, int64_t v, int rest) const {
    Vector<A> sums[kI][kVectors] = {};
    for (int64_t t = 0; t < terms; ++t) {
      Vector<A> values[kVectors];
      for (int u = 0; u < kVectors; ++u) {
        values[u] = load_up_to(rows + t * row + v + u * kLanes<A>, u + 1 < kVectors ? kLanes<A> : rest);
      }
      for (int j = 0; j < kI; ++j) {
        const Vector<A> factor = broadcast<A>(load_one(scale + (i + j) * scale_out + t * scale_term));
        for (int u = 0; u < kVectors; ++u) sums[j][u] += factor * values[u];
      }
    }
    for (int j = 0; j < kI; ++j) {
      for (int u = 0; u < kVectors; ++u) {
        const int64_t column = v + u * kLanes<A>;
        const int count = u + 1 < kVectors ? kLanes<A> : rest;
        Vector<A> value = sums[j][u];
        if (bias) value += bias_by_row ? broadcast<A>(load_one(bias + i + j)) : load_up_to(bias + column, count);
        value = activate_lanes<A>(activation, value);
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
  void block_row(int64_t i, int64_t begin, int64_t end) const {
    int64_t v = begin;
    for (; v + 2 * kLanes<A> <= end; v += 2 * kLanes<A>) block<kI, 2>(i, v, kLanes<A>);
    for (; v < end; v += kLanes<A>) block<kI, 1>(i, v, static_cast<int>(std::min<int64_t>(kLanes<A>, end - v)));
  }

  void tile(int64_t i_begin, int64_t i_end, int64_t v_begin, int64_t v_end) const {
    int64_t i = i_begin;
    for (; i + 4 <= i_end; i += 4) block_row<4>(i, v_begin, v_end);
    for (; i < i_end; ++i) block_row<1>(i, v_begin, v_end);
  }

  void in_row_tasks() const {
    for_ranges(outs, items_per_task(outs, outs * terms * columns, 4),
               [&](int64_t begin, int64_t end) { tile(begin, end, 0, columns); });
  }
  void in_column_tasks() const {
    for_ranges(columns, items_per_task(columns, outs * terms * columns, 2 * kLanes<A>),
               [&](int64_t begin, int64_t end) { tile(0, outs, begin, end); });
  }
};

// One row a plane (NCHW) or one row a pixel (channels_last, and every image of one pixel)?
inline bool rows_are_planes(const ConvShape& s) {
  return s.H * s.W > 1 && input_layout(s) == Layout::nchw && output_layout(s) == Layout::nchw;
}

// The rows of a channels_last batch: as many as there are pixels, so far apart.
inline int64_t pixels(const ConvShape& s) { return s.N * s.H * s.W; }
inline int64_t x_pixel(const ConvShape& s) { return s.H * s.W == 1 ? s.x.n : s.C; }
inline int64_t y_pixel(const ConvShape& s) { return s.H * s.W == 1 ? s.y.n : s.K; }

template <typename T>
void forward_few_channels(const ConvShape& s, const T* x, const T* w, const Epilogue& epilogue, T* y) {
  const std::unique_ptr<T[]> turned(new T[s.C * s.K]);  // [C, K]
  for (int64_t k = 0; k < s.K; ++k) {
    for (int64_t c = 0; c < s.C; ++c) turned[c * s.K + k] = w[k * s.w.n + c];
  }
  const WeightedRows<T> product{x,
                                turned.get(),
                                y,
                                pixels(s),
                                s.C,
                                s.K,
                                x_pixel(s),
                                1,
                                s.K,
                                y_pixel(s),
                                static_cast<const T*>(epilogue.bias),
                                false,
                                epilogue.activation};
  product.in_column_tasks();
}

template <typename T>
void forward_typed(const ConvShape& s, const T* x, const T* w, const Epilogue& epilogue, T* y) {
  const T* bias = static_cast<const T*>(epilogue.bias);
  if (rows_are_planes(s)) {
    const int64_t HW = s.H * s.W;
    for (int64_t n = 0; n < s.N; ++n) {
      const WeightedRows<T> product{w,    x + n * s.C * HW,   y + n * s.K * HW, s.K, s.C, HW, s.w.n, 1, HW, HW, bias,
                                    true, epilogue.activation};
      product.in_row_tasks();
    }
  } else if (s.C < 2 * kLanes<accumulate_t<T>>) {
    forward_few_channels(s, x, w, epilogue, y);
  } else {
    const DotRows<T> product{x,          w, bias, y, pixels(s),          s.C, x_pixel(s), s.w.n,
                             y_pixel(s), 1, 0,    0, epilogue.activation};
    for_ranges(s.K, items_per_task(s.K, pixels(s) * s.C * s.K, 4), product);
  }
}

template <typename T>
void grad_input_typed(const ConvShape& s, const T* grad_y, const T* w, T* grad_x) {
  if (rows_are_planes(s)) {
    const int64_t HW = s.H * s.W;
    for (int64_t n = 0; n < s.N; ++n) {
      WeightedRows<T>{w, grad_y + n * s.K * HW, grad_x + n * s.C * HW, s.C, s.K, HW, 1, s.w.n, HW, HW}.in_row_tasks();
    }
  } else {
    WeightedRows<T>{grad_y, w, grad_x, pixels(s), s.K, s.C, y_pixel(s), 1, s.w.n, x_pixel(s)}.in_column_tasks();
  }
}

template <typename T>
void grad_weight_typed(const ConvShape& s, const T* grad_y, const T* x, T* grad_w) {
  if (rows_are_planes(s)) {
    const int64_t HW = s.H * s.W;
    const DotRows<T> product{grad_y, x, nullptr, grad_w, s.K, HW, HW, HW, s.w.n, s.N, s.K * HW, s.C * HW};
    for_ranges(s.C, items_per_task(s.C, pixels(s) * s.C * s.K, 4), product);
  } else {
    WeightedRows<T>{grad_y, x, grad_w, s.K, pixels(s), s.C, 1, y_pixel(s), x_pixel(s), s.w.n}.in_row_tasks();
  }
}

inline void forward(const ConvShape& s, DType dtype, const void* x, const void* w, const Epilogue& epilogue, void* y) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    forward_typed(s, static_cast<const T*>(x), static_cast<const T*>(w), epilogue, static_cast<T*>(y));
  });
}

inline void grad_input(const ConvShape& s, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    grad_input_typed(s, static_cast<const T*>(grad_y), static_cast<const T*>(w), static_cast<T*>(grad_x));
  });
}

inline void grad_weight(const ConvShape& s, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    grad_weight_typed(s, static_cast<const T*>(grad_y), static_cast<const T*>(x), static_cast<T*>(grad_w));
  });
}

#endif
