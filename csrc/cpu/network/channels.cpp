// What moves channels and computes nothing: float32 NHWC images whose pixels may lie apart.
//
// Loop-to-data map. A task is a run of pixels; vectors hold neighbouring channels. Two images are interleaved by
// vectors, lane by lane; more of them number by number. Floor: the bytes that are read and written, in some cache.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/network/channels.cpp"
#include "cpu/network/pixels.h"

#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu::network {

void copy_channels(const Size& size, Pixels x, Written y) { SEPCONV_BEST_ISA(copy)(size, x, y); }
void interleave(const Size& size, int count, const Pixels* x, Written y) {
  SEPCONV_BEST_ISA(interleave_all)(size, count, x, y);
}

}  // namespace sepconv::cpu::network
#else

using network::Size;

inline constexpr int64_t kTaskFloats = 16 * 1024;

// Part `part` of `parts` of the pixels.
template <typename Pixel>
struct PixelTask {
  const Pixel& pixel;
  int64_t pixels, parts;
  void operator()(int64_t part) const {
    for (int64_t i = pixels * part / parts; i < pixels * (part + 1) / parts; ++i) pixel(i);
  }
};
template <typename Pixel>
void each_pixel(int64_t pixels, int64_t floats, const Pixel& pixel) {
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(pixels, num_threads()));
  const int64_t parts = std::clamp<int64_t>(pixels * floats / kTaskFloats, 1, most);
  parallel(parts, PixelTask<Pixel>{pixel, pixels, parts});
}

struct CopyPixel {
  int64_t C;
  Pixels x;
  Written y;
  void operator()(int64_t i) const {
    constexpr int L = kLanes<float>;
    const float* from = x.data + i * x.pitch;
    float* to = y.data + i * y.pitch;
    int64_t c = 0;
    for (; c + L <= C; c += L) store(to + c, load(from + c));
    store_first(to + c, load_first(from + c, static_cast<int>(C - c)), static_cast<int>(C - c));
  }
};
inline void copy(const Size& size, Pixels x, Written y) {
  each_pixel(size.N * size.pixels(), size.C, CopyPixel{size.C, x, y});
}

// Lanes from kFirst on of a and b, in turns.
template <int kFirst, int... kI>
SEPCONV_INLINE Floats in_turns(Floats a, Floats b, std::integer_sequence<int, kI...>) {
  return __builtin_shufflevector(a, b, (kFirst + kI / 2 + (kI % 2 ? kLanes<float> : 0))...);
}

struct InterleavePixel {
  int64_t C;
  int count;
  const Pixels* x;
  Written y;

  void two(const float* a, const float* b, float* to) const {
    constexpr int L = kLanes<float>;
    const std::make_integer_sequence<int, L> lanes;
    for (int64_t c = 0; c < C; c += L, to += 2 * L) {
      const int left = static_cast<int>(std::min<int64_t>(L, C - c));
      const Floats first = load_first(a + c, left), second = load_first(b + c, left);
      store_first(to, in_turns<0>(first, second, lanes), std::min(L, 2 * left));
      store_first(to + L, in_turns<L / 2>(first, second, lanes), std::max(0, 2 * left - L));
    }
  }

  void operator()(int64_t i) const {
    float* to = y.data + i * y.pitch;
    if (count == 2) return two(x[0].data + i * x[0].pitch, x[1].data + i * x[1].pitch, to);
    for (int from = 0; from < count; ++from) {
      const float* pixel = x[from].data + i * x[from].pitch;
      for (int64_t c = 0; c < C; ++c) to[c * count + from] = pixel[c];
    }
  }
};
inline void interleave_all(const Size& size, int count, const Pixels* x, Written y) {
  each_pixel(size.N * size.pixels(), size.C * count, InterleavePixel{size.C, count, x, y});
}

#endif
