#include "matrix.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstring>

#include "race.h"
#include "shared_memory.h"
#include "synchronise.h"

namespace emulator {
namespace {

struct LoadLane {
  uint32_t* registers;
  const void* row;
};

template <int kCount, bool kTransposed>
void execute_load(void** lanes, uint32_t) {
  const int first_thread = current().warp * 32;
  for (int m = 0; m < kCount; ++m) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) {
      const void* row = static_cast<LoadLane*>(lanes[m * 8 + i])->row;
      shared_memory::check_range(row, 16, 16, "ldmatrix");
      race::access(first_thread + m * 8 + i, row, 16, false);
      memcpy(matrix[i], row, 16);
    }
    for (int lane = 0; lane < 32;
         ++lane) {  // lane holds elements (lane / 4, 2 * (lane % 4)) and the next of each matrix
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = kTransposed ? matrix[j][i] : matrix[i][j];
      const uint32_t high = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<LoadLane*>(lanes[lane])->registers[m] = low | high << 16;
    }
  }
}

float to_float(uint16_t bits, __half) {
  __half_raw raw;
  raw.x = bits;
  return __half2float(raw);
}
float to_float(uint16_t bits, __nv_bfloat16) { return std::bit_cast<float>(uint32_t(bits) << 16); }

struct MultiplyLane {
  float* d;
  const uint32_t *a, *b;
  uint32_t kept = 0;  // of a sparse a
};

template <typename T>
void execute_multiply(void** lanes, uint32_t) {
  float a[16][16], b[8][16];  // [row][k], [column][k]
  const auto element = [](uint32_t word, int i) { return to_float(uint16_t(word >> 16 * i), T()); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto* l = static_cast<MultiplyLane*>(lanes[lane]);
    const int group = lane / 4, k = lane % 4 * 2;
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 2; ++i) a[group + 8 * (r & 1)][k + i + 8 * (r >> 1)] = element(l->a[r], i);
    }
    for (int r = 0; r < 2; ++r) {
      for (int i = 0; i < 2; ++i) b[group][k + i + 8 * r] = element(l->b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* l = static_cast<MultiplyLane*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r >> 1), column = lane % 4 * 2 + (r & 1);
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      l->d[r] += sum;
    }
  }
}

template <typename T>
void execute_sparse_multiply(void** lanes, uint32_t) {
  float a[16][32] = {}, b[8][32];  // [row][k], [column][k]
  const auto element = [](uint32_t word, int i) { return to_float(uint16_t(word >> 16 * i), T()); };
  const auto lane_of = [&](int group, int t) { return static_cast<MultiplyLane*>(lanes[group * 4 + t]); };
  for (int group = 0; group < 8; ++group) {
    for (int row = group; row < 16; row += 8) {
      for (int four = 0; four < 8; ++four) {
        const uint32_t kept = lane_of(group, four / 4)->kept >> (row / 8 * 16 + four % 4 * 4);
        const uint32_t first = kept & 3, second = kept >> 2 & 3;
        if (first >= second) die("mma.sp: the numbers of the elements that are kept are not in order");
        const uint32_t word = lane_of(group, four % 4)->a[four / 4 * 2 + row / 8];
        a[row][four * 4 + first] = element(word, 0), a[row][four * 4 + second] = element(word, 1);
      }
    }
    for (int t = 0; t < 4; ++t) {
      for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < 2; ++i) b[group][8 * r + 2 * t + i] = element(lane_of(group, t)->b[r], i);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r >> 1), column = lane % 4 * 2 + (r & 1);
      float sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[row][k] * b[column][k];
      static_cast<MultiplyLane*>(lanes[lane])->d[r] += sum;
    }
  }
}

}  // namespace

void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, Location at) {
  LoadLane mine{registers, row};
  const auto execute = count == 4   ? (transposed ? execute_load<4, true> : execute_load<4, false>)
                       : count == 2 ? (transposed ? execute_load<2, true> : execute_load<2, false>)
                                    : (transposed ? execute_load<1, true> : execute_load<1, false>);
  collective(0xFFFFFFFFu, execute, &mine, "ldmatrix", at);
}

template <typename T>
void multiply_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Location at) {
  MultiplyLane mine{d, a, b};
  collective(0xFFFFFFFFu, execute_multiply<T>, &mine, "mma.sync", at);
}
template <typename T>
void multiply_sparse_m16n8k32(float* d, const uint32_t* a, const uint32_t* b, uint32_t kept, Location at) {
  MultiplyLane mine{d, a, b, kept};
  collective(0xFFFFFFFFu, execute_sparse_multiply<T>, &mine, "mma.sp", at);
}
template void multiply_sparse_m16n8k32<__half>(float*, const uint32_t*, const uint32_t*, uint32_t, Location);
template void multiply_sparse_m16n8k32<__nv_bfloat16>(float*, const uint32_t*, const uint32_t*, uint32_t, Location);
template void multiply_m16n8k16<__half>(float*, const uint32_t*, const uint32_t*, Location);
template void multiply_m16n8k16<__nv_bfloat16>(float*, const uint32_t*, const uint32_t*, Location);

}  // namespace emulator
