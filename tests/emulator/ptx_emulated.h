// What csrc/cuda/device/ptx.cuh becomes on a CPU: every wrapper of inline PTX, by the same name, with an emulated body.
#pragma once

#include <cmath>
#include <cstdint>

#include "async_copy.h"
#include "bulk_copy.h"
#include "matrix.h"
#include "synchronise.h"

namespace sepconv::cuda {

inline constexpr int kArch = 0;

inline int opaque(int i) { return i; }

inline float normal_or_zero(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.f, v) : v; }
inline float exp2_fast(float v) { return normal_or_zero(std::exp2(normal_or_zero(v))); }
inline float reciprocal_fast(float v) { return normal_or_zero(1.f / normal_or_zero(v)); }

inline constexpr bool kHasPairs = false;
inline void fma_pair(float (&sum)[2], const float (&a)[2], const float (&b)[2]) {
  for (int i = 0; i < 2; ++i) sum[i] = std::fma(a[i], b[i], sum[i]);
}

// A launch begins here when the one before it has ended.
inline void wait_for_earlier_kernels() {}

template <typename T>
T load_if(const void* from, uint32_t valid) {
  return valid ? *static_cast<const T*>(from) : T{};
}
inline uint32_t load16_if(const void* from, uint32_t valid) { return load_if<uint16_t>(from, valid); }
inline uint32_t load32_if(const void* from, uint32_t valid) { return load_if<uint32_t>(from, valid); }
inline uint2 load64_if(const void* from, uint32_t valid) { return load_if<uint2>(from, valid); }

inline void store64_if(void* to, uint2 v, uint32_t valid) {
  if (valid) *static_cast<uint2*>(to) = v;
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_HERE) {
  emulator::multiply_m16n8k16<T>(d, a, b, EMULATOR_LOCATION);
}

template <typename T>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t kept, EMULATOR_HERE) {
  emulator::multiply_sparse_m16n8k32<T>(d, a, b, kept, EMULATOR_LOCATION);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_HERE) {
  emulator::load_matrices(r, 4, false, row, EMULATOR_LOCATION);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMULATOR_HERE) {
  emulator::load_matrices(r, 4, true, row, EMULATOR_LOCATION);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, EMULATOR_HERE) {
  emulator::load_matrices(r, 2, false, row, EMULATOR_LOCATION);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, EMULATOR_HERE) {
  emulator::load_matrices(r, 2, true, row, EMULATOR_LOCATION);
}

// The address has to be aligned where nothing is read, too.
inline void cp_async16(void* shared, const void* global, bool valid) {
  emulator::check_global_read(global, 0, 16);
  emulator::copy_async(shared, valid ? global : nullptr, 16, 16);
}
inline void cp_async16_first(void* shared, const void* global, int bytes) {
  emulator::check_global_read(global, 0, 16);
  emulator::copy_async(shared, global, 16, static_cast<uint32_t>(bytes));
}
inline void cp_async8(void* shared, const void* global, bool valid) {
  emulator::check_global_read(global, 0, 8);
  emulator::copy_async(shared, valid ? global : nullptr, 8, 8);
}
inline void cp_async4(void* shared, const void* global, bool valid) {
  emulator::check_global_read(global, 0, 4);
  emulator::copy_async(shared, valid ? global : nullptr, 4, 4);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kGroupsLeft>
void cp_async_wait() {
  emulator::wait_copies(kGroupsLeft);
}

inline constexpr bool kHasTma = true;
inline bool elect_one(EMULATOR_HERE) {
  emulator::collective(0xFFFFFFFFu, [](void**, uint32_t) {}, nullptr, "elect.sync", EMULATOR_LOCATION);
  return emulator::current().lane == 0;
}
inline void mbar_init(uint64_t* barrier, int arrivals, EMULATOR_HERE) {
  emulator::init_mbarrier(barrier, arrivals, EMULATOR_LOCATION);
}
inline void fence_mbar_init(EMULATOR_HERE) { emulator::fence_mbarriers(EMULATOR_LOCATION); }
inline void mbar_expect(uint64_t* barrier, int bytes, EMULATOR_HERE) {
  emulator::expect_bytes(barrier, bytes, EMULATOR_LOCATION);
}
inline void mbar_wait(uint64_t* barrier, int parity, EMULATOR_HERE) {
  emulator::wait_for_phase(barrier, parity, EMULATOR_LOCATION);
}
inline void fence_async_copies() { emulator::fence_bulk_copies(); }
inline void tma_load_4d(void* shared, const TensorMap& map, int c, int w, int h, int n, uint64_t* barrier,
                        EMULATOR_HERE) {
  emulator::copy_box(shared, map, c, w, h, n, barrier, EMULATOR_LOCATION);
}

}  // namespace sepconv::cuda
