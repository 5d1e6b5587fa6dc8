// Blocks of AVX-512 whose last vector has at most 8 columns: that one is a vector of AVX2, which some processors
// multiply in half the time (Zen 4; Sapphire Rapids takes as long). Read by product_simd.h, near its end.
//
// Rows of kI factors, kV whole vectors of columns and `rest` (1 to 8) more. The sums are those of multiply_block(), in
// the same order.

inline constexpr int kHalfLanes = kLanes<float> / 2;
using HalfVector = VectorOf<float, kHalfLanes>::type;

SEPCONV_INLINE __mmask8 first_of_half(int count) { return static_cast<__mmask8>((1u << count) - 1); }
SEPCONV_INLINE HalfVector load_half(const float* p, int count) {
  return (HalfVector)_mm256_maskz_loadu_ps(first_of_half(count), p);
}

template <int kI, int kV>
struct HalfSums {
  Vector<float> whole[kI][kV > 0 ? kV : 1];
  HalfVector half[kI];
};

template <int kI, int kV>
SEPCONV_INLINE void begin_half(HalfSums<kI, kV>& sums, const Outputs& out, int rest) {
  constexpr int L = kLanes<float>;
  if constexpr (kV > 0) begin_sums(sums.whole, out, L);
  HalfVector bias{};
  if (out.column_bias != nullptr) bias = load_half(out.column_bias + kV * L, rest);
#pragma GCC unroll 14
  for (int i = 0; i < kI; ++i) {
    sums.half[i] = out.row_bias != nullptr ? out.row_bias[i] - HalfVector{} : bias;
    __builtin_prefetch(out.data + i * out.row + kV * L, 1);
  }
}

template <int kI, int kV>
SEPCONV_INLINE void end_half(HalfSums<kI, kV>& sums, const Outputs& out, int rest) {
  constexpr int L = kLanes<float>;
  if constexpr (kV > 0) finish<true>(sums.whole, out, L);
  const __mmask8 lanes = first_of_half(rest);
  if (out.residual != nullptr) {
#pragma GCC unroll 14
    for (int i = 0; i < kI; ++i) sums.half[i] += load_half(out.residual + i * out.residual_row + kV * L, rest);
  }
  if (is_clamp(out.activation)) {
    const HalfVector most = highest(out.activation) - HalfVector{};
#pragma GCC unroll 14
    for (int i = 0; i < kI; ++i) {
      const HalfVector raised = sums.half[i] < 0.0f ? HalfVector{} : sums.half[i];
      sums.half[i] = raised > most ? most : raised;
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kI; ++i) {
    _mm256_mask_storeu_ps(out.data + i * out.row + kV * L, lanes, (__m256)sums.half[i]);
  }
  if (!happens_in_registers(out.activation)) activate_block(out, kI, kV * L + rest);
}

// Terms in one run and one chain.
template <int kI, int kV>
void multiply_half(const Factors& factors, const Panels& panels, const Outputs& out, int rest) {
  constexpr int kStarts = (kI + 2) / 3;
  HalfSums<kI, kV> sums;
  begin_half(sums, out, rest);
  const int64_t row = factors.row, term = factors.term, panel = panels.distance(), further = panels.further;
  const float *starts[kStarts], *columns = panels.data, *fetched = columns + panels.ahead;
#pragma GCC unroll 5
  for (int i = 0; i < kStarts; ++i) starts[i] = factors.data + 3 * i * row;
  for (int64_t left = panels.terms; left > 0; --left) {
    Vector<float> line[kV > 0 ? kV : 1];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      line[v] = load(columns + v * panel);
      __builtin_prefetch(columns + v * panel + kPrefetchTerms * kPanelColumns);
    }
    const HalfVector last = *reinterpret_cast<const VectorOf<float, kHalfLanes>::unaligned*>(columns + kV * panel);
    __builtin_prefetch(columns + kV * panel + kPrefetchTerms * kPanelColumns);
#pragma GCC unroll 14
    for (int i = 0; i < kI; ++i) {
      const float* const from = starts[i / 3] + i % 3 * row;
      if constexpr (kV == 0) {
        sums.half[i] += (*from - HalfVector{}) * last;
      } else {
        const Vector<float> factor = broadcast<float>(*from);
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) sums.whole[i][v] += factor * line[v];
        sums.half[i] += __builtin_shufflevector(factor, factor, 0, 1, 2, 3, 4, 5, 6, 7) * last;
      }
    }
    __builtin_prefetch(fetched);
    fetched += further, columns += kPanelColumns;
#pragma GCC unroll 5
    for (int i = 0; i < kStarts; ++i) starts[i] += term;
  }
  end_half(sums, out, rest);
}

// Of more rows than kFewRows.
template <int kV, int... kI>
MultiplyBlock half_block_of_rows(int64_t rows, std::integer_sequence<int, kI...>) {
  static constexpr MultiplyBlock blocks[] = {multiply_half<kFewRows + 1 + kI, kV>...};
  return blocks[rows - kFewRows - 1];
}
inline MultiplyBlock half_block_of(int64_t rows, int64_t whole) {
  const std::make_integer_sequence<int, kRows - kFewRows> many;
  return whole == 0 ? half_block_of_rows<0>(rows, many) : half_block_of_rows<1>(rows, many);
}
