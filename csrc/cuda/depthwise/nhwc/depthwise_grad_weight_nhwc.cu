// Depthwise grad_weight, channels dense (channels_last), kernels 3x3, 5x5 and 7x7 at stride 1 and 2, in one pass over x
// and grad_y: every byte of both comes from memory once, by copies of 16 bytes that run ahead of the arithmetic.
//
// Thread-to-data map. A block owns a chunk of up to 32 channels and a split of the rows; lane l of each warp is channel
// l of the chunk, and a warp takes seven neighbouring columns of grad_y: up to eight warps are a row of 56 columns, a
// tile of a longer row, or short rows of several images one after the other; up to 16 channels share the lanes with
// those of other images. A stage of shared memory holds two rows of grad_y, or one at stride 2, and the rows of x that
// are new with them,
//     x [rows * kStride, images, columns of x, 32 lanes]   grad_y [rows, images, columns of grad_y, 32 lanes],
// with zeros where a column does not exist, so a warp reads neighbouring words and knows no borders. All threads copy
// what is one or two stages ahead, then each takes the present rows into its registers (depthwise_grad_weight.cuh).
//
// Where pixels do not begin on 16 bytes, and where an input channel has several outputs, the copies go element by
// element.
#include "cuda/depthwise/depthwise_grad_weight.cuh"
#include "cuda/depthwise/nhwc/cut.h"

namespace sepconv::cuda {
namespace {

using namespace grad_weight;

constexpr int kLanes = 32;

// Rows of grad_y in a stage: two share a barrier, and at stride 2 there are two rows of x to each already.
template <int kStride>
constexpr int kStageRows = kStride == 1 ? 2 : 1;

// Stages on their way are what hides the latency of memory: about 30 KB a block, two or three blocks a multiprocessor.
template <typename T>
constexpr int kStages = sizeof(T) == 2 ? 3 : 2;

// Pieces of 16 bytes that a thread copies of a row at most: with one warp an image, which has the widest borders.
template <typename T, int kKernel, int kStride>
constexpr int kRounds = ceil_div((kLanes / kVec16<T>)*((kColumns - 1) * kStride + kKernel), kLanes);

// One of the two images, and what a place takes of each of its rows.
template <typename T>
struct NhwcGradWeightImage {
  const T* data;
  int64_t n, c;  // strides, in elements
  int h, w;
  int columns;    // of the image
  int tile;       // of a place: those of one image, borders included
  int stage_row;  // elements of a row of the place in a stage
  int pieces;     // of 16 bytes in such a row; 0: copies go element by element
  FastDiv by_tile;
  FastDiv by_multiplier;  // from an output channel to a channel of this image
};

template <typename T>
struct NhwcGradWeightArgs {
  Rows rows;
  Result<T> result;
  NhwcGradWeightImage<T> x, y;
  int N, pad_w;
  int channels;  // of a chunk
  int lanes;     // of an image: 32, or where that leaves room for the channels 16 or 8, beside those of other images
  int images, slots;  // images one after the other in a place; warps for each
  FastDiv by_chunks, by_tiles, by_slots;
};

// What a thread copies of an image: row after row of a place, the same pieces of each.
template <typename T, int kCount>
struct Source {
  static constexpr int kVec = kVec16<T>, kPieces = kLanes / kVec;  // pieces of a pixel

  const T* row;  // the place's first column in the row that comes next, which may not exist
  int first_image, first_column;
  uint32_t offsets[kCount];  // of the thread's pieces, in elements
  uint32_t valid;            // bit i: piece i lies in the image; else it is zeros

  // What lane l of pixel `pixel` of the place holds: a column of an image, and a channel.
  struct Cell {
    int image, column, channel;
    bool exists;
  };
  __device__ __forceinline__ Cell cell(const NhwcGradWeightArgs<T>& a, const NhwcGradWeightImage<T>& image, int pixel,
                                       int lane, int first_channel) const {
    uint32_t column = static_cast<uint32_t>(pixel);
    const int side = lane / a.lanes, c = lane - side * a.lanes, k = first_channel + c;
    const int n = static_cast<int>(image.by_tile.split(column)) + side * a.images;
    const bool exists =
        pixel < a.images * image.tile && c < a.channels && k < a.result.K && first_image + n < a.N &&
        static_cast<unsigned>(first_column + static_cast<int>(column)) < static_cast<unsigned>(image.columns);
    return {n, static_cast<int>(column), k, exists};
  }

  __device__ __forceinline__ void open(const NhwcGradWeightArgs<T>& a, const NhwcGradWeightImage<T>& image, int n,
                                       int h, int column, int first_channel) {
    first_image = n, first_column = column;
    row = image.data + n * image.n + static_cast<int64_t>(h) * image.h + static_cast<int64_t>(column) * image.w;
    valid = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int piece = static_cast<int>(threadIdx.x + i * blockDim.x);
      const Cell at = cell(a, image, piece / kPieces, piece % kPieces * kVec, first_channel);
      offsets[i] = at.image * static_cast<uint32_t>(image.n) + at.column * image.w + at.channel;
      valid |= static_cast<uint32_t>(at.exists) << i;
    }
  }

  // Copies the row to a stage.
  __device__ __forceinline__ void copy(const NhwcGradWeightArgs<T>& a, const NhwcGradWeightImage<T>& image, T* to,
                                       int first_channel) const {
    if (image.pieces == 0) return copy_elements(a, image, to, first_channel);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int piece = static_cast<int>(threadIdx.x + i * blockDim.x);
      if (i > 0 && piece >= image.pieces) break;
      cp_async16(to + piece * kVec, row + offsets[i], valid >> i & 1);
    }
  }
  __device__ __forceinline__ void copy_elements(const NhwcGradWeightArgs<T>& a, const NhwcGradWeightImage<T>& image,
                                                T* to, int first_channel) const {
    for (int i = static_cast<int>(threadIdx.x); i < a.images * image.tile * kLanes; i += static_cast<int>(blockDim.x)) {
      const Cell at = cell(a, image, i / kLanes, i % kLanes, first_channel);
      T value = from_acc<T>(0.f);
      if (at.exists) {
        value = row[at.image * image.n + static_cast<int64_t>(at.column) * image.w +
                    image.by_multiplier.div(at.channel) * image.c];
      }
      to[i] = value;
    }
  }
};

template <typename T, int kKernel, int kStride>
__global__ void __launch_bounds__(kLanes* grad_weight_slots(kKernel), kKernel == 7 ? 3 : 2)
    grad_weight_nhwc_kernel(const NhwcGradWeightArgs<T> a) {
  wait_for_earlier_kernels();
  constexpr int kAhead = kStages<T> - 1, kRows = kStageRows<kStride>;
  DYN_SMEM(smem);
  T* const first_stage = reinterpret_cast<T*>(smem);
  const int y_at = kRows * kStride * a.x.stage_row, stage_elements = y_at + kRows * a.y.stage_row;
  T* const last_stage = first_stage + kAhead * stage_elements;

  uint32_t chunk = blockIdx.x;
  const uint32_t split = a.by_chunks.split(chunk);
  const int first_channel = static_cast<int>(chunk) * a.channels;

  Walk<kKernel, kStride> ahead(a.rows, split), here = ahead;
  int step_ahead = 0, h_ahead = 0;
  bool more_ahead = ahead.open(a.rows);
  Source<T, kRounds<T, kKernel, kStride>> x;
  Source<T, kRounds<T, 1, 1>> y;
  const auto open_sources = [&] {
    uint32_t tile = static_cast<uint32_t>(ahead.place);
    const int image = static_cast<int>(a.by_tiles.split(tile)) * a.images * (kLanes / a.lanes);
    const int column = static_cast<int>(tile) * a.y.tile;
    step_ahead = 0, h_ahead = ahead.x_row(a.rows, 0);
    x.open(a, a.x, image, h_ahead, column * kStride - a.pad_w, first_channel);
    y.open(a, a.y, image, ahead.first, column, first_channel);
  };
  if (more_ahead) open_sources();
  const auto copy_next = [&](T* stage) {
    if (more_ahead) {
#pragma unroll
      for (int i = 0; i < kRows; ++i, ++step_ahead) {
        if (step_ahead < ahead.count) y.copy(a, a.y, stage + y_at + i * a.y.stage_row, first_channel);
        y.row += a.y.h;
#pragma unroll
        for (int phase = 0; phase < kStride; ++phase, ++h_ahead) {
          if (a.rows.in_image(h_ahead)) x.copy(a, a.x, stage + (i * kStride + phase) * a.x.stage_row, first_channel);
          x.row += a.x.h;
        }
      }
      if (step_ahead >= ahead.steps) {
        more_ahead = ahead.open(a.rows);
        if (more_ahead) open_sources();
      }
    }
    cp_async_commit();  // an empty group, too, keeps the count of groups in step with the rows
  };
#pragma unroll 1
  for (T* stage = first_stage; stage != last_stage; stage += stage_elements) copy_next(stage);

  const int lane = static_cast<int>(threadIdx.x) % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes;
  uint32_t slot = static_cast<uint32_t>(warp);
  const int image = static_cast<int>(a.by_slots.split(slot));
  const int x_thread = (image * a.x.tile + static_cast<int>(slot) * kColumns * kStride) * kLanes + lane;
  const int y_thread = y_at + warp * kColumns * kLanes + lane;
  Window<T, kKernel, kStride, kLanes> window;
  T *stage = first_stage, *free_stage = last_stage;  // the one that the last step has read
#pragma unroll 1
  while (here.open(a.rows)) {
    window.clear();
    int h = here.x_row(a.rows, 0), step = 0;
#pragma unroll 1
    while (step < here.steps) {
      cp_async_wait<kAhead - 1>();
      __syncthreads();
      copy_next(free_stage);
      const T *x_row = stage + x_thread, *y_row = stage + y_thread;
      free_stage = stage;
      stage = stage == last_stage ? first_stage : stage + stage_elements;
      const int end = min(step + kRows, here.steps);
#pragma unroll 1
      for (; step < end; ++step) {
        window.push(y_row, step < here.count);
        y_row += a.y.stage_row;
#pragma unroll
        for (int phase = 0; phase < kStride; ++phase, ++h) {
          if (a.rows.in_image(h)) window.meet(phase, x_row);
          x_row += a.x.stage_row;
        }
      }
    }
  }
  store_sums(
      a.result, window.sums, reinterpret_cast<float*>(smem), split, first_channel,
      min(a.channels, a.result.K - first_channel), [](int c) { return c; }, a.lanes,
      static_cast<int>(blockDim.x) / a.lanes);
}

template <typename T>
NhwcGradWeightImage<T> make_image(const void* data, const Strides& s, int64_t N, int64_t columns, int tile,
                                  int64_t multiplier, const GradWeightNhwc& block, bool copies_pieces) {
  constexpr int kVec = kVec16<T>;
  const int pieces = block.images * tile * (kLanes / kVec), threads = kLanes * block.images * block.slots;
  // The stride of a single column or image may be anything, but copies need addresses on 16 bytes for those that do not
  // exist too.
  const int64_t column = columns > 1 ? s.w : 0;
  return {static_cast<const T*>(data),
          N > 1 ? s.n : 0,
          s.c,
          static_cast<int>(s.h),
          static_cast<int>(column),
          static_cast<int>(columns),
          tile,
          std::max(pieces, threads) * kVec,  // every thread copies a first piece
          copies_pieces ? pieces : 0,
          FastDiv(tile),
          FastDiv(multiplier)};
}

}  // namespace

cudaError_t launch_depthwise_grad_weight_nhwc(const Launch& call, const GradWeightRowsCut& cut) {
  const ConvShape& s = call.shape;
  const cudaError_t error = dispatch(s, call.dtype, [&](auto tag, auto kernel, auto stride) {
    using T = typename decltype(tag)::type;
    constexpr int kKernel = decltype(kernel)::value, kStride = decltype(stride)::value;
    const GradWeightNhwc block = grad_weight_nhwc_block(s);
    const int threads = kLanes * block.images * block.slots, y_tile = block.slots * kColumns;
    NhwcGradWeightArgs<T> a{};
    a.rows = make_rows(s, block.places, cut);
    a.result = make_result<T>(call, cut.splits);
    a.x = make_image<T>(call.second, s.x, s.N, s.W, (y_tile - 1) * kStride + kKernel, s.K / s.C, block, cut.vec > 1);
    a.y = make_image<T>(call.first, s.y, s.N, s.Q, y_tile, 1, block, cut.vec > 1);
    a.N = static_cast<int>(s.N), a.pad_w = static_cast<int>(s.pad_w);
    a.channels = block.channels, a.lanes = block.lanes, a.images = block.images, a.slots = block.slots;
    a.by_chunks = FastDiv(block.chunks), a.by_tiles = FastDiv(block.tiles), a.by_slots = FastDiv(block.slots);
    const size_t stage = kStageRows<kStride> * (kStride * a.x.stage_row + a.y.stage_row) * sizeof(T);
    const size_t bytes = std::max(kStages<T> * stage, threads * kKernel * sizeof(float));
    const LaunchConfig config{dim3(static_cast<unsigned>(block.chunks * cut.splits)),
                              dim3(static_cast<unsigned>(threads)), bytes, call.stream};
    return launch(grad_weight_nhwc_kernel<T, kKernel, kStride>, config, a);
  });
  return error != cudaSuccess || cut.splits == 1 ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
