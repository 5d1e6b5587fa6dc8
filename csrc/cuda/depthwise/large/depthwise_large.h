// How depthwise_large.cu and depthwise_large_grad_weight.cu cut their work: what the plan and the launchers agree on, as a
// pure function of sizes. No CUDA, no torch.
#pragma once

#include <algorithm>

#include "cuda/launch.h"

namespace sepconv::cuda {

inline constexpr int kLargeThreads = 256;    // at most, of a block
inline constexpr int kLargeColumns = 8;      // neighbouring results of a row that a thread keeps, for tile.keep rows
inline constexpr int64_t kLargeSide = 64;    // taps along a side, at most
inline constexpr int kLargeFilterTile = 64;  // grad_weight: columns of grad_y at once

// A depthwise map of stride 1, as the correlation of planes that it is:
//   result[i, j] = sum over f, g of  image[i + f - pad_h, j + g - pad_w] * filter[f, g]
// Forward: the weight is the filter. grad_input: grad_y is the image, and the weight, turned around, the filter.
// grad_weight: grad_y is the filter, the weight's gradient the result, and the images of the batch are added up.
struct Correlation {
  bool sums_images;
  int64_t N, channels;  // planes of results, but for the sum
  int64_t image_h, image_w, filter_h, filter_w, result_h, result_w, pad_h, pad_w;
  bool channels_dense;  // neighbouring channels lie beside each other in memory
};

inline Correlation correlation(Map map, const ConvShape& s) {
  const bool dense = s.C > 1 && s.x.c == 1 && s.y.c == 1;
  switch (map) {
    case Map::forward: return {false, s.N, s.K, s.H, s.W, s.R, s.S, s.P, s.Q, s.pad_h, s.pad_w, dense};
    case Map::grad_input:
      return {false, s.N, s.C, s.P, s.Q, s.R, s.S, s.H, s.W, s.R - 1 - s.pad_h, s.S - 1 - s.pad_w, dense};
    default: return {true, s.N, s.K, s.H, s.W, s.P, s.Q, s.R, s.S, s.pad_h, s.pad_w, dense};
  }
}

// What a block works on at a time, and how that lies in its shared memory (sizes in elements of the type of the sums).
struct LargeCut {
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

// tile.keep: rows of results a thread; tile.rows: rows of results a block, a multiple of keep; tile.lanes: planes a block.
// grad_weight: tile.rows of grad_y a part, tile.parts parts a block.
inline LargeCut large_cut(const Correlation& c, const Tile& tile, int64_t acc_bytes) {
  // Sizes of one image fit in 31 bits, and a division of such numbers is three times as fast.
  const auto parts_of = [](int64_t size, int64_t part) -> int64_t {
    return static_cast<int>(size + part - 1) / static_cast<int>(part);
  };
  const auto even = [&](int64_t size, int64_t most) { return parts_of(size, parts_of(size, most)); };
  const auto odd_pieces = [](int64_t elements) { return static_cast<int>((elements / 4 | 1) * 4); };
  LargeCut cut{};
  const int64_t columns = parts_of(c.result_w, kLargeColumns), quads = parts_of(c.filter_w, 4);
  if (c.channels_dense) {
    cut.channels = static_cast<int>(std::min<int64_t>(tile.lanes, c.channels));
    cut.images = tile.lanes / cut.channels;
  } else {
    cut.images = static_cast<int>(std::min<int64_t>(tile.lanes, c.N));
    cut.channels = tile.lanes / cut.images;
  }
  if (c.sums_images) {
    cut.column_threads = static_cast<int>(columns);
    cut.row_threads = static_cast<int>(parts_of(c.result_h, tile.keep));
    cut.part_rows = tile.rows, cut.parts = tile.parts;
    cut.filter_columns = static_cast<int>(4 * even(quads, kLargeFilterTile / 4));
    cut.filter_planes = cut.planes();
  } else {
    // One row of threads must leave room for the filter.
    const int64_t rows = std::min(c.image_h, tile.keep + c.filter_h - 1);
    int64_t most = c.result_h > 4 ? 16 : 32;
    while (rows * (kLargeColumns * most + 4 * quads) * acc_bytes > kMostShared * 5 / 8) most /= 2;
    cut.column_threads = static_cast<int>(even(columns, most));
    cut.row_threads = tile.rows / tile.keep;
    cut.part_rows = static_cast<int>(c.filter_h), cut.parts = 1;
    cut.filter_columns = static_cast<int>(4 * quads);
    cut.filter_planes = cut.channels;
  }
  cut.filter_rows = cut.parts * cut.part_rows;
  cut.result_rows = cut.row_threads * tile.keep, cut.result_columns = cut.column_threads * kLargeColumns;
  cut.used = cut.column_threads * cut.row_threads * cut.planes() * cut.parts;
  cut.threads = (cut.used + 31) / 32 * 32;
  cut.image_rows = static_cast<int>(std::min<int64_t>(c.image_h, cut.result_rows + cut.filter_rows - 1));
  cut.pitch = cut.result_columns + cut.filter_columns;
  // An odd number of 16-byte pieces puts neighbouring planes on different banks.
  cut.plane = odd_pieces(int64_t{cut.image_rows} * cut.pitch);
  cut.filter_plane = odd_pieces(int64_t{cut.filter_rows} * cut.filter_columns);
  int64_t elements = cut.zeros() + int64_t{cut.filter_planes} * cut.filter_plane + int64_t{cut.planes()} * cut.plane;
  if (c.sums_images) elements = std::max<int64_t>(elements, cut.threads * tile.keep * kLargeColumns);
  cut.smem_bytes = elements * acc_bytes;
  return cut;
}

// Blocks beside each other take other channels, then other columns, rows and images.
struct LargePlaces {
  int64_t channel_blocks, column_tiles, strips, image_groups;
  int64_t places() const { return column_tiles * strips * image_groups; }  // of a block of channels
};
inline LargePlaces large_places(const Correlation& c, const LargeCut& cut) {
  const auto parts_of = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  return {parts_of(c.channels, cut.channels),
          c.sums_images ? parts_of(c.filter_w, cut.filter_columns) : parts_of(c.result_w, cut.result_columns),
          c.sums_images ? parts_of(c.filter_h, cut.filter_rows) : parts_of(c.result_h, cut.result_rows),
          parts_of(c.N, cut.images)};
}

}  // namespace sepconv::cuda
