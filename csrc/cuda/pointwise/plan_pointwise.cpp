// 1x1 of one group: the products of this folder, or torch's. The limits are predictions
// (benchmarks/notes/pointwise.md).
#include <algorithm>
#include <optional>

#include "core/activation.h"
#include "cuda/plan_parts.h"

namespace sepconv::cuda {
namespace {

// Operations for each byte that pointwise.cu can stand in float32: from here on it waits for its arithmetic, at about
// half of the rate that torch's product has, and below it both wait for memory.
constexpr int64_t kPlainOperations = 10;
// Channels that are summed, from which few tiles wait for one long sum, which torch's product splits.
constexpr int64_t kLongSum = 128;

bool is_matrix_product(const ConvShape& s) { return s.stride_h == 1 && s.stride_w == 1 && s.H == s.P && s.W == s.Q; }

// Multiplications and additions, and the bytes of each operand once.
int64_t operations(const ConvShape& s) { return 2 * s.N * s.P * s.Q * s.C * s.K; }
int64_t bytes(const ConvShape& s, DType dtype) {
  return (s.N * s.P * s.Q * (s.C + s.K) + s.C * s.K) * element_size(dtype);
}

// A product of torch's. As a matrix product on views it adds the bias on its way, which its convolution does in a pass
// of its own; the pixels must follow each other in both images. Products of float32 have a TF32 flag of their own.
Plan torchs(Map map, const ConvShape& s, DType dtype, const char* reason) {
  const bool pixels = is_dense(Layout::nhwc, input_image(s)) && is_dense(Layout::nhwc, output_image(s));
  if (map != Map::forward || !is_half(dtype) || !is_matrix_product(s) || !pixels) return aten(reason);
  return {Kernel::pointwise_matmul, "cuda_pointwise_matmul", reason, {}, 0};
}

// ---- pointwise_nhwc_mma.cu

// From that many operations a byte the tensor cores of mma.sync are slower than torch's, which are newer.
constexpr int64_t kMostOperations = 80;
// Operations in the time of a byte, of an H200 with 4.3 TB/s: 430 TFLOPS here, of 480 that mma.sync has at most, and
// 600 of torch's product. Both are guesses.
constexpr double kOwnOperations = 100, kTorchsOperations = 140;
// What all blocks read and write, through L2, over what there is: blocks of other outputs read the same pixels again.
// L2 gives about 1.3 times what memory does.
constexpr double kMostTraffic = 1.3;
// Channels that one block may sum where there are fewer blocks than multiprocessors.
constexpr int64_t kAloneSum = 256;
constexpr int64_t kBlocksByRegisters = 2;
constexpr double kBlockBegins = 0.5;  // in tiles: its weights, and the first wait
// Of two blocks of a multiprocessor one stores what the other's products do not wait for: fewer have to gain that much.
constexpr double kWorthLonely = 0.95;

struct Channels {
  int64_t depth, outputs;     // summed; written
  int64_t w_depth, w_output;  // strides of the weight
};
Channels channels(Map map, const ConvShape& s) {
  return map == Map::forward ? Channels{s.C, s.K, s.w.c, s.w.n} : Channels{s.K, s.C, s.w.n, s.w.c};
}

bool nhwc_mma_can_run(Map map, const ConvShape& s, DType dtype, const Device& device, int64_t alignment) {
  const auto whole = [](int64_t channels, int64_t N, int64_t rows, int64_t columns, const Strides& t) {
    const auto multiple = [](int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; };
    return channels % 8 == 0 && t.c == 1 && multiple(N, t.n) && multiple(rows, t.h) && multiple(columns, t.w);
  };
  if (!is_half(dtype) || device.compute_capability < 80 || alignment < 16 || !whole(s.C, s.N, s.H, s.W, s.x) ||
      !whole(s.K, s.N, s.P, s.Q, s.y)) {
    return false;
  }
  if (map == Map::grad_weight) return true;
  const Channels c = channels(map, s);
  const bool weight = (c.w_depth == 1 && c.w_output % 8 == 0) || (c.w_output == 1 && c.w_depth % 8 == 0);
  return weight && product_bytes(c.depth, 32) <= kMostShared;
}

int64_t chunks(const Channels& c, int64_t outputs) { return ceil_div(c.outputs, outputs); }
int64_t pixel_tiles(const ConvShape& s) { return ceil_div<int64_t>(s.N * s.P * s.Q, kProductPixels); }

// As few chunks of outputs as shared memory allows, and in them as few outputs that do not exist; more where that
// leaves multiprocessors without a block. Blocks share the tiles evenly, as many of them as reside, or fewer where that
// leaves the busiest multiprocessor less to do.
ProductCut nhwc_mma_cut(Map map, const ConvShape& s, const Device& device) {
  const Channels c = channels(map, s);
  const int64_t tiles = pixel_tiles(s);
  ProductCut cut;
  for (const int outputs : {64, 96, 128}) {
    const bool fills = tiles * chunks(c, outputs) >= device.multiprocessors;
    if (product_bytes(c.depth, outputs) > kMostShared || chunks(c, outputs) >= chunks(c, cut.outputs) || !fills)
      continue;
    cut.outputs = outputs;
  }
  const int64_t resident =
      std::clamp<int64_t>(device.tuning().blocks(product_bytes(c.depth, cut.outputs)), 1, kBlocksByRegisters);
  double least = 0;
  for (int64_t each = resident; each >= 1; --each) {
    const int64_t most = std::max<int64_t>(each * device.multiprocessors / chunks(c, cut.outputs), 1);
    const int64_t of_a_block = ceil_div(tiles, std::min(most, tiles)), blocks = ceil_div(tiles, of_a_block);
    const auto busiest =
        static_cast<double>(ceil_div<int64_t>(blocks * chunks(c, cut.outputs), device.multiprocessors));
    const double time = busiest * (static_cast<double>(of_a_block) + kBlockBegins);
    if (least == 0 || time < kWorthLonely * least) least = time, cut.blocks = static_cast<int>(blocks);
  }
  return cut;
}

constexpr const char* kBoundByArithmetic =
    "1x1 bound by arithmetic: torch's product is predicted to be faster (not measured)";
constexpr const char* kReadAgain =
    "1x1 of so many channels that pixels would be read again: torch's product is predicted to be faster (not measured)";

// Reads and writes of the result in passes of their own, behind torch's product: of a residual two reads and a write,
// of an activation a read and a write. ReLU alone that product does on its way.
int passes(const Finish& finish) {
  if (finish.residual) return finish.activation == Activation::identity ? 3 : 5;
  return finish.activation == Activation::identity || finish.activation == Activation::relu ? 0 : 2;
}

// Whether the kernel here is predicted to be faster than torch's product and its passes, both counted in bytes of
// memory: the longer of arithmetic and traffic.
bool faster_than_passes(const ConvShape& s, DType dtype, const ProductCut& cut, const Finish& finish) {
  const int64_t pixels = s.N * s.P * s.Q, written = pixels * s.K * element_size(dtype);
  const int64_t reads = chunks({s.C, s.K, 0, 0}, cut.outputs) * pixels * s.C * element_size(dtype);
  const auto arithmetic = static_cast<double>(operations(s));
  const auto through_l2 = static_cast<double>(reads + (finish.residual ? 2 : 1) * written);
  const double here = std::max(arithmetic / kOwnOperations, through_l2 / kMostTraffic);
  const double torchs = std::max(arithmetic / kTorchsOperations, static_cast<double>(bytes(s, dtype)));
  return here < torchs + passes(finish) * static_cast<double>(written);
}

// Why torch's product is predicted to be faster; null where it is not.
const char* torch_instead_of_nhwc_mma(Map map, const ConvShape& s, DType dtype, const ProductCut& cut,
                                      const Device& device, const Finish& finish) {
  const Channels c = channels(map, s);
  const int64_t parts = chunks(c, cut.outputs);
  const bool few = pixel_tiles(s) * parts < device.multiprocessors && c.depth > kAloneSum;
  const bool apart = map == Map::forward && passes(finish) > 0;
  if (!few && apart && faster_than_passes(s, dtype, cut, finish)) return nullptr;
  if (operations(s) > kMostOperations * bytes(s, dtype)) {
    return kBoundByArithmetic;
  }
  if (static_cast<double>(parts * c.depth + c.outputs) > kMostTraffic * static_cast<double>(c.depth + c.outputs)) {
    return kReadAgain;
  }
  return few ? "1x1 of too few tiles to fill the GPU: torch's product splits its sums" : nullptr;
}

// The same of the gradient by the weight.
const char* torch_instead_of_nhwc_mma_sums(const ConvShape& s, DType dtype) {
  const ProductSumTiles tiles = product_sum_tiles(s);
  const int64_t more = std::max(s.C, s.K), fewer = std::min(s.C, s.K);
  if (operations(s) > kMostOperations * bytes(s, dtype)) return kBoundByArithmetic;
  const int64_t reads = more * tiles.across + fewer * tiles.down;
  return static_cast<double>(reads) > kMostTraffic * static_cast<double>(more + fewer) ? kReadAgain : nullptr;
}

}  // namespace

bool pointwise_can_run(Map map, const ConvShape& s) {
  // Padding at the bottom and the right alone does not show in pad_h and pad_w: every pixel read must exist.
  const bool inside = (s.P - 1) * s.stride_h < s.H && (s.Q - 1) * s.stride_w < s.W;
  return s.is_pointwise() && inside && s.N * s.H * s.W < kNarrowLimit &&
         (map != Map::grad_input || (s.stride_h == 1 && s.stride_w == 1));
}

Plan plan_pointwise(Map map, const ConvShape& s, DType dtype, const Device& device, int64_t alignment, bool strict,
                    const Finish& finish) {
  const bool nhwc_mma = nhwc_mma_can_run(map, s, dtype, device, alignment);
  if (nhwc_mma && map == Map::grad_weight) {
    const char* const reason = strict ? nullptr : torch_instead_of_nhwc_mma_sums(s, dtype);
    if (reason != nullptr) return torchs(map, s, dtype, reason);
    const SplitsCut cut{product_sum_splits(s)};
    return {Kernel::pointwise_nhwc_mma, "cuda_pointwise_nhwc_mma",
            "1x1 in a half type, whole vectors of channels: tensor cores, both images read once", cut,
            cut.splits * s.weight_elements() * acc_size(dtype)};
  }
  if (nhwc_mma) {
    const ProductCut cut = nhwc_mma_cut(map, s, device);
    const auto torchs_because = [&](const Finish& of) {
      return torch_instead_of_nhwc_mma(map, s, dtype, cut, device, of);
    };
    const char* const reason = strict ? nullptr : torchs_because(finish);
    if (reason != nullptr) return torchs(map, s, dtype, reason);
    const char* why = "1x1 in a half type, whole vectors of channels: tensor cores, weights kept in shared memory";
    if (!strict && torchs_because({}) != nullptr) {
      why = finish.residual ? "1x1 whose residual would be a pass behind torch's product: tensor cores, all in one"
                            : "1x1 whose activation would be a pass behind torch's product: tensor cores, both in one";
    }
    return {Kernel::pointwise_nhwc_mma, "cuda_pointwise_nhwc_mma", why, cut, 0};
  }
  if (!strict && is_half(dtype)) {
    return torchs(map, s, dtype, "1x1 in a half type: torch's product is predicted to be faster (not measured)");
  }
  if (!strict && dtype == DType::float32 && device.tf32) {
    return torchs(map, s, dtype, "1x1 where TF32 is allowed: torch's product is predicted to be faster (not measured)");
  }
  if (!strict && dtype == DType::float32 && operations(s) >= kPlainOperations * bytes(s, dtype)) {
    return torchs(map, s, dtype,
                  "1x1 bound by arithmetic in float32: torch's product is predicted to be faster (not measured)");
  }
  const int64_t tiles = ceil_div<int64_t>(s.N * s.P * s.Q, 64) * ceil_div<int64_t>(map == Map::forward ? s.K : s.C, 64);
  const int64_t sum = map == Map::forward ? s.C : s.K;
  if (!strict && dtype == DType::float32 && map != Map::grad_weight && tiles < device.multiprocessors &&
      sum > kLongSum) {
    return torchs(map, s, dtype, "1x1 of too few tiles to fill the GPU: torch's product splits its sums");
  }
  const bool mma = is_half(dtype) && device.compute_capability >= 80;
  Plan p{mma ? Kernel::pointwise_mma : Kernel::pointwise, mma ? "cuda_pointwise_mma" : "cuda_pointwise",
         mma ? "1x1, one group, a half type: a matrix product on tensor cores"
             : "1x1, one group: a matrix product over pixels",
         SplitsCut{}, 0};
  if (map == Map::grad_weight) {
    const SplitsCut cut{pointwise_grad_weight_splits(s)};
    p.cut = cut, p.workspace_bytes = cut.splits * s.weight_elements() * acc_size(dtype);
  }
  return p;
}

}  // namespace sepconv::cuda
