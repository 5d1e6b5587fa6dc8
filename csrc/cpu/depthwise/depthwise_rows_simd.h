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
inline constexpr int kAsPartSays = -1;   // instead of a number of columns
// Vectors of channels that pass over a block of columns one after another, in the order of memory. A vector of half a
// cache line would else bring each line twice, and the lines of one vector are far apart: they share few of the
// first-level cache's sets, and the processor fetches none of them ahead by itself. Weights of up to 36 KiB; with
// AVX-512, whose vector is a whole line, those of many taps would take more room than the order is worth.
inline constexpr int kVectorsTogether = 64, kVectorsOfManyTaps = SEPCONV_ISA_LEVEL == 2 ? 4 : kVectorsTogether;
inline constexpr int64_t kFewTaps = 9;

#include "cpu/depthwise/depthwise_row_sums_simd.h"

// A block of one output row, whose first kernel row is `row` of the image, and `place` of the ring where it is inside.
// kTaps 0: any number.
template <int kTaps, int kStride, int kQ, int kLeft, int kRight, bool kWhole, int kGroup>
SEPCONV_INLINE void row_block(const DepthwiseRows& d, int64_t c, int64_t row, int64_t place, int64_t column,
                              const RowPart& b, float* y, Vector<float>& total) {
  const DepthwiseShape& s = *d.shape;
  const Vector<float> bias = d.bias == nullptr ? Vector<float>{} : load_lanes<kWhole>(d.bias + c, b.lanes);
  Vector<float> sums[kQ];
#pragma GCC unroll 8
  for (int q = 0; q < kQ; ++q) sums[q] = bias;
  const float* x = d.x + column * d.x_pixel + (kGroup == kWide ? c / s.group * s.group : c);
  const int64_t line = s.S * s.group * kDepthwiseLanes;
  const float* w = d.packed + c / kDepthwiseLanes * s.R * line + c % kDepthwiseLanes;
  for (int64_t r = 0; r < s.R; ++r, row += s.dilation_h, place += s.dilation_h, w += line) {
    if (row < 0 || row >= s.H) continue;
    const float* from = x + (place < d.ring ? place : place - d.ring) * d.x_row;
    if constexpr (kGroup == kWide) {  // each kernel row by itself: longer sums are less exact
      Vector<float> line_sums[kQ] = {};
      add_row_of_group<kTaps, kStride, kQ, kLeft, kRight, kWhole, kWide>(line_sums, from, d.x_pixel, w, b, s,
                                                                         std::make_integer_sequence<int, 0>());
#pragma GCC unroll 8
      for (int q = 0; q < kQ; ++q) sums[q] += line_sums[q];
    } else if constexpr (kGroup > 1) {
      add_row_of_group<kTaps, kStride, kQ, kLeft, kRight, kWhole, kGroup>(sums, from, d.x_pixel, w, b, s,
                                                                          std::make_integer_sequence<int, kGroup>());
    } else if constexpr (kTaps > 0) {
      add_row<kTaps, kStride, kQ, kLeft, kRight, kWhole>(sums, from, d.x_pixel, w, b);
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

// A block of columns of output row p, for some vectors of channels from c on.
struct BlockPlace {
  int64_t p, row, place, q, column;  // of the output; the first kernel row's; the output's; the first tap's
};
// The same of whole vectors, where the kernel's rows and what a vector needs of them are found once for all vectors: a
// vector's 63 multiply-adds take 32 ticks, in which the processor looks ahead no more than to the next one.
inline constexpr int kMostLines = 8;
template <int kTaps, int kStride, int kQ, int kLeft, int kRight>
void block_of_whole_vectors(const DepthwiseRows& d, int64_t c, int vectors, const BlockPlace& at, const RowPart& b,
                            Vector<float>* totals) {
  constexpr int64_t L = kLanes<float>;
  const DepthwiseShape& s = *d.shape;
  const float* lines[kMostLines];
  int64_t count = 0, skipped = 0;
  for (int64_t r = 0; r < s.R; ++r) {
    const int64_t row = at.row + r * s.dilation_h, place = at.place + r * s.dilation_h;
    if (row < 0) ++skipped;
    if (row < 0 || row >= s.H) continue;
    lines[count++] = d.x + (place < d.ring ? place : place - d.ring) * d.x_row + at.column * d.x_pixel + c;
  }
  const int64_t x_pixel = d.x_pixel, line = kTaps * kDepthwiseLanes, panel = s.R * line;
  const float* w = d.packed + c / kDepthwiseLanes * panel + skipped * line;
  const float* bias = d.bias == nullptr ? nullptr : d.bias + c;
  float* y = d.y + at.p * d.y_row + at.q * d.y_pixel + c;
  const bool far = d.far;
  for (int64_t v = 0; v < vectors; ++v) {
    if (far && v % (kDepthwiseLanes / L) == 0) fetch_next_row(d, c + v * L, at.row, at.column, b.count * kStride);
    Vector<float> sums[kQ];
    const Vector<float> first = bias == nullptr ? Vector<float>{} : load(bias + v * L);
#pragma GCC unroll 8
    for (int q = 0; q < kQ; ++q) sums[q] = first;
    const float* taps = w + v * L / kDepthwiseLanes * panel + v * L % kDepthwiseLanes;
    for (int64_t r = 0; r < count; ++r, taps += line) {
      add_row<kTaps, kStride, kQ, kLeft, kRight, true>(sums, lines[r] + v * L, x_pixel, taps, b);
    }
    finish_row<kQ, true>(d, sums, b, y + v * L, totals[v]);
  }
}

template <int kTaps, int kStride, int kQ, int kLeft, int kRight, bool kWhole, int kGroup>
void block_of_vectors(const DepthwiseRows& d, int64_t c, int vectors, const BlockPlace& at, const RowPart& b,
                      Vector<float>* totals) {
  constexpr int64_t L = kLanes<float>;
  if constexpr (SEPCONV_ISA_LEVEL > 0 && kTaps > 0 && kLeft != kAsPartSays && kWhole && kGroup == 1) {
    if (d.shape->R <= kMostLines && c % kDepthwiseLanes == 0) {
      return block_of_whole_vectors<kTaps, kStride, kQ, kLeft, kRight>(d, c, vectors, at, b, totals);
    }
  }
  float* y = d.y + at.p * d.y_row + at.q * d.y_pixel + c;
  for (int v = 0; v < vectors; ++v, c += L, y += L) {
    if (d.far && c % kDepthwiseLanes == 0) {
      fetch_next_row(d, c, at.row, at.column, b.count * d.shape->stride_w);
    }
    row_block<kTaps, kStride, kQ, kLeft, kRight, kWhole, kGroup>(d, c, at.row, at.place, at.column, b, y, totals[v]);
  }
}

// The same for a wide block: which of its columns exist is known to the compiler where all do, and where a
// padding of half a kernel is at an end. Half of the blocks of 14 columns are such, and all of 7.
template <int kTaps, int kStride, bool kWhole, int kGroup>
void wide_block_of_vectors(const DepthwiseRows& d, int64_t c, int vectors, const BlockPlace& at, const RowPart& b,
                           Vector<float>* totals) {
  constexpr int kQ = kRowPixels;
  if constexpr (kTaps > 0 && kWhole) {
    constexpr int kSpan = (kQ - 1) * kStride + kTaps, kPad = kTaps / 2, kBehind = kStride == 1 ? kPad : kPad - 1;
    const bool whole_left = b.from <= 0, whole_right = b.to >= kSpan;
    if (whole_left && whole_right) {
      return block_of_vectors<kTaps, kStride, kQ, 0, 0, kWhole, kGroup>(d, c, vectors, at, b, totals);
    }
    if constexpr (kGroup == 1 && (SEPCONV_ISA_LEVEL == 1 || (SEPCONV_ISA_LEVEL == 2 && (kTaps == 3 || kStride == 1)))) {
      const bool pad_left = b.from == kPad, pad_right = b.to == kSpan - kBehind;
      if (pad_left && whole_right) {
        return block_of_vectors<kTaps, kStride, kQ, kPad, 0, kWhole, kGroup>(d, c, vectors, at, b, totals);
      }
      if (whole_left && pad_right) {
        return block_of_vectors<kTaps, kStride, kQ, 0, kBehind, kWhole, kGroup>(d, c, vectors, at, b, totals);
      }
      if (pad_left && pad_right) {
        return block_of_vectors<kTaps, kStride, kQ, kPad, kBehind, kWhole, kGroup>(d, c, vectors, at, b, totals);
      }
    }
  }
  block_of_vectors<kTaps, kStride, kQ, kAsPartSays, 0, kWhole, kGroup>(d, c, vectors, at, b, totals);
}

// Output rows [p0, p1) of some vectors of channels from c on, one after another in each block of columns.
template <int kTaps, int kStride, bool kWhole, int kGroup>
void rows_of_vectors(const DepthwiseRows& d, int64_t c, int vectors, int lanes, int64_t p0, int64_t p1) {
  constexpr int64_t L = kLanes<float>;
  const DepthwiseShape& s = *d.shape;
  RowPart b;
  b.lanes = lanes;
  BlockPlace at;
  for (at.p = p0; at.p < p1; ++at.p) {
    at.row = at.p * s.stride_h - s.pad_h, at.place = at.row < d.ring ? at.row : at.row % d.ring;
    Vector<float> totals[kVectorsTogether];
    for (int v = 0; v < vectors; ++v) totals[v] = Vector<float>{};
    for (int64_t next = 0; next < s.Q;) {
      const int64_t left = s.Q - next;
      const bool wide = left > kNarrowPixels;
      const int columns = wide ? kRowPixels : kNarrowPixels;
      // The last block overlaps the one before it.
      at.q = left < columns && s.Q >= columns ? s.Q - columns : next;
      b.count = static_cast<int>(std::min<int64_t>(columns, s.Q - at.q)), b.fresh = static_cast<int>(next - at.q);
      next = at.q + b.count;
      at.column = at.q * s.stride_w - s.pad_w;
      b.from = -at.column, b.to = s.W - at.column;
      if (wide) {
        wide_block_of_vectors<kTaps, kStride, kWhole, kGroup>(d, c, vectors, at, b, totals);
      } else {
        block_of_vectors<kTaps, kStride, kNarrowPixels, kAsPartSays, 0, kWhole, kGroup>(d, c, vectors, at, b, totals);
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
  if (s.dilation_w == 1 && s.stride_w == 1) {  // 1 and 2: what a phase of a strided gradient sees of 3
    if (s.S == 1) return rows_of_vectors<1, 1, kWhole, kGroup>;
    if (s.S == 2) return rows_of_vectors<2, 1, kWhole, kGroup>;
    if (s.S == 3) return rows_of_vectors<3, 1, kWhole, kGroup>;
  }
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
  const int64_t together = d.shape->R * d.shape->S > kFewTaps ? kVectorsOfManyTaps : kVectorsTogether;
  const int64_t most = d.shape->group == 1 ? together : 1;  // weights of groups are larger
  int64_t c = 0;
  while (c + L <= d.channels) {
    const int vectors = static_cast<int>(std::min(most, (d.channels - c) / L));
    whole(d, c, vectors, L, p0, p1);
    c += vectors * L;
  }
  if (c < d.channels) rows_function<false> (*d.shape)(d, c, 1, static_cast<int>(d.channels - c), p0, p1);
}
