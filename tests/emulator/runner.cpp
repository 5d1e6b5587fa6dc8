// Runs one map on one case for a range of seeds, through the project's own plan and doors, and compares with the
// float64 reference. The whole case stands on the command line, so a line that failed can be run again by hand:
//
//   runner map=forward dtype=float16 layout=channels_last N=2 C=6 H=5 W=7 K=4 R=3 S=3 groups=2
//          stride=1,1 padding=1,1,1,1 dilation=1,1 bias=1 activation=relu seeds=0:8
//
// padding_mode= is zeros, reflect, replicate or circular. The plan chooses the kernel; kernel= and the
// numbers of its cut (csrc/cuda/*/cut.h) overrule it, sm= and multiprocessors= are the GPU that it plans for.
// residual=1 adds an image before the activation, where the kernel can.
// op=separable adds a 1x1 convolution, op=causal and op=causal_update are calls of those ops (case.h). "--" stands
// between several cases. Exit status 0: all are right for every seed. Otherwise the last lines say what was wrong,
// where, and in which CUDA thread.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "case.h"
#include "machine.h"
#include "race.h"
#include "reference.h"
#include "sequences.h"
#include "tensor.h"

using namespace emulator;
using sepconv::Activation;
using sepconv::ConvShape;
using sepconv::DType;
using sepconv::Map;

namespace {

// Fails where |actual - expected| exceeds what roundings alone can explain.
std::string compare(const Case& c, const Buffer& out, const std::vector<Expected>& expected, const Sizes& sizes) {
  int64_t wrong = 0;
  std::string first;
  size_t i = 0;
  for (int64_t n = 0; n < sizes.n; ++n)
    for (int64_t k = 0; k < sizes.c; ++k)
      for (int64_t p = 0; p < sizes.h; ++p)
        for (int64_t q = 0; q < sizes.w; ++q, ++i) {
          const Expected& e = expected[i];
          const double actual = out.at(n, k, p, q);
          const double bound = e.bound(c.dtype);
          if (std::isfinite(e.value) ? std::fabs(actual - e.value) <= bound
                                     : actual == e.value || (std::isnan(actual) && std::isnan(e.value))) {
            continue;
          }
          if (!wrong++) {
            char line[300];
            snprintf(line, sizeof line, "element (%lld, %lld, %lld, %lld) is %.9g instead of %.9g (allowed error %.3g)",
                     (long long)n, (long long)k, (long long)p, (long long)q, actual, e.value, bound);
            first = line + race::describe_writer(out.address(n, k, p, q));
          }
        }
  if (!wrong) return {};
  return std::to_string(wrong) + " of " + std::to_string(expected.size()) + " elements are wrong; first: " + first;
}

// Starts the kernels of a case, with everything watched that they write. Empty: they ran.
template <typename Start>
std::string run_watched(uint64_t seed, Buffer& out, Buffer& workspace, const Start& start) {
  set_seed(seed);
  race::forget();
  race::watch(out.data(), out.bytes());
  race::watch(workspace.data(), workspace.bytes());
  const uint64_t launches = counters().launches;
  try {
    const cudaError_t error = start();
    if (error != cudaSuccess) return "the door returns CUDA error " + std::to_string(error);
  } catch (const Fault& fault) {
    return fault.what();
  }
  return counters().launches == launches ? "no kernel was launched" : "";
}

std::string judge(const Case& c, const Buffer& out, const std::vector<Expected>& expected, const Sizes& sizes) {
  const std::string wrong = compare(c, out, expected, sizes);
  if (!wrong.empty()) return wrong;
  if (const int64_t bytes = out.gap_bytes_written()) {
    return std::to_string(bytes) + " bytes between the output's elements were written";
  }
  return {};
}

Sizes bias_sizes(const ConvShape& s) { return {1, s.K, 1, 1}; }

// op=separable. Empty: right.
std::string run_separable(const Case& d, const Arguments& arguments, uint64_t seed) {
  const Case p = read_pointwise(arguments, d);
  const sepconv::cuda::Plan plan = make_separable_plan(d, p, arguments);
  if (seed == 0) printf("plan: %s\n", plan.name);
  const ConvShape ds = with_copies(d.shape, plan.copies), &ps = p.shape;
  const Sizes y_sizes{ps.N, ps.K, ps.P, ps.Q};
  Buffer x({ds.N, ds.C, ds.H, ds.W}, ds.x, d.dtype, d.offset), w({ds.K, 1, ds.R, ds.S}, ds.w, d.dtype, d.offset);
  Buffer v({ps.K, ps.C, 1, 1}, ps.w, d.dtype, d.offset), y(y_sizes, ps.y, d.dtype, d.offset);
  Buffer w_bias(bias_sizes(ds), make_strides(bias_sizes(ds), "contiguous"), d.dtype, d.offset);
  Buffer v_bias(bias_sizes(ps), make_strides(bias_sizes(ps), "contiguous"), d.dtype, d.offset);
  Buffer* inputs[] = {&x, &w, &v, &w_bias, &v_bias};
  for (uint64_t i = 0; i < 5; ++i) inputs[i]->fill_random(seed * 5 + i);
  Buffer* const first_bias = d.bias ? &w_bias : nullptr;
  Buffer* const second_bias = p.bias ? &v_bias : nullptr;
  const auto data = [](Buffer* buffer) { return buffer ? buffer->data() : nullptr; };
  Buffer workspace(0);
  const std::string failed = run_watched(seed, y, workspace, [&] {
    return sepconv::cuda::run_separable(plan, {ds, ps}, d.dtype,
                                        {x.data(),
                                         w.data(),
                                         {data(first_bias), d.activation},
                                         v.data(),
                                         {data(second_bias), p.activation},
                                         y.data(),
                                         nullptr},
                                        nullptr);
  });
  if (!failed.empty()) return failed;
  const auto h = reference(Map::forward, ds, sepconv::PaddingMode::zeros, x, w, first_bias, d.activation);
  return judge(p, y, reference_pointwise(ps, h, d.dtype, v, second_bias, p.activation), y_sizes);
}

// op=inverted_residual. Empty: right.
std::string run_block(const Case& c, const Arguments& arguments, uint64_t seed) {
  const sepconv::BlockShape s = read_block(arguments, c);
  const sepconv::cuda::Plan plan = make_plan(c, arguments);
  if (seed == 0) printf("plan: %s\n", plan.name);
  const ConvShape& d = s.depthwise;
  const auto activation = [&](const char* key) {
    return read_case(Arguments({std::string("activation=") + arguments.text(key, "identity")})).activation;
  };
  const Activation expand_activation = activation("expand_activation"), last = activation("pointwise_activation");
  const auto dense = [](const Sizes& sizes) { return make_strides(sizes, "contiguous"); };
  const Sizes x_sizes{d.N, s.C, d.H, d.W}, y_sizes{d.N, s.K, d.P, d.Q},
      w_sizes[] = {{d.C, s.C, 1, 1}, {d.C, 1, d.R, d.S}, {s.K, d.C, 1, 1},
                   {1, d.C, 1, 1},   {1, d.C, 1, 1},     {1, s.K, 1, 1}};
  Buffer x(x_sizes, d.x, c.dtype, c.offset), y(y_sizes, d.y, c.dtype, c.offset);
  Buffer expand(w_sizes[0], dense(w_sizes[0]), c.dtype, c.offset), w(w_sizes[1], dense(w_sizes[1]), c.dtype, c.offset);
  Buffer project(w_sizes[2], dense(w_sizes[2]), c.dtype, c.offset);
  Buffer expand_bias(w_sizes[3], dense(w_sizes[3]), c.dtype, c.offset),
      bias(w_sizes[4], dense(w_sizes[4]), c.dtype, c.offset);
  Buffer project_bias(w_sizes[5], dense(w_sizes[5]), c.dtype, c.offset);
  Buffer* inputs[] = {&x, &expand, &w, &project, &expand_bias, &bias, &project_bias};
  for (uint64_t i = 0; i < 7; ++i) inputs[i]->fill_random(seed * 7 + i);
  if (arguments.number("infinite", 0) == 1) x.scatter_infinite(seed);
  if (arguments.number("infinite", 0) == 2) x.make_last_pixel_infinite();
  const auto given = [&](Buffer& b) { return c.bias ? &b : nullptr; };
  const auto data = [&](Buffer& b) { return c.bias ? b.data() : nullptr; };
  Buffer workspace(0);
  const std::string failed = run_watched(seed, y, workspace, [&] {
    const sepconv::BlockMemory memory{x.data(),
                                      s.expands ? expand.data() : nullptr,
                                      {data(expand_bias), expand_activation},
                                      w.data(),
                                      {data(bias), c.activation},
                                      project.data(),
                                      {data(project_bias), last},
                                      y.data()};
    return sepconv::cuda::run_block(plan, s, c.dtype, memory, nullptr);
  });
  if (!failed.empty()) return failed;
  const auto product = [](int64_t N, int64_t C, int64_t K, int64_t H, int64_t W) {
    ConvShape p;
    p.N = N, p.C = C, p.K = K, p.R = p.S = 1, p.H = p.P = H, p.W = p.Q = W;
    return p;
  };
  const auto of = [&](const ConvShape& shape, const Buffer& weight, Buffer& b, Activation a) {
    return reference(Map::forward, shape, sepconv::PaddingMode::zeros, x, weight, given(b), a);
  };
  const auto saturated = [&](std::vector<Expected> e) {  // as the kernel keeps e finite
    const double largest = c.dtype == DType::float16 ? 65504 : 0x1.FEp127;
    for (Expected& number : e) {
      if (std::isinf(number.value)) number.value = std::copysign(largest, number.value), number.magnitude = largest;
    }
    return e;
  };
  const std::vector<Expected> deep =
      !s.expands ? of(d, w, bias, c.activation)
                 : reference_depthwise(
                       d, saturated(of(product(d.N, s.C, d.C, d.H, d.W), expand, expand_bias, expand_activation)),
                       c.dtype, w, given(bias), c.activation);
  return judge(c, y,
               reference_pointwise(product(d.N, d.C, s.K, d.P, d.Q), deep, c.dtype, project, given(project_bias), last,
                                   s.residual ? &x : nullptr),
               y_sizes);
}

// op=spatial_separable: a column and a row filter, each of its own memory. Empty: right.
std::string run_spatial(const Case& c, uint64_t seed) {
  const ConvShape& s = c.shape;
  const Sizes x_sizes{s.N, s.C, s.H, s.W}, y_sizes{s.N, s.C, s.P, s.Q};
  const Sizes column_sizes{c.shared_column ? 1 : s.C, 1, 1, s.R}, row_sizes{c.shared_row ? 1 : s.C, 1, 1, s.S};
  Buffer x(x_sizes, s.x, c.dtype, c.offset), y(y_sizes, s.y, c.dtype, c.offset);
  Buffer column(column_sizes, make_strides(column_sizes, "contiguous"), c.dtype, c.offset);
  Buffer row(row_sizes, make_strides(row_sizes, "contiguous"), c.dtype, c.offset);
  x.fill_random(seed * 3 + 1);
  column.fill_random(seed * 3 + 2);
  row.fill_random(seed * 3 + 3);
  const sepconv::SpatialFilters filters{column.data(), row.data(), c.shared_column ? 0 : s.R, c.shared_row ? 0 : s.S};
  Buffer workspace(0);
  const std::string failed = run_watched(seed, y, workspace, [&] {
    return sepconv::cuda::launch_spatial_separable(s, c.dtype, x.data(), filters, y.data(), nullptr);
  });
  if (!failed.empty()) return failed;
  return judge(c, y, spatial_reference(s, x, column, row, c.shared_column, c.shared_row), y_sizes);
}

// op=causal, with runs of random lengths where packed= is their mean, some of them padding. Empty: right.
std::string run_causal(const Case& c, const Arguments& arguments, uint64_t seed) {
  const sepconv::CausalShape s = read_causal(arguments, c);
  const sepconv::cuda::Plan plan = make_plan(c, arguments);
  if (seed == 0) printf("plan: %s\n", plan.name);
  const bool has_states = arguments.number("states", 0);
  const auto packed = static_cast<uint64_t>(arguments.number("packed", 0));
  std::mt19937_64 engine(seed);
  std::vector<int64_t> numbers;
  for (int64_t n = 0; n < s.N && packed; ++n) {
    int64_t number = engine() % 4 ? int64_t{1} << 33 : -1;  // with 32 bits 0
    for (int64_t q = 0; q < s.L; ++q) {
      if (engine() % packed == 0) number = static_cast<int64_t>(engine() % 5) - 1;
      numbers.push_back(number);
    }
  }
  const Sizes sizes{s.N, s.C, 1, s.L}, state_sizes{s.N, s.C, 1, s.reach()}, bias_of{1, s.C, 1, 1};
  Buffer x(sizes, c.shape.x, c.dtype, c.offset), y(sizes, c.shape.y, c.dtype, c.offset);
  Buffer w({s.C, 1, 1, s.S}, c.shape.w, c.dtype, c.offset);
  Buffer bias(bias_of, make_strides(bias_of, "contiguous"), c.dtype, c.offset);
  Buffer states(state_sizes, {s.states.n, s.states.c, 0, s.states.l}, c.dtype, c.offset);
  Buffer* inputs[] = {&x, &w, &bias, &states};
  for (uint64_t i = 0; i < 4; ++i) inputs[i]->fill_random(seed * 4 + i);
  if (arguments.number("infinite", 0)) x.scatter_infinite(seed);
  const bool wide = arguments.number("wide", 0);
  Numbers lie(numbers, s.L, wide);
  Buffer* const added = c.bias ? &bias : nullptr;
  const sepconv::CausalMemory memory{x.data(),
                                     has_states ? states.data() : nullptr,
                                     w.data(),
                                     {added ? bias.data() : nullptr, c.activation},
                                     packed ? lie.as_they_lie() : sepconv::WholeNumbers{},
                                     y.data()};
  Buffer workspace(0);
  const std::string failed =
      run_watched(seed, y, workspace, [&] { return sepconv::cuda::run_causal(plan, s, c.dtype, memory, nullptr); });
  if (!failed.empty()) return failed;
  if (!wide) {
    for (int64_t& number : numbers) number = static_cast<int32_t>(number);
  }
  return judge(c, y, causal_reference(s, x, has_states ? &states : nullptr, w, added, c.activation, numbers), sizes);
}

// op=causal_update. Of several sequences one is skipped, and one has a state that there is not. Empty: right.
std::string run_causal_update(const Case& c, const Arguments& arguments, uint64_t seed) {
  const sepconv::CausalUpdateShape s = read_causal_update(arguments, c);
  if (seed == 0) printf("plan: cuda_causal_update\n");
  const bool wide = arguments.number("wide", 0);
  std::mt19937_64 engine(seed);
  std::vector<int64_t> lengths, rows;
  for (int64_t n = 0; n < s.N && arguments.number("ring", 0); ++n) {
    lengths.push_back(static_cast<int64_t>(engine() % (3 * s.length)) - (n == 1 ? 2 * s.length : 0));
    if (wide && n == 2) lengths.back() += int64_t{3} << 33;
  }
  for (int64_t n = 0; n < s.N && arguments.number("rows", 0); ++n) {
    rows.push_back(n == 1   ? -1 - static_cast<int64_t>(seed)
                   : n == 3 ? s.states
                            : (n + static_cast<int64_t>(seed)) % s.states);
  }
  const Sizes x_sizes{s.N, s.C, 1, s.T}, state_sizes{s.states, s.C, 1, s.length}, bias_of{1, s.C, 1, 1};
  const DType weights = s.float_weight ? DType::float32 : c.dtype;
  Buffer x(x_sizes, c.shape.x, c.dtype, c.offset), y(x_sizes, c.shape.y, c.dtype, c.offset);
  Buffer w({s.C, 1, 1, s.S}, c.shape.w, weights, c.offset);
  Buffer bias(bias_of, make_strides(bias_of, "contiguous"), weights, c.offset);
  Buffer state(state_sizes, {s.state.n, s.state.c, 0, s.state.l}, c.dtype, c.offset);
  Buffer* inputs[] = {&x, &w, &bias, &state};
  for (uint64_t i = 0; i < 4; ++i) inputs[i]->fill_random(seed * 4 + i);
  Numbers lengths_lie(lengths, 1, wide), rows_lie(rows, 1, wide);
  Buffer* const added = c.bias ? &bias : nullptr;
  const Updated expected = update_reference(s, x, w, added, c.activation, lengths, rows, state);
  const sepconv::WholeNumbers none;
  const sepconv::CausalUpdateMemory memory{x.data(),
                                           w.data(),
                                           {added ? bias.data() : nullptr, c.activation},
                                           lengths.empty() ? none : lengths_lie.as_they_lie(),
                                           rows.empty() ? none : rows_lie.as_they_lie(),
                                           state.data(),
                                           y.data()};
  Buffer workspace(0);
  const std::string failed = run_watched(seed, y, workspace, [&] {
    race::watch_in_place(state.data(), state.bytes());
    return sepconv::cuda::launch_causal_update(s, c.dtype, memory, nullptr);
  });
  if (!failed.empty()) return failed;
  const std::string wrong = judge(c, y, expected.y, x_sizes);
  if (!wrong.empty()) return wrong;
  const std::string moved = judge(c, state, expected.state, state_sizes);
  return moved.empty() ? "" : "state: " + moved;
}

// Empty: right.
std::string run(const Case& c, const Arguments& arguments, uint64_t seed) {
  const sepconv::cuda::Plan plan = make_plan(c, arguments);
  if (seed == 0) printf("plan: %s\n", plan.name);
  const ConvShape s = with_copies(c.shape, plan.copies);  // what the kernel gets: copies are torch's
  const Sizes x_sizes{s.N, s.C, s.H, s.W}, y_sizes{s.N, s.K, s.P, s.Q}, w_sizes{s.K, s.channels_per_group(), s.R, s.S};
  Buffer x(x_sizes, s.x, c.dtype, c.offset), y(y_sizes, s.y, c.dtype, c.offset), w(w_sizes, s.w, c.dtype, c.offset);
  Buffer bias(bias_sizes(s), make_strides(bias_sizes(s), "contiguous"), c.dtype, c.offset);
  Buffer& out = c.map == Map::forward ? y : c.map == Map::grad_input ? x : w;
  Buffer& first = c.map == Map::forward ? x : y;
  Buffer& second = c.map == Map::grad_weight ? x : w;
  Buffer residual(y_sizes, s.y, c.dtype, c.offset);
  first.fill_random(seed * 3 + 1);
  second.fill_random(seed * 3 + 2);
  bias.fill_random(seed * 3 + 3);
  if (c.residual) residual.fill_random(seed * 3 + 4);
  if (arguments.number("infinite", 0)) first.scatter_infinite(seed);
  if (c.residual && !plan.adds_residual()) return std::string(plan.name) + " adds no residual";
  const bool has_bias = c.bias && c.map == Map::forward;
  const Activation activation = c.map == Map::forward ? c.activation : Activation::identity;

  Buffer workspace(plan.workspace_bytes);  // not a byte larger than planned

  const std::string failed = run_watched(seed, out, workspace, [&] {
    const sepconv::Epilogue epilogue{has_bias ? bias.data() : nullptr, activation,
                                     c.residual ? residual.data() : nullptr};
    const sepconv::BorderExtent border = sepconv::border_extent(c.map, s, c.padding_mode);
    const sepconv::cuda::Launch launch{s,        c.dtype,    first.data(),     second.data(),
                                       epilogue, out.data(), workspace.data(), nullptr};
    cudaError_t error = cudaSuccess;
    if (border != sepconv::BorderExtent::all) error = sepconv::cuda::run(plan, c.map, launch);
    if (error != cudaSuccess || border == sepconv::BorderExtent::none) return error;
    return sepconv::cuda::run_borders(c.map, launch, c.padding_mode);
  });
  if (!failed.empty()) return failed;

  const auto expected = reference(c.map, s, c.padding_mode, first, second, has_bias ? &bias : nullptr, activation,
                                  c.residual ? &residual : nullptr);
  const Sizes& sizes = c.map == Map::forward ? y_sizes : c.map == Map::grad_input ? x_sizes : w_sizes;
  return judge(c, out, expected, sizes);
}

}  // namespace

int main(int count, char** values) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  if (const char* seconds = getenv("EMULATOR_SECONDS")) alarm(atoi(seconds));  // also where the parent is gone
  Buffer::fills = getenv("PTX_DRY") == nullptr;                                // tests/ptx/runtime.cpp
  try {
    std::vector<std::vector<std::string>> cases(1);
    for (int i = 1; i < count; ++i) {
      if (std::string(values[i]) == "--") {
        cases.emplace_back();
      } else {
        cases.back().push_back(values[i]);
      }
    }
    for (size_t i = 0; i < cases.size(); ++i) {
      const Arguments arguments(cases[i]);
      const Case c = read_case(arguments);
      const auto seeds = arguments.numbers("seeds", "0:1", ':');  // first and one past the last
      for (int64_t seed = seeds.at(0); seed < seeds.at(1); ++seed) {
        fprintf(stderr, "case %zu seed %lld\n", i, (long long)seed);  // what a sanitizer's report belongs to
        const std::string wrong = c.spatial                     ? run_spatial(c, seed)
                                  : c.op == "inverted_residual" ? run_block(c, arguments, seed)
                                  : c.op == "causal"            ? run_causal(c, arguments, seed)
                                  : c.op == "causal_update"     ? run_causal_update(c, arguments, seed)
                                  : is_separable(arguments)     ? run_separable(c, arguments, seed)
                                                                : run(c, arguments, seed);
        if (wrong.empty()) continue;
        printf("FAULT with seed %lld: %s\n", (long long)seed, wrong.c_str());
        return 1;
      }
    }
    for (const Trace& trace : traces()) {  // emulate.py finds the names
      printf("launch:");
      for (const uintptr_t address : trace) printf(" %llx", (unsigned long long)address);
      printf("\n");
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
