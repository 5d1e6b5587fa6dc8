// What the causal kernels share. Like simd.h, read once for each instruction set by the files that need it, in their
// second half: hence no include guard and no include.

inline constexpr int64_t kStretch = 1024;  // positions whose sums are made together, in scratch of the first cache

// One channel, or all of them: the position p, or where it is negative the state before it.
template <typename T>
struct Sequence {
  const T* x;
  int64_t step;
  const T* states;
  int64_t states_step, reach;

  SEPCONV_INLINE const T* at(int64_t p) const { return p < 0 ? states + (reach + p) * states_step : x + p * step; }
};

// The first `left` numbers at p, or a whole vector of them.
template <typename T>
SEPCONV_INLINE Vector<accumulate_t<T>> load_up_to(const T* p, int64_t left) {
  constexpr int lanes = kLanes<accumulate_t<T>>;
  return left >= lanes ? load(p) : load_first(p, static_cast<int>(left));
}

template <typename T>
SEPCONV_INLINE void store_up_to(T* p, Vector<accumulate_t<T>> v, int64_t left) {
  constexpr int lanes = kLanes<accumulate_t<T>>;
  if (left >= lanes) {
    store(p, v);
  } else {
    store_first(p, v, static_cast<int>(left));
  }
}

// `count` numbers as sums; `to` has room for a whole vector more.
template <typename T>
void widen_all(const T* from, int64_t step, int64_t count, accumulate_t<T>* to) {
  using A = accumulate_t<T>;
  if (step != 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_one(from + i * step);
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes<A>) store(to + i, load_up_to(from + i, count - i));
}

// Positions [begin, begin + count) of one channel, zero outside of [low, high).
template <typename T>
void fill_window(const Sequence<T>& from, int64_t begin, int64_t count, int64_t low, int64_t high,
                 accumulate_t<T>* to) {
  using A = accumulate_t<T>;
  const int64_t end = begin + count, first = std::clamp(low, begin, end), last = std::clamp(high, first, end);
  const int64_t zero = std::clamp<int64_t>(0, first, last);
  std::fill_n(to, first - begin, A(0));
  if (zero > first) widen_all(from.at(first), from.states_step, zero - first, to + (first - begin));
  if (last > zero) widen_all(from.x + zero * from.step, from.step, last - zero, to + (zero - begin));
  std::fill_n(to + (last - begin), end - last, A(0));
}
