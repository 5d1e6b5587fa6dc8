// The CUDA of a CPU: this file is force-included (g++ -include emulator.h) before the first line of every .cu file, so
// that the source which nvcc compiles for a GPU compiles for the host and runs under an execution-model emulator.
// README.md tells how the pieces fit together.
#pragma once

#define CUDA_ON_CPU 1

// CUDA's crt/host_defines.h keeps the definitions of these words that it finds, so they must come before any include.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ use_SMEM_ARRAY_or_DYN_SMEM_instead_of_a_bare_shared_array

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include "async_copy.h"
#include "intrinsics.h"
#include "machine.h"
#include "matrix.h"
#include "shared_memory.h"
#include "synchronise.h"

#define threadIdx (::emulator::current().index)
#define blockIdx (::emulator::block().index)
#define blockDim (::emulator::block().size)
#define gridDim (::emulator::block().grid)
#define warpSize 32

// The three names of csrc/cuda/device/common.cuh through which kernels start. A fault is thrown, so an error code never
// comes back.
struct LaunchConfig {
  dim3 grid, block;
  size_t smem_bytes = 0;
  cudaStream_t stream = nullptr;
  int cluster = 1;
};
template <typename... Params, typename... Args>
[[nodiscard]] cudaError_t launch(void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
  if (config.cluster != 1) throw emulator::Fault("thread block clusters are not emulated");
  emulator::launch(kernel, config.grid, config.block, config.smem_bytes, std::forward<Args>(args)...);
  return cudaSuccess;
}
template <typename... Params>
int compiled_for(void (*)(Params...)) {
  return 90;
}
