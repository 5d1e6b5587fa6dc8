// The depthwise stage of separable.cpp on planes: any strides of the input, any kernel, stride, dilation and
// multiplier. Read by that file once for each instruction set, inside its namespace (see foreach_isa.h): hence no
// include guard and no include.
//
// The input pixels that a tile of one channel needs are copied, widened and padded, into a strip; with a stride the
// columns of the strip are sorted by their remainder (its phases), so that a vector of neighbouring outputs reads
// neighbouring values. The strip stays in the first-level cache while every tap passes over it.

template <typename A, int... kI>
SEPCONV_INLINE Vector<A> every_other(Vector<A> a, Vector<A> b, int odd, std::integer_sequence<int, kI...>) {
  return odd ? __builtin_shufflevector(a, b, (2 * kI + 1)...) : __builtin_shufflevector(a, b, (2 * kI)...);
}

template <typename T>
struct PlaneStage {
  using A = accumulate_t<T>;
  const ConvShape& s;
  int64_t rows, columns;            // outputs of a tile, the largest one
  int64_t strip_rows, phase, row;   // phase: columns from one phase to the next; row: all of a strip's row
  std::vector<int64_t> tap_column;  // of tap s in a strip's row
  const T* readable_end;            // behind the input's last element

  PlaneStage(const ConvShape& shape, const T* x, int64_t tile_rows, int64_t tile_columns)
      : s(shape), rows(tile_rows), columns(tile_columns) {
    readable_end = x + (s.N - 1) * s.x.n + (s.C - 1) * s.x.c + (s.H - 1) * s.x.h + (s.W - 1) * s.x.w + 1;
    constexpr int64_t L = kLanes<A>;
    strip_rows = (rows - 1) * s.stride_h + (s.R - 1) * s.dilation_h + 1;
    // Whole vectors are read from every tap, and a de-interleaving copy writes whole ones.
    phase = (columns + (s.S - 1) * s.dilation_w / s.stride_w + 1 + 2 * L) / L * L;
    row = phase * s.stride_w;
    for (int64_t tap = 0; tap < s.S; ++tap) {
      const int64_t column = tap * s.dilation_w;
      tap_column.push_back(column % s.stride_w * phase + column / s.stride_w);
    }
  }
  int64_t strip_elements() const { return strip_rows * row; }

  // The vector at x, of which the first `count` numbers count; a partial load only where memory ends.
  SEPCONV_INLINE Vector<A> load_safely(const T* x, int64_t count) const {
    if (x + kLanes<A> <= readable_end) return load(x);
    return load_first(x, static_cast<int>(std::clamp<int64_t>(count, 0, kLanes<A>)));
  }

  // Input row x (null outside the image) from column `first` on, `count` columns, into one row of the strip. What lies
  // behind those may be anything: it reaches no output that is stored.
  void copy_row(const T* x, int64_t first, int64_t count, A* strip) const {
    constexpr int L = kLanes<A>;
    const int64_t begin = std::clamp<int64_t>(-first, 0, count), end = std::clamp(s.W - first, begin, count);
    if (x == nullptr || end == begin) {
      std::fill(strip, strip + row, A(0));
      return;
    }
    x += first * s.x.w;
    if (s.x.w == 1 && s.stride_w == 1) {
      std::fill(strip, strip + begin, A(0));
      for (int64_t j = begin; j < end; j += L) store(strip + j, load_safely(x + j, end - j));
      for (int64_t j = end; j < count; j += L) store(strip + j, Vector<A>{});
    } else if (s.x.w == 1 && s.stride_w == 2) {
      const std::make_integer_sequence<int, L> all;
      A* const phases[] = {strip, strip + phase};
      A *even = phases[begin % 2] + begin / 2, *odd = phases[1 - begin % 2] + (begin + 1) / 2;
      for (int64_t j = begin; j < end; j += 2 * L, even += L, odd += L) {
        const Vector<A> low = load_safely(x + j, end - j), high = load_safely(x + j + L, end - j - L);
        store(even, every_other<A>(low, high, 0, all));
        store(odd, every_other<A>(low, high, 1, all));
      }
      for (int f = 0; f < 2; ++f) {
        for (int64_t j = 0; j < (begin - f + 1) / 2; ++j) phases[f][j] = A(0);
        for (int64_t j = (end - f + 1) / 2; j < (count - f + 1) / 2; j += L) store(phases[f] + j, Vector<A>{});
      }
    } else {
      std::fill(strip, strip + row, A(0));
      for (int64_t j = begin; j < end; ++j) strip[j % s.stride_w * phase + j / s.stride_w] = load_one(x + j * s.x.w);
    }
  }

  // The strip of a plane's outputs [p0, p0 + p_count) x [q0, q0 + q_count). Meanwhile the same of the plane that is
  // next (if not null) is fetched, row by row: a strip is too short a run for the processor to guess.
  void copy_strip(const T* plane, const T* next, int64_t p0, int64_t p_count, int64_t q0, int64_t q_count,
                  A* strip) const {
    const int64_t top = p0 * s.stride_h - s.pad_h, left = q0 * s.stride_w - s.pad_w;
    const int64_t height = (p_count - 1) * s.stride_h + (s.R - 1) * s.dilation_h + 1;
    const int64_t width = (q_count - 1) * s.stride_w + (s.S - 1) * s.dilation_w + 1;
    const int64_t begin = std::max<int64_t>(left, 0), end = s.x.w == 1 ? std::min(s.W, left + width) : 0;
    for (int64_t i = 0; i < height; ++i) {
      const int64_t h = top + i;
      const bool inside = h >= 0 && h < s.H;
      copy_row(inside ? plane + h * s.x.h : nullptr, left, width, strip + i * row);
      if (!inside || next == nullptr) continue;
      for (int64_t w = begin; w < end; w += 64 / sizeof(T)) __builtin_prefetch(next + h * s.x.h + w);
    }
  }

  // kP rows of outputs. Where a row is shorter than a vector, what is stored behind its end belongs to the next row,
  // which is stored after it. kR x kS taps, or any number where they are 0.
  template <int kP, int kR, int kS>
  SEPCONV_INLINE void convolve_rows(const A* strip, const A* w, A bias, int64_t q_count, A* out) const {
    constexpr int L = kLanes<A>;
    const int64_t R = kR > 0 ? kR : s.R, S = kS > 0 ? kS : s.S;
    const int64_t tap_row = s.dilation_h * row, p_row = s.stride_h * row;
    Vector<A> taps[kR * kS + 1];  // in registers: the stores below might else change them
#pragma GCC unroll 25
    for (int i = 0; i < kR * kS; ++i) taps[i] = broadcast<A>(w[i]);
    int64_t columns[kS + 1];
#pragma GCC unroll 5
    for (int k = 0; k < kS; ++k) columns[k] = tap_column[k];
    for (int64_t next = 0; next < q_count; next += L) {
      const int64_t q = q_count < L ? 0 : std::min(next, q_count - L);  // the last vector overlaps the one before
      Vector<A> sums[kP];
#pragma GCC unroll 4
      for (int p = 0; p < kP; ++p) sums[p] = broadcast<A>(bias);
#pragma GCC unroll 5
      for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 5
        for (int64_t k = 0; k < S; ++k) {
          const A* from = strip + q + r * tap_row + (kS > 0 ? columns[k] : tap_column[k]);
          const Vector<A> tap = kR > 0 ? taps[r * kS + k] : broadcast<A>(w[r * S + k]);
#pragma GCC unroll 4
          for (int p = 0; p < kP; ++p) sums[p] += tap * load(from + p * p_row);
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < kP; ++p) store(out + p * q_count + q, sums[p]);
    }
  }

  template <int kR, int kS>
  void convolve(const A* strip, const A* w, A bias, int64_t p_count, int64_t q_count, A* out) const {
    int64_t p = 0;
    for (; p + 4 <= p_count; p += 4) {
      convolve_rows<4, kR, kS>(strip + p * s.stride_h * row, w, bias, q_count, out + p * q_count);
    }
    for (; p < p_count; ++p) {
      convolve_rows<1, kR, kS>(strip + p * s.stride_h * row, w, bias, q_count, out + p * q_count);
    }
  }

  // out[p * q_count + q], and up to a vector of anything after the last.
  void operator()(const A* strip, const A* w, A bias, Activation activation, int64_t p_count, int64_t q_count,
                  A* out) const {
    if (s.R == 3 && s.S == 3) {
      convolve<3, 3>(strip, w, bias, p_count, q_count, out);
    } else if (s.R == 5 && s.S == 5) {
      convolve<5, 5>(strip, w, bias, p_count, q_count, out);
    } else {
      convolve<0, 0>(strip, w, bias, p_count, q_count, out);
    }
    if (activation != Activation::identity) activate_array(activation, out, static_cast<int>(p_count * q_count));
  }
};
