// The 1x1 convolution and its gradient by the input in channels_last, on tensor cores, for float16 and bfloat16: what
// is bound by memory. to[pixel, output] = sum over c of from[pixel, c] * w[output, c].
//
// Threads to data: a block of 256 threads has up to 128 outputs, whose weights stay in shared memory, and walks over
// tiles of 128 pixels, blockIdx.x, blockIdx.x + gridDim.x, ... A tile comes in slices of 64 channels through a ring of
// three stages: 128 rows of 128 bytes, each of whose 16-byte pieces one thread copies. The ring goes on over the end of
// a tile, so that the next tile's slices are on their way while this one's are multiplied and stored. The eight warps
// lie on a tile as Block says, each with 16 or 32 pixels.
//
// Rows of the weights are permuted within 32 outputs, so that the sums of a thread are eight neighbouring outputs of a
// pixel: one store.
#include "cuda/pointwise/pointwise_nhwc_mma.cuh"

namespace sepconv::cuda {
namespace {

using namespace pointwise;

constexpr int kThreads = kProductThreads;
constexpr int kPixels = kProductPixels;  // of a tile
constexpr int kStages = kProductStages;
constexpr int kStageBytes = kPixels * kRow;
constexpr int kCopies = kPixels * kPieces / kThreads;  // of a thread and stage

// Warps along the pixels and along the outputs; m16 tiles of pixels and groups of 32 outputs of a warp.
template <int kOutputs>
struct Block {
  static constexpr int kAcross = kOutputs % 64 == 0 ? 2 : 1, kDown = 8 / kAcross;
  static constexpr int kRows = kPixels / 16 / kDown, kGroups = kOutputs / 32 / kAcross;
  static_assert(kDown * kRows * 16 == kPixels && kAcross * kGroups * 32 == kOutputs);
};

struct ProductArgs {
  Pixels from, to;     // the pixels of the image that is read, and of the one that is written
  int depth, outputs;  // channels of each
  int slices;          // of 64 channels
  int tiles;
  int64_t w_depth, w_output;  // strides of the weight, of which one is 1
  Activation activation;
};

// The output whose weights are row 32 j + 8 i + c: a thread has columns c = 2t and 2t + 1 of each i, which become
// outputs 8t to 8t + 7.
__device__ __forceinline__ int output_of(int row) {
  return row / 32 * 32 + row % 8 / 2 * 8 + row / 8 % 4 * 2 + row % 2;
}
// And the row of output 8n + e.
__device__ __forceinline__ int row_of(int n, int e) { return n / 4 * 32 + e / 2 * 8 + n % 4 * 2 + e % 2; }

// All weights of the block's outputs, zeros beyond the last output and channel. Those that are dense along the channels
// are copied piece by piece; of others a thread loads eight outputs of one channel, and neighbouring threads write
// neighbouring channels.
template <typename T, int kOutputs>
__device__ __forceinline__ void load_weights(const ProductArgs& a, const T* __restrict__ w, unsigned char* to,
                                             int first_output) {
  if (a.w_depth == 1) {
    for (int i = static_cast<int>(threadIdx.x); i < a.slices * kOutputs * kPieces; i += kThreads) {
      const int row = i / kPieces, c = row / kOutputs * 64 + i % kPieces * kVec;
      const int output = first_output + output_of(row % kOutputs);
      const bool inside = c < a.depth && output < a.outputs;
      cp_async16(to + swizzled(row, i % kPieces), inside ? w + output * a.w_output + c : w, inside);
    }
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < a.slices * 64 * (kOutputs / kVec); i += kThreads) {
    const int c = i % (a.slices * 64), n = i / (a.slices * 64), output = first_output + n * kVec;
    Vec<T, kVec> v{};
    if (c < a.depth && output < a.outputs) {
      v = *reinterpret_cast<const Vec<T, kVec>*>(w + c * a.w_depth + output);
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const int row = c / 64 * kOutputs + row_of(n, e);
      reinterpret_cast<T*>(to + swizzled(row, c % 64 / kVec))[c % kVec] = v.v[e];
    }
  }
}

template <typename T, int kOutputs>
__global__ void __launch_bounds__(kThreads, 2)
    product_nhwc_kernel(const ProductArgs a, const T* __restrict__ from, const T* __restrict__ w,
                        const T* __restrict__ bias, const T* __restrict__ residual, T* __restrict__ to) {
  wait_for_earlier_kernels();
  using B = Block<kOutputs>;
  DYN_SMEM(smem);
  unsigned char* const weights = smem + kStages * kStageBytes;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_output = static_cast<int>(blockIdx.y) * kOutputs;
  load_weights<T, kOutputs>(a, w, weights, first_output);

  // The thread's copies: one piece of rows thread / 8 + 32 i. An m16n8k16 takes two pieces, so that of an odd number
  // one more is zeros.
  const int copied_piece = thread % kPieces, copied_row = thread / kPieces;
  const int pieces = a.depth / kVec, all_pieces = (pieces + 1) & ~1;
  int next_tile = static_cast<int>(blockIdx.x), next_slice = 0, next_stage = 0;
  const T* next[kCopies];
  bool inside[kCopies];
  const auto load = [&] {
    if (next_tile < a.tiles) {
      if (next_slice == 0) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const auto pixel = static_cast<uint32_t>(next_tile * kPixels + copied_row + i * (kThreads / kPieces));
          inside[i] = pixel < a.from.axis.size;
          next[i] = from + (inside[i] ? a.from.offset(pixel) : 0) + copied_piece * kVec;
        }
      }
      const int piece = next_slice * kPieces + copied_piece;
      if (piece < all_pieces) {
        unsigned char* const stage = smem + next_stage * kStageBytes + swizzled(copied_row, copied_piece);
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const bool valid = inside[i] && piece < pieces;
          cp_async16(stage + i * (kThreads / kPieces * kRow), valid ? next[i] + next_slice * 64 : from, valid);
        }
      }
      if (++next_slice == a.slices) next_slice = 0, next_tile += static_cast<int>(gridDim.x);
    }
    next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
    cp_async_commit();  // also where nothing is left, so that the wait below counts slices
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load();

  const int down = warp % B::kDown, across = warp / B::kDown;
  const int a_at = swizzled(down * B::kRows * 16 + lane % 16, lane / 16);
  const int b_at = swizzled(across * B::kGroups * 32 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  // Of each 32 outputs a thread has eight, of pixels g and g + 8 of each m16.
  const int output = first_output + across * B::kGroups * 32 + lane % 4 * kVec;
  int stage = 0;
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x); tile < a.tiles; tile += static_cast<int>(gridDim.x)) {
    float sums[B::kRows][B::kGroups][4][4] = {};
#pragma unroll 1
    for (int slice = 0; slice < a.slices; ++slice) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the slice is there for all, and the stage that is filled next has no readers left
      load();
      const unsigned char* const left = smem + stage * kStageBytes;
      const unsigned char* const right = weights + slice * (kOutputs * kRow);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      const int steps = (all_pieces - slice * kPieces) / 2;
#pragma unroll
      for (int k = 0; k < kPieces / 2; ++k) {
        if (k >= steps) break;
        uint32_t pixels[B::kRows][4];
#pragma unroll
        for (int m = 0; m < B::kRows; ++m) ldmatrix_x4(pixels[m], left + (a_at ^ (k * 32)) + m * (16 * kRow));
#pragma unroll
        for (int j = 0; j < B::kGroups; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t columns[4];
            ldmatrix_x4(columns, right + (b_at ^ (k * 32)) + (j * 2 + half) * (16 * kRow));
#pragma unroll
            for (int m = 0; m < B::kRows; ++m) {
              mma_m16n8k16<T>(sums[m][j][half * 2], pixels[m], {columns[0], columns[1]});
              mma_m16n8k16<T>(sums[m][j][half * 2 + 1], pixels[m], {columns[2], columns[3]});
            }
          }
        }
      }
    }

    if (bias != nullptr) {
#pragma unroll
      for (int j = 0; j < B::kGroups; ++j) {
        if (output + j * 32 >= a.outputs) continue;
        float b[kVec];
        load_vec<kVec>(b, bias + output + j * 32);
#pragma unroll
        for (int m = 0; m < B::kRows; ++m) {
#pragma unroll
          for (int i = 0; i < 16; ++i) sums[m][j][i / 4][i % 4] += b[i / 4 * 2 + i % 2];
        }
      }
    }
#pragma unroll
    for (int m = 0; m < B::kRows; ++m) {
      float done[B::kGroups][2][kVec];
#pragma unroll
      for (int j = 0; j < B::kGroups; ++j) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          done[j][i / kVec][i % kVec] = sums[m][j][i % kVec / 2][i / kVec * 2 + i % 2];
        }
      }
      const auto each_vector = [&](const auto& use) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto pixel = static_cast<uint32_t>(tile * kPixels + (down * B::kRows + m) * 16 + half * 8 + lane / 4);
          if (pixel >= a.to.axis.size) continue;
          const int64_t at = a.to.offset(pixel) + output;
#pragma unroll
          for (int j = 0; j < B::kGroups; ++j) {
            if (output + j * 32 < a.outputs) use(at + j * 32, done[j][half]);
          }
        }
      };
      if (residual != nullptr) {
        each_vector([&](int64_t at, float (&sum)[kVec]) {
          float added[kVec];
          load_vec<kVec>(added, residual + at);
#pragma unroll
          for (int e = 0; e < kVec; ++e) sum[e] += added[e];
        });
      }
      const auto store = [&] { each_vector([&](int64_t at, float (&v)[kVec]) { store_vec<kVec>(to + at, v); }); };
      if (a.activation == Activation::identity) {
        store();
      } else {  // not of all sums at once: it has few numbers in work beside the others
        activate_by_16<T>(a.activation, reinterpret_cast<float (&)[B::kGroups * 16]>(done));
        store();
      }
    }
  }
}

cudaError_t start(const Launch& call, const PointwiseAxis& from, const PointwiseAxis& to, int64_t depth,
                  int64_t outputs, int64_t w_depth, int64_t w_output, const ProductCut& cut) {
  const int64_t tiles = ceil_div<int64_t>(from.size, kPixels);
  const ProductArgs args{Pixels(from),
                         Pixels(to),
                         static_cast<int>(depth),
                         static_cast<int>(outputs),
                         static_cast<int>(ceil_div<int64_t>(depth, 64)),
                         static_cast<int>(tiles),
                         w_depth,
                         w_output,
                         call.epilogue.activation};
  return dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto go = [&](auto width) {
      constexpr int kOutputs = decltype(width)::value;
      const LaunchConfig config{dim3(static_cast<unsigned>(std::min<int64_t>(cut.blocks, tiles)),
                                     static_cast<unsigned>(ceil_div<int64_t>(outputs, kOutputs))),
                                dim3(kThreads), static_cast<size_t>(product_bytes(depth, kOutputs)), call.stream};
      return launch(product_nhwc_kernel<T, kOutputs>, config, args, call.first_as<T>(), call.second_as<T>(),
                    call.bias_as<T>(), call.residual_as<T>(), call.out_as<T>());
    };
    switch (cut.outputs) {
      case 32: return go(Int<32>{});
      case 64: return go(Int<64>{});
      case 96: return go(Int<96>{});
      case 128: return go(Int<128>{});
      default: return cudaErrorInvalidValue;
    }
  });
}

}  // namespace

cudaError_t launch_pointwise_nhwc_mma_forward(const Launch& call, const ProductCut& cut) {
  const ConvShape& s = call.shape;
  return start(call, x_pixels(s), y_pixels(s), s.C, s.K, s.w.c, s.w.n, cut);
}

cudaError_t launch_pointwise_nhwc_mma_grad_input(const Launch& call, const ProductCut& cut) {
  const ConvShape& s = call.shape;
  return start(call, y_pixels(s), x_pixels(s), s.K, s.C, s.w.n, s.w.c, cut);
}

}  // namespace sepconv::cuda
