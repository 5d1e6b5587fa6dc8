// What a plan says about a call, in the same words for every device.
#pragma once

#include <cstdint>
#include <string>

#include "core/block_shape.h"
#include "core/conv_shape.h"
#include "core/epilogue.h"
#include "core/separable_shape.h"

namespace sepconv {

struct Explanation {
  std::string kernel;           // the name that kernel_counts() counts
  std::string reason;           // why this one
  bool aten = false;            // true where the call is made of torch's own convolution
  std::string tile;             // how the work is cut, where the plan decides it; else empty
  int64_t workspace_bytes = 0;  // scratch memory from the caching allocator, freed when the call ends
  bool adds_residual = false;   // by the kernel itself; else in a pass behind it
};

namespace cpu {
Explanation explain(Map, const ConvShape&, DType);
Explanation explain(const SeparableShape&, DType);
Explanation explain(const BlockShape&, DType);
}  // namespace cpu
namespace cuda {
Explanation explain(Map, const ConvShape&, DType, const Finish&, int device);
Explanation explain(const SeparableShape&, DType, int device);
Explanation explain(const BlockShape&, DType, int device);
// The same for a device that need not be there: its number of multiprocessors, and 90 for compute capability 9.0.
Explanation explain(Map, const ConvShape&, DType, const Finish&, int multiprocessors, int compute_capability);
Explanation explain(const BlockShape&, DType, int multiprocessors, int compute_capability);
}  // namespace cuda

}  // namespace sepconv
