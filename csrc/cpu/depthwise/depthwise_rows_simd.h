// Depthwise convolution of some output rows of one image of float32, or one in groups of a few channels, with a weight
// packed once (depthwise_rows.h). Like simd.h, read once for each instruction set by the files that need it, after
// product_simd.h: hence no include guard and no include.
//
// Loop-to-data map. Lanes are neighbouring channels. The loops go: some vectors of channels, output row, block of
// neighbouring output columns, vector of channels, kernel row. The sums of a block stay in registers while the taps
// pass; an input vector is loaded once for each kernel row and feeds every sum that sees it. A single vector, going
// down the rows, finds all but the newest input rows in the first-level cache; many read the same pixels in the order
// of memory. The band of rows is expected in the second-level cache. Rows and columns outside the image are skipped:
// nothing is padded or copied.
//
// Of groups every lane's sum takes the channels of its own group, one after another: from the vector itself, whose
// lanes are moved, where several groups share it (kGroup channels each); by broadcasts where a group is as wide as
// vectors or wider (kWide).
//
// Floor: R x S multiply-adds an output, times the channels of a group, at the rate of the registers.

inline constexpr int kWide = 0;          // instead of a number of channels
inline constexpr int kRowPixels = 7;     // sums of a block: 7 divides 7, 14, 28, 56 and 112
inline constexpr int kNarrowPixels = 4;  // where fewer columns are left
// Vectors of channels that pass over a block of columns one after another. A vector of half a cache line would else
// bring each line twice, and the lines of one vector share few of the first-level cache's sets. Weights of 18 KiB.
inline constexpr int kVectorsTogether = SEPCONV_ISA_LEVEL == 2 ? 1 : 64;

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

template <int kTaps, int kStride, int kQ, bool kInside, bool kWhole>
SEPCONV_INLINE void add_row(Vector<float> (&sums)[kQ], const float* x, int64_t x_pixel, const float* w,
                            const RowPart& b) {
  Vector<float> taps[kTaps];
#pragma GCC unroll 8
  for (int s = 0; s < kTaps; ++s) taps[s] = load(w + s * kDepthwiseLanes);
#pragma GCC unroll 32
  for (int j = 0; j < (kQ - 1) * kStride + kTaps; ++j) {
    if (kInside || (j >= b.from && j < b.to)) {
      const Vector<float> value = load_lanes<kWhole>(x, b.lanes);
#pragma GCC unroll 8
      for (int q = 0; q < kQ; ++q) {
        const int s = j - q * kStride;
        if (s >= 0 && s < kTaps) sums[q] += value * taps[s];
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

template <int kTaps, int kStride, int kQ, bool kInside, bool kWhole, int kGroup, int kC>
SEPCONV_INLINE void add_row_of_channel(Vector<float> (&sums)[kQ], const float* x, int64_t x_pixel, const float* w,
                                       const RowPart& b, int64_t c, int64_t group) {
  Vector<float> taps[kTaps];
#pragma GCC unroll 8
  for (int s = 0; s < kTaps; ++s) taps[s] = load(w + (s * group + c) * kDepthwiseLanes);
#pragma GCC unroll 32
  for (int j = 0; j < (kQ - 1) * kStride + kTaps; ++j) {
    if (kInside || (j >= b.from && j < b.to)) {
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
template <int kTaps, int kStride, int kQ, bool kInside, bool kWhole, int kGroup, int... kC>
SEPCONV_INLINE void add_row_of_group(Vector<float> (&sums)[kQ], const float* x, int64_t x_pixel, const float* w,
                                     const RowPart& b, const DepthwiseShape& s, std::integer_sequence<int, kC...>) {
  if constexpr (kGroup == kWide) {
    for (int64_t c = 0; c < s.group; ++c) {
      if constexpr (kTaps > 0) {
        add_row_of_channel<kTaps, kStride, kQ, kInside, kWhole, kWide, 0>(sums, x, x_pixel, w, b, c, s.group);
      } else {
        add_row_of_channel_generic<kQ, kWhole, kWide, 0>(sums, x, x_pixel, w, b, s, c);
      }
    }
  } else if constexpr (kTaps > 0) {
    (add_row_of_channel<kTaps, kStride, kQ, kInside, kWhole, kGroup, kC>(sums, x, x_pixel, w, b, kC, kGroup), ...);
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

// A block of one output row, whose first kernel row is `row` of the image. kTaps 0: any number.
template <int kTaps, int kStride, int kQ, bool kInside, bool kWhole, int kGroup>
SEPCONV_INLINE void row_block(const DepthwiseRows& d, int64_t c, int64_t row, int64_t column, const RowPart& b,
                              float* y, Vector<float>& total) {
  const DepthwiseShape& s = *d.shape;
  const Vector<float> bias = d.bias == nullptr ? Vector<float>{} : load_lanes<kWhole>(d.bias + c, b.lanes);
  Vector<float> sums[kQ];
#pragma GCC unroll 8
  for (int q = 0; q < kQ; ++q) sums[q] = bias;
  const float* x = d.x + column * d.x_pixel + (kGroup == kWide ? c / s.group * s.group : c);
  const int64_t line = s.S * s.group * kDepthwiseLanes;
  const float* w = d.packed + c / kDepthwiseLanes * s.R * line + c % kDepthwiseLanes;
  for (int64_t r = 0; r < s.R; ++r, row += s.dilation_h, w += line) {
    if (row < 0 || row >= s.H) continue;
    const float* from = x + (row < d.ring ? row : row % d.ring) * d.x_row;
    if constexpr (kGroup == kWide) {  // each kernel row by itself: longer sums are less exact
      Vector<float> line_sums[kQ] = {};
      add_row_of_group<kTaps, kStride, kQ, kInside, kWhole, kWide>(line_sums, from, d.x_pixel, w, b, s,
                                                                   std::make_integer_sequence<int, 0>());
#pragma GCC unroll 8
      for (int q = 0; q < kQ; ++q) sums[q] += line_sums[q];
    } else if constexpr (kGroup > 1) {
      add_row_of_group<kTaps, kStride, kQ, kInside, kWhole, kGroup>(sums, from, d.x_pixel, w, b, s,
                                                                    std::make_integer_sequence<int, kGroup>());
    } else if constexpr (kTaps > 0) {
      add_row<kTaps, kStride, kQ, kInside, kWhole>(sums, from, d.x_pixel, w, b);
    } else {
      add_row_generic<kQ, kWhole>(sums, from, d.x_pixel, w, b, s);
    }
  }
  finish_row<kQ, kWhole>(d, sums, b, y, total);
}

// Fetches what output row p + 1 is the first to need of the columns from `column` on.
inline void fetch_next_row(const DepthwiseRows& d, int64_t c, int64_t row, int64_t column, int64_t columns) {
  const DepthwiseShape& s = *d.shape;
  const int64_t first = row + (s.R - 1) * s.dilation_h + 1, last = std::min(first + s.stride_h, s.H);
  for (int64_t next = std::max<int64_t>(first, 0); next < last; ++next) {
    const float* line = d.x + (next < d.ring ? next : next % d.ring) * d.x_row + c;
    for (int64_t j = std::max<int64_t>(column, 0); j < std::min(column + columns, s.W); ++j) {
      __builtin_prefetch(line + j * d.x_pixel);
    }
  }
}

// Output rows [p0, p1) of some vectors of channels from c on, one after another in each block of columns.
template <int kTaps, int kStride, bool kWhole, int kGroup>
void rows_of_vectors(const DepthwiseRows& d, int64_t c, int vectors, int lanes, int64_t p0, int64_t p1) {
  constexpr int64_t L = kLanes<float>;
  const DepthwiseShape& s = *d.shape;
  RowPart b;
  b.lanes = lanes;
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t row = p * s.stride_h - s.pad_h;
    Vector<float> totals[kVectorsTogether];
    for (int v = 0; v < vectors; ++v) totals[v] = Vector<float>{};
    for (int64_t next = 0; next < s.Q;) {
      const int64_t left = s.Q - next;
      const bool wide = left > kNarrowPixels;
      const int columns = wide ? kRowPixels : kNarrowPixels;
      // The last block overlaps the one before it.
      const int64_t q = left < columns && s.Q >= columns ? s.Q - columns : next;
      b.count = static_cast<int>(std::min<int64_t>(columns, s.Q - q)), b.fresh = static_cast<int>(next - q);
      next = q + b.count;
      const int64_t column = q * s.stride_w - s.pad_w;
      b.from = -column, b.to = s.W - column;
      const bool inside = b.from <= 0 && b.to >= (kRowPixels - 1) * kStride + kTaps;
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = c + v * L;
        float* const y = d.y + p * d.y_row + q * d.y_pixel + at;
        if (d.far && at % kDepthwiseLanes == 0) fetch_next_row(d, at, row, column, b.count * s.stride_w);
        if (!wide) {
          row_block<kTaps, kStride, kNarrowPixels, false, kWhole, kGroup>(d, at, row, column, b, y, totals[v]);
        } else if (kTaps > 0 && kWhole && inside) {
          row_block<kTaps, kStride, kRowPixels, kTaps != 0, kWhole, kGroup>(d, at, row, column, b, y, totals[v]);
        } else {
          row_block<kTaps, kStride, kRowPixels, false, kWhole, kGroup>(d, at, row, column, b, y, totals[v]);
        }
      }
    }
    for (int v = 0; d.sums != nullptr && v < vectors; ++v) {
      float* const sums = d.sums + c + v * L;
      store_first(sums, load_lanes<kWhole>(sums, lanes) + totals[v], lanes);
    }
  }
}

using RowsOfVectors = void (*)(const DepthwiseRows&, int64_t, int, int, int64_t, int64_t);

template <bool kWhole, int kGroup>
RowsOfVectors grouped_function(const DepthwiseShape& s) {
  if (s.dilation_w == 1 && s.S == 3 && s.stride_w == 1) return rows_of_vectors<3, 1, kWhole, kGroup>;
  if (s.dilation_w == 1 && s.S == 3 && s.stride_w == 2) return rows_of_vectors<3, 2, kWhole, kGroup>;
  return rows_of_vectors<0, 0, kWhole, kGroup>;
}

template <bool kWhole>
RowsOfVectors rows_function(const DepthwiseShape& s) {
  constexpr int L = kLanes<float>;
  if (s.group >= L) return grouped_function<true, kWide>(s);  // whole vectors, all of them
  if (L > 2 && s.group == 2) return grouped_function<kWhole, 2>(s);
  if (L > 4 && s.group == 4) return grouped_function<kWhole, (L > 4 ? 4 : kWide)>(s);
  if (L > 8 && s.group == 8) return grouped_function<kWhole, (L > 8 ? 8 : kWide)>(s);
  if (s.dilation_w == 1) {
    switch (s.S * 2 + s.stride_w) {
      case 7: return rows_of_vectors<3, 1, kWhole, 1>;
      case 8: return rows_of_vectors<3, 2, kWhole, 1>;
      case 11: return rows_of_vectors<5, 1, kWhole, 1>;
      case 12: return rows_of_vectors<5, 2, kWhole, 1>;
      case 15: return rows_of_vectors<7, 1, kWhole, 1>;
      default: break;
    }
  }
  return rows_of_vectors<0, 0, kWhole, 1>;
}

// Output rows [p0, p1) of all channels.
inline void rows_of_channels(const DepthwiseRows& d, int64_t p0, int64_t p1) {
  constexpr int64_t L = kLanes<float>;
  const RowsOfVectors whole = rows_function<true>(*d.shape);
  const int64_t most = d.shape->group == 1 ? kVectorsTogether : 1;  // weights of groups are larger
  int64_t c = 0;
  while (c + L <= d.channels) {
    const int vectors = static_cast<int>(std::min(most, (d.channels - c) / L));
    whole(d, c, vectors, L, p0, p1);
    c += vectors * L;
  }
  if (c < d.channels) rows_function<false> (*d.shape)(d, c, 1, static_cast<int>(d.channels - c), p0, p1);
}
