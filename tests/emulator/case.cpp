#include "case.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "core/activation.h"
#include "cuda/architectures.h"
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
  c.bias = a.number("bias", 0), c.residual = a.number("residual", 0);
  c.op = a.text("op", "conv2d");
  c.spatial = c.op == "spatial_separable";
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

sepconv::BlockShape read_block(const Arguments& a, const Case& depthwise) {
  sepconv::BlockShape s;
  s.depthwise = depthwise.shape;
  ConvShape& d = s.depthwise;
  s.expands = a.number("inputs", 0) > 0, s.residual = a.number("residual", 0);
  s.gated = a.number("gated", 0);
  s.C = s.expands ? a.number("inputs", 0) : d.C, s.K = a.number("outputs", 1);
  const std::string layout = a.text("layout", "contiguous");
  d.x = make_strides({d.N, s.C, d.H, d.W}, layout);
  d.y = make_strides({d.N, s.K, d.P, d.Q}, a.text("y_layout", layout));
  return s;
}

static sepconv::SequenceStrides of_row(const sepconv::Strides& s) { return {s.n, s.c, s.w}; }

sepconv::CausalShape read_causal(const Arguments& a, const Case& c) {
  const ConvShape& conv = c.shape;
  sepconv::CausalShape s;
  s.N = conv.N, s.C = conv.C, s.L = conv.W, s.S = conv.S, s.dilation = conv.dilation_w;
  s.x = of_row(conv.x), s.y = of_row(conv.y);
  s.states = of_row(make_strides({s.N, s.C, 1, s.reach()}, a.text("state_layout", a.text("layout", "contiguous"))));
  s.w_c = conv.w.n, s.w_s = conv.w.w;
  return s;
}

sepconv::CausalUpdateShape read_causal_update(const Arguments& a, const Case& c) {
  const ConvShape& conv = c.shape;
  sepconv::CausalUpdateShape s;
  s.N = conv.N, s.C = conv.C, s.T = conv.W, s.S = conv.S, s.dilation = conv.dilation_w;
  s.length = a.number("length", s.reach());
  s.states = a.number("rows", 0) ? s.N + 2 : s.N;
  s.x = of_row(conv.x), s.y = of_row(conv.y);
  s.state = of_row(make_strides({s.states, s.C, 1, s.length}, a.text("state_layout", a.text("layout", "contiguous"))));
  s.w_c = conv.w.n, s.w_s = conv.w.w;
  s.float_weight = a.number("float_weight", 0) && c.dtype != DType::float64;
  return s;
}

bool is_separable(const Arguments& a) { return a.text("op", "conv2d") == "separable"; }

static sepconv::cuda::Device make_device(const Arguments& a) {
  using sepconv::cuda::Tuning;
  const int sm = static_cast<int>(a.number("sm", 90));
  static thread_local Tuning tuned;  // which the device points to
  tuned = sepconv::cuda::tuning_for(sm);
  bool overruled = false;
  Tuning::each(tuned, [&](const std::string& name, double& value) {
    const std::string text = a.text("tuning." + name, "");
    if (!text.empty()) value = std::stod(text), overruled = true;
  });
  const std::string archs = a.text("archs", "");  // of a build, with commas between
  std::string spaced = archs;
  std::replace(spaced.begin(), spaced.end(), ',', ' ');
  return {static_cast<int>(a.number("multiprocessors", 132)),
          sm,
          sm >= 90 && a.number("copies_boxes", 1) != 0,
          archs.empty() || sepconv::cuda::has_code_for(spaced, sm),
          a.number("tf32", 0) != 0,
          overruled ? &tuned : nullptr};
}

// The numbers of a cut that the command line names.
static sepconv::cuda::CutNumbers named_numbers(const sepconv::cuda::Cut& cut, const Arguments& a) {
  sepconv::cuda::CutNumbers numbers;
  std::visit(
      [&](const auto& own) {
        own.each(own, [&](const char* name, auto) {
          if (!a.text(name, "").empty()) numbers[name] = a.number(name, 1);
        });
      },
      cut);
  return numbers;
}

sepconv::cuda::Plan make_separable_plan(const Case& depthwise, const Case& pointwise, const Arguments& a) {
  using namespace sepconv::cuda;
  const Device device = make_device(a);
  const Plan p =
      plan_separable({depthwise.shape, pointwise.shape}, depthwise.dtype, device, a.number("strict", 1) != 0);
  return overruled(p, Map::forward, depthwise.shape, depthwise.dtype, "", named_numbers(p.cut, a));
}

static int64_t alignment_of(const Case& c) {
  const int64_t unit = c.offset * static_cast<int64_t>(dtype_bytes(c.dtype));
  return unit ? std::min<int64_t>(unit & -unit, 16) : 16;
}

sepconv::cuda::Plan make_block_plan(const Case& c, const Arguments& a) {
  using namespace sepconv::cuda;
  const Plan p = plan_block(read_block(a, c), c.dtype, make_device(a), alignment_of(c), a.number("strict", 1) != 0);
  return overruled(p, Map::forward, c.shape, c.dtype, "", named_numbers(p.cut, a));
}

sepconv::cuda::Plan make_plan(const Case& c, const Arguments& a) {
  using namespace sepconv::cuda;
  if (c.spatial) return {Kernel::aten, "cuda_spatial_separable", "", {}, 0};
  if (c.op == "inverted_residual") return make_block_plan(c, a);
  if (c.op == "causal_update") return {Kernel::aten, "cuda_causal_update", "", {}, 0};
  if (c.op == "causal") {
    const Plan causal = plan_causal(read_causal(a, c), c.dtype, make_device(a), alignment_of(c));
    return overruled(causal, c.map, c.shape, c.dtype, "", named_numbers(causal.cut, a));
  }
  Plan p = plan(c.map, c.shape, c.dtype, make_device(a), alignment_of(c), a.number("strict", 1) != 0,
                {c.activation, c.residual});
  const std::string kernel = a.text("kernel", "auto");
  if (kernel != "auto") p = overruled(p, c.map, c.shape, c.dtype, kernel, {});
  return overruled(p, c.map, c.shape, c.dtype, "", named_numbers(p.cut, a));
}

std::vector<sepconv::cuda::Plan> make_alternatives(const Case& c, const Arguments& a) {
  return alternatives(c.map, c.shape, c.dtype, make_device(a), alignment_of(c));
}

}  // namespace emulator
