// Moving image rows into scratch memory and out of it. Like simd.h, read once for each instruction set by the files
// that need it, in their second half: hence no include guard and no include.

// Every second lane of a and b, beginning with lane kFirst (0 or 1).
template <typename A, int kFirst>
SEPCONV_INLINE Vector<A> every_second(Vector<A> a, Vector<A> b) {
  using Index = typename VectorOf<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, kLanes<A>>::type;
  Index index{};
  for (int i = 0; i < kLanes<A>; ++i) index[i] = 2 * i + kFirst;
  return __builtin_shuffle(a, b, index);
}

// a[0] b[0] a[1] b[1] ...: the lower or the upper half of them.
template <typename A, bool kUpper>
SEPCONV_INLINE Vector<A> interleave(Vector<A> a, Vector<A> b) {
  using Index = typename VectorOf<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, kLanes<A>>::type;
  Index index{};
  for (int i = 0; i < kLanes<A>; ++i) index[i] = i / 2 + (kUpper ? kLanes<A> / 2 : 0) + i % 2 * kLanes<A>;
  return __builtin_shuffle(a, b, index);
}

// load_first and store_first for a count that may also be negative or beyond the vector.
template <typename T>
SEPCONV_INLINE Vector<accumulate_t<T>> load_some(const T* p, int64_t count) {
  constexpr int kCount = kLanes<accumulate_t<T>>;
  if (count >= kCount) return load(p);
  return count > 0 ? load_first(p, static_cast<int>(count)) : Vector<accumulate_t<T>>{};
}
template <typename T>
SEPCONV_INLINE void store_some(T* p, Vector<accumulate_t<T>> v, int64_t count) {
  if (count >= kLanes<accumulate_t<T>>) return store(p, v);
  if (count > 0) store_first(p, v, static_cast<int>(count));
}

// count numbers, `step` apart, to dense ones. Zeros follow up to a whole vector.
template <typename T>
SEPCONV_INLINE void gather_row(accumulate_t<T>* to, const T* from, int64_t step, int64_t count) {
  constexpr int kCount = kLanes<accumulate_t<T>>;
  for (int64_t i = 0; i < count; i += kCount) {
    T lanes[kCount] = {};
    const int64_t left = std::min<int64_t>(kCount, count - i);
    for (int64_t j = 0; j < left; ++j) lanes[j] = from[(i + j) * step];
    store(to + i, load(lanes));
  }
}

// Rows of `count` dense numbers to scratch.
template <typename T>
SEPCONV_INLINE void copy_rows(accumulate_t<T>* to, int64_t to_step, const T* from, int64_t from_step, int64_t rows,
                              int64_t count) {
  constexpr int kCount = kLanes<accumulate_t<T>>;
  const int64_t whole = count / kCount * kCount;
  const int left = static_cast<int>(count - whole);
  for (int64_t i = 0; i < rows; ++i, to += to_step, from += from_step) {
    for (int64_t j = 0; j < whole; j += kCount) store(to + j, load(from + j));
    if (left > 0) store(to + whole, load_first(from + whole, left));
  }
}

// Rows of even + odd dense numbers (even is odd or odd + 1) to two places in scratch.
template <typename T>
SEPCONV_INLINE void split_rows(accumulate_t<T>* to_even, accumulate_t<T>* to_odd, int64_t to_step, const T* from,
                               int64_t from_step, int64_t rows, int64_t even, int64_t odd) {
  using A = accumulate_t<T>;
  constexpr int kCount = kLanes<A>;
  for (int64_t i = 0; i < rows; ++i, to_even += to_step, to_odd += to_step, from += from_step) {
    for (int64_t j = 0; j < even; j += kCount) {
      const Vector<A> a = load_some(from + 2 * j, even + odd - 2 * j);
      const Vector<A> b = load_some(from + 2 * j + kCount, even + odd - 2 * j - kCount);
      store(to_even + j, every_second<A, 0>(a, b));
      if (j < odd) store(to_odd + j, every_second<A, 1>(a, b));
    }
  }
}

// A strip of an image plane into scratch: the `rows` positions from `start` on of every row phase, and of each the
// phases of its columns. Rows outside the image are written as zeros only if `zero_rows`; otherwise they are left alone
// (all of the scratch memory is zero from the start).
template <typename T>
void copy_plane(accumulate_t<T>* scratch, const T* image, int64_t row_step, int64_t column_step,
                const PlaneAxis& rows_axis, const PlaneAxis& columns_axis, const RowLayout& layout, int64_t start,
                int64_t rows, bool zero_rows) {
  const RowLayout::Span* spans = layout.spans.data();
  const int64_t step = layout.row(), phases = layout.spans.size();
  for (const int64_t row_phase : rows_axis.phases) {
    const int64_t h = row_phase + start * rows_axis.in_step;
    const int64_t from = h >= 0 ? 0 : std::min(rows, ceil_div(-h, rows_axis.in_step));
    const int64_t in_image = h < rows_axis.in_size ? (rows_axis.in_size - 1 - h) / rows_axis.in_step + 1 : 0;
    const int64_t to = std::max(from, std::min(rows, in_image));
    if (zero_rows) {
      std::fill_n(scratch + layout.lowest, from * step, accumulate_t<T>(0));
      std::fill_n(scratch + layout.lowest + to * step, (rows - to) * step, accumulate_t<T>(0));
    }
    accumulate_t<T>* row = scratch + from * step;
    const T* image_row = image + (h + from * rows_axis.in_step) * row_step;
    const int64_t image_step = row_step * rows_axis.in_step;
    if (column_step == 1 && columns_axis.in_step == 1) {
      copy_rows(row + spans->begin, step, image_row + spans->source, image_step, to - from, spans->count);
    } else if (column_step == 1 && columns_axis.in_step == 2 && phases == 2 && spans[0].source + spans[1].source == 1) {
      const int even = static_cast<int>(spans[0].source), odd = 1 - even;  // the phases that hold columns 0 and 1
      split_rows(row + even * layout.pitch + spans[even].begin, row + odd * layout.pitch + spans[odd].begin, step,
                 image_row, image_step, to - from, spans[even].count, spans[odd].count);
    } else {
      for (int64_t i = from; i < to; ++i, row += step, image_row += image_step) {
        for (int64_t phase = 0; phase < phases; ++phase) {
          gather_row(row + phase * layout.pitch + spans[phase].begin, image_row + spans[phase].source * column_step,
                     column_step * columns_axis.in_step, spans[phase].count);
        }
      }
    }
    scratch += rows * step;
  }
}

// Sums back into an image row: those of every column class (`pitch` numbers apart), with bias and activation. `ahead`:
// how far on the image is fetched meanwhile, in numbers; 0: not at all.
template <typename T>
SEPCONV_INLINE void copy_out_row(T* image, int64_t step, const accumulate_t<T>* sums, int64_t pitch,
                                 const PlaneAxis& axis, accumulate_t<T> bias, Activation activation, int64_t ahead) {
  using A = accumulate_t<T>;
  constexpr int kCount = kLanes<A>;
  const Vector<A> offset = broadcast<A>(bias);
  const auto& classes = axis.classes;
  if (step == 1 && axis.out_step == 2 && classes.size() == 2) {
    const A *even = sums, *odd = sums + pitch;
    const int64_t total = classes[0].count + classes[1].count;
    for (int64_t i = 0; 2 * i < total; i += kCount) {
      if (ahead != 0) {
        __builtin_prefetch(image + 2 * i + ahead, 1);
        __builtin_prefetch(image + 2 * i + kCount + ahead, 1);
      }
      const Vector<A> a = activate_lanes<A>(activation, load(even + i) + offset);
      const Vector<A> b = activate_lanes<A>(activation, load(odd + i) + offset);
      store_some(image + 2 * i, interleave<A, false>(a, b), total - 2 * i);
      store_some(image + 2 * i + kCount, interleave<A, true>(a, b), total - 2 * i - kCount);
    }
    return;
  }
  for (size_t c = 0; c < classes.size(); ++c) {
    const int64_t out_step = step * axis.out_step, count = classes[c].count;
    T* to = image + classes[c].first * step;
    for (int64_t i = 0; i < count; i += kCount) {
      const Vector<A> v = activate_lanes<A>(activation, load(sums + c * pitch + i) + offset);
      if (out_step == 1) {
        store_some(to + i, v, count - i);
      } else {
        T lanes[kCount];
        store(lanes, v);
        const int64_t left = std::min<int64_t>(kCount, count - i);
        for (int64_t j = 0; j < left; ++j) to[(i + j) * out_step] = lanes[j];
      }
    }
  }
}

// ---- inner loops ----

// Memory that is used next, fetched some lines at a time: all at once they would fill the miss buffers, and every load
// would wait for them.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  int64_t lines = 0;  // a call

  template <typename T>
  Ahead(const T* begin, int64_t count, int64_t calls)
      : at(reinterpret_cast<const char*>(begin)),
        end(at + count * static_cast<int64_t>(sizeof(T))),
        lines(ceil_div(end - at, 64 * calls)) {}
  Ahead() = default;

  template <bool kToWrite = false>
  SEPCONV_INLINE void fetch() {
    for (int64_t i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, kToWrite);
  }
};

inline constexpr int kMaxRows = 8;

// A load that stays one: for three uses GCC would rather load three times, and loads are what these loops have least
// of.
template <typename A>
SEPCONV_INLINE Vector<A> load_once(const A* p) {
  return *reinterpret_cast<const volatile typename VectorOf<A, kLanes<A>>::unaligned*>(p);
}

// Whether there is load_masked.
inline constexpr bool kMasks = SEPCONV_ISA_LEVEL == 2;

// The lanes of a mask; zero in the others, which are not read and may be anywhere.
template <typename A>
SEPCONV_INLINE Vector<A> load_masked(const A* p, uint32_t mask) {
#if SEPCONV_ISA_LEVEL == 2
  if constexpr (std::is_same_v<A, float>) {
    return (Vector<A>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  } else {
    return (Vector<A>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  }
#else
  Vector<A> v{};
  for (int i = 0; i < kLanes<A>; ++i) {
    if ((mask >> i & 1) != 0) v[i] = p[i];
  }
  return v;
#endif
}

// [vector of columns, tap]: the lanes whose tap lies inside the image, for one class of an axis of one phase.
inline std::vector<uint32_t> column_masks(const PlaneAxis& axis, const AxisClass& positions, int lanes) {
  std::vector<uint32_t> masks;
  for (int64_t q = 0; q < axis.count; q += lanes) {
    for (const Tap& tap : positions.taps) {
      uint32_t mask = 0;
      for (int i = 0; i < lanes; ++i) {
        const int64_t column = q + i + tap.offset + axis.phases[0];
        if (column >= 0 && column < axis.in_size) mask |= 1u << i;
      }
      masks.push_back(mask);
    }
  }
  return masks;
}
