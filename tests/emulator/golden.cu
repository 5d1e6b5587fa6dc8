// Every wrapper of csrc/cuda/device/ptx.cuh once, on fixed inputs, its result printed bit by bit. nvcc compiles this
// file for a GPU and g++ for the emulator; tests/test_golden_ptx.py compares the two outputs. So a misreading of a
// fragment layout that the wrappers' author and the emulator's share is found the first time that a GPU is at hand.
//
// Inputs are small whole numbers: all sums are exact in fp32, in any order, so results can be equal to the last bit.
#include <cstdio>
#include <vector>

#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kLanes = 32;

__host__ __device__ inline int small_number(uint32_t i) {
  return static_cast<int>((i * 2654435761u) >> 28) - 8;
}  // -8 .. 7

template <typename T>
__device__ uint32_t two(uint32_t i) {
  const T pair[2] = {from_acc<T>(static_cast<float>(small_number(2 * i))),
                     from_acc<T>(static_cast<float>(small_number(2 * i + 1)))};
  return *reinterpret_cast<const uint32_t*>(pair);
}

// out: [lane][4 floats]. Every register of every lane is different, so a swapped pair shows.
template <typename T>
__global__ void mma_golden(uint32_t* out) {
  const uint32_t lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (uint32_t i = 0; i < 4; ++i) a[i] = two<T>(lane * 4 + i);
  for (uint32_t i = 0; i < 2; ++i) b[i] = two<T>(1000 + lane * 2 + i);
  for (uint32_t i = 0; i < 4; ++i) d[i] = static_cast<float>(small_number(5000 + lane * 4 + i));
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = __float_as_uint(d[i]);
}

// out: [lane][4 floats]. Every four of a row keep two other elements, and lanes that have no say name others again.
template <typename T>
__global__ void mma_sp_golden(uint32_t* out) {
  const uint32_t lane = threadIdx.x;
  uint32_t a[4], b[4], kept = 0;
  float d[4];
  for (uint32_t i = 0; i < 4; ++i) a[i] = two<T>(lane * 4 + i);
  for (uint32_t i = 0; i < 4; ++i) b[i] = two<T>(1000 + lane * 4 + i);
  for (uint32_t i = 0; i < 4; ++i) d[i] = static_cast<float>(small_number(5000 + lane * 4 + i));
  for (uint32_t i = 0; i < 8; ++i) kept |= (0xedc984u >> (lane * 8 + i) * 7 % 6 * 4 & 15) << 4 * i;
  mma_sp_m16n8k32<T>(d, a, b, kept);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = __float_as_uint(d[i]);
}

// out: [lane][4 registers]. Every 16-bit element of the four matrices is its own number; rows lie 16 bytes apart from
// dense.
template <bool kTransposed>
__global__ void ldmatrix_golden(uint32_t* out) {
  SMEM_ARRAY(uint16_t, rows, [32][16]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 16; ++i) rows[lane][i] = static_cast<uint16_t>(lane * 256 + i);
  __syncwarp();
  uint32_t r[4];
  if constexpr (kTransposed) {
    ldmatrix_x4_trans(r, rows[lane ^ 5]);
  } else {
    ldmatrix_x4(r, rows[lane ^ 5]);
  }
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}

// out: [lane][4 registers]. The addresses of the last 16 lanes count for nothing; the last two registers are zeros.
__global__ void ldmatrix_x2_golden(uint32_t* out) {
  SMEM_ARRAY(uint16_t, rows, [32][16]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 16; ++i) rows[lane][i] = static_cast<uint16_t>(lane * 256 + i);
  __syncwarp();
  uint32_t r[2];
  ldmatrix_x2_trans(r, rows[lane ^ 5]);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = i < 2 ? r[i] : 0;
}

// out: [lane][4 words]. Two groups in flight; every third copy is not valid, and must fill with zeros.
__global__ void copy_golden(const uint32_t* from, uint32_t* out) {
  SMEM_ARRAY(uint32_t, to, [2][kLanes][4]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) to[i / 4][lane][i % 4] = 0xDEADBEEFu;
  for (int group = 0; group < 2; ++group) {
    cp_async16(to[group][lane], from + (lane + group) % kLanes * 4, (lane + group) % 3 != 0);
    cp_async_commit();
  }
  cp_async_wait<1>();  // the first group is there
  uint32_t first[4];
  for (int i = 0; i < 4; ++i) first[i] = to[0][lane][i];
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = first[i] * 31 + to[1][lane][i];
}

// out: [lane][4 words]. Every third lane reads nothing, from an address that is nobody's.
__global__ void load_golden(const uint32_t* from, uint32_t* out) {
  wait_for_earlier_kernels();
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t valid = static_cast<uint32_t>(opaque(lane % 3)) << 5;
  const uint32_t* at = valid ? from + 2 * lane : nullptr;
  const uint2 both = load64_if(at, valid);
  out[lane * 4] = load16_if(at, valid);
  out[lane * 4 + 1] = load32_if(at, valid);
  out[lane * 4 + 2] = both.x;
  out[lane * 4 + 3] = both.y;
}

// out: [lane][4 words]: the first lane / 2 + 1 bytes of a copy.
__global__ void copy_first_golden(const uint32_t* from, uint32_t* out) {
  SMEM_ARRAY(uint32_t, to, [kLanes][4]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) to[lane][i] = 0xDEADBEEFu;
  cp_async16_first(to[lane], from + lane * 4, lane / 2 + 1);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = to[lane][i];
}

// out: [lane][4 words]. Words one by one, every fifth not valid.
__global__ void copy_words_golden(const uint32_t* from, uint32_t* out) {
  SMEM_ARRAY(uint32_t, to, [kLanes][4]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) {
    to[lane][i] = 0xDEADBEEFu;
    cp_async4(&to[lane][i], from + (4 * lane + 7 * i) % (4 * kLanes), (lane + i) % 5 != 0);
  }
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = to[lane][i];
}

// out: [lane][4 words]. Pairs of words, every fifth not valid.
__global__ void copy_pairs_golden(const uint32_t* from, uint32_t* out) {
  SMEM_ARRAY(uint32_t, to, [kLanes][4]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) to[lane][i] = 0xDEADBEEFu;
  for (int i = 0; i < 4; i += 2) {
    cp_async8(&to[lane][i], from + (4 * lane + 6 * i) % (4 * kLanes), (lane + i) % 5 != 0);
  }
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = to[lane][i];
}

// out: [lane][4 floats]. Powers of two, of which an approximation is exact; what is not normal; and what is infinite.
__global__ void fast_golden(uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x), power = lane * 10 - 160;
  out[lane * 4] = __float_as_uint(exp2_fast(static_cast<float>(power)));
  out[lane * 4 + 1] = __float_as_uint(reciprocal_fast(static_cast<float>(1 << lane % 31)));
  out[lane * 4 + 2] = __float_as_uint(reciprocal_fast(__uint_as_float(0x7F800000u - (lane << 23))));
  out[lane * 4 + 3] = __float_as_uint(reciprocal_fast(__uint_as_float(static_cast<uint32_t>(lane) << 20)));
}

// out: [lane][2 floats, twice]. Products that a second rounding would change, and each float of its own pair.
__global__ void pair_golden(uint32_t* out) {
  const auto lane = static_cast<float>(threadIdx.x);
  float sums[2][2] = {{-1.f, 2.f}, {lane, -lane}};
  const float a[2] = {1.f + (lane + 1.f) * 0x1p-23f, 3.f - lane * 0x1p-21f}, b[2] = {1.f - 0x1p-20f, lane * 0.1f};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    fma_pair(sums[i], a, b);
    for (int k = 0; k < 2; ++k) out[threadIdx.x * 4 + 2 * i + k] = __float_as_uint(sums[i][k]);
  }
}

// out: [lane][4 words]. The last two are not written where a lane is left out.
__global__ void store_golden(uint32_t* out) {
  const uint32_t lane = threadIdx.x;
  uint32_t* to = out + 4 * lane;
  to[0] = to[1] = lane;
  store64_if(to + 2, uint2{2000 + lane, 3000 + lane}, (lane & 1) << 7);
}

// out: [lane][4 words], of four boxes of 8 columns by 4 channels that come through a ring of two stages, each used
// twice. They lie inside of the image, over its edges and beyond.
__global__ void box_golden(const __grid_constant__ TensorMap image, uint32_t* out) {
  if constexpr (kHasTma) {
    DYN_SMEM(smem);
    const int lane = static_cast<int>(threadIdx.x);
    uint64_t* full = reinterpret_cast<uint64_t*>(smem + 2 * 128);
    const auto ask = [&](int box) {
      uint64_t* arrival = full + box % 2;
      mbar_expect(arrival, 128);
      if (box == 0) tma_load_4d(smem, image, 0, -2, 0, 0, arrival);
      if (box == 1) tma_load_4d(smem + 128, image, 4, 5, 1, 1, arrival);
      if (box == 2) tma_load_4d(smem, image, 0, 0, -1, 1, arrival);
      if (box == 3) tma_load_4d(smem + 128, image, 2, 1, 0, 1, arrival);
    };
    if (elect_one()) {
      mbar_init(full, 1);
      mbar_init(full + 1, 1);
      fence_mbar_init();
      ask(0);
      ask(1);
    }
    const uint32_t elected = __popc(__ballot_sync(0xffffffffu, elect_one()));
    __syncwarp();
    for (int box = 0; box < 4; ++box) {
      mbar_wait(full + box % 2, box / 2);
      out[lane * 4 + box] = reinterpret_cast<const uint32_t*>(smem)[box % 2 * 32 + lane] + elected;
      fence_async_copies();
      __syncwarp();
      if (box < 2 && elect_one()) ask(box + 2);
    }
  }
}

struct Memory {  // on the GPU, or plain memory in the emulator
  uint32_t* data = nullptr;
  explicit Memory(const std::vector<uint32_t>& values) {
#ifdef CUDA_ON_CPU
    data = new uint32_t[values.size()];
    std::copy(values.begin(), values.end(), data);
#else
    cudaMalloc(&data, values.size() * 4);
    cudaMemcpy(data, values.data(), values.size() * 4, cudaMemcpyHostToDevice);
#endif
  }
  std::vector<uint32_t> read(size_t count) const {
    std::vector<uint32_t> values(count);
#ifdef CUDA_ON_CPU
    std::copy(data, data + count, values.begin());
#else
    cudaMemcpy(values.data(), data, count * 4, cudaMemcpyDeviceToHost);
#endif
    return values;
  }
};

template <typename... Params, typename... Args>
bool show(const char* name, void (*kernel)(Params...), Args... args) {
  const Memory out(std::vector<uint32_t>(kLanes * 4, 0xFFFFFFFFu));
  const cudaError_t error = launch(kernel, LaunchConfig{dim3(1), dim3(kLanes), 1024}, args..., out.data);
  if (error != cudaSuccess) {
    printf("%s: CUDA error %d\n", name, static_cast<int>(error));
    return false;
  }
  printf("%s:", name);
  for (const uint32_t word : out.read(kLanes * 4)) printf(" %08x", word);
  printf("\n");
  return true;
}

// An image of 2 x 3 x 10 pixels of 7 numbers, which lie 8 apart.
bool show_boxes() {
  std::vector<uint32_t> values(2 * 3 * 10 * 8);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint32_t>(i * 2654435761u);
  const Memory from(values);
  TensorMap map;
  const ImageBoxes boxes{from.data, 2, 3, 10, 7, Strides{240, 1, 80, 8}, 8, 4};
  if (make_tensor_map(map, DType::float32, boxes) != cudaSuccess) return false;
  return show("tma elect_one mbar_init fence_mbar_init mbar_expect mbar_wait fence_async_copies tma_load_4d",
              box_golden, map);
}

bool show_all() {
  std::vector<uint32_t> values(kLanes * 4);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint32_t>(i * 2654435761u);
  const Memory from(values);
  bool fine = show("mma_m16n8k16 float16", mma_golden<__half>);
  fine &= show("mma_m16n8k16 bfloat16", mma_golden<__nv_bfloat16>);
  fine &= show("mma_sp_m16n8k32 float16", mma_sp_golden<__half>);
  fine &= show("mma_sp_m16n8k32 bfloat16", mma_sp_golden<__nv_bfloat16>);
  fine &= show("ldmatrix_x4", ldmatrix_golden<false>);
  fine &= show("ldmatrix_x4_trans", ldmatrix_golden<true>);
  fine &= show("cp_async16 cp_async_commit cp_async_wait", copy_golden, static_cast<const uint32_t*>(from.data));
  fine &= show("cp_async8", copy_pairs_golden, static_cast<const uint32_t*>(from.data));
  fine &= show("ldmatrix_x2_trans", ldmatrix_x2_golden);
  fine &= show("cp_async4", copy_words_golden, static_cast<const uint32_t*>(from.data));
  fine &= show("load16_if load32_if load64_if opaque", load_golden, static_cast<const uint32_t*>(from.data));
  fine &= show("cp_async16_first", copy_first_golden, static_cast<const uint32_t*>(from.data));
  fine &= show("store64_if", store_golden);
  fine &= show("exp2_fast reciprocal_fast", fast_golden);
  fine &= show("fma_pair", pair_golden);
  if (has_tma(compiled_for(box_golden))) fine &= show_boxes();
  return fine;
}

}  // namespace
}  // namespace sepconv::cuda

int main() { return sepconv::cuda::show_all() ? 0 : 1; }
