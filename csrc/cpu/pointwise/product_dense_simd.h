// Products for AVX2 where the factors follow each other term by term, or in runs: many blocks of sums in one function.
// Read by product_simd.h, in its middle.
//
// A block of 6 x 16 sums takes 6 ticks a term, so that with 16 to 64 terms all counts that a block has beside them.

#include "cpu/pointwise/product_chain_simd.h"

// What is fetched, a line with kUnrolledTerms terms each: for block b and its step k (of kPanelColumns columns) from
// `from` + b * per_block + k * per_step on.
struct Ahead {
  const float* from;
  int64_t per_block = 0, per_step = 0;
};

// One term, the `u`th from where the pointers are: those of the first and of the fourth row.
template <int kI, int kV>
SEPCONV_INLINE void add_term(Vector<float> (&sums)[kI][kV], const float* columns, const float* low, const float* high,
                             int64_t row, int u) {
  constexpr int L = kLanes<float>;
  Vector<float> line[kV];
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) line[v] = load(columns + u * kPanelColumns + v * L);
#pragma GCC unroll 14
  for (int i = 0; i < kI; ++i) {
    const Vector<float> factor = broadcast<float>((i < 3 ? low : high)[i % 3 * row + u]);
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) add_product(sums[i][v], factor, line[v]);
  }
}

// multiply_block() where the factors' terms follow each other, one by one or in runs.
template <int kI, int kV>
SEPCONV_INLINE void multiply_dense(const Factors& factors, const float* columns, int64_t terms, const Outputs& out,
                                   int rest, const float* fetched) {
  Vector<float> sums[kI][kV], before[kI][kV];  // the latter of the chains that are done
  begin_sums(sums, out, rest);
  const int64_t row = factors.row;
  const float *low = factors.data, *high = factors.data + 3 * row;
  const int64_t* jumps = factors.jumps;
  int64_t run = jumps == nullptr ? terms : factors.run, chain = kChain;
  for (bool first = true;;) {
    int64_t count = std::min({terms, run, chain});
    terms -= count, run -= count, chain -= count;
    for (; count >= kUnrolledTerms; count -= kUnrolledTerms) {
      __builtin_prefetch(fetched);
      fetched += kPanelColumns;
#pragma GCC unroll 4
      for (int u = 0; u < kUnrolledTerms; ++u) add_term(sums, columns, low, high, row, u);
      columns += kUnrolledTerms * kPanelColumns, low += kUnrolledTerms, high += kUnrolledTerms;
    }
    for (; count > 0; --count) {
      add_term(sums, columns, low, high, row, 0);
      columns += kPanelColumns, ++low, ++high;
    }
    if (chain == 0 || terms == 0) {
      if (!first) add<kI, kV>(sums, before);
      if (terms == 0) break;
      copy<kI, kV>(sums, before);
#pragma GCC unroll 14
      for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) sums[i][v] = Vector<float>{};
      }
      first = false, chain = kChain;
    }
    if (run == 0) {
      low += *jumps, high += *jumps, ++jumps;
      run = factors.run;
    }
  }
  end_sums(sums, out, rest);
}

// The last columns, fewer than two whole vectors. Functions of their own, as what masks need would take a register
// from the sums of whole ones.
template <int kI>
__attribute__((noinline)) void multiply_tail(const Factors& rows, const float* panel, int64_t terms, const Outputs& out,
                                             int columns, const float* fetched) {
  constexpr int L = kLanes<float>;
  if (columns > L) {
    multiply_dense<kI, 2>(rows, panel, terms, out, columns - L, fetched);
  } else {
    multiply_dense<kI, 1>(rows, panel, terms, out, columns, fetched);
  }
}

#if SEPCONV_ISA_LEVEL == 1
// The same by hand, of whole vectors; of one run, or of runs in one chain (then of two vectors).
alignas(64) inline constexpr float kNoBias[kPanelColumns] = {};
template <int kI, int kV>
SEPCONV_INLINE void multiply_by_hand(const Factors& factors, const float* columns, int64_t terms, const Outputs& out,
                                     const float* fetched) {
  Vector<float> sums[kI][kV];
  for (int i = 0; i < kI; ++i) __builtin_prefetch(out.data + i * out.row, 1);
  const float* const bias = out.column_bias != nullptr ? out.column_bias : kNoBias;
  if constexpr (kV == kVectors) {
    if (factors.jumps != nullptr) {
      sum_runs(sums, bias, factors.data, factors.row, columns, terms, factors.run, factors.jumps);
      return end_sums(sums, out, kLanes<float>);
    }
  }
  sum_chain(sums, bias, factors.data, factors.row, columns, std::min(terms, kChain), fetched);
  for (int64_t t = kChain; t < terms; t += kChain) {
    Vector<float> before[kI][kV];
    copy<kI, kV>(sums, before);
    fetched += kChain / kUnrolledTerms * kPanelColumns;
    sum_chain(sums, kNoBias, factors.data + t, factors.row, columns + t * kPanelColumns, std::min(terms - t, kChain),
              fetched);
    add<kI, kV>(sums, before);
  }
  end_sums(sums, out, kLanes<float>);
}
__attribute__((noinline)) inline void multiply_two_tails(const Factors& rows, const float* panel, int64_t terms,
                                                         const Outputs& out, const float* fetched) {
  multiply_by_hand<2 * kRows, 1>(rows, panel, terms, out, fetched);
}
#endif

// `blocks` times kI rows, columns [0, columns), all in one function: a block's entry counts where it has few terms, and
// so the processor begins with one block while the former one ends. By hand, a single vector that is left over is
// multiplied for two blocks at once. Where the outputs are is kept in numbers of their own: a copied struct is written
// in parts and read as a whole, for which the processor waits until it is in the cache.
template <int kI>
__attribute__((noinline)) void multiply_blocks(const Factors& factors, const Panels& panels, const Outputs& out,
                                               int64_t blocks, int64_t columns, const Ahead& ahead) {
  [[maybe_unused]] const bool one_run = factors.jumps == nullptr;
  [[maybe_unused]] const bool by_hand = kI == kRows && out.row_bias == nullptr && (one_run || panels.terms <= kChain);
  const int rest = static_cast<int>(columns % kPanelColumns);
  for (int64_t b = 0; b < blocks; ++b) {
    const Factors rows = factors.from(b * kI);
    const Outputs first = out.from(b * kI, 0);
    float* data = first.data;
    const float *residual = first.residual, *bias = first.column_bias;
    const float *panel = panels.data, *fetched = ahead.from + b * ahead.per_block;
    for (int64_t k = kPanelColumns; k <= columns; k += kPanelColumns) {
      const Outputs to{data, out.row, residual, out.residual_row, first.row_bias, bias, out.activation};
#if SEPCONV_ISA_LEVEL == 1
      if (kI == kRows && by_hand) {
        multiply_by_hand<kRows, kVectors>(rows, panel, panels.terms, to, fetched);
      } else
#endif
        multiply_dense<kI, kVectors>(rows, panel, panels.terms, to, kLanes<float>, fetched);
      panel += panels.distance(), fetched += ahead.per_step, data += kPanelColumns;
      if (residual != nullptr) residual += kPanelColumns;
      if (bias != nullptr) bias += kPanelColumns;
    }
    if (rest == 0) continue;
    const Outputs to{data, out.row, residual, out.residual_row, first.row_bias, bias, out.activation};
#if SEPCONV_ISA_LEVEL == 1
    if (by_hand && one_run && rest == kLanes<float> && (b % 2 == 1 || b + 1 < blocks)) {
      if (b % 2 == 1) multiply_two_tails(factors.from((b - 1) * kI), panel, panels.terms, to.from(-kI, 0), fetched);
      continue;
    }
#endif
    multiply_tail<kI>(rows, panel, panels.terms, to, rest, fetched);
  }
}

// Whether multiply_blocks() does so: of few rows, sums would wait for each other's multiply-adds.
inline bool are_dense(const Factors& factors, int64_t rows) {
  return SEPCONV_ISA_LEVEL == 1 && factors.term == 1 && rows > kFewRows;
}
inline void multiply_dense_rows(const Factors& factors, const Panels& panels, const Outputs& out, int64_t rows,
                                int64_t blocks, int64_t columns, const Ahead& ahead) {
  switch (rows) {
    case 3: return multiply_blocks<3>(factors, panels, out, blocks, columns, ahead);
    case 4: return multiply_blocks<4>(factors, panels, out, blocks, columns, ahead);
    case 5: return multiply_blocks<5>(factors, panels, out, blocks, columns, ahead);
    default: return multiply_blocks<6>(factors, panels, out, blocks, columns, ahead);
  }
}
