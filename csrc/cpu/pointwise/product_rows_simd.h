// Products whose rows are pixels and whose lanes are output channels, in the memory of one thread. Like simd.h, read
// once for each instruction set by the files that need it, after product_simd.h: hence no include guard and no include.
//
// Whether pixels or channels come first decides what is read again and again:
//   small weight     a block of kRows pixels meets all of the weight, which stays in the second-level cache
//   large weight     a panel of the weight meets as many pixels as stay there

inline constexpr int64_t kNearWeight = 512 << 10;  // bytes of a weight that stays in the second-level cache
inline constexpr int64_t kNearPixels = 384 << 10;  // of a block of pixels that does, beside a panel of the weight
inline constexpr int64_t kFewPixels = 200;         // for which a weight is better read once

// The pixels of a block, in a product of `pixels` by K.
inline int64_t block_pixels(int64_t C, int64_t K, int64_t pixels) {
  if (C * K * int64_t{sizeof(float)} <= kNearWeight && pixels > kFewPixels) return kRows;
  return std::max<int64_t>(4 * kRows, kNearPixels / (C * int64_t{sizeof(float)}));
}

// One block: pixels [0, pixels), outputs [begin, end). `next`: where the pixels of the next block lie, or null. A block
// of few pixels that meets all of a near weight fetches those, a share with each panel; other blocks the next panels.
inline void multiply_pixels(const Factors& x, const Panels& w, const Outputs& y, int64_t pixels, int64_t begin,
                            int64_t end, const float* next = nullptr) {
  const Pieces pieces(pixels, kRows);
  const int64_t step = columns_of(pixels), lines = ceil_div(pixels * x.row, kPanelColumns);
  const bool fetches_pixels = next != nullptr && pieces.count == 1 && x.term == 1 && x.row < 2 * w.terms;
  for (int64_t k = begin; k < end; k += step) {
    const int64_t columns = std::min(step, end - k), share = lines * (k - begin) / (end - begin) * kPanelColumns;
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      const int64_t i = pieces.begin(piece);
      const Panels panels =
          fetches_pixels ? w.from(k).before(next + share) : w.from(k).before(step, piece, pieces.count);
      multiply(x.from(i), panels, y.from(i, k), pieces.begin(piece + 1) - i, columns);
    }
  }
}

// Pixels [0, pixels) in blocks, outputs [0, K).
inline void multiply_all(const Factors& x, const Panels& w, const Outputs& y, int64_t pixels, int64_t K) {
  const Pieces blocks(pixels, block_pixels(w.terms, K, pixels));
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t first = blocks.begin(i), after = blocks.begin(i + 1);
    const float* next = after < pixels ? x.from(after).data : nullptr;
    multiply_pixels(x.from(first), w, y.from(first, 0), after - first, 0, K, next);
  }
}
