// How depthwise_large.cu and depthwise_large_grad_weight.cu cut their work: what the plan and the launchers agree on,
// as a pure function of sizes. No CUDA, no torch.
#pragma once

#include <algorithm>

#include "core/arithmetic.h"
#include "core/correlation.h"
#include "cuda/launch.h"

namespace sepconv::cuda {

inline constexpr int kLargeThreads = 256;    // at most, of a block
inline constexpr int kLargeColumns = 8;      // neighbouring results of a row that a thread keeps, for cut.keep rows
inline constexpr int64_t kLargeSide = 64;    // taps along a side, at most
inline constexpr int kLargeFilterTile = 64;  // grad_weight: columns of grad_y at once

struct LargeCut {
  int keep = 1;    // rows of results of a thread: 1, 4 or 7 (float64: 1 or 4)
  int rows = 1;    // of results, of a block: a multiple of keep (grad_weight: of grad_y, of a part)
  int planes = 1;  // of a block
  int parts = 1;   // grad_weight: of a strip of rows, in a block
  int splits = 1;  // grad_weight: partial sums

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("keep", cut.keep);
    field("rows", cut.rows);
    field("planes", cut.planes);
    field("parts", cut.parts);
    field("splits", cut.splits);
  }
};

// What a block works on at a time, and how that lies in its shared memory (sizes in elements of the type of the sums).
struct LargeBlock {
  int images, channels;             // planes: images x channels
  int column_threads, row_threads;  // of a plane's results
  int parts;                        // of a strip of the filter's rows, each of other threads
  int used, threads;                // threads with results, and whole warps of them
  int result_rows, result_columns;  // of a plane
  int part_rows, filter_rows;       // rows of the filter: of a part, and of all parts
  int filter_columns;               // a multiple of 4
  int filter_planes, filter_plane;  // their number, and the distance between them
  int image_rows, pitch, plane;     // of a plane: rows that exist, distance between rows, between planes
  int64_t smem_bytes;

  int planes() const { return images * channels; }
  int zeros() const { return kLargeColumns + filter_columns; }  // a row of zeros, for the rows that do not exist
};

inline LargeBlock large_block(const Correlation& c, const LargeCut& cut, int64_t acc_bytes) {
  // Sizes of one image fit in 31 bits, and a division of such numbers is three times as fast.
  const auto parts_of = [](int64_t size, int64_t part) -> int64_t {
    return static_cast<int>(size + part - 1) / static_cast<int>(part);
  };
  const auto even = [&](int64_t size, int64_t most) { return parts_of(size, parts_of(size, most)); };
  const auto odd_pieces = [](int64_t elements) { return static_cast<int>((elements / 4 | 1) * 4); };
  LargeBlock block{};
  const int64_t columns = parts_of(c.result_w, kLargeColumns), quads = parts_of(c.filter_w, 4);
  if (c.channels_dense) {
    block.channels = static_cast<int>(std::min<int64_t>(cut.planes, c.channels));
    block.images = cut.planes / block.channels;
  } else {
    block.images = static_cast<int>(std::min<int64_t>(cut.planes, c.N));
    block.channels = cut.planes / block.images;
  }
  if (c.sums_images) {
    block.column_threads = static_cast<int>(columns);
    block.row_threads = static_cast<int>(parts_of(c.result_h, cut.keep));
    block.part_rows = cut.rows, block.parts = cut.parts;
    block.filter_columns = static_cast<int>(4 * even(quads, kLargeFilterTile / 4));
    block.filter_planes = block.planes();
  } else {
    // One row of threads must leave room for the filter.
    const int64_t rows = std::min(c.image_h, cut.keep + c.filter_h - 1);
    int64_t most = c.result_h > 4 ? 16 : 32;
    while (rows * (kLargeColumns * most + 4 * quads) * acc_bytes > kMostShared * 5 / 8) most /= 2;
    block.column_threads = static_cast<int>(even(columns, most));
    block.row_threads = cut.rows / cut.keep;
    block.part_rows = static_cast<int>(c.filter_h), block.parts = 1;
    block.filter_columns = static_cast<int>(4 * quads);
    block.filter_planes = block.channels;
  }
  block.filter_rows = block.parts * block.part_rows;
  block.result_rows = block.row_threads * cut.keep, block.result_columns = block.column_threads * kLargeColumns;
  block.used = block.column_threads * block.row_threads * block.planes() * block.parts;
  block.threads = ceil_div(block.used, 32) * 32;
  block.image_rows = static_cast<int>(std::min<int64_t>(c.image_h, block.result_rows + block.filter_rows - 1));
  block.pitch = block.result_columns + block.filter_columns;
  // An odd number of 16-byte pieces puts neighbouring planes on different banks.
  block.plane = odd_pieces(int64_t{block.image_rows} * block.pitch);
  block.filter_plane = odd_pieces(int64_t{block.filter_rows} * block.filter_columns);
  int64_t elements =
      block.zeros() + int64_t{block.filter_planes} * block.filter_plane + int64_t{block.planes()} * block.plane;
  if (c.sums_images) elements = std::max<int64_t>(elements, block.threads * cut.keep * kLargeColumns);
  block.smem_bytes = elements * acc_bytes;
  return block;
}

// Blocks beside each other take other channels, then other columns, rows and images.
struct LargePlaces {
  int64_t channel_blocks, column_tiles, strips, image_groups;
  int64_t places() const { return column_tiles * strips * image_groups; }  // of a block of channels
};
inline LargePlaces large_places(const Correlation& c, const LargeBlock& block) {
  return {ceil_div(c.channels, block.channels),
          c.sums_images ? ceil_div(c.filter_w, block.filter_columns) : ceil_div(c.result_w, block.result_columns),
          c.sums_images ? ceil_div(c.filter_h, block.filter_rows) : ceil_div(c.result_h, block.result_rows),
          ceil_div(c.N, block.images)};
}

}  // namespace sepconv::cuda
