// Which kernel runs a causal call. Predicted, not measured: benchmarks/notes/sequences.md.
#include "cuda/plan_parts.h"
#include "cuda/sequences/cut.h"

namespace sepconv::cuda {
namespace {

// Threads that keep a multiprocessor's share of the memory busy: 16 warps, each with kAhead vectors on their way.
constexpr int64_t kBusyThreads = 512;

// Whether vectors of 16 bytes begin at every step of these strides, of dimensions with more than one element.
bool whole_vectors(const CausalShape& s, const SequenceStrides& t, int64_t vec, bool channels) {
  const auto whole = [vec](int64_t size, int64_t stride) { return size == 1 || stride % vec == 0; };
  return whole(s.N, t.n) && (channels ? whole(s.L, t.l) : whole(s.C, t.c));
}

// Strips as long as leave enough threads, of equal length.
int strip_rows(const CausalShape& s, int64_t vec, int64_t multiprocessors) {
  constexpr int64_t kBefore = kCausalTaps - 1, kMost = 16, kLeast = 2;  // of steps of kCausalTaps vectors
  const int64_t positions = ceil_div(s.L, std::min(s.dilation, s.L));
  const auto even = [&](int64_t rows) {
    const int64_t each = ceil_div(positions, ceil_div(positions, rows));
    return ceil_div(each + kBefore, kCausalTaps) * kCausalTaps - kBefore;
  };
  int64_t steps = kMost;
  while (steps > kLeast &&
         causal_walk(s, vec, even(steps * kCausalTaps - kBefore)).threads < kBusyThreads * multiprocessors) {
    steps /= 2;
  }
  return static_cast<int>(even(steps * kCausalTaps - kBefore));
}

}  // namespace

Plan plan_causal(const CausalShape& s, DType dtype, const Device& device, int64_t alignment) {
  const auto composite = [](const char* reason) { return Plan{Kernel::composite, "composite", reason, {}, 0}; };
  if (!device.has_code) return composite("this build has no code for the GPU");
  const int64_t vec = 16 / element_size(dtype);
  if (std::max({s.N, s.C, s.L + 2 * kCausalTaps * 64 * s.dilation, s.S, s.L + s.reach()}) >= kCausalLimit ||
      s.N * ceil_div(s.C, kCausalChannels) * s.L >= kCausalLimit ||
      s.N * s.C * ceil_div(s.L, kCausalChannels) >= kCausalLimit) {
    return composite("2^31 threads or positions and more");
  }
  const auto span = [&](const SequenceStrides& t, int64_t length) { return s.C * t.c + length * t.l; };
  if (std::max({span(s.x, s.L), span(s.y, s.L), span(s.states, s.reach()), s.C * s.w_c + s.S * s.w_s}) >=
      kCausalLimit) {
    return composite("a sequence of 2^31 elements and more");
  }
  const auto whole = [&](bool channels) {
    return alignment >= 16 && whole_vectors(s, s.x, vec, channels) && whole_vectors(s, s.y, vec, channels);
  };
  if (s.S > kCausalTaps) {
    return {Kernel::causal_direct, "cuda_causal_direct", "more than four taps", CausalCut{}, 0};
  }
  if (causal_channels_dense(s) && s.C % vec == 0 && whole(true)) {
    const CausalCut cut{.rows = strip_rows(s, vec, device.multiprocessors)};
    return {Kernel::causal_nlc, "cuda_causal_nlc", "channels dense: vectors of them walk along the positions", cut, 0};
  }
  if (s.x.l == 1 && s.y.l == 1 && s.dilation == 1 && dtype != DType::float64) {
    const bool aligned = s.L % vec == 0 && whole(false);
    return {Kernel::causal_ncl, "cuda_causal_ncl",
            aligned ? "positions dense: vectors of them, and the few before"
                    : "positions dense, rows off 16 bytes: few of them, one by one, and the few before",
            CausalCut{.vec = aligned ? static_cast<int>(vec) : 1}, 0};
  }
  return {Kernel::causal_direct, "cuda_causal_direct", "neither vectors of channels nor positions without dilation",
          CausalCut{}, 0};
}

}  // namespace sepconv::cuda
