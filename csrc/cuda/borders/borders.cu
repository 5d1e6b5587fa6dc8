// What a padding mode other than zeros changes (padding_mode.h): forward and grad_input compute the frame of their
// result again, and overwrite what a kernel for zero padding wrote there; grad_weight adds the products in the padding.
//
// Threads to data. Forward and grad_input: a thread writes one number of the frame; neighbouring threads take
// neighbouring channels where the channels of the image read are dense, else neighbouring pixels (first those of the
// whole rows at the top and the bottom, then those at the sides of the other rows). grad_weight: the threads of a block
// take turns at the products (image, pixel of the frame of that tap) of one weight and add up their sums in a fixed
// order. Where channels are dense, a block has 32 weights, of neighbouring output channels, one a lane, and its eight
// warps take turns. Frames are small, so every index is of 64 bits and divided where it is needed.
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// The pixels of a frame, in the order above.
struct Frame {
  int64_t rows, columns;  // of the image
  Ends h, w;

  __host__ __device__ int64_t full_rows() const { return h.leading + h.trailing; }
  __host__ __device__ int64_t side_columns() const { return w.leading + w.trailing; }
  __host__ __device__ int64_t pixels() const { return full_rows() * columns + (rows - full_rows()) * side_columns(); }
  __device__ void place(int64_t pixel, int64_t& row, int64_t& column) const {
    const int64_t in_full_rows = full_rows() * columns;
    if (pixel < in_full_rows) {
      row = pixel / columns;
      column = pixel % columns;
      if (row >= h.leading) row += rows - full_rows();
    } else {
      row = h.leading + (pixel - in_full_rows) / side_columns();
      column = (pixel - in_full_rows) % side_columns();
      if (column >= w.leading) column += columns - side_columns();
    }
  }
};

struct BorderGatherArgs {
  PaddedAxes axes;
  Frame frame;
  int64_t images, ins, outs, channels;  // ins and outs: channels of one group; channels: written
  Strides in, out;
  int64_t w_group, w_out, w_in, w_row, w_column;  // steps of the weight
};

// Adds the products of one pixel read with one tap, over the channels of the group.
template <typename T>
__device__ __forceinline__ void add_tap(acc_t<T>& sum, const BorderGatherArgs& a, const T* in, const T* weight,
                                        int64_t row, int64_t column, int64_t r, int64_t s) {
  const T* from = in + row * a.in.h + column * a.in.w;
  const T* tap = weight + r * a.w_row + s * a.w_column;
  for (int64_t m = 0; m < a.ins; ++m) sum += to_acc(from[m * a.in.c]) * to_acc(tap[m * a.w_in]);
}

// The output that reads a position through a tap; false if there is none.
__device__ __forceinline__ bool find_output(const PaddedAxis& axis, int64_t position, int64_t tap, int64_t& output) {
  const int64_t from = position + axis.pad - tap * axis.dilation;
  output = from / axis.stride;
  return from >= 0 && from % axis.stride == 0 && output < axis.outputs;
}

// The positions at which a pixel stands: part 0 is the pixel itself, 1 and 2 are in the padding before and after.
__device__ __forceinline__ Range positions(const PaddedAxis& axis, int64_t pixel, int part) {
  if (part == 0) return Range{pixel, pixel + 1};
  return part == 1 ? axis.images_before(pixel) : axis.images_after(pixel);
}

template <typename T, bool kTransposed, bool kChannelsFastest>
__global__ void __launch_bounds__(kThreads, 2)
    border_kernel(const BorderGatherArgs a, const T* __restrict__ in, const T* __restrict__ weight,
                  const T* __restrict__ bias, const Activation activation, T* __restrict__ out) {
  wait_for_earlier_kernels();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pixels = a.frame.pixels();
  if (thread >= a.images * a.channels * pixels) return;
  const int64_t n = thread / (a.channels * pixels), rest = thread % (a.channels * pixels);
  const int64_t channel = kChannelsFastest ? rest % a.channels : rest / pixels;
  int64_t row, column;
  a.frame.place(kChannelsFastest ? rest / a.channels : rest % pixels, row, column);
  const int64_t group = channel / a.outs;
  in += n * a.in.n + group * a.ins * a.in.c;
  weight += group * a.w_group + channel % a.outs * a.w_out;

  const PaddedAxis &h = a.axes.h, &w = a.axes.w;
  acc_t<T> sum = bias == nullptr ? acc_t<T>(0) : to_acc(bias[channel]);
  if constexpr (kTransposed) {
    for (int part_h = 0; part_h < 3; ++part_h) {
      const Range rows = positions(h, row, part_h);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        for (int64_t r = 0; r < h.taps; ++r) {
          int64_t p;
          if (!find_output(h, i, r, p)) continue;
          for (int part_w = 0; part_w < 3; ++part_w) {
            const Range columns = positions(w, column, part_w);
            for (int64_t j = columns.begin; j < columns.end; ++j) {
              for (int64_t s = 0; s < w.taps; ++s) {
                int64_t q;
                if (find_output(w, j, s, q)) add_tap(sum, a, in, weight, p, q, r, s);
              }
            }
          }
        }
      }
    }
  } else {
    for (int64_t r = 0; r < h.taps; ++r) {
      const int64_t from_row = h.source(h.position(row, r));
      for (int64_t s = 0; s < w.taps; ++s) {
        add_tap(sum, a, in, weight, from_row, w.source(w.position(column, s)), r, s);
      }
    }
  }
  out[n * a.out.n + channel * a.out.c + row * a.out.h + column * a.out.w] =
      from_acc<T>(activate_as<T>(activation, sum));
}

struct BorderProductArgs {
  PaddedAxes axes;
  int64_t images, outputs_per_group, channels_per_group, weights;
  int64_t K;
  Strides x, w, y;
};

template <typename T, bool kChannelLanes>
__global__ void __launch_bounds__(kThreads, 2)
    border_grad_weight_kernel(const BorderProductArgs a, const T* __restrict__ grad_y, const T* __restrict__ x,
                              T* __restrict__ grad_w) {
  wait_for_earlier_kernels();
  constexpr int kWorkers = kChannelLanes ? kWarps : kThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Weights are counted as [R, S, C / groups, K]. Lanes beyond the last one work on weight 0 and add nothing to it.
  int64_t weight = kChannelLanes ? static_cast<int64_t>(blockIdx.x) * 32 + lane : static_cast<int64_t>(blockIdx.x);
  const bool owns = weight < a.weights;
  if (!owns) weight = 0;
  const PaddedAxis &h = a.axes.h, &w = a.axes.w;
  const int64_t k = weight % a.K, c = weight / a.K % a.channels_per_group;
  const int64_t tap = weight / (a.K * a.channels_per_group), r = tap / w.taps, s = tap % w.taps;
  const Frame frame{h.outputs, w.outputs, h.outputs_outside(r, r), w.outputs_outside(s, s)};
  const int64_t pixels = frame.pixels();
  const T* from_y = grad_y + k * a.y.c;
  const T* from_x = x + (k / a.outputs_per_group * a.channels_per_group + c) * a.x.c;

  T sum = 0;
  for (int64_t i = kChannelLanes ? warp : threadIdx.x; i < a.images * pixels; i += kWorkers) {
    const int64_t n = i / pixels;
    int64_t p, q;
    frame.place(i % pixels, p, q);
    const int64_t row = h.source(h.position(p, r)), column = w.source(w.position(q, s));
    sum += from_y[n * a.y.n + p * a.y.h + q * a.y.w] * from_x[n * a.x.n + row * a.x.h + column * a.x.w];
  }

  T* to = grad_w + k * a.w.n + c * a.w.c + r * a.w.h + s * a.w.w;
  if constexpr (kChannelLanes) {
    SMEM_ARRAY(T, sums, [kWarps][32]);
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && owns && pixels > 0) {
      T total = *to;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) total += sums[j][lane];
      *to = total;
    }
  } else {
    SMEM_ARRAY(T, sums, [kWarps]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0 && pixels > 0) {
      T total = *to;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) total += sums[j];
      *to = total;
    }
  }
}

unsigned blocks_for(int64_t threads, int64_t threads_a_block) {
  return static_cast<unsigned>(ceil_div(threads, threads_a_block));
}

template <typename T, bool kTransposed>
cudaError_t start(const Launch& call, PaddingMode mode) {
  const ConvShape& s = call.shape;
  const PaddedAxes axes(s, mode);
  const Frame frame = kTransposed ? Frame{s.H, s.W, axes.h.pixels_with_images(), axes.w.pixels_with_images()}
                                  : Frame{s.P, s.Q, axes.h.outputs_outside(), axes.w.outputs_outside()};
  const BorderGatherArgs a{axes,
                           frame,
                           s.N,
                           kTransposed ? s.outputs_per_group() : s.channels_per_group(),
                           kTransposed ? s.channels_per_group() : s.outputs_per_group(),
                           kTransposed ? s.C : s.K,
                           kTransposed ? s.y : s.x,
                           kTransposed ? s.x : s.y,
                           s.w.n * s.outputs_per_group(),
                           kTransposed ? s.w.c : s.w.n,
                           kTransposed ? s.w.n : s.w.c,
                           s.w.h,
                           s.w.w};
  const LaunchConfig config{dim3(blocks_for(a.images * a.channels * frame.pixels(), kThreads)), dim3(kThreads), 0,
                            call.stream};
  const auto go = [&](auto kernel) {
    return launch(kernel, config, a, call.first_as<T>(), call.second_as<T>(), call.bias_as<T>(),
                  call.epilogue.activation, call.out_as<T>());
  };
  return a.in.c == 1 && a.channels > 1 ? go(border_kernel<T, kTransposed, true>)
                                       : go(border_kernel<T, kTransposed, false>);
}

template <typename T>
cudaError_t start_grad_weight(const Launch& call, PaddingMode mode) {
  const ConvShape& s = call.shape;
  const BorderProductArgs a{
      PaddedAxes(s, mode), s.N, s.outputs_per_group(), s.channels_per_group(), s.weight_elements(), s.K, s.x, s.w, s.y};
  const bool lanes = s.y.c == 1 && s.K > 1;
  const LaunchConfig config{dim3(blocks_for(a.weights, lanes ? 32 : 1)), dim3(kThreads), 0, call.stream};
  const auto go = [&](auto kernel) {
    return launch(kernel, config, a, call.first_as<T>(), call.second_as<T>(), call.out_as<T>());
  };
  return lanes ? go(border_grad_weight_kernel<T, true>) : go(border_grad_weight_kernel<T, false>);
}

}  // namespace

cudaError_t launch_borders_forward(const Launch& call, PaddingMode mode) {
  return dispatch_dtype(call.dtype, [&](auto tag) { return start<typename decltype(tag)::type, false>(call, mode); });
}

cudaError_t launch_borders_grad_input(const Launch& call, PaddingMode mode) {
  return dispatch_dtype(call.dtype, [&](auto tag) { return start<typename decltype(tag)::type, true>(call, mode); });
}

cudaError_t launch_borders_grad_weight(const Launch& call, PaddingMode mode) {
  if (call.dtype == DType::float32) return start_grad_weight<float>(call, mode);
  if (call.dtype == DType::float64) return start_grad_weight<double>(call, mode);
  return cudaErrorNotSupported;  // the caller pads the input (launch.h)
}

}  // namespace sepconv::cuda
