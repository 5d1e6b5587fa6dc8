// Depthwise forward and grad_input, multiplier 1, channels dense in memory (channels_last): kernels 3x3, 5x5 and 7x7 of
// stride 1, dilated or not, and stride 2.
//
// Thread-to-data map. A block owns `lanes` neighbouring channel vectors (up to 32; a vector is two channels, or one
// where there is an odd number of them or storage is not aligned to two) and `slots` places; thread t is lane t % lanes
// of place t / lanes. A place is a tile of seven output columns (stride 2: four) by `rows` output rows of one image,
// down which the thread walks as depthwise_nhwc.cuh describes:
//   - neighbouring threads read neighbouring channels: a warp's load is 64 channels of a pixel, whole cache lines, for
//   any
//     number of channels, and two channels a thread leave registers for the sums of many columns and kernel rows;
//   - a thread reads and converts each value once for its columns, rows ahead of their use; the columns that two tiles
//     share overlap in L1;
//   - the filters of the block's channels are converted once and lie in shared memory.
//
// grad_input of stride 1 is the forward walk with the filter turned around. A dilated convolution is as many plain ones
// as there are phases, each of every dilation-th row and column of both images: a place belongs to one of them.
#include "cuda/depthwise/nhwc/depthwise_nhwc.cuh"

namespace sepconv::cuda {
namespace {

// "in" is the image that is read and "out" the image that is written: grad_y and grad_x for grad_input.
struct NhwcAxis {
  int in_size, out_size;
  int pad, dilation;
  int phases;  // dilation, but no more than there are outputs
};

struct NhwcArgs {
  NhwcAxis h, w;
  int64_t in_n, in_h, in_w, out_n, out_h, out_w;  // strides, in bytes
  int64_t in_row_step, out_row_step;              // and from one row or column of a phase to the next
  int in_column_step, out_column_step;
  int vectors;  // channel vectors
  int lanes, slots, rows;
  uint32_t places;  // N * strips and column tiles of all phases
  FastDiv by_lanes, by_channel_blocks, by_strips, by_column_tiles, by_phases_h, by_phases_w, by_dilation_h;
  FilterSource filter;
};

// A thread's place. Inputs and outputs are numbered from an origin in steps of the dilation: from where tap 0 of the
// phase's first output reads, and from that output; going up in size, from the image's first input and from the output
// that its tap 0 meets, which lies in the padding.
struct Place {
  bool active;
  int lane, vector, n;
  int in_row, in_column, out_row, out_column;  // the origins in the images
  int walk_row, walk_column;                   // outputs at which the walk begins, even ones going up
  int first_row, rows;                         // outputs that it stores
};

template <typename W>
__device__ __forceinline__ Place find_place(const NhwcArgs& a, uint32_t channel_block, uint32_t place_block) {
  Place p{};
  uint32_t lane = threadIdx.x;
  const uint32_t slot = a.by_lanes.split(lane);
  uint32_t place = place_block * a.slots + slot;
  p.lane = static_cast<int>(lane);
  p.vector = static_cast<int>(channel_block * a.lanes + lane);
  const bool exists = slot < static_cast<uint32_t>(a.slots) && place < a.places && p.vector < a.vectors;
  uint32_t phase_h = a.by_column_tiles.split(place), phase_w = place;
  p.n = static_cast<int>(a.by_strips.split(phase_h));
  p.walk_row = static_cast<int>(a.by_phases_h.split(phase_h)) * a.rows;
  p.walk_column = static_cast<int>(a.by_phases_w.split(phase_w)) * W::kColumns;
  if constexpr (W::kUp == 1) {
    p.out_row = static_cast<int>(phase_h), p.out_column = static_cast<int>(phase_w);
    p.in_row = p.out_row - a.h.pad, p.in_column = p.out_column - a.w.pad;
  } else {
    p.out_row = -a.h.pad, p.out_column = -a.w.pad;
    p.walk_row += a.h.pad & ~1, p.walk_column += a.w.pad & ~1;
  }
  const int end = static_cast<int>(a.by_dilation_h.div(max(a.h.out_size - p.out_row + a.h.dilation - 1, 0)));
  p.first_row = max(p.walk_row, -p.out_row);
  p.rows = min(p.walk_row + a.rows, end) - p.first_row;
  p.active = exists && p.rows > 0;
  return p;
}

// Blocks a multiprocessor, for which the compiler has to fit the registers: 65536 in all.
template <int kVec, typename W>
constexpr int blocks_of() {
  if (kVec == 1) return W::kKernel == 3 ? 6 : 4;
  const bool strided = W::kDown * W::kUp > 1;
  return W::kKernel == 3 ? 4 + strided : W::kKernel == 5 ? 3 : 2 + strided;
}

template <typename T, int kVec, typename W>
__global__ void __launch_bounds__(kNhwcThreads, (blocks_of<kVec, W>()))
    walk_kernel(const NhwcArgs a, const T* __restrict__ in, const T* __restrict__ w, const T* __restrict__ bias,
                const Activation activation, T* __restrict__ out) {
  wait_for_earlier_kernels();
  constexpr int kKernel = W::kKernel, kDown = W::kDown, kUp = W::kUp;
  DYN_SMEM(smem);
  float* filter = reinterpret_cast<float*>(smem);
  uint32_t channel_block = blockIdx.x;
  const uint32_t place_block = a.by_channel_blocks.split(channel_block);
  const Place p = find_place<W>(a, channel_block, place_block);

  // The walk: from the first step that meets both strip and image, or that completes a row (an output may meet no row),
  // to the step that completes the last row.
  const int in_first = kUp == 1 ? static_cast<int>(a.by_dilation_h.div(max(a.h.dilation - 1 - p.in_row, 0))) : 0;
  const int in_end = static_cast<int>(a.by_dilation_h.div(max(a.h.in_size - p.in_row + a.h.dilation - 1, 0)));
  const int begin =
      max((p.walk_row + W::kLag - (W::kRing - 1)) / kUp, min(in_first / kDown, (p.walk_row + W::kLag) / kUp));
  const int end = (p.first_row + p.rows - 1 + W::kLag) / kUp + 1;  // where position passes p.rows
  const int in_column =
      p.in_column + (kUp == 1 ? p.walk_column * kDown * a.w.dilation : p.walk_column / kUp - (kKernel - 1) / kUp);
  const int out_column = p.out_column + p.walk_column * a.w.dilation;
  const int in_inside = columns_inside<W::kWindow>(in_column, a.w.dilation, a.w.in_size);
  const int out_inside = columns_inside<W::kColumns>(out_column, a.w.dilation, a.w.out_size);
  const int inside = opaque(p.active ? in_inside | out_inside << W::kWindow : 0);  // or it is made again for every row

  int position = kUp * begin - W::kLag - p.first_row;  // of the ring's first row, from the first that is stored
  char* to = reinterpret_cast<char*>(out + p.vector * kVec) + p.n * a.out_n + p.out_row * a.out_h +
             out_column * a.out_w + (p.first_row + position) * a.out_row_step;

  // Rows are read in order, each once.
  const char* from = reinterpret_cast<const char*>(in + p.vector * kVec) + p.n * a.in_n + p.in_row * a.in_h +
                     in_column * a.in_w + kDown * begin * a.in_row_step;
  int unread = kDown * begin - in_first;  // the next row to read, from the first in the image
  const auto rows_read = static_cast<unsigned>(max(min(in_end, kDown * end) - in_first, 0));
  const auto read_row = [&](Pixel<T, kVec>(&row)[W::kWindow]) {
    const uint32_t columns = static_cast<unsigned>(unread) < rows_read ? inside : 0;
#pragma unroll
    for (int c = 0; c < W::kWindow; ++c) row[c].load(from + int64_t{a.in_column_step} * c, columns & 1 << c);
    ++unread, from += a.in_row_step;
  };
  Pixel<T, kVec> ahead[W::kAhead][kDown][W::kWindow];
#pragma unroll
  for (int i = 0; i < W::kAhead * kDown; ++i) read_row(ahead[i / kDown][i % kDown]);

  stage_filter<kNhwcThreads, kNhwcLanes, kKernel, kVec>(filter, a.filter, w,
                                                        static_cast<int>(channel_block) * a.lanes * kVec, a.lanes);
  __syncthreads();
  if (!p.active) return;
  filter += p.lane * FilterLayout<kKernel, kVec>::kLane;

  float start[kVec] = {};
  if (kUp == 1 && bias != nullptr) load_vec<kVec>(start, bias + p.vector * kVec);
  float ring[W::kRing][W::kColumns][kVec];
#pragma unroll
  for (int i = 0; i < W::kRing * W::kColumns * kVec; ++i) {
    ring[i / kVec / W::kColumns][i / kVec % W::kColumns][i % kVec] = start[i % kVec];
  }
#pragma unroll 1
  while (position < p.rows) {
    const float* taps = filter + opaque(0);  // or all would be read before the loop
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      float window[W::kWindow][kVec];
#pragma unroll
      for (int c = 0; c < W::kWindow; ++c) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) window[c][v] = ahead[0][i][c].get(v);
#pragma unroll
        for (int k = 1; k < W::kAhead; ++k) ahead[k - 1][i][c] = ahead[k][i][c];
      }
      read_row(ahead[W::kAhead - 1][i]);
      add_row<W, kVec>(ring, window, start, taps, i);
    }
#pragma unroll
    for (int i = 0; i < kUp; ++i, ++position, to += a.out_row_step) {
      if (static_cast<unsigned>(position) >= static_cast<unsigned>(p.rows)) continue;
      float sums[W::kColumns * kVec];
#pragma unroll
      for (int k = 0; k < W::kColumns * kVec; ++k) sums[k] = ring[i][k / kVec][k % kVec];
      if constexpr (kUp == 1) activate_all<T>(activation, sums);
#pragma unroll
      for (int o = 0; o < W::kColumns; ++o) {
        float values[kVec];
#pragma unroll
        for (int v = 0; v < kVec; ++v) values[v] = sums[o * kVec + v];
        Pixel<T, kVec> pixel;
        pixel.set(values);
        if (inside >> (W::kWindow + o) & 1) pixel.store(to + int64_t{a.out_column_step} * o);
      }
    }
  }
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
      if (vec == 2) return with_kernel(Int<2>{});
      return vec == 1 ? with_kernel(Int<1>{}) : cudaErrorInvalidValue;
    }
  });
}

// Strips of `tile` outputs that cover an axis, of all phases; the first one going up begins at an even position.
int64_t tiles(const NhwcAxis& axis, int up, int64_t tile) {
  const int64_t outputs = axis.out_size + (up == 2 ? axis.pad % 2 : 0);
  return axis.phases * ceil_div<int64_t>(ceil_div<int64_t>(outputs, axis.phases), tile);
}

template <int kDown, int kUp>
cudaError_t run(const Launch& call, const NhwcCut& cut, NhwcArgs a) {
  const ConvShape& shape = call.shape;
  a.vectors = static_cast<int>(shape.C / cut.vec);
  a.lanes = static_cast<int>(nhwc_lanes(a.vectors));
  a.slots = kNhwcThreads / a.lanes;
  a.rows = ceil_div(cut.rows, kUp) * kUp;
  const int64_t strips = tiles(a.h, kUp, a.rows), column_tiles = tiles(a.w, kUp, nhwc_columns(kDown * kUp));
  a.places = static_cast<uint32_t>(shape.N * strips * column_tiles);
  a.by_lanes = FastDiv(a.lanes), a.by_channel_blocks = FastDiv(ceil_div(a.vectors, a.lanes));
  a.by_strips = FastDiv(strips), a.by_column_tiles = FastDiv(column_tiles);
  a.by_phases_h = FastDiv(a.h.phases), a.by_phases_w = FastDiv(a.w.phases);
  a.by_dilation_h = FastDiv(a.h.dilation);
  const int64_t blocks = a.by_channel_blocks.divisor * ceil_div<int64_t>(a.places, a.slots);
  return dispatch(call.dtype, cut.vec, shape.R, [&](auto tag, auto vector, auto kernel) {
    using T = typename decltype(tag)::type;
    constexpr int kVec = decltype(vector)::value, kKernel = decltype(kernel)::value;
    const size_t smem_bytes = a.lanes * FilterLayout<kKernel, kVec>::kLane * sizeof(float);
    const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(kNhwcThreads), smem_bytes, call.stream};
    return launch(walk_kernel<T, kVec, Walk<kKernel, kDown, kUp>>, config, a, call.first_as<T>(), call.second_as<T>(),
                  call.bias_as<T>(), call.epilogue.activation, call.out_as<T>());
  });
}

NhwcAxis make_axis(int64_t in_size, int64_t out_size, int64_t pad, int64_t dilation) {
  return {static_cast<int>(in_size), static_cast<int>(out_size), static_cast<int>(pad), static_cast<int>(dilation),
          static_cast<int>(std::min(dilation, out_size))};
}

NhwcArgs make_args(const Launch& call, const NhwcAxis& h, const NhwcAxis& w, const Strides& in, const Strides& out,
                   bool turned) {
  const ConvShape& shape = call.shape;
  const int64_t bytes = element_size(call.dtype);
  NhwcArgs a{};
  a.h = h, a.w = w;
  a.in_n = bytes * in.n, a.in_h = bytes * in.h, a.in_w = bytes * in.w;
  a.out_n = bytes * out.n, a.out_h = bytes * out.h, a.out_w = bytes * out.w;
  a.in_row_step = h.dilation * a.in_h, a.in_column_step = static_cast<int>(w.dilation * a.in_w);
  a.out_row_step = h.dilation * a.out_h, a.out_column_step = static_cast<int>(w.dilation * a.out_w);
  a.filter = {shape.w.n, shape.w.h, shape.w.w, static_cast<int>(shape.C), turned};
  return a;
}

}  // namespace

cudaError_t launch_depthwise_nhwc_forward(const Launch& call, const NhwcCut& cut) {
  const ConvShape& s = call.shape;
  const NhwcArgs a = make_args(call, make_axis(s.H, s.P, s.pad_h, s.dilation_h),
                               make_axis(s.W, s.Q, s.pad_w, s.dilation_w), s.x, s.y, false);
  return s.stride_h == 1 ? run<1, 1>(call, cut, a) : run<2, 1>(call, cut, a);
}

cudaError_t launch_depthwise_nhwc_grad_input(const Launch& call, const NhwcCut& cut) {
  const ConvShape& s = call.shape;
  if (s.stride_h == 1) {
    const Correlation c = correlation(Map::grad_input, s);
    return run<1, 1>(call, cut,
                     make_args(call, make_axis(s.P, s.H, c.pad_h, s.dilation_h),
                               make_axis(s.Q, s.W, c.pad_w, s.dilation_w), s.y, s.x, true));
  }
  return run<1, 2>(call, cut,
                   make_args(call, make_axis(s.P, s.H, s.pad_h, 1), make_axis(s.Q, s.W, s.pad_w, 1), s.y, s.x, false));
}

}  // namespace sepconv::cuda
