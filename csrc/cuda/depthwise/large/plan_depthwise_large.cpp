// The plan of large depthwise kernels in plain arithmetic (depthwise_large*.cu).
#include <numeric>

#include "cuda/depthwise/large/cut.h"
#include "cuda/plan_parts.h"

namespace sepconv::cuda {
namespace {

// From so many taps on laying an image into shared memory costs less than reading it from the first-level cache for
// every product: by the disassembly about 1.5 instructions a tap and 25 a result, where depthwise_direct.cu needs 16 a
// tap in contiguous images, 6 (half types: 4) with vectors of channels, and depthwise_grad_weight.cu 3 a tap.
double large_from(Map map, const ConvShape& s, const Tuning& tuned) {
  return map == Map::grad_weight || correlation(map, s).channels_dense ? tuned.large_from_dense : tuned.large_from;
}

int64_t up(int64_t size, int64_t whole) { return ceil_div(size, whole) * whole; }

// Warp instructions of a block, read from the disassembly, mostly of four taps of a row at a time: a row of the image
// that meets kKeep rows of the filter takes 34 keep + 8, one that meets some of them 11 keep + 5 and 32 for each.
double block_instructions(const Correlation& c, const LargeBlock& block, int keep) {
  const int64_t whole = std::max<int64_t>(c.filter_h - keep + 1, 0), some = c.filter_h + keep - 1 - whole;
  const int64_t walk = whole * (34 * keep + 8) + some * (11 * keep + 5) + (c.filter_h - whole) * keep * 32;
  const int64_t least = std::min(walk, c.image_h * (34 * keep + 8));  // rows of the padding are not walked
  const int64_t elements = int64_t{block.planes()} * block.image_rows * block.pitch;
  return static_cast<double>(least * c.filter_w / 4 * (block.threads / 32) + elements * 10 / 32);
}

// With one place to a block, as forward has it.
int64_t large_blocks(const Correlation& c, const LargeBlock& block) {
  const LargePlaces places = large_places(c, block);
  return places.channel_blocks * places.places();
}

LargeCut forward_cut(const Correlation& c, DType dtype, const Device& device) {
  LargeCut best;
  double least = 0;
  for (const int keep : {7, 4, 1}) {
    if (keep == 7 && dtype == DType::float64) continue;
    if (keep > 1 && c.result_h == 1) continue;  // one row is all there is
    const int64_t groups = ceil_div(c.result_h, keep);
    int tried = 0;
    for (int64_t strips = 1, last = 0; strips != last && tried < 3;) {
      LargeCut cut;
      cut.keep = keep, cut.rows = static_cast<int>(ceil_div(groups, strips) * keep);
      const LargeBlock one = large_block(c, cut, acc_size(dtype));
      const int64_t threads = one.column_threads * one.row_threads;
      const int64_t plane_bytes = (int64_t{one.plane} + one.filter_plane) * acc_size(dtype);
      const int64_t room = std::min(kLargeThreads / threads, (kMostShared - 1024) / plane_bytes);
      const int whole = static_cast<int>(32 / std::gcd<int64_t>(32, threads));  // planes that are whole warps
      if (room >= 1) {
        ++tried;
        // As many planes as there is room for, or half of them, or what every multiprocessor gets.
        const int64_t all = c.N * c.channels, spread = large_blocks(c, one) / device.multiprocessors;
        for (const int64_t planes : {room, room / 2, spread}) {
          cut.planes = static_cast<int>(std::clamp<int64_t>(std::min(planes, all), 1, room));
          if (cut.planes > whole) cut.planes -= cut.planes % whole;
          const LargeBlock block = large_block(c, cut, acc_size(dtype));
          const double work = block_instructions(c, block, keep);
          const auto waves = static_cast<double>(ceil_div(large_blocks(c, block), device.multiprocessors));
          // Four schedulers, each with one of the warps at a time.
          const double time = std::max(waves * work / 4, work / (block.threads / 32));
          if (least == 0 || time < least) least = time, best = cut;
        }
      }
      last = strips;
      strips = std::min(strips + std::max<int64_t>(strips / 2, 1), std::max<int64_t>(groups, 1));
    }
  }
  return best;
}

// The share of a multiprocessor's arithmetic that a cut of grad_weight is expected to use; 0: it cannot run.
double grad_weight_value(const Correlation& c, const LargeCut& cut, const LargeBlock& block, int64_t blocks) {
  constexpr int64_t kMultiprocessorShared = 224 << 10;
  constexpr double kWarps = 8, kAllWarps = kWarps * kSumMultiprocessors;  // that keep one busy, and all
  const double warps = block.threads / 32;
  const double resident = static_cast<double>(kMultiprocessorShared / block.smem_bytes) * warps;
  const double results = static_cast<double>(c.result_h * c.result_w * block.planes() * block.parts);
  const double rows = static_cast<double>(c.filter_h) / static_cast<double>(up(c.filter_h, block.filter_rows));
  // A part's first and last keep - 1 rows of the image meet some of the rows of the tile only. Of rows that do not
  // exist a warp walks those that it needs to bring its rows of threads together.
  const double meet = cut.rows + cut.keep - 1, some = cut.rows / (cut.rows + 0.6 * (cut.keep - 1));
  const int64_t together =
      std::min<int64_t>(block.row_threads, ceil_div(32, int64_t{block.column_threads} * block.planes()));
  const double whole = some * std::max(1.0, meet / static_cast<double>(c.image_h + (together - 1) * cut.keep));
  return results / (block.threads * cut.keep * kLargeColumns) * rows * whole * std::min(1.0, resident / kWarps) *
         std::min(1.0, static_cast<double>(blocks) * warps / kAllWarps);
}

// By the shape alone: it fixes the order of the additions.
LargeCut grad_weight_cut(const Correlation& c, DType dtype) {
  constexpr int64_t kShared = 64 << 10, kLeastRows = 14, kWanted = 1024;
  LargeCut best;
  double most = -1;
  const int sevens = dtype != DType::float64 && up(c.result_h, 7) <= up(c.result_h, 4) ? 7 : 4;
  for (const int warps : {1, 2, 4}) {
    for (const int parts : {1, 2, 4, 7}) {
      LargeCut cut;
      cut.keep = c.result_h == 1 ? 1 : sevens, cut.parts = parts;
      // Sets of tiles of taps that fill the warps: planes x parts.
      const int64_t set = ceil_div(c.result_w, kLargeColumns) * ceil_div(c.result_h, cut.keep);
      const int64_t planes = std::min<int64_t>(32 * warps / set / parts, std::min<int64_t>(c.N * c.channels, 64));
      if (most >= 0 && (planes < 1 || ceil_div(c.filter_h, parts) < 4)) continue;
      cut.planes = static_cast<int>(std::max<int64_t>(planes, 1));
      // Strips that there is room for, and shorter ones where images alone make too few blocks.
      for (int64_t strips = 1;;) {
        cut.rows = static_cast<int>(ceil_div(c.filter_h, strips * parts));
        const LargeBlock block = large_block(c, cut, acc_size(dtype));
        const int64_t blocks = large_blocks(c, block);
        if (block.smem_bytes > kShared && cut.rows <= kLeastRows / 2 && cut.planes > 1) {
          cut.planes = cut.planes * 3 / 4;
        } else if (cut.rows > 1 && (block.smem_bytes > kShared ||
                                    (blocks * (block.threads / 32) < kWanted && cut.rows >= 2 * kLeastRows))) {
          strips += (strips + 1) / 2;
        } else {
          const double value = grad_weight_value(c, cut, block, blocks);
          if (value > most * 1.02 && block.threads <= kLargeThreads) most = value, best = cut;
          break;
        }
      }
    }
  }
  return best;
}

}  // namespace

bool large_can_run(Map map, const ConvShape& s, const Device& device) {
  // Tiles are cut out of planes that exist.
  return s.input_elements() > 0 && s.output_elements() > 0 && device.compute_capability >= 80 && s.stride_h == 1 &&
         s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1 &&
         static_cast<double>(s.R * s.S) >= large_from(map, s, device.tuning()) && s.R <= kLargeSide &&
         s.S <= kLargeSide && (map != Map::grad_input || s.K == s.C) &&
         s.N * s.K * std::max(s.P * s.Q, s.H * s.W) < kNarrowLimit * 64;
}

Plan plan_depthwise_large(Map map, const ConvShape& s, DType dtype, const Device& device) {
  Plan p{
      Kernel::depthwise_large,
      "cuda_depthwise_large",
      "depthwise of 8 taps and more (grad_weight and dense channels: 16), stride 1: planes in shared memory, tiles of "
      "results in registers (predicted to be faster from there on)",
      {},
      0};
  const Correlation c = correlation(map, s);
  if (map != Map::grad_weight) {
    p.cut = forward_cut(c, dtype, device);
    return p;
  }
  LargeCut cut = grad_weight_cut(c, dtype);
  const LargePlaces places = large_places(c, large_block(c, cut, acc_size(dtype)));
  cut.splits = grad_weight_splits(places.channel_blocks, places.places(), 1);
  p.cut = cut, p.workspace_bytes = cut.splits * s.weight_elements() * acc_size(dtype);
  return p;
}

}  // namespace sepconv::cuda
