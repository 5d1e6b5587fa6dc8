// Tile choices that the plan and a kernel's launcher must agree on, as pure functions of the shape.
#pragma once

#include <algorithm>

#include "core/conv_shape.h"

namespace sepconv::cuda {

// ---- grouped.cu: a thread computes this many output channels of one group; one channel a group (depthwise) leaves nothing
// to share between channels. The argument is that of the tensor that is written: y in forward, x in grad_input.
inline constexpr int kGroupedChannels = 4;
inline int grouped_channel_tile(int64_t channels_per_group) { return channels_per_group == 1 ? 1 : kGroupedChannels; }

// Elements of the weight after packing: [R, S, channels read, groups, channels written, padded to whole tiles].
inline int64_t grouped_packed_elements(const ConvShape& s, bool grad_input) {
  const int64_t read = grad_input ? s.outputs_per_group() : s.channels_per_group();
  const int64_t written = grad_input ? s.channels_per_group() : s.outputs_per_group();
  const int64_t tile = grouped_channel_tile(written);
  return s.groups * s.R * s.S * read * ((written + tile - 1) / tile * tile);
}

// Workspace of launch_grouped_forward and launch_grouped_grad_input: the packed weight in the accumulation type.
inline int64_t grouped_workspace_bytes(const ConvShape& s, DType dtype, bool grad_input) {
  return grouped_packed_elements(s, grad_input) * (dtype == DType::float64 ? 8 : 4);
}

// True where every index that the kernels of grouped.cu and grouped_grad_weight.cu form fits in 31 bits.
inline bool grouped_is_narrow(const ConvShape& s) {
  const auto reach = [](int64_t n, int64_t c, int64_t h, int64_t w, const Strides& t) {
    return (n - 1) * t.n + (c - 1) * t.c + (h - 1) * t.h + (w - 1) * t.w;
  };
  // Whole tiles of channels and columns are fewer than 4 times what is in them.
  const int64_t largest =
      std::max({reach(s.N, s.C, s.H, s.W, s.x), reach(s.N, s.K, s.P, s.Q, s.y),
                reach(s.K, s.channels_per_group(), s.R, s.S, s.w), 4 * s.input_elements(), 4 * s.output_elements(),
                4 * s.weight_elements(), s.H + s.pad_h + s.P * s.stride_h + s.R * s.dilation_h,
                s.W + s.pad_w + s.Q * s.stride_w + s.S * s.dilation_w});
  return largest < (int64_t{1} << 31) - 4096;
}

// ---- the first stage of grad_weight: how many parts the sum over the output pixels is cut into. Enough to fill a large
// GPU a few times over, and never so many that a part is shorter than what its threads cover in a few steps. The answer depends on
// the shape alone, so that the order of the additions, and with it every bit of the result, is the same on every device.
inline constexpr int64_t kGradWeightBlocks = 1024;

inline int grad_weight_splits(int64_t blocks_a_split, int64_t pixels, int64_t least_pixels_a_split) {
  const int64_t wanted = (kGradWeightBlocks + blocks_a_split - 1) / std::max<int64_t>(blocks_a_split, 1);
  return static_cast<int>(std::clamp<int64_t>(pixels / least_pixels_a_split, 1, std::max<int64_t>(wanted, 1)));
}

// A thread of grouped_grad_weight sums over a tile of tile x tile (output, input) channels of one group and one tap.
inline constexpr int kGroupedGradWeightTile = 4;
inline int grouped_grad_weight_tile(const ConvShape& s) {
  return s.channels_per_group() == 1 && s.outputs_per_group() == 1 ? 1 : kGroupedGradWeightTile;
}
inline int64_t grouped_grad_weight_tiles(const ConvShape& s) {
  const int64_t tile = grouped_grad_weight_tile(s);
  return s.R * s.S * s.groups * ((s.outputs_per_group() + tile - 1) / tile) *
         ((s.channels_per_group() + tile - 1) / tile);
}
// Neighbouring threads take neighbouring channels (32 tiles a block) where y is channels_last, else neighbouring pixels (1).
inline bool grouped_grad_weight_lanes_are_channels(const ConvShape& s) { return output_layout(s) == Layout::nhwc; }
inline int grouped_grad_weight_splits(const ConvShape& s) {
  const bool channels = grouped_grad_weight_lanes_are_channels(s);
  const int64_t tiles = grouped_grad_weight_tiles(s);
  return grad_weight_splits(channels ? (tiles + 31) / 32 : tiles, s.N * s.P * s.Q, channels ? 64 : 1024);
}

// ---- depthwise_nhwc.cu: blocks of kNhwcThreads threads, each with up to kNhwcLanes channel vectors.
inline constexpr int kNhwcThreads = 128, kNhwcLanes = 32;
// Output columns a thread works on: of planes of 7, 14, 28, 56 and 112 columns seven leave none over.
constexpr int nhwc_columns(int stride) { return stride == 1 ? 7 : 4; }
// Channel vectors of a block: all there are, in equal parts, or 16, whichever leaves fewer threads without work.
inline int64_t nhwc_lanes(int64_t vectors) {
  const auto blocks = [vectors](int64_t lanes) { return (vectors + lanes - 1) / lanes; };
  const int64_t half = kNhwcLanes / 2, even = (vectors + blocks(kNhwcLanes) - 1) / blocks(kNhwcLanes);
  return kNhwcThreads / half * blocks(even) > kNhwcThreads / even * blocks(half) ? half : even;
}

// ---- depthwise_nhwc_mma.cu and depthwise_grad_weight_nhwc_mma.cu: a block has a few groups of channels, with a warp for each. A
// place is a tile of columns of one image (the output), or the narrow rows of several images side by side.
inline constexpr int kMmaColumns = 32;  // that a place has, in pairs
struct MmaCut {
  int groups, slices;       // of a block; blocks for all channels
  int pairs, column_tiles;  // of columns in a tile of an image; tiles of a row
  int images;               // of a place
  int64_t image_groups;

  int width() const { return 2 * pairs + 6; }  // columns of the input for an image: pairs meet eight
};
inline MmaCut mma_cut(int64_t N, int64_t columns, int64_t groups, int64_t most_groups) {
  constexpr int64_t kPairs = kMmaColumns / 2, kWidth = 2 * kMmaColumns;  // a thread copies two columns of the input
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const int64_t slices = parts(groups, most_groups), all_pairs = std::max<int64_t>(parts(columns, 2), 1);
  const int64_t column_tiles = parts(all_pairs, kPairs), pairs = parts(all_pairs, column_tiles);
  const int64_t most = column_tiles > 1 ? 1 : std::min(kPairs / pairs, kWidth / (2 * pairs + 6));
  const int64_t images = std::clamp<int64_t>(N, 1, most);
  return {static_cast<int>(parts(groups, slices)), static_cast<int>(slices), static_cast<int>(pairs),
          static_cast<int>(column_tiles),          static_cast<int>(images), parts(std::max<int64_t>(N, 1), images)};
}
// Rows of the filter that there are kernels for, which are also those of a batch.
constexpr int mma_rows(int64_t R) { return R <= 5 ? 5 : 7; }

// Groups of eight channels. Rows of sums in shared memory, in floats: even columns, then odd ones, and of each all channels. The
// fours by which columns and their halves lie apart put what a warp writes, and what it reads, on different banks.
inline constexpr int kNhwcMmaGroups = 4;
inline constexpr int kNhwcMmaSumPitch = kNhwcMmaGroups * 8 + 4;
inline constexpr int kNhwcMmaSumHalf = kMmaColumns / 2 * kNhwcMmaSumPitch + 4;
struct NhwcMma : MmaCut {
  int rows;     // mma_rows
  int swizzle;  // pieces of 16 bytes that a column takes in shared memory, as a power of two

  int64_t row_bytes() const { return int64_t{images * width() * 16} << swizzle; }
  int64_t bytes() const { return rows * (2 * row_bytes() + 2 * kNhwcMmaSumHalf * 4); }
};
inline NhwcMma nhwc_mma(Map map, const ConvShape& s) {
  const MmaCut cut = mma_cut(s.N, map == Map::forward ? s.Q : s.W, s.C / 8, kNhwcMmaGroups);
  return {cut, mma_rows(s.R), cut.groups > 2 ? 2 : cut.groups - 1};
}
// depthwise_nhwc_tma.cu: blocks that a multiprocessor holds, by their registers.
constexpr int nhwc_tma_blocks(int64_t kernel) { return kernel == 5 ? 4 : 3; }

// grad_weight: groups of four channels.
inline constexpr int kGradWeightMmaGroups = 8;
inline MmaCut grad_weight_mma(const ConvShape& s) { return mma_cut(s.N, s.Q, s.C / 4, kGradWeightMmaGroups); }

// ---- depthwise_nchw*.cu: how an image that is written is dealt to threads and blocks. Steps are its rows, or its pairs of rows
// in grad_input of stride 2 (rows v = h + pad_h, v even, and v + 1); a thread owns a run of neighbouring columns.
constexpr int nchw_run(int64_t kernel, int64_t stride) { return stride == 2 ? 3 : kernel == 7 ? 4 : 7; }
constexpr int nchw_pairs(int64_t kernel) { return kernel == 7 ? 2 : 3; }  // of columns in a run, grad_input of stride 2

struct NchwWork {
  int64_t channels, rows, columns;  // of the image that is written
  int64_t in_rows, in_columns;      // of the one that is read
  int64_t steps, runs;              // of a plane
  int64_t stride;                   // rows of the input from one step to the next
  bool pairs;
};
inline NchwWork nchw_work(Map map, const ConvShape& s) {
  if (map == Map::forward) {
    const int64_t run = nchw_run(s.R, s.stride_h);
    return {s.K, s.P, s.Q, s.H, s.W, s.P, (s.Q + run - 1) / run, s.stride_h, false};
  }
  const bool pairs = s.stride_h == 2;
  const int64_t run = pairs ? 2 * nchw_pairs(s.R) : nchw_run(s.R, 1);
  const int64_t odd_h = pairs ? s.pad_h % 2 : 0, odd_w = pairs ? s.pad_w % 2 : 0;
  return {s.C, s.H, s.W, s.P, s.Q, pairs ? (s.H + odd_h + 1) / 2 : s.H, (s.W + odd_w + run - 1) / run, 1, pairs};
}

// Shared memory of a block that owns `band` steps of `planes` planes: the input as it lies, the results (in float, but
// for pairs), the filters, the biases.
struct NchwMemory {
  int64_t in, out, filters, biases;
  int64_t bytes() const { return in + out + filters + biases; }
};
inline NchwMemory nchw_memory(const NchwWork& w, const ConvShape& s, DType dtype, int64_t band, int64_t planes) {
  const int64_t size = dtype == DType::float32 ? 4 : 2, piece = 16 / size;
  const int64_t rows = std::min(w.rows, w.pairs ? 2 * band : band);
  const int64_t in_rows = std::min(w.in_rows, w.pairs ? band + s.R / 2 : (band - 1) * w.stride + s.R);
  const int64_t multiplier = w.channels == s.C ? 1 : w.channels / s.C;
  const int64_t in_planes = multiplier == 1 ? planes : (planes + multiplier - 2) / multiplier + 1;  // at most
  const auto whole = [piece](int64_t elements) { return (elements + 2 * (piece - 1)) & -piece; };
  return {whole((in_planes - 1) * w.in_rows * w.in_columns + in_rows * w.in_columns) * size,
          whole((planes - 1) * w.rows * w.columns + rows * w.columns) * (w.pairs ? size : 4),
          whole(planes * s.R * s.S) * size, planes * 4};
}

// ---- depthwise_grad_weight_nhwc.cu and depthwise_grad_weight_nchw.cu: a thread works on this many neighbouring columns of
// grad_y. The usual planes of 7, 14, 28, 56, 112 columns are whole multiples.
inline constexpr int kGradWeightColumns = 7;

// How the rows of grad_y of all places, one after the other, are cut: `rows` in a split, so that about `blocks` blocks run, no
// fewer than four rows each (the first of them wait for memory), and whole images where that makes little difference. A
// sum so short that a second kernel would take longer stays whole.
struct GradWeightRows {
  int rows, splits;
};
inline GradWeightRows grad_weight_rows(int64_t chunks, int64_t places, int64_t P, int64_t blocks) {
  constexpr int64_t kWhole = 16, kLeast = 4;
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const int64_t total = std::max<int64_t>(places * P, 1);
  int64_t rows = std::max(parts(total, std::max<int64_t>(blocks / chunks, 1)), kLeast);
  if (total <= kWhole) rows = total;
  if (const int64_t whole = parts(rows, P) * P; 8 * whole <= 9 * rows) rows = whole;
  return {static_cast<int>(rows), static_cast<int>(parts(total, rows))};
}

// channels_last: a warp takes kGradWeightColumns columns of 32 channels, a block up to this many warps. The sums of 7x7 leave
// registers for 12 warps a multiprocessor, three blocks of four.
constexpr int grad_weight_slots(int64_t kernel) { return kernel == 7 ? 4 : 8; }
struct GradWeightNhwc {
  int channels, chunks;  // of a chunk; chunks
  int lanes;             // of 32, for the channels of one image; those of others take the rest
  int slots, images;     // warps for a tile of a row; images one after the other
  int tiles;             // of a row
  int64_t places;        // tiles of rows, of groups of images
};
inline GradWeightNhwc grad_weight_nhwc(const ConvShape& s) {
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const int64_t chunks = parts(s.K, 32), channels = parts(parts(s.K, chunks), 8) * 8;  // whole pieces of 16 bytes
  const int64_t lanes = channels <= 16 && s.N * channels >= 32 ? channels : 32;
  const int64_t slots = parts(s.Q, kGradWeightColumns), tiles = parts(slots, grad_weight_slots(s.R));
  const int64_t slots_a_tile = parts(slots, tiles), most = grad_weight_slots(s.R) / slots_a_tile * (32 / lanes);
  const int64_t groups = parts(s.N, most), images = parts(parts(s.N, groups), 32 / lanes);
  return {static_cast<int>(channels), static_cast<int>(chunks), static_cast<int>(lanes), static_cast<int>(slots_a_tile),
          static_cast<int>(images),   static_cast<int>(tiles),  groups * tiles};
}

// NCHW: a block takes neighbouring channels, up to this many threads' worth of columns, and copies several rows at once.
inline constexpr int64_t kGradWeightThreads = 128;
struct GradWeightNchw {
  int channels, chunks;  // of a chunk; chunks
  int slots;             // threads a row
  int rows;              // of grad_y in a stage
};
// Bytes of a stage that a run of elements takes: it may begin anywhere in a piece of 16, and an odd number of pieces puts
// neighbouring planes on different banks.
constexpr int64_t grad_weight_run_bytes(int64_t elements, int64_t element_size) {
  return ((elements * element_size + 30) / 16 | 1) * 16;
}
inline GradWeightNchw grad_weight_nchw(const ConvShape& s, DType dtype) {
  // Two stages a block, four blocks a multiprocessor, 228 KB of shared memory.
  constexpr int64_t kStageBytes = 20 << 10, kMostBytes = 27 << 10;
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const int64_t size = dtype == DType::float32 ? 4 : 2, slots = parts(s.Q, kGradWeightColumns);
  int64_t most = std::max<int64_t>(kGradWeightThreads / slots, 1);
  // Small planes are copied whole where that does not leave too few threads: the arithmetic of half types needs more.
  const int64_t plane = grad_weight_run_bytes(s.H * s.W, size) + grad_weight_run_bytes(s.P * s.Q, size);
  const int64_t whole = std::min(most, kMostBytes / plane);
  const bool planes = whole * slots * size >= 192;
  if (planes) most = whole;
  const int64_t chunks = parts(s.K, most), channels = parts(s.K, chunks);
  const int64_t steps = s.P + (s.R - 1) / s.stride_h;
  const int64_t rows = kStageBytes / (channels * (s.stride_h * s.W + s.Q) * size);
  return {static_cast<int>(channels), static_cast<int>(chunks), static_cast<int>(slots),
          static_cast<int>(planes ? steps : std::clamp<int64_t>(rows, 1, steps))};
}

// ---- depthwise_nchw_mma*.cu: a warp takes 16 groups of kNchwMmaPhases rows and 16 columns at a time, in windows of 16 columns
// of x for 8 columns of y (grad_input: the other way round).
inline constexpr int kNchwMmaThreads = 128, kNchwMmaPhases = 4;

// How the rows of an image that is read come in. A piece is what one copy moves: 8 bytes where rows, and the way from one to
// the next, are made of such, else 4.
struct NchwMmaRows {
  int piece = 0, pieces = 0;  // elements of a copy, 0: rows cannot be copied so; copies of a row
  int left = 0;               // columns of a tile before the row
};
// Windows of 16 columns hold `taps` taps of 8 neighbouring outputs, the first of them `pad` columns before the image.
inline NchwMmaRows nchw_mma_rows(int64_t N, int64_t channels, int64_t H, int64_t W, const Strides& t, int64_t pad,
                                 int64_t taps, int64_t pitch, int vec) {
  NchwMmaRows rows;
  // tile.vec of 4 says that all tensors begin on 8 bytes.
  for (int piece = vec >= 4 ? 4 : 2; piece >= 2 && rows.piece == 0; piece /= 2) {
    const auto whole = [piece](int64_t size, int64_t stride) { return size <= 1 || (stride & (piece - 1)) == 0; };
    const int64_t left = (std::max<int64_t>(pad, 0) + piece - 1) & -piece;
    if (left - pad + 7 + taps - 1 < 16 && whole(2, W) && whole(N, t.n) && whole(channels, t.c) && whole(H, t.h)) {
      rows.piece = piece, rows.left = static_cast<int>(left);
      rows.pieces = static_cast<int>(std::max<int64_t>(std::min(W, pitch - left), 0) / piece);
    }
  }
  return rows;
}

struct NchwMmaCut {
  NchwMmaRows in, other;          // of what is read; grad_weight: of x, and of grad_y
  int blocks = 0, pitch = 0;      // of 16 columns in a row; elements of a row in shared memory
  int groups = 0, slots = 0;      // of an image in a place: groups of rows, and those that its tile has
  int sets = 0, group_pitch = 0;  // of 16 groups in a place; elements from one group's results to the next
  int64_t smem_bytes = 0;
  bool possible = false;
};
inline NchwMmaCut nchw_mma_cut(Map map, const ConvShape& s, const Tile& t) {
  const int64_t Q = map == Map::grad_input ? s.W : s.Q;
  NchwMmaCut cut;
  cut.blocks = static_cast<int>((Q + 15) / 16);
  cut.pitch = 16 * cut.blocks + 8;  // an odd number of 16-byte pieces puts the rows of a matrix on different banks
  cut.in = map == Map::grad_input ? nchw_mma_rows(s.N, s.K, s.P, s.Q, s.y, s.S - 1 - s.pad_w, s.S, cut.pitch, t.vec)
                                  : nchw_mma_rows(s.N, s.C, s.H, s.W, s.x, s.pad_w, s.S, cut.pitch, t.vec);
  cut.groups = (t.rows + kNchwMmaPhases - 1) / kNchwMmaPhases;
  cut.slots = cut.groups + static_cast<int>(s.R + kNchwMmaPhases - 2) / kNchwMmaPhases;
  cut.sets = (cut.groups * t.lanes + 15) / 16;
  cut.possible = cut.in.piece > 0;
  const int64_t tile = int64_t{2} * 2 * kNchwMmaPhases * t.lanes * cut.slots * cut.pitch;  // bytes of both
  if (map == Map::grad_weight) {
    cut.other = nchw_mma_rows(s.N, s.K, s.P, s.Q, s.y, 0, 1, cut.pitch, t.vec);
    cut.possible = cut.possible && cut.other.piece > 0;
    cut.smem_bytes = std::max<int64_t>(tile + int64_t{2} * 2 * kNchwMmaPhases * (cut.groups * t.lanes + 1) * cut.pitch,
                                       s.R * kNchwMmaThreads / 32 * 128 * 4);
  } else {
    cut.group_pitch = static_cast<int>(kNchwMmaPhases * Q + (Q % 4 == 0 ? 8 : 0));  // an odd number, too
    cut.smem_bytes = tile + int64_t{2} * t.lanes * cut.groups * cut.group_pitch;
  }
  return cut;
}

// ---- depthwise_toeplitz.cu
// Steps of 16 columns that the window of 8 neighbouring outputs takes; those that there are kernels for.
inline int toeplitz_steps(int64_t S) {
  const int64_t steps = (S + 7 + 15) / 16;
  return static_cast<int>(steps == 4 ? 5 : steps);
}
inline constexpr int64_t kToeplitzTaps = 73;  // along a row

// Tiles of 8 output columns that a warp works on: what leaves the fewest columns over, and then the most.
inline int toeplitz_tiles(int64_t Q) {
  int best = 1;
  for (const int tiles : {2, 4, 7}) {
    const auto covered = [Q](int64_t columns) { return (Q + columns - 1) / columns * columns; };
    if (covered(8 * tiles) <= covered(8 * best)) best = tiles;
  }
  return best;
}

// grad_weight: steps of 16 columns of x that meet a tile of columns of grad_y, likewise.
constexpr int toeplitz_grad_columns(int steps) { return 16 * steps - 8; }
inline int toeplitz_grad_steps(int64_t Q) {
  int best = 1;
  for (const int steps : {2, 3, 4}) {
    const auto work = [Q](int n) {
      const int64_t columns = toeplitz_grad_columns(n);
      return (Q + columns - 1) / columns * n;
    };
    if (work(steps) <= work(best)) best = steps;
  }
  return best;
}
// grad_weight: 16 x 16 taps a block, else 32 x 32.
constexpr bool toeplitz_few_taps(int64_t R, int64_t S) { return R <= 16 && S <= 16; }
inline int64_t toeplitz_sections(int64_t R, int64_t S) {
  return toeplitz_few_taps(R, S) ? 1 : (R + 31) / 32 * ((S + 31) / 32);
}

// ---- separable.cu and separable_mma.cu: a chunk of filters stands in shared memory, 8 KB of it in float.
inline constexpr int64_t kSeparableTaps = 64;

// pointwise.cu and pointwise_mma.cu: a block sums a tile of 64 x 64 (or 128 x 64) weights.
inline int pointwise_grad_weight_splits(const ConvShape& s) {
  return grad_weight_splits(((s.K + 63) / 64) * ((s.C + 63) / 64), s.N * s.P * s.Q, 256);
}

// ---- spatial_separable.cu: a block computes this many rows, and this many columns and channels, through a tile of
// shared memory that every GPU has without being asked.
inline constexpr int kSpatialRows = 8;
inline constexpr int64_t kSpatialSharedBytes = 48 << 10;

struct SpatialTile {
  int columns = 0, channels = 0;  // 0 columns: the filters or the image are too large for the kernel
  int64_t smem_bytes = 0;
};

inline int64_t spatial_blocks(const ConvShape& s, const SpatialTile& tile) {
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  return s.N * parts(s.C, tile.channels) * parts(s.P, kSpatialRows) * parts(s.Q, tile.columns);
}

// As many columns as make lines of 512 elements; fewer, and then fewer channels, where the halo of a long filter needs
// the memory.
inline SpatialTile spatial_tile(const ConvShape& s, DType dtype) {
  constexpr int64_t kLine = 512, kLeastColumns = 8, kLimit = (int64_t{1} << 31) - 4096;
  const auto bytes = [&](int64_t columns, int64_t channels) {
    return kSpatialRows * (columns + s.S - 1) * channels * (dtype == DType::float64 ? 8 : 4);
  };
  if (std::max({s.C, s.H + s.P + s.R + s.pad_h, s.W + s.Q + s.S + s.pad_w}) >= kLimit) return {};
  const bool channels_dense = s.C > 1 && s.x.c == 1 && s.y.c == 1;
  for (int64_t channels = channels_dense ? std::min<int64_t>(s.C, 32) : 1; channels >= 1; channels /= 2) {
    const int64_t line = std::min(s.Q, std::max(kLine / channels, kLeastColumns));
    for (int64_t columns = line; columns >= std::min(line, kLeastColumns); columns = columns > 1 ? columns / 2 : 0) {
      const SpatialTile tile{static_cast<int>(columns), static_cast<int>(channels), bytes(columns, channels)};
      if (tile.smem_bytes <= kSpatialSharedBytes && spatial_blocks(s, tile) < kLimit) return tile;
    }
  }
  return {};
}

}  // namespace sepconv::cuda
