// How the NCHW depthwise kernels cut their work, as pure functions of the shape.
#pragma once

#include <algorithm>

#include "core/arithmetic.h"
#include "core/conv_shape.h"
#include "cuda/depthwise/cut.h"

namespace sepconv::cuda {

// depthwise_nchw.cu and depthwise_nchw_stride2.cu
struct NchwCut {
  int rows = 1;    // steps that a thread walks down
  int strips = 1;  // of them in a block's part of a plane
  int planes = 1;  // of a block

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("rows", cut.rows);
    field("strips", cut.strips);
    field("planes", cut.planes);
  }
};

// depthwise_nchw_mma*.cu
struct NchwMmaCut {
  int vec = 1;     // elements of a store (grad_weight: 4 says that images begin on 8 bytes)
  int rows = 1;    // of a place: all, or a multiple of kNchwMmaPhases
  int images = 1;  // of a place
  int splits = 1;  // parts that the places of a channel go in

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("vec", cut.vec);
    field("rows", cut.rows);
    field("images", cut.images);
    field("splits", cut.splits);
  }
};

// ---- depthwise_nchw*.cu: how an image that is written is dealt to threads and blocks. Steps are its rows, or its
// pairs of rows in grad_input of stride 2 (rows v = h + pad_h, v even, and v + 1); a thread owns a run of neighbouring
// columns.
constexpr int nchw_run(int64_t kernel, int64_t stride) {
  if (stride == 2) return 3;
  return kernel == 7 ? 4 : 7;
}
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

// NCHW: a block takes neighbouring channels, up to this many threads' worth of columns, and copies several rows at
// once.
inline constexpr int64_t kGradWeightThreads = 128;
struct GradWeightNchw {
  int channels, chunks;  // of a chunk; chunks
  int slots;             // threads a row
  int rows;              // of grad_y in a stage
};
// Bytes of a stage that a run of elements takes: it may begin anywhere in a piece of 16, and an odd number of pieces
// puts neighbouring planes on different banks.
constexpr int64_t grad_weight_run_bytes(int64_t elements, int64_t element_size) {
  return ((elements * element_size + 30) / 16 | 1) * 16;
}
inline GradWeightNchw grad_weight_nchw_block(const ConvShape& s, DType dtype) {
  // Two stages a block, four blocks a multiprocessor, 228 KB of shared memory.
  constexpr int64_t kStageBytes = 20 << 10, kMostBytes = 27 << 10;
  const int64_t size = dtype == DType::float32 ? 4 : 2, slots = ceil_div(s.Q, kGradWeightColumns);
  int64_t most = std::max<int64_t>(kGradWeightThreads / slots, 1);
  // Small planes are copied whole where that does not leave too few threads: the arithmetic of half types needs more.
  const int64_t plane = grad_weight_run_bytes(s.H * s.W, size) + grad_weight_run_bytes(s.P * s.Q, size);
  const int64_t whole = std::min(most, kMostBytes / plane);
  const bool planes = whole * slots * size >= 192;
  if (planes) most = whole;
  const int64_t chunks = ceil_div(s.K, most), channels = ceil_div(s.K, chunks);
  const int64_t steps = s.P + (s.R - 1) / s.stride_h;
  const int64_t rows = kStageBytes / (channels * (s.stride_h * s.W + s.Q) * size);
  return {static_cast<int>(channels), static_cast<int>(chunks), static_cast<int>(slots),
          static_cast<int>(planes ? steps : std::clamp<int64_t>(rows, 1, steps))};
}

// ---- depthwise_nchw_mma*.cu: a warp takes 16 groups of kNchwMmaPhases rows and 16 columns at a time, in windows of 16
// columns of x for 8 columns of y (grad_input: the other way round).
inline constexpr int kNchwMmaThreads = 128, kNchwMmaPhases = 4;
inline constexpr int kNchwMmaSums = 16 * 8 + 2;  // grad_weight: of a warp and a row of taps, in shared memory

// How the rows of an image that is read come in. A piece is what one copy moves: 8 bytes where rows, and the way from
// one to the next, are made of such, else 4.
struct NchwMmaRows {
  int piece = 0, pieces = 0;  // elements of a copy, 0: rows cannot be copied so; copies of a row
  int left = 0;               // columns of a tile before the row

  int lanes() const { return pieces <= 8 ? 8 : pieces <= 16 ? 16 : 32; }  // that copy a row
  // Elements of a section, `least` or a few more: the rows that a warp copies at once, which go to one section each,
  // have different banks.
  int section(int least) const {
    const int row = lanes() * piece, banks = 64;
    return row < banks ? least + ((row - least) & (banks - 1)) : least;
  }
};
// Windows of 16 columns hold `taps` taps of 8 neighbouring outputs, the first of them `pad` columns before the image.
inline NchwMmaRows nchw_mma_rows(int64_t N, int64_t channels, int64_t H, int64_t W, const Strides& t, int64_t pad,
                                 int64_t taps, int64_t pitch, int vec) {
  NchwMmaRows rows;
  // cut.vec of 4 says that all tensors begin on 8 bytes.
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

struct NchwMmaBlock {
  NchwMmaRows in, other;          // of what is read; grad_weight: of x, and of grad_y
  int blocks = 0, pitch = 0;      // of 16 columns in a row; elements of a row in shared memory
  int groups = 0, slots = 0;      // of an image in a place: groups of rows, and those that its tile has
  int image_pitch = 0;            // elements of a section from image to image: banks of groups go on in the next one
  int sets = 0, group_pitch = 0;  // of 16 groups in a place; elements from one group's results to the next
  int64_t smem_bytes = 0;
  bool possible = false;
};
inline NchwMmaBlock nchw_mma_block(Map map, const ConvShape& s, const NchwMmaCut& cut) {
  const int64_t Q = map == Map::grad_input ? s.W : s.Q;
  NchwMmaBlock block;
  block.blocks = static_cast<int>((Q + 15) / 16);
  block.pitch = 16 * block.blocks + 8;  // an odd number of 16-byte pieces puts the rows of a matrix on different banks
  block.in = map == Map::grad_input
                 ? nchw_mma_rows(s.N, s.K, s.P, s.Q, s.y, s.S - 1 - s.pad_w, s.S, block.pitch, cut.vec)
                 : nchw_mma_rows(s.N, s.C, s.H, s.W, s.x, s.pad_w, s.S, block.pitch, cut.vec);
  block.groups = (cut.rows + kNchwMmaPhases - 1) / kNchwMmaPhases;
  block.slots = block.groups + static_cast<int>(s.R + kNchwMmaPhases - 2) / kNchwMmaPhases;
  block.sets = (block.groups * cut.images + 15) / 16;
  block.possible = block.in.piece > 0;
  const int between = (block.slots - block.groups) * block.pitch;
  block.image_pitch = block.slots * block.pitch + (cut.images > 1 ? -between & 63 : 0);
  const auto both_tiles = [](const NchwMmaRows& rows, int64_t section) {  // bytes
    return int64_t{2} * 2 * kNchwMmaPhases * rows.section(static_cast<int>(section));
  };
  const int64_t tile = both_tiles(block.in, int64_t{cut.images} * block.image_pitch);
  if (map == Map::grad_weight) {
    block.other = nchw_mma_rows(s.N, s.K, s.P, s.Q, s.y, 0, 1, block.pitch, cut.vec);
    block.possible = block.possible && block.other.piece > 0;
    block.smem_bytes =
        std::max<int64_t>(tile + both_tiles(block.other, int64_t{block.groups * cut.images + 1} * block.pitch),
                          s.R * kNchwMmaThreads / 32 * kNchwMmaSums * 4);
  } else {
    block.group_pitch = static_cast<int>(kNchwMmaPhases * Q + (Q % 4 == 0 ? 8 : 0));  // an odd number, too
    block.smem_bytes = tile + int64_t{2} * cut.images * block.groups * block.group_pitch;
  }
  return block;
}

}  // namespace sepconv::cuda
