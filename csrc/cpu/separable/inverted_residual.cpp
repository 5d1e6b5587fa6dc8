// Inverted residual blocks of float32 in one pass: what stands between the convolutions stays in the second-level
// cache.
//
// Loop-to-data map. Lanes are channels everywhere (product_simd.h, depthwise_rows_simd.h). Two ways to cut a block:
//   by rows      A task has a strip of one image's output rows, and goes through it by bands. It expands the rows
//                that the band is the first to need into a ring, runs the depthwise convolution from there into a
//                buffer, and projects that. Strips of one image expand the rows that they share twice.
//   by channels  A task has some channels of e, expands and convolves them for the whole image, by bands too if they
//                are too large, and keeps d; then d is projected like any product. For a gate, which needs d's means
//                first; and for small images shared by several threads, where strips would expand much twice.
// The sums of channels are taken row by row in order. So no result depends on the cut.
//
// Floor: the multiply-adds of three products at the rate of the registers.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/separable/inverted_residual.cpp"
#include "cpu/separable/inverted_residual.h"

#include "cpu/pointwise/product_shared.h"
#include "cpu/simd/thread_scratch.h"

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void inverted_residual_forward(const InvertedResidualShape& shape, const InvertedResidualMemory& memory) {
  if (shape.N * shape.K * shape.depthwise.P * shape.depthwise.Q == 0) return;
  SEPCONV_BEST_ISA(run)(shape, memory);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

#include "cpu/pointwise/product_simd.h"

#include "cpu/pointwise/product_rows_simd.h"

// Of the ring and the band of d: half of a second-level cache, 1 MiB with AVX-512 and 512 KiB without, is the rest's.
inline constexpr int64_t kBandBytes = (SEPCONV_ISA_LEVEL == 2 ? 384 : 256) << 10;
inline constexpr int64_t kFarImage = 512 << 10;   // bytes of an image that is not in the second-level cache
inline constexpr int64_t kFetchedTerms = 64;      // below which AVX-512's products lose more than such fetches bring
inline constexpr int64_t kChannelStep = 32;       // tasks have whole panels, two of them with the widest vectors
inline constexpr int64_t kFewOutputPixels = 100;  // of which each strip would read a far weight for too few
inline constexpr int64_t kMostExpandedTwice = 8;  // one row in so many, or else threads share channels

// Numbers from one pixel to the next in scratch memory: an odd number of cache lines, to spread over the cache's sets.
inline int64_t pitch_of(int64_t channels) { return (ceil_div(channels, kDepthwiseLanes) | 1) * kDepthwiseLanes; }

// Some channels of e and d.
struct Block {
  const InvertedResidualShape& s;
  const InvertedResidualMemory& m;
  int64_t first, channels;
  int64_t pitch, band, ring;  // band: output rows; ring: rows of e

  Block(const InvertedResidualShape& shape, const InvertedResidualMemory& memory, const Part& part, int64_t most_rows)
      : s(shape), m(memory), first(part.begin), channels(part.end - part.begin), pitch(pitch_of(channels)) {
    const DepthwiseShape& d = s.depthwise;
    const int64_t row = pitch * int64_t{sizeof(float)}, step = std::min(d.stride_h, reach());
    const int64_t x_rows = step * d.W * m.x_pixel * int64_t{sizeof(float)};  // that an output row needs
    const int64_t each = d.Q * row + (expands() ? step * d.W * row : fetches() ? x_rows : 0);
    const int64_t before = expands() ? (reach() - step) * d.W * row : 0;
    const Pieces bands(most_rows, std::clamp<int64_t>((kBandBytes - before) / each, 1, most_rows));
    band = ceil_div(most_rows, bands.count);
    ring = expands() ? std::min(d.H, (band - 1) * d.stride_h + reach()) : d.H;
  }

  bool expands() const { return m.expand != nullptr; }
  int64_t image_bytes() const { return s.depthwise.H * s.depthwise.W * s.C * int64_t{sizeof(float)}; }
  // Whether the rows of x that a band needs are fetched while the one before it is projected: from beyond the near
  // caches, where the depthwise convolution would wait for them. Such a band is small enough for its rows of x, too,
  // and all of the weight is read for each few pixels.
  bool fetches() const {
    const int64_t weight = s.E * s.K * int64_t{sizeof(float)};
    const bool few_terms = SEPCONV_ISA_LEVEL == 2 && s.E < kFetchedTerms;
    return !few_terms && !expands() && image_bytes() > kFarImage && weight <= kNearWeight / 2;
  }
  int64_t reach() const { return (s.depthwise.R - 1) * s.depthwise.dilation_h + 1; }
  int64_t ring_floats() const { return expands() ? ring * s.depthwise.W * pitch : 0; }
  int64_t band_floats() const { return band * s.depthwise.Q * pitch; }

  // Rows [from, to) of image n of e, into their places in the ring.
  void expand(int64_t n, int64_t from, int64_t to, float* e) const {
    const int64_t W = s.depthwise.W;
    for (int64_t next; from < to; from = next) {
      const int64_t at = from % ring;
      next = std::min(to, from + ring - at);
      Outputs out{e + at * W * pitch, pitch};
      out.column_bias = static_cast<const float*>(m.expand_epilogue.bias);
      if (out.column_bias != nullptr) out.column_bias += first;
      out.activation = m.expand_epilogue.activation;
      const Factors x{m.x + (n * s.depthwise.H + from) * W * m.x_pixel, m.x_pixel, 1};
      multiply_all(x, Panels{m.expand, s.C}.from(first), out, (next - from) * W, channels);
    }
  }

  DepthwiseRows rows(int64_t n, const float* e, float* d, int64_t d_pitch, float* sums) const {
    const DepthwiseShape& shape = s.depthwise;
    const int64_t W = shape.W;
    DepthwiseRows rows{};
    rows.shape = &shape;
    if (expands()) {
      rows.x = e, rows.ring = ring, rows.x_row = W * pitch, rows.x_pixel = pitch;
    } else {
      rows.ring = shape.H, rows.x_row = W * m.x_pixel, rows.x_pixel = m.x_pixel;
      rows.x = m.x + n * shape.H * rows.x_row + first;
      rows.far = image_bytes() > kNearImage && !fetches();
    }
    rows.y = d, rows.y_row = shape.Q * d_pitch, rows.y_pixel = d_pitch;
    rows.packed = m.depthwise + first * shape.R * shape.S * shape.group;
    const float* bias = static_cast<const float*>(m.depthwise_epilogue.bias);
    rows.bias = bias == nullptr ? nullptr : bias + first;
    rows.activation = m.depthwise_epilogue.activation;
    rows.sums = sums, rows.channels = channels;
    return rows;
  }

  // The rows of x that output rows from p on are the first to need.
  Fetched next_rows(int64_t n, int64_t p) const {
    const DepthwiseShape& d = s.depthwise;
    if (!fetches() || p == d.P) return {};
    const int64_t row = d.W * m.x_pixel, before = (p - 1) * d.stride_h - d.pad_h + reach();
    const int64_t first = std::clamp<int64_t>(before, 0, d.H), count = std::min(band * d.stride_h, d.H - first);
    if (count <= 0) return {};
    return {m.x + (n * d.H + first) * row, count * row};
  }

  // Calls after(p, end) when the output rows [p, end) of d are done: for bands that make up [p0, p1).
  template <typename After>
  void bands(int64_t n, int64_t p0, int64_t p1, float* e, DepthwiseRows& rows, const After& after) const {
    const DepthwiseShape& d = s.depthwise;
    int64_t next = 0;  // row of e
    for (int64_t p = p0, end; p < p1; p = end) {
      end = std::min(p1, p + band);
      if (expands()) {
        const int64_t last = std::min(d.H, (end - 1) * d.stride_h - d.pad_h + reach());
        next = std::max(next, p * d.stride_h - d.pad_h);
        if (next < last) expand(n, next, last, e), next = last;
      }
      after.prepare(rows, p);
      depthwise_rows(rows, p, end);
      after(p, end);
    }
  }
};

// ---- by rows ----

struct ProjectBand {
  const Block& b;
  int64_t n;
  float* d;
  void prepare(DepthwiseRows& rows, int64_t p) const { rows.y = d - p * rows.y_row; }
  void operator()(int64_t p, int64_t end) const {
    const InvertedResidualMemory& m = b.m;
    const int64_t K = b.s.K, Q = b.s.depthwise.Q, pixel = (n * b.s.depthwise.P + p) * Q;
    Outputs y{m.y + pixel * m.y_pixel, m.y_pixel};
    if (m.residual != nullptr) y.residual = m.residual + pixel * m.residual_pixel, y.residual_row = m.residual_pixel;
    y.column_bias = static_cast<const float*>(m.project_epilogue.bias), y.activation = m.project_epilogue.activation;
    multiply_all({d, b.pitch, 1}, {m.project, b.s.E}, y, (end - p) * Q, K, b.next_rows(n, end));
  }
};

struct RowTask {
  const InvertedResidualShape& s;
  const InvertedResidualMemory& m;
  int64_t strips;
  void operator()(int64_t task) const {
    const Part strip(s.depthwise.P, strips, task % strips);
    const Block b(s, m, Part(s.E, 1, 0), strip.end - strip.begin);
    ThreadScratch scratch(ScratchUse::ring);
    float* const e = scratch.take(b.ring_floats() + b.band_floats());
    float* const d = e + b.ring_floats();
    DepthwiseRows rows = b.rows(task / strips, e, d, b.pitch, nullptr);
    b.bands(task / strips, strip.begin, strip.end, e, rows, ProjectBand{b, task / strips, d});
  }
};

// ---- by channels ----

struct KeepBand {
  void prepare(DepthwiseRows&, int64_t) const {}
  void operator()(int64_t, int64_t) const {}
};

struct ChannelTask {
  const InvertedResidualShape& s;
  const InvertedResidualMemory& m;
  int64_t n, parts, step;
  float *d, *sums;  // sums [E], or null
  void operator()(int64_t task) const {
    const Part part(s.E, parts, task, step);
    const Block b(s, m, part, s.depthwise.P);
    ThreadScratch scratch(ScratchUse::ring);
    float* const e = scratch.take(b.ring_floats());
    float* const some_sums = sums == nullptr ? nullptr : sums + part.begin;
    if (some_sums != nullptr) std::fill_n(some_sums, b.channels, 0.0f);
    DepthwiseRows rows = b.rows(n, e, d + part.begin, pitch_of(s.E), some_sums);
    b.bands(n, 0, s.depthwise.P, e, rows, KeepBand{});
  }
};

// sums [E] -> gate [E]; `scratch` has room for M.
inline void make_gate(const InvertedResidualShape& s, const InvertedResidualMemory& m, float* sums, float* scratch,
                      float* gate) {
  const float share = 1.0f / static_cast<float>(s.depthwise.P * s.depthwise.Q);
  for (int64_t i = 0; i < s.E; ++i) sums[i] *= share;
  Outputs squeezed{scratch, 0};
  squeezed.column_bias = static_cast<const float*>(m.squeeze_epilogue.bias);
  squeezed.activation = m.squeeze_epilogue.activation;
  multiply_pixels({sums, 0, 1}, {m.squeeze, s.E}, squeezed, 1, 0, s.M);
  Outputs excited{gate, 0};
  excited.column_bias = m.excite_bias;
  if (m.gate == Gate::sigmoid) excited.activation = Activation::sigmoid;
  multiply_pixels({scratch, 0, 1}, {m.excite, s.M}, excited, 1, 0, s.E);
  if (m.gate == Gate::sigmoid) return;
  for (int64_t i = 0; i < s.E; ++i) gate[i] = std::min(std::max(gate[i] / 6 + 0.5f, 0.0f), 1.0f);
}

// Part of the pixels of d, times the gate.
struct ScalePixels {
  int64_t pixels, parts, E;
  const float* gate;
  float* d;
  void operator()(int64_t task) const {
    constexpr int64_t L = kLanes<float>;
    const Part part(pixels, parts, task);
    for (int64_t i = part.begin; i < part.end; ++i) {
      float* at = d + i * pitch_of(E);
      for (int64_t c = 0; c < E; c += L) {
        const int lanes = static_cast<int>(std::min(L, E - c));
        store_first(at + c, load_first(at + c, lanes) * load_first(gate + c, lanes), lanes);
      }
    }
  }
};

// Part of the panels of the projection's weight, times the gate.
struct ScaleWeight {
  int64_t panels, parts, E;
  const float *gate, *weight;
  float* scaled;
  void operator()(int64_t task) const {
    const Part part(panels, parts, task);
    for (int64_t i = part.begin * E; i < part.end * E; ++i) {
      const Vector<float> factor = broadcast<float>(gate[i % E]);
      for (int64_t v = 0; v < kPanelColumns; v += kLanes<float>) {
        store(scaled + i * kPanelColumns + v, load(weight + i * kPanelColumns + v) * factor);
      }
    }
  }
};

inline void project_image(const InvertedResidualShape& s, const InvertedResidualMemory& m, int64_t n, const float* d,
                          const float* weight) {
  const int64_t P = s.depthwise.P, Q = s.depthwise.Q, pitch = pitch_of(s.E);
  ConvShape product;
  product.N = product.R = product.S = 1, product.C = s.E, product.K = s.K;
  product.H = product.P = P, product.W = product.Q = Q;
  const auto strides = [&](int64_t pixel) { return Strides{P * Q * pixel, 1, Q * pixel, pixel}; };
  product.x = strides(pitch), product.y = strides(m.y_pixel);
  Residual residual;
  if (m.residual != nullptr) residual = {m.residual + n * P * Q * m.residual_pixel, strides(m.residual_pixel)};
  product_forward_packed(product, d, weight, m.project_epilogue, residual, m.y + n * P * Q * m.y_pixel);
}

struct ImageTask {
  const InvertedResidualShape& s;
  const InvertedResidualMemory& m;

  // How many parts of the channels: one a thread, and more where the whole image of e would not stay near.
  int64_t parts(int64_t step) const {
    const int64_t pixels = s.depthwise.H * s.depthwise.W * int64_t{sizeof(float)};
    const int64_t near = std::max(step, kBandBytes / pixels / step * step);
    const int64_t wanted = m.expand == nullptr ? 1 : ceil_div(s.E, near), threads = num_threads();
    return std::min(ceil_div(s.E, step), ceil_div(wanted, threads) * threads);
  }

  void operator()(int64_t n) const {
    const int64_t pixels = s.depthwise.P * s.depthwise.Q, threads = num_threads();
    const int64_t least = std::max(kPanelColumns, s.depthwise.group);  // whole panels and whole groups
    const int64_t step = s.E >= kChannelStep * threads ? std::max(kChannelStep, least) : least;
    const int64_t d_floats = pixels * pitch_of(s.E), line = pitch_of(s.E);
    const bool scales_weight = s.M > 0 && pixels > s.K;
    ThreadScratch scratch(ScratchUse::image);
    float* const d =
        scratch.take(d_floats + 2 * line + pitch_of(s.M) + (scales_weight ? product_packed_floats(s.K, s.E) : 0));
    float *const sums = d + d_floats, *const gate = sums + line, *const squeezed = gate + line;
    float* const scaled = squeezed + pitch_of(s.M);
    const int64_t count = parts(step);
    parallel(count, ChannelTask{s, m, n, count, step, d, s.M > 0 ? sums : nullptr});
    if (s.M > 0) {
      make_gate(s, m, sums, squeezed, gate);
      if (scales_weight) {
        parallel(threads, ScaleWeight{ceil_div(s.K, kPanelColumns), threads, s.E, gate, m.project, scaled});
      } else {
        parallel(threads, ScalePixels{pixels, threads, s.E, gate, d});
      }
    }
    project_image(s, m, n, d, scales_weight ? scaled : m.project);
  }
};

inline void run(const InvertedResidualShape& s, const InvertedResidualMemory& m) {
  const DepthwiseShape& d = s.depthwise;
  const int64_t threads = num_threads(), shared = (d.R - 1) * d.dilation_h + 1 - d.stride_h;
  const bool whole_images = s.N % threads == 0 || s.N >= 8 * threads;
  const int64_t twice = m.expand == nullptr ? 0 : (threads - 1) * shared;
  const bool far_weight = s.E * s.K * int64_t{sizeof(float)} > kNearWeight;
  const bool few_pixels = far_weight && d.P * d.Q <= kFewOutputPixels && threads > 1;
  if (s.M > 0 || (!whole_images && (twice * kMostExpandedTwice > d.H || few_pixels))) {
    const ImageTask image{s, m};
    if (whole_images) return parallel(s.N, image);
    for (int64_t n = 0; n < s.N; ++n) image(n);
    return;
  }
  const int64_t parts = m.expand == nullptr ? parts_of(d.P * d.Q * s.E * s.K) : threads;
  const int64_t strips = whole_images ? 1 : std::min(parts, d.P);
  parallel(s.N * strips, RowTask{s, m, strips});
}

#endif
