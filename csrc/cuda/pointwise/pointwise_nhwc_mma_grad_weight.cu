// The gradient by the weight of a 1x1 convolution in channels_last, on tensor cores, for float16 and bfloat16: what is
// bound by memory. grad_w[m, n] = sum over pixels of a[pixel, m] * b[pixel, n], where a is the image of more channels.
//
// Threads to data: a block of 256 threads sums a tile of 128 x 32, 64 or 128 weights over one part of the pixels. They
// come 64 at a time through a ring of three stages, in slabs of 64 channels: 64 rows of 128 bytes, each of whose
// 16-byte pieces one thread copies, zeros beyond the last pixel and channel. While a stage is multiplied the next two
// are on their way. The eight warps lie on the tile as Block says. Rows are pixels, so ldmatrix turns both operands
// over.
//
// Each part writes its sums in fp32; launch_sum_partials adds them up.
#include "cuda/pointwise/pointwise_nhwc_mma.cuh"

namespace sepconv::cuda {
namespace {

using namespace pointwise;

constexpr int kThreads = kProductThreads;
constexpr int kRows = kProductSumRows;      // of a tile of weights
constexpr int kPixels = kProductSumPixels;  // of a stage
constexpr int kStages = kProductStages;
constexpr int kSlabBytes = kPixels * kRow;            // 64 channels of a stage
constexpr int kTurns = kPixels * kPieces / kThreads;  // pieces of a thread in a slab

// Warps along the tile's rows and columns; fragments of 16 rows and of 16 columns of a warp.
template <int kColumns>
struct Block {
  static constexpr int kAcross = kColumns == 32 ? 1 : 2, kDown = 8 / kAcross;
  static constexpr int kHigh = kRows / 16 / kDown, kWide = kColumns / 16 / kAcross;
  static constexpr int kSlabs = kRows / 64, kColumnSlabs = (kColumns + 63) / 64;
  static constexpr int kStageBytes = (kSlabs + kColumnSlabs) * kSlabBytes;
};

// One image: channels dense.
template <typename T>
struct Image {
  const T* data;
  Pixels pixels;
  int channels;
};

template <typename T>
struct SumArgs {
  Image<T> a, b;
  uint32_t part;           // pixels of a part, whole stages
  int64_t m_step, n_step;  // of a weight in the partial sums
  int64_t weights;
  float* partials;
};

// The thread's pieces of slabs `first_channel`, + 64, ... of an image, of the rows thread / 8 and + 32.
template <typename T, int kSlabs, int kChannels>
__device__ __forceinline__ void copy_slabs(unsigned char* stage, const Image<T>& image, int first_channel,
                                           uint32_t first_pixel, uint32_t end) {
  const int piece = static_cast<int>(threadIdx.x) % kPieces, row = static_cast<int>(threadIdx.x) / kPieces;
  if (piece >= kChannels / kVec) return;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int r = row + turn * (kThreads / kPieces);
    const uint32_t pixel = first_pixel + r;
    const int channel = first_channel + piece * kVec;
    const T* const from = image.data + (pixel < end ? image.pixels.offset(pixel) : 0) + channel;
    unsigned char* const to = stage + swizzled(r, piece);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const bool valid = pixel < end && channel + slab * 64 < image.channels;
      cp_async16(to + slab * kSlabBytes, valid ? from + slab * 64 : image.data, valid);
    }
  }
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) product_sum_nhwc_kernel(const SumArgs<T> args) {
  wait_for_earlier_kernels();
  using B = Block<kColumns>;
  DYN_SMEM(smem);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int m0 = static_cast<int>(blockIdx.y) * kRows, n0 = static_cast<int>(blockIdx.z) * kColumns;
  const uint32_t begin = blockIdx.x * args.part, end = min(begin + args.part, args.a.pixels.axis.size);
  const int steps = begin < end ? static_cast<int>(ceil_div<uint32_t>(end - begin, kPixels)) : 0;

  const auto load = [&](int step) {
    if (step < steps) {
      unsigned char* const stage = smem + step % kStages * B::kStageBytes;
      const uint32_t pixel = begin + step * kPixels;
      copy_slabs<T, B::kSlabs, 64>(stage, args.a, m0, pixel, end);
      copy_slabs<T, B::kColumnSlabs, (kColumns < 64 ? kColumns : 64)>(stage + B::kSlabs * kSlabBytes, args.b, n0, pixel,
                                                                      end);
    }
    cp_async_commit();  // also where nothing is left, so that the wait below counts steps
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);

  const int row = warp % B::kDown * B::kHigh * 16, column = warp / B::kDown * B::kWide * 16;
  const auto piece_at = [](int pixel, int piece) {
    return piece / kPieces * kSlabBytes + swizzled(pixel, piece % kPieces);
  };
  float sums[B::kHigh][B::kWide][2][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the step's pixels are there for all, and the stage that is filled next has no readers left
    load(step + kStages - 1);
    const unsigned char* const left = smem + step % kStages * B::kStageBytes;
    const unsigned char* const right = left + B::kSlabs * kSlabBytes;
#pragma unroll
    for (int k = 0; k < kPixels; k += 16) {
      uint32_t a[B::kHigh][4];
#pragma unroll
      for (int i = 0; i < B::kHigh; ++i) {
        ldmatrix_x4_trans(a[i], left + piece_at(k + lane / 16 * 8 + lane % 8, row / 8 + i * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int j = 0; j < B::kWide; ++j) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, right + piece_at(k + lane % 16, column / 8 + j * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < B::kHigh; ++i) {
          mma_m16n8k16<T>(sums[i][j][0], a[i], {b[0], b[1]});
          mma_m16n8k16<T>(sums[i][j][1], a[i], {b[2], b[3]});
        }
      }
    }
  }

  float* const partials = args.partials + blockIdx.x * args.weights;
#pragma unroll
  for (int i = 0; i < B::kHigh; ++i) {
#pragma unroll
    for (int j = 0; j < B::kWide; ++j) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int m = m0 + row + i * 16 + e / 2 % 2 * 8 + lane / 4;
        const int n = n0 + column + j * 16 + e / 4 * 8 + lane % 4 * 2 + e % 2;
        if (m < args.a.channels && n < args.b.channels) {
          partials[m * args.m_step + n * args.n_step] = sums[i][j][e / 4][e % 4];
        }
      }
    }
  }
}

}  // namespace

cudaError_t launch_pointwise_nhwc_mma_grad_weight(const Launch& call, const SplitsCut& cut) {
  const ConvShape& s = call.shape;
  const cudaError_t error = dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Image<T> y{call.first_as<T>(), Pixels(y_pixels(s)), static_cast<int>(s.K)};
    const Image<T> x{call.second_as<T>(), Pixels(x_pixels(s)), static_cast<int>(s.C)};
    const bool y_first = s.K >= s.C;
    const int64_t part = ceil_div<int64_t>(ceil_div<int64_t>(s.N * s.P * s.Q, cut.splits), kPixels) * kPixels;
    const SumArgs<T> args{y_first ? y : x,   y_first ? x : y,     static_cast<uint32_t>(part), y_first ? s.C : 1,
                          y_first ? 1 : s.C, s.weight_elements(), call.workspace_as<float>()};
    const auto go = [&](auto width) {
      constexpr int kColumns = decltype(width)::value;
      const dim3 grid(static_cast<unsigned>(cut.splits),
                      static_cast<unsigned>(ceil_div<int64_t>(args.a.channels, kRows)),
                      static_cast<unsigned>(ceil_div<int64_t>(args.b.channels, kColumns)));
      const LaunchConfig config{grid, dim3(kThreads), kStages * Block<kColumns>::kStageBytes, call.stream};
      return launch(product_sum_nhwc_kernel<T, kColumns>, config, args);
    };
    const int64_t columns = product_sum_columns(s);
    return columns == 32 ? go(Int<32>{}) : columns == 64 ? go(Int<64>{}) : go(Int<128>{});
  });
  return error != cudaSuccess ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
