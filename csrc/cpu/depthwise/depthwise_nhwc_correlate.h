// The correlation of depthwise_nhwc.h, for one image. Read by depthwise_nhwc.cpp once for each instruction set, inside
// its namespace (see foreach_isa.h): hence no include guard and no include.

inline constexpr int kMaxTaps = 7;  // taps of a kernel row that share one pass over the input vectors
inline constexpr int kWide = 7;     // output columns of a block: 7 sums, 7 taps and a value fill 15 of 16 registers,
inline constexpr int kNarrow = 4;   // and 7 divides the widths 7, 14, 28, 56, 112
inline constexpr int kVectors =
    SEPCONV_ISA_LEVEL == 2 ? 2 : 1;  // channel vectors of a block; AVX-512 has the registers for two
template <typename T>
inline constexpr int64_t kWidest = kVectors * kLanes<accumulate_t<T>>;
inline constexpr int64_t kRowGroup = 8;         // output rows that a block of columns goes down before the next block
inline constexpr int64_t kL1Bytes = 32 * 1024;  // of input that a block keeps in use

// kTaps taps of one kernel row, for kQ sums. x is at the column of tap 0 of sum 0; only its columns [from, to) exist.
template <typename T, int kTaps, int kStride, int kV, int kQ, bool kGuarded>
SEPCONV_INLINE void add_row(Vector<accumulate_t<T>> (&sums)[kQ][kV], const T* x, int64_t x_pixel, int64_t from,
                            int64_t to, const accumulate_t<T>* w) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  Vector<A> taps[kTaps][kV];
#pragma GCC unroll 8
  for (int s = 0; s < kTaps; ++s) {
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) taps[s][v] = load(w + (s * kV + v) * L);
  }
#pragma GCC unroll 32
  for (int j = 0; j < (kQ - 1) * kStride + kTaps; ++j) {
    if (!kGuarded || (j >= from && j < to)) {
      Vector<A> values[kV];
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) values[v] = load(x + v * L);
#pragma GCC unroll 8
      for (int q = 0; q < kQ; ++q) {
        const int s = j - q * kStride;
        if (s >= 0 && s < kTaps) {
#pragma GCC unroll 2
          for (int v = 0; v < kV; ++v) sums[q][v] += values[v] * taps[s][v];
        }
      }
    }
    x += x_pixel;
  }
}

// What the next block will read or write. A block is too short a run, and the next row too far away, for the
// processor to guess.
template <typename T, int kV, int kPixels>
SEPCONV_INLINE void prefetch(const T* pixel, int64_t step) {
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
    __builtin_prefetch(pixel);
    if (kV * kLanes<accumulate_t<T>> * sizeof(T) > 64) __builtin_prefetch(pixel + kV * kLanes<accumulate_t<T>> - 1);
    pixel += step;
  }
}

// Needs C >= kV * kLanes and dilation_w 1. Without kGuarded: every input column exists, and every output column.
template <typename T, int kTaps, int kStride, int kV, int kQ, bool kGuarded>
void block(const Correlation<T>& k, const NhwcBlock<accumulate_t<T>>& b) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>, kWidth = kV * L;
  const int64_t C = k.C, R = k.R, S = k.S;
  const int64_t x_pixel = k.x_pixel, x_row = k.dilation_h * k.x_row, y_pixel = k.y_pixel, w_row = S * kWidth;
  const int64_t column = b.q * k.stride_w - k.pad_w + b.s0, from = -column, to = k.W - column;
  const Activation activation = k.activation;
  const bool clamped = activation == Activation::relu || activation == Activation::relu6;
  const A highest = activation == Activation::relu6 ? A(6) : std::numeric_limits<A>::infinity();
  const int count = b.count;
  const bool first_pass = b.s0 == 0, last_pass = b.last;
  const int64_t v0 = b.v0, v1 = b.v1;
  A* partial = b.partial;
  for (int64_t p = b.p0; p < b.p1; ++p) {
    const int64_t row = p * k.stride_h - k.pad_h;  // of kernel row 0
    const int64_t first = row >= 0 ? 0 : (-row + k.dilation_h - 1) / k.dilation_h;
    const int64_t end = std::min(R, row < k.H ? (k.H - row + k.dilation_h - 1) / k.dilation_h : 0);
    const T* x_first = k.x + (row + first * k.dilation_h) * k.x_row + column * x_pixel;
    T* y_first = k.y + p * k.y_row + b.q * y_pixel;
    // In the last row new to this p; with a stride the one before is new, too.
    const T* x_ahead = k.x + (row + (R - 1) * k.dilation_h) * k.x_row + column * x_pixel + b.x_ahead;
    const T* y_ahead = y_first + b.y_ahead;
    const A* w_first = k.w + ((v0 * R + first) * S + b.s0) * kWidth;
    const A* bias = k.bias + v0 * kWidth;
    for (int64_t v = v0; v < v1; ++v) {
      const int64_t c = std::min(v * kWidth, C - kWidth);
      const T* x = x_first + c;
      const A* w = w_first;
      w_first += R * S * kWidth;
      Vector<A> sums[kQ][kV];
#pragma GCC unroll 8
      for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 2
        for (int i = 0; i < kV; ++i) sums[q][i] = load(first_pass ? bias + i * L : partial + (q * kV + i) * L);
      }
      bias += kWidth;
      if (b.y_ahead != 0) {
        prefetch<T, kV, kQ * kStride>(x_ahead + c, x_pixel);
        if (k.stride_h > 1 && R > 1) prefetch<T, kV, kQ * kStride>(x_ahead + c - x_row, x_pixel);
        prefetch<T, kV, kQ>(y_ahead + c, y_pixel);
      }
      for (int64_t r = first; r < end; ++r) {
        add_row<T, kTaps, kStride, kV, kQ, kGuarded>(sums, x, x_pixel, from, to, w);
        x += x_row;
        w += w_row;
      }
      A values[kQ * kWidth];
      if (last_pass && clamped) {  // the usual ones, without leaving the registers
#pragma GCC unroll 8
        for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 2
          for (int i = 0; i < kV; ++i) sums[q][i] = clamp_lanes<A>(sums[q][i], highest);
        }
        partial += kQ * kWidth;
      } else if (!last_pass || activation != Activation::identity) {
        A* to = last_pass ? values : partial;
#pragma GCC unroll 8
        for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 2
          for (int i = 0; i < kV; ++i) store(to + (q * kV + i) * L, sums[q][i]);
        }
        partial += kQ * kWidth;
        if (!last_pass) continue;
        activate_array(activation, values, kQ * kWidth);
#pragma GCC unroll 8
        for (int q = 0; q < kQ; ++q) {
#pragma GCC unroll 2
          for (int i = 0; i < kV; ++i) sums[q][i] = load(values + (q * kV + i) * L);
        }
      } else {
        partial += kQ * kWidth;
      }
      T* y = y_first + c;
#pragma GCC unroll 8
      for (int q = 0; q < kQ; ++q) {
        if (!kGuarded || q < count) {
#pragma GCC unroll 2
          for (int i = 0; i < kV; ++i) store(y + i * L, sums[q][i]);
        }
        y += y_pixel;
      }
    }
  }
}

// Any stride, dilation and number of channels.
template <typename T>
void block_generic(const Correlation<T>& k, const NhwcBlock<accumulate_t<T>>& b) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>, kQ = kNarrow;
  const int lanes = static_cast<int>(std::min<int64_t>(k.C, L));
  for (int64_t p = b.p0; p < b.p1; ++p) {
    for (int64_t v = b.v0; v < b.v1; ++v) {
      const int64_t c = std::max<int64_t>(std::min<int64_t>(v * L, k.C - L), 0);
      Vector<A> sums[kQ];
      for (int q = 0; q < kQ; ++q) sums[q] = load(k.bias + v * L);
      for (int64_t r = 0; r < k.R; ++r) {
        const int64_t row = p * k.stride_h - k.pad_h + r * k.dilation_h;
        if (row < 0 || row >= k.H) continue;
        for (int64_t s = 0; s < k.S; ++s) {
          const Vector<A> tap = load(k.w + ((v * k.R + r) * k.S + s) * L);
#pragma GCC unroll 8
          for (int q = 0; q < kQ; ++q) {
            const int64_t column = (b.q + q) * k.stride_w - k.pad_w + s * k.dilation_w;
            if (q < b.count && column >= 0 && column < k.W) {
              sums[q] += tap * load_first(k.x + row * k.x_row + column * k.x_pixel + c, lanes);
            }
          }
        }
      }
      A values[kQ * L];
      for (int q = 0; q < kQ; ++q) store(values + q * L, sums[q]);
      activate_array(k.activation, values, kQ * L);
      for (int q = 0; q < b.count; ++q) {
        store_first(k.y + p * k.y_row + (b.q + q) * k.y_pixel + c, load(values + q * L), lanes);
      }
    }
  }
}

// The block functions of one or two vectors of channels.
template <typename T, int kTaps, int kStride>
typename NhwcKernel<T>::Functions functions_of(int64_t width) {
  if (width == kWidest<T>) {
    return {block<T, kTaps, kStride, kVectors, kWide, false>, block<T, kTaps, kStride, kVectors, kWide, true>,
            block<T, kTaps, kStride, kVectors, kNarrow, true>};
  }
  return {block<T, kTaps, kStride, 1, kWide, true>, block<T, kTaps, kStride, 1, kWide, true>,
          block<T, kTaps, kStride, 1, kNarrow, true>};
}

template <typename T>
typename NhwcKernel<T>::Functions functions_of(int64_t taps, int64_t stride, int64_t width) {
  switch (taps * 2 + stride) {
    case 3: return functions_of<T, 1, 1>(width);
    case 5: return functions_of<T, 2, 1>(width);
    case 7: return functions_of<T, 3, 1>(width);
    case 9: return functions_of<T, 4, 1>(width);
    case 11: return functions_of<T, 5, 1>(width);
    case 13: return functions_of<T, 6, 1>(width);
    case 15: return functions_of<T, 7, 1>(width);
    case 8: return functions_of<T, 3, 2>(width);
    case 12: return functions_of<T, 5, 2>(width);
    case 16: return functions_of<T, 7, 2>(width);
    default: return {};
  }
}

template <typename T>
void choose_functions(NhwcKernel<T>& kernel, int64_t C, int64_t S, int64_t stride, int64_t dilation) {
  constexpr int64_t kVector = kLanes<accumulate_t<T>>;
  kernel.groups = {C, C >= kWidest<T> ? kWidest<T> : kVector};
  const int64_t width = kernel.groups.width;
  if (S > 1) stride /= std::gcd(stride, dilation);  // see take_phase()
  if (C >= width && S > 0 && stride <= 2) {
    kernel.passes = (S + kMaxTaps - 1) / kMaxTaps;
    kernel.taps = (S + kernel.passes - 1) / kernel.passes;
    kernel.longer = functions_of<T>(kernel.taps, stride, width);
    kernel.shorter = functions_of<T>(kernel.taps - 1, stride, width);
    if (kernel.taps * kernel.passes != S && kernel.shorter.wide == nullptr) kernel.longer = {};
  }
  if (kernel.generic()) kernel.groups.width = kVector, kernel.passes = 1, kernel.taps = 0;
}

// Output columns [q0, q1).
template <typename T>
Correlation<T> columns_of(Correlation<T> k, int64_t q0, int64_t q1) {
  k.y += q0 * k.y_pixel;
  k.pad_w -= q0 * k.stride_w;
  k.Q = q1 - q0;
  return k;
}

// Output rows [p0, p1), of a kernel whose taps are neighbours.
template <typename T>
void correlate_neighbours(const Correlation<T>& k, const NhwcKernel<T>& kernel, int64_t p0, int64_t p1) {
  using A = accumulate_t<T>;
  const int64_t groups = kernel.groups.count(), width = kernel.groups.width;
  const int64_t bytes = k.R * ((kWide - 1) * k.stride_w + kernel.taps) * sizeof(T) + k.R * kernel.taps * sizeof(A);
  const int64_t chunk = std::clamp<int64_t>(kL1Bytes / (bytes * width + 1), 1, groups);
  std::vector<A> partial(kernel.passes > 1 ? kRowGroup * chunk * kWide * width : 0);
  NhwcBlock<A> b;
  b.partial = partial.data();
  for (b.p0 = p0; b.p0 < p1; b.p0 = b.p1) {
    b.p1 = std::min(b.p0 + kRowGroup, p1);
    for (b.q = 0; b.q < k.Q;) {
      const int64_t left = k.Q - b.q;
      // Wide blocks while they fit; the rest in narrow ones where that wastes less.
      const bool wide =
          !kernel.generic() &&
          (left >= kWide ? left % kWide == 0 || left >= 3 * kNarrow + kWide || left < 2 * kNarrow : left > kNarrow);
      const int columns = wide ? kWide : kNarrow;
      if (left < columns && k.Q >= columns) b.q = k.Q - columns;  // overlaps the block before it
      b.count = static_cast<int>(std::min<int64_t>(columns, k.Q - b.q));
      const int64_t column = b.q * k.stride_w - k.pad_w;
      const bool inside = column >= 0 && column + (columns - 1) * k.stride_w + k.S <= k.W && b.count == columns;
      for (b.v0 = 0; b.v0 < groups; b.v0 = b.v1) {
        b.v1 = std::min(b.v0 + chunk, groups);
        if (b.v1 < groups) {
          b.x_ahead = b.y_ahead = (b.v1 - b.v0) * width;
        } else if (left > columns) {
          b.x_ahead = (columns * k.stride_w + k.S - 1) * k.x_pixel - b.v0 * width;
          b.y_ahead = columns * k.y_pixel - b.v0 * width;
        } else if (b.p1 < p1) {  // on to the next rows
          b.x_ahead = kRowGroup * k.stride_h * k.x_row - b.q * k.stride_w * k.x_pixel - b.v0 * width;
          b.y_ahead = kRowGroup * k.y_row - b.q * k.y_pixel - b.v0 * width;
        } else {
          b.y_ahead = 0;
        }
        if (kernel.generic()) {
          block_generic(k, b);
          continue;
        }
        b.s0 = 0;
        for (int64_t pass = 0; pass < kernel.passes; ++pass) {
          const int64_t s1 = k.S * (pass + 1) / kernel.passes;
          b.last = s1 == k.S;
          const auto& functions = s1 - b.s0 == kernel.taps ? kernel.longer : kernel.shorter;
          (wide ? (inside ? functions.wide : functions.wide_guarded) : functions.narrow)(k, b);
          b.s0 = s1;
        }
      }
      b.q += columns;
    }
  }
}

// Element (c, r, s) of the weight, for the taps r = r0, r0 + r_step, ... (`rows` of them) and s alike, as
// [channel groups, rows, columns, group]; zero where there is no such channel.
template <typename T>
void pack(const ConvShape& shape, const T* w, const ChannelGroups& groups, int64_t r0, int64_t r_step, int64_t rows,
          int64_t s0, int64_t s_step, int64_t columns, accumulate_t<T>* packed) {
  const int64_t lanes = std::min(shape.C, groups.width);
  for (int64_t group = 0; group < groups.count(); ++group) {
    const T* from = w + groups.first(group) * shape.w.n;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t s = 0; s < columns; ++s) {
        const int64_t tap = (r0 + r * r_step) * shape.w.h + (s0 + s * s_step) * shape.w.w;
        for (int64_t i = 0; i < lanes; ++i) packed[i] = load_one(from + i * shape.w.n + tap);
        packed += groups.width;
      }
    }
  }
}

template <typename T>
Correlation<T> forward_of(const ConvShape& shape, const T* x, const T* w, const Epilogue& epilogue,
                          const ChannelGroups& groups, std::vector<accumulate_t<T>>& packed, T* y) {
  const int64_t weights = groups.padded() * shape.R * shape.S;
  packed.assign(weights + groups.padded(), 0);
  pack(shape, w, groups, 0, 1, shape.R, 0, 1, shape.S, packed.data());
  accumulate_t<T>* bias = packed.data() + weights;
  if (epilogue.bias != nullptr) {
    for (int64_t i = 0; i < groups.padded(); ++i) {
      const int64_t c = groups.first(i / groups.width) + i % groups.width;
      if (c < shape.C) bias[i] = load_one(static_cast<const T*>(epilogue.bias) + c);
    }
  }
  Correlation<T> k;
  k.x = x, k.y = y, k.w = packed.data(), k.bias = bias, k.activation = epilogue.activation;
  k.C = shape.C, k.H = shape.H, k.W = shape.W, k.P = shape.P, k.Q = shape.Q, k.R = shape.R, k.S = shape.S;
  k.x_row = shape.x.h, k.x_pixel = shape.x.w, k.y_row = shape.y.h, k.y_pixel = shape.y.w;
  k.stride_h = shape.stride_h, k.stride_w = shape.stride_w, k.pad_h = shape.pad_h, k.pad_w = shape.pad_w;
  k.dilation_h = shape.dilation_h, k.dilation_w = shape.dilation_w;
  return k;
}
