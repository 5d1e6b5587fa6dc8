// One kernel file, compiled once for each instruction set, in one binary (the idea is Highway's foreach_target.h).
//
// A kernel file has two halves. The compiler reads the first one once; it includes this header, which reads the
// second one again for every instruction set, inside a namespace of that name and under a pragma that lets the
// compiler use it:
//
//   #ifndef SEPCONV_KERNELS
//   #define SEPCONV_KERNELS "this_file.cpp"
//   #include "cpu/simd/foreach_isa.h"  // and every header that the kernels need
//   namespace sepconv::cpu {
//   void door(...) { SEPCONV_BEST_ISA(kernel)(...); }
//   }
//   #else
//   ... kernels, in terms of simd.h; no #include, no namespace ...
//   #endif
//
// Rules for the second half, all because the pragma marks functions, not text:
// - Hot code is in functions, functors and templates, never in a lambda: GCC compiles a lambda for the baseline.
// - Helpers that take or return a Vector are SEPCONV_INLINE (always inlined): no vector crosses a call.
// - Other headers are included in the first half only (a fragment like simd.h, without includes, may be read in the
//   second), or an inline function of theirs could be compiled for AVX-512 and be the copy that the linker keeps for
//   everyone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"
#include "cpu/simd/storage.h"

#define SEPCONV_INLINE inline __attribute__((always_inline))

namespace sepconv::cpu {

// Bytes of a call's input and output, up to which they are expected in some cache: fetching ahead costs more than it
// brings.
inline constexpr int64_t kNearBytes = 10 << 20;

// parallel_tasks() for a functor: calls body(i) for every i in [0, tasks), in any order, on any thread.
template <typename Body>
void parallel(int64_t tasks, const Body& body) {
  const auto call = [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); };
  parallel_tasks(tasks, call, const_cast<Body*>(&body));
}

}  // namespace sepconv::cpu

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are never passed by value across a call (see above)

#define SEPCONV_ISA_LEVEL 0
#if defined(__x86_64__) && !defined(__clang__)
// Only processors without AVX2 run these: results count, not speed, and a fifth of a kernel file's compile time.
#pragma GCC push_options
#pragma GCC optimize("O1")
#endif
namespace sepconv::cpu::baseline {
namespace {
inline constexpr int kVectorBytes = 16;
#include "cpu/simd/simd.h"
#include SEPCONV_KERNELS
}  // namespace
}  // namespace sepconv::cpu::baseline
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC pop_options
#endif
#undef SEPCONV_ISA_LEVEL

#if defined(__x86_64__)

#define SEPCONV_ISA_LEVEL 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace sepconv::cpu::avx2 {
namespace {
inline constexpr int kVectorBytes = 32;
#include "cpu/simd/simd.h"
#include SEPCONV_KERNELS
}  // namespace
}  // namespace sepconv::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SEPCONV_ISA_LEVEL

#define SEPCONV_ISA_LEVEL 2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
namespace sepconv::cpu::avx512 {
namespace {
inline constexpr int kVectorBytes = 64;
#include "cpu/simd/simd.h"
#include SEPCONV_KERNELS
}  // namespace
}  // namespace sepconv::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SEPCONV_ISA_LEVEL

// The function of that name that was compiled for the instruction set in use.
#define SEPCONV_BEST_ISA(function)                                                         \
  (::sepconv::cpu::isa() == ::sepconv::cpu::Isa::avx512 ? ::sepconv::cpu::avx512::function \
   : ::sepconv::cpu::isa() == ::sepconv::cpu::Isa::avx2 ? ::sepconv::cpu::avx2::function   \
                                                        : ::sepconv::cpu::baseline::function)

#else
#define SEPCONV_BEST_ISA(function) ::sepconv::cpu::baseline::function
#endif
