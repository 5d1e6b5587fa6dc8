// What depthwise_nchw_mma.cu and depthwise_nchw_mma_grad_weight.cu share: places, and the way of their images into
// shared memory.
//
// A place is a strip of `rows` output rows, or whole planes in several images. Its groups are kPhases output rows each;
// a warp takes 16 groups and 16 columns at a time. The 16 rows of a matrix lie kPhases rows apart, so that what kernel
// row r of phase f reads is what row r + 1 of phase f - 1 does, and is loaded once. For ldmatrix to find such rows on
// different banks, row h of an image stands in section h % kPhases at slot h / kPhases of its tile. Rows begin at the
// same column of the tile, and are copied there in pieces of 8 or 4 bytes; the zeros beside them are those that the
// tile begins with.
#pragma once

#include <algorithm>

#include "core/correlation.h"
#include "cuda/depthwise/nchw/cut.h"
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {

struct MmaPlaces {
  int N, rows, images, count;  // rows and images of a place
  int groups, blocks, tiles;   // of a place: groups of rows, blocks of 16 columns, tiles of a warp
  FastDiv by_strips, by_groups, by_blocks;
};
struct MmaPlace {
  int first_image, images, first_row;
  __device__ __forceinline__ MmaPlace(const MmaPlaces& a, int place) {
    uint32_t strip = static_cast<uint32_t>(place);
    first_image = static_cast<int>(a.by_strips.split(strip)) * a.images;
    images = min(a.images, a.N - first_image);
    first_row = static_cast<int>(strip) * a.rows;
  }
};

// The 16 groups and 16 columns of a warp. `own` is the group of the lane's row of a matrix, or the last one.
struct MmaWarpTile {
  int set, column, own;
  __device__ __forceinline__ MmaWarpTile(const MmaPlaces& a, int item, int row) {
    const int sets = static_cast<int>(a.by_blocks.div(item));
    set = sets * 16, column = (item - sets * a.blocks) * 16, own = min(set + row, a.groups - 1);
  }
};

// An image that is read, and its tile.
struct MmaImage {
  int64_t n, c;                 // strides, in elements
  int h, H, up;                 // stride of rows, their number, and how many above the first output row a place's begin
  int left, piece, row_pieces;  // elements before a row in the tile; of a copy; copies of a row
  int images, image_rows;       // of a tile; a multiple of kPhases
  int lanes_log2, warps;        // that copy a row (8 to 32 lanes), and an image
  int pitch, section;           // elements from row to row of a section, and from section to section
  int image_pitch, between;     // from image to image, and from the last group of one to the first of the next
  __host__ __device__ int elements() const { return kNchwMmaPhases * section; }
};

// Begins to copy the rows of a place: `warps` of the warps an image, 8 to 32 lanes a row, so that a thread's rows lie a
// multiple of kPhases apart. Rows and images that do not exist are zeros.
template <int kPiece, typename T>
__device__ __forceinline__ void begin_copies(const MmaImage& a, T* tile, const T* __restrict__ x,
                                             const MmaPlace& place) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = (warp & (a.warps - 1)) << (5 - a.lanes_log2) | lane >> a.lanes_log2;  // the first
  const int step = a.warps << (5 - a.lanes_log2), lanes = 1 << a.lanes_log2;
  const int top = place.first_row - a.up + row, first = warp / a.warps, next = kNchwMmaThreads / 32 / a.warps;
  const T* const begin = x + (place.first_image + first) * a.n + static_cast<int64_t>(top) * a.h;
  T* const tile_begin =
      tile + row % kNchwMmaPhases * a.section + first * a.image_pitch + row / kNchwMmaPhases * a.pitch + a.left;
  const int64_t from_step = int64_t{step} * a.h, from_image = next * a.n;
  const int to_step = step / kNchwMmaPhases * a.pitch, to_image = next * a.image_pitch;
  for (int piece = lane & (lanes - 1); piece < a.row_pieces; piece += lanes) {
    const T* image_from = begin + piece * kPiece;
    T* image_to = tile_begin + piece * kPiece;
    for (int image = first; image < a.images; image += next) {
      const uint32_t exists = image < place.images ? a.H : 0;
      const T* from = image_from;
      T* to = image_to;
      uint32_t h = top;
#pragma unroll 4
      for (int i = row; i < a.image_rows; i += step) {
        if constexpr (kPiece == 4) {
          cp_async8(to, from, h < exists);
        } else {
          cp_async4(to, from, h < exists);
        }
        h += step, from += from_step, to += to_step;
      }
      image_from += from_image, image_to += to_image;
    }
  }
}
template <typename T>
__device__ __forceinline__ void begin_copies(const MmaImage& a, T* tile, const T* __restrict__ x,
                                             const MmaPlace& place) {
  if (a.piece == 4) {
    begin_copies<4>(a, tile, x, place);
  } else {
    begin_copies<2>(a, tile, x, place);
  }
}

// Zeros everywhere, which all threads see.
template <typename T>
__device__ __forceinline__ void clear_tiles(T* tiles, int elements) {
  for (int at = static_cast<int>(threadIdx.x) * 8; at < elements; at += kNchwMmaThreads * 8) {
    *reinterpret_cast<uint4*>(tiles + at) = uint4{};
  }
  __syncthreads();
}

// ---- on the host

inline MmaPlaces make_mma_places(const ConvShape& s, const NchwMmaCut& cut, const NchwMmaBlock& block,
                                 int64_t out_rows) {
  MmaPlaces a{};
  const int64_t strips = ceil_div(out_rows, cut.rows);
  a.N = static_cast<int>(s.N), a.rows = cut.rows, a.images = cut.images;
  a.count = static_cast<int>(strips * ceil_div(s.N, cut.images));
  a.groups = block.groups * cut.images, a.blocks = block.blocks, a.tiles = block.sets * block.blocks;
  a.by_strips = FastDiv(strips), a.by_groups = FastDiv(block.groups), a.by_blocks = FastDiv(block.blocks);
  return a;
}

// A tile of `slots` for each image, `image_pitch` apart, and `spare` more that nobody writes.
inline MmaImage make_mma_image(const Strides& strides, int64_t H, int64_t up, const NchwMmaRows& rows,
                               const NchwMmaBlock& block, int slots, int image_pitch, int images, int spare = 0) {
  MmaImage a{};
  // A single row may have any stride, but copies need aligned addresses for rows that do not exist too.
  a.n = strides.n, a.c = strides.c, a.h = H > 1 ? static_cast<int>(strides.h) : 0, a.H = static_cast<int>(H);
  a.up = static_cast<int>(up), a.left = rows.left, a.piece = rows.piece, a.row_pieces = rows.pieces;
  a.images = images, a.image_rows = kNchwMmaPhases * slots;
  a.image_pitch = image_pitch, a.between = image_pitch - block.groups * block.pitch;
  a.lanes_log2 = rows.lanes() == 8 ? 3 : rows.lanes() == 16 ? 4 : 5;
  const int warps_of_images = images >= 2 ? 2 : 4;
  a.warps = std::max(1 << (a.lanes_log2 - 3), images >= 4 ? 1 : warps_of_images);
  a.pitch = block.pitch, a.section = rows.section(images * image_pitch + spare * block.pitch);
  return a;
}

}  // namespace sepconv::cuda
