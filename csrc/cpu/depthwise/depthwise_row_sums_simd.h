// What a row of taps adds to a block of sums, and what becomes of the sums in the end: the inner loops of
// depthwise_rows_simd.h, which reads this.

// Sums [0, count) of a block are stored, and those from `fresh` on are new to the row. Of the input columns, counted
// from that of tap 0 of sum 0, only [from, to) exist.
struct RowPart {
  int count, fresh;
  int64_t from, to;
  int lanes;
};

template <bool kWhole>
SEPCONV_INLINE Vector<float> load_lanes(const float* from, int lanes) {
  return kWhole ? load(from) : load_first(from, lanes);
}

// Which of the input columns that a block sees exist: all but kLeft and kRight at its ends; or as RowPart says.
template <int kTaps, int kStride, int kQ, int kLeft, int kRight>
SEPCONV_INLINE bool exists(int j, const RowPart& b) {
  if constexpr (kLeft == kAsPartSays) {
    return j >= b.from && j < b.to;
  } else {
    return j >= kLeft && j < (kQ - 1) * kStride + kTaps - kRight;
  }
}

template <int kTaps, int kStride, int kQ, int kLeft, int kRight, bool kWhole>
SEPCONV_INLINE void add_row(Vector<float> (&sums)[kQ], const float* x, int64_t x_pixel, const float* w,
                            const RowPart& b) {
  Vector<float> taps[kTaps];
#pragma GCC unroll 8
  for (int s = 0; s < kTaps; ++s) taps[s] = load(w + s * kDepthwiseLanes);
#pragma GCC unroll 32
  for (int j = 0; j < (kQ - 1) * kStride + kTaps; ++j) {
    if (exists<kTaps, kStride, kQ, kLeft, kRight>(j, b)) {
      const Vector<float> value = load_lanes<kWhole>(x, b.lanes);
#pragma GCC unroll 8
      for (int q = 0; q < kQ; ++q) {
        const int s = j - q * kStride;
        if (s >= 0 && s < kTaps) add_product(sums[q], value, taps[s]);
      }
    }
    x += x_pixel;
  }
}

// Lanes of which each holds channel `kC` of its group.
template <int kGroup, int kC, int... kLane>
SEPCONV_INLINE Vector<float> spread(Vector<float> v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane / kGroup * kGroup + kC)...);
}

// What the lanes multiply with tap [.][c] at column j: x is the vector's first channel or, of wide groups, its group's.
template <int kGroup, int kC, bool kWhole>
SEPCONV_INLINE Vector<float> group_value(const float* x, int64_t c, int lanes) {
  if constexpr (kGroup == kWide) {
    return broadcast<float>(x[c]);
  } else {
    return spread<kGroup, kC>(load_lanes<kWhole>(x, lanes), std::make_integer_sequence<int, kLanes<float>>());
  }
}

template <int kTaps, int kStride, int kQ, int kLeft, int kRight, bool kWhole, int kGroup, int kC>
SEPCONV_INLINE void add_row_of_channel(Vector<float> (&sums)[kQ], const float* x, int64_t x_pixel, const float* w,
                                       const RowPart& b, int64_t c, int64_t group) {
  Vector<float> taps[kTaps];
#pragma GCC unroll 8
  for (int s = 0; s < kTaps; ++s) taps[s] = load(w + (s * group + c) * kDepthwiseLanes);
#pragma GCC unroll 32
  for (int j = 0; j < (kQ - 1) * kStride + kTaps; ++j) {
    if (exists<kTaps, kStride, kQ, kLeft, kRight>(j, b)) {
      const Vector<float> value = group_value<kGroup, kC, kWhole>(x, c, b.lanes);
#pragma GCC unroll 8
      for (int q = 0; q < kQ; ++q) {
        const int s = j - q * kStride;
        if (s >= 0 && s < kTaps) sums[q] += value * taps[s];
      }
    }
    x += x_pixel;
  }
}

template <int kQ, bool kWhole, int kGroup, int kC>
SEPCONV_INLINE void add_row_of_channel_generic(Vector<float> (&sums)[kQ], const float* x, int64_t x_pixel,
                                               const float* w, const RowPart& b, const DepthwiseShape& s, int64_t c) {
  for (int64_t tap = 0; tap < s.S; ++tap) {
    const Vector<float> factor = load(w + (tap * s.group + c) * kDepthwiseLanes);
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) {
      const int64_t j = q * s.stride_w + tap * s.dilation_w;
      if (j >= b.from && j < b.to) sums[q] += group_value<kGroup, kC, kWhole>(x + j * x_pixel, c, b.lanes) * factor;
    }
  }
}

// The channels of a group after each other. kTaps 0: any number of taps, stride and dilation.
template <int kTaps, int kStride, int kQ, int kLeft, int kRight, bool kWhole, int kGroup, int... kC>
SEPCONV_INLINE void add_row_of_group(Vector<float> (&sums)[kQ], const float* x, int64_t x_pixel, const float* w,
                                     const RowPart& b, const DepthwiseShape& s, std::integer_sequence<int, kC...>) {
  if constexpr (kGroup == kWide) {
    for (int64_t c = 0; c < s.group; ++c) {
      if constexpr (kTaps > 0) {
        add_row_of_channel<kTaps, kStride, kQ, kLeft, kRight, kWhole, kWide, 0>(sums, x, x_pixel, w, b, c, s.group);
      } else {
        add_row_of_channel_generic<kQ, kWhole, kWide, 0>(sums, x, x_pixel, w, b, s, c);
      }
    }
  } else if constexpr (kTaps > 0) {
    (add_row_of_channel<kTaps, kStride, kQ, kLeft, kRight, kWhole, kGroup, kC>(sums, x, x_pixel, w, b, kC, kGroup),
     ...);
  } else {
    (add_row_of_channel_generic<kQ, kWhole, kGroup, kC>(sums, x, x_pixel, w, b, s, kC), ...);
  }
}

// Any number of taps, stride and dilation.
template <int kQ, bool kWhole>
SEPCONV_INLINE void add_row_generic(Vector<float> (&sums)[kQ], const float* x, int64_t x_pixel, const float* w,
                                    const RowPart& b, const DepthwiseShape& s) {
  for (int64_t tap = 0; tap < s.S; ++tap) {
    const Vector<float> factor = load(w + tap * kDepthwiseLanes);
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) {
      const int64_t j = q * s.stride_w + tap * s.dilation_w;
      if (j >= b.from && j < b.to) sums[q] += load_lanes<kWhole>(x + j * x_pixel, b.lanes) * factor;
    }
  }
}

__attribute__((noinline)) inline void activate_values(Activation activation, float* values, int count) {
  activate_rows_by_name(activation, values, 0, 1, count, std::make_integer_sequence<int, kActivationCount>{});
}

template <int kQ, bool kWhole>
SEPCONV_INLINE void finish_row(const DepthwiseRows& d, Vector<float> (&sums)[kQ], const RowPart& b, float* y,
                               Vector<float>& total) {
  constexpr int L = kLanes<float>;
  if (is_clamp(d.activation)) {
    const float most = highest(d.activation);
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) sums[q] = clamp_lanes<float>(sums[q], most);
  } else if (d.activation == Activation::silu) {  // in registers, as the next: a call costs a tenth of the convolution
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) sums[q] = activate_lanes<float>(Activation::silu, sums[q]);
  } else if (d.activation == Activation::hardswish) {
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) sums[q] = activate_lanes<float>(Activation::hardswish, sums[q]);
  } else if (d.activation != Activation::identity) {
    float values[kQ * L];
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) store(values + q * L, sums[q]);
    activate_values(d.activation, values, kQ * L);
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) sums[q] = load(values + q * L);
  }
  if (kWhole && b.count == kQ && (d.sums == nullptr || b.fresh == 0)) {
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) store(y + q * d.y_pixel, sums[q]);
    if (d.sums == nullptr) return;
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) total += sums[q];
    return;
  }
#pragma GCC unroll 8
  for (int q = 0; q < kQ; ++q) {
    if (q < b.count) {
      if (kWhole) {
        store(y, sums[q]);
      } else {
        store_first(y, sums[q], b.lanes);
      }
      if (q >= b.fresh) total += sums[q];
    }
    y += d.y_pixel;
  }
}
