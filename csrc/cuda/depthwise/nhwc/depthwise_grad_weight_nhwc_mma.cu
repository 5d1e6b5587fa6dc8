// Depthwise grad_weight of half types, multiplier 1, channels dense in memory (channels_last), stride 1, filters of up
// to 7 x 7 taps, on tensor cores.
//
// For four channels, the sum over a row of pixels is a product of matrices. Columns of grad_y go in pairs (2n, 2n + 1),
// which meet the eight columns 2n + m, m = 0 .. 7, of x (from the first tap's on). With the pairs as what is summed
// over,
//     D[(m, c), (j, c')] += sum over n of  x[2n + m, c] * grad_y[2n + j, c']
// has the sums of tap m - j where c = c': a quarter of D, all others are left alone. In shared memory a unit of 16
// bytes is a pair of columns of four channels, so that ldmatrix reads eight pairs of (m, c) or (j, c') as they lie:
// rows of x from any unit on, as the left factor, and grad_y as the right one. A tap has two sums, of even and of odd
// columns of grad_y.
//
// Thread-to-data map. A block owns up to eight groups of four channels, with a warp for each, and a split of the rows
// of grad_y of all places, one after the other: a place has 32 columns of one image or the narrow rows of several
// images side by side. These rows, each with the row of x that its first tap meets, are one stream (Walk), with rows of
// zeros between two images so that rows of one do not meet those of the other. The block takes it in batches of kRows:
//   - all threads copy the next batch to shared memory, 8 bytes at a time, zeros where there is no pixel;
//   - a warp keeps the last kRows rows of its group's grad_y as right factors in registers, and multiplies each row of
//   x with
//     all of them. The ring turns once a batch, so that every factor stays in its register.
// At the end each tap's two sums are added; launch_sum_partials adds the splits.
//
// Borders are zeros that are multiplied like other numbers: an infinite one that meets them makes a NaN.
#include <algorithm>

#include "cuda/depthwise/nhwc/cut.h"
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kChannels = 4;          // of a group
constexpr int kUnit = 2 * kChannels;  // elements of two columns: 16 bytes
constexpr int kMostTaps = 8;          // of a kernel row, and of one more
constexpr int kMostThreads = 32 * kGradWeightMmaGroups;

// One of the two images.
struct NhwcGradWeightMmaImage {
  int64_t n, h, w;  // strides, in elements
  int rows, columns;
  int width;              // columns that a place reads of each image
  int place;              // and in all, with what makes them as many as a matrix has
  int plane;              // elements of a group's row in shared memory
  int pitch, turn, mask;  // see unit()
  FastDiv by_width;

  // Where in a row the unit of two columns of one of the images stands: eight neighbouring pairs find theirs on
  // different banks, also where some of them are the next image's.
  __device__ __forceinline__ int unit(int side, int pair) const { return side * pitch + ((pair + side * turn) & mask); }
};

struct NhwcGradWeightMmaArgs {
  NhwcGradWeightMmaImage x, y;
  int64_t w_n, w_h, w_w;
  int N, C, R, S, pad_h, pad_w;
  int between;           // rows of zeros after the last row of an image
  int all_groups;        // C / 4
  int groups;            // of a block, each with a warp
  int images, pairs;     // of a place
  int row;               // elements in shared memory of a row of both images
  uint32_t total, part;  // rows of grad_y of all places; of a split
  int splits;
  FastDiv by_slices, by_groups, by_pairs, by_rows, by_column_tiles;
};

// The rows of grad_y of a split, and the rows of zeros after each image and at the end.
struct Walk {
  uint32_t next, last;        // rows of all places that were not opened yet
  int row = 0;                // of grad_y, that comes next
  int count = 0, left = 0;    // of the segment: rows of grad_y, and all rows, with it
  int image = 0, column = 0;  // the place's first ones

  __device__ __forceinline__ void begin(const NhwcGradWeightMmaArgs& a, uint32_t split) {
    next = split * a.part, last = min(next + a.part, a.total);
  }
  __device__ __forceinline__ bool more() const { return left > 0 || next < last; }
  // To be called where none is left.
  __device__ __forceinline__ void open(const NhwcGradWeightMmaArgs& a) {
    uint32_t first = next;
    uint32_t tile = a.by_rows.split(first);
    image = static_cast<int>(a.by_column_tiles.split(tile)) * a.images;
    column = static_cast<int>(tile) * 2 * a.pairs;
    row = static_cast<int>(first);
    count = min(a.y.rows - row, static_cast<int>(last - next));
    next += count;
    left = count + (next < last ? a.between : a.R - 1);
  }
};

// What a thread copies of an image: up to kPieces pieces of a column's four channels, the same ones of every row.
template <typename T, int kPieces>
struct Source {
  uint32_t valid = 0;  // bit k: piece k lies in the image; else it is zeros
  const T* from[kPieces];
  int to[kPieces];  // in a row; below 0: no piece

  __device__ __forceinline__ void open(const NhwcGradWeightMmaArgs& a, const NhwcGradWeightMmaImage& image,
                                       const T* data, const Walk& walk, int row, int column) {
    uint32_t g = opaque(threadIdx.x), slice = opaque(blockIdx.x);  // or what follows would be kept in registers
    const uint32_t first = a.by_groups.split(g);
    a.by_slices.split(slice);
    const int group = static_cast<int>(slice * a.groups + g);
    valid = 0;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int at = static_cast<int>(first) + 32 * k;
      uint32_t c = at;
      const int side = static_cast<int>(image.by_width.split(c)), n = walk.image + side;
      const int w = column + static_cast<int>(c);
      const bool exists = side < a.images && n < a.N && group < a.all_groups &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(image.columns);
      valid |= static_cast<uint32_t>(exists) << k;
      from[k] = data + n * image.n + row * image.h + w * image.w + group * kChannels;
      const int place = image.unit(side, static_cast<int>(c) / 2) * kUnit + static_cast<int>(c) % 2 * kChannels;
      to[k] = at < image.place ? static_cast<int>(g) * image.plane + place : -1;
    }
  }
  __device__ __forceinline__ void copy(const NhwcGradWeightMmaImage& image, T* to_row, bool inside) {
    const uint32_t exist = inside ? valid : 0;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      if (to[k] >= 0) cp_async8(to_row + to[k], from[k], exist >> k & 1);
      from[k] += image.h;
    }
  }
};

// The sums of a group in shared memory: [output columns of a kind, channel, kRows, kMostTaps].
template <int kRows>
constexpr int kGroupSums = 2 * kChannels * kRows * kMostTaps;

template <typename T, int kRows>
__global__ void __launch_bounds__(kMostThreads, 2)
    grad_weight_nhwc_mma_kernel(const NhwcGradWeightMmaArgs a, const T* __restrict__ grad_y, const T* __restrict__ x,
                                float* __restrict__ partials, T* __restrict__ grad_w) {
  wait_for_earlier_kernels();
  DYN_SMEM(smem);
  T* batch = reinterpret_cast<T*>(smem);  // [kRows, rows of x of all groups, rows of grad_y]
  T* next_batch = batch + kRows * a.row;

  uint32_t slice = blockIdx.x;
  const uint32_t split = a.by_slices.split(slice);
  Walk walk;
  walk.begin(a, split);
  Source<T, 2> from_x;
  Source<T, 1> from_y;
  // Copies the next batch; false where there is none.
  const auto copy_batch = [&](T* to) {
    if (!walk.more()) return false;
#pragma unroll 1
    for (int r = 0; r < kRows; ++r, to += a.row) {
      if (walk.left <= 0 && walk.more()) {
        walk.open(a);
        from_x.open(a, a.x, x, walk, walk.row - a.pad_h, walk.column - a.pad_w);
        from_y.open(a, a.y, grad_y, walk, walk.row, walk.column);
      }
      const unsigned h = walk.row - a.pad_h;
      from_x.copy(a.x, to, walk.left > 0 && h < static_cast<unsigned>(a.x.rows));
      from_y.copy(a.y, to + a.groups * a.x.plane, walk.count > 0);
      ++walk.row, --walk.count, --walk.left;
    }
    cp_async_commit();
    return true;
  };
  bool more = copy_batch(batch);

  // Where the lane's rows of matrices lie in a row of both images. Lane 8 i + n has pair n, or n + 8 where i is 2 or 3
  // (x), or 1 (grad_y), and of x the columns m = 2 (i % 2) and the next.
  const int lane = static_cast<int>(threadIdx.x) % 32, group = static_cast<int>(threadIdx.x) / 32;
  uint32_t x_pair = min(lane % 8 + lane / 16 * 8, a.images * a.pairs - 1);
  const int side = static_cast<int>(a.by_pairs.split(x_pair));
  const int x_first = static_cast<int>(x_pair) + lane / 8 % 2;
  const int x_at[2] = {opaque(group * a.x.plane + a.x.unit(side, x_first) * kUnit),
                       opaque(group * a.x.plane + a.x.unit(side, x_first + 2) * kUnit)};
  const int y_at = opaque(a.groups * a.x.plane + group * a.y.plane + lane % 16 * kUnit);

  float sums[kRows][2][4] = {};  // of kernel row r: columns m = 4 half .. 4 half + 3
  uint32_t ring[kRows][2] = {};  // grad_y: after row r of a batch, slot (r - i) mod kRows has that of i rows before
#pragma unroll 1
  while (more) {
    cp_async_wait<0>();
    __syncthreads();  // the batch is there, and the other one has no readers left
    more = copy_batch(next_batch);
    const T* row = batch;
#pragma unroll
    for (int r = 0; r < kRows; ++r, row += a.row) {
      ldmatrix_x2_trans(ring[r], row + y_at);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t pixels[4];
        ldmatrix_x4_trans(pixels, row + x_at[half]);
#pragma unroll
        for (int i = 0; i < kRows; ++i) mma_m16n8k16<T>(sums[i][half], pixels, ring[(r - i + kRows) % kRows]);
      }
    }
    T* const done = batch;
    batch = next_batch, next_batch = done;
  }

  __syncthreads();  // the last batch has no readers left
  float* const own = reinterpret_cast<float*>(smem) + group * kGroupSums<kRows>;
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const int c = lane / 4 % kChannels, column = lane % 4 * 2 + v % 2, j = column / kChannels;
    if (column % kChannels != c) continue;
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {
      const int s = i % 2 * 4 + v / 2 * 2 + lane / 16 - j;
      if (s >= 0) own[((j * kChannels + c) * kRows + i / 2) * kMostTaps + s] = sums[i / 2][i % 2][v];
    }
  }
  __syncwarp();
  const int first_channel = (static_cast<int>(slice) * a.groups + group) * kChannels;
  if (first_channel >= a.C) return;
  for (int i = lane; i < kChannels * a.R * a.S; i += 32) {
    const int r = i / a.S % a.R, s = i % a.S, c = i / a.S / a.R, k = first_channel + c;
    const float* const even = own + (c * kRows + r) * kMostTaps + s;
    const float total = even[0] + even[kGroupSums<kRows> / 2];
    if (a.splits == 1) {
      grad_w[k * a.w_n + r * a.w_h + s * a.w_w] = from_acc<T>(total);
    } else {
      partials[((static_cast<int64_t>(split) * a.C + k) * a.R + r) * a.S + s] = total;
    }
  }
}

// `pitch`: units from one image to the next; with `turn` they are eight, and turned by so many from image to image.
NhwcGradWeightMmaImage make_image(const Strides& s, int64_t N, int64_t rows, int64_t columns, int width, int place,
                                  int pitch, int turn) {
  const int others = (place / width - 1) * pitch, units = std::max(others + (turn > 0 ? 8 : width / 2), place / 2);
  // A dimension of size 1 may have any stride, but copies need addresses on 8 bytes for what does not exist too.
  return {N > 1 ? s.n : 0,
          rows > 1 ? s.h : 0,
          columns > 1 ? s.w : 0,
          static_cast<int>(rows),
          static_cast<int>(columns),
          width,
          place,
          ((units + 1) | 1) * kUnit,  // an odd number of units puts the groups on different banks
          pitch,
          turn,
          turn > 0 ? 7 : -1,
          FastDiv(width)};
}

template <typename T, int kRows>
cudaError_t start(const Launch& call, const NhwcGradWeightMmaArgs& a, uint32_t blocks) {
  const size_t bytes = std::max(2 * kRows * a.row * sizeof(T), a.groups * kGroupSums<kRows> * sizeof(float));
  const LaunchConfig config{dim3(blocks), dim3(32 * a.groups), bytes, call.stream};
  return launch(grad_weight_nhwc_mma_kernel<T, kRows>, config, a, call.first_as<T>(), call.second_as<T>(),
                call.workspace_as<float>(), call.out_as<T>());
}

}  // namespace

cudaError_t launch_depthwise_grad_weight_nhwc_mma(const Launch& call, const GradWeightRowsCut& cut) {
  const ConvShape& s = call.shape;
  const MmaBlock block = grad_weight_mma_block(s);
  NhwcGradWeightMmaArgs a{};
  // An image's pairs go on where the last one's end, modulo eight units, if that takes no more memory than wide rows.
  constexpr int kMostUnits = 32;
  const int half = block.width() / 2, turned = block.images * 8, apart = (block.images - 1) * (block.pairs + 8) + half;
  int pitch = half, turn = 0;
  if (half <= 8 && turned <= kMostUnits) {
    pitch = 8, turn = block.pairs;
  } else if (apart <= kMostUnits) {
    pitch = block.pairs + 8;
  }
  a.x = make_image(s.x, s.N, s.H, s.W, block.width(), block.images * block.width(), pitch, turn);
  a.y = make_image(s.y, s.N, s.P, s.Q, 2 * block.pairs, kMmaColumns, block.pairs, 0);
  a.w_n = s.w.n, a.w_h = s.w.h, a.w_w = s.w.w;
  a.N = static_cast<int>(s.N), a.C = static_cast<int>(s.C), a.R = static_cast<int>(s.R), a.S = static_cast<int>(s.S);
  a.pad_h = static_cast<int>(s.pad_h), a.pad_w = static_cast<int>(s.pad_w);
  // As many as let every row of grad_y meet its last row of x, and leave none of it to the first of the next image.
  a.between = std::clamp(std::max(static_cast<int>(s.H + s.pad_h - s.P), a.R - 1 - a.pad_h), 0, a.R - 1);
  a.all_groups = a.C / kChannels, a.groups = block.groups, a.images = block.images, a.pairs = block.pairs;
  a.row = a.groups * (a.x.plane + a.y.plane);
  const int64_t places = block.image_groups * block.column_tiles;
  a.total = static_cast<uint32_t>(places * s.P), a.splits = cut.splits;
  a.part = static_cast<uint32_t>(std::max<int64_t>(cut.rows, ceil_div<int64_t>(a.total, cut.splits)));
  a.by_slices = FastDiv(block.slices), a.by_groups = FastDiv(a.groups), a.by_pairs = FastDiv(a.pairs);
  a.by_rows = FastDiv(s.P), a.by_column_tiles = FastDiv(block.column_tiles);
  const auto blocks = static_cast<uint32_t>(block.slices * cut.splits);
  const cudaError_t error = dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return s.R <= 5 ? start<T, 5>(call, a, blocks) : start<T, 7>(call, a, blocks);
  });
  return error != cudaSuccess || cut.splits == 1 ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda
