// Matrix fragments: ldmatrix and mma.sync, with the layouts of the PTX ISA ("Matrix Fragments for mma.m16n8k16",
// "sparse mma.m16n8k32", "ldmatrix"). Element type T is __half or __nv_bfloat16; accumulation is in float.
#pragma once

#include <cstdint>

#include "machine.h"

namespace emulator {

// Each of `count` 8x8 matrices of 16-bit elements has its 8 row addresses in lanes 8 * i .. 8 * i + 7.
void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, Location);

template <typename T>
void multiply_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Location);

// mma.sp: of four neighbouring elements of a row of a, the two that `kept` names.
template <typename T>
void multiply_sparse_m16n8k32(float* d, const uint32_t* a, const uint32_t* b, uint32_t kept, Location);

}  // namespace emulator
