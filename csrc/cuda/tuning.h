// The plan's constants, as one table of data: a row for each architecture. None of them has been measured on a GPU:
// they are what disassembly, public rates and the PTX machine's counts say (benchmarks/notes). `python -m benchmarks
// --sweep` tries other cuts, and `--fit` says what a row should hold for them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sepconv::cuda {

// Numbers of one architecture. A row of the table says what differs from the defaults, which are those of 9.0. A
// multiprocessor is "busy" with so many blocks or warps if it works them off as fast as fewer; a beginning is what a
// block or warp costs before its first step, in steps.
struct Tuning {
  int capability = 80;  // the first that the row is for: 90 for 9.0

  double shared_kb = 228;     // of a multiprocessor, a kilobyte of each block for the runtime
  double bytes_a_clock = 13;  // of memory, of each multiprocessor's share

  // Crossings between kernels.
  double wide_group = 32;        // channels of a group from which a half type goes to cuDNN
  double toeplitz_from = 7;      // taps a side from which a half type is worth Toeplitz products in any layout
  double large_from = 8;         // taps from which depthwise_large.cu takes rows, ...
  double large_from_dense = 16;  // ... dense channels, and grad_weight
  double nchw_mma_use = 0.33;    // share of a tile's pixels from which depthwise_nchw_mma.cu is taken
  double separable_pixels = 64;  // for each multiprocessor, from which the pair is fused

  // depthwise_nhwc.cu: busy blocks, by the arithmetic for what is read; a step's instructions beside its products;
  // what a step of single channels costs in those of pairs.
  double nhwc_busy_3 = 3, nhwc_busy_3_stride2 = 2, nhwc_busy_5 = 2, nhwc_busy_7 = 1;
  double nhwc_step = 12, nhwc_single = 1.25;

  // depthwise_nhwc_mma.cu: busy warps, a beginning in batches of rows.
  double nhwc_mma_busy = 12, nhwc_mma_begin = 2;

  // depthwise_nhwc_tma.cu: strips of fewer times the kernel's rows are not worth it.
  double nhwc_tma_rows = 2;

  // depthwise_nchw.cu: busy warps, beginnings of 3x3 and of the others, and the part of a step that a row costs which a
  // strip reads for the next one.
  double nchw_busy = 12, nchw_begin_3 = 3, nchw_begin = 1.5, nchw_shared = 0.6;

  // depthwise_nchw_mma.cu: clocks of a tile beside its products and of a place beside its tiles, how much better a
  // larger place has to be, and a beginning in places.
  double nchw_mma_tile = 40, nchw_mma_place = 120, nchw_mma_better = 0.97, nchw_mma_begin = 1;

  // depthwise_toeplitz.cu: busy blocks; a beginning, which lays out the filter, in places.
  double toeplitz_busy = 4, toeplitz_begin = 0.5;

  // Sums over pixels: about so many blocks (nhwc_mma: warps) for each of kSumMultiprocessors.
  double grad_weight_nhwc = 2, grad_weight_nhwc_7 = 3, grad_weight_nchw = 4, grad_weight_nchw_7 = 3;
  double grad_weight_nhwc_mma = 16;

  // Blocks of so many bytes of shared memory that a multiprocessor holds.
  int64_t blocks(int64_t bytes) const { return static_cast<int64_t>(shared_kb * 1024) / (bytes + 1024); }

  double nhwc_busy(int64_t kernel, int64_t stride) const {
    if (kernel == 3) return stride == 1 ? nhwc_busy_3 : nhwc_busy_3_stride2;
    return kernel == 5 ? nhwc_busy_5 : nhwc_busy_7;
  }

  // each(tuning, f) calls f(name, value) for every number that `--fit` may choose.
  template <typename Self, typename F>
  static void each(Self& t, F&& field) {
    field("wide_group", t.wide_group);
    field("toeplitz_from", t.toeplitz_from);
    field("large_from", t.large_from);
    field("large_from_dense", t.large_from_dense);
    field("nchw_mma_use", t.nchw_mma_use);
    field("separable_pixels", t.separable_pixels);
    field("shared_kb", t.shared_kb);
    field("bytes_a_clock", t.bytes_a_clock);
    field("nhwc_busy_3", t.nhwc_busy_3);
    field("nhwc_busy_3_stride2", t.nhwc_busy_3_stride2);
    field("nhwc_busy_5", t.nhwc_busy_5);
    field("nhwc_busy_7", t.nhwc_busy_7);
    field("nhwc_step", t.nhwc_step);
    field("nhwc_single", t.nhwc_single);
    field("nhwc_mma_busy", t.nhwc_mma_busy);
    field("nhwc_mma_begin", t.nhwc_mma_begin);
    field("nhwc_tma_rows", t.nhwc_tma_rows);
    field("nchw_busy", t.nchw_busy);
    field("nchw_begin_3", t.nchw_begin_3);
    field("nchw_begin", t.nchw_begin);
    field("nchw_shared", t.nchw_shared);
    field("nchw_mma_tile", t.nchw_mma_tile);
    field("nchw_mma_place", t.nchw_mma_place);
    field("nchw_mma_better", t.nchw_mma_better);
    field("nchw_mma_begin", t.nchw_mma_begin);
    field("toeplitz_busy", t.toeplitz_busy);
    field("toeplitz_begin", t.toeplitz_begin);
    field("grad_weight_nhwc", t.grad_weight_nhwc);
    field("grad_weight_nhwc_7", t.grad_weight_nhwc_7);
    field("grad_weight_nchw", t.grad_weight_nchw);
    field("grad_weight_nchw_7", t.grad_weight_nchw_7);
    field("grad_weight_nhwc_mma", t.grad_weight_nhwc_mma);
  }
};

// From the oldest on. Shared memory and bandwidth of A100, RTX 3090 and 4090, H100, B200 and RTX 5090, by their data
// sheets: bytes a second, nine tenths of them, over clocks and multiprocessors.
inline constexpr Tuning kTunings[] = {
    {.capability = 80, .shared_kb = 164, .bytes_a_clock = 12},
    {.capability = 86, .shared_kb = 100, .bytes_a_clock = 5},
    {.capability = 89, .shared_kb = 100, .bytes_a_clock = 3},
    {.capability = 90},
    {.capability = 100, .bytes_a_clock = 25},
    {.capability = 120, .shared_kb = 100, .bytes_a_clock = 4},
};

inline const Tuning& tuning_for(int compute_capability) {
  const Tuning* found = kTunings;
  for (const Tuning& row : kTunings) {
    if (row.capability <= compute_capability) found = &row;
  }
  return *found;
}

// What fixes the order of additions, and so every bit of a sum, is the same for every device: that many
// multiprocessors, those of an H100, are planned for.
inline constexpr int64_t kSumMultiprocessors = 132;
constexpr bool adds_alike() {
  const Tuning plain;
  for (const Tuning& row : kTunings) {
    if (row.grad_weight_nhwc != plain.grad_weight_nhwc || row.grad_weight_nhwc_7 != plain.grad_weight_nhwc_7 ||
        row.grad_weight_nchw != plain.grad_weight_nchw || row.grad_weight_nchw_7 != plain.grad_weight_nchw_7 ||
        row.grad_weight_nhwc_mma != plain.grad_weight_nhwc_mma) {
      return false;
    }
  }
  return true;
}
static_assert(adds_alike());

}  // namespace sepconv::cuda
