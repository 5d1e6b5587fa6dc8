// Depthwise convolution (multiplier 1) of channels_last images: forward and gradient by the input.
//
// Loop-to-data map. A vector holds neighbouring channels of one pixel. A task is a strip of output rows of one image; inside
// it the loops go: output row p, block of kQ neighbouring output columns, channel vector. The kQ sums of a block stay in
// registers while the R x S taps pass; an input vector is loaded once for each kernel row and feeds every sum that sees it.
// With the channel loop innermost, each of the rows in use is read in long contiguous runs. Columns outside the image are skipped by
// comparing with a range, uniformly for the block; rows outside are not visited: nothing is padded or copied.
//
// The gradient by the input is the same correlation with the filter turned round. With a stride, the pixels of grad_x split into
// stride_h x stride_w phases; each is a correlation of stride 1 over grad_y with every stride-th tap of the filter.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "depthwise_nhwc.cpp"
#include <numeric>

#include "foreach_isa.h"

namespace sepconv::cpu {

void depthwise_nhwc_forward(const ConvShape& shape, DType dtype, const void* x, const void* w, const Epilogue& epilogue,
                            void* y) {
  SEPCONV_BEST_ISA(forward)(shape, dtype, x, w, epilogue, y);
}

void depthwise_nhwc_grad_input(const ConvShape& shape, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  SEPCONV_BEST_ISA(grad_input)(shape, dtype, grad_y, w, grad_x);
}

}  // namespace sepconv::cpu
#else

inline constexpr int kMaxTaps = 7;     // taps of a kernel row that share one pass over the input vectors
inline constexpr int kGenericColumns = 4;

// y[p, q] = activation(bias + sum over r, s of w[r, s] * x[p * stride_h - pad_h + r * dilation_h, q * stride_w - pad_w + s * dilation_w])
// for all channels. Pixels of y may lie apart (y_row, y_pixel, in elements); the pad may be negative.
template <typename T>
struct Correlation {
  using A = accumulate_t<T>;
  const T* x;  // [H, W, C]
  T* y;        // [P, Q, C]
  const A* w;  // [R, S, C]
  const A* bias = nullptr;
  Activation activation = Activation::identity;
  int64_t C, H, W, P, Q, R, S;
  int64_t y_row, y_pixel;
  int64_t stride_h = 1, stride_w = 1, pad_h, pad_w, dilation_h = 1, dilation_w = 1;
};

// One block of output columns in one output row: what is left of the correlation once p and q are chosen.
template <typename T>
struct Block {
  using A = accumulate_t<T>;
  const T* x;               // the first kernel row in use, the first column of the image
  int64_t x_row, x_pixel;   // from one kernel row, one column, to the next
  int64_t column;           // where tap 0 of output column 0 falls; may be negative
  int64_t columns;          // W
  int64_t rows;             // kernel rows in use
  const A* w;               // the first of them
  int64_t S, C;
  T* y;
  int64_t y_pixel;
  int count;                // output columns to store
  const A* bias;
  Activation activation;
  int64_t stride, dilation;
};

template <typename A>
__attribute__((noinline)) void activate_array(Activation activation, A* values, int count) {
  for (int i = 0; i < count; i += kLanes<A>) store(values + i, activate_lanes<A>(activation, load(values + i)));
}

// The taps [0, kTaps) of one kernel row, for kQ sums; x is at the column of tap 0 of sum 0, columns [from, to) exist.
template <typename T, int kTaps, int kStride, int kQ>
SEPCONV_INLINE void add_row(Vector<accumulate_t<T>> (&sums)[kQ], const T* x, int64_t x_pixel, int64_t from, int64_t to,
                            const accumulate_t<T>* w, int64_t C) {
  using V = Vector<accumulate_t<T>>;
  V taps[kTaps];
#pragma GCC unroll 8
  for (int s = 0; s < kTaps; ++s) taps[s] = load(w + s * C);
#pragma GCC unroll 32
  for (int j = 0; j < (kQ - 1) * kStride + kTaps; ++j) {
    if (j >= from && j < to) {
      const V value = load(x);
#pragma GCC unroll 8
      for (int q = 0; q < kQ; ++q) {
        const int s = j - q * kStride;
        if (s >= 0 && s < kTaps) sums[q] += value * taps[s];
      }
    }
    x += x_pixel;
  }
}

template <typename T, int kQ>
SEPCONV_INLINE void finish(Vector<accumulate_t<T>> (&sums)[kQ], const Block<T>& b, int64_t c) {
  using A = accumulate_t<T>;
  if (b.activation != Activation::identity) {
    A values[kQ * kLanes<A>];
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) store(values + q * kLanes<A>, sums[q]);
    activate_array(b.activation, values, kQ * kLanes<A>);
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) sums[q] = load(values + q * kLanes<A>);
  }
  T* y = b.y + c;
#pragma GCC unroll 8
  for (int q = 0; q < kQ; ++q) {
    if (q < b.count) store(y, sums[q]);
    y += b.y_pixel;
  }
}

// S = kMaxTaps * n + kTaps. Needs C >= kLanes and dilation 1.
template <typename T, int kTaps, int kStride, int kQ>
void block(const Block<T>& b) {
  using A = accumulate_t<T>;
  constexpr int kColumns = (kQ - 1) * kStride + kMaxTaps;
  for (int64_t c = 0; c < b.C; c += kLanes<A>) {
    if (c + kLanes<A> > b.C) c = b.C - kLanes<A>;  // the last vector overlaps the one before it
    Vector<A> sums[kQ];
    const Vector<A> start = b.bias != nullptr ? load(b.bias + c) : Vector<A>{};
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) sums[q] = start;
    const A* w = b.w + c;
    for (int64_t r = 0; r < b.rows; ++r) {
      int64_t column = b.column;
      const T* x = b.x + r * b.x_row + column * b.x_pixel + c;
      for (int64_t s = b.S; s > kTaps; s -= kMaxTaps) {
        if (column + kColumns > 0 && column < b.columns) {
          add_row<T, kMaxTaps, kStride, kQ>(sums, x, b.x_pixel, -column, b.columns - column, w, b.C);
        }
        column += kMaxTaps;
        x += kMaxTaps * b.x_pixel;
        w += kMaxTaps * b.C;
      }
      add_row<T, kTaps, kStride, kQ>(sums, x, b.x_pixel, -column, b.columns - column, w, b.C);
      w += kTaps * b.C;
    }
    finish<T, kQ>(sums, b, c);
  }
}

// Any stride, dilation and number of channels.
template <typename T>
void block_generic(const Block<T>& b) {
  using A = accumulate_t<T>;
  constexpr int kQ = kGenericColumns;
  for (int64_t c = 0; c < b.C; c += kLanes<A>) {
    const int lanes = static_cast<int>(std::min<int64_t>(b.C - c, kLanes<A>));
    Vector<A> sums[kQ];
    for (int q = 0; q < kQ; ++q) sums[q] = b.bias != nullptr ? load_first(b.bias + c, lanes) : Vector<A>{};
    for (int64_t r = 0; r < b.rows; ++r) {
      for (int64_t s = 0; s < b.S; ++s) {
        const Vector<A> tap = load_first(b.w + (r * b.S + s) * b.C + c, lanes);
#pragma GCC unroll 8
        for (int q = 0; q < kQ; ++q) {
          const int64_t column = b.column + q * b.stride + s * b.dilation;
          if (q < b.count && column >= 0 && column < b.columns) {
            sums[q] += tap * load_first(b.x + r * b.x_row + column * b.x_pixel + c, lanes);
          }
        }
      }
    }
    if (b.activation != Activation::identity) {
      A values[kQ * kLanes<A>];
      for (int q = 0; q < kQ; ++q) store(values + q * kLanes<A>, sums[q]);
      activate_array(b.activation, values, kQ * kLanes<A>);
      for (int q = 0; q < kQ; ++q) sums[q] = load(values + q * kLanes<A>);
    }
    for (int q = 0; q < b.count; ++q) store_first(b.y + q * b.y_pixel + c, sums[q], lanes);
  }
}

// The block function for a correlation, and how many output columns a call computes.
template <typename T>
struct Kernel {
  using Function = void (*)(const Block<T>&);
  Function wide = block_generic<T>, narrow = block_generic<T>;
  int wide_columns = kGenericColumns, narrow_columns = kGenericColumns;

  explicit Kernel(const Correlation<T>& k) { choose(k); }

  void choose(const Correlation<T>& k) {
    if (k.C < kLanes<accumulate_t<T>> || (k.dilation_w != 1 && k.S > 1) || k.R == 0) return;
    const int taps = static_cast<int>((k.S - 1) % kMaxTaps) + 1;
    if (k.stride_w == 1) {
      switch (taps) {
        case 1: return use<1, 1>();
        case 2: return use<2, 1>();
        case 3: return use<3, 1>();
        case 4: return use<4, 1>();
        case 5: return use<5, 1>();
        case 6: return use<6, 1>();
        case 7: return use<7, 1>();
      }
    } else if (k.stride_w == 2) {
      switch (taps) {
        case 3: return use<3, 2>();
        case 5: return use<5, 2>();
        case 7: return use<7, 2>();
      }
    }
  }

  template <int kTaps, int kStride>
  void use() {
    wide = block<T, kTaps, kStride, 7>, wide_columns = 7;
    narrow = block<T, kTaps, kStride, 4>, narrow_columns = 4;
  }
};

// Output row p.
template <typename T>
void correlate_row(const Correlation<T>& k, const Kernel<T>& kernel, int64_t p) {
  const int64_t row = p * k.stride_h - k.pad_h;  // of kernel row 0
  const int64_t first = row >= 0 ? 0 : (-row + k.dilation_h - 1) / k.dilation_h;
  const int64_t end = std::min(k.R, row < k.H ? (k.H - row + k.dilation_h - 1) / k.dilation_h : 0);
  Block<T> b;
  b.rows = std::max<int64_t>(end - first, 0);
  b.x = k.x + (b.rows > 0 ? (row + first * k.dilation_h) * k.W * k.C : 0);
  b.x_row = k.dilation_h * k.W * k.C;
  b.x_pixel = k.C;
  b.columns = k.W;
  b.w = k.w + (b.rows > 0 ? first * k.S * k.C : 0);
  b.S = k.S;
  b.C = k.C;
  b.y_pixel = k.y_pixel;
  b.bias = k.bias;
  b.activation = k.activation;
  b.stride = k.stride_w;
  b.dilation = k.dilation_w;
  for (int64_t q = 0; q < k.Q;) {
    const int64_t left = k.Q - q;
    // Wide blocks while they fit; the rest in narrow ones where that wastes less.
    const int wide = kernel.wide_columns, narrow = kernel.narrow_columns;
    const bool use_wide = left >= wide ? (left % wide == 0 || left >= wide + narrow * 3 || left < 2 * narrow)
                                       : left > narrow && 2 * narrow > wide;
    const int columns = use_wide ? wide : narrow;
    if (left < columns && k.Q >= columns) q = k.Q - columns;  // overlaps the block before it
    b.column = q * k.stride_w - k.pad_w;
    b.y = k.y + p * k.y_row + q * k.y_pixel;
    b.count = static_cast<int>(std::min<int64_t>(columns, k.Q - q));
    (use_wide ? kernel.wide : kernel.narrow)(b);
    q += columns;
  }
}

// How many strips of rows to cut each image into, so that there is work for every thread.
inline int64_t strips_per_image(int64_t images, int64_t rows) {
  const int64_t threads = num_threads();
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + images - 1) / images;
  return std::min(wanted, rows);
}

// The weight's element (c, r, s) at packed[(r * S + s) * C + c], for the taps r = r0, r0 + r_step, ... (rows of them) and s alike.
template <typename T>
void pack(const ConvShape& shape, const T* w, int64_t r0, int64_t r_step, int64_t rows, int64_t s0, int64_t s_step,
          int64_t columns, accumulate_t<T>* packed) {
  for (int64_t c0 = 0; c0 < shape.C; c0 += 16) {
    const int64_t c1 = std::min(c0 + 16, shape.C);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t s = 0; s < columns; ++s) {
        const T* from = w + (r0 + r * r_step) * shape.w.h + (s0 + s * s_step) * shape.w.w;
        accumulate_t<T>* to = packed + (r * columns + s) * shape.C;
        for (int64_t c = c0; c < c1; ++c) to[c] = load_one(from + c * shape.w.n);
      }
    }
  }
}

template <typename T>
struct ForwardTask {
  Correlation<T> image0;
  Kernel<T> kernel;
  int64_t strips;
  void operator()(int64_t task) const {
    const int64_t n = task / strips, strip = task % strips;
    Correlation<T> k = image0;
    k.x += n * k.H * k.W * k.C;
    k.y += n * k.P * k.Q * k.C;
    for (int64_t p = k.P * strip / strips; p < k.P * (strip + 1) / strips; ++p) correlate_row(k, kernel, p);
  }
};

template <typename T>
void forward_typed(const ConvShape& shape, const T* x, const T* w, const Epilogue& epilogue, T* y) {
  using A = accumulate_t<T>;
  std::vector<A> scratch(shape.C * (shape.R * shape.S + 1));
  A* bias = scratch.data() + shape.C * shape.R * shape.S;
  pack(shape, w, 0, 1, shape.R, 0, 1, shape.S, scratch.data());
  if (epilogue.bias != nullptr) {
    for (int64_t c = 0; c < shape.C; ++c) bias[c] = load_one(static_cast<const T*>(epilogue.bias) + c);
  }
  Correlation<T> k;
  k.x = x, k.y = y, k.w = scratch.data();
  k.bias = epilogue.bias != nullptr ? bias : nullptr, k.activation = epilogue.activation;
  k.C = shape.C, k.H = shape.H, k.W = shape.W, k.P = shape.P, k.Q = shape.Q, k.R = shape.R, k.S = shape.S;
  k.y_row = shape.Q * shape.C, k.y_pixel = shape.C;
  k.stride_h = shape.stride_h, k.stride_w = shape.stride_w, k.pad_h = shape.pad_h, k.pad_w = shape.pad_w;
  k.dilation_h = shape.dilation_h, k.dilation_w = shape.dilation_w;
  const int64_t strips = strips_per_image(shape.N, shape.P);
  parallel(shape.N * strips, ForwardTask<T>{k, Kernel<T>(k), strips});
}

// Phase f of one dimension of grad_x: pixels f, f + stride, ... They see the taps `last`, `last` - step, ... (`count` of them,
// in the order in which they meet the rows of grad_y), and tap t of pixel i meets grad_y's i - pad + t * dilation.
struct Phase {
  int64_t size, last = 0, step = 1, count = 0, pad = 0, dilation = 1;
  Phase(int64_t f, int64_t pixels, int64_t taps, int64_t stride, int64_t padding, int64_t tap_distance) {
    size = pixels > f ? (pixels - f + stride - 1) / stride : 0;
    const int64_t common = std::gcd(stride, tap_distance);
    step = stride / common;
    dilation = tap_distance / common;
    for (int64_t first = 0; first < std::min(step, taps); ++first) {
      if ((f + padding - first * tap_distance) % stride != 0) continue;
      count = (taps - 1 - first) / step + 1;
      last = first + (count - 1) * step;
      pad = -(f + padding - last * tap_distance) / stride;
    }
  }
};

template <typename T>
struct GradInputTask {
  const std::vector<Correlation<T>>& phases;  // [stride_h][stride_w], of image 0
  const std::vector<Kernel<T>>& kernels;
  const ConvShape& shape;
  int64_t strips;
  void operator()(int64_t task) const {
    const int64_t n = task / strips, strip = task % strips;
    for (int64_t h = shape.H * strip / strips; h < shape.H * (strip + 1) / strips; ++h) {
      for (int64_t f = 0; f < shape.stride_w; ++f) {
        const int64_t phase = h % shape.stride_h * shape.stride_w + f;
        Correlation<T> k = phases[phase];
        k.x += n * shape.P * shape.Q * shape.C;
        k.y += n * shape.H * shape.W * shape.C;
        correlate_row(k, kernels[phase], h / shape.stride_h);
      }
    }
  }
};

template <typename T>
void grad_input_typed(const ConvShape& shape, const T* grad_y, const T* w, T* grad_x) {
  using A = accumulate_t<T>;
  const int64_t C = shape.C;
  std::vector<A> packed(C * shape.R * shape.S);
  A* next = packed.data();
  std::vector<Correlation<T>> phases;
  std::vector<Kernel<T>> kernels;
  for (int64_t fh = 0; fh < shape.stride_h; ++fh) {
    const Phase h(fh, shape.H, shape.R, shape.stride_h, shape.pad_h, shape.dilation_h);
    for (int64_t fw = 0; fw < shape.stride_w; ++fw) {
      const Phase v(fw, shape.W, shape.S, shape.stride_w, shape.pad_w, shape.dilation_w);
      Correlation<T> k;
      k.x = grad_y, k.y = grad_x + (fh * shape.W + fw) * C, k.w = next;
      k.C = C, k.H = shape.P, k.W = shape.Q, k.P = h.size, k.Q = v.size;
      k.R = v.count > 0 ? h.count : 0, k.S = v.count;  // without taps, all zeros
      k.y_row = shape.stride_h * shape.W * C, k.y_pixel = shape.stride_w * C;
      k.pad_h = h.pad, k.pad_w = v.pad, k.dilation_h = h.dilation, k.dilation_w = v.dilation;
      pack(shape, w, h.last, -h.step, k.R, v.last, -v.step, k.S, next);
      next += k.R * k.S * C;
      phases.push_back(k);
      kernels.emplace_back(k);
    }
  }
  const int64_t strips = strips_per_image(shape.N, shape.H);
  parallel(shape.N * strips, GradInputTask<T>{phases, kernels, shape, strips});
}

void forward(const ConvShape& shape, DType dtype, const void* x, const void* w, const Epilogue& epilogue, void* y) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward_typed(shape, static_cast<const T*>(x), static_cast<const T*>(w), epilogue, static_cast<T*>(y));
  });
}

void grad_input(const ConvShape& shape, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    grad_input_typed(shape, static_cast<const T*>(grad_y), static_cast<const T*>(w), static_cast<T*>(grad_x));
  });
}

#endif
