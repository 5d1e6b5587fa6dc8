#include "tensor.h"

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

using sepconv::DType;
using sepconv::Strides;

Strides make_strides(const Sizes& s, const std::string& layout) {
  if (layout == "contiguous") return {s.c * s.h * s.w, s.h * s.w, s.w, 1};
  if (layout == "channels_last") return {s.h * s.w * s.c, 1, s.w * s.c, s.c};
  if (layout == "sliced") return {(s.c + 2) * s.h * s.w, s.h * s.w, s.w, 1};       // channels of a larger image
  if (layout == "alternate") return {2 * s.c * s.h * s.w, 2 * s.h * s.w, s.w, 1};  // every second channel of one
  if (layout == "sliced_last") {  // channels of a larger image, channels_last
    return {(s.c + 8) * s.h * s.w, 1, (s.c + 8) * s.w, s.c + 8};
  }
  // A part of larger rows: planes (and channels_last).
  if (layout == "cropped") return {s.c * (s.h + 2) * (s.w + 2), (s.h + 2) * (s.w + 2), s.w + 2, 1};
  if (layout == "cropped_last") return {(s.h + 2) * (s.w + 2) * s.c, 1, (s.w + 2) * s.c, s.c};
  // Gradients as autograd makes them behind sum and mean: for plans alone, as nothing can be written to them.
  if (layout == "expanded") return {0, 0, 0, 0};
  if (layout == "expanded_pixel") return {s.c, 1, 0, 0};
  if (layout == "strided") {
    const int64_t w = 2 * s.w, h = s.h + 1, c = s.c + 1;
    return {c * h * w, h * w, w, 2};
  }
  throw std::invalid_argument("unknown layout " + layout);
}

size_t dtype_bytes(DType d) { return d == DType::float64 ? 8 : d == DType::float32 ? 4 : 2; }

double unit_roundoff(DType d) {
  switch (d) {
    case DType::float64: return std::ldexp(1.0, -53);
    case DType::float32: return std::ldexp(1.0, -24);
    case DType::float16: return std::ldexp(1.0, -11);
    case DType::bfloat16: return std::ldexp(1.0, -8);
  }
  return 0;
}

double read_element(const void* p, DType d, int64_t i) {
  switch (d) {
    case DType::float64: return static_cast<const double*>(p)[i];
    case DType::float32: return static_cast<const float*>(p)[i];
    case DType::float16: return static_cast<const _Float16*>(p)[i];
    case DType::bfloat16: return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(p)[i]} << 16);
  }
  return 0;
}

void write_element(void* p, DType d, int64_t i, double v) {
  switch (d) {
    case DType::float64: static_cast<double*>(p)[i] = v; return;
    case DType::float32: static_cast<float*>(p)[i] = static_cast<float>(v); return;
    case DType::float16: static_cast<_Float16*>(p)[i] = static_cast<_Float16>(v); return;
    case DType::bfloat16: {
      int exponent = 0;  // rounded to the 8 bits of its significand, the value is a float exactly
      const double significand = std::nearbyint(std::ldexp(std::frexp(v, &exponent), 8));
      const float rounded = static_cast<float>(std::ldexp(significand, exponent - 8));
      static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(rounded) >> 16);
      return;
    }
  }
}

void (*buffer_watcher)(const void* data, size_t bytes, bool alive) = nullptr;

Buffer::Buffer(const Sizes& sizes, const Strides& strides, DType dtype, int64_t offset)
    : sizes_(sizes), strides_(strides), dtype_(dtype) {
  int64_t span = 0;
  if (sizes.count()) {
    span = 1 + (sizes.n - 1) * strides.n + (sizes.c - 1) * strides.c + (sizes.h - 1) * strides.h +
           (sizes.w - 1) * strides.w;
  }
  allocate(span * dtype_bytes(dtype), offset * dtype_bytes(dtype));
}

Buffer::Buffer(size_t bytes) { allocate(bytes, 0); }

void Buffer::allocate(size_t bytes, size_t front) {
  constexpr size_t kAlignment = 256;  // of a CUDA allocation
  bytes_ = bytes;
  front_ = front;
  void* p = nullptr;
  if (posix_memalign(&p, kAlignment, bytes + front + !(bytes + front)) != 0) throw std::bad_alloc();
  allocation_ = static_cast<unsigned char*>(p);
  data_ = allocation_ + front;
#if defined(EMULATOR_ASAN)
  __asan_poison_memory_region(allocation_, front);
#endif
  fill_nan();
  if (buffer_watcher) buffer_watcher(data_, bytes_, true);
}

Buffer::~Buffer() {
  if (buffer_watcher) buffer_watcher(data_, bytes_, false);
#if defined(EMULATOR_ASAN)
  __asan_unpoison_memory_region(allocation_, front_);
#endif
  free(allocation_);
}

double Buffer::at(int64_t n, int64_t c, int64_t h, int64_t w) const {
  return read_element(data_, dtype_, n * strides_.n + c * strides_.c + h * strides_.h + w * strides_.w);
}

const void* Buffer::address(int64_t n, int64_t c, int64_t h, int64_t w) const {
  return data_ + (n * strides_.n + c * strides_.c + h * strides_.h + w * strides_.w) * dtype_bytes(dtype_);
}

void Buffer::fill_nan() { memset(data_, 0xFF, bytes_); }

void Buffer::fill_random(uint64_t seed) {
  if (!fills) return;
  std::mt19937_64 engine(seed);
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (int64_t n = 0; n < sizes_.n; ++n)
    for (int64_t c = 0; c < sizes_.c; ++c)
      for (int64_t h = 0; h < sizes_.h; ++h)
        for (int64_t w = 0; w < sizes_.w; ++w)
          write_element(data_, dtype_, n * strides_.n + c * strides_.c + h * strides_.h + w * strides_.w,
                        uniform(engine));
}

void Buffer::scatter_infinite(uint64_t seed) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kValues[] = {kInfinity, -kInfinity, std::numeric_limits<double>::quiet_NaN()};
  std::mt19937_64 engine(seed);
  for (int i = 0; i < 3; ++i) {
    const auto below = [&](int64_t size) { return static_cast<int64_t>(engine() % size); };
    const int64_t n = below(sizes_.n), c = below(sizes_.c), h = below(sizes_.h), w = below(sizes_.w);
    write_element(data_, dtype_, n * strides_.n + c * strides_.c + h * strides_.h + w * strides_.w, kValues[i]);
  }
}

void Buffer::make_last_pixel_infinite() {
  for (int64_t c = 0; c < sizes_.c; ++c) {
    const int64_t at =
        (sizes_.n - 1) * strides_.n + c * strides_.c + (sizes_.h - 1) * strides_.h + (sizes_.w - 1) * strides_.w;
    write_element(data_, dtype_, at, std::numeric_limits<double>::infinity());
  }
}

int64_t Buffer::gap_bytes_written() const {
  const size_t size = dtype_bytes(dtype_);
  std::vector<bool> element(bytes_ / size);
  for (int64_t n = 0; n < sizes_.n; ++n)
    for (int64_t c = 0; c < sizes_.c; ++c)
      for (int64_t h = 0; h < sizes_.h; ++h)
        for (int64_t w = 0; w < sizes_.w; ++w)
          element[n * strides_.n + c * strides_.c + h * strides_.h + w * strides_.w] = true;
  int64_t written = 0;
  for (size_t i = 0; i < bytes_; ++i) written += !element[i / size] && data_[i] != 0xFF;
  return written;
}

}  // namespace emulator
