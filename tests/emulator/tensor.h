// Test tensors: raw memory exactly as large as the tensor spans, as device memory would be handed to a kernel.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/conv_shape.h"

namespace emulator {

struct Sizes {
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t count() const { return n * c * h * w; }
};

// "contiguous", "channels_last", "strided" (every second column of a tensor with one more row and channel).
sepconv::Strides make_strides(const Sizes&, const std::string& layout);

size_t dtype_bytes(sepconv::DType);
double unit_roundoff(sepconv::DType);  // half a unit in the last place of 1.0
double read_element(const void*, sepconv::DType, int64_t index);
void write_element(void*, sepconv::DType, int64_t index, double value);  // rounds to nearest

// Where set, it is told of every buffer's memory: that it is there now, and that it no longer is (tests/ptx).
extern void (*buffer_watcher)(const void* data, size_t bytes, bool alive);

// A heap block that ends where the tensor ends, so that AddressSanitizer sees the first byte beyond. `offset` elements
// stand before the tensor, poisoned: a view whose pointer is not as well aligned as an allocation's.
class Buffer {
 public:
  Buffer(const Sizes&, const sepconv::Strides&, sepconv::DType, int64_t offset = 0);
  explicit Buffer(size_t bytes);  // a workspace
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() { return data_; }
  size_t bytes() const { return bytes_; }
  double at(int64_t n, int64_t c, int64_t h, int64_t w) const;
  const void* address(int64_t n, int64_t c, int64_t h, int64_t w) const;
  void fill_random(uint64_t seed);       // uniform in [-1, 1], gaps stay NaN; nothing where `fills` is false
  void make_last_pixel_infinite();       // all of its channels
  void scatter_infinite(uint64_t seed);  // three elements become infinite, minus infinite and NaN
  void fill_nan();                       // every byte 0xFF
  static inline bool fills = true;       // false where a case is only asked what it would launch
  // Bytes between the elements that are no longer 0xFF: somebody wrote where no element is.
  int64_t gap_bytes_written() const;

 private:
  void allocate(size_t bytes, size_t front);
  Sizes sizes_;
  sepconv::Strides strides_;
  sepconv::DType dtype_ = sepconv::DType::float32;
  unsigned char *allocation_ = nullptr, *data_ = nullptr;
  size_t bytes_ = 0, front_ = 0;
};

}  // namespace emulator
