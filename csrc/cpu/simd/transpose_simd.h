// A square of numbers, turned in registers. Like simd.h, read once for each instruction set by the files that need it,
// in their second half: hence no include guard and no include.

// Exchanges the lanes of a that have bit kStep set with those of b that have not.
template <typename A, int kStep, int... kLane>
SEPCONV_INLINE void exchange(Vector<A>& a, Vector<A>& b, std::integer_sequence<int, kLane...>) {
  constexpr int L = kLanes<A>;
  const Vector<A> lower = __builtin_shufflevector(a, b, (kLane & kStep ? L + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? L + kLane : kLane + kStep)...);
  a = lower;
}
template <typename A, int kStep = 1>
SEPCONV_INLINE void transpose(Vector<A> (&rows)[kLanes<A>]) {
  if constexpr (kStep < kLanes<A>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) {
      if (!(i & kStep)) exchange<A, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes<A>>());
    }
    transpose<A, kStep * 2>(rows);
  }
}
