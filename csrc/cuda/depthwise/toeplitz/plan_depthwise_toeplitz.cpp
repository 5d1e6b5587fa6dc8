// The plan of depthwise convolutions as products with Toeplitz matrices (depthwise_nchw_mma.cu, depthwise_toeplitz.cu).
#include <limits>

#include "cuda/plan_parts.h"

namespace sepconv::cuda {
namespace {

bool toeplitz_can_run(Map map, const ConvShape& s, DType dtype, const Device& device) {
  // The outputs of a block's images are numbered in 31 bits, and so are all its places.
  return is_half(dtype) && device.compute_capability >= 80 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1 && s.S <= kToeplitzTaps && s.R <= kToeplitzTaps && dense_columns(s) &&
         (map != Map::grad_input || s.K == s.C) && s.N * std::max(s.P * s.Q, s.H * s.W) < kNarrowLimit / 4 &&
         s.K < (1 << 16);
}

// Images side by side and rows of each, so that four warps of 16 rows have little left over, in up to 48 KB (or one
// strip of 16 rows). A row costs `row_bytes` of shared memory, and an image `halo` rows more than it has.
void choose_place(ToeplitzCut& cut, int64_t N, int64_t rows, int64_t halo_bytes, int64_t row_bytes,
                  int64_t fixed_bytes) {
  constexpr int64_t kMost = 48 << 10, kRound = 64;
  const auto bytes = [&](int64_t images, int64_t r) { return fixed_bytes + images * (r * row_bytes + halo_bytes); };
  int64_t most = kRound;
  while (most > 16 && bytes(1, std::min(rows, most)) > kMost) most -= 16;
  cut.rows = even_rows(rows, most), cut.images = 1;
  if (cut.rows < rows) return;
  const auto use = [&](int64_t images) {
    const int64_t all = images * rows;
    return static_cast<double>(all) / static_cast<double>(ceil_div(all, kRound) * kRound);
  };
  for (int images = 2; images <= std::min<int64_t>(N, 16) && bytes(images, rows) <= kMost; ++images) {
    if (use(images) > use(cut.images) + 0.02) cut.images = images;
  }
}

Plan depthwise_toeplitz(Map map, const ConvShape& s, DType dtype, const Device& device, int64_t alignment) {
  ToeplitzCut cut;
  const auto planned = [&](int64_t workspace_bytes) {
    return Plan{Kernel::depthwise_toeplitz, "cuda_depthwise_toeplitz",
                "depthwise 7x7 and larger in a half type, stride 1, columns dense: kernel rows as Toeplitz matrices on "
                "tensor cores",
                cut, workspace_bytes};
  };
  const auto pitch = [](int64_t pieces) { return ((pieces + 1) / 2 * 2 | 1) * 16; };  // bytes
  if (map == Map::grad_weight) {
    const int64_t steps = toeplitz_grad_steps(s.Q);
    const bool few = toeplitz_few_taps(s.R, s.S);
    const int64_t x_row = pitch((few ? 2 : 4) - 1 + 2 * steps);
    const int64_t y_row = 2 * toeplitz_row_elements(static_cast<int>(steps));
    choose_place(cut, s.N, s.P, (few ? 15 : 31) * x_row, x_row + y_row, 0);
    const int64_t places = ceil_div(s.N, cut.images) * ceil_div(s.P, cut.rows) *
                           ceil_div(s.Q, toeplitz_grad_columns(static_cast<int>(steps)));
    cut.splits = grad_weight_splits(s.K * toeplitz_sections(s.R, s.S), places, 1);
    return planned(cut.splits * s.weight_elements() * acc_size(dtype));
  }
  const Written out = written(map, s);
  const Strides& strides = map == Map::forward ? s.y : s.x;
  const auto even = [](int64_t size, int64_t stride) { return size <= 1 || stride % 2 == 0; };
  const bool pairs = out.columns % 2 == 0 && alignment % 4 == 0 && even(s.N, strides.n) &&
                     even(out.channels, strides.c) && even(out.rows, strides.h);
  cut.vec = pairs ? 2 : 1;
  const int64_t steps = toeplitz_steps(s.S), tiles = toeplitz_tiles(out.columns);
  const int64_t row = pitch(tiles - 1 + 2 * steps);
  choose_place(cut, s.N, out.rows, (s.R - 1) * row, row, s.R * 2 * toeplitz_row_elements(static_cast<int>(steps)));
  const int64_t places = ceil_div(s.N, cut.images) * ceil_div(out.rows, cut.rows) * ceil_div(out.columns, 8 * tiles);
  // A block lays out the filter, which costs about a part of a place; of few blocks a multiprocessor works off one as
  // fast as `busy` ones.
  const Tuning& tuned = device.tuning();
  double soonest = std::numeric_limits<double>::max();
  for (int64_t each = 1; each <= 8; ++each) {
    const int64_t parts = std::clamp<int64_t>(each * device.multiprocessors / s.K, 1, places);
    const auto load = static_cast<double>(ceil_div(parts * s.K, device.multiprocessors));
    const double time =
        std::max(load, tuned.toeplitz_busy) * (static_cast<double>(ceil_div(places, parts)) + tuned.toeplitz_begin);
    if (time < soonest) soonest = time, cut.splits = static_cast<int>(parts);
  }
  return planned(0);
}

// ---- depthwise, small kernels on tensor cores

// Elements of the widest store that fits planes without gaps between their rows: 8, 4 or 2; 1 where none does.
int whole_stores(const ConvShape& s, const Written& out, const Strides& t, int64_t alignment) {
  if (out.rows > 1 && t.h != out.columns) return 1;
  int vec = 8;
  const auto whole = [&vec](int64_t size, int64_t stride) { return size <= 1 || stride % vec == 0; };
  while (vec > 1 && (out.rows * out.columns % vec != 0 || alignment % (2 * vec) != 0 || !whole(s.N, t.n) ||
                     !whole(out.channels, t.c))) {
    vec /= 2;
  }
  return out.columns % 2 == 0 ? vec : 1;
}

// False where it cannot run, or where depthwise_nchw.cu and depthwise_grad_weight_nchw.cu are predicted to be as fast:
// 3x3 on rows that are no whole 8-byte pieces, and where tiles would be mostly empty.
bool depthwise_nchw_mma(Plan& p, Map map, const ConvShape& s, DType dtype, const Device& device, int64_t alignment) {
  constexpr int64_t kWarps = kNchwMmaThreads / 32;
  constexpr double kTile = 16 * 16 * kNchwMmaPhases;  // pixels of a warp's tile
  if (s.R != s.S || !has_window(s.R, s.stride_h)) return false;
  const bool sums = map == Map::grad_weight;
  const int64_t most_bytes = (sums ? 50 : 66) << 10;  // of a block: four or three of them to a multiprocessor
  const Written out = sums ? Written{s.K, s.P, s.Q} : written(map, s);
  p = {Kernel::depthwise_nchw_mma,
       "cuda_depthwise_nchw_mma",
       sums ? "depthwise 3x3, 5x5 or 7x7 in a half type, stride 1, rows of whole 4- or 8-byte pieces: every tap in one "
              "pass, on tensor cores"
            : "depthwise 3x3, 5x5 or 7x7 in a half type, stride 1, rows of whole 4- or 8-byte pieces: kernel rows as "
              "Toeplitz matrices on tensor cores",
       {},
       0};
  NchwMmaCut cut;
  cut.vec = sums ? static_cast<int>(std::min<int64_t>(alignment / 2, 8))
                 : whole_stores(s, out, map == Map::forward ? s.y : s.x, alignment);
  if (cut.vec < 2 || out.rows < 1) return false;
  // grad_weight adds in the same order on every device.
  const int64_t multiprocessors = sums ? kSumMultiprocessors : device.multiprocessors;
  const Tuning& tuned = sums ? tuning_for(90) : device.tuning();
  // Rows and images of a place: the least time for a row by a simple reckoning in clocks of a multiprocessor: bytes of
  // memory (of rows that places share, from L2, half of them), the products of whole rounds of the four warps, which
  // other blocks hide for the most part, and what a place costs beside both. Larger places have to be clearly better.
  double least = 0, use = 0;
  NchwMmaBlock block;
  int64_t places = 1;
  const auto consider = [&](int64_t rows, int64_t images) {
    NchwMmaCut tried = cut;
    tried.rows = static_cast<int>(rows), tried.images = static_cast<int>(images);
    const NchwMmaBlock c = nchw_mma_block(map, s, tried);
    if (!c.possible || c.smem_bytes > most_bytes || !near_images(s, images)) return false;
    const int64_t tiles = int64_t{c.sets} * c.blocks, rounds = ceil_div(tiles, kWarps);
    const auto all = static_cast<double>(rows * images);
    const double shared = rows < out.rows ? static_cast<double>(s.R - 1) / 2 * static_cast<double>(images) : 0;
    const double memory = (2 * all + shared) * static_cast<double>(out.columns) * 2 / tuned.bytes_a_clock;
    const double tile = static_cast<double>(16 * s.R) + tuned.nchw_mma_tile;
    const double time = (memory + static_cast<double>(rounds * kWarps) * tile / 2 + tuned.nchw_mma_place) / all;
    if (least != 0 && time > least * tuned.nchw_mma_better) return true;
    least = time, cut = tried, block = c,
    places = ceil_div(std::max<int64_t>(s.N, 1), images) * ceil_div(out.rows, rows);
    use = all * static_cast<double>(out.columns) / (static_cast<double>(tiles) * kTile);
    return true;
  };
  const int64_t most = std::min(s.N, std::max<int64_t>(s.N * s.K / (2 * multiprocessors), 1));
  for (const int64_t images : {1, 2, 3, 4, 6, 8, 12, 16}) {
    if (images <= most || images == 1) consider(out.rows, images);
  }
  for (int64_t strips = 2, fitting = 0; cut.images == 1 && strips <= 16 && fitting < 3; ++strips) {
    const int64_t rows = ceil_div(out.rows, strips * kNchwMmaPhases) * kNchwMmaPhases;
    if (rows < out.rows) fitting += consider(rows, 1);
  }
  if (use < tuned.nchw_mma_use || (s.R == 3 && (block.in.piece != 4 || (sums && block.other.piece != 4)))) return false;
  // Parts of a channel's places: one wave of blocks or several, whichever is done first; a block begins with about the
  // work of one place.
  const int64_t blocks = std::min<int64_t>(6 - (sums ? 1 : 0) - (s.R == 7 ? 1 : 0), tuned.blocks(block.smem_bytes));
  double soonest = std::numeric_limits<double>::max();
  for (int64_t waves = 1; waves <= 8; ++waves) {
    const int64_t parts = std::clamp<int64_t>(waves * multiprocessors * blocks / s.K, 1, places);
    const double time = static_cast<double>(ceil_div(parts * s.K, multiprocessors * blocks)) *
                        (static_cast<double>(ceil_div(places, parts)) + tuned.nchw_mma_begin);
    if (time < soonest) soonest = time, cut.splits = static_cast<int>(parts);
  }
  p.cut = cut;
  if (sums && cut.splits > 1) p.workspace_bytes = cut.splits * s.weight_elements() * acc_size(dtype);
  return true;
}

}  // namespace

std::vector<Plan> depthwise_tensor_core_plans(Map map, const ConvShape& s, DType dtype, const Device& device,
                                              int64_t alignment) {
  std::vector<Plan> plans;
  if (!toeplitz_can_run(map, s, dtype, device)) return plans;
  if (Plan p; depthwise_nchw_mma(p, map, s, dtype, device, alignment)) plans.push_back(p);
  plans.push_back(depthwise_toeplitz(map, s, dtype, device, alignment));
  return plans;
}

bool plan_depthwise_tensor_cores(Plan& p, Map map, const ConvShape& s, DType dtype, const Device& device,
                                 int64_t alignment) {
  if (!toeplitz_can_run(map, s, dtype, device)) return false;
  if (depthwise_nchw_mma(p, map, s, dtype, device, alignment)) return true;
  // Of fewer taps plain arithmetic keeps up with memory in half types, even for a kernel that lays rows of any width
  // into shared memory: 12 operations a byte at 5x5, 25 at 7x7, and about 20 are what an H100 has in the same time.
  if (static_cast<double>(std::min(s.R, s.S)) < device.tuning().toeplitz_from) return false;
  // Of 7x7 the sums, and images that no wide tile covers, are predicted to be 1.5 to 4 times as fast in plain
  // arithmetic.
  constexpr int kWide = 4;
  const bool wide = map != Map::grad_weight && toeplitz_tiles(written(map, s).columns) >= kWide;
  if (!wide && depthwise_nchw_can_run(map, s, dtype)) return false;
  p = depthwise_toeplitz(map, s, dtype, device, alignment);
  return true;
}

}  // namespace sepconv::cuda
