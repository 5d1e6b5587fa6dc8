// Depthwise forward and grad_input of stride 1 in float32, channels dense in memory (channels_last), on GPUs with a
// copy engine for boxes of tensors (TMA, compute capability 9.0): the walk of depthwise_nhwc.cuh, with rows that it
// brings.
//
// Thread-to-data map. A warp is a pipeline of its own, and waits for no other warp. It owns a strip of output rows of
// one image, of which it has kTiles tiles of seven neighbouring columns, and kLanes pairs of neighbouring channels
// (kTiles * kLanes = 32): lane l has pair l % kLanes of tile l / kLanes. The four warps of a block have the same
// channels, and share their filters; their places follow each other along the rows of the image, then down, then from
// image to image.
//
//   image, row by row                     shared memory of a warp                    registers of a lane
//   box: 7 kTiles + k - 1 columns  -TMA-> ring of kStages rows, each with -window->  ring of k rows of sums  -->  y
//        2 kLanes channels                a barrier: are its bytes there?
//
// A step of the walk: wait for the row's bytes; read the window; when all lanes have, one of them asks for the row that
// comes kStages later, into the place of the one just read; add the products; store the row of outputs that is
// complete. What is on its way lives in no register and takes no instructions of the warp's: the engine fills boxes
// with zeros where they are outside of the image, which is the padding, and columns lie at fixed distances, without
// addresses or masks. The price: columns at the border of two warps' boxes come from L2 twice.
//
// Banks: half a warp is served at a time, and its 16 lanes read 128 consecutive bytes of a pixel. No swizzle is needed.
#include "cuda/depthwise/nhwc/depthwise_nhwc.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kWarps = kNhwcThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// "in" is the image that is read and "out" the image that is written: grad_y and grad_x for grad_input.
struct NhwcTmaArgs {
  int out_rows, out_columns, pad_h, pad_w;
  int64_t out_n, out_h;  // strides, in bytes
  int out_w;
  int pairs;  // of channels
  int rows;   // of a strip
  uint32_t places;
  FastDiv by_channel_blocks, by_strips, by_column_tiles;
  FilterSource filter;
};

template <int kKernel, int kLanes>
struct Pipeline {
  using W = Walk<kKernel, 1, 1>;
  static constexpr int kStages = 4;
  static constexpr int kTiles = 32 / kLanes, kColumns = kTiles * W::kColumns;  // of outputs
  static constexpr int kPixelBytes = 2 * kLanes * 4;
  static constexpr int kBoxColumns = kColumns + kKernel - 1, kBoxBytes = kBoxColumns * kPixelBytes;
  static constexpr int kStageBytes =
      ceil_div(kBoxBytes + 8, 128) * 128;  // a box, which begins on 128 bytes; its barrier
  // Of a block: the rings of its warps, then its filters.
  static constexpr int kSharedBytes = kWarps * kStages * kStageBytes + kLanes * FilterLayout<kKernel, 2>::kLane * 4;
};

// A row of sums, through the activation, to the columns whose bits stand in `inside`, `step` bytes apart from `to` on.
template <int kColumns>
__device__ __forceinline__ void store_row(char* to, int64_t step, int inside, const float (&row)[kColumns][2],
                                          Activation activation) {
  float sums[kColumns * 2];
#pragma unroll
  for (int k = 0; k < kColumns * 2; ++k) sums[k] = row[k / 2][k % 2];
  if (activation != Activation::identity) activate_all<float>(activation, sums);  // the usual case in two instructions
#pragma unroll
  for (int o = 0; o < kColumns; ++o, to += step) {
    store64_if(to, {__float_as_uint(sums[2 * o]), __float_as_uint(sums[2 * o + 1])}, inside & 1 << o);
  }
}

template <int kKernel, int kLanes>
__global__ void __launch_bounds__(kNhwcThreads, nhwc_tma_blocks(kKernel))
    tma_kernel(const __grid_constant__ TensorMap in, const NhwcTmaArgs a, const float* __restrict__ w,
               const float* __restrict__ bias, const Activation activation, float* __restrict__ out) {
  wait_for_earlier_kernels();
  if constexpr (kHasTma) {
    using P = Pipeline<kKernel, kLanes>;
    using W = typename P::W;
    DYN_SMEM(smem);
    // All that a warp does as one follows from this number; as it comes from one lane, the compiler knows that it is
    // the same in all of them, and keeps what follows from it once for a warp.
    const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
    const int lane = static_cast<int>(threadIdx.x) % 32;

    // The warp's place: a strip of rows and columns of an image.
    uint32_t channel_block = blockIdx.x;
    uint32_t place = a.by_channel_blocks.split(channel_block) * kWarps + warp;
    const bool exists = place < a.places;
    uint32_t strip = a.by_column_tiles.split(place);
    const int n = static_cast<int>(a.by_strips.split(strip));
    const int first_row = static_cast<int>(strip) * a.rows, first_column = static_cast<int>(place) * P::kColumns;
    const int first_pair = static_cast<int>(channel_block) * kLanes;
    // The walk, down the rows of the input that the strip meets, but for those above the image, which add nothing.
    const int rows = exists ? min(a.rows, a.out_rows - first_row) : 0;
    const int skipped = min(max(a.pad_h - first_row, 0), W::kLag), steps = exists ? rows + W::kLag - skipped : 0;

    unsigned char* const ring = smem + warp * P::kStages * P::kStageBytes;
    float* filter = reinterpret_cast<float*>(smem + kWarps * P::kStages * P::kStageBytes);
    const auto full = [](unsigned char* stage) { return reinterpret_cast<uint64_t*>(stage + P::kBoxBytes); };
    const auto ask_for_row = [&](int step, unsigned char* stage) {
      mbar_expect(full(stage), P::kBoxBytes);
      tma_load_4d(stage, in, 2 * first_pair, first_column - a.pad_w, first_row - a.pad_h + skipped + step, n,
                  full(stage));
    };
    if (elect_one()) {
      for (int i = 0; i < P::kStages; ++i) mbar_init(full(ring + i * P::kStageBytes), 1);
      fence_mbar_init();
      for (int i = 0; i < min(P::kStages, steps); ++i) ask_for_row(i, ring + i * P::kStageBytes);
    }
    stage_filter<kNhwcThreads, kLanes, kKernel, 2>(filter, a.filter, w, 2 * first_pair, kLanes);
    __syncthreads();  // the filters are there, and every lane knows of its warp's barriers

    // The lane's part of it. Lanes beyond the last channel do what that one does, and store nothing.
    const int pair = min(lane % kLanes, a.pairs - 1 - first_pair), channel = 2 * (first_pair + pair);
    const int column = first_column + lane / kLanes * W::kColumns;
    const int inside = opaque(pair == lane % kLanes ? columns_inside<W::kColumns>(column, 1, a.out_columns) : 0);
    const int window_at = lane / kLanes * W::kColumns * P::kPixelBytes + lane % kLanes * 8;
    filter += pair * FilterLayout<kKernel, 2>::kLane;

    float start[2] = {};
    if (bias != nullptr) load_vec<2>(start, bias + channel);
    float sums[W::kRing][W::kColumns][2];
#pragma unroll
    for (int i = 0; i < W::kRing * W::kColumns * 2; ++i) {
      sums[i / 2 / W::kColumns][i / 2 % W::kColumns][i % 2] = start[i % 2];
    }
    int position = skipped - W::kLag;  // of the sums' first row, from the strip's first
    char* to = reinterpret_cast<char*>(out + channel) + n * a.out_n + (first_row + position) * a.out_h +
               int64_t{column} * a.out_w;
    unsigned char* stage = ring;
    int parity = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ++position, to += a.out_h) {
      mbar_wait(full(stage), parity);
      float window[W::kWindow][2];
#pragma unroll
      for (int c = 0; c < W::kWindow; ++c) {
        load_vec<2>(window[c], reinterpret_cast<const float*>(stage + window_at + c * P::kPixelBytes));
      }
      fence_async_copies();
      __syncwarp();  // every lane has read the row, and the copy engine may write there
      if (step + P::kStages < steps && elect_one()) ask_for_row(step + P::kStages, stage);
      stage += P::kStageBytes;
      if (stage == ring + P::kStages * P::kStageBytes) stage = ring, parity ^= 1;
      add_row<W, 2>(sums, window, start, filter + opaque(0), 0);  // or all taps would be read before the loop
      if (position >= 0) store_row(to, a.out_w, inside, sums[0], activation);
    }
  }
}

// Calls f(kernel, lanes) with both as types.
template <typename F>
cudaError_t dispatch(int64_t kernel, int lanes, F&& f) {
  if (kernel == 5 && lanes == 16) return f(Int<5>{}, Int<16>{});
  if (kernel == 5 && lanes == 32) return f(Int<5>{}, Int<32>{});
  if (kernel == 7 && lanes == 16) return f(Int<7>{}, Int<16>{});
  if (kernel == 7 && lanes == 32) return f(Int<7>{}, Int<32>{});
  return cudaErrorInvalidValue;
}

cudaError_t run(Map map, const Launch& call, const NhwcTmaCut& cut) {
  const ConvShape& s = call.shape;
  const Correlation c = correlation(map, s);
  return dispatch(s.R, cut.pairs, [&](auto kernel, auto lanes) {
    constexpr int kKernel = decltype(kernel)::value, kLanes = decltype(lanes)::value;
    using P = Pipeline<kKernel, kLanes>;
    TensorMap tensor_map;
    const ImageBoxes boxes{call.first, s.N, c.image_h, c.image_w, s.C, c.image, P::kBoxColumns, 2 * kLanes};
    if (const cudaError_t error = make_tensor_map(tensor_map, DType::float32, boxes); error != cudaSuccess)
      return error;
    NhwcTmaArgs a{};
    a.out_rows = static_cast<int>(c.result_h), a.out_columns = static_cast<int>(c.result_w);
    a.pad_h = static_cast<int>(c.pad_h), a.pad_w = static_cast<int>(c.pad_w);
    a.out_n = 4 * c.result.n, a.out_h = 4 * c.result.h, a.out_w = static_cast<int>(4 * c.result.w);
    a.pairs = static_cast<int>(s.C / 2), a.rows = cut.rows;
    const int64_t strips = ceil_div(c.result_h, cut.rows), column_tiles = ceil_div(c.result_w, P::kColumns);
    const int64_t channel_blocks = ceil_div(a.pairs, kLanes), places = s.N * strips * column_tiles;
    a.places = static_cast<uint32_t>(places);
    a.by_channel_blocks = FastDiv(channel_blocks), a.by_strips = FastDiv(strips);
    a.by_column_tiles = FastDiv(column_tiles);
    a.filter = {s.w.n, s.w.h, s.w.w, static_cast<int>(s.C), c.turned};
    const auto blocks = static_cast<unsigned>(channel_blocks * ceil_div(places, kWarps));
    const LaunchConfig config{dim3(blocks), dim3(kNhwcThreads), P::kSharedBytes, call.stream};
    return launch(tma_kernel<kKernel, kLanes>, config, tensor_map, a, call.second_as<float>(), call.bias_as<float>(),
                  call.epilogue.activation, call.out_as<float>());
  });
}

}  // namespace

bool has_depthwise_nhwc_tma() { return has_tma(compiled_for(tma_kernel<5, 16>)) && has_tensor_maps(); }

cudaError_t launch_depthwise_nhwc_tma_forward(const Launch& call, const NhwcTmaCut& cut) {
  return run(Map::forward, call, cut);
}

cudaError_t launch_depthwise_nhwc_tma_grad_input(const Launch& call, const NhwcTmaCut& cut) {
  return run(Map::grad_input, call, cut);
}

}  // namespace sepconv::cuda
