// Which convolutions of channels_last images torch's own call is the best for: a pure function of the call.
#pragma once

#include "core/conv_shape.h"
#include "cpu/plan.h"

namespace sepconv::cpu {

inline bool is_strided(const ConvShape& s) { return s.stride_h > 1 || s.stride_w > 1; }
inline bool is_dilated(const ConvShape& s) { return s.dilation_h > 1 || s.dilation_w > 1; }

// Of float32, what grouped_nhwc*.cpp computes.
bool are_groups_last(const ConvShape&);
// Why oneDNN is faster nevertheless; null where it is not.
const char* onednn_is_faster_groups_last(Map, const ConvShape&, const Torch&);

// Why oneDNN is faster, of depthwise in float32 and bfloat16; null where it is not. `gaps`: grad_output has gaps or
// repeats itself, so that torch would copy it first.
const char* onednn_is_faster_channels_last(Map, const ConvShape&, DType, bool gaps, const Torch&);

}  // namespace sepconv::cpu
