// CUDA's built-in functions, as plain host functions: memory hints, atomics, bits, arithmetic of half types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "machine.h"

using std::max;
using std::min;

// Loads and stores with cache hints. Unlike a plain dereference they are told their alignment by the hardware only.
template <typename T>
void emulator_check_alignment(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulator::die("misaligned vector access");
}
#define EMULATOR_LOAD(name)      \
  template <typename T>          \
  T name(const T* p) {           \
    emulator_check_alignment(p); \
    return *p;                   \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
#define EMULATOR_STORE(name)     \
  template <typename T>          \
  void name(T* p, T value) {     \
    emulator_check_alignment(p); \
    *p = value;                  \
  }
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwt)

// Only one thread runs at a time, so a plain read, change and write is atomic; the race detector does not look here.
#define EMULATOR_ATOMIC(name, expression)                        \
  template <typename T>                                          \
  __attribute__((no_sanitize("thread"))) T name(T* p, T value) { \
    const T old = *p;                                            \
    *p = (expression);                                           \
    return old;                                                  \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicMin, std::min(old, value))
EMULATOR_ATOMIC(atomicMax, std::max(old, value))
EMULATOR_ATOMIC(atomicAnd, old& value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicExch, value)
template <typename T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T* p, T expected, T value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emulator::die("__trap"); }

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return std::clamp(x, 0.0f, 1.0f); }

// cuda_fp16.h and cuda_bf16.h hide these from a host compiler. A product of two halves is exact in double, and so is
// the rounding of the sum but for double-rounding cases that no test here can tell apart.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(std::fma(double(__half2float(a)), double(__half2float(b)), double(__half2float(c))));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(
      std::fma(double(__bfloat162float(a)), double(__bfloat162float(b)), double(__bfloat162float(c))));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
