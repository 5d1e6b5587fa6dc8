// From a plan to the door that it names.
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace sepconv::cuda {
namespace {

cudaError_t run_forward(const Plan& p, const ConvShape& shape, DType dtype, const void* x, const void* w,
                        const Epilogue& epilogue, void* y, void* workspace, cudaStream_t stream) {
  switch (p.kernel) {
    case Kernel::depthwise_nhwc: return launch_depthwise_nhwc_forward(shape, dtype, x, w, epilogue, y, p.tile, stream);
    case Kernel::depthwise_nhwc_mma:
      return launch_depthwise_nhwc_mma_forward(shape, dtype, x, w, epilogue, y, p.tile, stream);
    case Kernel::depthwise_nhwc_tma: return launch_depthwise_nhwc_tma_forward(shape, x, w, epilogue, y, p.tile, stream);
    case Kernel::depthwise_nchw: return launch_depthwise_nchw_forward(shape, dtype, x, w, epilogue, y, p.tile, stream);
    case Kernel::depthwise_nchw_mma:
      return launch_depthwise_nchw_mma_forward(shape, dtype, x, w, epilogue, y, p.tile, stream);
    case Kernel::depthwise_direct:
      return launch_depthwise_direct_forward(shape, dtype, x, w, epilogue, y, p.tile, stream);
    case Kernel::depthwise_toeplitz:
      return launch_depthwise_toeplitz_forward(shape, dtype, x, w, epilogue, y, p.tile, stream);
    case Kernel::depthwise_large:
      return launch_depthwise_large_forward(shape, dtype, x, w, epilogue, y, p.tile, stream);
    case Kernel::pointwise: return launch_pointwise_forward(shape, dtype, x, w, epilogue, y, stream);
    case Kernel::pointwise_mma: return launch_pointwise_mma_forward(shape, dtype, x, w, epilogue, y, stream);
    case Kernel::grouped: return launch_grouped_forward(shape, dtype, x, w, epilogue, y, workspace, stream);
    default: return cudaErrorNotSupported;
  }
}

cudaError_t run_grad_input(const Plan& p, const ConvShape& shape, DType dtype, const void* grad_y, const void* w,
                           void* grad_x, void* workspace, cudaStream_t stream) {
  switch (p.kernel) {
    case Kernel::depthwise_nhwc:
      return launch_depthwise_nhwc_grad_input(shape, dtype, grad_y, w, grad_x, p.tile, stream);
    case Kernel::depthwise_nhwc_mma:
      return launch_depthwise_nhwc_mma_grad_input(shape, dtype, grad_y, w, grad_x, p.tile, stream);
    case Kernel::depthwise_nhwc_tma:
      return launch_depthwise_nhwc_tma_grad_input(shape, grad_y, w, grad_x, p.tile, stream);
    case Kernel::depthwise_nchw:
      return launch_depthwise_nchw_grad_input(shape, dtype, grad_y, w, grad_x, p.tile, stream);
    case Kernel::depthwise_nchw_mma:
      return launch_depthwise_nchw_mma_grad_input(shape, dtype, grad_y, w, grad_x, p.tile, stream);
    case Kernel::depthwise_direct:
      return launch_depthwise_direct_grad_input(shape, dtype, grad_y, w, grad_x, p.tile, stream);
    case Kernel::depthwise_toeplitz:
      return launch_depthwise_toeplitz_grad_input(shape, dtype, grad_y, w, grad_x, p.tile, stream);
    case Kernel::depthwise_large:
      return launch_depthwise_large_grad_input(shape, dtype, grad_y, w, grad_x, p.tile, stream);
    case Kernel::pointwise: return launch_pointwise_grad_input(shape, dtype, grad_y, w, grad_x, stream);
    case Kernel::pointwise_mma: return launch_pointwise_mma_grad_input(shape, dtype, grad_y, w, grad_x, stream);
    case Kernel::grouped: return launch_grouped_grad_input(shape, dtype, grad_y, w, grad_x, workspace, stream);
    default: return cudaErrorNotSupported;
  }
}

cudaError_t run_grad_weight(const Plan& p, const ConvShape& shape, DType dtype, const void* grad_y, const void* x,
                            void* grad_w, void* workspace, cudaStream_t stream) {
  const int splits = p.tile.splits;
  switch (p.kernel) {
    case Kernel::depthwise_grad_weight:
      return launch_depthwise_grad_weight(shape, dtype, grad_y, x, grad_w, workspace, p.tile, stream);
    case Kernel::depthwise_grad_weight_nhwc:
      return launch_depthwise_grad_weight_nhwc(shape, dtype, grad_y, x, grad_w, workspace, p.tile, stream);
    case Kernel::depthwise_grad_weight_nhwc_mma:
      return launch_depthwise_grad_weight_nhwc_mma(shape, dtype, grad_y, x, grad_w, workspace, p.tile, stream);
    case Kernel::depthwise_grad_weight_nchw:
      return launch_depthwise_grad_weight_nchw(shape, dtype, grad_y, x, grad_w, workspace, p.tile, stream);
    case Kernel::depthwise_nchw_mma:
      return launch_depthwise_nchw_mma_grad_weight(shape, dtype, grad_y, x, grad_w, workspace, p.tile, stream);
    case Kernel::depthwise_toeplitz:
      return launch_depthwise_toeplitz_grad_weight(shape, dtype, grad_y, x, grad_w, workspace, p.tile, stream);
    case Kernel::depthwise_large:
      return launch_depthwise_large_grad_weight(shape, dtype, grad_y, x, grad_w, workspace, p.tile, stream);
    case Kernel::pointwise:
      return launch_pointwise_grad_weight(shape, dtype, grad_y, x, grad_w, splits, workspace, stream);
    case Kernel::pointwise_mma:
      return launch_pointwise_mma_grad_weight(shape, dtype, grad_y, x, grad_w, splits, workspace, stream);
    case Kernel::grouped: return launch_grouped_grad_weight(shape, dtype, grad_y, x, grad_w, splits, workspace, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace

cudaError_t run(const Plan& p, Map map, const ConvShape& shape, DType dtype, const void* first, const void* second,
                const Epilogue& epilogue, void* out, void* workspace, cudaStream_t stream) {
  switch (map) {
    case Map::forward: return run_forward(p, shape, dtype, first, second, epilogue, out, workspace, stream);
    case Map::grad_input: return run_grad_input(p, shape, dtype, first, second, out, workspace, stream);
    case Map::grad_weight: return run_grad_weight(p, shape, dtype, first, second, out, workspace, stream);
  }
  return cudaErrorNotSupported;
}

cudaError_t run_separable(const Plan& p, const SeparableShape& shape, DType dtype, const SeparableMemory& memory,
                          cudaStream_t stream) {
  switch (p.kernel) {
    case Kernel::separable: return launch_separable(shape, dtype, memory, p.tile.lanes, stream);
    case Kernel::separable_mma: return launch_separable_mma(shape, dtype, memory, p.tile.lanes, stream);
    default: return cudaErrorNotSupported;
  }
}

cudaError_t run_borders(Map map, const ConvShape& shape, PaddingMode mode, DType dtype, const void* first,
                        const void* second, const Epilogue& epilogue, void* out, cudaStream_t stream) {
  switch (map) {
    case Map::forward: return launch_borders_forward(shape, mode, dtype, first, second, epilogue, out, stream);
    case Map::grad_input: return launch_borders_grad_input(shape, mode, dtype, first, second, out, stream);
    case Map::grad_weight: return launch_borders_grad_weight(shape, mode, dtype, first, second, out, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace sepconv::cuda
