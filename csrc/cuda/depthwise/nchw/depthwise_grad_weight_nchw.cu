// Depthwise grad_weight, columns dense (NCHW), kernels 3x3, 5x5 and 7x7 at stride 1 and 2, in one pass over x and
// grad_y: every byte of both comes from memory once, by copies of 16 bytes that run ahead of the arithmetic.
//
// Thread-to-data map. A block owns neighbouring channels and a split of the rows of all images; thread t takes seven
// neighbouring columns of grad_y of one channel: slot t % slots of the row of channel t / slots, up to 128 threads. All
// planes of a block are worked down side by side. A stage of shared memory holds `rows` rows of grad_y of every plane
// and the rows of x that are new with them:
//     x [channels, x_pitch bytes]   grad_y [channels, y_pitch bytes].
// The rows of a plane are one run of bytes in memory. It is copied from the 16-byte boundary at or before it, so rows
// of any width are copied whole; a thread skips the bytes before the run, and asks for the columns that exist only.
// While the block works on one stage, the copies of the next are under way (arithmetic: depthwise_grad_weight.cuh).
//
// Where tensors are not aligned or rows have gaps, and where an input channel has several outputs, the copies go
// element by element.
#include "cuda/depthwise/depthwise_grad_weight.cuh"
#include "cuda/depthwise/nchw/cut.h"

namespace sepconv::cuda {
namespace {

using namespace grad_weight;

constexpr int kStages = 2;
constexpr int kThreads = kGradWeightThreads;

// One of the two images: how to copy it, and where a plane's run lies in a stage.
template <typename T>
struct NchwGradWeightImage {
  const T* data;
  int64_t n, c;  // strides, in elements
  int h, w;
  int columns;
  int pitch;                          // bytes of a plane in a stage
  FastDiv by_columns, by_multiplier;  // the latter: from an output channel to a channel of this image
};

template <typename T>
struct NchwGradWeightArgs {
  Rows rows;
  Result<T> result;
  NchwGradWeightImage<T> x, y;
  int pad_w;
  int channels, slots, stage_rows;
  bool pieces;                  // copies of 16 bytes
  int piece_shift, plane_step;  // 2^piece_shift threads copy a plane; planes copied at once
  FastDiv by_chunks, by_slots;
};

// Bytes between the 16-byte boundary and row `first` of a plane.
template <typename T>
__device__ __forceinline__ int skew(const NchwGradWeightArgs<T>& a, const NchwGradWeightImage<T>& image, int n,
                                    int first, int channel) {
  const uint32_t element = static_cast<uint32_t>(image.n) * n + static_cast<uint32_t>(image.c) * channel +
                           static_cast<uint32_t>(image.h) * first;
  return a.pieces ? static_cast<int>(element * sizeof(T) & 15) : 0;
}

// Rows [first, last) of image n of all planes of the block.
template <typename T>
__device__ __forceinline__ void copy_rows(const NchwGradWeightArgs<T>& a, const NchwGradWeightImage<T>& image,
                                          unsigned char* to, int n, int first, int last, int first_channel,
                                          int channels) {
  if (first >= last) return;
  const int elements = (last - first) * image.columns;
  const T* const rows = image.data + n * image.n + static_cast<int64_t>(first) * image.h;
  if (a.pieces) {
    // Planes plane_step apart lie equally far behind a boundary.
    const int plane = static_cast<int>(threadIdx.x) >> a.piece_shift;
    const int begin = skew(a, image, n, first, first_channel + plane);
    const int bytes = plane < a.plane_step ? begin + elements * static_cast<int>(sizeof(T)) : 0;
    const auto* from = reinterpret_cast<const unsigned char*>(rows + (first_channel + plane) * image.c) - begin;
    to += plane * image.pitch;
    const int64_t from_step = a.plane_step * image.c * static_cast<int64_t>(sizeof(T));
    const int to_step = a.plane_step * image.pitch;
#pragma unroll 1
    for (int at = (static_cast<int>(threadIdx.x) & ((1 << a.piece_shift) - 1)) * 16; at < bytes;
         at += 16 << a.piece_shift) {
      const int wanted = min(bytes - at, 16);
      const unsigned char* piece = from + at;
      unsigned char* place = to + at;
#pragma unroll 1
      for (int c = plane; c < channels; c += a.plane_step, piece += from_step, place += to_step) {
        cp_async16_first(place, piece, wanted);
      }
    }
  } else {
    const int warps = static_cast<int>(blockDim.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int plane = static_cast<int>(threadIdx.x) / 32; plane < channels; plane += warps) {
      const T* const from = rows + image.by_multiplier.div(first_channel + plane) * image.c;
      T* const run = reinterpret_cast<T*>(to + plane * image.pitch);
      for (int i = lane; i < elements; i += 32) {
        uint32_t column = static_cast<uint32_t>(i);
        const int64_t row = image.by_columns.split(column);
        run[i] = from[row * image.h + static_cast<int64_t>(column) * image.w];
      }
    }
  }
}

template <typename T, int kKernel, int kStride>
__global__ void __launch_bounds__(kThreads, kKernel == 7 ? 3 : 4)
    grad_weight_nchw_kernel(const NchwGradWeightArgs<T> a) {
  wait_for_earlier_kernels();
  using Path = Walk<kKernel, kStride>;
  DYN_SMEM(smem);
  const int y_at = a.channels * a.x.pitch, stage_bytes = y_at + a.channels * a.y.pitch;

  uint32_t chunk = blockIdx.x;
  const uint32_t split = a.by_chunks.split(chunk);
  const int first_channel = static_cast<int>(chunk) * a.channels;
  const int channels = min(a.channels, a.result.K - first_channel);

  Path ahead(a.rows, split), here = ahead;
  int step_ahead = 0;
  bool more_ahead = ahead.open(a.rows);
  const auto copy_next = [&](int stage) {
    if (more_ahead) {
      unsigned char* const to = smem + stage * stage_bytes;
      const int end = min(step_ahead + a.stage_rows, ahead.steps);
      copy_rows(a, a.x, to, ahead.place, max(ahead.x_row(a.rows, step_ahead), 0),
                min(ahead.x_row(a.rows, end), a.rows.H), first_channel, channels);
      copy_rows(a, a.y, to + y_at, ahead.place, ahead.first + step_ahead, ahead.first + min(end, ahead.count),
                first_channel, channels);
      step_ahead = end;
      if (step_ahead == ahead.steps) {
        step_ahead = 0;
        more_ahead = ahead.open(a.rows);
      }
    }
    cp_async_commit();
  };
  copy_next(0);

  uint32_t slot = threadIdx.x;
  const int plane = static_cast<int>(a.by_slots.split(slot));
  const int y_column = static_cast<int>(slot) * kColumns, x_column = y_column * kStride - a.pad_w;
  using Window = Window<T, kKernel, kStride, 1>;
  // Which of the thread's columns exist: none of a plane that does not.
  const auto columns_from = [&](int first, int count, int columns) {
    uint32_t mask = 0;
    for (int i = 0; i < count; ++i) {
      mask |= static_cast<uint32_t>(static_cast<unsigned>(first + i) < static_cast<unsigned>(columns)) << i;
    }
    return plane < channels ? mask : 0;
  };
  const uint32_t x_mask = columns_from(x_column, Window::kReach, a.x.columns);
  const uint32_t y_mask = columns_from(y_column, kColumns, a.y.columns);

  Window window;
  int stage = 0;
#pragma unroll 1
  while (here.open(a.rows)) {
    window.clear();
    int h = here.x_row(a.rows, 0), step = 0;
#pragma unroll 1
    while (step < here.steps) {
      cp_async_wait<0>();
      __syncthreads();
      copy_next(stage ^ 1);
      const int channel = first_channel + plane, first_h = max(h, 0), first_p = here.first + step;
      const unsigned char* const from = smem + stage * stage_bytes;
      const T* x_row =
          reinterpret_cast<const T*>(from + plane * a.x.pitch + skew(a, a.x, here.place, first_h, channel)) +
          (h - first_h) * a.x.columns + x_column;
      const T* y_row =
          reinterpret_cast<const T*>(from + y_at + plane * a.y.pitch + skew(a, a.y, here.place, first_p, channel)) +
          y_column;
      const int end = min(step + a.stage_rows, here.steps);
#pragma unroll 1
      for (; step < end; ++step) {
        window.push(y_row, step < here.count, y_mask);
        y_row += a.y.columns;
#pragma unroll
        for (int phase = 0; phase < kStride; ++phase, ++h) {
          if (a.rows.in_image(h)) window.meet(phase, x_row, x_mask);
          x_row += a.x.columns;
        }
      }
      stage ^= 1;
    }
  }
  store_sums(
      a.result, window.sums, reinterpret_cast<float*>(smem), split, first_channel, channels,
      [&](int c) { return c * a.slots; }, 1, a.slots);
}

template <typename T>
NchwGradWeightImage<T> make_image(const void* data, const Strides& s, int64_t columns, int64_t rows,
                                  int64_t multiplier) {
  const int64_t pitch = grad_weight_run_bytes(rows * columns, sizeof(T));
  return {static_cast<const T*>(data),
          s.n,
          s.c,
          static_cast<int>(s.h),
          static_cast<int>(s.w),
          static_cast<int>(columns),
          static_cast<int>(pitch),
          FastDiv(columns),
          FastDiv(multiplier)};
}

// Deals pieces and planes to threads, as cheaply as it can be had: a piece's address costs about as much as its copies
// from one plane more. plane_step is a multiple of what 16 bytes hold.
template <typename T>
void share_pieces(NchwGradWeightArgs<T>& a, int threads) {
  int least = 0;
  for (int shift = 0; threads >> shift >= kVec16<T>; ++shift) {
    const int step = (threads >> shift) / kVec16<T> * kVec16<T>;
    const int cost = ceil_div(a.y.pitch / 16, 1 << shift) * (1 + ceil_div(a.channels, step));
    if (shift > 0 && cost > least) continue;  // at the same cost neighbouring threads copy neighbouring pieces
    least = cost, a.piece_shift = shift, a.plane_step = step;
  }
}

}  // namespace

cudaError_t launch_depthwise_grad_weight_nchw(const Launch& call, const GradWeightRowsCut& cut) {
  const ConvShape& s = call.shape;
  const cudaError_t error = dispatch(s, call.dtype, [&](auto tag, auto kernel, auto stride) {
    using T = typename decltype(tag)::type;
    constexpr int kKernel = decltype(kernel)::value, kStride = decltype(stride)::value;
    const GradWeightNchw block = grad_weight_nchw_block(s, call.dtype);
    const int threads = ceil_div(block.channels * block.slots, 32) * 32;
    NchwGradWeightArgs<T> a{};
    a.rows = make_rows(s, s.N, cut);
    a.result = make_result<T>(call, cut.splits);
    a.x = make_image<T>(call.second, s.x, s.W, std::min<int64_t>(block.rows * kStride, s.H), s.K / s.C);
    a.y = make_image<T>(call.first, s.y, s.Q, std::min<int64_t>(block.rows, s.P), 1);
    a.pad_w = static_cast<int>(s.pad_w);
    a.channels = block.channels, a.slots = block.slots, a.stage_rows = block.rows;
    a.pieces = cut.vec > 1;
    share_pieces(a, threads);
    a.by_chunks = FastDiv(block.chunks), a.by_slots = FastDiv(block.slots);
    const size_t stages = static_cast<size_t>(kStages) * a.channels * (a.x.pitch + a.y.pitch);
    const size_t bytes = std::max(stages, threads * kKernel * sizeof(float));
    const LaunchConfig config{dim3(static_cast<unsigned>(block.chunks * cut.splits)),
                              dim3(static_cast<unsigned>(threads)), bytes, call.stream};
    return launch(grad_weight_nchw_kernel<T, kKernel, kStride>, config, a);
  });
  return error != cudaSuccess || cut.splits == 1 ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
