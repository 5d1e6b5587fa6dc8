// Depthwise grad_weight: any multiplier, both layouts, 3x3, 5x5 and 7x7 kernels in one pass over x and grad_y; any
// other kernel, stride or dilation by pieces of a kernel row, one pass a piece.
//
// Thread-to-data map. A block owns `lanes` neighbouring channel vectors and `slots` places; a place is one output
// column of one strip of rows of one image, and a slot takes every (splits * slots)-th place. A thread walks down its
// column and keeps a partial sum for every tap in registers; at each step it loads one value of grad_y, which enters
// a ring of the last R, and one row of x as wide as the kernel, and multiplies each x with each grad_y that it meets.
// Where channels are dense, neighbouring threads are neighbouring lanes; else they are neighbouring slots, hence
// columns.
//
// The order of all additions is fixed: a thread's own places in turn, the slots of a block by a tree in shared
// memory, the blocks (splits) by launch_sum_partials. Nothing is added atomically.
#include "common.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 8;  // taps of a kernel row that the general kernel takes at once

struct Args {
  int64_t x_n, x_c, y_n, y_c;  // strides, in elements
  int x_h, x_w, y_h, y_w;
  int H, W, P, Q, R, S;
  int vectors;  // channel vectors of grad_y
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int rows, splits, lanes, slots;
  uint32_t places;  // N * strips * Q
  FastDiv by_lanes, by_slots, by_channel_blocks, by_splits, by_pieces, by_columns, by_strips, by_multiplier;
  bool lanes_fastest;
};

// Adds up the sums of all slots of a lane, for kCount values a thread; the total is left in slot 0.
template <int kCount, typename A>
__device__ __forceinline__ void sum_slots(A (&sums)[kCount], A* buffer, int lanes, int lane, int slots, int slot) {
  const int position = slot * lanes + lane;
  const bool member = slot < slots;
  if (member) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) buffer[i * kThreads + position] = sums[i];
  }
  __syncthreads();
  for (int left = slots; left > 1;) {
    const int half = (left + 1) / 2;  // slot j takes slot j + half, which may not exist for the last j
    if (member && slot + half < left) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        buffer[i * kThreads + position] += buffer[i * kThreads + position + half * lanes];
    }
    __syncthreads();
    left = half;
  }
  if (slot == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = buffer[i * kThreads + position];
  }
  __syncthreads();  // the buffer is free again
}

// The one-pass kernel has kR = kS = R = S, kStride = the stride, no dilation. The general kernel has kR = 1, kS =
// kPiece and kStride = 1, and its block knows by its index which kernel row and which piece of it is its own.
template <typename T, int kVec, int kR, int kS, int kStride>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 || kR * kS * kVec > 40 ? 1 : 2)
    grad_weight_kernel(const Args a, const T* __restrict__ grad_y, const T* __restrict__ x,
                       acc_t<T>* __restrict__ partials) {
  using A = acc_t<T>;
  constexpr bool kOnePass = kR > 1;
  constexpr int kRing = (kR - 1) / kStride + 1;
  SMEM_ARRAY(A, buffer, [kS * kVec * kThreads]);

  uint32_t channel_block = blockIdx.x;
  uint32_t split = a.by_channel_blocks.split(channel_block);
  uint32_t piece = a.by_splits.split(split);
  const int first_r = static_cast<int>(a.by_pieces.split(piece));
  const int first_s = static_cast<int>(piece) * kS;

  uint32_t low = threadIdx.x;
  const uint32_t high = (a.lanes_fastest ? a.by_lanes : a.by_slots).split(low);
  const int lane = static_cast<int>(a.lanes_fastest ? low : high),
            slot = static_cast<int>(a.lanes_fastest ? high : low);
  const int vector = static_cast<int>(channel_block) * a.lanes + lane;
  const bool active = slot < a.slots && lane < a.lanes && vector < a.vectors;
  const int channel = vector * kVec;

  A sums[kR][kS * kVec] = {};
  if (active) {
    const T* x_channel = x + a.by_multiplier.div(channel) * a.x_c;
    const T* y_channel = grad_y + channel * a.y_c;
#pragma unroll 1
    for (uint32_t place = split * a.slots + slot; place < a.places; place += a.splits * a.slots) {
      uint32_t q = place;
      uint32_t strip = a.by_columns.split(q);
      const int64_t n = a.by_strips.split(strip);
      const int first_row = static_cast<int>(strip) * a.rows, last_row = min(first_row + a.rows, a.P);
      const T* image = x_channel + n * a.x_n;
      const T* grad = y_channel + n * a.y_n + static_cast<int>(q) * a.y_w;
      const int column = static_cast<int>(q) * a.stride_w - a.pad_w + first_s * a.dilation_w;

      A ring[kRing][kVec] = {};
#pragma unroll 1
      for (int j = first_row; j < last_row + kRing - 1; ++j) {
#pragma unroll
        for (int i = kRing - 1; i > 0; --i) {
#pragma unroll
          for (int v = 0; v < kVec; ++v) ring[i][v] = ring[i - 1][v];
        }
        if (j < last_row) {
          load_vec<kVec>(ring[0], grad + j * a.y_h);
        } else {
#pragma unroll
          for (int v = 0; v < kVec; ++v) ring[0][v] = 0;
        }
#pragma unroll
        for (int phase = 0; phase < kStride; ++phase) {
          const int h = kOnePass ? kStride * j + phase - a.pad_h : j * a.stride_h - a.pad_h + first_r * a.dilation_h;
          if (static_cast<unsigned>(h) >= static_cast<unsigned>(a.H)) continue;
          const T* row = image + h * a.x_h;
          A values[kS][kVec];
#pragma unroll
          for (int s = 0; s < kS; ++s) {
            const int w = column + (kOnePass ? s : s * a.dilation_w);
            const bool tap = kOnePass || first_s + s < a.S;
            if (tap && static_cast<unsigned>(w) < static_cast<unsigned>(a.W)) {
              load_vec<kVec>(values[s], row + w * a.x_w);
            } else {
#pragma unroll
              for (int v = 0; v < kVec; ++v) values[s][v] = 0;
            }
          }
#pragma unroll
          for (int r = phase; r < kR; r += kStride) {
#pragma unroll
            for (int s = 0; s < kS; ++s) {
#pragma unroll
              for (int v = 0; v < kVec; ++v) sums[r][s * kVec + v] += values[s][v] * ring[(r - phase) / kStride][v];
            }
          }
        }
      }
    }
  }

  // partials: [splits, K, R, S]
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    sum_slots(sums[r], buffer, a.lanes, lane, a.slots, slot);
    if (active && slot == 0) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const int64_t filter = static_cast<int64_t>(split) * a.vectors * kVec + channel + v;
#pragma unroll
        for (int s = 0; s < kS; ++s) {
          if (first_s + s < a.S) partials[(filter * a.R + first_r + r) * a.S + first_s + s] = sums[r][s * kVec + v];
        }
      }
    }
  }
}

template <typename T, int kVec, int kR, int kS, int kStride>
cudaError_t start(const ConvShape& s, const void* grad_y, const void* x, void* workspace, const Tile& tile,
                  cudaStream_t stream) {
  Args a{};
  a.x_n = s.x.n, a.x_c = s.x.c, a.x_h = static_cast<int>(s.x.h), a.x_w = static_cast<int>(s.x.w);
  a.y_n = s.y.n, a.y_c = s.y.c, a.y_h = static_cast<int>(s.y.h), a.y_w = static_cast<int>(s.y.w);
  a.H = static_cast<int>(s.H), a.W = static_cast<int>(s.W), a.P = static_cast<int>(s.P), a.Q = static_cast<int>(s.Q);
  a.R = static_cast<int>(s.R), a.S = static_cast<int>(s.S);
  a.vectors = static_cast<int>(s.K / kVec);
  a.stride_h = static_cast<int>(s.stride_h), a.stride_w = static_cast<int>(s.stride_w);
  a.pad_h = static_cast<int>(s.pad_h), a.pad_w = static_cast<int>(s.pad_w);
  a.dilation_h = static_cast<int>(s.dilation_h), a.dilation_w = static_cast<int>(s.dilation_w);
  a.rows = tile.rows, a.splits = tile.splits, a.lanes = tile.lanes, a.slots = kThreads / tile.lanes;
  a.lanes_fastest = s.y.c == 1 && s.K > 1;
  const int64_t strips = ceil_div<int64_t>(s.P, a.rows), channel_blocks = ceil_div(a.vectors, a.lanes);
  const int64_t pieces = kR > 1 ? 1 : ceil_div<int64_t>(s.S, kS), kernel_rows = kR > 1 ? 1 : s.R;
  a.places = static_cast<uint32_t>(s.N * strips * s.Q);
  a.by_lanes = FastDiv(a.lanes), a.by_slots = FastDiv(a.slots), a.by_channel_blocks = FastDiv(channel_blocks);
  a.by_splits = FastDiv(a.splits), a.by_pieces = FastDiv(pieces), a.by_columns = FastDiv(s.Q);
  a.by_strips = FastDiv(strips), a.by_multiplier = FastDiv(s.K / s.C);
  const LaunchConfig config{dim3(static_cast<unsigned>(channel_blocks * a.splits * pieces * kernel_rows)),
                            dim3(kThreads), 0, stream};
  return launch(grad_weight_kernel<T, kVec, kR, kS, kStride>, config, a, static_cast<const T*>(grad_y),
                static_cast<const T*>(x), static_cast<acc_t<T>*>(workspace));
}

template <typename T, int kVec, int kKernel>
cudaError_t start_one_pass(const ConvShape& s, const void* grad_y, const void* x, void* workspace, const Tile& tile,
                           cudaStream_t stream) {
  return s.stride_h == 1 ? start<T, kVec, kKernel, kKernel, 1>(s, grad_y, x, workspace, tile, stream)
                         : start<T, kVec, kKernel, kKernel, 2>(s, grad_y, x, workspace, tile, stream);
}

template <typename T, int kVec>
cudaError_t start_kernel(const ConvShape& s, const void* grad_y, const void* x, void* workspace, const Tile& tile,
                         cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (tile.window) {
      if (s.R == 3) return start_one_pass<T, kVec, 3>(s, grad_y, x, workspace, tile, stream);
      if (s.R == 5) return start_one_pass<T, kVec, 5>(s, grad_y, x, workspace, tile, stream);
      if constexpr (kVec == 1) {
        if (s.R == 7) return start_one_pass<T, kVec, 7>(s, grad_y, x, workspace, tile, stream);
      }
      return cudaErrorInvalidValue;
    }
  }
  return start<T, kVec, 1, kPiece, 1>(s, grad_y, x, workspace, tile, stream);
}

}  // namespace

cudaError_t launch_depthwise_grad_weight(const ConvShape& shape, DType dtype, const void* grad_y, const void* x,
                                         void* grad_w, void* workspace, const Tile& tile, cudaStream_t stream) {
  const cudaError_t error = dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return tile.vec == 2 ? start_kernel<T, 2>(shape, grad_y, x, workspace, tile, stream)
                         : start_kernel<T, 1>(shape, grad_y, x, workspace, tile, stream);
  });
  if (error != cudaSuccess) return error;
  return launch_sum_partials(shape, dtype, workspace, tile.splits, grad_w, stream);
}

}  // namespace sepconv::cuda
