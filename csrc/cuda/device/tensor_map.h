// Tensor maps: how an image lies in memory, in the form in which a copy by the tensor memory accelerator (TMA, compute
// capability 9.0) wants to know it. Host code makes one for a launch, the kernel takes it as a `const
// __grid_constant__` parameter: no memory is needed for it, and a CUDA graph keeps it with the launch.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "core/conv_shape.h"

namespace sepconv::cuda {

// The driver's CUtensorMap: nobody but the driver and the copy engine looks inside.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// The virtual architectures (90 for 9.0) in whose code kernels copy boxes; in others such a kernel has no body. 12.x
// could, but has too little shared memory for the plan to want it, and its compiler puts a word on the stack for each
// copy.
constexpr bool has_tma(int architecture) { return architecture >= 90 && architecture < 120; }

// True where the driver can make tensor maps (12.0 and newer); asked once.
bool has_tensor_maps();

// An image of [N, H, W, C] values, channels dense, whose boxes of box_columns x box_channels pixels in one row are
// copied. Needs what plan_depthwise_nhwc_tma.cpp asks for: whole 16 bytes from pixel to pixel, whole pixels from row to
// row, and so on.
struct ImageBoxes {
  const void* data;
  int64_t N, H, W, C;
  Strides strides;  // in elements
  int box_columns, box_channels;
};
cudaError_t make_tensor_map(TensorMap& map, DType dtype, const ImageBoxes& image);

}  // namespace sepconv::cuda
