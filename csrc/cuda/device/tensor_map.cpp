// The only file that speaks to the driver's own interface, through the runtime: nothing links against libcuda.
#include "cuda/device/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace sepconv::cuda {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  if (error == cudaSuccess && result == cudaDriverEntryPointSuccess) return reinterpret_cast<Encode>(found);
  (void)cudaGetLastError();  // the answer is no: later calls should not meet an error
  return nullptr;
}

Encode encode() {
  static const Encode found = find_encode();
  return found;
}

}  // namespace

bool has_tensor_maps() { return encode() != nullptr; }

cudaError_t make_tensor_map(TensorMap& map, DType dtype, const ImageBoxes& image) {
  if (!has_tensor_maps()) return cudaErrorNotSupported;
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if (dtype == DType::float16) type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (dtype == DType::bfloat16) type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int64_t bytes = dtype == DType::float32 ? 4 : 2;
  // The stride of a dimension of one is never used: it is that of the next larger one, or as if the image were dense.
  const int64_t pixel = (image.C + 7) / 8 * 8;
  int64_t plane = pixel;
  if (image.W > 1) plane = image.strides.w * image.W;
  if (image.H > 1) plane = image.strides.h * image.H;
  if (image.N > 1) plane = image.strides.n;
  const int64_t row = image.H > 1 ? image.strides.h : plane, column = image.W > 1 ? image.strides.w : row;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(image.C), static_cast<cuuint64_t>(image.W),
                              static_cast<cuuint64_t>(image.H), static_cast<cuuint64_t>(image.N)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(column * bytes), static_cast<cuuint64_t>(row * bytes),
                                static_cast<cuuint64_t>(plane * bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(image.box_channels), static_cast<cuuint32_t>(image.box_columns), 1,
                            1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const auto make = [&] {
    return encode()(reinterpret_cast<CUtensorMap*>(&map), type, 4, const_cast<void*>(image.data), sizes, strides, box,
                    steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // zeros
  };
  CUresult result = make();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    // The thread has not used its device yet, as autograd's may not have: the runtime would give it a context at the
    // first launch, the driver does not. To set the device gives it one now, and may be done while a graph is captured.
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    result = make();
  }
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace sepconv::cuda
