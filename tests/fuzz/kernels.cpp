// Random calls of the CPU kernels against float64, for a build with AddressSanitizer: every tensor is a heap block that
// ends where the tensor ends, NaNs stand between its elements, and results are compared with the definition.
//
//   kernels SECONDS [FIRST]   cases FIRST, FIRST + 1, ... (by default from a random number on) for so many seconds
//   kernels case=NUMBER       that one case: what a failure prints
//   kernels planted           the faults of planted.cpp, each of which has to be found
//
// A case is made of its number alone, so that the same number is the same case in every build.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>
#if defined(EMULATOR_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#include "../emulator/reference.h"
#include "../emulator/tensor.h"
#include "cpu/kernels.h"
#include "cpu/layout/transposed_copy.h"
#include "cpu/plan.h"
#include "planted.h"

namespace sepconv::cpu {

// The threads of the case at hand. Each takes the next task, from the first or from the last on: no result may depend
// on their order.
int case_threads = 1;
bool last_first = false;

int num_threads() { return case_threads; }

void parallel_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < tasks; i = next++) body(context, last_first ? tasks - 1 - i : i);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < std::min<int64_t>(case_threads, tasks); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace sepconv::cpu

namespace {

using namespace sepconv;
using emulator::Buffer;
using emulator::Expected;
using emulator::Sizes;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % n); }
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <typename T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[below(choices.size())];
  }

 private:
  std::mt19937_64 engine_;
};

// Strides of any view that a user can make: dense, with gaps, every second column, a batch of one image, in any order.
Strides random_strides(Random& random, const Sizes& s, bool may_overlap) {
  const std::string layout =
      random.of<std::string>({"contiguous", "contiguous", "channels_last", "channels_last", "sliced", "alternate",
                              "sliced_last", "strided", "permuted", "expanded"});
  if (layout == "permuted") {  // rows innermost, then the batch
    return {s.h, s.n * s.h * s.w, 1, s.n * s.h};
  }
  if (layout == "expanded") {
    Strides strides = emulator::make_strides(s, random.of<std::string>({"contiguous", "channels_last"}));
    if (may_overlap) strides.n = 0;
    for (int64_t* stride : {&strides.c, &strides.h, &strides.w}) {  // behind sum and mean
      if (may_overlap && random.one_in(3)) *stride = 0;
    }
    return strides;
  }
  return emulator::make_strides(s, layout);
}

Strides random_dense(Random& random, const Sizes& s) {
  const std::string layout = random.of<std::string>({"contiguous", "channels_last", "permuted"});
  if (layout == "permuted") return {s.h * s.c, 1, s.c, s.n * s.h * s.c};  // a gradient of a permuted operand is so, too
  return emulator::make_strides(s, layout);
}

int64_t random_size(Random& random) {
  return random.of<int64_t>({1, 2, 3, 5, 7, 8, 10, 14, 15, 16, 17, 19, 28, 33, 56});
}

int64_t outputs(int64_t size, int64_t before, int64_t after, int64_t taps, int64_t stride, int64_t dilation) {
  const int64_t room = size + before + after - dilation * (taps - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

struct Case {
  uint64_t number = 0;
  Map map{};
  DType dtype{};
  ConvShape shape;
  PaddingMode padding_mode{};
  Activation activation{};
  bool bias = false;
  int64_t offsets[3]{};  // elements by which the operands and the result lie off their allocations' alignment
  cpu::Isa isa{};
  int threads = 1;

  Sizes x() const { return {shape.N, shape.C, shape.H, shape.W}; }
  Sizes w() const { return {shape.K, shape.channels_per_group(), shape.R, shape.S}; }
  Sizes y() const { return {shape.N, shape.K, shape.P, shape.Q}; }
};

// A shape that is small enough to be computed by the definition, or none.
std::optional<ConvShape> random_shape(Random& random, PaddingMode mode) {
  ConvShape s;
  const std::string kind = random.of<std::string>(
      {"depthwise", "depthwise", "depthwise", "multiplier", "groups", "as many", "1x1", "dense"});
  s.C = random.of<int64_t>({1, 2, 3, 4, 7, 8, 12, 15, 16, 17, 23, 24, 31, 32, 33, 48, 58, 64, 65, 96});
  if (kind == "depthwise" || kind == "multiplier")
    s.groups = s.C, s.K = s.C * (kind == "multiplier" ? random.between(1, 3) : 1);
  if (kind == "1x1" || kind == "dense") s.K = random.of<int64_t>({1, 3, 8, 17, 64});
  if (kind == "groups") {
    do s.groups = random.between(1, s.C);
    while (s.C % s.groups != 0);
    s.K = s.groups * random.between(1, 4);
  }
  if (kind == "as many") {  // groups of few channels that make as many
    const int64_t group = random.of<int64_t>({2, 4, 8});
    s.groups = random.of<int64_t>({2, 2, 3, 4, 5, 7, 8, 9}), s.C = s.K = s.groups * group;
  }
  s.R = kind == "1x1" ? 1 : random.of<int64_t>({1, 2, 3, 3, 3, 4, 5, 5, 7, 7, 9, 11, 13, 31});
  s.S = kind == "1x1" ? 1 : random.one_in(3) ? random.between(1, 12) : s.R;
  s.N = random.of<int64_t>({1, 1, 2, 3, 5});
  s.H = random_size(random), s.W = random_size(random);
  s.stride_h = random.of<int64_t>({1, 1, 1, 2, 2, 3}),
  s.stride_w = random.one_in(5) ? random.between(1, 4) : s.stride_h;
  if (random.one_in(4)) s.dilation_h = random.between(1, 4), s.dilation_w = random.between(1, 4);
  const int64_t pads = random.below(3);
  int64_t sides[4];  // top, bottom, left, right
  for (int i = 0; i < 4; ++i) {
    const int64_t taps = i < 2 ? s.R : s.S, size = i < 2 ? s.H : s.W;
    sides[i] = pads == 0 ? taps / 2 : pads == 1 ? 0 : random.between(0, taps + 2);
    if (mode == PaddingMode::reflect) sides[i] = std::min(sides[i], size - 1);
    if (mode == PaddingMode::circular) sides[i] = std::min(sides[i], size);
  }
  s.pad_h = sides[0], s.pad_w = sides[2];
  s.P = outputs(s.H, sides[0], sides[1], s.R, s.stride_h, s.dilation_h);
  s.Q = outputs(s.W, sides[2], sides[3], s.S, s.stride_w, s.dilation_w);
  const double products = double(s.output_elements()) * s.channels_per_group() * s.R * s.S;
  if (s.output_elements() == 0 || products > 4e5 || s.input_elements() > 50'000) return std::nullopt;
  return s;
}

Case random_case(uint64_t number) {
  Random random(number);
  Case c;
  c.number = number;
  c.padding_mode = random.one_in(4) ? random.of({PaddingMode::reflect, PaddingMode::replicate, PaddingMode::circular})
                                    : PaddingMode::zeros;
  for (std::optional<ConvShape> shape; !shape;) {
    shape = random_shape(random, c.padding_mode);
    if (shape) c.shape = *shape;
  }
  c.map = random.of({Map::forward, Map::grad_input, Map::grad_weight});
  c.dtype = random.of({DType::float32, DType::float32, DType::float64, DType::float16, DType::bfloat16});
  c.activation = random.one_in(2) ? Activation::identity : static_cast<Activation>(random.below(kActivationCount));
  c.bias = random.one_in(2);
  for (int64_t& offset : c.offsets) offset = random.one_in(2) ? 0 : random.between(1, 7);
  c.threads = random.of({1, 1, 2, 5});
  ConvShape& s = c.shape;
  // The result is dense, the weight's gradient has the weight's own strides; operands are anything.
  s.x = c.map == Map::grad_input ? random_dense(random, c.x()) : random_strides(random, c.x(), true);
  s.y = c.map == Map::forward ? random_dense(random, c.y()) : random_strides(random, c.y(), true);
  s.w = random_strides(random, c.w(), false);
  if (c.map == Map::grad_weight) {
    s.w = random_dense(random, c.w());
    const bool half = c.dtype == DType::float16 || c.dtype == DType::bfloat16;
    if (half) c.padding_mode = PaddingMode::zeros;  // for others the bindings pad the input by a copy
  }
  const std::vector<std::string> isas = cpu::isas_built();
  for (int64_t i = random.below(isas.size()); i >= 0; --i) {  // this one, or the best below that the processor has
    try {
      cpu::set_isa(isas[i]);
      break;
    } catch (const std::invalid_argument&) {
    }
  }
  c.isa = cpu::isa();
  return c;
}

std::string describe(const Case& c) {
  static constexpr const char* kMaps[] = {"forward", "grad_input", "grad_weight"};
  static constexpr const char* kDTypes[] = {"float32", "float64", "float16", "bfloat16"};
  const ConvShape& s = c.shape;
  char text[512];
  const auto strides = [](const Strides& t) {
    return std::to_string(t.n) + "," + std::to_string(t.c) + "," + std::to_string(t.h) + "," + std::to_string(t.w);
  };
  std::snprintf(text, sizeof text,
                "%s %s N%ld C%ld %ldx%ld K%ld groups %ld kernel %ldx%ld stride %ld,%ld padding %ld,%ld %s dilation "
                "%ld,%ld output %ldx%ld x(%s) w(%s) y(%s) %s%s, %s, %d threads",
                kMaps[static_cast<int>(c.map)], kDTypes[static_cast<int>(c.dtype)], long(s.N), long(s.C), long(s.H),
                long(s.W), long(s.K), long(s.groups), long(s.R), long(s.S), long(s.stride_h), long(s.stride_w),
                long(s.pad_h), long(s.pad_w), kPaddingModeNames[static_cast<int>(c.padding_mode)], long(s.dilation_h),
                long(s.dilation_w), long(s.P), long(s.Q), strides(s.x).c_str(), strides(s.w).c_str(),
                strides(s.y).c_str(), kActivationNames[static_cast<int>(c.activation)], c.bias ? ", bias" : "",
                cpu::isa_name(c.isa), c.threads);
  return text;
}

struct Failure {
  std::string what;
};

// Compares every element of the result, and looks for writes where no element is.
std::optional<Failure> compare(const std::vector<Expected>& expected, const Buffer& out, const Sizes& sizes,
                               DType dtype, double slack = 1) {
  size_t i = 0;
  for (int64_t n = 0; n < sizes.n; ++n)
    for (int64_t c = 0; c < sizes.c; ++c)
      for (int64_t h = 0; h < sizes.h; ++h)
        for (int64_t w = 0; w < sizes.w; ++w) {
          const Expected& e = expected[i++];
          const double got = out.at(n, c, h, w);
          if (std::fabs(got - e.value) <= slack * e.bound(dtype)) continue;
          char text[160];
          std::snprintf(text, sizeof text, "[%ld, %ld, %ld, %ld] is %.9g, should be %.9g within %.2g", long(n), long(c),
                        long(h), long(w), got, e.value, slack * e.bound(dtype));
          return Failure{text};
        }
  if (const int64_t bytes = out.gap_bytes_written()) {
    return Failure{std::to_string(bytes) + " bytes written between the elements"};
  }
  return std::nullopt;
}

// A copy of an operand's memory, which no kernel may write to.
class Untouched {
 public:
  Untouched(const char* name, Buffer& buffer)
      : name_(name), buffer_(buffer), before_(begin(), begin() + buffer.bytes()) {}
  std::optional<Failure> check() const {
    if (std::memcmp(begin(), before_.data(), before_.size()) == 0) return std::nullopt;
    return Failure{std::string(name_) + " operand was written to"};
  }

 private:
  const unsigned char* begin() const { return static_cast<const unsigned char*>(buffer_.data()); }
  const char* name_;
  Buffer& buffer_;
  std::vector<unsigned char> before_;
};

const fuzz::PlantedFault* planted = nullptr;  // after the kernel

// One of the three maps, by this plan's kernel and the border kernel, as the bindings call them.
std::optional<Failure> run_map(const Case& c, const cpu::Plan& plan) {
  const ConvShape& s = c.shape;
  const bool by_input = c.map == Map::grad_input, by_weight = c.map == Map::grad_weight;
  const Sizes result = by_weight ? c.w() : by_input ? c.x() : c.y();
  Buffer first(c.map == Map::forward ? c.x() : c.y(), c.map == Map::forward ? s.x : s.y, c.dtype, c.offsets[0]);
  Buffer second(by_weight ? c.x() : c.w(), by_weight ? s.x : s.w, c.dtype, c.offsets[1]);
  Buffer bias({1, s.K, 1, 1}, {s.K, 1, 1, 1}, c.dtype);
  Buffer out(result, by_weight ? s.w : by_input ? s.x : s.y, c.dtype, c.offsets[2]);
  first.fill_random(3 * c.number), second.fill_random(3 * c.number + 1), bias.fill_random(3 * c.number + 2);
  const bool with_bias = c.bias && c.map == Map::forward;
  const Activation activation = c.map == Map::forward ? c.activation : Activation::identity;
  const Epilogue epilogue{with_bias ? bias.data() : nullptr, activation};
  const BorderExtent border = border_extent(c.map, s, c.padding_mode);
  const Untouched untouched[] = {{"the first", first}, {"the second", second}};
  if (border != BorderExtent::all) {
    cpu::run(plan, c.map, s, c.dtype, first.data(), second.data(), epilogue, out.data());
  }
  if (border != BorderExtent::none) {
    cpu::run_borders(c.map, s, c.padding_mode, c.dtype, first.data(), second.data(), epilogue, out.data());
  }
  if (planted != nullptr) planted->plant(first, out);
  for (const Untouched& operand : untouched) {
    if (auto failure = operand.check()) return failure;
  }
  return compare(emulator::reference(c.map, s, c.padding_mode, first, second, with_bias ? &bias : nullptr, activation),
                 out, result, c.dtype);
}

// The depthwise convolution of the case and a 1x1 one after it, in one kernel; the intermediate is wanted or not.
std::optional<Failure> run_separable(const Case& c) {
  Random random(~c.number);
  SeparableShape shape{c.shape, {}};
  ConvShape &d = shape.depthwise, &p = shape.pointwise;
  const Sizes x = c.x(), middle = c.y();
  const std::string layout = random.of<std::string>({"contiguous", "channels_last"});
  d.y = emulator::make_strides(middle, layout);
  d = with_copies(d, separable_copies(d, layout == "channels_last" ? Layout::nhwc : Layout::nchw));
  p.N = d.N, p.C = d.K, p.H = p.P = d.P, p.W = p.Q = d.Q, p.K = random.of<int64_t>({1, 3, 8, 16, 17, 33});
  const Sizes wp{p.K, p.C, 1, 1}, y{p.N, p.K, p.P, p.Q};
  p.x = d.y, p.w = random_strides(random, wp, false), p.y = emulator::make_strides(y, layout);
  Buffer input(x, d.x, c.dtype, c.offsets[0]), wd(c.w(), d.w, c.dtype, c.offsets[1]), weight(wp, p.w, c.dtype);
  Buffer bias_d({1, d.K, 1, 1}, {d.K, 1, 1, 1}, c.dtype), bias_p({1, p.K, 1, 1}, {p.K, 1, 1, 1}, c.dtype);
  Buffer out(y, p.y, c.dtype, c.offsets[2]), between(middle, d.y, c.dtype);
  int seed = 0;
  for (Buffer* buffer : {&input, &wd, &weight, &bias_d, &bias_p}) buffer->fill_random(5 * c.number + seed++);
  const Activation last = random.of({Activation::identity, Activation::relu, Activation::hardswish});
  const bool kept = random.one_in(2);
  cpu::separable_forward(shape, c.dtype,
                         {input.data(),
                          wd.data(),
                          {c.bias ? bias_d.data() : nullptr, c.activation},
                          weight.data(),
                          {c.bias ? bias_p.data() : nullptr, last},
                          out.data(),
                          kept ? between.data() : nullptr});
  const auto depthwise =
      emulator::reference(Map::forward, d, PaddingMode::zeros, input, wd, c.bias ? &bias_d : nullptr, c.activation);
  if (kept) {
    const Activation stored = derivative_from_output(c.activation) ? c.activation : Activation::identity;
    const auto expected =
        emulator::reference(Map::forward, d, PaddingMode::zeros, input, wd, c.bias ? &bias_d : nullptr, stored);
    if (const auto failure = compare(expected, between, middle, c.dtype)) return failure;
  }
  return compare(emulator::reference_pointwise(p, depthwise, c.dtype, weight, c.bias ? &bias_p : nullptr, last), out, y,
                 c.dtype);
}

// A column and a row filter over every channel, of the case's sizes.
std::optional<Failure> run_spatial(const Case& c) {
  Random random(~c.number);
  ConvShape s = c.shape;
  s.groups = s.K = s.C, s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
  s.pad_h = random.between(0, s.R), s.pad_w = random.between(0, s.S);
  s.P = outputs(s.H, s.pad_h, s.R / 2, s.R, 1, 1), s.Q = outputs(s.W, s.pad_w, s.S / 2, s.S, 1, 1);
  if (s.P == 0 || s.Q == 0) return std::nullopt;
  const bool last = random.one_in(2), shared_column = random.one_in(3), shared_row = random.one_in(3);
  const Sizes x = c.x(), y{s.N, s.C, s.P, s.Q}, column{shared_column ? 1 : s.C, 1, 1, s.R},
              row{shared_row ? 1 : s.C, 1, 1, s.S};
  s.x = emulator::make_strides(x, random.one_in(2) ? last ? "sliced_last" : "sliced"
                                  : last           ? "channels_last"
                                                   : "contiguous");
  s.y = emulator::make_strides(y, last ? "channels_last" : "contiguous");
  s = with_copies(s, spatial_copies(s));  // of one channel, y is both
  const Strides columns{s.R, s.R, s.R, 1}, rows{s.S, s.S, s.S, 1};
  Buffer input(x, s.x, c.dtype, c.offsets[0]), first(column, columns, c.dtype), second(row, rows, c.dtype),
      out(y, s.y, c.dtype, c.offsets[2]);
  int seed = 0;
  for (Buffer* buffer : {&input, &first, &second}) buffer->fill_random(5 * c.number + seed++);
  cpu::spatial_separable_forward(s, c.dtype, input.data(),
                                 {first.data(), second.data(), shared_column ? 0 : s.R, shared_row ? 0 : s.S},
                                 out.data());
  return compare(emulator::spatial_reference(s, input, first, second, shared_column, shared_row), out, y, c.dtype);
}

// The case's input in the other layout, where the two are channels_last and NCHW, with gaps or not.
std::optional<Failure> run_copy(const Case& c) {
  const ConvShape& s = c.shape;
  Buffer from(c.x(), s.x, c.dtype, c.offsets[0]);
  const Strides to = emulator::make_strides(c.x(), c.number % 32 < 16 ? "contiguous" : "channels_last");
  if (!cpu::is_transposed_copy(input_image(s), to)) return std::nullopt;
  Buffer out(c.x(), to, c.dtype, c.offsets[2]);
  from.fill_random(c.number);
  cpu::transposed_copy(input_image(s), c.dtype, from.data(), to, out.data());
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t i = 0; i < s.C * s.H * s.W; ++i) {
      const int64_t channel = i / s.W / s.H, row = i / s.W % s.H, column = i % s.W;
      if (from.at(n, channel, row, column) != out.at(n, channel, row, column)) return Failure{"a copy that differs"};
    }
  return std::nullopt;
}

// By the kernel that the plan names, or by the general one, which takes everything.
std::optional<Failure> run_case(const Case& c) {
  cpu::case_threads = c.threads, cpu::last_first = c.number % 3 == 0;
  const ConvShape& s = c.shape;
  if (c.map == Map::forward && s.is_depthwise() && c.number % 4 == 0) {
    return c.number % 8 == 0 ? run_separable(c) : run_spatial(c);
  }
  if (c.number % 16 == 7) return run_copy(c);  // planted_case() is number 1
  const cpu::Plan general{cpu::Kernel::grouped_planes, "cpu_grouped_planes", "takes everything"};
  cpu::Plan plan = cpu::plan(c.map, s, c.dtype, /*strict=*/true, {c.threads, true, false});
  if (c.number % 5 == 0 || plan.kernel == cpu::Kernel::pointwise_matmul) plan = general;  // matmul is at::mm
  Case taken = c;
  taken.shape = with_copies(s, plan.copies);  // what the kernel does not take as it lies
  auto failure = run_map(taken, plan);
  if (failure) failure->what = std::string(plan.name) + ": " + failure->what;
  return failure;
}

uint64_t running = 0;  // the case at hand

#if defined(EMULATOR_ASAN)
const char* program = "";

// A sanitizer that finds something ends the process.
void say_case() {
  std::printf("FAIL: %s case=%llu  # above\n", program, static_cast<unsigned long long>(running));
  std::fflush(stdout);
}
#endif

// A call of float32 whose input has gaps and lies off its allocation's begin; it is right without a fault.
Case planted_case() {
  Case c;
  ConvShape& s = c.shape;
  s.N = 2, s.C = s.K = s.groups = 24, s.H = s.W = s.P = s.Q = 7, s.R = s.S = 3, s.pad_h = s.pad_w = 1;
  s.x = emulator::make_strides(c.x(), "sliced_last"), s.y = emulator::make_strides(c.y(), "channels_last");
  s.w = emulator::make_strides(c.w(), "contiguous");
  c.offsets[0] = 2;  // 8 bytes: AddressSanitizer sees no less at a begin
  c.number = 1, c.isa = cpu::isa();
  return c;
}

// Each fault in a process of its own, as a sanitizer ends it.
int run_planted() {
  const auto fails = [](const fuzz::PlantedFault* fault) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      std::freopen("/dev/null", "w", stdout), std::freopen("/dev/null", "w", stderr);
      planted = fault;
      _exit(run_case(planted_case()).has_value());
    }
    int status = 0;
    waitpid(child, &status, 0);
    return status != 0;
  };
  int missed = fails(nullptr);
  if (missed != 0) std::printf("FAIL: the call that faults are planted in is not sound\n");
  for (const fuzz::PlantedFault& fault : fuzz::planted_faults) {
    if (fails(&fault)) continue;
    ++missed;
    std::printf("FAIL: %s was not found\n", fault.name);
  }
  std::printf("fuzz, planted: %d faults, %d not found\n", fuzz::kPlantedFaults, missed);
  return missed != 0;
}

}  // namespace

int main(int count, char** words) {
  if (count < 2) return std::fprintf(stderr, "usage: kernels SECONDS [FIRST] | case=NUMBER | planted\n"), 2;
#if defined(EMULATOR_ASAN)
  program = words[0];
  __sanitizer_set_death_callback(say_case);
#endif
  if (std::strcmp(words[1], "planted") == 0) return run_planted();
  const bool one = std::strncmp(words[1], "case=", 5) == 0;
  const uint64_t first = one         ? std::strtoull(words[1] + 5, nullptr, 10)
                         : count > 2 ? std::strtoull(words[2], nullptr, 10)
                                     : std::random_device{}();
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(one ? 0 : std::atof(words[1]));
  int64_t cases = 0, failures = 0;
  for (uint64_t number = first; number == first || std::chrono::steady_clock::now() < end; ++number) {
    running = number;
    const Case c = random_case(number);
    if (one) std::printf("%s\n", describe(c).c_str());
    ++cases;
    if (const auto failure = run_case(c)) {
      ++failures;
      std::printf("FAIL: %s case=%llu  # %s; %s\n", words[0], static_cast<unsigned long long>(number),
                  failure->what.c_str(), describe(c).c_str());
      std::fflush(stdout);
    }
  }
  std::printf("fuzz, kernels: %lld cases from %llu on, %lld failed\n", static_cast<long long>(cases),
              static_cast<unsigned long long>(first), static_cast<long long>(failures));
  return failures != 0;
}
