// What every kernel file shares: launching, shared memory, element types, vectors, fast division, the epilogue.
//
// The same files compile for a CPU under an emulator of the execution model (tests/emulator), which then provides
// LaunchConfig, launch() (which returns cudaSuccess, or throws), compiled_for(), SMEM_ARRAY, DYN_SMEM and the CUDA
// built-ins before this file is seen, and defines CUDA_ON_CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/activation.h"
#include "core/arithmetic.h"
#include "core/conv_shape.h"
#include "cuda/device/ptx.cuh"
#include "cuda/launch.h"

#ifndef CUDA_ON_CPU
#include <cuda_runtime.h>

#include <cstdlib>
#include <string_view>

// Shared memory has two spellings only: a static array, SMEM_ARRAY(float, tile, [8][33]), and the dynamic bytes of the
// launch, DYN_SMEM(bytes), which begin on a 1024-byte boundary.
#define SMEM_ARRAY(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]

struct LaunchConfig {
  dim3 grid, block;
  size_t smem_bytes = 0;
  cudaStream_t stream = nullptr;
  int cluster = 1;  // blocks a cluster, along x
};

// Programmatic dependent launch, from 9.0 on: a kernel begins while the one before it ends, and waits for its memory
// (wait_for_earlier_kernels). By SEPCONV_CUDA_PDL=1 only, until a GPU has said what it gains.
inline bool begins_early() {
  static const bool wanted = [] {
    const char* const value = std::getenv("SEPCONV_CUDA_PDL");
    return value != nullptr && std::string_view(value) == "1";
  }();
  int device = 0, major = 0;
  return wanted && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// The only way to start a kernel. Arguments are converted to the kernel's parameter types here, at compile time.
template <typename... Params, typename... Args>
[[nodiscard]] cudaError_t launch(void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
  constexpr size_t kStaticLimit = 48 << 10;  // more than this has to be asked for
  if (config.smem_bytes > kStaticLimit) {
    // Always the same number, as it belongs to the kernel and not to the launch: a lower one could forbid a launch of
    // the same kernel that another thread is about to make, or that a CUDA graph has captured.
    if (config.smem_bytes > sepconv::cuda::kMostShared) return cudaErrorInvalidConfiguration;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int{sepconv::cuda::kMostShared});
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t c{};
  c.gridDim = config.grid;
  c.blockDim = config.block;
  c.dynamicSmemBytes = config.smem_bytes;
  c.stream = config.stream;
  c.attrs = attributes;
  if (config.cluster > 1) {
    cudaLaunchAttribute& a = attributes[c.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = static_cast<unsigned>(config.cluster), a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
#if CUDART_VERSION >= 13000
  // What blocks read again lies in their shared memory: as many of them as fit are worth more than a large L1.
  constexpr size_t kStaged = 16 << 10;
  if (config.smem_bytes >= kStaged) {
    cudaLaunchAttribute& a = attributes[c.numAttrs++];
    a.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    a.val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  }
#endif
  if (begins_early()) {
    cudaLaunchAttribute& a = attributes[c.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&c, kernel, std::forward<Args>(args)...);
}

// The virtual architecture (90 for 9.0) of the code that the current device runs for a kernel, 0 where there is none:
// PTX for an older architecture runs on a newer device, without what was compiled for that one alone.
template <typename... Params>
int compiled_for(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return attributes.ptxVersion;
  (void)cudaGetLastError();  // the answer is none: later calls should not meet an error
  return 0;
}
#endif

namespace sepconv::cuda {

// ---- element types

template <typename T>
struct AccumulateTraits {
  using type = float;
};
template <>
struct AccumulateTraits<double> {
  using type = double;
};
// The type that sums are kept in.
template <typename T>
using acc_t = typename AccumulateTraits<T>::type;

__host__ __device__ inline float to_acc(float v) { return v; }
__host__ __device__ inline double to_acc(double v) { return v; }
__host__ __device__ inline float to_acc(__half v) { return __half2float(v); }
__host__ __device__ inline float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__host__ __device__ inline T from_acc(acc_t<T> v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

// Calls f(TypeTag<T>{}) with the element type of dtype; f returns a cudaError_t.
template <typename T>
struct TypeTag {
  using type = T;
};
template <typename F>
cudaError_t dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(TypeTag<float>{});
    case DType::float64: return f(TypeTag<double>{});
    case DType::float16: return f(TypeTag<__half>{});
    case DType::bfloat16: return f(TypeTag<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

// The same for the half types; others have no kernel where this is used.
template <typename F>
cudaError_t dispatch_half(DType dtype, F&& f) {
  if (dtype == DType::float16) return f(TypeTag<__half>{});
  if (dtype == DType::bfloat16) return f(TypeTag<__nv_bfloat16>{});
  return cudaErrorInvalidValue;
}

// A number as a type, for a kernel's template parameter.
template <int kValue>
using Int = std::integral_constant<int, kValue>;

// ---- vectors: kN neighbouring elements that move as one load or store

template <typename T, int kN>
struct alignas(sizeof(T) * kN) Vec {
  static_assert(sizeof(T) * kN <= 16 && (kN & (kN - 1)) == 0, "one memory instruction moves 1, 2, 4, 8 or 16 bytes");
  T v[kN];
};

// Elements in a 16-byte vector.
template <typename T>
inline constexpr int kVec16 = 16 / static_cast<int>(sizeof(T));

// p must be aligned to the vector: the plan has seen to it.
template <int kN, typename T>
__device__ __forceinline__ void load_vec(acc_t<T> (&out)[kN], const T* p) {
  const Vec<T, kN> in = *reinterpret_cast<const Vec<T, kN>*>(p);
#pragma unroll
  for (int i = 0; i < kN; ++i) out[i] = to_acc(in.v[i]);
}
template <int kN, typename T>
__device__ __forceinline__ void store_vec(T* p, const acc_t<T> (&in)[kN]) {
  Vec<T, kN> out;
#pragma unroll
  for (int i = 0; i < kN; ++i) out.v[i] = from_acc<T>(in[i]);
  *reinterpret_cast<Vec<T, kN>*>(p) = out;
}

// ---- whole numbers

// Division of a 32-bit number below 2^31 by a fixed divisor in 1 .. 2^31 - 1: a multiplication and a shift.
// (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994.)
struct FastDiv {
  uint32_t divisor = 1, multiplier = 0, shift = 0;
  FastDiv() : FastDiv(1) {}
  explicit FastDiv(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  __host__ __device__ __forceinline__ uint32_t div(uint32_t a) const {
    const auto high = static_cast<uint32_t>((static_cast<uint64_t>(a) * multiplier) >> 32);
    return (high + a) >> shift;
  }
  // Returns the quotient, leaves the remainder in a.
  __host__ __device__ __forceinline__ uint32_t split(uint32_t& a) const {
    const uint32_t quotient = div(a);
    a -= quotient * divisor;
    return quotient;
  }
};

// The same interface for 64-bit numbers, where speed is not the matter.
struct WideDiv {
  int64_t divisor = 1;
  WideDiv() = default;
  explicit WideDiv(int64_t d) : divisor(d) {}
  __host__ __device__ __forceinline__ int64_t div(int64_t a) const { return a / divisor; }
  __host__ __device__ __forceinline__ int64_t split(int64_t& a) const {
    const int64_t quotient = a / divisor;
    a -= quotient * divisor;
    return quotient;
  }
};

// The divider that belongs to an index type: uint32_t (numbers below 2^31) or int64_t.
template <typename Index>
using Divider = std::conditional_t<sizeof(Index) == 4, FastDiv, WideDiv>;

// Strides as the index type that a kernel computes in.
template <typename I>
struct Offsets {
  I n, c, h, w;
  explicit Offsets(const Strides& s)
      : n(static_cast<I>(s.n)), c(static_cast<I>(s.c)), h(static_cast<I>(s.h)), w(static_cast<I>(s.w)) {}
};

// ---- the epilogue

// Of tensors of half types, where fast exponentials and quotients are exact enough: an error of 1e-5 of the result, of
// which a half type shows a fiftieth. NaN passes through, and what is infinite comes out as it does of activate().
inline constexpr float kLog2E = 1.44269504f;
__device__ __forceinline__ float sigmoid_fast(float v) { return reciprocal_fast(1.f + exp2_fast(-kLog2E * v)); }
__device__ __forceinline__ float activate_fast(Activation a, float v) {
  switch (a) {
    case Activation::gelu: {
      // v times the normal distribution, whose tail is 2^p(|v|). p is fitted to its logarithm: the tail is within 7e-6
      // up to 6, and within 4e-3 up to 8, where the result is 5e-15. From there on it goes down to zero.
      const float z = fabsf(v);
      float p = fmaf(-1.7289295e-6f, z, 5.9330319e-5f);
      p = fmaf(p, z, -9.1133133e-4f);
      p = fmaf(p, z, 8.4265023e-3f);
      p = fmaf(p, z, -5.3779345e-2f);
      p = fmaf(p, z, -4.5866355e-1f);
      p = fmaf(p, z, -1.1511599f);
      p = fmaf(p, z, -1.0000056f);
      const float tail = exp2_fast(p);
      return v * (v < 0.f ? tail : 1.f - tail);
    }
    case Activation::silu: return v * sigmoid_fast(v);
    case Activation::sigmoid: return sigmoid_fast(v);
    case Activation::tanh: {
      const float near = v - v * v * v * 0.33333334f;  // where the other way loses what 1 has more digits of
      return fabsf(v) < 0.06f ? near : 1.f - 2.f * sigmoid_fast(-2.f * v);
    }
    default: return activate(a, v);
  }
}

// An activation of what becomes an element of type T.
template <typename T>
__device__ __forceinline__ acc_t<T> activate_as(Activation a, acc_t<T> v) {
  if constexpr (sizeof(T) == 2) {
    return activate_fast(a, v);
  } else {
    return activate(a, v);
  }
}

// One activation, known at compile time, over all values of a thread.
template <typename T, Activation kActivation, int kN>
__device__ __forceinline__ void activate_unrolled(acc_t<T> (&v)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) v[i] = activate_as<T>(kActivation, v[i]);
}

// Applies a to all values of a thread, which stay in registers and become elements of type T. The cheap activations are
// unrolled; the others are long, so their code stands once for two or four values, which pass under it like beads on a
// string.
template <typename T, int kN>
__device__ __forceinline__ void activate_all(Activation a, acc_t<T> (&v)[kN]) {
  if constexpr (sizeof(T) == 2 && kN >= 64) {  // passing 64 sums under GELU takes more instructions than GELU
    if (a == Activation::gelu) return activate_unrolled<T, Activation::gelu>(v);
  }
  switch (a) {
    case Activation::identity: return;
    case Activation::relu: return activate_unrolled<T, Activation::relu>(v);
    case Activation::relu6: return activate_unrolled<T, Activation::relu6>(v);
    case Activation::leaky_relu: return activate_unrolled<T, Activation::leaky_relu>(v);
    case Activation::hardswish: return activate_unrolled<T, Activation::hardswish>(v);
    case Activation::silu:
      if constexpr (sizeof(T) == 2) return activate_unrolled<T, Activation::silu>(v);
      break;
    default: break;
  }
  constexpr int kMost = sizeof(T) == 2 && kN > 16 ? 2 : 4;  // four fast ones beside 32 sums spill in nchw_mma
  constexpr int kChunk = kN % kMost == 0 ? kMost : (kN % 2 == 0 ? 2 : 1);
#pragma unroll 1
  for (int pass = 0; pass < kN / kChunk; ++pass) {
    acc_t<T> done[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) done[i] = activate_as<T>(a, v[i]);
#pragma unroll
    for (int i = 0; i + kChunk < kN; ++i) v[i] = v[i + kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[kN - kChunk + i] = done[i];
  }
}

template <typename T, int kN, int... kAll>
__device__ __forceinline__ void activate_known(Activation a, float (&v)[kN], std::integer_sequence<int, kAll...>) {
  constexpr auto kNamed = [](int i) { return static_cast<Activation>(i); };
  (void)((a == kNamed(kAll) && (activate_unrolled<T, kNamed(kAll)>(v), true)) || ...);
}

// The same of kernels that have half types alone, all of it unrolled: by 16, with a branch between, so that what is in
// work at a time stays within the registers.
template <typename T, int kN>
__device__ __forceinline__ void activate_by_16(Activation a, float (&v)[kN]) {
  static_assert(sizeof(T) == 2 && kN % 16 == 0);
#pragma unroll
  for (int i = 0; i < kN; i += 16) {
    a = static_cast<Activation>(opaque(static_cast<int>(a)));  // not known to have been asked for before
    activate_known<T>(a, reinterpret_cast<float (&)[16]>(v[i]), std::make_integer_sequence<int, kActivationCount>());
  }
}

}  // namespace sepconv::cuda
