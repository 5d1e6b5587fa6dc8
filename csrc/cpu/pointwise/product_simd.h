// Matrix products of float32, a block of sums in registers at a time:
//
//   out[i, j] = activation(bias + sum over t of factors[i, t] * panels[t, j] + residual[i, j])
//
// Like simd.h, read once for each instruction set by the files that need it, in their second half: hence no include
// guard and no include.
//
// The factors are read number by number, so they lie anyhow. The columns are read by whole vectors, from panels
// [columns / kPanelColumns][terms][kPanelColumns] whose last one is padded: one cache line a term, for every
// instruction set. Every sum begins with its bias and goes through the terms in their order, kChain at a time: it does
// not depend on the blocks.

// A block has up to kRows x kVectors sums: 28 of AVX-512's 32 registers, 12 of the others' 16; then the columns, and
// one for the factor.
inline constexpr int kRows = SEPCONV_ISA_LEVEL == 2 ? 14 : 6;
inline constexpr int kVectors = 2;
inline constexpr int64_t kColumns = kVectors * kLanes<float>;
// Of few rows a block has twice the vectors: two sums alone would wait for each other's multiply-adds.
inline constexpr int kFewRows = SEPCONV_ISA_LEVEL == 2 ? 6 : 2;
inline constexpr int64_t columns_of(int64_t rows) { return rows <= kFewRows ? 2 * kColumns : kColumns; }

inline constexpr int64_t kChain = 256;         // terms that are added one by one: longer sums are less exact
inline constexpr int64_t kPrefetchTerms = 32;  // how far ahead panels are fetched: 2 KiB

// Terms that follow each other are unrolled in AVX2's large blocks, and one line is fetched for all of them. A term has
// 12 multiply-adds there beside 8 loads, 2 fetches and the loop's own instructions: too many where another thread takes
// every other turn of the core's front end. AVX-512's term has 28 multiply-adds beside as many others.
inline constexpr int kUnrolledTerms = 4;

struct Factors {
  const float* data;
  int64_t row, term;  // strides in elements, here and below
  // Terms that follow each other at that distance, and from the last of each such run to the first of the next what is
  // added to the distance; or null, if all terms are one run.
  const int64_t* jumps = nullptr;
  int64_t run = 0;

  Factors from(int64_t i) const {
    Factors at = *this;
    at.data += i * row;
    return at;
  }
};

// What blocks fetch beside their own panels, in equal shares: lines a block, and numbers from what one term fetches to
// what the next one does. That is a line at most, and less where a block has fewer lines than terms: what is asked for
// faster than memory gives it keeps others waiting, and what is asked for twice takes room in the near caches.
struct Shares {
  int64_t lines, further;
  Shares(int64_t all_lines, int64_t shares, int64_t terms)
      : lines(ceil_div(all_lines, shares)),
        further(std::min(kPanelColumns, ceil_div(lines * kPanelColumns, std::max<int64_t>(terms, 1)))) {}
};

struct Panels {
  const float* data;
  int64_t terms;
  int64_t stored = 0;  // terms of a panel in memory, where those are more than `terms`; else 0
  // What is fetched with the first term, in numbers from `data`, and how much further with each next one. A product of
  // few pixels passes over a weight that lies in memory far away once, and waits for it where it is not asked for
  // early; one of many pixels passes over them once.
  int64_t ahead = 0, further = 0;

  int64_t distance() const { return kPanelColumns * (stored > 0 ? stored : terms); }  // from panel to panel
  Panels from(int64_t j) const { return {data + j / kPanelColumns * distance() + j % kPanelColumns, terms, stored}; }
  // The same, which fetches a share of the next `columns`; and one of what lies at `next`, pixels.
  Panels before(int64_t columns, const Shares& shares, int64_t share) const {
    const int64_t panels = ceil_div(columns, kPanelColumns) * distance();
    return {data, terms, stored, panels + share * shares.lines * kPanelColumns, shares.further};
  }
  Panels before(const float* next, const Shares& shares, int64_t share) const {
    const intptr_t bytes = reinterpret_cast<intptr_t>(next) - reinterpret_cast<intptr_t>(data);
    const int64_t away = bytes / static_cast<intptr_t>(sizeof(float));
    return {data, terms, stored, away + share * shares.lines * kPanelColumns, shares.further};
  }
};

struct Outputs {
  float* data;
  int64_t row;
  const float* residual = nullptr;  // may be `data` itself: the product is then added to what stands there
  int64_t residual_row = 0;
  const float* row_bias = nullptr;  // of both biases one at most
  const float* column_bias = nullptr;
  Activation activation = Activation::identity;

  Outputs from(int64_t i, int64_t j) const {
    Outputs at = *this;
    at.data += i * row + j;
    if (residual != nullptr) at.residual += i * residual_row + j;
    if (row_bias != nullptr) at.row_bias += i;
    if (column_bias != nullptr) at.column_bias += j;
    return at;
  }
};

// Activations that are a clamp happen in registers, with AVX2 hardswish too; the others in a pass over the block just
// stored, since their code, repeated for every sum, would be far longer than the product's.
inline bool happens_in_registers(Activation a) {
  return a == Activation::identity || a == Activation::relu || a == Activation::relu6 ||
         (SEPCONV_ISA_LEVEL == 1 && a == Activation::hardswish);
}
inline bool is_clamp(Activation a) { return a == Activation::relu || a == Activation::relu6; }
inline float highest(Activation a) { return a == Activation::relu6 ? 6.0f : std::numeric_limits<float>::infinity(); }

// Adds the residual, clamps, stores. kWhole: the last vector too has all its lanes; else `rest` of them.
template <bool kWhole, int kI, int kV>
SEPCONV_INLINE void finish(Vector<float> (&sums)[kI][kV], const Outputs& out, int rest) {
  constexpr int L = kLanes<float>;
  if (out.residual != nullptr) {
#pragma GCC unroll 14
    for (int i = 0; i < kI; ++i) {
      const float* from = out.residual + i * out.residual_row;
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        sums[i][v] += kWhole || v + 1 < kV ? load(from + v * L) : load_first(from + v * L, rest);
      }
    }
  }
  if (is_clamp(out.activation)) {
    const float most = highest(out.activation);
#pragma GCC unroll 14
    for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) sums[i][v] = clamp_lanes<float>(sums[i][v], most);
    }
  } else if (SEPCONV_ISA_LEVEL == 1 && out.activation == Activation::hardswish) {
#pragma GCC unroll 14
    for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) sums[i][v] = activate_lanes<float>(Activation::hardswish, sums[i][v]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kI; ++i) {
    float* to = out.data + i * out.row;
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      if (kWhole || v + 1 < kV) {
        store(to + v * L, sums[i][v]);
      } else {
        store_first(to + v * L, sums[i][v], rest);
      }
    }
  }
}

template <Activation kActivation>
void activate_rows(float* to, int64_t row, int rows, int64_t columns) {
  constexpr int64_t L = kLanes<float>;
  for (int i = 0; i < rows; ++i, to += row) {
    int64_t j = 0;
    for (; j + L <= columns; j += L) store(to + j, activate_lanes<float>(kActivation, load(to + j)));
    const int rest = static_cast<int>(columns - j);
    if (rest > 0) store_first(to + j, activate_lanes<float>(kActivation, load_first(to + j, rest)), rest);
  }
}

// Code of its own for each activation, chosen once for all rows.
template <int... kIndex>
void activate_rows_by_name(Activation activation, float* to, int64_t row, int rows, int64_t columns,
                           std::integer_sequence<int, kIndex...>) {
  ((static_cast<int>(activation) == kIndex ? activate_rows<static_cast<Activation>(kIndex)>(to, row, rows, columns)
                                           : void()),
   ...);
}

inline void activate_block(const Outputs& out, int rows, int64_t columns) {
  activate_rows_by_name(out.activation, out.data, out.row, rows, columns,
                        std::make_integer_sequence<int, kActivationCount>{});
}

template <int kI, int kV>
SEPCONV_INLINE void add(Vector<float> (&sums)[kI][kV], const Vector<float> (&before)[kI][kV]) {
#pragma GCC unroll 14
  for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) sums[i][v] += before[i][v];
  }
}

// The sums of kI rows of kV vectors, the last of which has `rest` columns, before the first term; and behind the last.
template <int kI, int kV>
SEPCONV_INLINE void begin_sums(Vector<float> (&sums)[kI][kV], const Outputs& out, int rest) {
  constexpr int L = kLanes<float>;
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    Vector<float> bias{};
    if (out.column_bias != nullptr) {
      const float* from = out.column_bias + v * L;
      bias = v + 1 < kV || rest == L ? load(from) : load_first(from, rest);
    }
#pragma GCC unroll 14
    for (int i = 0; i < kI; ++i) sums[i][v] = out.row_bias != nullptr ? broadcast<float>(out.row_bias[i]) : bias;
  }
  // The output's lines are asked for before the terms: else the stores wait for each of them, where it is far away.
#pragma GCC unroll 14
  for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; v += kPanelColumns / L) __builtin_prefetch(out.data + i * out.row + v * L, 1);
  }
}
template <int kI, int kV>
SEPCONV_INLINE void end_sums(Vector<float> (&sums)[kI][kV], const Outputs& out, int rest) {
  constexpr int L = kLanes<float>;
  if (rest == L) {
    finish<true>(sums, out, rest);
  } else {
    finish<false>(sums, out, rest);
  }
  if (!happens_in_registers(out.activation)) {
    activate_block(out, kI, (kV - 1) * L + rest);
  }
}

template <int kI, int kV>
SEPCONV_INLINE void copy(const Vector<float> (&from)[kI][kV], Vector<float> (&to)[kI][kV]) {
#pragma GCC unroll 14
  for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) to[i][v] = from[i][v];
  }
}

#include "cpu/pointwise/product_dense_simd.h"

// One term of a block. The rows of factors are reached from every third pointer, which the address modes of the
// processor can do without a register for each.
template <int kI, int kV>
SEPCONV_INLINE void add_any_term(Vector<float> (&sums)[kI][kV], const float* const* starts, int64_t row,
                                 const float* columns, int64_t panel) {
  constexpr int L = kLanes<float>;
  Vector<float> line[kV];
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    const float* from = columns + v * L / kPanelColumns * panel + v * L % kPanelColumns;
    line[v] = load(from);
    if (v * L % kPanelColumns == 0) __builtin_prefetch(from + kPrefetchTerms * kPanelColumns);
  }
#pragma GCC unroll 14
  for (int i = 0; i < kI; ++i) {
    const Vector<float> factor = broadcast<float>(starts[i / 3][i % 3 * row]);
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) sums[i][v] += factor * line[v];
  }
}

// kI rows of kV vectors, the last of which has `rest` columns, where the terms are one run and one chain. A function of
// its own: beside the other one's loops, what stands before and behind the terms takes as long as some of them.
template <int kI, int kV>
void multiply_run(const Factors& factors, const Panels& panels, const Outputs& out, int rest) {
  constexpr int kStarts = (kI + 2) / 3;
  Vector<float> sums[kI][kV];
  begin_sums(sums, out, rest);
  const int64_t row = factors.row, term = factors.term, panel = panels.distance(), further = panels.further;
  const float *starts[kStarts], *columns = panels.data, *fetched = columns + panels.ahead;
#pragma GCC unroll 5
  for (int i = 0; i < kStarts; ++i) starts[i] = factors.data + 3 * i * row;
  for (int64_t left = panels.terms; left > 0; --left) {
    add_any_term<kI, kV>(sums, starts, row, columns, panel);
    __builtin_prefetch(fetched);
    fetched += further, columns += kPanelColumns;
#pragma GCC unroll 5
    for (int i = 0; i < kStarts; ++i) starts[i] += term;
  }
  end_sums(sums, out, rest);
}

// The same of any runs and chains.
template <int kI, int kV>
void multiply_block(const Factors& factors, const Panels& panels, const Outputs& out, int rest) {
  constexpr int kStarts = (kI + 2) / 3;
  Vector<float> sums[kI][kV];
  begin_sums(sums, out, rest);
  const int64_t row = factors.row, term = factors.term, panel = panels.distance(), further = panels.further;
  const float *starts[kStarts], *columns = panels.data, *fetched = columns + panels.ahead;
#pragma GCC unroll 5
  for (int i = 0; i < kStarts; ++i) starts[i] = factors.data + 3 * i * row;
  const int64_t* jumps = factors.jumps;
  int64_t run_end = jumps == nullptr ? panels.terms : factors.run;
  Vector<float> before[kI][kV];  // the sums of the chains that are done
  for (int64_t t = 0;;) {
    const bool first = t == 0;
    const int64_t chain_end = std::min(t + kChain, panels.terms);
    for (;;) {
      for (const int64_t end = std::min(chain_end, run_end); t < end; ++t) {
        add_any_term<kI, kV>(sums, starts, row, columns, panel);
        __builtin_prefetch(fetched);
        fetched += further, columns += kPanelColumns;
#pragma GCC unroll 5
        for (int i = 0; i < kStarts; ++i) starts[i] += term;
      }
      if (t == run_end && t < panels.terms) {
        const int64_t jump = *jumps++;
#pragma GCC unroll 5
        for (int i = 0; i < kStarts; ++i) starts[i] += jump;
        run_end += factors.run;
      }
      if (t == chain_end) break;
    }
    if (!first) add<kI, kV>(sums, before);
    if (t == panels.terms) break;
#pragma GCC unroll 14
    for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) before[i][v] = sums[i][v], sums[i][v] = Vector<float>{};
    }
  }
  end_sums(sums, out, rest);
}

using MultiplyBlock = void (*)(const Factors&, const Panels&, const Outputs&, int);

template <int kV, int... kI>
MultiplyBlock block_of_rows(int64_t rows, bool one_run, std::integer_sequence<int, kI...>) {
  if constexpr (SEPCONV_ISA_LEVEL == 2) {
    static constexpr MultiplyBlock runs[] = {multiply_run<kI + 1, kV>...};
    if (one_run) return runs[rows - 1];
  }
  static constexpr MultiplyBlock blocks[] = {multiply_block<kI + 1, kV>...};
  return blocks[rows - 1];
}

inline MultiplyBlock block_of(int64_t rows, int64_t vectors, bool one_run) {
  const std::make_integer_sequence<int, kRows> all;
  const std::make_integer_sequence<int, kFewRows> few;
  switch (vectors) {
    case 1: return block_of_rows<1>(rows, one_run, all);
    case 2: return block_of_rows<2>(rows, one_run, all);
    case 3: return block_of_rows<3>(rows, one_run, few);
    default: return block_of_rows<4>(rows, one_run, few);
  }
}

#if SEPCONV_ISA_LEVEL == 2
#include "cpu/pointwise/product_half_simd.h"
#endif

// `rows` (1 to kRows) x `columns` (1 to columns_of(rows)) outputs.
inline void multiply(const Factors& factors, const Panels& panels, const Outputs& out, int64_t rows, int64_t columns) {
  constexpr int64_t L = kLanes<float>;
  if constexpr (SEPCONV_ISA_LEVEL == 1) {
    if (factors.jumps == nullptr && are_dense(factors, rows)) {
      return multiply_dense_rows(factors, panels, out, rows, 1, columns, {panels.data + panels.ahead});
    }
  }
  const int64_t vectors = ceil_div(columns, L);
  const bool one_run = factors.jumps == nullptr && panels.terms <= kChain;
#if SEPCONV_ISA_LEVEL == 2
  const int64_t last = columns - (vectors - 1) * L;
  if (one_run && rows > kFewRows && last <= kHalfLanes) {
    return half_block_of(rows, vectors - 1)(factors, panels, out, static_cast<int>(last));
  }
#endif
  block_of(rows, vectors, one_run)(factors, panels, out, static_cast<int>(columns - (vectors - 1) * L));
}
