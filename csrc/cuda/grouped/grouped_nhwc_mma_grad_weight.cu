// Groups of 4, 8 or 16 channels under 3x3 kernels in channels_last, on tensor cores: the gradient by the weight, for
// stride 1 or 2. grad_w[k, c, r, s] = sum over n, p, q of grad_y[n, p, q, k] * x[n, p stride + r - pad, ..., c].
//
// Threads to data: a block of 256 threads sums the weights of a slab of 64 channels over the items of one part: strips
// of an image, `tiles` times 16 columns of grad_y wide. It walks down a strip in steps of `pairs` times kOut rows of
// grad_y; all threads copy the rows a stage ahead, 16 bytes at a time, zeros where there is no pixel. A stage has the
// rows of x that no step before has read, so the last rows of a step are the next stage's.
//
// A warp multiplies 16 columns of kOut rows at a time; the sums stay in its registers. Rows in shared memory are
// pixels, so ldmatrix turns both operands over. Of 16 channels, a product's rows are the channels of one tap; two warps
// share a group and add up their sums at the end. Of eight (or of twice four) they are two taps of the same channels:
// the first two of a row, and the last one of two rows of x, of which one may be of no use to a row of grad_y.
//
// Each part writes its sums in fp32; launch_sum_partials adds them up. Borders are zeros that are multiplied like other
// numbers: an infinite one that meets them makes a NaN.
#include "cuda/grouped/grouped_nhwc_mma.cuh"

namespace sepconv::cuda {
namespace {

using namespace grouped;

struct SumArgs {
  int64_t x_n, y_n;  // strides, in elements
  int x_h, x_w, y_h, y_w;
  int H, W, P, Q, pad_h, pad_w;
  int channels, group, slabs;
  int down, pairs, tiles, strips, steps, column_tiles, items;  // as in ProductArgs
  Pass x_pass, y_pass;                                         // rows of a step
  int pitch;                                                   // of rows of x in shared memory
  int64_t weights;
};

// The sums of a warp.
template <typename T, int kDeep, int kStride>
struct Sums {
  static constexpr int kOut = kStride == 1 ? 2 : 1, kIn = 2, kTail = 3 - kStride, kRows = kIn + kTail;
  static constexpr int kParts = 4;
  float taps[3][3][2][4] = {};
  int at_x[3], at_y;  // of this lane's row of a fragment

  __device__ __forceinline__ Sums(int part, int lane) {
    const int pixel = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int kw = 0; kw < 3; ++kw) at_x[kw] = swizzled<kStride>(pixel * kStride + kw, part * 2 + lane / 8 % 2);
    at_y = swizzled<1>(lane % 16, part * 2 + lane / 16);
  }
  __device__ __forceinline__ void multiply(const unsigned char* const (&x)[kRows],
                                           const unsigned char* const (&y)[kOut], int tile) {
    uint32_t b[kOut][4];
#pragma unroll
    for (int o = 0; o < kOut; ++o) ldmatrix_x4_trans(b[o], y[o] + (at_y + tile));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int kw = 0; kw < 3; ++kw) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, x[r] + (at_x[kw] + tile * kStride));
#pragma unroll
        for (int o = 0; o < kOut; ++o) {
          const int kh = r - o * kStride;
          if (kh < 0 || kh > 2) continue;
          mma_m16n8k16<T>(taps[kh][kw][0], a, {b[o][0], b[o][1]});
          mma_m16n8k16<T>(taps[kh][kw][1], a, {b[o][2], b[o][3]});
        }
      }
    }
  }
  // Adds up with the other warp of the group, by way of shared memory that all have read.
  __device__ __forceinline__ void gather(unsigned char* smem, int part, int share, int lane) {
    auto& flat = reinterpret_cast<float (&)[72]>(taps);
    float* const other = reinterpret_cast<float*>(smem) + part * (72 * 32) + lane;
    if (share == 1) {
#pragma unroll
      for (int i = 0; i < 72; ++i) other[i * 32] = flat[i];
    }
    __syncthreads();
    if (share == 0) {
#pragma unroll
      for (int i = 0; i < 72; ++i) flat[i] += other[i * 32];
    }
  }
  // f(output and input, from the part's first channel on, tap, sum)
  template <typename F>
  __device__ __forceinline__ void each(int lane, F&& f) const {
#pragma unroll
    for (int i = 0; i < 72; ++i) {
      const int tap = i / 8, n = i / 4 % 2, e = i % 4;
      f(n * 8 + lane % 4 * 2 + e % 2, e / 2 * 8 + lane / 4, tap, taps[tap / 3][tap % 3][n][e]);
    }
  }
};
template <typename T, int kStride>
struct Sums<T, 0, kStride> {
  static constexpr int kOut = kStride == 1 ? 2 : 1, kIn = 2, kTail = 3 - kStride, kRows = kIn + kTail;
  static constexpr int kParts = 8;
  float first[3][4] = {};       // taps 0 and 1 of a row of the kernel
  float last[kOut][2][4] = {};  // tap 2 of rows 2i - o * stride and the next
  int at_first, at_last, at_y, lane;

  __device__ __forceinline__ Sums(int part, int l) : lane(l) {
    const int pixel = (lane % 8 + lane / 16 * 8) * kStride;
    at_first = swizzled<kStride>(pixel + lane / 8 % 2, part);
    at_last = swizzled<kStride>(pixel + 2, part);
    at_y = swizzled<1>(lane % 16, part);
  }
  __device__ __forceinline__ void multiply(const unsigned char* const (&x)[kRows],
                                           const unsigned char* const (&y)[kOut], int tile) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, (lane / 16 == 0 ? y[0] : y[kOut - 1]) + (at_y + tile));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t a[4];
      ldmatrix_x4_trans(a, x[r] + (at_first + tile * kStride));
#pragma unroll
      for (int o = 0; o < kOut; ++o) {
        const int kh = r - o * kStride;
        if (kh >= 0 && kh < 3) mma_m16n8k16<T>(first[kh], a, {b[o * 2], b[o * 2 + 1]});
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t a[4];
      ldmatrix_x4_trans(
          a, (lane / 8 % 2 == 0 ? x[2 * i] : x[2 * i + 1 < kRows ? 2 * i + 1 : 2 * i]) + (at_last + tile * kStride));
#pragma unroll
      for (int o = 0; o < kOut; ++o) mma_m16n8k16<T>(last[o][i], a, {b[o * 2], b[o * 2 + 1]});
    }
  }
  __device__ __forceinline__ void gather(unsigned char*, int, int, int) {}
  template <typename F>
  __device__ __forceinline__ void each(int, F&& f) const {
#pragma unroll
    for (int i = 0; i < 18; ++i) {
      const int tap = i / 2, kh = tap / 3, kw = tap % 3, e = i % 2;
      float sum = 0;
      if (kw < 2) {
        sum = first[kh][kw * 2 + e];
      } else {
#pragma unroll
        for (int o = 0; o < kOut; ++o) sum += last[o][(kh + o * kStride) / 2][(kh + o * kStride) % 2 * 2 + e];
      }
      f(lane % 4 * 2 + e, lane / 4, tap, sum);
    }
  }
};

template <typename T, int kDeep, int kStride>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const SumArgs a, const T* __restrict__ y, const T* __restrict__ x, float* __restrict__ partials) {
  wait_for_earlier_kernels();
  using S = Sums<T, kDeep, kStride>;
  DYN_SMEM(smem);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_channel = static_cast<int>(blockIdx.x) % a.slabs * 64;
  const int begin = static_cast<int>(blockIdx.x) / a.slabs, stride = static_cast<int>(gridDim.x) / a.slabs;
  const int x_rows = a.pairs * S::kIn, y_rows = a.pairs * S::kOut;
  const int row_bytes = a.pitch * kRow, y_row_bytes = a.tiles * (16 * kRow), ring_rows = kStages * x_rows;
  unsigned char* const ys = smem + ring_rows * row_bytes;

  const int piece = thread % kPieces, channel = first_channel + piece * kVec;
  const bool has_channel = channel < a.channels;
  int next = begin, next_stage = 0, slot = 0;
  Item ahead(a, begin);
  const Pixel first_x(a.x_pass), first_y(a.y_pass);
  const auto copy = [&](unsigned char* stage, const T* image, int top, int left, int rows, Pixel pixel,
                        const Pass& pass, int pitch_bytes, auto step, int h_size, int w_size, int h_stride,
                        int w_stride) {
    for (; pixel.row < rows; pixel.advance(pass)) {
      const int h = top + pixel.row, v = left + pixel.column;
      const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(h_size) &&
                          static_cast<unsigned>(v) < static_cast<unsigned>(w_size) && has_channel;
      cp_async16(stage + pixel.row * pitch_bytes + swizzled<decltype(step)::value>(pixel.column, piece),
                 inside ? image + (h * h_stride + v * w_stride) : x, inside);
    }
  };
  const auto load = [&] {
    if (next < a.items) {
      if (next_stage == 0) ahead = Item(a, next);
      const bool tail = next_stage == ahead.steps;
      const int row = (ahead.row + next_stage * a.pairs) * S::kOut;
      copy(smem + slot * x_rows * row_bytes, x + ahead.image * a.x_n + channel, row * kStride - a.pad_h,
           ahead.column * kStride - a.pad_w, tail ? S::kTail : x_rows, first_x, a.x_pass, row_bytes, Int<kStride>{},
           a.H, a.W, a.x_h, a.x_w);
      copy(ys + slot * y_rows * y_row_bytes, y + ahead.image * a.y_n + channel, row, ahead.column, tail ? 0 : y_rows,
           first_y, a.y_pass, y_row_bytes, Int<1>{}, a.P, a.Q, a.y_h, a.y_w);
      if (++next_stage > ahead.steps) next_stage = 0, next += stride;
    }
    slot = slot + 1 == kStages ? 0 : slot + 1;
    cp_async_commit();  // also where nothing is left, so that the wait below counts stages
  };
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) load();

  const int part = warp % S::kParts, share = warp / S::kParts;
  S sums(part, lane);
  int stage = 0;
#pragma unroll 1
  for (int i = begin; i < a.items; i += stride) {
    const Item item(a, i);
#pragma unroll 1
    for (int step = 0; step < item.steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the step's rows are there for all
#pragma unroll 1
      for (int pair = 0; pair < a.pairs; ++pair) {
        const unsigned char *x_at[S::kRows], *y_at[S::kOut];
#pragma unroll
        for (int r = 0; r < S::kRows; ++r) {
          const int row = stage * x_rows + pair * S::kIn + r;
          x_at[r] = smem + (row < ring_rows ? row : row - ring_rows) * row_bytes;
        }
#pragma unroll
        for (int o = 0; o < S::kOut; ++o) y_at[o] = ys + (stage * y_rows + pair * S::kOut + o) * y_row_bytes;
#pragma unroll 1
        for (int tile = first_tile(pair, a.tiles, share, 8 / S::kParts); tile < a.tiles; tile += 8 / S::kParts) {
          sums.multiply(x_at, y_at, tile * (16 * kRow));
        }
      }
      __syncthreads();  // the first stage has no readers left
      load();
      if (step + 1 == item.steps) load();  // nor has the rest of the strip
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  sums.gather(smem, part, share, lane);
  if (share != 0) return;

  float* const to = partials + begin * a.weights;
  const int first = first_channel + part * (64 / S::kParts);
  sums.each(lane, [&](int k, int c, int tap, float sum) {
    if (first + k < a.channels && k / a.group == c / a.group) {
      to[((first + k) * a.group + c % a.group) * 9 + tap] = sum;
    }
  });
}

}  // namespace

cudaError_t launch_grouped_nhwc_mma_grad_weight(const Launch& call, const SplitsCut& cut) {
  const ConvShape& s = call.shape;
  const GroupedMmaSums tile = grouped_mma_sums(s, cut.splits);
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  const int64_t slabs = ceil_div<int64_t>(s.C, 64), column_tiles = ceil_div<int64_t>(s.Q, tile.tiles * 16);
  const SumArgs a{s.x.n,
                  s.y.n,
                  i(s.x.h),
                  i(s.x.w),
                  i(s.y.h),
                  i(s.y.w),
                  i(s.H),
                  i(s.W),
                  i(s.P),
                  i(s.Q),
                  i(s.pad_h),
                  i(s.pad_w),
                  i(s.C),
                  i(s.channels_per_group()),
                  i(slabs),
                  i(tile.down),
                  i(tile.pairs),
                  i(tile.tiles),
                  i(tile.strips),
                  i(ceil_div(ceil_div(tile.down, tile.pairs), tile.strips)),
                  i(column_tiles),
                  i(s.N * tile.strips * column_tiles),
                  Pass(tile.width),
                  Pass(tile.tiles * 16),
                  i(tile.pitch),
                  s.weight_elements()};
  const LaunchConfig config{dim3(static_cast<unsigned>(cut.splits * slabs)), dim3(kThreads),
                            static_cast<size_t>(tile.bytes), call.stream};
  const cudaError_t error = dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_group(a.group, [&](auto deep) {
      constexpr int kDeep = decltype(deep)::value;
      const auto kernel = s.stride_h == 1 ? sums_kernel<T, kDeep, 1> : sums_kernel<T, kDeep, 2>;
      return launch(kernel, config, a, call.first_as<T>(), call.second_as<T>(), call.workspace_as<float>());
    });
  });
  return error != cudaSuccess ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
