// Depthwise forward and grad_input for every kernel size, stride, dilation, multiplier, memory stride and tensor size.
//
// Both directions are one gather. Along each axis, an output position o meets the taps first, first + tap_step, ...,
// and reads the other image at a position that moves by a fixed step from tap to tap:
//   forward      reads x      at o * stride - pad + tap * dilation:                first = 0, tap_step = 1;
//   grad_input   reads grad_y at (o + pad - tap * dilation) / stride, where whole: first depends on o mod stride (the
//                phase), tap_step = stride / gcd(stride, dilation).
// So remainders are taken only once a thread, when it looks for its first tap.
//
// Thread-to-data map. A thread writes kRows outputs of one column, for one channel vector. The rows are of one phase,
// so that they share taps and filter values, and the position read moves by a fixed step from row to row as well.
// Neighbouring threads take neighbouring channel vectors where channels are dense, else neighbouring columns.
#include <numeric>

#include "cuda/depthwise/cut.h"
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;

// kWide: 64-bit indices, for images of 2^31 elements and more, and for as many threads.
template <bool kWide>
struct Numbers {
  using Index = std::conditional_t<kWide, int64_t, int>;
  using Count = std::conditional_t<kWide, int64_t, uint32_t>;
};

template <typename Index>
struct DirectAxis {
  Index in_size, out_size;
  Index phases;  // outputs of the same phase lie this far apart
  Index taps, tap_step;
  Index pad, dilation;
  Index in_per_out;  // the position read moves this far from one output of a phase to the next
  Index in_per_tap;  // and this far from one tap to the next
  Index in_stride;   // of memory, in elements
};

template <bool kWide>
struct DirectArgs {
  using Index = typename Numbers<kWide>::Index;
  using Count = typename Numbers<kWide>::Count;
  DirectAxis<Index> h, w;
  int64_t in_n, in_c, out_n, out_c, out_h, out_w, weight_n, weight_h, weight_w;
  Index multiplier;
  int64_t threads;
  // thread -> (n, row group, column, vector) where channels are fastest, else (n, vector, row group, column)
  Divider<Count> by_fastest, by_second, by_third, by_phases, by_multiplier;
  bool channels_fastest;
};

// The first tap that output o meets (taps, if it meets none) and the position that it reads there.
template <bool kTransposed, typename Index>
__device__ __forceinline__ void find_first(const DirectAxis<Index>& axis, Index o, Index& tap, Index& position) {
  tap = 0;
  if constexpr (!kTransposed) {
    position = o * axis.in_per_out - axis.pad;
  } else {
    const Index v = o + axis.pad;
    while (tap < axis.tap_step && (v - tap * axis.dilation) % axis.phases != 0) ++tap;
    if (tap == axis.tap_step) tap = axis.taps;
    position = (v - tap * axis.dilation) / axis.phases;
  }
}

template <typename T, int kVec, bool kWide, bool kTransposed>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2
                                            : kVec == 8    ? 3
                                                           : 4)
    gather_kernel(const DirectArgs<kWide> a, const T* __restrict__ in, const T* __restrict__ weight,
                  const T* __restrict__ bias, const Activation activation, T* __restrict__ out) {
  wait_for_earlier_kernels();
  using A = acc_t<T>;
  using Index = typename DirectArgs<kWide>::Index;
  using Count = typename DirectArgs<kWide>::Count;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= a.threads) return;
  Count fastest = static_cast<Count>(thread);
  Count second = a.by_fastest.split(fastest);
  Count third = a.by_second.split(second);
  const int64_t n = static_cast<int64_t>(a.by_third.split(third));
  const Count vector = a.channels_fastest ? fastest : third;
  const Index column = static_cast<Index>(a.channels_fastest ? second : fastest);
  Count phase = a.channels_fastest ? third : second;
  const Index group = static_cast<Index>(a.by_phases.split(phase));
  const Index first_row = static_cast<Index>(phase) + group * kRows * a.h.phases;
  const Index channel = static_cast<Index>(vector) * kVec;

  Index first_r, first_h, first_s, first_w;
  find_first<kTransposed>(a.h, first_row, first_r, first_h);
  find_first<kTransposed>(a.w, column, first_s, first_w);

  A sums[kRows * kVec] = {};
  // Forward reads one channel; grad_input adds up the channels of grad_y that came of its channel. The filter is that
  // of the channel of y, which is written forward and read backward.
  const Index reads = kTransposed ? a.multiplier : 1;
  for (Index i = 0; i < reads; ++i) {
    const Index read =
        kTransposed ? channel * a.multiplier + i : static_cast<Index>(a.by_multiplier.div(static_cast<Count>(channel)));
    const T* image = in + n * a.in_n + read * a.in_c;
    const T* filter = weight + (kTransposed ? read : channel) * a.weight_n;
    Index h = first_h;
    for (Index r = first_r; r < a.h.taps; r += a.h.tap_step, h += a.h.in_per_tap) {
      Index w = first_w;
      for (Index s = first_s; s < a.w.taps; s += a.w.tap_step, w += a.w.in_per_tap) {
        if (w < 0 || w >= a.w.in_size) continue;
        A tap[kVec];
#pragma unroll
        for (int v = 0; v < kVec; ++v) tap[v] = to_acc(filter[v * a.weight_n + r * a.weight_h + s * a.weight_w]);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const Index row = h + j * a.h.in_per_out;
          if (row < 0 || row >= a.h.in_size) continue;
          A value[kVec];
          load_vec<kVec>(value, image + row * a.h.in_stride + w * a.w.in_stride);
#pragma unroll
          for (int v = 0; v < kVec; ++v) sums[j * kVec + v] += value[v] * tap[v];
        }
      }
    }
  }
  if (bias != nullptr) {
    A add[kVec];
    load_vec<kVec>(add, bias + channel);
#pragma unroll
    for (int i = 0; i < kRows * kVec; ++i) sums[i] += add[i % kVec];
  }
  activate_all<T>(activation, sums);
  T* to = out + n * a.out_n + channel * a.out_c + column * a.out_w;
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const Index row = first_row + j * a.h.phases;
    if (row >= a.h.out_size) continue;
    A values[kVec];
#pragma unroll
    for (int v = 0; v < kVec; ++v) values[v] = sums[j * kVec + v];
    store_vec<kVec>(to + row * a.out_h, values);
  }
}

template <typename Index>
DirectAxis<Index> make_axis(bool transposed, int64_t in_size, int64_t out_size, int64_t taps, int64_t pad,
                            int64_t stride, int64_t dilation, int64_t in_stride) {
  const int64_t common = std::gcd(stride, dilation);
  DirectAxis<Index> axis{};
  axis.in_size = static_cast<Index>(in_size), axis.out_size = static_cast<Index>(out_size);
  axis.phases = static_cast<Index>(transposed ? stride : 1);
  axis.taps = static_cast<Index>(taps), axis.tap_step = static_cast<Index>(transposed ? stride / common : 1);
  axis.pad = static_cast<Index>(pad), axis.dilation = static_cast<Index>(dilation);
  axis.in_per_out = static_cast<Index>(transposed ? 1 : stride);
  axis.in_per_tap = static_cast<Index>(transposed ? -dilation / common : dilation);
  axis.in_stride = static_cast<Index>(in_stride);
  return axis;
}

template <typename T, int kVec, bool kWide, bool kTransposed>
cudaError_t start(const Launch& call) {
  const ConvShape& s = call.shape;
  using Index = typename DirectArgs<kWide>::Index;
  using Count = typename DirectArgs<kWide>::Count;
  const Strides &from = kTransposed ? s.y : s.x, &to = kTransposed ? s.x : s.y;
  const int64_t columns = kTransposed ? s.W : s.Q, vectors = (kTransposed ? s.C : s.K) / kVec;
  DirectArgs<kWide> a{};
  a.h = make_axis<Index>(kTransposed, kTransposed ? s.P : s.H, kTransposed ? s.H : s.P, s.R, s.pad_h, s.stride_h,
                         s.dilation_h, from.h);
  a.w = make_axis<Index>(kTransposed, kTransposed ? s.Q : s.W, columns, s.S, s.pad_w, s.stride_w, s.dilation_w, from.w);
  a.in_n = from.n, a.in_c = from.c;
  a.out_n = to.n, a.out_c = to.c, a.out_h = to.h, a.out_w = to.w;
  a.weight_n = s.w.n, a.weight_h = s.w.h, a.weight_w = s.w.w;
  a.multiplier = static_cast<Index>(s.K / s.C);
  const int64_t row_groups = a.h.phases * ceil_div<int64_t>(ceil_div<int64_t>(a.h.out_size, a.h.phases), kRows);
  a.threads = s.N * vectors * row_groups * columns;
  a.channels_fastest = to.c == 1 && vectors > 1;
  a.by_fastest = Divider<Count>(a.channels_fastest ? vectors : columns);
  a.by_second = Divider<Count>(a.channels_fastest ? columns : row_groups);
  a.by_third = Divider<Count>(a.channels_fastest ? row_groups : vectors);
  a.by_phases = Divider<Count>(a.h.phases);
  a.by_multiplier = Divider<Count>(a.multiplier);
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div<int64_t>(a.threads, kThreads))), dim3(kThreads), 0,
                            call.stream};
  return launch(gather_kernel<T, kVec, kWide, kTransposed>, config, a, call.first_as<T>(), call.second_as<T>(),
                call.bias_as<T>(), call.epilogue.activation, call.out_as<T>());
}

template <bool kTransposed>
cudaError_t run(const Launch& call, const DirectCut& cut) {
  return dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (cut.wide) return start<T, 1, true, kTransposed>(call);
    if (cut.vec == kVec16<T>) return start<T, kVec16<T>, false, kTransposed>(call);
    return start<T, 1, false, kTransposed>(call);
  });
}

}  // namespace

cudaError_t launch_depthwise_direct_forward(const Launch& call, const DirectCut& cut) { return run<false>(call, cut); }

cudaError_t launch_depthwise_direct_grad_input(const Launch& call, const DirectCut& cut) {
  return run<true>(call, cut);
}

}  // namespace sepconv::cuda
