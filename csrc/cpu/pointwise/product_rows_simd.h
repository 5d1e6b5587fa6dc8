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

// What is fetched beside a block's terms: some floats from an address on, a line with each term or few; or nothing.
struct Fetched {
  const float* from = nullptr;
  int64_t count = 0;
  // The lines of part `part` of `parts`.
  Fetched share(int64_t part, int64_t parts) const {
    const int64_t lines = ceil_div(count, kPanelColumns), begin = lines * part / parts;
    return {from + begin * kPanelColumns, (lines * (part + 1) / parts - begin) * kPanelColumns};
  }
};

// Pixels in blocks of multiply_blocks(), outputs [0, columns): each block meets all of these.
inline void multiply_in_blocks(const Factors& x, const Panels& w, const Outputs& y, int64_t pixels, int64_t columns,
                               const Ahead& ahead) {
  const Pieces pieces(pixels, kRows);
  const int64_t larger = pieces.larger * (pieces.size + 1);
  if (pieces.larger > 0) multiply_dense_rows(x, w, y, pieces.size + 1, pieces.larger, columns, ahead);
  if (larger == pixels) return;
  const Ahead further{ahead.from + pieces.larger * ahead.per_block, ahead.per_block, ahead.per_step};
  multiply_dense_rows(x.from(larger), w, y.from(larger, 0), pieces.size, pieces.count - pieces.larger, columns,
                      further);
}

// What follows at `from`, shared by the blocks of so many pixels and the steps of so many columns.
inline Ahead shared(const Fetched& fetched, int64_t pixels, int64_t columns) {
  const int64_t blocks = ceil_div(pixels, kRows), steps = ceil_div(columns, kPanelColumns);
  return {fetched.from, fetched.count / blocks, fetched.count / (blocks * steps)};
}

// Each panel meets all pixels, while the next one is fetched.
inline void multiply_panels(const Factors& x, const Panels& w, const Outputs& y, int64_t pixels, int64_t begin,
                            int64_t end) {
  for (int64_t k = begin; k < end; k += kPanelColumns) {
    const Panels panel = w.from(k);
    const Fetched next{panel.data + panel.distance(), panel.terms * kPanelColumns};
    multiply_in_blocks(x, panel, y.from(0, k), pixels, std::min(end - k, kPanelColumns),
                       shared(next, pixels, kPanelColumns));
  }
}

// One block: pixels [0, pixels), outputs [begin, end). A block of few pixels that meets all of a near weight fetches
// `next`, where that is something, a share with each panel; other blocks the next panels.
inline void multiply_pixels(const Factors& x, const Panels& w, const Outputs& y, int64_t pixels, int64_t begin,
                            int64_t end, const Fetched& next = {}) {
  if constexpr (SEPCONV_ISA_LEVEL == 1) {
    if (are_dense(x, pixels)) return multiply_panels(x, w, y, pixels, begin, end);
  }
  const Pieces pieces(pixels, kRows);
  const bool fetches_next = next.from != nullptr && pieces.count == 1;
  const int64_t step = columns_of(pixels), steps = fetches_next ? ceil_div(end - begin, step) : 1;
  const Shares shares = fetches_next ? Shares(ceil_div(next.count, kPanelColumns), steps, w.terms)
                                     : Shares(step / kPanelColumns * w.terms, pieces.count, w.terms);
  for (int64_t k = begin; k < end; k += step) {
    const int64_t columns = std::min(step, end - k);
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      const int64_t i = pieces.begin(piece);
      const Panels panels = fetches_next ? w.from(k).before(next.from, shares, (k - begin) / step)
                                         : w.from(k).before(step, shares, piece);
      multiply(x.from(i), panels, y.from(i, k), pieces.begin(piece + 1) - i, columns);
    }
  }
}

// The pixels from `next` on, where they are worth fetching: those between them too, which a stride of two leaves out,
// where pixels are so narrow that the processor itself sees no stream in them.
inline Fetched next_pixels(const Factors& x, const Panels& w, const float* next, int64_t pixels) {
  constexpr int64_t kNarrow = 96;
  const bool dense = x.row < 2 * w.terms || (x.row == 2 * w.terms && w.terms <= kNarrow);
  return next != nullptr && x.term == 1 && dense ? Fetched{next, pixels * x.row} : Fetched{};
}

// Whether so many pixels are better read from a copy: at a distance of whole pages their lines fall into one set of the
// first-level cache, which has room for fewer of them than a block has.
inline bool share_sets(const Factors& x, int64_t pixels, int64_t columns) {
  constexpr int64_t kPage = 4096 / sizeof(float), kWays = 8, kWorthACopy = 256;
  return SEPCONV_ISA_LEVEL == 2 && pixels > kWays && x.row % kPage == 0 && x.row > 0 && columns >= kWorthACopy;
}
// From pixel to pixel of a copy: an odd number of cache lines.
inline int64_t spread_pitch(int64_t terms) { return (ceil_div(terms, kPanelColumns) | 1) * kPanelColumns; }
inline Factors spread(const Factors& x, int64_t terms, int64_t pixels, ThreadScratch& scratch) {
  const int64_t pitch = spread_pitch(terms);
  float* const to = scratch.take(pixels * pitch);
  for (int64_t i = 0; i < pixels; ++i) std::memcpy(to + i * pitch, x.data + i * x.row, terms * sizeof(float));
  return {to, pitch, 1};
}

// Pixels [0, pixels) in blocks, outputs [0, K). `far`: what is fetched instead of the next block's pixels, in small
// blocks, so that the weight has to be near.
inline void multiply_all(const Factors& x, const Panels& w, const Outputs& y, int64_t pixels, int64_t K,
                         const Fetched& far = {}) {
  const int64_t most = far.from != nullptr ? kRows : block_pixels(w.terms, K, pixels);
  if constexpr (SEPCONV_ISA_LEVEL == 1) {
    if (most == kRows && are_dense(x, pixels)) {
      const Fetched next{x.from(kRows).data, pixels * x.row};
      return multiply_in_blocks(x, w, y, pixels, K, shared(far.from != nullptr ? far : next, pixels, K));
    }
  }
  const Pieces blocks(pixels, most);
  ThreadScratch scratch(ScratchUse::pixels);
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t first = blocks.begin(i), after = blocks.begin(i + 1);
    const float* next = after < pixels ? x.from(after).data : nullptr;
    const Fetched fetched = far.from != nullptr ? far.share(i, blocks.count) : next_pixels(x, w, next, after - first);
    Factors rows = x.from(first);
    if (x.term == 1 && share_sets(x, after - first, K)) rows = spread(rows, w.terms, after - first, scratch);
    multiply_pixels(rows, w, y.from(first, 0), after - first, 0, K, fetched);
  }
}
