// Every door from the bindings to the CUDA kernels: plain numbers and raw device memory in, an error code out.
//
// Every function takes tensors of one dtype whose strides (in elements) stand in the ConvShape; which function may be
// called for which shape, with which tile and how much workspace, is the plan's business (plan.h). Half types
// accumulate in float. Nothing here allocates, synchronises or keeps state, so a CUDA graph can capture every call;
// results do not depend on timing. A tensor without elements needs no launch: the bindings do not call for it.
#pragma once

#include <driver_types.h>  // cudaStream_t and cudaError_t, nothing else of CUDA

#include "core/activation.h"
#include "core/conv_shape.h"
#include "core/padding_mode.h"
#include "core/separable_shape.h"

namespace sepconv::cuda {

// Bytes of shared memory that a block may ask for: 8.6, 8.9 and 12.0 have 99 KB for it, 8.0 and 9.0 more.
inline constexpr int64_t kMostShared = 96 << 10;

// How a plan cuts the work; each kernel file says what it makes of it.
struct Tile {
  int vec = 1;        // channels (NCHW: elements of a row) that a thread moves with one load or store
  int rows = 1;       // rows that a thread works down
  int lanes = 1;      // grad_weight: channel vectors that a block works on
  int splits = 1;     // grad_weight: partial sums
  int keep = 1;       // depthwise_large: rows of results that a thread keeps
  int parts = 1;      // depthwise_large, grad_weight: parts of a strip of rows
  bool wide = false;  // 64-bit indices
};

// What depthwise_nhwc.cu, depthwise_nchw.cu and their two companions for grad_weight keep a window in registers for: square
// kernels of these sizes, equal strides, no dilation (depthwise_nhwc.cu: any, at stride 1).
constexpr bool has_window(int64_t kernel, int64_t stride) {
  return (kernel == 3 || kernel == 5 || kernel == 7) && (stride == 1 || stride == 2);
}

// depthwise_nhwc.cu: multiplier 1, channels dense, has_window, not float64; tile.vec is 2 where channels are even in number and
// everything is aligned to two, or 1.
cudaError_t launch_depthwise_nhwc_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&,
                                          void* y, const Tile&, cudaStream_t);
cudaError_t launch_depthwise_nhwc_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x,
                                             const Tile&, cudaStream_t);

// depthwise_nhwc_mma.cu: float16 and bfloat16, compute capability 8.0 or newer, multiplier 1, channels dense, stride 1, no
// dilation, at most 7 taps a side, every pixel on 16 bytes and whole vectors of eight channels. A place (tiling.h) has
// tile.rows output rows; tile.splits blocks share those of the same channels.
cudaError_t launch_depthwise_nhwc_mma_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&,
                                              void* y, const Tile&, cudaStream_t);
cudaError_t launch_depthwise_nhwc_mma_grad_input(const ConvShape&, DType, const void* grad_y, const void* w,
                                                 void* grad_x, const Tile&, cudaStream_t);

// depthwise_nhwc_tma.cu: float32, 5x5 and 7x7, multiplier 1, channels dense, stride 1, no dilation; what is read fits
// a tensor map (tensor_map.h), and the driver makes such maps, and this build has machine code or PTX that uses them. tile.lanes is 16 or 32 pairs of channels; strips have tile.rows output rows.
bool has_depthwise_nhwc_tma();  // on the current device
cudaError_t launch_depthwise_nhwc_tma_forward(const ConvShape&, const void* x, const void* w, const Epilogue&, void* y,
                                              const Tile&, cudaStream_t);
cudaError_t launch_depthwise_nhwc_tma_grad_input(const ConvShape&, const void* grad_y, const void* w, void* grad_x,
                                                 const Tile&, cudaStream_t);

// depthwise_nchw.cu: rows and filters without gaps, has_window, not float64; any multiplier forward, multiplier
// 1 for grad_input. A thread walks down tile.rows steps (tiling.h), a block has tile.splits strips of them in each of
// tile.lanes planes: one plane, or whole planes without gaps between them in x and y.
cudaError_t launch_depthwise_nchw_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&,
                                          void* y, const Tile&, cudaStream_t);
cudaError_t launch_depthwise_nchw_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x,
                                             const Tile&, cudaStream_t);
// depthwise_nchw_stride2.cu: the latter's part, called by it.
cudaError_t launch_depthwise_nchw_grad_input_stride2(const ConvShape&, DType, const void* grad_y, const void* w,
                                                     void* grad_x, const Tile&, cudaStream_t);

// depthwise_nchw_mma.cu: has_window at stride 1, float16 and bfloat16, compute capability 8.0 or newer; any multiplier forward, multiplier
// 1 for grad_input; where nchw_mma_cut (tiling.h) can cut it. Rows of what is written have no gaps, and tile.vec (2, 4 or 8)
// divides its planes and where they begin, in elements. A place has tile.lanes images and tile.rows rows, all of them or a multiple
// of kNchwMmaPhases; the places of a channel go in tile.splits parts.
cudaError_t launch_depthwise_nchw_mma_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&,
                                              void* y, const Tile&, cudaStream_t);
cudaError_t launch_depthwise_nchw_mma_grad_input(const ConvShape&, DType, const void* grad_y, const void* w,
                                                 void* grad_x, const Tile&, cudaStream_t);
// depthwise_nchw_mma_grad_weight.cu: the same, any multiplier; rows of x and grad_y may have gaps, and tile.vec of 4 and more says
// that both begin on 8 bytes. workspace: as for launch_depthwise_grad_weight_nhwc.
cudaError_t launch_depthwise_nchw_mma_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x,
                                                  void* grad_w, void* workspace, const Tile&, cudaStream_t);

// depthwise_direct.cu: depthwise with any multiplier, kernel, stride, dilation, strides of memory and size.
cudaError_t launch_depthwise_direct_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&,
                                            void* y, const Tile&, cudaStream_t);
cudaError_t launch_depthwise_direct_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x,
                                               const Tile&, cudaStream_t);

// depthwise_grad_weight.cu: depthwise with any multiplier, kernel and strides, images below 2^31 elements. workspace
// holds tile.splits partial sums, laid out as launch_sum_partials (called at the end) wants them.
cudaError_t launch_depthwise_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w,
                                         void* workspace, const Tile&, cudaStream_t);

// depthwise_grad_weight_nhwc.cu: has_window, not float64; any strides, any multiplier. tile.vec above 1: multiplier 1, channels dense,
// and every pixel on 16 bytes. workspace: as above; none where tile.splits is 1, and then grad_w is written at once.
cudaError_t launch_depthwise_grad_weight_nhwc(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w,
                                              void* workspace, const Tile&, cudaStream_t);

// depthwise_grad_weight_nhwc_mma.cu: as depthwise_nhwc_mma.cu above, but whole vectors of four channels, on 8 bytes. tile.splits and
// workspace: as for depthwise_grad_weight_nhwc.cu.
cudaError_t launch_depthwise_grad_weight_nhwc_mma(const ConvShape&, DType, const void* grad_y, const void* x,
                                                  void* grad_w, void* workspace, const Tile&, cudaStream_t);

// depthwise_grad_weight_nchw.cu: as depthwise_grad_weight_nhwc.cu, rows of up to kGradWeightColumns * kGradWeightThreads columns (tiling.h). tile.vec above 1:
// multiplier 1, rows dense and without gaps between them, tensors that begin on 16 bytes.
cudaError_t launch_depthwise_grad_weight_nchw(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w,
                                              void* workspace, const Tile&, cudaStream_t);

// depthwise_toeplitz.cu, depthwise_toeplitz_grad_weight.cu: float16 and bfloat16, columns dense, stride 1, no dilation, at most kToeplitzTaps columns of taps;
// any multiplier, but 1 for grad_input. A place has tile.lanes images and tile.rows rows of what is written (grad_weight:
// of grad_y), the places go in tile.splits parts. tile.vec is 2 where the output's rows begin on 4 bytes and have even
// width. workspace: as for launch_depthwise_grad_weight.
cudaError_t launch_depthwise_toeplitz_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&,
                                              void* y, const Tile&, cudaStream_t);
cudaError_t launch_depthwise_toeplitz_grad_input(const ConvShape&, DType, const void* grad_y, const void* w,
                                                 void* grad_x, const Tile&, cudaStream_t);
cudaError_t launch_depthwise_toeplitz_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x,
                                                  void* grad_w, void* workspace, const Tile&, cudaStream_t);

// depthwise_large.cu, depthwise_large_grad_weight.cu: stride 1, no dilation, at most kLargeSide (depthwise_large.h) taps a
// side, any strides of memory, images below 2^31 elements, compute capability 8.0 or newer; any multiplier, but 1 for
// grad_input. tile.keep is 1, 4 or 7 (float64: 1 or 4), tile.rows, tile.lanes and tile.parts as large_cut() has them. workspace: as for
// launch_depthwise_grad_weight.
cudaError_t launch_depthwise_large_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&,
                                           void* y, const Tile&, cudaStream_t);
cudaError_t launch_depthwise_large_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x,
                                              const Tile&, cudaStream_t);
cudaError_t launch_depthwise_large_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w,
                                               void* workspace, const Tile&, cudaStream_t);

// pointwise.cu: groups == 1, 1x1 without padding: a matrix product over pixels, in plain arithmetic of the
// accumulation type. Requires ConvShape::is_pointwise() and N * H * W < 2^31; grad_input also stride 1. Any strides
// of x, w and y, any alignment (16-byte loads are used where strides and pointers allow them), any number of
// elements.
cudaError_t launch_pointwise_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&, void* y,
                                     cudaStream_t);
cudaError_t launch_pointwise_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x,
                                        cudaStream_t);
// Writes `splits` partial sums to the workspace and adds them up in a second kernel (launch_sum_partials). splits:
// pointwise_grad_weight_splits (tiling.h) is the advice, any number from 1 to 65535 is right; workspace: splits *
// weight_elements() values of the accumulation type.
cudaError_t launch_pointwise_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w,
                                         int splits, void* workspace, cudaStream_t);

// pointwise_mma.cu: the same three maps on tensor cores. Requires what pointwise.cu requires, and float16 or
// bfloat16, and compute capability 8.0 or newer.
cudaError_t launch_pointwise_mma_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&,
                                         void* y, cudaStream_t);
cudaError_t launch_pointwise_mma_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x,
                                            cudaStream_t);
cudaError_t launch_pointwise_mma_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w,
                                             int splits, void* workspace, cudaStream_t);

// grouped.cu: any groups, any strides, any dtype, any size: the kernels that take what no other kernel takes.
// workspace: grouped_workspace_bytes (tiling.h), 16-byte aligned; it holds the weight, packed for the map.
cudaError_t launch_grouped_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&, void* y,
                                   void* workspace, cudaStream_t);
cudaError_t launch_grouped_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x,
                                      void* workspace, cudaStream_t);
// grouped_grad_weight.cu. splits: grouped_grad_weight_splits (tiling.h) is the advice, any number from 1 to 65535 is
// right; workspace: splits * weight_elements() values of the accumulation type.
cudaError_t launch_grouped_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w,
                                       int splits, void* workspace, cudaStream_t);

// separable.cu: depthwise and 1x1 convolution in one; `columns` output channels a block: 64, or 128 but for float64 (more
// output channels than that are right, and compute the depthwise stage again for each block). Any strides of memory.
// Requires N * P * Q < 2^31, images below 2^31 elements and at most kSeparableTaps (tiling.h) taps. Writes y only.
cudaError_t launch_separable(const SeparableShape&, DType, const SeparableMemory&, int columns, cudaStream_t);
// separable_mma.cu: the same on tensor cores: float16 and bfloat16, compute capability 8.0 or newer, columns 64, 128 or 256.
cudaError_t launch_separable_mma(const SeparableShape&, DType, const SeparableMemory&, int columns, cudaStream_t);

// spatial_separable.cu: a column and a row filter over every channel, where spatial_tile (tiling.h) finds a tile. x and
// y have any strides.
cudaError_t launch_spatial_separable(const ConvShape&, DType, const void* x, const SpatialFilters&, void* y,
                                     cudaStream_t);

// borders.cu: what depends on the padding where that is not zeros, after one of the kernels above has done the rest. Any
// groups, any strides, any size. Forward and grad_input overwrite the frame of their result. grad_weight adds to the weights'
// gradient, in float32 and float64 only: a half type would be rounded twice.
cudaError_t launch_borders_forward(const ConvShape&, PaddingMode, DType, const void* x, const void* w, const Epilogue&,
                                   void* y, cudaStream_t);
cudaError_t launch_borders_grad_input(const ConvShape&, PaddingMode, DType, const void* grad_y, const void* w,
                                      void* grad_x, cudaStream_t);
cudaError_t launch_borders_grad_weight(const ConvShape&, PaddingMode, DType, const void* grad_y, const void* x,
                                       void* grad_w, cudaStream_t);

// sum_partials.cu: the second stage of every grad_weight. partials is [splits, K, C / groups, R, S], dense, in the
// accumulation type (double for float64, float otherwise); they are added in the order of the splits, so that the
// result has the same bits in every run, and stored with the weight's strides.
cudaError_t launch_sum_partials(const ConvShape&, DType, const void* partials, int splits, void* grad_w, cudaStream_t);

}  // namespace sepconv::cuda
