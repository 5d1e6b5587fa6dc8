// Groups of 4, 8 or 16 channels under 3x3 kernels in channels_last, on tensor cores: what forward and the gradient
// by the input share, grouped_nhwc_mma.cu and grouped_nhwc_mma_stride2.cu.
//
// Threads to data: a block of 256 threads has a slab of 64 channels, whose weights stay in registers, and walks over
// items blockIdx.x / slabs, + gridDim.x / slabs, ... An item is a strip of an image, `tiles` times 16 positions wide;
// a position is what the product P computes at once: an output, or the 2 x 2 outputs that share an input. The block
// walks down a strip, in steps of `pairs` rows of positions:
//   - all threads copy the rows of the input that a stage ahead needs, 16 bytes at a time, zeros where there is no
//     pixel. A stage has those that no step before has read, so the last rows of a step are the next stage's. The ring
//     of stages goes on over the end of an item.
//   - a warp multiplies 16 positions of P::kOut rows for 8 outputs, or for 16 of wider groups, and leaves the results
//     in shared memory. A fragment of the input serves all outputs that it meets.
//   - all threads store the step's results, 16 bytes each, 128 a pixel.
#pragma once

#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/grouped/cut.h"

namespace sepconv::cuda::grouped {

inline constexpr int kThreads = 256, kStages = kGroupedMmaStages;
inline constexpr int kRow = 128, kPieces = 8, kVec = 8;  // bytes of a pixel of a slab, in pieces of eight channels

// How a pass of all threads, 32 pixels, goes through rows of `width` pixels.
struct Pass {
  int width = 1, rows = 0, columns = 0;
  Pass() = default;
  explicit Pass(int64_t w)
      : width(static_cast<int>(w)),
        rows(kThreads / kPieces / static_cast<int>(w)),
        columns(kThreads / kPieces % static_cast<int>(w)) {}
};
// Of a thread, which moves one piece of every 32nd pixel.
struct Pixel {
  int row, column;
  __device__ __forceinline__ explicit Pixel(const Pass& pass)
      : row(static_cast<int>(threadIdx.x) / kPieces / pass.width),
        column(static_cast<int>(threadIdx.x) / kPieces % pass.width) {}
  __device__ __forceinline__ void advance(const Pass& pass) {
    row += pass.rows, column += pass.columns;
    if (column >= pass.width) column -= pass.width, ++row;
  }
};

struct ProductArgs {
  int64_t in_n, out_n;                           // strides, in elements
  int in_h, in_w, out_h, out_w;                  // inside an image
  int64_t w_group, w_output, w_input, w_h, w_w;  // of the weight: outputs are channels of what is written
  int64_t w_first;                               // where its tap (0, 0) lies
  int in_rows, in_columns, out_rows, out_columns;
  int pad_h, pad_w;      // the first position reads rows and columns from -pad on
  int shift_h, shift_w;  // and writes rows and columns from -shift on
  int channels, group, slabs;
  int down, across;   // rows and columns of positions
  int pairs, tiles;   // of a step
  int strips, steps;  // of an image; of a strip
  int column_tiles, items;
  Pass reads, results;  // rows of a step
  int pitch;            // pixels of a row that is read, in shared memory
  Activation activation;
};

inline ProductArgs product_args(const Launch& call, const GroupedMmaCut& cut, bool grad_input) {
  const ConvShape& s = call.shape;
  const GroupedMmaTile tile = grouped_mma_tile(grad_input ? Map::grad_input : Map::forward, s, cut);
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  const Strides &in = grad_input ? s.y : s.x, &out = grad_input ? s.x : s.y;
  const int64_t group = s.channels_per_group();
  ProductArgs a{};
  a.in_n = in.n, a.in_h = i(in.h), a.in_w = i(in.w), a.out_n = out.n, a.out_h = i(out.h), a.out_w = i(out.w);
  a.w_group = group * s.w.n, a.w_h = s.w.h, a.w_w = s.w.w;
  a.w_output = grad_input ? s.w.c : s.w.n, a.w_input = grad_input ? s.w.n : s.w.c;
  a.in_rows = i(grad_input ? s.P : s.H), a.in_columns = i(grad_input ? s.Q : s.W);
  a.out_rows = i(grad_input ? s.H : s.P), a.out_columns = i(grad_input ? s.W : s.Q);
  a.channels = i(s.C), a.group = i(group), a.slabs = i(ceil_div<int64_t>(s.C, 64));
  a.pad_h = i(tile.pad_h), a.pad_w = i(tile.pad_w), a.shift_h = i(tile.shift_h), a.shift_w = i(tile.shift_w);
  a.down = i(tile.down), a.across = i(tile.across);
  a.pairs = cut.pairs, a.tiles = cut.tiles, a.strips = cut.strips;
  a.steps = i(ceil_div<int64_t>(ceil_div<int64_t>(tile.down, cut.pairs), cut.strips));
  a.column_tiles = i(ceil_div<int64_t>(tile.across, cut.tiles * 16));
  a.items = i(s.N * a.strips * a.column_tiles);
  a.reads = Pass(tile.width), a.results = Pass(tile.result_width), a.pitch = i(tile.pitch);
  a.activation = call.epilogue.activation;
  return a;
}

// An item, by its first position.
struct Item {
  int image, row, column, steps;
  template <typename Args>
  __device__ __forceinline__ Item(const Args& a, int item) {
    const int of_image = item % (a.strips * a.column_tiles), strip = of_image / a.column_tiles;
    image = item / (a.strips * a.column_tiles);
    row = strip * a.steps * a.pairs, column = of_image % a.column_tiles * a.tiles * 16;
    steps = max(min(a.steps, ceil_div(a.down - row, a.pairs)), 0);
  }
};

// The first tile that a warp takes of a row of positions: the `shares` warps of a part take turns in all of a step.
__device__ __forceinline__ int first_tile(int pair, int tiles, int share, int shares) {
  return (share + pair * tiles) % shares;
}

// Two neighbouring inputs' weights of one tap and output, as a word of a fragment; zeros beyond the last channel, and
// where the output is of another group.
template <typename T>
__device__ __forceinline__ uint32_t weight_pair(const ProductArgs& a, const T* w, int output, int input, int kh, int kw,
                                                bool meets) {
  const bool exists = meets && output < a.channels;
  const T* const at = w + a.w_first + output / a.group * a.w_group + output % a.group * a.w_output + input * a.w_input +
                      kh * a.w_h + kw * a.w_w;
  return load16_if(at, exists) | load16_if(at + a.w_input, exists) << 16;
}

// The weights of a warp. Groups of up to 8 channels: eight outputs, of the eight inputs in their places. Wider ones: 16
// outputs, of kDeep times 16 inputs.
template <typename T, int kDeep>
struct Weights {
  static constexpr int kOutputs = 2;  // times eight
  static constexpr int kParts = 64 / 16;
  uint32_t words[kDeep][3][3][kOutputs][2];

  __device__ __forceinline__ void load(const ProductArgs& a, const T* w, int first, int part, int lane) {
#pragma unroll
    for (int i = 0; i < kDeep * 9 * kOutputs * 2; ++i) {
      const int half = i % 2, n = i / 2 % kOutputs, tap = i / 4 % 9, k = i / 36;
      const int output = first + part * 16 + n * 8 + lane / 4, input = k * 16 + half * 8 + lane % 4 * 2;
      words[k][tap / 3][tap % 3][n][half] = weight_pair(a, w, output, input, tap / 3, tap % 3, true);
    }
  }
  // The first piece of the inputs.
  static __device__ __forceinline__ int piece(int part) { return part * 16 / (kDeep * 16) * kDeep * 2; }
};
template <typename T>
struct Weights<T, 0> {
  static constexpr int kOutputs = 1;
  static constexpr int kParts = 64 / 8;
  uint32_t words[3][3];

  __device__ __forceinline__ void load(const ProductArgs& a, const T* w, int first, int part, int lane) {
    const int output = first + part * 8 + lane / 4, input = lane % 4 * 2;
    const bool meets = a.group == 8 || input / 4 == lane / 4 / 4;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      words[tap / 3][tap % 3] = weight_pair(a, w, output, input % a.group, tap / 3, tap % 3, meets);
    }
  }
  static __device__ __forceinline__ int piece(int part) { return part; }
};

// Pieces change places by the number of their pixel: eight pixels of an ldmatrix, kStep apart, fall on different banks.
template <int kStep>
__device__ __forceinline__ int swizzled(int column, int piece) {
  return column * kRow + ((piece ^ (column / kStep & 7)) << 4);
}

// What P has: kIn rows of the input and kOut of the output for a row of positions, kTail rows that it reads beyond, the
// distance kStep of neighbouring positions' inputs, kWide outputs side by side; multiply(), and single() for where a
// sum is not finite.
template <typename T, int kDeep, typename P>
__device__ __forceinline__ void product(const ProductArgs& a, const T* __restrict__ in, const T* __restrict__ w,
                                        const T* __restrict__ bias, T* __restrict__ out) {
  using W = Weights<T, kDeep>;
  constexpr int kN = W::kOutputs, kShares = 8 / W::kParts, kRows = P::kIn + P::kTail;
  DYN_SMEM(smem);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_channel = static_cast<int>(blockIdx.x) % a.slabs * 64;
  const int begin = static_cast<int>(blockIdx.x) / a.slabs, stride = static_cast<int>(gridDim.x) / a.slabs;
  const int stage_rows = a.pairs * P::kIn, ring_rows = kStages * stage_rows, row_bytes = a.pitch * kRow;
  unsigned char* const results = smem + ring_rows * row_bytes;

  const int piece = thread % kPieces, channel = first_channel + piece * kVec;
  const bool has_channel = channel < a.channels;
  const Pixel first_read(a.reads), first_result(a.results);
  int next = begin, next_stage = 0, slot = 0;
  Item ahead(a, begin);
  const auto load = [&] {
    if (next < a.items) {
      if (next_stage == 0) ahead = Item(a, next);
      const int rows = next_stage < ahead.steps ? stage_rows : P::kTail;
      const int top = (ahead.row + next_stage * a.pairs) * P::kIn - a.pad_h, left = ahead.column * P::kStep - a.pad_w;
      const T* const image = in + ahead.image * a.in_n + channel;
      unsigned char* const stage = smem + slot * stage_rows * row_bytes;
      for (Pixel pixel = first_read; pixel.row < rows; pixel.advance(a.reads)) {
        const int h = top + pixel.row, v = left + pixel.column;
        const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(a.in_rows) &&
                            static_cast<unsigned>(v) < static_cast<unsigned>(a.in_columns) && has_channel;
        cp_async16(stage + pixel.row * row_bytes + swizzled<P::kStep>(pixel.column, piece),
                   inside ? image + (h * a.in_h + v * a.in_w) : in, inside);
      }
      if (++next_stage > ahead.steps) next_stage = 0, next += stride;
    }
    slot = slot + 1 == kStages ? 0 : slot + 1;
    cp_async_commit();  // also where nothing is left, so that the wait below counts stages
  };
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) load();

  const int part = warp % W::kParts;
  const P positions(lane, W::piece(part));
  W weights;
  weights.load(a, w, first_channel, part, lane);
  float biases[kN][2] = {};
  const int output = first_channel + part * kN * 8 + lane % 4 * 2;
  if (bias != nullptr && output < a.channels) {
#pragma unroll
    for (int i = 0; i < kN * 2; ++i) biases[i / 2][i % 2] = to_acc(bias[output + i / 2 * 8 + i % 2]);
  }

  // Where the thread's first result of a row lies; that of the next eight outputs is the neighbouring piece.
  const int at_result = swizzled<P::kWide>(lane / 4 * P::kWide, part * kN) + lane % 4 * 4;
  const int at_next = kN == 1 ? 0 : (at_result & 16) != 0 ? -16 : 16;
  int stage = 0;
#pragma unroll 1
  for (int i = begin; i < a.items; i += stride) {
    const Item item(a, i);
#pragma unroll 1
    for (int step = 0; step < item.steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the step's rows are there for all, and the results of the last one are stored
#pragma unroll 1
      for (int pair = 0; pair < a.pairs; ++pair) {
        const unsigned char* rows[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int row = stage * stage_rows + pair * P::kIn + r;
          rows[r] = smem + (row < ring_rows ? row : row - ring_rows) * row_bytes;
        }
#pragma unroll 1
        for (int tile = first_tile(pair, a.tiles, warp / W::kParts, kShares); tile < a.tiles; tile += kShares) {
          float sums[P::kOut][P::kWide][kN][4] = {};
          positions.multiply(sums, weights, rows, tile * (16 * P::kStep * kRow));

          // A thread has outputs 2t and 2t + 1 of each eight, of positions g and g + 8.
          constexpr int kSums = P::kOut * P::kWide * kN * 4;
          auto& flat = reinterpret_cast<float (&)[kSums]>(sums);
          if constexpr (kDeep == 0) {
            float all = 0;
            if (a.group == 4) {
#pragma unroll
              for (int e = 0; e < kSums; ++e) all += fabsf(flat[e]);
            }
            if (!(all <= 3e38f)) {  // perhaps by the zeros that another group's inputs meet
#pragma unroll 1
              for (int e = 0; e < kSums; ++e) {
                const int row = (item.row + step * a.pairs + pair) * P::kOut - a.shift_h + e / (P::kWide * 4);
                const int position = item.column + tile * 16 + e / 2 % 2 * 8 + lane / 4;
                const int column = position * P::kWide - a.shift_w + e / 4 % P::kWide, k = output + e % 2;
                const float sum = k < a.channels ? P::single(a, in + item.image * a.in_n, w, row, column, k) : 0;
#pragma unroll
                for (int j = 0; j + 1 < kSums; ++j) flat[j] = flat[j + 1];
                flat[kSums - 1] = sum;
              }
            }
          }
#pragma unroll
          for (int e = 0; e < kSums; ++e) flat[e] += biases[e / 4 % kN][e % 2];
          activate_all<T>(a.activation, flat);
          unsigned char* const to =
              results + at_result + (pair * P::kOut * a.results.width + tile * 16 * P::kWide) * kRow;
#pragma unroll
          for (int e = 0; e < kSums; e += 2) {
            const int row = e / (P::kWide * kN * 4), n = e / 4 % kN;
            const int column = e / 2 % 2 * 8 * P::kWide + e / (kN * 4) % P::kWide;
            store_vec<2>(reinterpret_cast<T*>(to + (row * a.results.width + column) * kRow + n * at_next),
                         {flat[e], flat[e + 1]});
          }
        }
      }
      __syncthreads();  // the results are there for all, and the first stage has no readers left
      load();
      if (step + 1 == item.steps) load();  // nor has the rest of the strip

      const int top = (item.row + step * a.pairs) * P::kOut - a.shift_h, left = item.column * P::kWide - a.shift_w;
      T* const image = out + item.image * a.out_n + channel;
      for (Pixel pixel = first_result; pixel.row < a.pairs * P::kOut; pixel.advance(a.results)) {
        const int h = top + pixel.row, v = left + pixel.column;
        if (static_cast<unsigned>(h) < static_cast<unsigned>(a.out_rows) &&
            static_cast<unsigned>(v) < static_cast<unsigned>(a.out_columns) && has_channel) {
          *reinterpret_cast<Vec<T, kVec>*>(image + (h * a.out_h + v * a.out_w)) =
              *reinterpret_cast<const Vec<T, kVec>*>(results + pixel.row * a.results.width * kRow +
                                                     swizzled<P::kWide>(pixel.column, piece));
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

// Calls f(Int<kDeep>{}).
template <typename F>
cudaError_t dispatch_group(int64_t group, F&& f) {
  switch (group) {
    case 4:
    case 8: return f(Int<0>{});
    case 16: return f(Int<1>{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sepconv::cuda::grouped
