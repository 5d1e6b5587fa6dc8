// The correlation of depthwise_nhwc.h for fewer channels than a vector has lanes. Read by depthwise_nhwc.cpp once for
// each instruction set, inside its namespace (see foreach_isa.h): hence no include guard and no include.
//
// Loop-to-data map. A vector holds as many whole pixels as fit, and what is left over of the next one, which is written
// once more: one vector of weights a tap serves all of them. Input rows come to scratch when the first output row needs
// them, widened, with zeros beside them, and with a stride taken apart: a tap reads its pixels next to each other. The
// loops go: output row, block of kFewVectors vectors whose sums stay in registers, tap. An output row is finished in
// scratch and stored from there.

inline constexpr int kFewVectors = SEPCONV_ISA_LEVEL == 2 ? 8 : 4;
inline constexpr int64_t kFewColumns = 512;  // outputs of a row whose input stays in cache

// Next to each other.
template <typename From, typename To>
void copy_numbers(const From* from, int64_t count, To* to) {
  constexpr int64_t L = kLanes<accumulate_t<From>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i));
  const int left = static_cast<int>(count - i);
  if (left > 0) store_first(to + i, load_first(from + i, left), left);
}

// Columns first, first + step, ... of input row h, `count` of them, zeros where there is none.
template <typename T, typename To>
void copy_columns(const Correlation<T>& k, int64_t h, int64_t first, int64_t step, int64_t count, To* to) {
  const auto before = [&](int64_t column) { return ceil_div(std::max<int64_t>(column - first, 0), step); };
  const int64_t begin = std::min(before(0), count), end = std::clamp(before(k.W), begin, count);
  std::fill_n(to, begin * k.C, To{});
  std::fill_n(to + end * k.C, (count - end) * k.C, To{});
  if (begin == end) return;
  const T* from = k.x + h * k.x_row + (first + begin * step) * k.x_pixel;
  if (step == 1 && k.x_pixel == k.C) return copy_numbers(from, (end - begin) * k.C, to + begin * k.C);
  for (int64_t j = begin; j < end; ++j, from += step * k.x_pixel) {
    store(to + j * k.C, load_first(from, static_cast<int>(k.C)));
  }
}

template <typename T, typename From>
void store_row(const Correlation<T>& k, int64_t p, const From* from) {
  T* const y = k.y + p * k.y_row;
  if (k.y_pixel == k.C) return copy_numbers(from, k.Q * k.C, y);
  for (int64_t q = 0; q < k.Q; ++q) store_first(y + q * k.y_pixel, load(from + q * k.C), static_cast<int>(k.C));
}

// The input rows that an output row sees, [R][stride_w][columns, C]: row h stands in place h % R.
template <typename T>
class FewRows {
 public:
  using A = accumulate_t<T>;

  explicit FewRows(const Correlation<T>& k)
      : k_(k),
        columns_(k.Q + (k.S - 1) / k.stride_w),
        part_(columns_ * k.C + (kFewVectors + 1) * kLanes<A>),
        memory_(k.R * k.stride_w * part_) {}

  const A* take(int64_t h) {
    A* const row = memory_.data() + h % k_.R * k_.stride_w * part_;
    if (h < next_) return row;
    next_ = h + 1;
    for (int64_t f = 0; f < k_.stride_w; ++f) {
      copy_columns(k_, h, f - k_.pad_w, k_.stride_w, columns_, row + f * part_);
    }
    return row;
  }
  const A* tap(const A* row, int64_t s) const { return row + s % k_.stride_w * part_ + s / k_.stride_w * k_.C; }

 private:
  const Correlation<T>& k_;
  int64_t columns_, part_, next_ = std::numeric_limits<int64_t>::min();
  std::vector<A> memory_;
};

// Output rows [p0, p1) of C < kLanes channels, of a kernel whose taps are neighbours.
template <typename T>
void correlate_few(const Correlation<T>& k, int64_t p0, int64_t p1) {
  using A = accumulate_t<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t C = k.C, count = k.Q * C, step = L / C * C, filter = k.R * k.S;
  std::vector<A> weights((filter + 1) * L), sums(count + (kFewVectors + 1) * L);
  const auto repeat = [C](const A* numbers, A* vector) {
    for (int64_t i = 0; i < L; ++i) vector[i] = numbers[i % C];
  };
  for (int64_t tap = 0; tap < filter; ++tap) repeat(k.w + tap * L, weights.data() + tap * L);
  A* const bias = weights.data() + filter * L;
  repeat(k.bias, bias);
  std::vector<const A*> taps(filter);
  FewRows<T> rows(k);
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t row = p * k.stride_h - k.pad_h;
    const int64_t first = std::min(k.R, row >= 0 ? 0 : ceil_div(-row, k.dilation_h));
    const int64_t end = std::clamp<int64_t>(row < k.H ? ceil_div(k.H - row, k.dilation_h) : 0, first, k.R);
    for (int64_t r = first; r < end; ++r) {
      const A* const input = rows.take(row + r * k.dilation_h);
      for (int64_t s = 0; s < k.S; ++s) taps[r * k.S + s] = rows.tap(input, s);
    }
    for (int64_t i = 0; i < count; i += kFewVectors * step) {
      Vector<A> block[kFewVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kFewVectors; ++v) block[v] = load(bias);
      for (int64_t tap = first * k.S; tap < end * k.S; ++tap) {
        const Vector<A> w = load(weights.data() + tap * L);
        const A* const x = taps[tap] + i;
#pragma GCC unroll 8
        for (int v = 0; v < kFewVectors; ++v) block[v] += load(x + v * step) * w;
      }
#pragma GCC unroll 8
      for (int v = 0; v < kFewVectors; ++v) store(sums.data() + i + v * step, block[v]);
    }
    for (int64_t q = 0; q < k.Q && k.activation != Activation::identity; q += L) {  // L pixels are whole vectors
      activate_array(k.activation, sums.data() + q * C, static_cast<int>(std::min(k.Q - q, L) * C));
    }
    store_row(k, p, sums.data());
  }
}
