// Runs one kernel door on one case, for a range of seeds, and compares with the float64 reference. The whole case stands
// on the command line, so a line that failed can be run again by hand:
//
//   runner door=launch_grouped_forward dtype=float16 layout=channels_last N=2 C=6 H=5 W=7 K=4 R=3 S=3 groups=2
//          stride=1,1 padding=1,1,1,1 dilation=1,1 bias=1 activation=relu seeds=0:8
//
// Exit status 0: right for every seed. Otherwise the last lines say what was wrong, where, and in which CUDA thread.
// `runner list` prints the doors.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../../csrc/cuda/tiling.h"
#include "doors.h"
#include "machine.h"
#include "race.h"
#include "tensor.h"

using namespace emulator;
using sepconv::Activation;
using sepconv::Strides;

namespace {

class Arguments {
 public:
  Arguments(int count, char** values) {
    for (int i = 1; i < count; ++i) {
      const char* equals = strchr(values[i], '=');
      if (!equals) throw std::invalid_argument(std::string("expected key=value, not ") + values[i]);
      values_[std::string(static_cast<const char*>(values[i]), equals)] = equals + 1;
    }
  }
  std::string text(const std::string& key, const std::string& otherwise) const {
    const auto found = values_.find(key);
    return found == values_.end() ? otherwise : found->second;
  }
  int64_t number(const std::string& key, int64_t otherwise) const {
    return std::stoll(text(key, std::to_string(otherwise)));
  }
  std::vector<int64_t> numbers(const std::string& key, const std::string& otherwise, char separator = ',') const {
    std::istringstream in(text(key, otherwise));
    std::vector<int64_t> list;
    for (std::string part; std::getline(in, part, separator);) list.push_back(std::stoll(part));
    return list;
  }

 private:
  std::map<std::string, std::string> values_;
};

template <size_t kCount>
int index_of(const char* const (&names)[kCount], const std::string& name) {
  for (size_t i = 0; i < kCount; ++i) {
    if (names[i] == name) return static_cast<int>(i);
  }
  throw std::invalid_argument("unknown name " + name);
}

const Door& find_door(const std::string& name) {
  for (const Door& door : kDoors) {
    if (door.name == name) return door;
  }
  throw std::invalid_argument("there is no door " + name + " in csrc/cuda/launch.h");
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

struct Case {
  std::string door;
  Map map;
  bool partials_only;  // launch_sum_partials: the operand is the workspace of partial sums
  DType dtype;
  ConvShape shape;
  sepconv::cuda::Tile tile;
  bool bias;
  Activation activation;
  int64_t offset;  // elements by which every tensor lies off its allocation's alignment
};

Case read_case(const Arguments& a) {
  Case c{};
  c.door = a.text("door", "");
  c.map = contains(c.door, "grad_weight") || contains(c.door, "partials") ? Map::grad_weight
          : contains(c.door, "grad_input")                                ? Map::grad_input
                                                                          : Map::forward;
  c.partials_only = contains(c.door, "sum_partials");
  static constexpr const char* kDTypes[] = {"float32", "float64", "float16", "bfloat16"};
  c.dtype = static_cast<DType>(index_of(kDTypes, a.text("dtype", "float32")));
  c.activation = static_cast<Activation>(index_of(sepconv::kActivationNames, a.text("activation", "identity")));
  c.bias = a.number("bias", 0);
  c.tile.splits = static_cast<int>(a.number("splits", 1));
  c.tile.vec = static_cast<int>(a.number("vec", 1));
  c.tile.rows = static_cast<int>(a.number("rows", 1));
  c.tile.wide = a.number("wide", 0) != 0;
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

// Fails where |actual - expected| exceeds what roundings alone can explain.
std::string compare(const Case& c, const Buffer& out, const std::vector<Expected>& expected, const Sizes& sizes) {
  const double unit = unit_roundoff(c.dtype);
  const double accumulate = c.dtype == DType::float64 ? unit : unit_roundoff(DType::float32);
  // The activations' slopes are below 1.2; their own error is a few units of the accumulation type.
  const double smallest = c.dtype == DType::float16 ? 0x1p-25 : 1e-38;
  int64_t wrong = 0;
  std::string first;
  size_t i = 0;
  for (int64_t n = 0; n < sizes.n; ++n)
    for (int64_t k = 0; k < sizes.c; ++k)
      for (int64_t p = 0; p < sizes.h; ++p)
        for (int64_t q = 0; q < sizes.w; ++q, ++i) {
          const Expected& e = expected[i];
          const double actual = out.at(n, k, p, q);
          const double bound = 1.2 * accumulate * ((e.terms + 2) * e.magnitude + 8 * std::fabs(e.value)) +
                               1.01 * unit * std::fabs(e.value) + smallest;
          if (std::fabs(actual - e.value) <= bound) continue;
          if (!wrong++) {
            char line[300];
            snprintf(line, sizeof line, "element (%lld, %lld, %lld, %lld) is %.9g instead of %.9g (allowed error %.3g)",
                     (long long)n, (long long)k, (long long)p, (long long)q, actual, e.value, bound);
            first = line;
          }
        }
  if (!wrong) return {};
  return std::to_string(wrong) + " of " + std::to_string(expected.size()) + " elements are wrong; first: " + first;
}

// Empty: right.
std::string run(const Case& c, uint64_t seed) {
  const ConvShape& s = c.shape;
  const Sizes x{s.N, s.C, s.H, s.W}, y{s.N, s.K, s.P, s.Q}, w{s.K, s.channels_per_group(), s.R, s.S};
  const DType accumulate = c.dtype == DType::float64 ? DType::float64 : DType::float32;
  const Sizes partials{c.tile.splits, w.count(), 1, 1};

  Call call;
  call.shape = s;
  call.dtype = c.dtype;
  call.tile = c.tile;
  std::optional<Buffer> a, b, bias, out, workspace;
  if (c.partials_only) {
    a.emplace(partials, make_strides(partials, "contiguous"), accumulate);
  } else if (c.map == Map::forward) {
    a.emplace(x, s.x, c.dtype, c.offset), b.emplace(w, s.w, c.dtype, c.offset);
  } else if (c.map == Map::grad_input) {
    a.emplace(y, s.y, c.dtype, c.offset), b.emplace(w, s.w, c.dtype, c.offset);
  } else {
    a.emplace(y, s.y, c.dtype, c.offset), b.emplace(x, s.x, c.dtype, c.offset);
  }
  const Sizes out_sizes = c.map == Map::forward ? y : c.map == Map::grad_input ? x : w;
  out.emplace(out_sizes, c.map == Map::forward ? s.y : c.map == Map::grad_input ? s.x : s.w, c.dtype, c.offset);
  a->fill_random(seed * 3 + 1);
  call.a = a->data();
  if (b) {
    b->fill_random(seed * 3 + 2);
    call.b = b->data();
  }
  if (c.bias && c.map == Map::forward) {
    const Sizes channels{1, s.K, 1, 1};
    bias.emplace(channels, make_strides(channels, "contiguous"), c.dtype, c.offset);
    bias->fill_random(seed * 3 + 3);
    call.epilogue.bias = bias->data();
  }
  if (c.map == Map::forward) call.epilogue.activation = c.activation;
  call.out = out->data();
  // A workspace as large as launch.h says and not a byte larger.
  workspace.emplace(c.map == Map::grad_weight
                        ? size_t(partials.count()) * dtype_bytes(accumulate)
                        : size_t(sepconv::cuda::grouped_workspace_bytes(s, c.dtype, c.map == Map::grad_input)));
  call.workspace = workspace->data();

  set_seed(seed);
  race::forget();
  race::watch(call.out, out->bytes());
  race::watch(call.workspace, workspace->bytes());
  const uint64_t launches = counters().launches;
  try {
    const cudaError_t error = find_door(c.door).call(call);
    if (error != cudaSuccess) return "the door returns CUDA error " + std::to_string(error);
  } catch (const Fault& fault) {
    return fault.what();
  }
  if (counters().launches == launches) return "the door launched no kernel";

  std::vector<Expected> expected;
  if (c.partials_only) {
    expected.resize(w.count());
    for (size_t i = 0; i < expected.size(); ++i) {
      for (int64_t split = 0; split < c.tile.splits; ++split) {
        const double v = a->at(split, i, 0, 0);
        expected[i].value += v;
        expected[i].magnitude += std::fabs(v);
        ++expected[i].terms;
      }
    }
  } else {
    expected = reference(c.map, s, *a, *b, bias ? &*bias : nullptr, call.epilogue.activation);
  }
  const std::string wrong = compare(c, *out, expected, out_sizes);
  if (!wrong.empty()) return wrong;
  if (const int64_t bytes = out->gap_bytes_written()) {
    return std::to_string(bytes) + " bytes between the output's elements were written";
  }
  return {};
}

}  // namespace

int main(int count, char** values) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  if (count == 2 && !strcmp(values[1], "list")) {
    for (const Door& door : kDoors) puts(door.name);
    return 0;
  }
  try {
    const Arguments arguments(count, values);
    const Case c = read_case(arguments);
    const auto seeds = arguments.numbers("seeds", "0:1", ':');  // first and one past the last
    for (int64_t seed = seeds.at(0); seed < seeds.at(1); ++seed) {
      fprintf(stderr, "seed %lld\n", (long long)seed);  // what a sanitizer's report belongs to
      const std::string wrong = run(c, seed);
      if (wrong.empty()) continue;
      printf("FAULT with seed %lld: %s\n", (long long)seed, wrong.c_str());
      return 1;
    }
    const Counters& done = counters();
    printf("right: %llu launches, %llu blocks, %llu threads\n", (unsigned long long)done.launches,
           (unsigned long long)done.blocks, (unsigned long long)done.threads);
    return 0;
  } catch (const std::exception& e) {
    printf("ERROR %s\n", e.what());
    return 2;
  }
}
