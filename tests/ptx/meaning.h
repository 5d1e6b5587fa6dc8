// What instructions do, by family. Each function executes one instruction of one warp.
#pragma once

#include "machine.h"

namespace ptx {

using Meaning = void (*)(Step&);

// Each returns null for an instruction that is not of its family.
Meaning arithmetic(const Instruction&);  // numbers, comparisons, conversions, moves
Meaning control(const Instruction&);     // branches, barriers, and what lanes tell each other
Meaning access(const Instruction&);      // loads, stores, addresses
Meaning copies(const Instruction&);      // cp.async, cp.async.bulk.tensor, mbarrier, fences
Meaning products(const Instruction&);    // ldmatrix, mma, mma.sp

}  // namespace ptx
