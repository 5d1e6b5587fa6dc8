// Every line of inline PTX, each as a function with a name. The emulator has the same functions with emulated bodies
// (tests/emulator/ptx_emulated.h): a wrapper is added in both places or in none.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/device/tensor_map.h"

#ifdef CUDA_ON_CPU
#include "ptx_emulated.h"
#else

namespace sepconv::cuda {

// The architecture that this pass of the compiler is for: 900 for 9.0, 0 for the host. For what follows from the
// compiler's own needs there, as how many registers it is given.
#ifdef __CUDA_ARCH__
inline constexpr int kArch = __CUDA_ARCH__;
#else
inline constexpr int kArch = 0;
#endif

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- the same number, of which the compiler no longer knows anything: it is kept, and neither computed again nor
// joined with what it was made of. A load from an address made of it stays in its loop.
__device__ __forceinline__ int opaque(int i) {
  asm volatile("" : "+r"(i));
  return i;
}

// ---- 2^v and 1 / v within two units in the last place, one instruction each. What is not normal is zero.
__device__ __forceinline__ float exp2_fast(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
}
__device__ __forceinline__ float reciprocal_fast(float v) {
  float quotient;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(v));
  return quotient;
}

// ---- sum += a * b of two floats each, rounded once. From 10.0 on (and CUDA 13) it is one instruction,
// fma.rn.f32x2, which issues once for both.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDACC_VER_MAJOR__ >= 13
inline constexpr bool kHasPairs = true;
__device__ __forceinline__ void fma_pair(float (&sum)[2], const float (&a)[2], const float (&b)[2]) {
  const float2 both = __ffma2_rn(float2{a[0], a[1]}, float2{b[0], b[1]}, float2{sum[0], sum[1]});
  sum[0] = both.x, sum[1] = both.y;
}
#else
inline constexpr bool kHasPairs = false;
__device__ __forceinline__ void fma_pair(float (&sum)[2], const float (&a)[2], const float (&b)[2]) {
  for (int i = 0; i < 2; ++i) sum[i] = fmaf(a[i], b[i], sum[i]);
}
#endif

// ---- programmatic dependent launch (sm_90): a kernel may begin while the one before it in the stream ends. Behind
// this wait, with which every kernel begins, all that the other wrote is there, and it reads nothing any more that this
// one writes. No wait where launch() did not ask for an early beginning.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- loads of 2, 4 or 8 aligned bytes of global memory that nobody writes, zeros where `valid` is zero: nothing is
// then read. Always one predicated instruction, where an `if` may become a branch with the address made behind it.
__device__ __forceinline__ uint32_t load16_if(const void* from, uint32_t valid) {
  uint32_t v;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.u16 %0, [%1];}"
               : "=r"(v)
               : "l"(from), "r"(valid));
  return v;
}
__device__ __forceinline__ uint32_t load32_if(const void* from, uint32_t valid) {
  uint32_t v;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.b32 %0, [%1];}"
               : "=r"(v)
               : "l"(from), "r"(valid));
  return v;
}
__device__ __forceinline__ uint2 load64_if(const void* from, uint32_t valid) {
  uint2 v;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p ld.global.nc.v2.b32 {%0, %1}, [%2];}"
      : "=r"(v.x), "=r"(v.y)
      : "l"(from), "r"(valid));
  return v;
}

// ---- a store of 8 aligned bytes to global memory where `valid` is not zero, likewise one predicated instruction.
__device__ __forceinline__ void store64_if(void* to, uint2 v, uint32_t valid) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2};}" ::"l"(to), "r"(v.x),
               "r"(v.y), "r"(valid)
               : "memory");
}

// ---- matrix product of a warp (sm_80), d += a * b with a 16 x 16, b 16 x 8, fp32 sums.
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   a[0]: row g, k 2t and 2t + 1; a[1]: row g + 8; a[2], a[3]: the same rows, k + 8
//   b[0]: column g, k 2t and 2t + 1; b[1]: k + 8
//   d[0], d[1]: row g, columns 2t and 2t + 1; d[2], d[3]: row g + 8
template <typename T>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of a sparse factor, d += a * b with a 16 x 32, b 32 x 8: of every four neighbouring elements of a row of a,
// two that `kept` names, in their order, and zeros (PTX ISA, "Matrix Fragments for sparse mma.m16n8k32").
//   a[0]: row g, two elements of columns 4t .. 4t + 3; a[1]: row g + 8; a[2], a[3]: the same rows, columns + 16
//   b[i]: column g, k 8i + 2t and 8i + 2t + 1;  d: as above
//   kept, of lanes t = 0 and 1 only: 4 bits for each four of columns 16t .. 16t + 15, the first element's number
//   lowest; row g in the lower half and g + 8 in the upper one
// CUDA before 12.5 knows it by its older name only, which newer GPUs may be slow at.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define SEPCONV_MMA_SP "mma.sp::ordered_metadata"
#else
#define SEPCONV_MMA_SP "mma.sp"
#endif
template <typename T>
__device__ void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t kept);
template <>
__device__ __forceinline__ void mma_sp_m16n8k32<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                        uint32_t kept) {
  asm volatile(SEPCONV_MMA_SP
               ".sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(kept));
}
template <>
__device__ __forceinline__ void mma_sp_m16n8k32<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                               const uint32_t (&b)[4], uint32_t kept) {
  asm volatile(SEPCONV_MMA_SP
               ".sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(kept));
}
#undef SEPCONV_MMA_SP

// ---- four 8 x 8 matrices of 16-bit elements from shared memory (sm_75). Lane 8 i + j holds the address of row j of
// matrix i, aligned to 16 bytes; r[i] then holds elements 2t and 2t + 1 of row g of matrix i, or with _trans of its
// column g.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two matrices, whose rows' addresses lanes 0 to 15 hold.
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// ---- asynchronous copies from global to shared memory (sm_80). 16 (or 8, or 4) aligned bytes, zeros where not
// `valid`: `global` is then not read, but has to be an address all the same.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async8(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}
// The first `bytes` (1 to 16) of 16 aligned bytes, and zeros for the others, which are not read.
__device__ __forceinline__ void cp_async16_first(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kGroupsLeft of the thread's committed groups are on their way.
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// ---- barriers in shared memory that count bytes, and copies of boxes of a tensor by the copy engine (TMA, sm_90). A
// kernel that uses them has no body where they are missing: `if constexpr (kHasTma)`.
inline constexpr bool kHasTma = kArch == 0 || has_tma(kArch / 10);

// True in one lane of the warp, always the same; all 32 lanes ask. The compiler knows that a branch on it has one lane,
// which it does not of a branch on a lane's number: instructions that take their operands once for a warp stand there
// plainly.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected;
}
// A barrier goes through phases 0, 1, 2, ...; each ends when `arrivals` threads have arrived and all bytes that they
// announced have come. One thread initialises it, says so to the copy engine (the fence), and to the others as always.
__device__ __forceinline__ void mbar_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_mbar_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and announces bytes.
__device__ __forceinline__ void mbar_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity (the first has 0): what has then come is there for this thread to read.
__device__ __forceinline__ void mbar_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{.reg .pred p; wait: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra wait; done:}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// What this thread has read of shared memory is read before a box lands there: copies do not keep the order of loads
// and stores, neither behind a barrier nor in the same thread. Each reader says so, then meets the thread that asks for
// the box.
__device__ __forceinline__ void fence_async_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Copies the box that begins at channel c, column w, row h of image n, zeros where it is outside of the tensor
// (coordinates may be negative), to 128-byte aligned shared memory; its bytes arrive at the barrier, all of the box's.
__device__ __forceinline__ void tma_load_4d(void* shared, const TensorMap& map, int c, int w, int h, int n,
                                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(shared_address(barrier))
      : "memory");
}

}  // namespace sepconv::cuda

#endif
