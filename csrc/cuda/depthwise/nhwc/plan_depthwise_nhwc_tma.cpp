// The plan of depthwise_nhwc_tma.cu: where rows that the copy engine brings are predicted to be faster than rows that
// threads load ahead themselves (benchmarks/notes has the figures). That is where registers are the matter, 5x5 and
// 7x7: next to the sums there is room for one row ahead and for 8 to 12 warps a multiprocessor, and without the row for
// 12 to 16. At 3x3, two rows ahead of 16 warps are enough, and memory is all that both kernels wait for.
#include <limits>

#include "cuda/plan_parts.h"

namespace sepconv::cuda {
namespace {

// An image as a tensor map wants it (whole_vectors has seen to 16 bytes): rows of whole pixels, images of whole rows.
bool nested(int64_t N, int64_t C, int64_t H, int64_t W, const Strides& t) {
  int64_t unit = 1, extent = C;
  for (const auto& [size, stride] : {std::pair{W, t.w}, {H, t.h}, {N, t.n}}) {
    if (size <= 1) continue;
    if (stride < extent || stride % unit != 0) return false;
    unit = stride, extent = size * stride;
  }
  return true;
}

// Multiprocessors with 228 KB of shared memory, which is what the rings of several blocks need.
bool large_shared_memory(const Device& device) {
  return device.compute_capability / 10 == 9 || device.compute_capability / 10 == 10;
}

}  // namespace

std::optional<Plan> plan_depthwise_nhwc_tma(Map map, const ConvShape& s, DType dtype, const Device& device,
                                            int64_t alignment) {
  if (dtype != DType::float32 || s.R < 5 || s.stride_h > 1 || s.dilation_h > 1 || s.dilation_w > 1) return {};
  const bool forward = map == Map::forward;
  if (!device.copies_boxes || !large_shared_memory(device)) return {};
  if (!whole_vectors(s, 4, dtype, alignment)) return {};
  if (!(forward ? nested(s.N, s.C, s.H, s.W, s.x) : nested(s.N, s.K, s.P, s.Q, s.y))) return {};
  const int64_t rows = forward ? s.P : s.H, columns = forward ? s.Q : s.W, pairs = s.C / 2;
  if (s.N * s.H * s.W * s.P * s.Q == 0) return {};

  // Pairs of channels by tiles of columns of a warp, whichever leaves fewer lanes without work, and whole lines of
  // memory where that is the same; an eighth of them idle is as much as there is to win.
  const auto covered = [&](int64_t lanes) {
    const int64_t tile = nhwc_columns(1) * (32 / lanes);
    return ceil_div(pairs, lanes) * lanes * (ceil_div(columns, tile) * tile);
  };
  const int64_t lanes = covered(16) < covered(32) ? 16 : 32;
  if (8 * pairs * columns < 7 * covered(lanes)) return {};
  NhwcTmaCut cut{static_cast<int>(lanes)};

  // Strips of the height that costs the least time: a multiprocessor has as many blocks at once as it holds, and a
  // strip repeats the rows that the next one reads too. Where only strips of less than twice the kernel would fill the
  // GPU, the problem is one for the other kernel, which cuts finer.
  const int64_t resident = nhwc_tma_blocks(s.R), tiles = ceil_div(columns, nhwc_columns(1) * (32 / lanes));
  const int64_t lowest = std::min(rows, static_cast<int64_t>(device.tuning().nhwc_tma_rows * static_cast<double>(s.R)));
  int64_t least = std::numeric_limits<int64_t>::max(), best_load = 0, load = 0;
  for (int64_t strips = 1, height = rows; height >= lowest && load < 4 * resident; height = ceil_div(rows, ++strips)) {
    const int64_t warps = s.N * ceil_div(rows, height) * tiles;
    load = ceil_div(ceil_div(pairs, lanes) * ceil_div(warps, kNhwcThreads / 32), device.multiprocessors);
    const int64_t time = (height + s.R) * std::max(load, resident);
    if (time < least) least = time, best_load = load, cut.rows = static_cast<int>(height);
  }
  if (best_load < resident) return {};
  return Plan{
      Kernel::depthwise_nhwc_tma, "cuda_depthwise_nhwc_tma",
      "depthwise 5x5 or 7x7 in float32, channels dense in whole fours, stride 1, work for every multiprocessor: "
      "rows by the copy engine (TMA), each read once",
      cut, 0};
}

}  // namespace sepconv::cuda
