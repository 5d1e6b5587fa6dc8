// Chains of terms in AVX2's registers, by hand: 12 sums, two vectors of columns or one, and the factor. GCC keeps them
// there in one loop, but not with what a block's entry needs beside them. Read by product_simd.h.
//
// A term is 12 multiply-adds in 6 ticks beside 8 loads (13 for a single vector of columns, 6.5 ticks).

// sum += a * b, in the register where the sum is: else GCC moves the sums of unrolled terms from one to another of
// AVX2's 16 registers, until it has to spill some.
SEPCONV_INLINE void add_product(Vector<float>& sum, Vector<float> a, Vector<float> b) {
#if SEPCONV_ISA_LEVEL == 1
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum += a * b;
#endif
}

#if SEPCONV_ISA_LEVEL == 1

#define SEPCONV_ROW_OF_TWO(from, first, second) \
  "vbroadcastss " from                          \
  ", %%ymm15\n\t"                               \
  "vfmadd231ps %%ymm13, %%ymm15, %[" first      \
  "]\n\t"                                       \
  "vfmadd231ps %%ymm14, %%ymm15, %[" second "]\n\t"
#define SEPCONV_TERM_OF_TWO(u)                                                                                         \
  "vmovups 64*" u                                                                                                      \
  "(%[columns]), %%ymm13\n\t"                                                                                          \
  "vmovups 64*" u "+32(%[columns]), %%ymm14\n\t" SEPCONV_ROW_OF_TWO("4*" u "(%[low])", "a0", "b0") SEPCONV_ROW_OF_TWO( \
      "4*" u "(%[low],%[row])", "a1", "b1") SEPCONV_ROW_OF_TWO("4*" u "(%[low],%[row],2)", "a2", "b2")                 \
      SEPCONV_ROW_OF_TWO("4*" u "(%[high])", "a3", "b3") SEPCONV_ROW_OF_TWO("4*" u "(%[high],%[row])", "a4", "b4")     \
          SEPCONV_ROW_OF_TWO("4*" u "(%[high],%[row],2)", "a5", "b5")

// sums = first + the products of `count` terms: rows of factors `row` apart, columns kPanelColumns a term.
SEPCONV_INLINE void sum_chain(Vector<float> (&sums)[6][2], const float* first, const float* factors, int64_t row,
                              const float* columns, int64_t count, const float* fetched) {
  const float *low = factors, *high = factors + 3 * row;
  __asm__ volatile(
      "vmovups (%[first]), %[a0]\n\t"
      "vmovups 32(%[first]), %[b0]\n\t"
      "vmovaps %[a0], %[a1]\n\tvmovaps %[b0], %[b1]\n\t"
      "vmovaps %[a0], %[a2]\n\tvmovaps %[b0], %[b2]\n\t"
      "vmovaps %[a0], %[a3]\n\tvmovaps %[b0], %[b3]\n\t"
      "vmovaps %[a0], %[a4]\n\tvmovaps %[b0], %[b4]\n\t"
      "vmovaps %[a0], %[a5]\n\tvmovaps %[b0], %[b5]\n\t"
      "subq $4, %[count]\n\t"
      "jl 2f\n\t"
      ".p2align 5\n"
      "1:\n\t"
      "prefetcht0 (%[fetched])\n\t"
      SEPCONV_TERM_OF_TWO("0") SEPCONV_TERM_OF_TWO("1") SEPCONV_TERM_OF_TWO("2") SEPCONV_TERM_OF_TWO("3")
      "addq $64, %[fetched]\n\t"
      "addq $256, %[columns]\n\t"
      "addq $16, %[low]\n\t"
      "addq $16, %[high]\n\t"
      "subq $4, %[count]\n\t"
      "jge 1b\n"
      "2:\n\t"
      "addq $4, %[count]\n\t"
      "je 4f\n"
      "3:\n\t"
      SEPCONV_TERM_OF_TWO("0")
      "addq $64, %[columns]\n\t"
      "addq $4, %[low]\n\t"
      "addq $4, %[high]\n\t"
      "subq $1, %[count]\n\t"
      "jne 3b\n"
      "4:\n\t"
      : [a0] "=&x"(sums[0][0]), [b0] "=&x"(sums[0][1]), [a1] "=&x"(sums[1][0]), [b1] "=&x"(sums[1][1]),
        [a2] "=&x"(sums[2][0]), [b2] "=&x"(sums[2][1]), [a3] "=&x"(sums[3][0]), [b3] "=&x"(sums[3][1]),
        [a4] "=&x"(sums[4][0]), [b4] "=&x"(sums[4][1]), [a5] "=&x"(sums[5][0]), [b5] "=&x"(sums[5][1]),
        [columns] "+r"(columns), [low] "+r"(low), [high] "+r"(high), [count] "+r"(count), [fetched] "+r"(fetched)
      : [first] "r"(first), [row] "r"(row * int64_t{sizeof(float)})
      : "xmm13", "xmm14", "xmm15", "cc", "memory");
}

// The same of runs of `run` terms, behind each of which a jump is added to where the factors are: one chain.
SEPCONV_INLINE void sum_runs(Vector<float> (&sums)[6][2], const float* first, const float* factors, int64_t row,
                             const float* columns, int64_t count, int64_t run, const int64_t* jumps) {
  const float *low = factors, *high = factors + 3 * row;
  __asm__ volatile(
      "vmovups (%[first]), %[a0]\n\t"
      "vmovups 32(%[first]), %[b0]\n\t"
      "vmovaps %[a0], %[a1]\n\tvmovaps %[b0], %[b1]\n\t"
      "vmovaps %[a0], %[a2]\n\tvmovaps %[b0], %[b2]\n\t"
      "vmovaps %[a0], %[a3]\n\tvmovaps %[b0], %[b3]\n\t"
      "vmovaps %[a0], %[a4]\n\tvmovaps %[b0], %[b4]\n\t"
      "vmovaps %[a0], %[a5]\n\tvmovaps %[b0], %[b5]\n"
      "1:\n\t"
      "movq %[run], %%rax\n\t"
      ".p2align 5\n"
      "2:\n\t"
      SEPCONV_TERM_OF_TWO("0")
      "addq $64, %[columns]\n\t"
      "addq $4, %[low]\n\t"
      "addq $4, %[high]\n\t"
      "subq $1, %%rax\n\t"
      "jne 2b\n\t"
      "subq %[run], %[count]\n\t"
      "jle 3f\n\t"
      "movq (%[jumps]), %%rax\n\t"
      "leaq (%[low],%%rax,4), %[low]\n\t"
      "leaq (%[high],%%rax,4), %[high]\n\t"
      "addq $8, %[jumps]\n\t"
      "jmp 1b\n"
      "3:\n\t"
      : [a0] "=&x"(sums[0][0]), [b0] "=&x"(sums[0][1]), [a1] "=&x"(sums[1][0]), [b1] "=&x"(sums[1][1]),
        [a2] "=&x"(sums[2][0]), [b2] "=&x"(sums[2][1]), [a3] "=&x"(sums[3][0]), [b3] "=&x"(sums[3][1]),
        [a4] "=&x"(sums[4][0]), [b4] "=&x"(sums[4][1]), [a5] "=&x"(sums[5][0]), [b5] "=&x"(sums[5][1]),
        [columns] "+r"(columns), [low] "+r"(low), [high] "+r"(high), [count] "+r"(count), [jumps] "+r"(jumps)
      : [first] "r"(first), [row] "r"(row * int64_t{sizeof(float)}), [run] "r"(run)
      : "rax", "xmm13", "xmm14", "xmm15", "cc", "memory");
}

#define SEPCONV_ROW_OF_ONE(from, sum) \
  "vbroadcastss " from                \
  ", %%ymm15\n\t"                     \
  "vfmadd231ps %%ymm14, %%ymm15, %[" sum "]\n\t"
#define SEPCONV_ROWS_OF_ONE(at, sum0, sum1, sum2) \
  SEPCONV_ROW_OF_ONE("(%[" at "])", sum0)         \
  SEPCONV_ROW_OF_ONE("(%[" at "],%[row])", sum1)  \
  SEPCONV_ROW_OF_ONE("(%[" at "],%[row],2)", sum2)

// The same for twelve rows of one vector of columns.
SEPCONV_INLINE void sum_chain(Vector<float> (&sums)[12][1], const float* first, const float* factors, int64_t row,
                              const float* columns, int64_t count, const float*) {
  const float *p0 = factors, *p1 = p0 + 3 * row, *p2 = p1 + 3 * row, *p3 = p2 + 3 * row;
  __asm__ volatile(
      "vmovups (%[first]), %[a0]\n\t"
      "vmovaps %[a0], %[a1]\n\tvmovaps %[a0], %[a2]\n\tvmovaps %[a0], %[a3]\n\tvmovaps %[a0], %[a4]\n\t"
      "vmovaps %[a0], %[a5]\n\tvmovaps %[a0], %[a6]\n\tvmovaps %[a0], %[a7]\n\tvmovaps %[a0], %[a8]\n\t"
      "vmovaps %[a0], %[a9]\n\tvmovaps %[a0], %[a10]\n\tvmovaps %[a0], %[a11]\n\t"
      ".p2align 5\n"
      "1:\n\t"
      "vmovups (%[columns]), %%ymm14\n\t"
      SEPCONV_ROWS_OF_ONE("p0", "a0", "a1", "a2") SEPCONV_ROWS_OF_ONE("p1", "a3", "a4", "a5")
      SEPCONV_ROWS_OF_ONE("p2", "a6", "a7", "a8") SEPCONV_ROWS_OF_ONE("p3", "a9", "a10", "a11")
      "addq $64, %[columns]\n\t"
      "addq $4, %[p0]\n\taddq $4, %[p1]\n\taddq $4, %[p2]\n\taddq $4, %[p3]\n\t"
      "subq $1, %[count]\n\t"
      "jne 1b\n\t"
      : [a0] "=&x"(sums[0][0]), [a1] "=&x"(sums[1][0]), [a2] "=&x"(sums[2][0]), [a3] "=&x"(sums[3][0]),
        [a4] "=&x"(sums[4][0]), [a5] "=&x"(sums[5][0]), [a6] "=&x"(sums[6][0]), [a7] "=&x"(sums[7][0]),
        [a8] "=&x"(sums[8][0]), [a9] "=&x"(sums[9][0]), [a10] "=&x"(sums[10][0]), [a11] "=&x"(sums[11][0]),
        [columns] "+r"(columns), [p0] "+r"(p0), [p1] "+r"(p1), [p2] "+r"(p2), [p3] "+r"(p3), [count] "+r"(count)
      : [first] "r"(first), [row] "r"(row * int64_t{sizeof(float)})
      : "xmm14", "xmm15", "cc", "memory");
}

#undef SEPCONV_ROW_OF_TWO
#undef SEPCONV_TERM_OF_TWO
#undef SEPCONV_ROW_OF_ONE
#undef SEPCONV_ROWS_OF_ONE

#endif
