// Batches that are one image in memory.
#pragma once

#include <ATen/DimVector.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

namespace sepconv {

// The first image of an expanded batch. A stride of 0 would hide its layout.
inline at::Tensor first_image(const at::Tensor& batch) {
  at::DimVector size(batch.sizes()), stride(batch.strides());
  size[0] = 1, stride[0] = 1;
  for (size_t dim = 1; dim < size.size(); ++dim) stride[0] = std::max(stride[0], size[dim] * stride[dim]);
  return batch.as_strided(size, stride);
}

}  // namespace sepconv
