// Plans by hand: another kernel, another cut, and what there is to try. For sweeps (python -m benchmarks --sweep) and
// the emulator's tests; no call of an op comes here.
#include <iterator>
#include <stdexcept>

#include "cuda/grouped/cut.h"
#include "cuda/plan_parts.h"

namespace sepconv::cuda {
namespace {

struct Named {
  const char* name;  // as counted, after "cuda_" as tests and sweeps call it
  Cut cut;           // in which nothing is chosen
};

// In the order of Kernel.
const Named kNamed[] = {
    {"cuda_depthwise_nhwc", NhwcCut{}},
    {"cuda_depthwise_nhwc_mma", NhwcMmaCut{}},
    {"cuda_depthwise_nhwc_tma", NhwcTmaCut{}},
    {"cuda_depthwise_nchw", NchwCut{}},
    {"cuda_depthwise_nchw_mma", NchwMmaCut{}},
    {"cuda_depthwise_direct", DirectCut{}},
    {"cuda_depthwise_grad_weight", GradWeightCut{}},
    {"cuda_depthwise_grad_weight_nhwc", GradWeightRowsCut{}},
    {"cuda_depthwise_grad_weight_nhwc_mma", GradWeightRowsCut{}},
    {"cuda_depthwise_grad_weight_nchw", GradWeightRowsCut{}},
    {"cuda_depthwise_toeplitz", ToeplitzCut{}},
    {"cuda_depthwise_large", LargeCut{}},
    {"cuda_pointwise", SplitsCut{}},
    {"cuda_pointwise_mma", SplitsCut{}},
    {"cuda_pointwise_nhwc_mma", ProductCut{}},
    {"cuda_grouped", SplitsCut{}},
    {"cuda_grouped_nhwc_mma", GroupedMmaCut{}},
};
static_assert(std::size(kNamed) == static_cast<size_t>(Kernel::aten));
constexpr size_t kPrefix = 5;  // "cuda_"

// Partial sums of a grad_weight.
int64_t splits_of(const Cut& cut) {
  int64_t splits = 1;
  std::visit(
      [&](const auto& own) {
        own.each(own, [&](const std::string& name, auto value) {
          if (name == "splits") splits = static_cast<int64_t>(value);
        });
      },
      cut);
  return splits;
}

}  // namespace

Plan overruled(Plan p, Map map, const ConvShape& s, DType dtype, const std::string& kernel, const CutNumbers& numbers) {
  const int64_t planned_splits = splits_of(p.cut);
  if (!kernel.empty()) {
    size_t index = 0;
    while (index < std::size(kNamed) && kNamed[index].name + kPrefix != kernel) ++index;
    if (index == std::size(kNamed)) throw std::invalid_argument("kernel: there is none of the name '" + kernel + "'");
    p.kernel = static_cast<Kernel>(index), p.name = kNamed[index].name, p.reason = "chosen by hand";
    p.cut = kNamed[index].cut, p.copies = {};
    const bool sums = p.kernel == Kernel::pointwise_nhwc_mma || p.kernel == Kernel::grouped_nhwc_mma;
    if (sums && map == Map::grad_weight) p.cut = SplitsCut{};
  }
  CutNumbers unknown = numbers;
  std::visit(
      [&](auto& own) {
        own.each(own, [&](const std::string& name, auto& value) {
          if (const auto found = numbers.find(name); found != numbers.end()) {
            value = static_cast<std::remove_reference_t<decltype(value)>>(found->second);
          }
          unknown.erase(name);
        });
      },
      p.cut);
  if (!unknown.empty()) {
    throw std::invalid_argument("cut: " + std::string(p.name) + " has no number '" + unknown.begin()->first + "'");
  }
  if (kernel.empty() && splits_of(p.cut) == planned_splits) return p;  // with the workspace that the plan asked for
  if (map == Map::grad_weight) {
    p.workspace_bytes = splits_of(p.cut) * s.weight_elements() * acc_size(dtype);
  } else if (p.kernel == Kernel::grouped) {
    p.workspace_bytes = grouped_workspace_bytes(s, dtype, map == Map::grad_input);
  }
  return p;
}

namespace {

// Half as much, twice as much, and a few steps of the way there.
std::vector<int64_t> around(int64_t value, int64_t most) {
  std::vector<int64_t> found;
  for (const auto& [times, over] :
       {std::pair<int64_t, int64_t>{1, 4}, {1, 2}, {2, 3}, {1, 1}, {3, 2}, {2, 1}, {4, 1}}) {
    const int64_t next = std::clamp<int64_t>(value * times / over, 1, std::max<int64_t>(most, 1));
    if (std::find(found.begin(), found.end(), next) == found.end()) found.push_back(next);
  }
  return found;
}

// Heights of equal strips of `rows` rows, each a multiple of `whole`, or all rows.
std::vector<int64_t> strip_rows(int64_t rows, int64_t whole = 1) {
  std::vector<int64_t> found;
  for (const int64_t strips : {1, 2, 3, 4, 6, 8, 14, 28}) {
    const int64_t next = std::min(ceil_div(ceil_div(rows, strips), whole) * whole, std::max<int64_t>(rows, 1));
    if (std::find(found.begin(), found.end(), next) == found.end()) found.push_back(next);
  }
  return found;
}

// Cuts of one kernel beside its own choice.
class Cuts {
 public:
  Cuts(Map map, const ConvShape& s, DType dtype, const Plan& own, std::vector<Plan>& found)
      : map_(map), s_(s), dtype_(dtype), own_(own), found_(found), out_(written(map, s)) {}

  void operator()(const NhwcCut& cut) const {
    const int64_t whole = map_ == Map::grad_input ? s_.stride_h : 1;
    for (int64_t vec = 1; vec <= cut.vec; ++vec) {
      for (const int64_t rows : strip_rows(out_.rows, whole)) add({{"vec", vec}, {"rows", rows}});
    }
  }
  void operator()(const NhwcMmaCut& cut) const {
    const NhwcMmaBlock block = nhwc_mma_block(map_, s_);
    const auto places = [&](int64_t rows) {
      return block.image_groups * block.column_tiles * ceil_div(out_.rows, rows);
    };
    for (const int64_t rows : strip_rows(out_.rows)) {
      for (const int64_t splits : {int64_t{cut.splits}, 2 * int64_t{cut.splits}, places(rows)}) {
        add({{"rows", rows}, {"splits", std::min(splits, places(rows))}});
      }
    }
    for (const int64_t splits : around(cut.splits, places(cut.rows))) add({{"rows", cut.rows}, {"splits", splits}});
  }
  void operator()(const NhwcTmaCut& cut) const {
    for (const int64_t rows : strip_rows(out_.rows)) add({{"pairs", cut.pairs}, {"rows", rows}});
  }
  void operator()(const NchwCut&) const {
    const NchwWork work = nchw_work(map_, s_);
    const bool dense_planes = (s_.C == 1 || s_.x.c == s_.H * s_.W) && (s_.K == 1 || s_.y.c == s_.P * s_.Q);
    for (const int64_t most : {14, 10, 7, 5, 3, 1}) {
      const int64_t rows = even_rows(work.steps, most), strips = ceil_div(work.steps, rows);
      for (int64_t lanes = 32; lanes <= 128; lanes += 32) {
        const bool whole = dense_planes && 2 * strips * work.runs <= lanes;
        const int64_t planes = whole ? even_rows(work.channels, lanes / (strips * work.runs)) : 1;
        const int64_t held = whole ? strips : even_rows(strips, std::max<int64_t>(lanes / work.runs, 1));
        if (nchw_memory(work, s_, dtype_, rows * held, planes).bytes() > kMostShared) continue;
        add({{"rows", rows}, {"strips", held}, {"planes", planes}});
      }
    }
  }
  void operator()(const NchwMmaCut& cut) const {
    const auto consider = [&](int64_t rows, int64_t images) {
      NchwMmaCut tried = cut;
      tried.rows = static_cast<int>(rows), tried.images = static_cast<int>(images);
      const NchwMmaBlock block = nchw_mma_block(map_, s_, tried);
      if (!block.possible || block.smem_bytes > kMostShared || !near_images(s_, images)) return;
      const int64_t places = ceil_div(std::max<int64_t>(s_.N, 1), images) * ceil_div(image_rows(), rows);
      for (const int64_t splits : {int64_t{cut.splits} / 2, int64_t{cut.splits}, 2 * int64_t{cut.splits}, places}) {
        add({{"vec", cut.vec}, {"rows", rows}, {"images", images}, {"splits", std::clamp<int64_t>(splits, 1, places)}});
      }
    };
    for (const int64_t rows : strip_rows(image_rows(), kNchwMmaPhases)) consider(rows, 1);
    for (const int64_t images : {2, 4, 8}) {
      if (images <= s_.N) consider(image_rows(), images);
    }
  }
  void operator()(const ToeplitzCut& cut) const {
    for (const int64_t rows : around(cut.rows, cut.rows)) {
      for (const int64_t images : rows < cut.rows ? std::vector<int64_t>{1} : around(cut.images, cut.images)) {
        const int64_t places = ceil_div(s_.N, images) * ceil_div(image_rows(), rows);
        for (const int64_t splits : {int64_t{cut.splits} / 2, int64_t{cut.splits}, 2 * int64_t{cut.splits}}) {
          add({{"vec", cut.vec},
               {"rows", rows},
               {"images", images},
               {"splits", std::clamp<int64_t>(splits, 1, places)}});
        }
      }
    }
  }
  void operator()(const LargeCut& cut) const {
    const Correlation c = correlation(map_, s_);
    for (const int64_t rows : around(cut.rows, map_ == Map::grad_weight ? s_.P : out_.rows)) {
      for (const int64_t planes : around(cut.planes, 64)) {
        LargeCut tried = cut;
        tried.planes = static_cast<int>(planes);
        tried.rows = static_cast<int>(map_ == Map::grad_weight ? rows : ceil_div<int64_t>(rows, cut.keep) * cut.keep);
        const LargeBlock block = large_block(c, tried, acc_size(dtype_));
        if (block.images < 1 || block.channels < 1 || block.threads > kLargeThreads || block.smem_bytes > kMostShared) {
          continue;
        }
        add({{"keep", cut.keep},
             {"rows", tried.rows},
             {"planes", planes},
             {"parts", cut.parts},
             {"splits", cut.splits}});
      }
    }
  }
  void operator()(const GradWeightRowsCut& cut) const {
    const int64_t total = sum_places() * s_.P;
    for (const int64_t splits : around(cut.splits, total / 4)) {
      const int64_t rows = splits == cut.splits ? cut.rows : ceil_div(total, splits);
      add({{"vec", cut.vec}, {"rows", rows}, {"splits", ceil_div(total, rows)}});
    }
  }
  void operator()(const ProductCut& cut) const {
    const bool forward = map_ == Map::forward;
    const int64_t depth = forward ? s_.C : s_.K, outputs = forward ? s_.K : s_.C;
    const int64_t tiles = ceil_div<int64_t>(s_.N * s_.P * s_.Q, kProductPixels);
    for (const int64_t wide : {32, 64, 96, 128}) {
      if (product_bytes(depth, wide) > kMostShared || wide - 32 >= outputs) continue;
      const int64_t own =
          ceil_div<int64_t>(tiles * ceil_div(outputs, wide), cut.blocks * ceil_div<int64_t>(outputs, cut.outputs));
      for (const int64_t each : {int64_t{1}, int64_t{2}, own - 1, own, own + 1, 2 * own}) {  // tiles of a block
        add({{"outputs", wide}, {"blocks", ceil_div(tiles, std::clamp<int64_t>(each, 1, tiles))}});
      }
    }
  }
  void operator()(const GroupedMmaCut& cut) const {
    const int64_t most_tiles = map_ == Map::forward && s_.stride_h == 2 ? 2 : 4;
    for (int64_t tiles = 1; tiles <= most_tiles; ++tiles) {
      for (const int64_t pairs : {1, 2}) {
        GroupedMmaCut tried;
        tried.tiles = static_cast<int>(tiles), tried.pairs = static_cast<int>(pairs);
        const GroupedMmaTile t = grouped_mma_tile(map_, s_, tried);
        const int64_t columns = ceil_div<int64_t>(t.across, 16 * tiles), steps = ceil_div(t.down, pairs);
        if (t.bytes > kMostShared || 16 * (tiles - 1) >= t.across || pairs > t.down) continue;
        for (const int64_t rows : strip_rows(steps)) {
          const int64_t strips = ceil_div(steps, rows), items = s_.N * columns * strips;
          for (const int64_t blocks : {int64_t{cut.blocks}, items}) {
            const int64_t shared = ceil_div(items, ceil_div(items, std::min<int64_t>(blocks, items)));
            add({{"pairs", pairs}, {"tiles", tiles}, {"strips", strips}, {"blocks", shared}});
          }
        }
      }
    }
  }
  void operator()(const SplitsCut& cut) const {
    if (map_ != Map::grad_weight) return;
    for (const int64_t splits : around(cut.splits, s_.N * s_.P * s_.Q / 64)) add({{"splits", splits}});
  }
  template <typename Other>
  void operator()(const Other&) const {}

 private:
  // Of what GradWeightRowsCut counts rows.
  int64_t sum_places() const {
    if (own_.kernel == Kernel::depthwise_grad_weight_nchw) return s_.N;
    if (own_.kernel == Kernel::depthwise_grad_weight_nhwc) return grad_weight_nhwc_block(s_).places;
    const MmaBlock block = grad_weight_mma_block(s_);
    return block.image_groups * block.column_tiles;
  }

  int64_t image_rows() const { return map_ == Map::grad_weight ? s_.P : out_.rows; }

  void add(const CutNumbers& numbers) const {
    const Plan made = overruled(own_, map_, s_, dtype_, own_.name + kPrefix, numbers);
    const auto same = [&](const Plan& p) {
      return p.kernel == made.kernel && explain(map_, p).tile == explain(map_, made).tile;
    };
    if (std::none_of(found_.begin(), found_.end(), same)) found_.push_back(made);
  }

  const Map map_;
  const ConvShape& s_;
  const DType dtype_;
  const Plan& own_;
  std::vector<Plan>& found_;
  const Written out_;
};

}  // namespace

std::vector<Plan> alternatives(Map map, const ConvShape& s, DType dtype, const Device& device, int64_t alignment) {
  std::vector<Plan> found{plan(map, s, dtype, device, alignment, /*strict=*/true)};
  if (found[0].copies.any()) return found;
  if (!s.is_depthwise()) {
    if (found[0].kernel == Kernel::aten) return found;
    const Plan own = found[0];
    std::visit(Cuts(map, s, dtype, own, found), own.cut);
    const bool sums = map == Map::grad_weight;
    CutNumbers general;
    if (own.kernel == Kernel::pointwise_nhwc_mma) {
      if (sums) general = {{"splits", pointwise_grad_weight_splits(s)}};
      found.push_back(overruled(own, map, s, dtype, "pointwise_mma", general));
    } else if (own.kernel == Kernel::grouped_nhwc_mma) {
      if (sums) general = {{"splits", grouped_grad_weight_splits(s)}};
      found.push_back(overruled(own, map, s, dtype, "grouped", general));
    }
    return found;
  }
  for (const Plan& own : depthwise_plans(map, s, dtype, device, alignment)) {
    if (own.kernel != found[0].kernel) {
      found.push_back(own);
    } else {
      std::visit(Cuts(map, s, dtype, own, found), own.cut);
    }
  }
  return found;
}

}  // namespace sepconv::cuda
