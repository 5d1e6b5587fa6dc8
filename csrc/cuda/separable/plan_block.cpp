// Whether an inverted residual block runs in one kernel, and its tile. Predicted, not measured:
// benchmarks/notes/separable.md.
#include "cuda/plan_parts.h"
#include "cuda/separable/cut.h"

namespace sepconv::cuda {
namespace {

// The tiles that the kernel is compiled for.
constexpr struct {
  int pixels, outputs;
} kTiles[] = {{128, 32}, {128, 96}, {64, 64}, {64, 160}};

constexpr int64_t kWarps = 8, kResident = 2;  // of a block; blocks of a multiprocessor
// What the kernel's instructions take over shared memory's clocks: by PTX's counts 1.5 to 2.5.
constexpr double kOverShared = 2.2;
constexpr double kLaunch = 4000;  // clocks of a launch and its first loads

// Clocks that a block keeps shared memory busy, four for each ldmatrix; in PTX's counts it is the busiest part.
double clocks_of(const BlockShape& s, const BlockCut& cut, const BlockTile& t) {
  const ConvShape& d = s.depthwise;
  const auto number = [](int64_t i) { return static_cast<double>(i); };
  const double sixteens = number(ceil_div<int64_t>(cut.rows * cut.columns, 16));
  const double steps = number(ceil_div(s.C, 16)), outputs = number(ceil_div(s.K, 16));
  double sum = 1500 + number(t.x_pixels * s.C) / 32;
  for (int64_t first = 0; first < d.C; first += kBlockChannels) {
    const int64_t channels = std::min<int64_t>(kBlockChannels, d.C - first);
    const double groups = number(ceil_div(channels, 16)), halves = number(ceil_div(channels, 32));
    if (s.expands) {
      // The slowest warp's turns: others wait for it.
      const double turns = number(ceil_div(t.x_pixels / 16 * ceil_div(channels, 32), kWarps) * kWarps);
      sum += turns * (steps * 4 * (1 + groups / halves) + 14);
    } else {
      sum += number(t.x_pixels) * groups;
    }
    sum += sixteens * groups * 2 * (number(ceil_div<int64_t>(d.R * d.S, 2)) * 4 + 4);
    sum += sixteens * groups * 4 * (1 + outputs) + (steps + outputs) * 16 * groups / 4;
    sum += 300;
  }
  return sum;
}

}  // namespace

Plan plan_block(const BlockShape& s, DType dtype, const Device& device, int64_t alignment, bool strict) {
  const auto composite = [](const char* reason) { return Plan{Kernel::composite, "composite", reason, {}, 0}; };
  const ConvShape& d = s.depthwise;
  if (!device.has_code) return composite("this build has no code for the GPU: calls of torch's");
  if (s.gated) return composite("the fused kernel has no squeeze-and-excitation");
  if (!is_half(dtype)) return composite("the fused kernel has products of half types only");
  if (device.compute_capability < 80) return composite("no tensor cores of compute capability 8.0");
  if (d.R != d.S || (d.R != 3 && d.R != 5) || d.stride_h != d.stride_w || d.stride_h > 2 || d.dilation_h != 1 ||
      d.dilation_w != 1) {
    return composite("the fused kernel has depthwise 3x3 and 5x5 of stride 1 and 2, without dilation");
  }
  if (s.residual && !s.expands) return composite("a residual of a block that does not expand");
  const auto whole = [](int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; };
  if (alignment < 16 || s.C % 8 != 0 || d.C % 8 != 0 || s.K % 8 != 0 || d.x.c != 1 || d.y.c != 1 ||
      !whole(d.N, d.x.n) || !whole(d.H, d.x.h) || !whole(d.W, d.x.w) || !whole(d.N, d.y.n) || !whole(d.P, d.y.h) ||
      !whole(d.Q, d.y.w)) {
    return composite("the fused kernel takes channels_last in whole vectors of eight channels");
  }
  const int64_t N = std::max<int64_t>(d.N, 1);
  if (!narrow_images(d) || N * d.P * d.Q >= kNarrowLimit / 2 || d.C * std::max(s.C, s.K) >= kNarrowLimit) {
    return composite("an image of 2^31 elements or more");
  }
  const auto multiprocessors = static_cast<double>(device.multiprocessors);
  BlockCut best;
  double least = 0;
  for (const auto& tile : kTiles) {
    if (s.K > tile.outputs) continue;
    for (int64_t parts = 1, before = 0; parts <= d.Q; ++parts) {
      const int64_t columns = ceil_div(d.Q, parts);
      if (columns == before || columns > tile.pixels) continue;
      if (columns * 4 < std::min<int64_t>(d.Q, 16)) break;
      before = columns;
      for (int64_t most = tile.pixels / columns, tries = 0; most > 0 && tries < 3; most /= 2, ++tries) {
        BlockCut cut{.most_pixels = tile.pixels, .most_outputs = tile.outputs};
        cut.columns = static_cast<int>(columns), cut.rows = even_rows(d.P, most);
        const double blocks = static_cast<double>(N * parts * ceil_div<int64_t>(d.P, cut.rows));
        const BlockTile t = block_tile(s, cut);
        if (t.bytes > kMostShared || t.halo_h * t.halo_w >= kBlockPixels) continue;
        // Blocks that share a multiprocessor hide each other's waiting; one alone takes longer.
        const bool share = blocks > multiprocessors && device.tuning().blocks(t.bytes) >= kResident;
        const double clocks =
            clocks_of(s, cut, t) * (share ? kOverShared : 2 * kOverShared) * std::max(blocks / multiprocessors, 1.0);
        if (least == 0 || clocks < least) best = cut, least = clocks;
      }
    }
  }
  if (least == 0) return composite("no tile of the fused kernel fits: too many channels");
  // What three calls move: x and e, e and d, d and y, at the bandwidth; and two launches more.
  const auto moved = static_cast<double>(
      2 * N * ((s.expands ? d.H * d.W * (s.C + d.C) : 0) + d.H * d.W * d.C + d.P * d.Q * (2 * d.C + s.K)));
  const double calls = moved / (device.tuning().bytes_a_clock * multiprocessors) + (s.expands ? 2 : 1) * kLaunch;
  if (!strict && least + kLaunch / 2 > calls) {
    return composite("three calls: predicted to be faster, as halos would be expanded twice or blocks are few");
  }
  return {Kernel::inverted_residual, "cuda_inverted_residual", "what is expanded stays in shared memory", best, 0};
}

}  // namespace sepconv::cuda
