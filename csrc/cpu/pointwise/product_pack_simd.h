// Panels of product_simd.h from a matrix that lies anyhow. Read by the same files, after transpose_simd.h.

struct Source {
  const float* data;
  int64_t lane, term;  // strides in elements
  const float* at(int64_t l, int64_t t) const { return data + l * lane + t * term; }
};

// Columns and terms of a source whose terms are dense: squares are transposed in registers.
inline void pack_rows(const Source& from, int64_t lanes, int64_t terms, float* to) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t t = 0; t < terms; t += L) {
    const int count = static_cast<int>(std::min(L, terms - t));
    for (int64_t l = 0; l < kPanelColumns; l += L) {
      Vector<float> square[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) {
        if (l + i >= lanes) {
          square[i] = Vector<float>{};
        } else {
          square[i] = count == L ? load(from.at(l + i, t)) : load_first(from.at(l + i, t), count);
        }
      }
      transpose<float>(square);
      for (int i = 0; i < count; ++i) store(to + (t + i) * kPanelColumns + l, square[i]);
    }
  }
}

// The same of a source whose lanes are dense.
inline void pack_lines(const Source& from, int64_t lanes, int64_t terms, float* to) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t t = 0; t < terms; ++t, to += kPanelColumns) {
    for (int64_t l = 0; l < kPanelColumns; l += L) {
      const int64_t count = std::clamp<int64_t>(lanes - l, 0, L);
      store(to + l, count == L ? load(from.at(l, t)) : load_first(from.at(l, t), static_cast<int>(count)));
    }
  }
}

// One panel: `lanes` columns (1 to kPanelColumns; zeros follow) of `terms` numbers.
inline void pack_panel(const Source& from, int64_t lanes, int64_t terms, float* to) {
  if (from.lane == 1) return pack_lines(from, lanes, terms, to);
  if (from.term == 1) return pack_rows(from, lanes, terms, to);
  for (int64_t t = 0; t < terms; ++t, to += kPanelColumns) {
    for (int64_t l = 0; l < kPanelColumns; ++l) to[l] = l < lanes ? *from.at(l, t) : 0.0f;
  }
}

// Numbers of pixels that are not at one distance: `count` numbers of each pixel in [begin, end) of the grid, those of
// the next pixel `to_pixel` further on.
inline void gather(const float* image, const PixelGrid& grid, int64_t begin, int64_t end, int64_t count,
                   int64_t channel, float* to, int64_t to_pixel, int64_t to_channel) {
  for (int64_t i = begin; i < end; ++i, to += to_pixel) {
    const float* from = image + grid.offset(i);
    if (channel == 1 && to_channel == 1) {
      std::copy_n(from, count, to);
    } else {
      for (int64_t c = 0; c < count; ++c) to[c * to_channel] = from[c * channel];
    }
  }
}
