// What a network does besides products: one pass over dense NHWC images.
//
// Loop-to-data map. A task is a run of numbers, of pixels or of output rows, or, for a mean, some channels of an image;
// vectors hold neighbouring channels. Floor: the bytes that are read and written; in a network they are in some cache.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/network/pixels.cpp"
#include "cpu/network/pixels.h"

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu::network {

#define DOOR(name) SEPCONV_BEST_ISA(name)

void add(const Size& size, Pixels a, Pixels b, Activation activation, Written y) {
  DOOR(add_all)(size, a, b, activation, y);
}
void multiply(int64_t count, const float* a, const float* b, Activation activation, float* y) {
  DOOR(multiply_all)(count, a, b, activation, y);
}
void scale(const Size& size, const float* x, const Scale& by, Activation activation, float* y) {
  DOOR(scale_all)(size, x, by, activation, y);
}
void activate(int64_t count, const float* x, Activation activation, float* y) {
  DOOR(activate_all)(count, x, activation, y);
}
void clamp(int64_t count, const float* x, const Line& line, float* y) { DOOR(clamp_all)(count, x, line, y); }
void layer_norm(const Size& size, const float* x, float eps, const float* scale, const float* shift, float* y) {
  DOOR(layer_norm_all)(size, x, eps, scale, shift, y);
}
void mean(const Size& size, const float* x, float* y) { DOOR(mean_all)(size, x, y); }
void max_pool(const ConvShape& shape, const float* x, float* y) { DOOR(max_pool_all)(shape, x, y); }
void mean_pool(const ConvShape& shape, bool padded, const float* x, float* y) {
  DOOR(mean_pool_all)(shape, padded, x, y);
}
void to_nhwc(const Size& size, const float* x, const Strides& strides, float* y) {
  DOOR(to_nhwc_all)(size, x, strides, y);
}

#undef DOOR

}  // namespace sepconv::cpu::network
#else

#include "cpu/simd/activate_simd.h"

using network::Line;
using network::Scale;
using network::Size;

inline constexpr int64_t kTaskFloats = 16 * 1024;

// Calls body(begin, end) for runs of [0, items), of `floats` numbers each.
template <typename Body>
struct Runs {
  const Body& body;
  int64_t items, parts;
  void operator()(int64_t part) const { body(items * part / parts, items * (part + 1) / parts); }
};
template <typename Body>
void in_runs(int64_t items, int64_t floats, const Body& body) {
  const int64_t most = std::min<int64_t>(items, num_threads());
  const int64_t parts = std::clamp<int64_t>(items * floats / kTaskFloats, 1, std::max<int64_t>(most, 1));
  parallel(parts, Runs<Body>{body, items, parts});
}

// ---- each number by itself: lanes(i) reads the vector at i ----

struct Add {
  const float *a, *b;
  SEPCONV_INLINE Floats at(int64_t i) const { return load(a + i) + load(b + i); }
  SEPCONV_INLINE Floats first(int64_t i, int n) const { return load_first(a + i, n) + load_first(b + i, n); }
};
struct Multiply {
  const float *a, *b;
  SEPCONV_INLINE Floats at(int64_t i) const { return load(a + i) * load(b + i); }
  SEPCONV_INLINE Floats first(int64_t i, int n) const { return load_first(a + i, n) * load_first(b + i, n); }
};
struct Same {
  const float* x;
  SEPCONV_INLINE Floats at(int64_t i) const { return load(x + i); }
  SEPCONV_INLINE Floats first(int64_t i, int n) const { return load_first(x + i, n); }
};
struct Scaled {
  const float *x, *scale, *shift;
  SEPCONV_INLINE Floats at(int64_t i) const {
    const Floats product = load(x + i) * load(scale + i);
    return shift == nullptr ? product : product + load(shift + i);
  }
  SEPCONV_INLINE Floats first(int64_t i, int n) const {
    const Floats product = load_first(x + i, n) * load_first(scale + i, n);
    return shift == nullptr ? product : product + load_first(shift + i, n);
  }
};
struct Clamped {
  const float* x;
  Line line;
  SEPCONV_INLINE Floats on(Floats v) const {
    const Floats zero{}, low = zero + line.low, high = zero + line.high;
    v = v * line.factor + line.shift;
    return v < low ? low : (v > high ? high : v);
  }
  SEPCONV_INLINE Floats at(int64_t i) const { return on(load(x + i)); }
  SEPCONV_INLINE Floats first(int64_t i, int n) const { return on(load_first(x + i, n)); }
};

template <Activation kActivation, typename From>
void write_lanes(const From& from, int64_t begin, int64_t end, float* y) {
  constexpr int L = kLanes<float>;
  int64_t i = begin;
  for (; i + L <= end; i += L) store(y + i, activate_lanes<float>(kActivation, from.at(i)));
  const int rest = static_cast<int>(end - i);
  if (rest > 0) store_first(y + i, activate_lanes<float>(kActivation, from.first(i, rest)), rest);
}

// Code of its own for each activation, chosen once for all numbers.
template <int... kIndex>
void activate_in_place(Activation activation, int64_t begin, int64_t end, float* y,
                       std::integer_sequence<int, kIndex...>) {
  ((static_cast<int>(activation) == kIndex ? write_lanes<static_cast<Activation>(kIndex)>(Same{y}, begin, end, y)
                                           : void()),
   ...);
}

// An activation goes over what was just written, while it is in the first-level cache.
template <typename From>
void write(const From& from, int64_t count, Activation activation, float* y) {
  constexpr int64_t kBlock = 1024;
  const int64_t step = activation == Activation::identity ? count : kBlock;
  for (int64_t i = 0; i < count; i += step) {
    const int64_t end = std::min(i + step, count);
    write_lanes<Activation::identity>(from, i, end, y);
    if (activation == Activation::identity) continue;
    activate_in_place(activation, i, end, y, std::make_integer_sequence<int, kActivationCount>{});
  }
}

template <typename From>
struct WriteRun {
  const float *a, *b;
  Activation activation;
  float* y;
  void operator()(int64_t begin, int64_t end) const {
    write(From{a + begin, b + begin}, end - begin, activation, y + begin);
  }
};
struct AddRun {
  int64_t C;
  Pixels a, b;
  Activation activation;
  Written y;
  void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      write(Add{a.data + i * a.pitch, b.data + i * b.pitch}, C, activation, y.data + i * y.pitch);
    }
  }
};
inline void add_all(const Size& size, Pixels a, Pixels b, Activation activation, Written y) {
  if (a.pitch == size.C && b.pitch == size.C && y.pitch == size.C) {
    return in_runs(size.elements(), 1, WriteRun<Add>{a.data, b.data, activation, y.data});
  }
  in_runs(size.N * size.pixels(), size.C, AddRun{size.C, a, b, activation, y});
}
inline void multiply_all(int64_t count, const float* a, const float* b, Activation activation, float* y) {
  in_runs(count, 1, WriteRun<Multiply>{a, b, activation, y});
}

struct ActivateRun {
  const float* x;
  Activation activation;
  float* y;
  void operator()(int64_t begin, int64_t end) const { write(Same{x + begin}, end - begin, activation, y + begin); }
};
inline void activate_all(int64_t count, const float* x, Activation activation, float* y) {
  in_runs(count, 1, ActivateRun{x, activation, y});
}

struct ClampRun {
  const float* x;
  Line line;
  float* y;
  void operator()(int64_t begin, int64_t end) const {
    write_lanes<Activation::identity>(Clamped{x, line}, begin, end, y);
  }
};
inline void clamp_all(int64_t count, const float* x, const Line& line, float* y) {
  in_runs(count, 1, ClampRun{x, line, y});
}

struct ScaleRun {
  Size size;
  const float* x;
  Scale by;
  Activation activation;
  float* y;
  void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const float* scale = by.scale + i / size.pixels() * by.per_image;
      write(Scaled{x + i * size.C, scale, by.shift}, size.C, activation, y + i * size.C);
    }
  }
};
inline void scale_all(const Size& size, const float* x, const Scale& by, Activation activation, float* y) {
  in_runs(size.N * size.pixels(), size.C, ScaleRun{size, x, by, activation, y});
}

// ---- a pixel's channels together ----

struct NormRun {
  int64_t C;
  const float* x;
  float eps;
  const float *scale, *shift;
  float* y;

  // The sum of (x - centre) or of its square.
  template <bool kSquare>
  float sum(const float* pixel, float centre) const {
    constexpr int L = kLanes<float>;
    Floats sums[2] = {};
    const Floats middle = broadcast<float>(centre);
    int64_t c = 0;
    for (; c + 2 * L <= C; c += 2 * L) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Floats v = load(pixel + c + i * L) - middle;
        sums[i] += kSquare ? v * v : v;
      }
    }
    float rest = 0;
    for (; c < C; ++c) rest += kSquare ? (pixel[c] - centre) * (pixel[c] - centre) : pixel[c] - centre;
    return sum_lanes<float>(sums[0] + sums[1]) + rest;
  }

  void operator()(int64_t begin, int64_t end) const {
    constexpr int L = kLanes<float>;
    for (int64_t i = begin; i < end; ++i) {
      const float* from = x + i * C;
      float* to = y + i * C;
      const float centre = sum<false>(from, 0.0f) / static_cast<float>(C);
      const float factor = 1.0f / std::sqrt(sum<true>(from, centre) / static_cast<float>(C) + eps);
      for (int64_t c = 0; c < C; c += L) {
        const int count = static_cast<int>(std::min<int64_t>(L, C - c));
        Floats v = ((count == L ? load(from + c) : load_first(from + c, count)) - centre) * factor;
        if (scale != nullptr) v *= count == L ? load(scale + c) : load_first(scale + c, count);
        if (shift != nullptr) v += count == L ? load(shift + c) : load_first(shift + c, count);
        store_first(to + c, v, count);
      }
    }
  }
};
inline void layer_norm_all(const Size& size, const float* x, float eps, const float* scale, const float* shift,
                           float* y) {
  in_runs(size.N * size.pixels(), size.C, NormRun{size.C, x, eps, scale, shift, y});
}

// ---- pixels together ----

// Rows are summed one by one and then added up: less is lost than in one long sum.
struct MeanTask {
  Size size;
  const float* x;
  float* y;
  int64_t chunks;  // of channels
  static constexpr int64_t kChannels = 64;

  template <int kV>
  SEPCONV_INLINE void vectors(const float* from, float* to, int rest) const {
    constexpr int L = kLanes<float>;
    Floats total[kV] = {};
    for (int64_t h = 0; h < size.H; ++h) {
      Floats row[kV] = {};
      for (int64_t w = 0; w < size.W; ++w, from += size.C) {
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) row[v] += rest == L ? load(from + v * L) : load_first(from + v * L, rest);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) total[v] += row[v];
    }
    const float pixels = static_cast<float>(size.pixels());
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) store_first(to + v * L, total[v] / pixels, rest);
  }

  void operator()(int64_t task) const {
    constexpr int L = kLanes<float>;
    const int64_t n = task / chunks, begin = task % chunks * kChannels, end = std::min(begin + kChannels, size.C);
    const float* from = x + n * size.per_image();
    float* to = y + n * size.C;
    int64_t c = begin;
    for (; c + 4 * L <= end; c += 4 * L) vectors<4>(from + c, to + c, L);
    for (; c < end; c += L) vectors<1>(from + c, to + c, static_cast<int>(std::min<int64_t>(L, end - c)));
  }
};
inline void mean_all(const Size& size, const float* x, float* y) {
  const int64_t chunks = (size.C + MeanTask::kChannels - 1) / MeanTask::kChannels;
  parallel(size.N * chunks, MeanTask{size, x, y, chunks});
}

struct Taps {
  int64_t begin, end;
};

template <bool kGreatest>
struct PoolRun {
  ConvShape s;
  const float* x;
  bool padded;
  float* y;

  // The taps of a window from `at` on that are inside.
  static Taps inside(int64_t at, int64_t dilation, int64_t taps, int64_t size) {
    const int64_t first = at < 0 ? (dilation - 1 - at) / dilation : 0;
    const int64_t last = size > at ? (size - 1 - at) / dilation + 1 : 0;
    return {first, std::max(first, std::min(taps, last))};
  }

  // kWhole: all lanes are channels, else `lanes`.
  template <bool kWhole>
  SEPCONV_INLINE Floats vector(const float* from, const Taps& rows, const Taps& columns, int64_t count,
                               int lanes) const {
    Floats most = broadcast<float>(kGreatest ? -std::numeric_limits<float>::infinity() : 0.0f);
    const int64_t down = s.dilation_h * s.x.h, right = s.dilation_w * s.x.w;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t t = columns.begin; t < columns.end; ++t) {
        const float* tap = from + r * down + t * right;
        const Floats v = kWhole ? load(tap) : load_first(tap, lanes);
        if constexpr (kGreatest) {
          most = v == v ? max_lanes<float>(v, most) : v;  // NaN stays
        } else {
          most += v;
        }
      }
    }
    return kGreatest ? most : most / static_cast<float>(count);
  }

  void pixel(const float* image, int64_t p, int64_t q, float* to) const {
    constexpr int L = kLanes<float>;
    const int64_t h = p * s.stride_h - s.pad_h, w = q * s.stride_w - s.pad_w;
    const Taps rows = inside(h, s.dilation_h, s.R, s.H), columns = inside(w, s.dilation_w, s.S, s.W);
    const int64_t taps = padded ? s.R * s.S : (rows.end - rows.begin) * (columns.end - columns.begin);
    const float* from = image + h * s.x.h + w * s.x.w;
    int64_t c = 0;
    for (; c + L <= s.C; c += L) store(to + c, vector<true>(from + c, rows, columns, taps, L));
    const int rest = static_cast<int>(s.C - c);
    if (rest > 0) store_first(to + c, vector<false>(from + c, rows, columns, taps, rest), rest);
  }

  void operator()(int64_t begin, int64_t end) const {  // output rows of the batch
    for (int64_t i = begin; i < end; ++i) {
      const float* image = x + i / s.P * s.x.n;
      for (int64_t q = 0; q < s.Q; ++q) pixel(image, i % s.P, q, y + (i * s.Q + q) * s.y.w);
    }
  }
};
inline void max_pool_all(const ConvShape& s, const float* x, float* y) {
  in_runs(s.N * s.P, s.Q * s.C * s.R, PoolRun<true>{s, x, false, y});
}
inline void mean_pool_all(const ConvShape& s, bool padded, const float* x, float* y) {
  in_runs(s.N * s.P, s.Q * s.C * s.R, PoolRun<false>{s, x, padded, y});
}

struct CopyRun {
  Size size;
  const float* x;
  Strides from;
  float* y;
  void operator()(int64_t begin, int64_t end) const {  // rows of the batch
    for (int64_t i = begin; i < end; ++i) {
      const float* row = x + i / size.H * from.n + i % size.H * from.h;
      float* to = y + i * size.W * size.C;
      for (int64_t w = 0; from.c == 1 && w < size.W; ++w) std::copy_n(row + w * from.w, size.C, to + w * size.C);
      for (int64_t c = 0; from.c != 1 && c < size.C; ++c) {
        for (int64_t w = 0; w < size.W; ++w) to[w * size.C + c] = row[w * from.w + c * from.c];
      }
    }
  }
};
inline void to_nhwc_all(const Size& size, const float* x, const Strides& strides, float* y) {
  in_runs(size.N * size.H, size.W * size.C, CopyRun{size, x, strides, y});
}

#endif
