// The plan of the depthwise family: which kernel, how it is cut, and why.
#include <limits>

#include "cuda/plan_parts.h"

namespace sepconv::cuda {
namespace {

// ---- predicates: what a kernel needs

bool window(const ConvShape& s) {
  return s.R == s.S && s.stride_h == s.stride_w && s.dilation_h == 1 && s.dilation_w == 1 &&
         has_window(s.R, s.stride_h);
}

// A register window over dense channels: as window(), and any dilation at stride 1.
bool nhwc_can_run(Map map, const ConvShape& s, DType dtype) {
  constexpr int64_t kDilation = 1 << 16;
  const int64_t dilation = std::max(s.dilation_h, s.dilation_w);
  const bool steps = s.stride_h == s.stride_w && (s.stride_h == 1 ? dilation < kDilation : dilation == 1);
  // Places are counted in 31 bits, and so are the bytes from one column to the next.
  return map != Map::grad_weight && s.K == s.C && s.R == s.S && steps && has_window(s.R, s.stride_h) &&
         dense_channels(s) && dtype != DType::float64 && s.N * std::max(s.P * s.Q, s.H * s.W) < kNarrowLimit / 8 &&
         std::max(s.x.w, s.y.w) * s.dilation_w * element_size(dtype) < kNarrowLimit;
}

// ---- tiles

Plan depthwise_nhwc(Map map, const ConvShape& s, DType dtype, const Device& device, int64_t alignment) {
  NhwcCut cut;
  const Written out = written(map, s);
  const int64_t even = map == Map::grad_input ? s.stride_h : 1;  // grad_input of stride 2 walks in pairs of rows
  const int64_t phases = std::clamp<int64_t>(out.rows, 1, s.dilation_h);
  const int64_t phase_rows = std::max<int64_t>(ceil_div(out.rows, phases), 1);
  const int64_t tiles = s.N * phases * ceil_div(out.columns, nhwc_columns(static_cast<int>(s.stride_h)));
  // A block's time is its rows and those that it shares with others, each of vec * R * S products and what goes with
  // them. A multiprocessor works off `busy` blocks as fast as fewer (3x3 waits for memory, 7x7 for arithmetic), and
  // more than that one after the other. So problems that leave multiprocessors without work are cut into single rows,
  // and into single channels where that is clearly less.
  const Tuning& tuned = device.tuning();
  const double busy = tuned.nhwc_busy(s.R, s.stride_h);
  const int64_t shared = map == Map::forward ? s.R / s.stride_h : s.R;
  const bool pairs = whole_vectors(s, 2, dtype, alignment);
  double least = std::numeric_limits<double>::max();
  for (int vec = pairs ? 2 : 1; vec > 0; --vec) {
    const int64_t vectors = s.C / vec, lanes = nhwc_lanes(vectors), slots = kNhwcThreads / lanes;
    const double step =
        (static_cast<double>(vec * s.R * s.S) + tuned.nhwc_step) * (pairs && vec == 1 ? tuned.nhwc_single : 1);
    double load = 0;  // blocks of the fullest multiprocessor; with many of them it no longer matters how they come out
    for (int64_t strips = 1, last = 0; strips != last && load < 8 * busy;) {
      const int64_t rows = ceil_div(phase_rows, strips * even) * even;
      const int64_t blocks = ceil_div(vectors, lanes) * ceil_div(tiles * ceil_div(phase_rows, rows), slots);
      load = static_cast<double>(ceil_div(blocks, device.multiprocessors));
      const double time = static_cast<double>(rows + shared) * step * std::max(load, busy);
      if (time < least) least = time, cut = {vec, static_cast<int>(rows)};
      last = strips;
      strips = std::min(strips + std::max<int64_t>(strips / 3, 1), phase_rows);
    }
  }
  const char* reason =
      "depthwise 3x3, 5x5 or 7x7, channels dense but odd or not aligned in pairs, stride 1 or 2: every row read once";
  if (cut.vec == 2) {
    reason = "depthwise 3x3, 5x5 or 7x7, channels dense, stride 1 or 2: every row read once";
  } else if (pairs) {
    reason =
        "depthwise 3x3, 5x5 or 7x7, channels dense, stride 1 or 2, too few for pairs of channels to fill the GPU: "
        "every row read once";
  }
  return {Kernel::depthwise_nhwc, "cuda_depthwise_nhwc", reason, cut, 0};
}

// Of the ways to deal an image to blocks of up to four warps, the one with the least time by a simple reckoning: a warp
// takes one unit for a step, part of one for a row that its strip shares with the next, and a few to begin with; twelve
// warps keep a multiprocessor busy, and fewer take as long. Idle lanes, last blocks and waves show as what they cost.
Plan depthwise_nchw(Map map, const ConvShape& s, DType dtype, const Device& device) {
  const Tuning& tuned = device.tuning();
  NchwCut cut;
  const NchwWork work = nchw_work(map, s);
  const bool dense_planes = (s.C == 1 || s.x.c == s.H * s.W) && (s.K == 1 || s.y.c == s.P * s.Q);
  const double begin = s.R == 3 ? tuned.nchw_begin_3 : tuned.nchw_begin,
               shared = tuned.nchw_shared * static_cast<double>(s.R - 1) / static_cast<double>(s.stride_h);
  // All numbers fit in 31 bits (depthwise_nchw_can_run), and a division of 64 is several times slower: this is done at
  // every call.
  const auto parts = [](int64_t size, int64_t part) -> int64_t {
    return (static_cast<uint32_t>(size) + static_cast<uint32_t>(part) - 1) / static_cast<uint32_t>(part);
  };
  const auto evenly = [&](int64_t size, int64_t most) { return parts(size, parts(size, most)); };
  const auto shared_bytes = static_cast<int32_t>(tuned.shared_kb * 1024);
  double best = 0;
  bool full = false;  // the best so far keeps every multiprocessor busy
  const auto consider = [&](int64_t rows, int64_t strips, int64_t planes) {
    const int64_t bytes = nchw_memory(work, s, dtype, rows * strips, planes).bytes();
    if (bytes > kMostShared) return;
    const int64_t warps = parts(planes * strips * work.runs, 32);
    const int64_t blocks = s.N * parts(work.channels, planes) * parts(work.steps, rows * strips);
    const double resident =
        std::min(static_cast<double>(shared_bytes / static_cast<int32_t>(bytes + 1024) * warps), tuned.nchw_busy);
    const auto share = static_cast<double>(parts(blocks, device.multiprocessors) * warps);  // of a multiprocessor
    const double warp = begin + static_cast<double>(rows) + (rows < work.steps ? shared : 0);
    const double time = warp * std::max(share / resident, 1.);
    if (best != 0 && time >= best) return;
    best = time, full = share >= resident;
    cut = {static_cast<int>(rows), static_cast<int>(strips), static_cast<int>(planes)};
  };
  int64_t last = 0;
  for (const int64_t most : {14, 10, 7, 5, 3, 1}) {
    if (most < 7 && full) break;
    const int64_t rows = evenly(work.steps, most), strips = parts(work.steps, rows);
    if (rows == last) continue;
    last = rows;
    for (int64_t lanes = 32; lanes <= 128; lanes += 32) {
      const bool whole = dense_planes && 2 * strips * work.runs <= lanes;  // several planes to a block
      if (whole) consider(rows, strips, evenly(work.channels, lanes / static_cast<int32_t>(strips * work.runs)));
      if (!whole) consider(rows, evenly(strips, std::max<int64_t>(lanes / static_cast<int32_t>(work.runs), 1)), 1);
    }
  }
  return {Kernel::depthwise_nchw, "cuda_depthwise_nchw", "depthwise, rows without gaps, 3x3, 5x5 or 7x7, stride 1 or 2",
          cut, 0};
}

// Rows follow each other without gaps, in what is read and in what is written.
bool dense_rows(const ConvShape& s) { return has_dense_rows(input_image(s)) && has_dense_rows(output_image(s)); }

Plan depthwise_direct(Map map, const ConvShape& s, DType dtype, int64_t alignment, bool narrow) {
  const Written out = written(map, s);
  const int vec16 = static_cast<int>(16 / element_size(dtype));
  const int vec = whole_vectors(s, vec16, dtype, alignment) ? vec16 : 1;
  // Threads are counted in 31 bits too: four rows each, of every phase the last perhaps in part.
  const int64_t threads = s.N * (out.channels / vec) * (out.rows / 4 + s.stride_h + 1) * out.columns;
  const bool wide = !narrow || threads >= kNarrowLimit;
  return {Kernel::depthwise_direct, "cuda_depthwise_direct",
          "depthwise of any kernel, stride, dilation, multiplier and memory layout", DirectCut{wide ? 1 : vec, wide},
          0};
}

// Neighbouring outputs lie side by side, and read the same channel or neighbours.
bool outputs_dense(const ConvShape& s) { return s.K > 1 && s.y.c == 1 && (s.C == 1 || s.x.c == 1); }

void cut_rows(Plan& p, int vec, const ConvShape& s, int64_t chunks, int64_t places, int64_t blocks) {
  GradWeightRows cut = grad_weight_rows(chunks, places, s.P, blocks);
  // A part that ends within an image leaves rows for the next to repeat: all of them, if the kernel is as tall.
  if (const int64_t whole = cut.rows / s.P * s.P;
      p.kernel == Kernel::depthwise_grad_weight_nchw && whole > 0 && s.R >= s.P) {
    cut = {static_cast<int>(whole), static_cast<int>(ceil_div(places * s.P, whole))};
  }
  p.cut = GradWeightRowsCut{vec, cut.rows, cut.splits};
  if (cut.splits > 1) p.workspace_bytes = cut.splits * s.weight_elements() * acc_size(DType::float32);
}

// About so many blocks for each multiprocessor of a large GPU.
int64_t sum_blocks(double each) { return static_cast<int64_t>(each * static_cast<double>(kSumMultiprocessors)); }

Plan depthwise_grad_weight_nhwc(const ConvShape& s, DType dtype, const Tuning& tuned, int64_t alignment) {
  Plan p{Kernel::depthwise_grad_weight_nhwc,
         "cuda_depthwise_grad_weight_nhwc",
         "depthwise, channels dense, 3x3, 5x5 or 7x7, stride 1 or 2: every tap in one pass",
         {},
         0};
  const GradWeightNhwc block = grad_weight_nhwc_block(s);
  const int vec16 = static_cast<int>(16 / element_size(dtype));
  const bool whole = whole_vectors(s, vec16, dtype, alignment) && near_images(s, block.images * (32 / block.lanes));
  cut_rows(p, whole ? vec16 : 1, s, block.chunks, block.places,
           sum_blocks(s.R == 7 ? tuned.grad_weight_nhwc_7 : tuned.grad_weight_nhwc));
  return p;
}

Plan depthwise_grad_weight_nchw(const ConvShape& s, DType dtype, const Tuning& tuned, int64_t alignment) {
  Plan p{Kernel::depthwise_grad_weight_nchw,
         "cuda_depthwise_grad_weight_nchw",
         "depthwise, 3x3, 5x5 or 7x7, stride 1 or 2: every tap in one pass",
         {},
         0};
  const bool pieces = s.K == s.C && alignment % 16 == 0 && dense_rows(s);
  const int vec = pieces ? static_cast<int>(16 / element_size(dtype)) : 1;
  cut_rows(p, vec, s, grad_weight_nchw_block(s, dtype).chunks, s.N,
           sum_blocks(s.R == 7 ? tuned.grad_weight_nchw_7 : tuned.grad_weight_nchw));
  return p;
}

Plan depthwise_grad_weight_nhwc_mma(const ConvShape& s, const Tuning& tuned) {
  Plan p{
      Kernel::depthwise_grad_weight_nhwc_mma,
      "cuda_depthwise_grad_weight_nhwc_mma",
      "depthwise up to 7x7 in a half type, stride 1, whole vectors of channels: every tap in one pass, on tensor cores",
      {},
      0};
  const MmaBlock block = grad_weight_mma_block(s);
  cut_rows(p, 1, s, block.slices, block.image_groups * block.column_tiles,
           static_cast<int64_t>(tuned.grad_weight_nhwc_mma) / block.groups * kSumMultiprocessors);
  return p;
}

Plan depthwise_grad_weight_in_passes(const ConvShape& s, DType dtype, int64_t alignment) {
  constexpr int64_t kThreads = 256;
  GradWeightCut cut;
  cut.vec = whole_vectors(s, 2, dtype, alignment) ? 2 : 1;
  const int64_t vectors = s.K / cut.vec;
  // Strips are as tall as 2^17 columns' worth of threads allow, and at least four rows.
  const int64_t strips = std::clamp<int64_t>((int64_t{1} << 17) / std::max<int64_t>(s.N * s.Q * vectors, 1), 1,
                                             std::max<int64_t>(s.P / 4, 1));
  cut.rows = static_cast<int>(ceil_div(s.P, strips));
  const int64_t places = s.N * ceil_div(s.P, cut.rows) * s.Q;
  if (s.y.c == 1 && s.K > 1) {
    cut.lanes = static_cast<int>(ceil_div(vectors, ceil_div(vectors, 32)));
  } else {
    int64_t slots = 32;
    while (slots < kThreads && slots < places) slots *= 2;
    cut.lanes = static_cast<int>(kThreads / slots);
  }
  const int64_t passes = s.R * ceil_div(s.S, 8);
  const int64_t slots = kThreads / cut.lanes;
  const int64_t wanted = grad_weight_splits(2 * ceil_div(vectors, cut.lanes) * passes, places, slots);
  // Every slot has the same number of places, but for the last few.
  cut.splits = static_cast<int>(ceil_div(places, slots * std::max<int64_t>(places / (wanted * slots), 1)));
  return {Kernel::depthwise_grad_weight, "cuda_depthwise_grad_weight",
          "depthwise of any kernel: up to eight taps of a kernel row in a pass", cut,
          cut.splits * s.weight_elements() * acc_size(dtype)};
}

Plan depthwise_grad_weight(const ConvShape& s, DType dtype, const Device& device, int64_t alignment) {
  if (whole_vectors(s, 4, dtype, alignment) && nhwc_mma_can_run(s, dtype, device)) {
    return depthwise_grad_weight_nhwc_mma(s, device.tuning());
  }
  if (window(s) && dtype != DType::float64) {
    if (outputs_dense(s)) return depthwise_grad_weight_nhwc(s, dtype, device.tuning(), alignment);
    if (s.Q <= kGradWeightColumns * kGradWeightThreads)
      return depthwise_grad_weight_nchw(s, dtype, device.tuning(), alignment);
  }
  return depthwise_grad_weight_in_passes(s, dtype, alignment);
}

}  // namespace

bool depthwise_nchw_can_run(Map map, const ConvShape& s, DType dtype) {
  const NchwWork work = nchw_work(map, s);
  return window(s) && dense_rows(s) && has_dense_filters(s) && dtype != DType::float64 &&
         (map == Map::forward || s.K == s.C) && nchw_memory(work, s, dtype, 1, 1).bytes() <= kMostShared &&
         work.channels * work.steps * work.runs > 0 && s.N * work.channels * work.steps < kNarrowLimit - 1;  // blocks
}

std::vector<Plan> depthwise_plans(Map map, const ConvShape& s, DType dtype, const Device& device, int64_t alignment) {
  const bool narrow = narrow_images(s);
  if (!narrow) return {plan_depthwise(map, s, dtype, device, alignment)};
  std::vector<Plan> plans = depthwise_tensor_core_plans(map, s, dtype, device, alignment);
  if (large_can_run(map, s, device)) plans.push_back(plan_depthwise_large(map, s, dtype, device));
  const bool eights = whole_vectors(s, map == Map::grad_weight ? 4 : 8, dtype, alignment);
  const bool mma = eights && nhwc_mma_can_run(s, dtype, device);
  if (map == Map::grad_weight) {
    const Tuning& tuned = device.tuning();
    if (mma) plans.push_back(depthwise_grad_weight_nhwc_mma(s, tuned));
    const bool one_pass = window(s) && dtype != DType::float64;
    if (one_pass && outputs_dense(s)) plans.push_back(depthwise_grad_weight_nhwc(s, dtype, tuned, alignment));
    if (one_pass && !outputs_dense(s) && s.Q <= kGradWeightColumns * kGradWeightThreads) {
      plans.push_back(depthwise_grad_weight_nchw(s, dtype, tuned, alignment));
    }
    plans.push_back(depthwise_grad_weight_in_passes(s, dtype, alignment));
    return plans;
  }
  if (mma) plans.push_back(plan_depthwise_nhwc_mma(map, s, device));
  if (nhwc_can_run(map, s, dtype)) {
    if (const auto p = plan_depthwise_nhwc_tma(map, s, dtype, device, alignment)) plans.push_back(*p);
    plans.push_back(depthwise_nhwc(map, s, dtype, device, alignment));
  }
  if (depthwise_nchw_can_run(map, s, dtype)) plans.push_back(depthwise_nchw(map, s, dtype, device));
  plans.push_back(depthwise_direct(map, s, dtype, alignment, narrow));
  return plans;
}

Plan plan_depthwise(Map map, const ConvShape& s, DType dtype, const Device& device, int64_t alignment) {
  const bool narrow = narrow_images(s);
  if (Plan p; narrow && plan_depthwise_tensor_cores(p, map, s, dtype, device, alignment)) return p;
  const bool large = narrow && large_can_run(map, s, device);
  if (map == Map::grad_weight) {
    if (!narrow || s.N * s.P * s.Q >= kNarrowLimit - (1 << 20)) {
      return plan_grouped(map, s, dtype, "depthwise, an image of 2^31 elements or more");
    }
    const Plan p = depthwise_grad_weight(s, dtype, device, alignment);
    return large && p.kernel == Kernel::depthwise_grad_weight ? plan_depthwise_large(map, s, dtype, device) : p;
  }
  if (narrow && whole_vectors(s, 8, dtype, alignment) && nhwc_mma_can_run(s, dtype, device)) {
    return plan_depthwise_nhwc_mma(map, s, device);
  }
  if (narrow && nhwc_can_run(map, s, dtype)) {
    if (const auto p = plan_depthwise_nhwc_tma(map, s, dtype, device, alignment)) return *p;
    return depthwise_nhwc(map, s, dtype, device, alignment);
  }
  if (narrow && depthwise_nchw_can_run(map, s, dtype)) return depthwise_nchw(map, s, dtype, device);
  if (large) return plan_depthwise_large(map, s, dtype, device);
  return depthwise_direct(map, s, dtype, alignment, narrow);
}

}  // namespace sepconv::cuda
