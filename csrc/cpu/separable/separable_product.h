// The pointwise stage of separable.cpp: a block of sums in registers. Read by that file once for each instruction set,
// inside its namespace (see foreach_isa.h): hence no include guard and no include.

// A block has kRows rows of kVectors vectors: 24 sums fill most of AVX-512's 32 registers, 12 most of the others' 16.
inline constexpr int kRows = SEPCONV_ISA_LEVEL == 2 ? 12 : 6;
inline constexpr int kColumnVectors = 2;

template <typename A>
inline constexpr int64_t kColumns = kColumnVectors * kLanes<A>;

// sum over t of a[i * a_row + t * a_term] * b[t * b_term + v]
template <typename A>
struct Product {
  const A *a, *b;
  int64_t a_row, a_term, b_term, terms;
};

// Rows [0, kI), vectors [0, kV) -> out[i * kColumns + v]. The rows of `a` are reached from four pointers, which the
// address modes of the processor can do without a register for each.
template <typename A, int kI, int kV>
void multiply(const Product<A>& product, A* out) {
  constexpr int L = kLanes<A>;
  Vector<A> sums[kI][kV] = {};
  const int64_t row = product.a_row, a_term = product.a_term, b_term = product.b_term;
  const A *a0 = product.a, *a3 = a0 + 3 * row, *a6 = a0 + 6 * row, *a9 = a0 + 9 * row, *b = product.b;
  for (int64_t t = 0; t < product.terms; ++t) {
    Vector<A> columns[kV];
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) columns[v] = load(b + v * L);
#pragma GCC unroll 12
    for (int i = 0; i < kI; ++i) {
      const A* a = i < 3 ? a0 + i * row : i < 6 ? a3 + (i - 3) * row : i < 9 ? a6 + (i - 6) * row : a9 + (i - 9) * row;
      const Vector<A> factor = broadcast<A>(*a);
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) sums[i][v] += factor * columns[v];
    }
    a0 += a_term, a3 += a_term, a6 += a_term, a9 += a_term, b += b_term;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) store(out + i * kColumns<A> + v * L, sums[i][v]);
  }
}

template <typename A>
using Multiply = void (*)(const Product<A>&, A*);

template <typename A, int kV, int... kI>
Multiply<A> multiply_of(int64_t rows, std::integer_sequence<int, kI...>) {
  static constexpr Multiply<A> functions[] = {multiply<A, kI + 1, kV>...};
  return functions[rows - 1];
}

// The function for so many rows (1 to kRows) and columns (1 to kColumns).
template <typename A>
Multiply<A> multiply_of(int64_t rows, int64_t columns) {
  const std::make_integer_sequence<int, kRows> all;
  return columns > kLanes<A> ? multiply_of<A, kColumnVectors>(rows, all) : multiply_of<A, 1>(rows, all);
}

// How to cut `items` into blocks of at most kRows, as even as can be: the height of all but the last.
inline int64_t block_height(int64_t items) {
  const int64_t blocks = (items + kRows - 1) / kRows;
  return (items + blocks - 1) / blocks;
}
