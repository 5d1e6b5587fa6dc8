// What stands in the 128 bytes of a tensor map here, as cuTensorMapEncodeTiled (runtime.cpp) writes it.
#pragma once

#include <cstdint>

namespace ptx {

struct TensorMap {
  static constexpr uint32_t kMagic = 0x70616D74;
  uint32_t magic, element_bytes;
  uint64_t base;
  uint32_t sizes[4];    // innermost first
  uint64_t strides[3];  // in bytes, of the three outer dimensions
  uint32_t box[4];
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace ptx
