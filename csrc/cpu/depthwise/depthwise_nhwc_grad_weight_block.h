// The inner loops of depthwise_nhwc_grad_weight.cpp: what one tile of output pixels adds to the weight gradients of one
// channel vector. A fragment like simd.h, read once for each instruction set.
//
// block() loads an input row again for each kernel row that it meets. block_once() loads it a single time and keeps as
// many rows of grad_y in registers. block_generic() takes what neither can.

inline constexpr int kMaxTaps = 7;  // taps of a kernel row whose sums share registers
inline constexpr int kColumns = 7;  // output columns of a tile; divides the widths 7, 14, 28, 56, 112

// The last vector overlaps the one before it where C is no multiple of kLanes.
template <typename A>
int64_t first_channel(const ConvShape& k, int64_t v) {
  return std::max<int64_t>(std::min<int64_t>(v * kLanes<A>, k.C - kLanes<A>), 0);
}

// What one call of a block function sees: one channel vector, output rows [p0, p1), columns from q (`count` of them),
// kernel rows from r0 on and taps from s0 on, as many as the function is made for.
template <typename T>
struct NhwcGradWeightBlock {
  const T* x;             // the image, at the vector's first channel; rows and pixels apart as the shape's strides say
  const T* grad_y;        // likewise
  accumulate_t<T>* sums;  // [R, S, kLanes]
  int64_t p0 = 0, p1 = 0, q = 0, r0 = 0, s0 = 0;
  int count = 0;
  int64_t rows = 0;  // for the generic function: kernel rows from r0 on
  // From a pixel of x and of grad_y to the one to fetch meanwhile; 0: none. The calls for one tile share the rows.
  int64_t x_ahead = 0, grad_y_ahead = 0, call = 0, calls = 1;
};

// The vector's last number: where vectors straddle cache lines, the first one is in the line that is at hand.
template <typename T, int kCount>
SEPCONV_INLINE void fetch(const T* pixel, int64_t step) {
  pixel += kLanes<accumulate_t<T>> - 1;
#pragma GCC unroll 32
  for (int i = 0; i < kCount; ++i, pixel += step) __builtin_prefetch(pixel);
}

template <typename T>
SEPCONV_INLINE void load_grads(Vector<accumulate_t<T>> (&grads)[kColumns], const T* pixel, int64_t step, int count) {
#pragma GCC unroll 8
  for (int q = 0; q < kColumns; ++q, pixel += step) grads[q] = q < count ? load(pixel) : Vector<accumulate_t<T>>{};
}

template <typename A, int kRows, int kTaps>
SEPCONV_INLINE void add_sums(A* to, int64_t row_step, const Vector<A> (&sums)[kRows][kTaps]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s) {
      A* sum = to + r * row_step + s * kLanes<A>;
      store(sum, load(sum) + sums[r][s]);
    }
  }
}

// Every output row loads the input rows of its kernel rows, all of which must exist. Needs C >= kLanes and
// dilation_w 1.
template <typename T, int kTaps, int kStride, int kRows>
void block(const ConvShape& k, const NhwcGradWeightBlock<T>& b) {
  using A = accumulate_t<T>;
  constexpr int kWidth = (kColumns - 1) * kStride + kTaps;
  const int64_t x_pixel = k.x.w, x_row = k.dilation_h * k.x.h, x_step = k.stride_h * k.x.h;
  const int64_t column = b.q * kStride - k.pad_w + b.s0;  // of tap 0 of output column 0
  const int count = b.count;
  const int64_t from = -column, to = std::min<int64_t>(k.W - column, (count - 1) * kStride + kTaps);
  const T* x_first = b.x + (b.p0 * k.stride_h - k.pad_h + b.r0 * k.dilation_h) * k.x.h + column * x_pixel;
  const T* g = b.grad_y + b.p0 * k.y.h + b.q * k.y.w;
  Vector<A> sums[kRows][kTaps] = {};
  for (int64_t p = b.p0; p < b.p1; ++p) {
    Vector<A> grads[kColumns];
    load_grads(grads, g, k.y.w, count);
    const T* x = x_first;
#pragma GCC unroll 32
    for (int j = 0; j < kWidth; ++j) {
      if (j >= from && j < to) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vector<A> value = load(x + r * x_row);
#pragma GCC unroll 8
          for (int s = 0; s < kTaps; ++s) {
            if (j >= s && (j - s) % kStride == 0 && (j - s) / kStride < kColumns) {
              sums[r][s] += value * grads[(j - s) / kStride];
            }
          }
        }
      }
      x += x_pixel;
    }
    if (b.x_ahead != 0 && (p + b.call) % b.calls == 0) {
      fetch<T, kWidth>(x_first + b.x_ahead, x_pixel);
      if (kStride == 2) fetch<T, kWidth>(x_first + b.x_ahead - k.x.h, x_pixel);
      fetch<T, kColumns>(g + b.grad_y_ahead, k.y.w);
    }
    x_first += x_step;
    g += k.y.h;
  }
  add_sums<A>(b.sums + (b.r0 * k.S + b.s0) * kLanes<A>, k.S * kLanes<A>, sums);
}

// Every input row is loaded once: kRows rows of grad_y, that kernel rows join it with, move down in registers.
// Stride 1, dilation 1, C >= kLanes; input rows outside of the image are passed over.
template <typename T, int kTaps, int kRows>
struct Once {
  using A = accumulate_t<T>;
  static constexpr int kWidth = kColumns - 1 + kTaps;
  const ConvShape& k;
  const NhwcGradWeightBlock<T>& b;
  const int64_t x_pixel = k.x.w, rows = b.p1 - b.p0, column = b.q - k.pad_w + b.s0;
  const int64_t from = -column, to = std::min<int64_t>(k.W - column, b.count - 1 + kTaps);
  int64_t row = b.p0 - k.pad_h + b.r0, step = 0;  // the input row, and its number
  const int64_t end = std::min(row + rows + kRows - 1, k.H);
  const T* x = b.x + row * k.x.h + column * x_pixel;
  const T* g = b.grad_y + b.p0 * k.y.h + b.q * k.y.w;
  Vector<A> sums[kRows][kTaps] = {};
  Vector<A> grads[kRows][kColumns] = {};

  // Joins the input row with kernel rows [kFirst, kFirst + kCount); the output row of kernel row 0 is in kNewest.
  template <int kNewest, int kFirst, int kCount>
  SEPCONV_INLINE void add() {
    const T* pixel = x;
#pragma GCC unroll 32
    for (int j = 0; j < kWidth; ++j, pixel += x_pixel) {
      if (j < from || j >= to) continue;
      const Vector<A> value = load(pixel);
#pragma GCC unroll 4
      for (int r = kFirst; r < kFirst + kCount; ++r) {
#pragma GCC unroll 8
        for (int s = 0; s < kTaps; ++s) {
          if (j >= s && j - s < kColumns) sums[r][s] += value * grads[(kNewest + kRows - r) % kRows][j - s];
        }
      }
    }
  }
  template <int kNewest>
  SEPCONV_INLINE bool next() {
    if (b.x_ahead != 0 && (step + b.call) % b.calls == 0) {
      fetch<T, kWidth>(x + b.x_ahead, x_pixel);
      if (step < rows) fetch<T, kColumns>(g + b.grad_y_ahead, k.y.w);
    }
    if (step < rows) load_grads(grads[kNewest], g, k.y.w, b.count);
    if (row >= 0) {
      if (step >= kRows - 1 && step < rows) {
        add<kNewest, 0, kRows>();
      } else {
        if (step < rows) add<kNewest, 0, 1>();
        if constexpr (kRows > 1) {
          if (step >= 1 && step <= rows) add<kNewest, 1, 1>();
        }
        if constexpr (kRows > 2) {
          if (step >= 2) add<kNewest, 2, 1>();
        }
      }
    }
    x += k.x.h, g += k.y.h, ++step;
    return ++row < end;
  }
  SEPCONV_INLINE void run() {
    if (row >= end) return;
    while (next<0>() && (kRows < 2 || next<1 % kRows>()) && (kRows < 3 || next<2 % kRows>())) continue;
    add_sums<A>(b.sums + (b.r0 * k.S + b.s0) * kLanes<A>, k.S * kLanes<A>, sums);
  }
};

template <typename T, int kTaps, int kStride, int kRows>
void block_once(const ConvShape& k, const NhwcGradWeightBlock<T>& b) {
  Once<T, kTaps, kRows>{k, b}.run();
}

// Any stride, dilation and number of channels.
template <typename T>
void block_generic(const ConvShape& k, const NhwcGradWeightBlock<T>& b) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  const int lanes = static_cast<int>(std::min<int64_t>(k.C, L));
  for (int64_t r = b.r0; r < b.r0 + b.rows; ++r) {
    for (int64_t s = 0; s < k.S; ++s) {
      Vector<A> sum{};
      for (int64_t p = b.p0; p < b.p1; ++p) {
        const int64_t row = p * k.stride_h - k.pad_h + r * k.dilation_h;
        for (int64_t q = b.q; q < b.q + b.count; ++q) {
          const int64_t column = q * k.stride_w - k.pad_w + s * k.dilation_w;
          if (column < 0 || column >= k.W) continue;
          sum += load_first(b.grad_y + p * k.y.h + q * k.y.w, lanes) *
                 load_first(b.x + row * k.x.h + column * k.x.w, lanes);
        }
      }
      A* to = b.sums + (r * k.S + s) * L;
      store(to, load(to) + sum);
    }
  }
}
