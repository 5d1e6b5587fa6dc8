// Forward and grad_input for any groups, strides, kernel, dilation and padding: the net under every other kernel.
//
// Both maps are one gather. A pixel of the tensor that is written sums, over the taps that reach it, a pixel of the
// tensor that is read times a filter tap; going along the taps, the row that is read moves by a fixed step:
//
//   forward     tap r = 0, 1, ...           reads row p * stride - pad + r * dilation
//   grad_input  tap r = r0, r0 + step, ...  reads row (h + pad - r * dilation) / stride, where step = stride /
//   gcd(stride,
//               dilation) and r0 is the first tap for which the stride divides; the taps between do not reach row h.
//
// The weight is first packed to [R, S, channels read, groups, channels written] in the accumulation type, the last
// dimension padded to whole tiles, so that the gather reads it as vectors whatever strides the weight has.
//
// Threads to data: a thread owns kColumns pixels of one row times kChannels channels of one group, so that each value
// it loads is used kColumns or kChannels times. Both are interleaved: the pixels of a thread are `column_tiles` apart
// (in grad_input times the stride: they then share their taps), its channels `channel_tiles` apart, so that
// neighbouring threads own neighbours. Neighbouring threads walk along the row or, where the written tensor is
// channels_last, along the channels.
#include <numeric>

#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/grouped/cut.h"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4;
// Blocks on a multiprocessor that the compiler has to leave registers for. Left to itself it spills some to fit one
// more.
template <typename T, typename Index>
constexpr int kLeastBlocks = sizeof(Index) == 4 && sizeof(acc_t<T>) == 4 ? 4 : 2;

// One spatial dimension. read, written: sizes of the tensor that is read and of the one that is written.
template <typename I>
struct GroupedAxis {
  I read, written, taps, stride, pad, dilation;
  I tap_step, read_step;  // along the taps of one pixel
};

template <typename Index>
struct GroupedGatherArgs {
  using I = std::make_signed_t<Index>;
  GroupedAxis<I> rows, columns;
  I column_tiles, phases;  // written column = phase + phases * (column tile + i * column_tiles); one phase in forward
  I channels_read, channels_written, channel_tiles;  // of one group
  I packed_channels;                                 // of all groups: whole tiles
  Index items;                                       // threads with work
  bool channels_fastest;                             // neighbouring threads own neighbouring channels
  Divider<Index> by_column, by_row, by_tile, by_group_tile, by_phase;
  Offsets<Index> from, to;
};

template <typename I>
struct FirstTap {
  I tap, read;  // the tap's index, and the row (column) that it reads
};

template <bool kGradInput, typename I>
__device__ __forceinline__ FirstTap<I> first_tap(const GroupedAxis<I>& a, I written) {
  if constexpr (!kGradInput) return {0, written * a.stride - a.pad};
  const I at = written + a.pad;
  if (a.stride == 1) return {0, at};
  for (I tap = 0; tap < a.tap_step && tap < a.taps; ++tap) {
    const I distance = at - tap * a.dilation;
    if (distance % a.stride == 0) return {tap, distance / a.stride};
  }
  return {a.taps, 0};
}

template <typename T, typename Index, int kChannels, bool kGradInput>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<T, Index>)
    gather_kernel(const GroupedGatherArgs<Index> a, const T* __restrict__ from, const acc_t<T>* __restrict__ packed,
                  const T* __restrict__ bias, const Activation activation, T* __restrict__ to) {
  wait_for_earlier_kernels();
  using I = std::make_signed_t<Index>;
  using A = acc_t<T>;
  constexpr int kVec = kChannels * sizeof(A) <= 16 ? kChannels : 16 / static_cast<int>(sizeof(A));

  const Index item = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= a.items) return;
  Index n, group, tile, row, column = item;
  if (a.channels_fastest) {  // [n, rows, columns, channel tiles]
    tile = item;
    column = a.by_tile.split(tile);
    row = a.by_column.split(column);
    n = a.by_row.split(row);
  } else {  // [n, channel tiles, rows, columns]
    row = a.by_column.split(column);
    tile = a.by_row.split(row);
    n = a.by_tile.split(tile);
  }
  const Index all_tiles = tile;  // over all groups
  group = a.by_group_tile.split(tile);
  const Index phase = a.by_phase.split(column);
  const I first_column = static_cast<I>(phase) + a.phases * static_cast<I>(column);

  const FirstTap<I> r0 = first_tap<kGradInput>(a.rows, static_cast<I>(row));
  const FirstTap<I> s0 = first_tap<kGradInput>(a.columns, first_column);
  // How far apart the columns are that one tap reads for the thread's neighbouring pixels.
  const I pixel_step = kGradInput ? a.column_tiles : a.column_tiles * a.columns.stride;

  const Index image = n * a.from.n + group * static_cast<Index>(a.channels_read) * a.from.c;
  A sums[kColumns * kChannels] = {};
  for (I r = r0.tap, read_row = r0.read; r < a.rows.taps; r += a.rows.tap_step, read_row += a.rows.read_step) {
    if (read_row < 0 || read_row >= a.rows.read) continue;
    for (I s = s0.tap, read = s0.read; s < a.columns.taps; s += a.columns.tap_step, read += a.columns.read_step) {
      Index at[kColumns];
      bool inside[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const I read_column = read + i * pixel_step;
        inside[i] = read_column >= 0 && read_column < a.columns.read;
        at[i] = image + static_cast<Index>(read_row) * a.from.h +
                (inside[i] ? static_cast<Index>(read_column) : 0) * a.from.w;
      }
      const A* filter = packed + (r * a.columns.taps + s) * a.channels_read * a.packed_channels + all_tiles * kChannels;
#pragma unroll 2
      for (I c = 0; c < a.channels_read; ++c, filter += a.packed_channels) {
        A value[kColumns], weight[kChannels];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          value[i] = inside[i] ? to_acc(from[at[i]]) : A(0);
          at[i] += a.from.c;
        }
#pragma unroll
        for (int j = 0; j < kChannels; j += kVec) {
          const Vec<A, kVec> v = *reinterpret_cast<const Vec<A, kVec>*>(filter + j);
#pragma unroll
          for (int l = 0; l < kVec; ++l) weight[j + l] = v.v[l];
        }
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
#pragma unroll
          for (int j = 0; j < kChannels; ++j) sums[i * kChannels + j] += value[i] * weight[j];
        }
      }
    }
  }

  const I channel = static_cast<I>(tile), of_group = static_cast<I>(group) * a.channels_written;
  if (bias != nullptr) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const I own = channel + j * a.channel_tiles;
      const A b = own < a.channels_written ? to_acc(bias[of_group + own]) : A(0);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[i * kChannels + j] += b;
    }
  }
  activate_all<T>(activation, sums);
  const Index pixel = n * a.to.n + row * a.to.h;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const I own_column = first_column + i * a.phases * a.column_tiles;
    if (own_column >= a.columns.written) break;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const I own = channel + j * a.channel_tiles;
      if (own < a.channels_written) {
        to[pixel + static_cast<Index>(own_column) * a.to.w + static_cast<Index>(of_group + own) * a.to.c] =
            from_acc<T>(sums[i * kChannels + j]);
      }
    }
  }
}

template <typename Index>
struct GroupedPackArgs {
  Index elements, channels_read, channels_written, channel_tiles;
  Divider<Index> by_lane, by_tile, by_group, by_read, by_s;
  Offsets<Index> w;
};

// A thread packs one element: packed[r, s, read, group, tile * lanes + lane] is the weight of written channel
// tile + lane * channel_tiles, or zero where the tiles reach beyond the group.
template <typename T, typename Index, bool kGradInput>
__global__ void __launch_bounds__(kThreads)
    pack_weight_kernel(const GroupedPackArgs<Index> a, const T* __restrict__ w, acc_t<T>* __restrict__ packed) {
  wait_for_earlier_kernels();
  const Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.elements) return;
  Index lane = i;
  Index tile = a.by_lane.split(lane);
  Index group = a.by_tile.split(tile);
  Index read = a.by_group.split(group);
  Index s = a.by_read.split(read);
  const Index r = a.by_s.split(s);
  const Index written = tile + lane * a.channel_tiles;
  acc_t<T> value = 0;
  if (written < a.channels_written) {
    // In forward the weight's first dimension is written and its second read; in grad_input the other way round.
    const Index k = kGradInput ? group * a.channels_read + read : group * a.channels_written + written;
    const Index c = kGradInput ? written : read;
    value = to_acc(w[k * a.w.n + c * a.w.c + r * a.w.h + s * a.w.w]);
  }
  packed[i] = value;
}

LaunchConfig one_thread_each(int64_t items, cudaStream_t stream) {
  return {dim3(static_cast<unsigned>(ceil_div<int64_t>(items, kThreads))), dim3(kThreads), 0, stream};
}

template <typename T, typename Index, int kChannels, bool kGradInput>
cudaError_t start(const Launch& call) {
  const ConvShape& s = call.shape;
  using I = std::make_signed_t<Index>;
  using A = acc_t<T>;
  const int64_t read = kGradInput ? s.outputs_per_group() : s.channels_per_group();
  const int64_t written = kGradInput ? s.channels_per_group() : s.outputs_per_group();
  const int64_t tiles = ceil_div<int64_t>(written, kChannels);
  const auto axis = [](int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t gcd = std::gcd(stride, dilation);
    const auto i = [](int64_t v) { return static_cast<I>(v); };
    return kGradInput ? GroupedAxis<I>{i(out), i(in),       i(taps),         i(stride),
                                       i(pad), i(dilation), i(stride / gcd), i(-dilation / gcd)}
                      : GroupedAxis<I>{i(in), i(out), i(taps), i(stride), i(pad), i(dilation), 1, i(dilation)};
  };

  const int64_t packed_elements = grouped_packed_elements(s, kGradInput);
  const GroupedPackArgs<Index> pack{static_cast<Index>(packed_elements),
                                    static_cast<Index>(read),
                                    static_cast<Index>(written),
                                    static_cast<Index>(tiles),
                                    Divider<Index>(kChannels),
                                    Divider<Index>(tiles),
                                    Divider<Index>(s.groups),
                                    Divider<Index>(read),
                                    Divider<Index>(s.S),
                                    Offsets<Index>(s.w)};
  const cudaError_t error =
      launch(pack_weight_kernel<T, Index, kGradInput>, one_thread_each(packed_elements, call.stream), pack,
             call.second_as<T>(), call.workspace_as<A>());
  if (error != cudaSuccess) return error;

  const int64_t rows = kGradInput ? s.H : s.P, columns = kGradInput ? s.W : s.Q;
  const int64_t phases = kGradInput ? std::min(s.stride_w, s.W) : 1;
  const int64_t column_tiles = ceil_div<int64_t>(ceil_div(columns, phases), kColumns);
  const int64_t items = s.N * s.groups * tiles * rows * phases * column_tiles;
  const GroupedGatherArgs<Index> args{axis(s.H, s.P, s.R, s.stride_h, s.pad_h, s.dilation_h),
                                      axis(s.W, s.Q, s.S, s.stride_w, s.pad_w, s.dilation_w),
                                      static_cast<I>(column_tiles),
                                      static_cast<I>(phases),
                                      static_cast<I>(read),
                                      static_cast<I>(written),
                                      static_cast<I>(tiles),
                                      static_cast<I>(s.groups * tiles * kChannels),
                                      static_cast<Index>(items),
                                      (kGradInput ? input_layout(s) : output_layout(s)) == Layout::nhwc,
                                      Divider<Index>(phases * column_tiles),
                                      Divider<Index>(rows),
                                      Divider<Index>(s.groups * tiles),
                                      Divider<Index>(tiles),
                                      Divider<Index>(column_tiles),
                                      Offsets<Index>(kGradInput ? s.y : s.x),
                                      Offsets<Index>(kGradInput ? s.x : s.y)};
  return launch(gather_kernel<T, Index, kChannels, kGradInput>, one_thread_each(items, call.stream), args,
                call.first_as<T>(), call.workspace_as<const A>(), call.bias_as<T>(), call.epilogue.activation,
                call.out_as<T>());
}

template <bool kGradInput>
cudaError_t gather(const Launch& call) {
  const ConvShape& s = call.shape;
  const int channels = grouped_channel_tile(kGradInput ? s.channels_per_group() : s.outputs_per_group());
  return dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto choose = [&](auto index, auto channels) {
      using Index = decltype(index);
      constexpr int kChannels = decltype(channels)::value;
      return start<T, Index, kChannels, kGradInput>(call);
    };
    const auto choose_channels = [&](auto index) {
      return channels == 1 ? choose(index, std::integral_constant<int, 1>{})
                           : choose(index, std::integral_constant<int, kGroupedChannels>{});
    };
    return grouped_is_narrow(s) ? choose_channels(uint32_t{}) : choose_channels(int64_t{});
  });
}

}  // namespace

cudaError_t launch_grouped_forward(const Launch& call, const SplitsCut&) { return gather<false>(call); }

cudaError_t launch_grouped_grad_input(const Launch& call, const SplitsCut&) { return gather<true>(call); }

}  // namespace sepconv::cuda
