// Depthwise grad_weight: any kernel, stride, dilation, multiplier, memory layout and dtype, by pieces of a kernel row,
// one pass over x and grad_y a piece.
//
// Thread-to-data map. A block owns a piece of up to kPiece taps of a kernel row, `lanes` neighbouring channel vectors
// and `slots` places; a place is one output column of one strip of rows of one image, and a slot takes every (splits *
// slots)-th place. A thread walks down its column and keeps a partial sum for every tap of the piece in registers; at
// each step it loads one value of grad_y and the values of x that the piece meets there. Where channels are dense,
// neighbouring threads are neighbouring lanes; else they are neighbouring slots, hence columns.
//
// The order of all additions is fixed: a thread's own places in turn, the slots of a block by a tree in shared
// memory, the blocks (splits) by launch_sum_partials. Nothing is added atomically.
#include "cuda/depthwise/cut.h"
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 8;  // taps of a kernel row

struct GradWeightArgs {
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

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    grad_weight_kernel(const GradWeightArgs a, const T* __restrict__ grad_y, const T* __restrict__ x,
                       acc_t<T>* __restrict__ partials) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  SMEM_ARRAY(A, buffer, [kPiece * kVec * kThreads]);

  uint32_t channel_block = blockIdx.x;
  uint32_t split = a.by_channel_blocks.split(channel_block);
  uint32_t piece = a.by_splits.split(split);
  const int r = static_cast<int>(a.by_pieces.split(piece));
  const int first_s = static_cast<int>(piece) * kPiece;

  uint32_t low = threadIdx.x;
  const uint32_t high = (a.lanes_fastest ? a.by_lanes : a.by_slots).split(low);
  const int lane = static_cast<int>(a.lanes_fastest ? low : high),
            slot = static_cast<int>(a.lanes_fastest ? high : low);
  const int vector = static_cast<int>(channel_block) * a.lanes + lane;
  const bool active = slot < a.slots && lane < a.lanes && vector < a.vectors;
  const int channel = vector * kVec;

  A sums[kPiece * kVec] = {};
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
#pragma unroll 1
      for (int p = first_row; p < last_row; ++p) {
        const int h = p * a.stride_h - a.pad_h + r * a.dilation_h;
        if (static_cast<unsigned>(h) >= static_cast<unsigned>(a.H)) continue;
        A y[kVec];
        load_vec<kVec>(y, grad + p * a.y_h);
        const T* row = image + h * a.x_h;
#pragma unroll
        for (int s = 0; s < kPiece; ++s) {
          const int w = column + s * a.dilation_w;
          if (first_s + s >= a.S || static_cast<unsigned>(w) >= static_cast<unsigned>(a.W)) continue;
          A value[kVec];
          load_vec<kVec>(value, row + w * a.x_w);
#pragma unroll
          for (int v = 0; v < kVec; ++v) sums[s * kVec + v] += value[v] * y[v];
        }
      }
    }
  }

  // partials: [splits, K, R, S]
  sum_slots(sums, buffer, a.lanes, lane, a.slots, slot);
  if (active && slot == 0) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      const int64_t filter = static_cast<int64_t>(split) * a.vectors * kVec + channel + v;
#pragma unroll
      for (int s = 0; s < kPiece; ++s) {
        if (first_s + s < a.S) partials[(filter * a.R + r) * a.S + first_s + s] = sums[s * kVec + v];
      }
    }
  }
}

template <typename T, int kVec>
cudaError_t start(const Launch& call, const GradWeightCut& cut) {
  const ConvShape& s = call.shape;
  GradWeightArgs a{};
  a.x_n = s.x.n, a.x_c = s.x.c, a.x_h = static_cast<int>(s.x.h), a.x_w = static_cast<int>(s.x.w);
  a.y_n = s.y.n, a.y_c = s.y.c, a.y_h = static_cast<int>(s.y.h), a.y_w = static_cast<int>(s.y.w);
  a.H = static_cast<int>(s.H), a.W = static_cast<int>(s.W), a.P = static_cast<int>(s.P), a.Q = static_cast<int>(s.Q);
  a.R = static_cast<int>(s.R), a.S = static_cast<int>(s.S);
  a.vectors = static_cast<int>(s.K / kVec);
  a.stride_h = static_cast<int>(s.stride_h), a.stride_w = static_cast<int>(s.stride_w);
  a.pad_h = static_cast<int>(s.pad_h), a.pad_w = static_cast<int>(s.pad_w);
  a.dilation_h = static_cast<int>(s.dilation_h), a.dilation_w = static_cast<int>(s.dilation_w);
  a.rows = cut.rows, a.splits = cut.splits, a.lanes = cut.lanes, a.slots = kThreads / cut.lanes;
  a.lanes_fastest = s.y.c == 1 && s.K > 1;
  const int64_t strips = ceil_div<int64_t>(s.P, a.rows), channel_blocks = ceil_div(a.vectors, a.lanes);
  const int64_t pieces = ceil_div<int64_t>(s.S, kPiece);
  a.places = static_cast<uint32_t>(s.N * strips * s.Q);
  a.by_lanes = FastDiv(a.lanes), a.by_slots = FastDiv(a.slots), a.by_channel_blocks = FastDiv(channel_blocks);
  a.by_splits = FastDiv(a.splits), a.by_pieces = FastDiv(pieces), a.by_columns = FastDiv(s.Q);
  a.by_strips = FastDiv(strips), a.by_multiplier = FastDiv(s.K / s.C);
  const LaunchConfig config{dim3(static_cast<unsigned>(channel_blocks * a.splits * pieces * s.R)), dim3(kThreads), 0,
                            call.stream};
  return launch(grad_weight_kernel<T, kVec>, config, a, call.first_as<T>(), call.second_as<T>(),
                call.workspace_as<acc_t<T>>());
}

}  // namespace

cudaError_t launch_depthwise_grad_weight(const Launch& call, const GradWeightCut& cut) {
  const cudaError_t error = dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return cut.vec == 2 ? start<T, 2>(call, cut) : start<T, 1>(call, cut);
  });
  return error != cudaSuccess ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
