// Depthwise forward and grad_input of half types, multiplier 1, channels dense in memory (channels_last), stride 1,
// filters of up to 7 x 7 taps, on tensor cores.
//
// For eight channels, one row of the filter slid along one row of the image is a product with a matrix of diagonals.
// Columns of the output go in pairs (2n, 2n + 1), which meet the eight input columns 2n + m, m = 0 .. 7 (from the first
// tap's on):
//     y[2n + j, c] += sum over m and c' of  A[(j, c), (m, c')] * x[2n + m, c'],   A[(j, c), (m, c')] = w[m - j, c]
//     where c' = c
// A has 2 x 8 rows and is the left factor of mma.sp: of four neighbouring elements of its rows three are zeros, and the
// sparse instruction multiplies 32 columns, four places m, in the time that a dense one needs for 16. The right factor
// is eight pixels of eight channels, as they lie in shared memory: ldmatrix reads them from any pixel on. So the
// columns and rows of the filter, and the distance of two taps, are addresses only; two instructions give 16 columns of
// eight channels a filter row of up to seven taps: 448 products of use of the 4096 that each stands for.
//
// Thread-to-data map. A block owns up to four groups of eight channels, with a warp for each, and works off places: a
// place is a strip of `rows` output rows, and of each of them 32 columns of one image or the narrow rows of several
// images side by side. The rows of the input that its places need, one place after the other, are one stream to the
// block (Walk), that it takes in batches of kRows:
//   - all threads copy the next batch to shared memory, 16 bytes at a time, zeros where there is no pixel;
//   - a warp multiplies each row of the batch by all rows of its group's filter, which it keeps in registers with the
//   sums
//     of kRows output rows and 32 columns. A row completes the oldest sums, which leave the ring for shared memory. The
//     ring turns once a batch, so that every sum stays in its register; it knows nothing of places, as what rows of two
//     of them have in common is not stored;
//   - all threads store the rows of sums that are output rows, whole pieces of 16 bytes each.
//
// Zeros of A meet the other channels of a group: an infinite one makes a NaN of a neighbour. So sums that are not
// finite are computed again, one by one from global memory.
//
// grad_input is forward with the filter turned around.
#include "core/correlation.h"
#include "cuda/depthwise/nhwc/cut.h"
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kPiece = 8;                                      // channels of a group: 16 bytes
constexpr int kColumns = kMmaColumns, kTiles = kColumns / 16;  // of eight pairs of output columns
constexpr int kPieces = 2;                                     // that a thread copies of a row at most
constexpr int kMostThreads = 32 * kNhwcMmaGroups;
constexpr int kSumPitch = kNhwcMmaSumPitch, kSumHalf = kNhwcMmaSumHalf, kSumRow = 2 * kSumHalf;

struct NhwcMmaArgs {
  int64_t in_n, in_h, in_w, out_n, out_h, out_w;  // strides, in elements
  int64_t w_n, w_h, w_w;
  int N, in_rows, in_columns, out_rows, out_columns, pad_h, pad_w, R, S;
  bool turned;       // read the filter from its last tap to its first
  int all_groups;    // C / 8
  int groups;        // of a block, each with a warp
  int rows, images;  // of a place
  int pairs, width;  // pairs of columns that a place writes, and columns that it reads, of each image
  int swizzle;       // see at_column()
  int half, row;     // elements in shared memory of every second column of a row, and of a row
  uint32_t places, parts;
  FastDiv by_slices, by_groups, by_pairs, by_width, by_column_tiles, by_strips;
};

// Places in turn: (column tile fastest, strip, images).
struct Place {
  int first_image, first_row, first_column;  // of the output
  int rows;
  __device__ __forceinline__ Place(const NhwcMmaArgs& a, uint32_t place) {
    uint32_t strip = a.by_column_tiles.split(place);
    first_column = static_cast<int>(place) * 2 * a.pairs;
    first_image = static_cast<int>(a.by_strips.split(strip)) * a.images;
    first_row = static_cast<int>(strip) * a.rows;
    rows = min(a.rows, a.out_rows - first_row);
  }
};

// The rows of the input that a block reads, place after place. Zeros below one image are those above the next.
struct Walk {
  uint32_t next;          // place
  int row = 0, left = 0;  // the row of the input that comes next; how many of the place there are with it
  int below = 0;          // of them below the image

  __device__ __forceinline__ bool more(const NhwcMmaArgs& a) const { return left > 0 || next < a.places; }
  // To be called where none is left.
  __device__ __forceinline__ Place open(const NhwcMmaArgs& a) {
    const Place place(a, next);
    next += a.parts;
    row = place.first_row - a.pad_h, left = place.rows + a.R - 1;
    const int common = max(min(min(below, -row), a.R - 1), 0);
    row += common, left -= common;
    below = min(row + left - a.in_rows, left);
    return place;
  }
};

// Where the piece of a group and a column of an image lies in a row in shared memory: even columns before odd ones.
// Pieces of a column change places so that eight neighbouring pairs have theirs on different banks, also where some of
// them are the next image's: columns are counted without what no pair of the image begins with.
__device__ __forceinline__ int at_column(const NhwcMmaArgs& a, int image, int column, int group) {
  const int i = (image * a.width + column) / 2, pieces = 1 << a.swizzle, number = image * a.pairs + column / 2;
  return column % 2 * a.half + (i * pieces + (group ^ (number >> (3 - a.swizzle) & (pieces - 1)))) * kPiece;
}

// What a thread copies: the same pieces of every row.
template <typename T, int kRows>
struct Copies {
  Walk walk;
  uint32_t valid = 0;  // bit k: piece k lies in the image; else it is zeros
  const T* from[kPieces];
  int to[kPieces];  // in a row; below 0: no piece

  __device__ __forceinline__ void open(const NhwcMmaArgs& a, const T* in) {
    const Place place = walk.open(a);
    uint32_t g = opaque(threadIdx.x), slice = opaque(blockIdx.x);  // or what follows would be kept in registers
    const uint32_t first = a.by_groups.split(g);
    a.by_slices.split(slice);
    const int group = static_cast<int>(slice * a.groups + g);
    valid = 0;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int column = static_cast<int>(first) + kColumns * k;
      uint32_t c = column;
      const int image = static_cast<int>(a.by_width.split(c));
      const int n = place.first_image + image, w = place.first_column - a.pad_w + static_cast<int>(c);
      const bool exists =
          n < a.N && group < a.all_groups && static_cast<unsigned>(w) < static_cast<unsigned>(a.in_columns);
      valid |= static_cast<uint32_t>(exists) << k;
      from[k] = in + n * a.in_n + walk.row * a.in_h + w * a.in_w + group * kPiece;
      const bool used = image < a.images && static_cast<int>(c) < 2 * a.pairs + 6;
      to[k] = used ? at_column(a, image, static_cast<int>(c), static_cast<int>(g)) : -1;
    }
  }
  __device__ __forceinline__ void batch(const NhwcMmaArgs& a, const T* in, T* stage) {
    if (!walk.more(a)) return;
#pragma unroll 1
    for (int r = 0; r < kRows; ++r, stage += a.row) {
      if (walk.left <= 0 && walk.more(a)) open(a, in);
      const bool inside = walk.left > 0 && static_cast<unsigned>(walk.row) < static_cast<unsigned>(a.in_rows);
      const uint32_t exist = inside ? valid : 0;
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        if (to[k] >= 0) cp_async16(stage + to[k], from[k], exist >> k & 1);
        from[k] += a.in_h;
      }
      ++walk.row, --walk.left;
    }
    cp_async_commit();
  }
};

// The left factors of one group of channels: of filter row r and places 4 half .. 4 half + 3 of the window. Of a row's
// four neighbouring elements, the instruction takes two: kept are the first two or the last two, as the row's channel
// is.
template <typename T, int kRows>
struct Filter {
  uint32_t words[kRows][2][4];
  uint32_t kept;

  __device__ __forceinline__ void load(const NhwcMmaArgs& a, const T* w, int channel, int lane) {
    const int c = lane / 4, t = lane % 4;
    const bool own = t % 2 == c / 4;  // this lane's fours of channels are those of c
    kept = c % 4 < 2 ? 0x44444444u : 0xeeeeeeeeu;
    const T* const first = w + (channel + c) * a.w_n;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int r = row - (kRows - a.R);  // zeros before the first: sums are complete with the last
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int j = i % 2, s = i / 2 * 2 + t / 2 - j;  // output 2n + j, and its tap at place i / 2 * 2 + t / 2
        const bool exists = own && r >= 0 && s >= 0 && s < a.S;
        const int64_t at = (a.turned ? a.R - 1 - r : r) * a.w_h + (a.turned ? a.S - 1 - s : s) * a.w_w;
        words[row][i / 4][i % 4] = load16_if(first + at, exists) << 16 * (c % 2);
      }
    }
  }
};

// One output, for where the sum from the tensor cores is not finite.
template <typename T>
__device__ __forceinline__ float single_sum(const NhwcMmaArgs& a, const T* in, const T* w, int row, int column) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < a.R * a.S; ++i) {
    const int r = i / a.S, s = i - r * a.S, h = row - a.pad_h + r, v = column - a.pad_w + s;
    if (static_cast<unsigned>(h) >= static_cast<unsigned>(a.in_rows) ||
        static_cast<unsigned>(v) >= static_cast<unsigned>(a.in_columns)) {
      continue;
    }
    const int64_t tap = (a.turned ? a.R - 1 - r : r) * a.w_h + (a.turned ? a.S - 1 - s : s) * a.w_w;
    sum += to_acc(in[h * a.in_h + v * a.in_w]) * to_acc(w[tap]);
  }
  return sum;
}

// What a thread stores: the same piece of every row.
template <typename T, int kRows>
struct Stores {
  Walk walk;
  int first_row;  // of the place
  int image, column;
  T* to;  // where walk.row's sums go; null: nowhere

  __device__ __forceinline__ void open(const NhwcMmaArgs& a, T* out) {
    const Place place = walk.open(a);
    uint32_t g = opaque(threadIdx.x), slice = opaque(blockIdx.x);
    uint32_t pair = a.by_groups.split(g);
    a.by_slices.split(slice);
    const int odd = static_cast<int>(pair % 2), group = static_cast<int>(slice * a.groups + g);
    pair /= 2;
    const int side = static_cast<int>(a.by_pairs.split(pair));
    first_row = place.first_row, image = place.first_image + side;
    column = place.first_column + 2 * static_cast<int>(pair) + odd;
    const bool exists = side < a.images && image < a.N && column < a.out_columns && group < a.all_groups;
    to = exists ? out + image * a.out_n + (walk.row + a.pad_h - (a.R - 1)) * a.out_h + column * a.out_w + group * kPiece
                : nullptr;
  }
  // `sums`: the thread's own of the first row.
  __device__ __forceinline__ void batch(const NhwcMmaArgs& a, const float* sums, const T* in, const T* w, const T* bias,
                                        Activation activation, T* out) {
#pragma unroll 1
    for (int r = 0; r < kRows && walk.more(a); ++r, sums += kSumRow) {
      if (walk.left == 0) open(a, out);
      const int row = walk.row + a.pad_h - (a.R - 1);
      ++walk.row, --walk.left;
      if (to == nullptr) continue;
      if (row >= first_row) {
        float v[kPiece], largest = 0;
#pragma unroll
        for (int i = 0; i < kPiece; i += 4) {
          const auto four = *reinterpret_cast<const Vec<float, 4>*>(sums + i);
#pragma unroll
          for (int k = 0; k < 4; ++k) v[i + k] = four.v[k], largest += fabsf(four.v[k]);
        }
        if (!(largest <= 3e38f)) {
          uint32_t g = opaque(threadIdx.x), slice = opaque(blockIdx.x);
          a.by_groups.split(g);
          a.by_slices.split(slice);
#pragma unroll 1
          for (int i = 0; i < kPiece; ++i) {
            const int c = static_cast<int>(slice * a.groups + g) * kPiece + i;
            float sum = single_sum(a, in + image * a.in_n + c, w + c * a.w_n, row, column);
            if (bias != nullptr) sum += to_acc(bias[c]);
#pragma unroll
            for (int k = 0; k + 1 < kPiece; ++k) v[k] = v[k + 1];
            v[kPiece - 1] = sum;
          }
        }
        activate_all<T>(activation, v);
        store_vec<kPiece>(to, v);
      }
      to += a.out_h;
    }
  }
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kMostThreads, 3)
    nhwc_mma_kernel(const NhwcMmaArgs a, const T* __restrict__ in, const T* __restrict__ w, const T* __restrict__ bias,
                    const Activation activation, T* __restrict__ out) {
  wait_for_earlier_kernels();
  DYN_SMEM(smem);
  float* const sums = reinterpret_cast<float*>(smem);  // [kRows, kSumRow]
  T* batch = reinterpret_cast<T*>(sums + kRows * kSumRow);
  T* next_batch = batch + kRows * a.row;

  uint32_t slice = blockIdx.x;
  const uint32_t part = a.by_slices.split(slice);
  Copies<T, kRows> copies;
  Stores<T, kRows> stores;
  copies.walk.next = stores.walk.next = part;
  copies.batch(a, in, batch);

  const int lane = static_cast<int>(threadIdx.x) % 32, group = static_cast<int>(threadIdx.x) / 32;
  const int channel = min(static_cast<int>(slice) * a.groups + group, a.all_groups - 1) * kPiece;
  Filter<T, kRows> filter;
  filter.load(a, w, channel, lane);
  const float add = bias != nullptr ? to_acc(bias[channel + lane / 4]) : 0.f;

  // Where in a row the lane's row of a matrix lies: lane 8 m + n has pixel m of the window of pair n of a tile, or m
  // + 4.
  int window[kTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    uint32_t pair = min(i / 2 * 8 + lane % 8, a.images * a.pairs - 1);
    const int image = static_cast<int>(a.by_pairs.split(pair));
    window[i / 2][i % 2] = opaque(at_column(a, image, 2 * static_cast<int>(pair) + lane / 8 + 4 * (i % 2), group));
  }
  // And where in a row of sums its own go: of channel lane / 4, pairs 2 (lane % 4) and the next, even columns and odd
  // ones.
  float* const own_sums = sums + (lane % 4 * 2 * kSumPitch + group * kPiece + lane / 4);
  // The sums that the thread stores: neighbouring threads have neighbouring channels, then columns.
  uint32_t out_group = threadIdx.x;
  const uint32_t out_column = a.by_groups.split(out_group);
  const float* const out_sums = sums + (out_column % 2 * kSumHalf + out_column / 2 * kSumPitch + out_group * kPiece);

  float ring[kRows][kTiles][4] = {};
#pragma unroll 1
  while (stores.walk.more(a)) {
    cp_async_wait<0>();
    __syncthreads();  // the batch is there, the other one has no readers left, and nor have the sums
    copies.batch(a, in, next_batch);
    const T* row = batch;
#pragma unroll
    for (int r = 0; r < kRows; ++r, row += a.row) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t pixels[4];
          ldmatrix_x4(pixels, row + window[tile][half]);
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
            mma_sp_m16n8k32<T>(ring[(r + j) % kRows][tile], filter.words[kRows - 1 - j][half], pixels, filter.kept);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kTiles * 4; ++i) {
        own_sums[r * kSumRow + i / 2 % 2 * kSumHalf + (i / 4 * 8 + i % 2) * kSumPitch] = ring[r][i / 4][i % 4] + add;
        ring[r][i / 4][i % 4] = 0;
      }
    }
    __syncthreads();  // the sums are there
    stores.batch(a, out_sums, in, w, bias, activation, out);
    T* const done = batch;
    batch = next_batch, next_batch = done;
  }
}

template <typename T, int kRows>
cudaError_t start(const Launch& call, const NhwcMmaArgs& a, int64_t bytes) {
  const LaunchConfig config{dim3(a.by_slices.divisor * a.parts), dim3(32 * a.groups), static_cast<size_t>(bytes),
                            call.stream};
  return launch(nhwc_mma_kernel<T, kRows>, config, a, call.first_as<T>(), call.second_as<T>(), call.bias_as<T>(),
                call.epilogue.activation, call.out_as<T>());
}

cudaError_t run(Map map, const Launch& call, const NhwcMmaCut& cut) {
  const ConvShape& s = call.shape;
  const Correlation c = correlation(map, s);
  const NhwcMmaBlock block = nhwc_mma_block(map, s);
  NhwcMmaArgs a{};
  a.in_n = c.image.n, a.in_h = c.image.h, a.in_w = c.image.w;
  a.out_n = c.result.n, a.out_h = c.result.h, a.out_w = c.result.w;
  a.in_rows = static_cast<int>(c.image_h), a.in_columns = static_cast<int>(c.image_w);
  a.out_rows = static_cast<int>(c.result_h), a.out_columns = static_cast<int>(c.result_w);
  a.pad_h = static_cast<int>(c.pad_h), a.pad_w = static_cast<int>(c.pad_w);
  a.N = static_cast<int>(s.N), a.R = static_cast<int>(s.R), a.S = static_cast<int>(s.S);
  a.w_n = s.w.n, a.w_h = s.w.h, a.w_w = s.w.w, a.turned = c.turned;
  // A dimension of size 1 may have any stride, but copies need addresses on 16 bytes for pixels that do not exist too.
  if (a.in_columns == 1) a.in_w = 0;
  if (a.in_rows == 1) a.in_h = 0;
  a.all_groups = static_cast<int>(s.C / kPiece), a.groups = block.groups;
  a.rows = cut.rows, a.images = block.images, a.pairs = block.pairs, a.width = block.width();
  a.swizzle = block.swizzle, a.row = static_cast<int>(block.row_bytes() / 2), a.half = a.row / 2;
  const int64_t strips = ceil_div<int64_t>(a.out_rows, a.rows);
  a.places = static_cast<uint32_t>(block.image_groups * strips * block.column_tiles);
  a.parts = static_cast<uint32_t>(cut.splits);
  a.by_slices = FastDiv(block.slices), a.by_groups = FastDiv(a.groups), a.by_pairs = FastDiv(a.pairs);
  a.by_width = FastDiv(a.width), a.by_column_tiles = FastDiv(block.column_tiles), a.by_strips = FastDiv(strips);
  return dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return block.rows == 5 ? start<T, 5>(call, a, block.bytes()) : start<T, 7>(call, a, block.bytes());
  });
}

}  // namespace

cudaError_t launch_depthwise_nhwc_mma_forward(const Launch& call, const NhwcMmaCut& cut) {
  return run(Map::forward, call, cut);
}

cudaError_t launch_depthwise_nhwc_mma_grad_input(const Launch& call, const NhwcMmaCut& cut) {
  return run(Map::grad_input, call, cut);
}

}  // namespace sepconv::cuda
