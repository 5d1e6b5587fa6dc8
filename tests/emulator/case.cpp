#include "case.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "tensor.h"

namespace emulator {

using sepconv::Activation;
using sepconv::ConvShape;
using sepconv::DType;
using sepconv::Map;

namespace {

template <size_t kCount>
int index_of(const char* const (&names)[kCount], const std::string& name) {
  for (size_t i = 0; i < kCount; ++i) {
    if (names[i] == name) return static_cast<int>(i);
  }
  throw std::invalid_argument("unknown name " + name);
}

}  // namespace

Arguments::Arguments(const std::vector<std::string>& words) {
  for (const std::string& word : words) {
    const size_t equals = word.find('=');
    if (equals == std::string::npos) throw std::invalid_argument("expected key=value, not " + word);
    values_[word.substr(0, equals)] = word.substr(equals + 1);
  }
}

std::string Arguments::text(const std::string& key, const std::string& otherwise) const {
  const auto found = values_.find(key);
  return found == values_.end() ? otherwise : found->second;
}

int64_t Arguments::number(const std::string& key, int64_t otherwise) const {
  return std::stoll(text(key, std::to_string(otherwise)));
}

std::vector<int64_t> Arguments::numbers(const std::string& key, const std::string& otherwise, char separator) const {
  std::istringstream in(text(key, otherwise));
  std::vector<int64_t> list;
  for (std::string part; std::getline(in, part, separator);) list.push_back(std::stoll(part));
  return list;
}

Case read_case(const Arguments& a) {
  Case c{};
  static constexpr const char* kMaps[] = {"forward", "grad_input", "grad_weight"};
  c.map = static_cast<Map>(index_of(kMaps, a.text("map", "forward")));
  static constexpr const char* kDTypes[] = {"float32", "float64", "float16", "bfloat16"};
  c.dtype = static_cast<DType>(index_of(kDTypes, a.text("dtype", "float32")));
  c.activation = static_cast<Activation>(index_of(sepconv::kActivationNames, a.text("activation", "identity")));
  c.padding_mode =
      static_cast<sepconv::PaddingMode>(index_of(sepconv::kPaddingModeNames, a.text("padding_mode", "zeros")));
  c.bias = a.number("bias", 0);
  c.spatial = a.text("op", "conv2d") == "spatial_separable";
  c.shared_column = a.number("shared", 0) & 1, c.shared_row = a.number("shared", 0) & 2;
  c.offset = a.number("offset", 0);
  ConvShape& s = c.shape;
  s.N = a.number("N", 1), s.C = a.number("C", 1), s.H = a.number("H", 1), s.W = a.number("W", 1);
  s.K = a.number("K", 1), s.R = a.number("R", 1), s.S = a.number("S", 1), s.groups = a.number("groups", 1);
  const auto stride = a.numbers("stride", "1,1"), dilation = a.numbers("dilation", "1,1");
  const auto padding = a.numbers("padding", "0,0,0,0");  // top, bottom, left, right
  s.stride_h = stride.at(0), s.stride_w = stride.at(1);
  s.dilation_h = dilation.at(0), s.dilation_w = dilation.at(1);
  s.pad_h = padding.at(0), s.pad_w = padding.at(2);
  s.P = (s.H + padding.at(0) + padding.at(1) - s.dilation_h * (s.R - 1) - 1) / s.stride_h + 1;
  s.Q = (s.W + padding.at(2) + padding.at(3) - s.dilation_w * (s.S - 1) - 1) / s.stride_w + 1;
  const std::string layout = a.text("layout", "contiguous");
  s.x = make_strides({s.N, s.C, s.H, s.W}, layout);
  s.y = make_strides({s.N, s.K, s.P, s.Q}, a.text("y_layout", layout));
  s.w = make_strides({s.K, s.channels_per_group(), s.R, s.S}, a.text("w_layout", "contiguous"));
  return c;
}

Case read_pointwise(const Arguments& a, const Case& depthwise) {
  const ConvShape& d = depthwise.shape;
  Case c = depthwise;
  c.bias = a.number("pointwise_bias", 0);
  c.activation =
      static_cast<Activation>(index_of(sepconv::kActivationNames, a.text("pointwise_activation", "identity")));
  ConvShape& s = c.shape;
  s = {};
  s.N = d.N, s.C = d.K, s.H = s.P = d.P, s.W = s.Q = d.Q, s.K = a.number("outputs", 1), s.R = s.S = 1;
  s.x = d.y;
  s.y = make_strides({s.N, s.K, s.P, s.Q}, a.text("y_layout", a.text("layout", "contiguous")));
  s.w = make_strides({s.K, s.C, 1, 1}, a.text("w_layout", "contiguous"));
  return c;
}

bool is_separable(const Arguments& a) { return a.text("op", "conv2d") == "separable"; }

static sepconv::cuda::Device make_device(const Arguments& a) {
  const int sm = static_cast<int>(a.number("sm", 90));
  return {static_cast<int>(a.number("multiprocessors", 132)), sm, sm >= 90 && a.number("copies_boxes", 1) != 0};
}

// The numbers of a cut that the command line names.
static void overrule(sepconv::cuda::Cut& cut, const Arguments& a) {
  std::visit(
      [&](auto& own) {
        own.each(own, [&](const char* name, auto& value) {
          value = static_cast<std::remove_reference_t<decltype(value)>>(a.number(name, value));
        });
      },
      cut);
}

// A kernel's cut where nothing is chosen, in the order of the enum.
static sepconv::cuda::Cut plain_cut(sepconv::cuda::Kernel kernel) {
  using namespace sepconv::cuda;
  switch (kernel) {
    case Kernel::depthwise_nhwc: return NhwcCut{};
    case Kernel::depthwise_nhwc_mma: return NhwcMmaCut{};
    case Kernel::depthwise_nhwc_tma: return NhwcTmaCut{};
    case Kernel::depthwise_nchw: return NchwCut{};
    case Kernel::depthwise_nchw_mma: return NchwMmaCut{};
    case Kernel::depthwise_direct: return DirectCut{};
    case Kernel::depthwise_grad_weight: return GradWeightCut{};
    case Kernel::depthwise_grad_weight_nhwc:
    case Kernel::depthwise_grad_weight_nhwc_mma:
    case Kernel::depthwise_grad_weight_nchw: return GradWeightRowsCut{};
    case Kernel::depthwise_toeplitz: return ToeplitzCut{};
    case Kernel::depthwise_large: return LargeCut{};
    case Kernel::pointwise:
    case Kernel::pointwise_mma:
    case Kernel::grouped: return SplitsCut{};
    case Kernel::separable:
    case Kernel::separable_mma: return SeparableCut{};
    case Kernel::aten:
    case Kernel::composite: return NoCut{};
  }
  return NoCut{};
}

// Partial sums of a grad_weight.
static int splits_of(const sepconv::cuda::Cut& cut) {
  int splits = 1;
  std::visit(
      [&](const auto& own) {
        own.each(own, [&](const char* name, auto value) {
          if (std::string(name) == "splits") splits = static_cast<int>(value);
        });
      },
      cut);
  return splits;
}

sepconv::cuda::Plan make_separable_plan(const Case& depthwise, const Case& pointwise, const Arguments& a) {
  using namespace sepconv::cuda;
  const Device device = make_device(a);
  Plan p = plan_separable({depthwise.shape, pointwise.shape}, depthwise.dtype, device, a.number("strict", 1) != 0);
  overrule(p.cut, a);
  return p;
}

sepconv::cuda::Plan make_plan(const Case& c, const Arguments& a) {
  using namespace sepconv::cuda;
  if (c.spatial) return {Kernel::aten, "cuda_spatial_separable", "", {}, 0};
  const Device device = make_device(a);
  const int64_t unit = c.offset * static_cast<int64_t>(dtype_bytes(c.dtype));
  const int64_t alignment = unit ? std::min<int64_t>(unit & -unit, 16) : 16;
  Plan p = plan(c.map, c.shape, c.dtype, device, alignment, a.number("strict", 1) != 0);
  const std::string kernel = a.text("kernel", "auto");
  if (kernel != "auto") {
    static constexpr const char* kKernels[] = {"depthwise_nhwc",
                                               "depthwise_nhwc_mma",
                                               "depthwise_nhwc_tma",
                                               "depthwise_nchw",
                                               "depthwise_nchw_mma",
                                               "depthwise_direct",
                                               "depthwise_grad_weight",
                                               "depthwise_grad_weight_nhwc",
                                               "depthwise_grad_weight_nhwc_mma",
                                               "depthwise_grad_weight_nchw",
                                               "depthwise_toeplitz",
                                               "depthwise_large",
                                               "pointwise",
                                               "pointwise_mma",
                                               "grouped"};  // in the order of the enum
    static_assert(std::size(kKernels) == static_cast<size_t>(Kernel::aten));
    p.kernel = static_cast<Kernel>(index_of(kKernels, kernel));
    p.name = "chosen by hand";
    p.cut = plain_cut(p.kernel);
    p.copies = {};
  }
  const int planned_splits = splits_of(p.cut);
  overrule(p.cut, a);
  const int splits = splits_of(p.cut);
  if (kernel == "auto" && splits == planned_splits) return p;  // with the workspace that the plan asked for
  if (c.map == Map::grad_weight) {
    p.workspace_bytes = splits * c.shape.weight_elements() * (c.dtype == DType::float64 ? 8 : 4);
  } else if (p.kernel == Kernel::grouped) {
    p.workspace_bytes = grouped_workspace_bytes(c.shape, c.dtype, c.map == Map::grad_input);
  }
  return p;
}

}  // namespace emulator
