// The doors of the CPU kernels: raw memory in, raw memory out. No torch header is seen by a kernel.
//
// Every function takes tensors of one dtype whose strides (in elements) stand in the ConvShape. Half types accumulate
// in float. Nothing here allocates a copy of a whole tensor; scratch memory is a few tiles a thread. Results do not
// depend on the number of threads.
#pragma once

#include <string>
#include <vector>

#include "core/conv_shape.h"
#include "core/epilogue.h"
#include "core/padding_mode.h"
#include "core/separable_shape.h"

namespace sepconv::cpu {

// grouped_planes*.cpp: any groups, any strides, any dtype. Works on zero-padded planes of one channel at a time.
void grouped_planes_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&, void* y);
void grouped_planes_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x);
void grouped_planes_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w);

// grouped_nhwc*.cpp: float32, groups of 2, 4 or 8 channels that make as many, on images whose channels are dense;
// images, rows and pixels lie apart in any way, and the weight has any strides. No stride together with a dilation.
void grouped_nhwc_forward(const ConvShape&, const float* x, const float* w, const Epilogue&, float* y);
void grouped_nhwc_grad_input(const ConvShape&, const float* grad_y, const float* w, float* grad_x);
void grouped_nhwc_grad_weight(const ConvShape&, const float* grad_y, const float* x, float* grad_w);

// depthwise_nhwc*.cpp: depthwise of multiplier 1 on images whose channels are dense; images, rows and pixels lie apart
// in any way, and the weight has any strides.
void depthwise_nhwc_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&, void* y);
void depthwise_nhwc_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x);
void depthwise_nhwc_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w);

// depthwise_nchw_blocked*.cpp: depthwise of multiplier 1, dense columns, any other strides: for what
// nchw_blocked_can_run() of plan.cpp names.
void depthwise_nchw_blocked_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&, void* y);
void depthwise_nchw_blocked_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x);
void depthwise_nchw_blocked_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w);

// depthwise_nchw_3x3.cpp: 3x3 depthwise of multiplier 1 on small planes, dense columns, any other strides: for what
// nchw_3x3_can_run() of plan.cpp names.
void depthwise_nchw_3x3_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&, void* y);
void depthwise_nchw_3x3_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x);

// pointwise.cpp: 1x1, one group, stride 1, for few pixels: x and y both Layout::nhwc or both nchw, or images of one
// pixel whose channels are dense; w dense along its input channels.
void pointwise_forward(const ConvShape&, DType, const void* x, const void* w, const Epilogue&, void* y);
void pointwise_grad_input(const ConvShape&, DType, const void* grad_y, const void* w, void* grad_x);
void pointwise_grad_weight(const ConvShape&, DType, const void* grad_y, const void* x, void* grad_w);

// spatial_separable.cpp: two filters over every channel; y is Layout::nchw (x: dense columns) or nhwc (dense channels).
void spatial_separable_forward(const ConvShape&, DType, const void* x, const SpatialFilters&, void* y);

// borders.cpp: what depends on the padding where that is not zeros, after one of the kernels above has done the rest.
// Any groups, any strides. Forward and grad_input overwrite the frame of their result; grad_weight (float32 and float64
// only) adds to it.
void borders_forward(const ConvShape&, PaddingMode, DType, const void* x, const void* w, const Epilogue&, void* y);
void borders_grad_input(const ConvShape&, PaddingMode, DType, const void* grad_y, const void* w, void* grad_x);
void borders_grad_weight(const ConvShape&, PaddingMode, DType, const void* grad_y, const void* x, void* grad_w);

// separable.cpp: depthwise and pointwise in one pass, any strides of the tensors that come in; y and the intermediate
// are dense, nchw or nhwc, and either of them may be absent.
void separable_forward(const SeparableShape&, DType, const SeparableMemory&);

// isa.cpp: the instruction sets that this binary holds kernels for, worst first, and the one in use: the best that the
// processor has, or the one that the environment variable SEPCONV_CPU_ISA names (baseline, avx2, avx512).
enum class Isa : int { baseline, avx2, avx512 };
Isa isa();
void set_isa(const std::string& name);  // for tests; throws std::invalid_argument
const char* isa_name(Isa);
std::vector<std::string> isas_built();

// Provided by bindings.cpp on top of torch's thread pool, so that kernels follow torch.set_num_threads.
// Calls body(context, i) for every i in [0, tasks), in any order, on any thread.
void parallel_tasks(int64_t tasks, void (*body)(void* context, int64_t task), void* context);
int num_threads();  // 1 in a task: what it starts runs in line

}  // namespace sepconv::cpu
