// Depthwise forward and grad_input, multiplier 1, channels dense in memory (channels_last), kernels 3x3, 5x5 and 7x7.
//
// Thread-to-data map. A block owns `lanes` neighbouring channel vectors (up to 16, a vector being 16 bytes or one
// channel) and `slots` places; thread t is lane t % lanes of place t / lanes. A place is a tile of two or four output
// columns by `rows` output rows of one image, so that
//   - neighbouring threads read neighbouring channels: whole cache lines;
//   - a thread loads each value of an image row once and uses it for all of its columns; the kernel rows overlap in L1;
//   - the filter of the block's channels is converted once, lies in shared memory as [R * S, channels], and a thread
//     holds the kernel row that it works on in registers.
//
// grad_input of stride 1 is the forward kernel with the filter turned around. For stride 2 only every second tap
// meets an output, and which ones depends on the parity of the position: places begin at even padded columns, so for
// each of a thread's columns the taps are known at compile time, and each row starts at the tap of its own parity.
#include "common.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxLanes = 16;

// Output columns a thread works on. The widest windows of eight channels leave registers for two only.
__host__ __device__ constexpr int columns_of(int vec, int kernel, int stride) {
  return vec == 8 && kernel * stride >= 10 ? 2 : 4;
}

// "in" is the image that is read and "out" the image that is written: grad_y and grad_x for grad_input.
struct Args {
  int64_t in_n, out_n;           // strides, in elements
  int in_h, in_w, out_h, out_w;  // strides, in elements
  int in_rows, in_columns, out_rows, out_columns;
  int pad_h, pad_w;
  int vectors;  // channel vectors
  int lanes, slots, rows;
  uint32_t places;  // N * strips * column tiles
  FastDiv by_lanes, by_channel_blocks, by_strips, by_column_tiles;
  int64_t w_n, w_h, w_w;
  bool turned;  // read the filter from its last tap to its first
};

// A thread's place in the problem.
struct Place {
  bool active;
  int lane, vector, n, row, column_tile;
};

__device__ __forceinline__ Place find_place(const Args& a, uint32_t channel_block, uint32_t place_block) {
  uint32_t lane = threadIdx.x;
  const uint32_t slot = a.by_lanes.split(lane);
  uint32_t place = place_block * a.slots + slot;
  const int vector = static_cast<int>(channel_block * a.lanes + lane);
  const bool active = slot < static_cast<uint32_t>(a.slots) && place < a.places && vector < a.vectors;
  uint32_t strip = a.by_column_tiles.split(place);
  const uint32_t n = a.by_strips.split(strip);
  return {active,
          static_cast<int>(lane),
          vector,
          static_cast<int>(n),
          static_cast<int>(strip) * a.rows,
          static_cast<int>(place)};
}

// The filter in shared memory: [tap][part][lane][4 channels, or fewer], so that the lanes of a warp read neighbouring
// words.
template <int kVec>
__device__ __forceinline__ int filter_index(int lanes, int tap, int lane, int i) {
  constexpr int kPart = kVec < 4 ? kVec : 4;
  return ((tap * (kVec / kPart) + i / kPart) * lanes + lane) * kPart + i % kPart;
}

template <typename T, int kVec, int kKernel>
__device__ __forceinline__ void stage_filter(const Args& a, uint32_t channel_block, const T* __restrict__ w,
                                             acc_t<T>* filter) {
  constexpr int kTaps = kKernel * kKernel;
  const int channels = a.lanes * kVec;
  const int first = static_cast<int>(channel_block) * channels;
  for (int i = threadIdx.x; i < channels * kTaps; i += kThreads) {
    const int c = i / kTaps, tap = i % kTaps;
    const int source = a.turned ? kTaps - 1 - tap : tap;
    acc_t<T> value = 0;
    if (first + c < a.vectors * kVec) {
      value = to_acc(w[(first + c) * a.w_n + source / kKernel * a.w_h + source % kKernel * a.w_w]);
    }
    filter[filter_index<kVec>(a.lanes, tap, c / kVec, c % kVec)] = value;
  }
}

template <int kVec, int kKernel, typename A>
__device__ __forceinline__ void load_filter_row(A (&row)[kKernel][kVec], const A* filter, int lanes, int lane, int r) {
  constexpr int kPart = kVec < 4 ? kVec : 4;
#pragma unroll
  for (int s = 0; s < kKernel; ++s) {
#pragma unroll
    for (int i = 0; i < kVec; i += kPart) {
      const auto part =
          *reinterpret_cast<const Vec<A, kPart>*>(filter + filter_index<kVec>(lanes, r * kKernel + s, lane, i));
#pragma unroll
      for (int j = 0; j < kPart; ++j) row[s][i + j] = part.v[j];
    }
  }
}

template <typename T, int kVec, int kColumns>
__device__ __forceinline__ void store_row(const Args& a, T* __restrict__ row, int first_column,
                                          const acc_t<T> (&sums)[kColumns * kVec]) {
#pragma unroll
  for (int o = 0; o < kColumns; ++o) {
    const int column = first_column + o;
    if (static_cast<unsigned>(column) >= static_cast<unsigned>(a.out_columns)) continue;
    acc_t<T> values[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] = sums[o * kVec + i];
    store_vec<kVec>(row + column * a.out_w, values);
  }
}

// One pixel of the row that a thread reads; zero outside the image.
template <typename T, int kVec>
__device__ __forceinline__ void load_column(const Args& a, acc_t<T> (&value)[kVec], const T* __restrict__ row,
                                            int column) {
  if (static_cast<unsigned>(column) < static_cast<unsigned>(a.in_columns)) {
    load_vec<kVec>(value, row + column * a.in_w);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) value[i] = 0;
  }
}

template <typename T, int kVec, int kKernel, int kStride>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(const Args a, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                   const Activation activation, T* __restrict__ y) {
  using A = acc_t<T>;
  constexpr int kColumns = columns_of(kVec, kKernel, kStride);
  DYN_SMEM(smem);
  A* filter = reinterpret_cast<A*>(smem);
  uint32_t channel_block = blockIdx.x;
  const uint32_t place_block = a.by_channel_blocks.split(channel_block);
  stage_filter<T, kVec, kKernel>(a, channel_block, w, filter);
  __syncthreads();
  const Place place = find_place(a, channel_block, place_block);
  if (!place.active) return;

  const T* image = x + place.n * a.in_n + place.vector * kVec;
  T* out = y + place.n * a.out_n + place.vector * kVec;
  const int column = place.column_tile * kColumns;
  const int last_row = min(place.row + a.rows, a.out_rows);
#pragma unroll 1
  for (int p = place.row; p < last_row; ++p) {
    A sums[kColumns * kVec] = {};
#pragma unroll(kKernel == 3 ? 3 : 1)
    for (int r = 0; r < kKernel; ++r) {
      const int h = p * kStride - a.pad_h + r;
      if (static_cast<unsigned>(h) >= static_cast<unsigned>(a.in_rows)) continue;
      const T* row = image + h * a.in_h;
      A taps[kKernel][kVec];
      load_filter_row<kVec, kKernel>(taps, filter, a.lanes, place.lane, r);
#pragma unroll
      for (int d = 0; d < (kColumns - 1) * kStride + kKernel; ++d) {
        A value[kVec];
        load_column<T, kVec>(a, value, row, column * kStride - a.pad_w + d);
#pragma unroll
        for (int o = 0; o < kColumns; ++o) {
          const int s = d - o * kStride;
          if (s < 0 || s >= kKernel) continue;
#pragma unroll
          for (int i = 0; i < kVec; ++i) sums[o * kVec + i] += value[i] * taps[s][i];
        }
      }
    }
    if (bias != nullptr) {
      A add[kVec];
      load_vec<kVec>(add, bias + place.vector * kVec);
#pragma unroll
      for (int i = 0; i < kColumns * kVec; ++i) sums[i] += add[i % kVec];
    }
    activate_all(activation, sums);
    store_row<T, kVec, kColumns>(a, out + p * a.out_h, column, sums);
  }
}

// grad_input of stride 2. With v = h + pad_h and u = w + pad_w: grad_x[v, u] = sum over r = v, s = u (mod 2) of
// grad_y[(v - r) / 2, (u - s) / 2] * w[r, s].
template <typename T, int kVec, int kKernel>
__global__ void __launch_bounds__(kThreads, 2)
    grad_input_stride2_kernel(const Args a, const T* __restrict__ grad_y, const T* __restrict__ w,
                              T* __restrict__ grad_x) {
  using A = acc_t<T>;
  constexpr int kColumns = columns_of(kVec, kKernel, 2);
  DYN_SMEM(smem);
  A* filter = reinterpret_cast<A*>(smem);
  uint32_t channel_block = blockIdx.x;
  const uint32_t place_block = a.by_channel_blocks.split(channel_block);
  stage_filter<T, kVec, kKernel>(a, channel_block, w, filter);
  __syncthreads();
  const Place place = find_place(a, channel_block, place_block);
  if (!place.active) return;

  const T* image = grad_y + place.n * a.in_n + place.vector * kVec;
  T* out = grad_x + place.n * a.out_n + place.vector * kVec;
  const int u = (a.pad_w & ~1) + place.column_tile * kColumns;  // even
  const int last_row = min(place.row + a.rows, a.out_rows);
#pragma unroll 1
  for (int h = place.row; h < last_row; ++h) {
    A sums[kColumns * kVec] = {};
    const int v = h + a.pad_h;
    int p = v >> 1;
#pragma unroll 1
    for (int r = v & 1; r < kKernel; r += 2, --p) {
      if (static_cast<unsigned>(p) >= static_cast<unsigned>(a.in_rows)) continue;
      const T* row = image + p * a.in_h;
      A taps[kKernel][kVec];
      load_filter_row<kVec, kKernel>(taps, filter, a.lanes, place.lane, r);
#pragma unroll
      for (int d = -(kKernel - 1) / 2; d <= (kColumns - 1) / 2; ++d) {
        A value[kVec];
        load_column<T, kVec>(a, value, row, (u >> 1) + d);
#pragma unroll
        for (int o = 0; o < kColumns; ++o) {
          const int s = o - 2 * d;
          if (s < 0 || s >= kKernel) continue;
#pragma unroll
          for (int i = 0; i < kVec; ++i) sums[o * kVec + i] += value[i] * taps[s][i];
        }
      }
    }
    store_row<T, kVec, kColumns>(a, out + h * a.out_h, u - a.pad_w, sums);
  }
}

// Everything that both directions share; in and out are (rows, columns, strides) of the images read and written.
Args make_args(const ConvShape& shape, const Tile& tile, int64_t in_rows, int64_t in_columns, const Strides& in,
               int64_t out_rows, int64_t out_columns, const Strides& out) {
  Args a{};
  a.in_n = in.n, a.in_h = static_cast<int>(in.h), a.in_w = static_cast<int>(in.w);
  a.out_n = out.n, a.out_h = static_cast<int>(out.h), a.out_w = static_cast<int>(out.w);
  a.in_rows = static_cast<int>(in_rows), a.in_columns = static_cast<int>(in_columns);
  a.out_rows = static_cast<int>(out_rows), a.out_columns = static_cast<int>(out_columns);
  a.pad_h = static_cast<int>(shape.pad_h), a.pad_w = static_cast<int>(shape.pad_w);
  a.w_n = shape.w.n, a.w_h = shape.w.h, a.w_w = shape.w.w;
  a.vectors = static_cast<int>(shape.C / tile.vec);
  a.lanes = ceil_div(a.vectors, ceil_div(a.vectors, kMaxLanes));
  a.slots = kThreads / a.lanes;
  a.rows = tile.rows;
  a.by_lanes = FastDiv(a.lanes);
  a.by_channel_blocks = FastDiv(ceil_div(a.vectors, a.lanes));
  return a;
}

// `columns` is how many columns the tiles have to cover.
LaunchConfig make_config(const ConvShape& shape, Args& a, int vec, int64_t columns, int64_t stride,
                         cudaStream_t stream) {
  const int tile_columns = columns_of(vec, static_cast<int>(shape.R), static_cast<int>(stride));
  const int64_t strips = ceil_div<int64_t>(a.out_rows, a.rows), column_tiles = ceil_div<int64_t>(columns, tile_columns);
  a.places = static_cast<uint32_t>(shape.N * strips * column_tiles);
  a.by_strips = FastDiv(strips);
  a.by_column_tiles = FastDiv(column_tiles);
  const int64_t blocks = a.by_channel_blocks.divisor * ceil_div<int64_t>(a.places, a.slots);
  return {dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
          static_cast<size_t>(shape.R * shape.S * a.lanes * vec) * sizeof(float), stream};
}

// Calls f(type, vector, kernel) with the three as types; float64 has no kernel here.
template <typename F>
cudaError_t dispatch(DType dtype, int vec, int64_t kernel, F&& f) {
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_kernel = [&](auto vector) {
      switch (kernel) {
        case 3: return f(tag, vector, Int<3>{});
        case 5: return f(tag, vector, Int<5>{});
        case 7: return f(tag, vector, Int<7>{});
        default: return cudaErrorInvalidValue;
      }
    };
    if constexpr (std::is_same_v<T, double>) {
      return cudaErrorInvalidValue;
    } else {
      if (vec == kVec16<T>) return with_kernel(Int<kVec16<T>>{});
      return vec == 1 ? with_kernel(Int<1>{}) : cudaErrorInvalidValue;
    }
  });
}

cudaError_t run_forward(const ConvShape& shape, DType dtype, Args a, int64_t stride, const void* in, const void* w,
                        const Epilogue& epilogue, void* out, int vec, cudaStream_t stream) {
  const LaunchConfig config = make_config(shape, a, vec, a.out_columns, stride, stream);
  return dispatch(dtype, vec, shape.R, [&](auto tag, auto vector, auto kernel) {
    using T = typename decltype(tag)::type;
    constexpr int kVec = decltype(vector)::value, kKernel = decltype(kernel)::value;
    const auto start = [&](auto function) {
      return launch(function, config, a, static_cast<const T*>(in), static_cast<const T*>(w),
                    static_cast<const T*>(epilogue.bias), epilogue.activation, static_cast<T*>(out));
    };
    return stride == 1 ? start(forward_kernel<T, kVec, kKernel, 1>) : start(forward_kernel<T, kVec, kKernel, 2>);
  });
}

}  // namespace

cudaError_t launch_depthwise_nhwc_forward(const ConvShape& shape, DType dtype, const void* x, const void* w,
                                          const Epilogue& epilogue, void* y, const Tile& tile, cudaStream_t stream) {
  const Args a = make_args(shape, tile, shape.H, shape.W, shape.x, shape.P, shape.Q, shape.y);
  return run_forward(shape, dtype, a, shape.stride_h, x, w, epilogue, y, tile.vec, stream);
}

cudaError_t launch_depthwise_nhwc_grad_input(const ConvShape& shape, DType dtype, const void* grad_y, const void* w,
                                             void* grad_x, const Tile& tile, cudaStream_t stream) {
  Args a = make_args(shape, tile, shape.P, shape.Q, shape.y, shape.H, shape.W, shape.x);
  if (shape.stride_h == 1) {
    a.turned = true;
    a.pad_h = static_cast<int>(shape.R - 1) - a.pad_h;
    a.pad_w = static_cast<int>(shape.S - 1) - a.pad_w;
    return run_forward(shape, dtype, a, 1, grad_y, w, Epilogue{}, grad_x, tile.vec, stream);
  }
  const LaunchConfig config = make_config(shape, a, tile.vec, shape.W + (shape.pad_w & 1), 2, stream);
  return dispatch(dtype, tile.vec, shape.R, [&](auto tag, auto vector, auto kernel) {
    using T = typename decltype(tag)::type;
    return launch(grad_input_stride2_kernel<T, decltype(vector)::value, decltype(kernel)::value>, config, a,
                  static_cast<const T*>(grad_y), static_cast<const T*>(w), static_cast<T*>(grad_x));
  });
}

}  // namespace sepconv::cuda
