// What a plan leaves where it lies: a pure function of the kernel and the image.
#pragma once

#include "core/operand_layout.h"
#include "cpu/plan.h"

namespace sepconv::cpu {

// The kernel reads or writes this image where it is; else it gets a dense copy in `layout`.
bool takes(Kernel, Map, DType, Layout, const ImageShape&);

}  // namespace sepconv::cpu
