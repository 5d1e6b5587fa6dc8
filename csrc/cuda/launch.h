// Every door from the bindings to the CUDA kernels: plain numbers and raw device memory in, an error code out.
//
// A door takes one Launch and the cut of its kernel. All tensors of a Launch have one dtype, and their strides (in
// elements) stand in its shape. Which door may be called for which shape, with which cut and how much workspace, is
// the plan's business (plan.h). Half types accumulate in float. Nothing here allocates, synchronises or keeps state,
// so a CUDA graph can capture every call; results do not depend on timing. A tensor without elements needs no launch:
// the bindings do not call for it.
#pragma once

#include <driver_types.h>  // cudaStream_t and cudaError_t, nothing else of CUDA

#include "core/block_shape.h"
#include "core/causal_shape.h"
#include "core/conv_shape.h"
#include "core/epilogue.h"
#include "core/padding_mode.h"
#include "core/separable_shape.h"

namespace sepconv::cuda {

// Bytes of shared memory that a block may ask for: 8.6, 8.9 and 12.0 have 99 KB for it, 8.0 and 9.0 more.
inline constexpr int64_t kMostShared = 96 << 10;

// One map of one call.
struct Launch {
  const ConvShape& shape;
  DType dtype;
  const void *first, *second;  // forward (x, w), grad_input (grad_y, w), grad_weight (grad_y, x)
  Epilogue epilogue;           // of forward; else empty
  void* out;                   // y, grad_x or grad_w
  void* workspace;             // the plan's workspace_bytes, on 16 bytes
  cudaStream_t stream;

  template <typename T>
  const T* first_as() const {
    return static_cast<const T*>(first);
  }
  template <typename T>
  const T* second_as() const {
    return static_cast<const T*>(second);
  }
  template <typename T>
  const T* bias_as() const {
    return static_cast<const T*>(epilogue.bias);
  }
  template <typename T>
  const T* residual_as() const {
    return static_cast<const T*>(epilogue.residual);
  }
  template <typename T>
  T* out_as() const {
    return static_cast<T*>(out);
  }
  template <typename T>
  T* workspace_as() const {
    return static_cast<T*>(workspace);
  }
};

// cut.h has them.
struct NhwcCut;
struct NhwcMmaCut;
struct NhwcTmaCut;
struct NchwCut;
struct NchwMmaCut;
struct DirectCut;
struct GradWeightCut;
struct GradWeightRowsCut;
struct ToeplitzCut;
struct LargeCut;
struct SplitsCut;
struct ProductCut;
struct GroupedMmaCut;
struct SeparableCut;
struct BlockCut;
struct CausalCut;

// What depthwise_nhwc.cu, depthwise_nchw.cu and their two companions for grad_weight keep a window in registers for:
// square kernels of these sizes, equal strides, no dilation (depthwise_nhwc.cu: any, at stride 1).
constexpr bool has_window(int64_t kernel, int64_t stride) {
  return (kernel == 3 || kernel == 5 || kernel == 7) && (stride == 1 || stride == 2);
}

// depthwise_nhwc.cu: multiplier 1, channels dense, has_window, not float64; cut.vec is 2 where channels are even in
// number and everything is aligned to two, or 1.
cudaError_t launch_depthwise_nhwc_forward(const Launch&, const NhwcCut&);
cudaError_t launch_depthwise_nhwc_grad_input(const Launch&, const NhwcCut&);

// depthwise_nhwc_mma.cu: float16 and bfloat16, compute capability 8.0 or newer, multiplier 1, channels dense, stride 1,
// no dilation, at most 7 taps a side, every pixel on 16 bytes and whole vectors of eight channels.
cudaError_t launch_depthwise_nhwc_mma_forward(const Launch&, const NhwcMmaCut&);
cudaError_t launch_depthwise_nhwc_mma_grad_input(const Launch&, const NhwcMmaCut&);

// depthwise_nhwc_tma.cu: float32, 5x5 and 7x7, multiplier 1, channels dense, stride 1, no dilation; what is read fits
// a tensor map (tensor_map.h), the driver makes such maps, and this build has machine code or PTX that uses them.
bool has_depthwise_nhwc_tma();  // on the current device
cudaError_t launch_depthwise_nhwc_tma_forward(const Launch&, const NhwcTmaCut&);
cudaError_t launch_depthwise_nhwc_tma_grad_input(const Launch&, const NhwcTmaCut&);

// depthwise_nchw.cu: rows and filters without gaps, has_window, not float64; any multiplier forward, multiplier 1 for
// grad_input. A block works on part of one plane, or on whole planes without gaps between them in x and y.
cudaError_t launch_depthwise_nchw_forward(const Launch&, const NchwCut&);
cudaError_t launch_depthwise_nchw_grad_input(const Launch&, const NchwCut&);
// depthwise_nchw_stride2.cu: the latter's part, called by it.
cudaError_t launch_depthwise_nchw_grad_input_stride2(const Launch&, const NchwCut&);

// depthwise_nchw_mma.cu: has_window at stride 1, float16 and bfloat16, compute capability 8.0 or newer; any multiplier
// forward, multiplier 1 for grad_input; where nchw_mma_block (cut.h) is possible. Rows of what is written have no gaps,
// and cut.vec (2, 4 or 8) divides its planes and where they begin, in elements.
cudaError_t launch_depthwise_nchw_mma_forward(const Launch&, const NchwMmaCut&);
cudaError_t launch_depthwise_nchw_mma_grad_input(const Launch&, const NchwMmaCut&);
// depthwise_nchw_mma_grad_weight.cu: the same, any multiplier; rows of x and grad_y may have gaps, and cut.vec of 4 and
// more says that both begin on 8 bytes. workspace: as for launch_depthwise_grad_weight_nhwc.
cudaError_t launch_depthwise_nchw_mma_grad_weight(const Launch&, const NchwMmaCut&);

// depthwise_direct.cu: depthwise with any multiplier, kernel, stride, dilation, strides of memory and size.
cudaError_t launch_depthwise_direct_forward(const Launch&, const DirectCut&);
cudaError_t launch_depthwise_direct_grad_input(const Launch&, const DirectCut&);

// depthwise_grad_weight.cu: depthwise with any multiplier, kernel and strides, images below 2^31 elements. workspace
// holds cut.splits partial sums, laid out as launch_sum_partials (called at the end) wants them.
cudaError_t launch_depthwise_grad_weight(const Launch&, const GradWeightCut&);

// depthwise_grad_weight_nhwc.cu: has_window, not float64; any strides, any multiplier. cut.vec above 1: multiplier 1,
// channels dense, and every pixel on 16 bytes. workspace: as above; none where cut.splits is 1, and then grad_w is
// written at once.
cudaError_t launch_depthwise_grad_weight_nhwc(const Launch&, const GradWeightRowsCut&);

// depthwise_grad_weight_nhwc_mma.cu: as depthwise_nhwc_mma.cu above, but whole vectors of four channels, on 8 bytes.
// cut.splits and workspace: as for depthwise_grad_weight_nhwc.cu.
cudaError_t launch_depthwise_grad_weight_nhwc_mma(const Launch&, const GradWeightRowsCut&);

// depthwise_grad_weight_nchw.cu: as depthwise_grad_weight_nhwc.cu, rows of up to kGradWeightColumns *
// kGradWeightThreads columns (cut.h). cut.vec above 1: multiplier 1, rows dense and without gaps between them, tensors
// that begin on 16 bytes.
cudaError_t launch_depthwise_grad_weight_nchw(const Launch&, const GradWeightRowsCut&);

// depthwise_toeplitz.cu, depthwise_toeplitz_grad_weight.cu: float16 and bfloat16, columns dense, stride 1, no dilation,
// at most kToeplitzTaps columns of taps; any multiplier, but 1 for grad_input. cut.vec is 2 where the output's rows
// begin on 4 bytes and have even width. workspace: as for launch_depthwise_grad_weight.
cudaError_t launch_depthwise_toeplitz_forward(const Launch&, const ToeplitzCut&);
cudaError_t launch_depthwise_toeplitz_grad_input(const Launch&, const ToeplitzCut&);
cudaError_t launch_depthwise_toeplitz_grad_weight(const Launch&, const ToeplitzCut&);

// depthwise_large.cu, depthwise_large_grad_weight.cu: stride 1, no dilation, at most kLargeSide (large/cut.h) taps a
// side, any strides of memory, images below 2^31 elements, compute capability 8.0 or newer; any multiplier, but 1 for
// grad_input. workspace: as for launch_depthwise_grad_weight.
cudaError_t launch_depthwise_large_forward(const Launch&, const LargeCut&);
cudaError_t launch_depthwise_large_grad_input(const Launch&, const LargeCut&);
cudaError_t launch_depthwise_large_grad_weight(const Launch&, const LargeCut&);

// pointwise.cu: groups == 1, 1x1 without padding: a matrix product over pixels, in plain arithmetic of the
// accumulation type. Requires ConvShape::is_pointwise() and N * H * W < 2^31; grad_input also stride 1. Any strides
// of x, w and y, any alignment (16-byte loads are used where strides and pointers allow them), any number of
// elements.
cudaError_t launch_pointwise_forward(const Launch&, const SplitsCut&);
cudaError_t launch_pointwise_grad_input(const Launch&, const SplitsCut&);
// Writes cut.splits partial sums to the workspace and adds them up in a second kernel (launch_sum_partials). Any number
// from 1 to 65535 is right; workspace: splits * weight_elements() values of the accumulation type.
cudaError_t launch_pointwise_grad_weight(const Launch&, const SplitsCut&);

// pointwise_mma.cu: the same three maps on tensor cores. Requires what pointwise.cu requires, and float16 or
// bfloat16, and compute capability 8.0 or newer.
cudaError_t launch_pointwise_mma_forward(const Launch&, const SplitsCut&);
cudaError_t launch_pointwise_mma_grad_input(const Launch&, const SplitsCut&);
cudaError_t launch_pointwise_mma_grad_weight(const Launch&, const SplitsCut&);

// pointwise_nhwc_mma.cu: forward and grad_input on tensor cores, for what waits for memory. Requires what
// pointwise_mma.cu requires, channels of x and y dense and in whole vectors of eight, every pixel, the weight's rows
// and the bias on 16 bytes, the weight dense along one of its channels, and product_bytes (pointwise/cut.h) of shared
// memory. The only kernel that adds a residual.
cudaError_t launch_pointwise_nhwc_mma_forward(const Launch&, const ProductCut&);
cudaError_t launch_pointwise_nhwc_mma_grad_input(const Launch&, const ProductCut&);
// pointwise_nhwc_mma_grad_weight.cu: the same of x and grad_y, any weight. cut.splits and workspace: as for
// launch_pointwise_grad_weight.
cudaError_t launch_pointwise_nhwc_mma_grad_weight(const Launch&, const SplitsCut&);

// grouped.cu: any groups, any strides, any dtype, any size: the kernels that take what no other kernel takes.
// workspace: grouped_workspace_bytes (grouped/cut.h); it holds the weight, packed for the map.
cudaError_t launch_grouped_forward(const Launch&, const SplitsCut&);
cudaError_t launch_grouped_grad_input(const Launch&, const SplitsCut&);
// grouped_grad_weight.cu: cut.splits and workspace as for launch_pointwise_grad_weight.
cudaError_t launch_grouped_grad_weight(const Launch&, const SplitsCut&);

// grouped_nhwc_mma.cu: as many outputs as inputs a group, 4, 8 or 16 of them, 3x3 without dilation, stride 1 or 2
// both ways, float16 and bfloat16, compute capability 8.0 or newer, images below 2^31 elements, channels of x and y
// dense and in whole vectors of eight, every pixel on 16 bytes, and grouped_mma_tile's bytes of shared memory. Any
// weight.
cudaError_t launch_grouped_nhwc_mma_forward(const Launch&, const GroupedMmaCut&);
cudaError_t launch_grouped_nhwc_mma_grad_input(const Launch&, const GroupedMmaCut&);
// grouped_nhwc_mma_stride2.cu: the latter's part, called by it.
cudaError_t launch_grouped_nhwc_mma_grad_input_stride2(const Launch&, const GroupedMmaCut&);
// grouped_nhwc_mma_grad_weight.cu: the same. cut.splits and workspace: as for launch_pointwise_grad_weight.
cudaError_t launch_grouped_nhwc_mma_grad_weight(const Launch&, const SplitsCut&);

// separable.cu: depthwise and 1x1 convolution in one; cut.columns is 64, or 128 but for float64 (more output channels
// than that are right, and compute the depthwise stage again for each block). Any strides of memory. Requires
// N * P * Q < 2^31, images below 2^31 elements and at most kSeparableTaps (separable/cut.h) taps. Writes y only.
cudaError_t launch_separable(const SeparableShape&, DType, const SeparableMemory&, const SeparableCut&, cudaStream_t);
// separable_mma.cu: the same on tensor cores: float16 and bfloat16, compute capability 8.0 or newer, 64, 128 or 256
// columns.
cudaError_t launch_separable_mma(const SeparableShape&, DType, const SeparableMemory&, const SeparableCut&,
                                 cudaStream_t);

// inverted_residual.cu: an inverted residual block where plan_block (plan.h) says so, with a cut whose tile
// (separable/cut.h) fits.
cudaError_t launch_inverted_residual(const BlockShape&, DType, const BlockMemory&, const BlockCut&, cudaStream_t);

// spatial_separable.cu: a column and a row filter over every channel, where spatial_tile (spatial/cut.h) finds a tile.
// x and y have any strides.
cudaError_t launch_spatial_separable(const ConvShape&, DType, const void* x, const SpatialFilters&, void* y,
                                     cudaStream_t);

// Causal sequences, forward, behind their states or packed, where plan_causal (plan.h) says so. Any strides of states,
// weight and numbers. causal_nlc.cu: channels of x and y dense and in whole vectors of 16 bytes, up to kCausalTaps
// (sequences/cut.h) taps. causal_ncl.cu: positions dense, as many taps, without dilation, not float64;
// cut.vec above 1: positions in whole vectors of 16 bytes. causal_direct.cu: any.
cudaError_t launch_causal_nlc(const CausalShape&, DType, const CausalMemory&, const CausalCut&, cudaStream_t);
cudaError_t launch_causal_ncl(const CausalShape&, DType, const CausalMemory&, const CausalCut&, cudaStream_t);
cudaError_t launch_causal_direct(const CausalShape&, DType, const CausalMemory&, cudaStream_t);
// causal_update.cu: the next tokens of causal sequences, where causal_update_cut (sequences/cut.h) runs. Any strides.
cudaError_t launch_causal_update(const CausalUpdateShape&, DType, const CausalUpdateMemory&, cudaStream_t);

// borders.cu: what depends on the padding where that is not zeros, after one of the kernels above has done the rest.
// Any groups, any strides, any size. Forward and grad_input overwrite the frame of their result. grad_weight adds to
// the weights' gradient, in float32 and float64 only: a half type would be rounded twice.
cudaError_t launch_borders_forward(const Launch&, PaddingMode);
cudaError_t launch_borders_grad_input(const Launch&, PaddingMode);
cudaError_t launch_borders_grad_weight(const Launch&, PaddingMode);

// sum_partials.cu: the second stage of every grad_weight. The workspace is [splits, K, C / groups, R, S], dense, in the
// accumulation type (double for float64, float otherwise); the sums are added in the order of the splits, so that the
// result has the same bits in every run, and stored with the weight's strides.
cudaError_t launch_sum_partials(const Launch&, int splits);

}  // namespace sepconv::cuda
