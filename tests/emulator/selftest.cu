// Small kernels with one fault each, chosen by name on the command line: does the emulator report it? The kernels of
// the project need not use all of this today. Run by tests/test_emulated_core.py; prints "right", or what was found.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "cuda/device/ptx.cuh"
#include "machine.h"
#include "race.h"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 96;

// The sum of a block's values, by shuffles and through shared memory; every fault is in here.
__global__ void sum_kernel(const float* in, float* out, const std::string* name) {
  const auto fault = [name](const char* other) { return *name == other; };
  SMEM_ARRAY(float, sums, [kThreads / 32]);
  SMEM_ARRAY(float, line, [kThreads]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  float value = in[blockIdx.x * kThreads + thread + (fault("input overrun") ? 1 : 0)];

  if (fault("early exit") && thread == 40) return;
  if (fault("divergent barrier") && thread < 64) __syncthreads();
  if (fault("divergent warp") && lane < 16) value += __shfl_xor_sync(0xffffffffu, value, 1);
  if (fault("lane outside of the mask") && lane < 16) value = __shfl_down_sync(0xffffu, value, 8);
  if (fault("own lane missing")) value = __shfl_sync(0xfffffffeu, value, 1);

  // Lanes exchange values through shared memory.
  line[thread] = value;
  if (!fault("missing syncwarp")) __syncwarp();
  value = line[thread ^ 1];
  if (!fault("write after read")) __syncwarp();
  line[thread] = value;
  __syncwarp();
  value = line[thread ^ 1];

  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, fault("wrong shuffle") && distance == 4 ? 2 : distance);
  }
  if (lane == 0) sums[warp + (fault("shared overrun") ? 1 : 0)] = value;
  if (!fault("missing barrier")) __syncthreads();
  if (thread == 0) {
    float total = 0;
    if (fault("uninitialised register")) {
      float none[2];
      total = none[thread];
    }
    for (int i = 0; i < kThreads / 32 + (fault("shared overread") ? 1 : 0); ++i) total += sums[i];
    const int blocks = static_cast<int>(gridDim.x);
    if (!(fault("forgotten output") && static_cast<int>(blockIdx.x) == blocks - 1)) {
      out[fault("blocks share an output") ? 0 : blockIdx.x + (fault("output overrun") ? 1 : 0)] = total;
    }
  }
  if (__ballot_sync(0xffffffffu, lane < 8) != 0xffu || __any_sync(0xffffffffu, lane == 99)) __trap();
}

// Each thread copies four values to shared memory asynchronously, and adds up its neighbour's.
__global__ void copy_kernel(const float* in, float* out, const std::string* name) {
  const auto fault = [name](const char* other) { return *name == other; };
  DYN_SMEM(bytes);
  float* tile = reinterpret_cast<float*>(bytes);
  const int thread = static_cast<int>(threadIdx.x), neighbour = thread ^ 32;
  cp_async16(tile + thread * 4 + (fault("misaligned copy") ? 1 : 0), in + thread * 4, true);
  cp_async_commit();
  if (!fault("copy not waited for") && !fault("thread ends in flight")) cp_async_wait<0>();
  if (fault("thread ends in flight")) return;
  if (!fault("copy without barrier")) __syncthreads();
  float total = 0;
  for (int i = 0; i < 4; ++i) total += tile[(fault("copy not waited for") ? thread : neighbour) * 4 + i];
  if (fault("dynamic overrun")) tile[64 * 4] = total;
  if (fault("misaligned vector")) total += reinterpret_cast<const float4*>(in + 1)->x;
  out[thread] = total;
}

// A warp adds up the rows of an image, which come through a ring of two stages.
__global__ void box_kernel(const __grid_constant__ TensorMap image, float* out, const std::string* name) {
  constexpr int kRows = 5, kBytes = 128;
  const auto fault = [name](const char* other) { return *name == other; };
  DYN_SMEM(smem);
  const int lane = static_cast<int>(threadIdx.x);
  uint64_t* full = reinterpret_cast<uint64_t*>(smem + 2 * kBytes);
  const auto ask = [&](int row) {
    mbar_expect(full + row % 2, kBytes + (fault("bytes that never come") && row == 3 ? 16 : 0));
    tma_load_4d(smem + row % 2 * kBytes, image, 0, 0, row, 0, full + row % 2);
  };
  if (elect_one()) {
    for (int i = 0; i < 2; ++i) mbar_init(full + i, 1);
    if (!fault("mbarrier without fence")) fence_mbar_init();
    for (int row = 0; row < 2; ++row) ask(row);
  }
  if (!fault("mbarrier without syncwarp")) __syncwarp();
  float total = 0;
  for (int row = 0; row < kRows; ++row) {
    const bool waits = !(fault("box not waited for") && row == 2) && !(fault("box that another waits for") && lane > 0);
    if (waits) mbar_wait(full + row % 2, fault("wrong parity") ? 1 - row / 2 % 2 : row / 2 % 2);
    if (fault("box that another waits for")) __syncwarp();
    total += reinterpret_cast<const float*>(smem)[row % 2 * kBytes / 4 + (lane ^ 1)];
    if (!fault("box without fence")) fence_async_copies();
    if (!fault("box over what is read")) __syncwarp();
    if (row + 2 < kRows + (fault("block ends before a box") ? 1 : 0) && elect_one()) ask(row + 2);
  }
  out[lane] = total;
}

// An exact heap block, so that AddressSanitizer sees its end.
struct Values {
  std::unique_ptr<float[]> data;
  explicit Values(int count, bool counting = false) : data(new float[count]) {
    for (int i = 0; i < count; ++i) data[i] = counting ? static_cast<float>(i % 7) : NAN;
  }
};

std::string check(const std::string& name) {
  constexpr int kBlocks = 4, kCopiers = 64;
  if (name == "odd block") return launch(sum_kernel, LaunchConfig{dim3(1), dim3(33)}, nullptr, nullptr, &name), "";
  {
    const Values in(kBlocks * kThreads, true), out(kBlocks);
    emulator::race::watch(out.data.get(), kBlocks * sizeof(float));
    const LaunchConfig config{dim3(kBlocks), dim3(kThreads)};
    if (launch(sum_kernel, config, static_cast<const float*>(in.data.get()), out.data.get(), &name)) return "error";
    for (int b = 0; b < kBlocks; ++b) {
      float expected = 0;
      for (int i = 0; i < kThreads; ++i) expected += in.data[b * kThreads + i];
      if (out.data[b] != expected) return "the sum is wrong";
    }
  }
  const Values in(kCopiers * 4, true), out(kCopiers);
  const LaunchConfig config{dim3(1), dim3(kCopiers), kCopiers * 16};
  if (launch(copy_kernel, config, static_cast<const float*>(in.data.get()), out.data.get(), &name)) return "error";
  for (int t = 0; t < kCopiers; ++t) {
    float expected = 0;
    for (int i = 0; i < 4; ++i) expected += in.data[(t ^ 32) * 4 + i];
    if (out.data[t] != expected) return "the copy is wrong";
  }
  // 8 pixels of 4 channels in a row.
  const Values rows(5 * 32, true), sums(32);
  TensorMap map;
  if (make_tensor_map(map, DType::float32, {rows.data.get(), 1, 5, 8, 4, {160, 1, 32, 4}, 8, 4})) return "error";
  if (launch(box_kernel, LaunchConfig{dim3(1), dim3(32), 2 * 128 + 16}, map, sums.data.get(), &name)) return "error";
  for (int t = 0; t < 32; ++t) {
    float expected = 0;
    for (int row = 0; row < 5; ++row) expected += rows.data[row * 32 + (t ^ 1)];
    if (sums.data[t] != expected) return "the sum of boxes is wrong";
  }
  return "right";
}

}  // namespace
}  // namespace sepconv::cuda

int main(int count, char** words) {
  const std::string name = count > 1 ? words[1] : "";
  emulator::set_seed(count > 2 ? atoi(words[2]) : 0);
  try {
    printf("%s\n", sepconv::cuda::check(name).c_str());
  } catch (const std::exception& fault) {
    printf("%s\n", fault.what());
  }
}
