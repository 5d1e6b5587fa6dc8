// An image in the other layout is a transposed matrix, of channels and pixels.
//
// A thread takes strips of kStrip pixels, of an image or of a row where rows have gaps, with all their channels. It
// goes along the pixels of L channels at a time, L the lanes of a vector. L x L numbers are loaded as vectors,
// transposed in registers and stored as vectors.
//
// The floor is memory: each number is read once and written once. ATen's copy_ goes number by number, which took 4 to
// 20 times as long as a copy within one layout (benchmarks/notes/views.md).
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/layout/transposed_copy.cpp"
#include "cpu/layout/transposed_copy.h"

#include "core/arithmetic.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {
namespace {

// A single column is a row.
ImageShape along_rows(ImageShape image) {
  if (image.columns > 1) return image;
  Strides s = image.strides;
  s.w = s.h;
  return {image.N, image.channels, 1, image.rows, s};
}

ImageShape with_strides(ImageShape image, const Strides& strides) {
  image.strides = strides;
  return image;
}

}  // namespace

bool is_transposed_copy(const ImageShape& source, const Strides& target) {
  const ImageShape from = along_rows(source), to = along_rows(with_strides(source, target));
  if (from.channels <= 1 || from.columns <= 1) return false;
  if (from.strides.c == 0 || from.strides.w == 0) return false;  // what repeats is filled, by ATen as fast as it can be
  return (from.strides.c == 1 && to.strides.w == 1) || (from.strides.w == 1 && to.strides.c == 1);
}

void transposed_copy(const ImageShape& source, DType dtype, const void* from, const Strides& target, void* to) {
  const ImageShape image = along_rows(source), copy = along_rows(with_strides(source, target));
  SEPCONV_BEST_ISA(copy_transposed)(image, dtype, from, copy.strides, to);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/transpose_simd.h"

inline constexpr int64_t kStrip = 256;              // pixels: runs that a core fetches ahead of itself
inline constexpr int64_t kTaskNumbers = 16 * 1024;  // for which another thread is worth waking

// The first `count` numbers at p, in any bits: half types are not converted.
template <typename T>
SEPCONV_INLINE Vector<accumulate_t<T>> load_raw(const T* p, int count) {
  if constexpr (!kIsHalf<T>) {
    return count == kLanes<T> ? load(p) : load_first(p, count);
  } else if (count == kLanes<float>) {
    return (Floats) __builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(p), Bits);
  } else {
    uint16_t lanes[kLanes<float>] = {};
    for (int i = 0; i < count; ++i) lanes[i] = p[i].bits;
    return (Floats) __builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(lanes), Bits);
  }
}

template <typename T>
SEPCONV_INLINE void store_raw(T* p, Vector<accumulate_t<T>> v, int count) {
  if constexpr (!kIsHalf<T>) {
    count == kLanes<T> ? store(p, v) : store_first(p, v, count);
  } else if (count == kLanes<float>) {
    *reinterpret_cast<UnalignedHalves*>(p) = __builtin_convertvector((Bits)v, Halves);
  } else {
    uint16_t lanes[kLanes<float>];
    *reinterpret_cast<UnalignedHalves*>(lanes) = __builtin_convertvector((Bits)v, Halves);
    for (int i = 0; i < count; ++i) p[i].bits = lanes[i];
  }
}

// `rows` times `columns` numbers, each at most the lanes of a vector.
template <typename T>
SEPCONV_INLINE void transpose_square(const T* from, int64_t from_step, int rows, int columns, T* to, int64_t to_step) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  Vector<A> square[L];
  if (rows == L && columns == L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = load_raw(from + i * from_step, L);
    transpose<A>(square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store_raw(to + i * to_step, square[i], L);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = i < rows ? load_raw(from + i * from_step, columns) : Vector<A>{};
    transpose<A>(square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i < columns) store_raw(to + i * to_step, square[i], rows);
    }
  }
}

template <typename T>
struct CopyStrips {
  ImageShape image;  // as many rows as have to be told apart
  Strides to;
  const T* source;
  T* target;
  int64_t row_strips, strips, tasks;

  void operator()(int64_t task) const {
    for (int64_t i = strips * task / tasks; i < strips * (task + 1) / tasks; ++i) {
      const int64_t row = i / row_strips % image.rows, n = i / row_strips / image.rows, first = i % row_strips * kStrip;
      const Strides& s = image.strides;
      copy(source + n * s.n + row * s.h + first * s.w, target + n * to.n + row * to.h + first * to.w,
           std::min(kStrip, image.columns - first));
    }
  }

  SEPCONV_INLINE void copy(const T* from, T* out, int64_t pixels) const {
    constexpr int L = kLanes<accumulate_t<T>>;
    const Strides& s = image.strides;
    for (int64_t c = 0; c < image.channels; c += L) {
      const int channels = static_cast<int>(std::min<int64_t>(L, image.channels - c));
      for (int64_t w = 0; w < pixels; w += L) {
        const int columns = static_cast<int>(std::min<int64_t>(L, pixels - w));
        const T* const square = from + c * s.c + w * s.w;
        T* const transposed = out + c * to.c + w * to.w;
        if (to.w == 1) {
          transpose_square(square, s.w, columns, channels, transposed, to.c);
        } else {
          transpose_square(square, s.c, channels, columns, transposed, to.w);
        }
      }
    }
  }
};

inline void copy_transposed(ImageShape image, DType dtype, const void* from, const Strides& to, void* out) {
  if (image.strides.h == image.columns * image.strides.w && to.h == image.columns * to.w) {
    image.columns *= image.rows, image.rows = 1;
  }
  const int64_t row_strips = ceil_div(image.columns, kStrip), strips = image.N * image.rows * row_strips;
  const int64_t tasks =
      std::clamp<int64_t>(strips * kStrip * image.channels / kTaskNumbers, 1, std::max<int64_t>(strips, 1));
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel(tasks,
             CopyStrips<T>{image, to, static_cast<const T*>(from), static_cast<T*>(out), row_strips, strips, tasks});
  });
}

#endif
