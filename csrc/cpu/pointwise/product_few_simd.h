// Products of one to four outputs: lanes are terms. Blocks of outputs would leave 12 to 15 of 16 lanes idle.
//
// Each pixel's dense terms meet each output's weight by vectors, kFewPixelsAtOnce pixels together; then the lanes of a
// sum are added. Read by product.cpp, after product_rows_simd.h.

inline constexpr int64_t kFewOutputs = 4;
inline constexpr int64_t kLeastFewTerms = 32;  // below, adding the lanes up takes as long as idle ones
inline constexpr int kFewPixelsAtOnce = 4;

inline bool has_few_outputs(int64_t K, int64_t C) {
  return SEPCONV_ISA_LEVEL > 0 && K <= kFewOutputs && C >= kLeastFewTerms * K;
}

// One output of kI pixels, from weights that lie in the order of the terms.
template <int kI>
SEPCONV_INLINE void multiply_terms(const Factors& x, const float* w, int64_t terms, const Outputs& y, int64_t k) {
  constexpr int64_t L = kLanes<float>;
  Vector<float> sums[kI] = {};
  int64_t t = 0;
  for (; t + L <= terms; t += L) {
    const Vector<float> line = load(w + t);
#pragma GCC unroll 4
    for (int i = 0; i < kI; ++i) sums[i] += load(x.data + i * x.row + t) * line;
  }
  if (t < terms) {
    const int rest = static_cast<int>(terms - t);
    const Vector<float> line = load_first(w + t, rest);
#pragma GCC unroll 4
    for (int i = 0; i < kI; ++i) sums[i] += load_first(x.data + i * x.row + t, rest) * line;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kI; ++i) {
    float sum = sum_lanes<float>(sums[i]);
    if (y.column_bias != nullptr) sum += y.column_bias[k];
    if (y.residual != nullptr) sum += y.residual[i * y.residual_row + k];
    y.data[i * y.row + k] = sum;
  }
}

// Pixels [0, pixels), outputs [0, K). `w`: their panel.
inline void multiply_few(const Factors& x, const Panels& w, const Outputs& y, int64_t pixels, int64_t K) {
  ThreadScratch scratch(ScratchUse::ring);
  float* const lines = scratch.take(K * w.terms);
  for (int64_t t = 0; t < w.terms; ++t) {
    for (int64_t k = 0; k < K; ++k) lines[k * w.terms + t] = w.data[t * kPanelColumns + k];
  }
  constexpr int64_t kI = kFewPixelsAtOnce;
  for (int64_t i = 0; i < pixels;) {
    const int64_t count = i + kI <= pixels ? kI : 1;
    const Factors from = x.from(i);
    const Outputs to = y.from(i, 0);
    for (int64_t k = 0; k < K; ++k) {
      const float* const line = lines + k * w.terms;
      if (count == kI) {
        multiply_terms<kI>(from, line, w.terms, to, k);
      } else {
        multiply_terms<1>(from, line, w.terms, to, k);
      }
    }
    if (y.activation != Activation::identity) activate_block(to, static_cast<int>(count), K);
    i += count;
  }
}
