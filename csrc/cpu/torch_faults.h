// Where torch's own CPU convolution is known to fail: the one list, which the plan asks before it makes torch's call.
#pragma once

#include "core/conv_shape.h"

namespace sepconv::cpu {

// What goes wrong there, with the torch that it was seen with (a literal); null where torch's call is sound.
const char* torch_fault(Map, const ConvShape&, DType);

}  // namespace sepconv::cpu
