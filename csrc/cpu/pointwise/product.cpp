// Pointwise convolution of float32 as a matrix product over pixels, with bias, residual and activation in registers.
//
// Loop-to-data map. Which operand is read by vectors follows the output's layout (product_simd.h has the block of
// sums):
//   channels_last   rows are pixels, lanes are output channels. The weight is in panels: the caller's, or packed here.
//   NCHW            rows are output channels, lanes are pixels. A run of pixels is packed into panels; the weight is
//   read
//                   where it lies, or from the caller's panels.
// The input has any strides: pixels that are not at one distance are gathered first. A task has some of the pixels and
// some of the output channels. Whether pixels or channels come first within it decides what is read again and again:
//   small weight     a block of pixels meets all of the weight, which stays in the second-level cache
//   large weight     a panel of the weight meets as many pixels as stay there
// Of up to four outputs, in channels_last, the lanes are terms (product_few_simd.h).
// grad_input is the same product with the weight's two dimensions exchanged.
//
// Floor: C multiply-adds an output at the rate of the registers; for few pixels the bytes of the weight.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/pointwise/product.cpp"
#include "cpu/pointwise/product_shared.h"
#include "cpu/simd/thread_scratch.h"

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {
namespace {

PixelGrid grid_of(const ConvShape& s, const Strides& strides, int64_t step_h = 1, int64_t step_w = 1) {
  return {s.N, s.P, s.Q, strides.n, step_h * strides.h, step_w * strides.w};
}

PixelProduct forward_product(const ConvShape& s, const float* x, const Epilogue& epilogue, float* y) {
  PixelProduct p{};
  p.C = s.C, p.K = s.K;
  p.x = x, p.x_grid = grid_of(s, s.x, s.stride_h, s.stride_w), p.x_channel = s.x.c;
  p.y = y, p.y_grid = grid_of(s, s.y), p.y_channel = s.y.c;
  p.bias = static_cast<const float*>(epilogue.bias), p.activation = epilogue.activation;
  return p;
}

}  // namespace

void product_forward(const ConvShape& s, const float* x, const float* w, const Epilogue& epilogue, float* y) {
  PixelProduct p = forward_product(s, x, epilogue, y);
  p.w = w, p.w_output = s.w.n, p.w_term = s.w.c;
  SEPCONV_BEST_ISA(run)(p);
}

void product_forward_packed(const ConvShape& s, const float* x, const float* packed, const Epilogue& epilogue,
                            const Residual& residual, float* y) {
  PixelProduct p = forward_product(s, x, epilogue, y);
  p.packed = packed;
  p.residual = residual.data, p.residual_grid = grid_of(s, residual.strides), p.residual_channel = residual.strides.c;
  SEPCONV_BEST_ISA(run)(p);
}

void product_grad_input(const ConvShape& s, const float* grad_y, const float* w, float* grad_x) {
  PixelProduct p{};
  p.C = s.K, p.K = s.C;
  p.x = grad_y, p.x_grid = grid_of(s, s.y), p.x_channel = s.y.c;
  p.w = w, p.w_output = s.w.c, p.w_term = s.w.n;
  p.y = grad_x, p.y_grid = grid_of(s, s.x), p.y_channel = s.x.c;
  SEPCONV_BEST_ISA(run)(p);
}

bool product_can_write(const ConvShape& s) {
  const PixelProduct p = forward_product(s, nullptr, {}, nullptr);
  return p.lanes_are_outputs() || p.lanes_are_pixels();
}

void product_pack(int64_t K, int64_t C, const float* w, int64_t w_output, int64_t w_term, float* packed) {
  SEPCONV_BEST_ISA(pack_weight)(K, C, w, w_output, w_term, packed);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

#include "cpu/simd/transpose_simd.h"

#include "cpu/pointwise/product_pack_simd.h"
#include "cpu/pointwise/product_simd.h"

#include "cpu/pointwise/product_rows_simd.h"

#include "cpu/pointwise/product_few_simd.h"

inline constexpr int64_t kMostPacked = 1024 << 10;  // bytes of a weight that is packed at a time
inline constexpr int64_t kOutputStep = 32;          // tasks have whole panels, two of them with the widest vectors

// Packs part `part` of the outputs of a weight, whose lanes are outputs.
struct PackTask {
  Source weight;
  int64_t K, C;
  float* packed;
  int64_t parts;

  void operator()(int64_t part) const {
    const Part outputs(K, parts, part, kPanelColumns);
    for (int64_t k = outputs.begin; k < outputs.end; k += kPanelColumns) {
      const Source panel{weight.at(k, 0), weight.lane, weight.term};
      pack_panel(panel, std::min(kPanelColumns, K - k), C, packed + k * C);
    }
  }
};

inline void pack_weight(int64_t K, int64_t C, const float* w, int64_t w_output, int64_t w_term, float* packed) {
  constexpr int64_t kTaskNumbers = 64 * 1024;
  const int64_t parts = std::clamp<int64_t>(K * C / kTaskNumbers, 1, num_threads());
  parallel(parts, PackTask{{w, w_output, w_term}, K, C, packed, parts});
}

// ---- channels_last: rows are pixels, lanes are outputs ----

struct PixelRows {
  const PixelProduct& p;
  Cut cut;

  static Cut choose_cut(const PixelProduct& p) {
    const int64_t parts = parts_of(p.multiplications()), pixels = p.y_grid.count();
    const bool large_weight = pixels <= 256 && p.C * p.K > (int64_t{1} << 18);
    if (pixels >= 2 * kRows * parts && !large_weight) return {parts, 1};
    Cut cut{1, std::min(parts, ceil_div(p.K, kOutputStep))};
    cut.pixel_parts = std::clamp<int64_t>(parts / cut.output_parts, 1, pixels);
    return cut;
  }

  // Pixels [begin, end), one row each.
  Factors rows(int64_t begin, int64_t end, ThreadScratch& scratch) const {
    const Factors x{p.x + p.x_grid.offset(begin), p.x_grid.step(), p.x_channel};
    if (p.x_grid.even(begin, end) && !share_sets(x, end - begin, p.K)) return x;
    const int64_t pitch = spread_pitch(p.C);
    float* to = scratch.take((end - begin) * pitch);
    gather(p.x, p.x_grid, begin, end, p.C, p.x_channel, to, pitch, 1);
    return {to, pitch, 1};
  }

  Outputs outputs(int64_t begin) const {
    Outputs y{p.y + p.y_grid.offset(begin), p.y_grid.step()};
    if (p.residual != nullptr) {
      y.residual = p.residual + p.residual_grid.offset(begin), y.residual_row = p.residual_grid.step();
    }
    y.column_bias = p.bias, y.activation = p.activation;
    return y;
  }

  bool lanes_are_terms() const { return p.x_channel == 1 && has_few_outputs(p.K, p.C); }

  // `last`: the end of the task's pixels.
  void block(int64_t begin, int64_t end, int64_t last, const Part& part) const {
    ThreadScratch scratch(ScratchUse::pixels);
    const Factors x = rows(begin, end, scratch);
    const float* next = end < last && p.x_grid.even(begin, end) ? p.x + p.x_grid.offset(end) : nullptr;
    const Outputs y = outputs(begin);
    const Panels w{p.packed, p.C};
    if (lanes_are_terms()) return multiply_few(x, w, y, end - begin, p.K);
    multiply_pixels(x, w, y, end - begin, part.begin, part.end, next_pixels(x, w, next, end - begin));
  }

  void operator()(int64_t task) const {
    const Part pixels(p.y_grid.count(), cut.pixel_parts, task / cut.output_parts);
    const Part part(p.K, cut.output_parts, task % cut.output_parts, kOutputStep);
    const int64_t count = pixels.end - pixels.begin;
    if (SEPCONV_ISA_LEVEL == 1 && count > 0 && !lanes_are_terms() && p.x_grid.even(pixels.begin, pixels.end)) {
      const Factors x{p.x + p.x_grid.offset(pixels.begin), p.x_grid.step(), p.x_channel};
      const Outputs y = outputs(pixels.begin).from(0, part.begin);
      return multiply_all(x, Panels{p.packed, p.C}.from(part.begin), y, count, part.end - part.begin);
    }
    const int64_t near = std::max<int64_t>(4 * kRows, kNearPixels / (p.C * int64_t{sizeof(float)}));
    const Pieces blocks(count, lanes_are_terms() ? near : block_pixels(p.C, p.K, p.y_grid.count()));
    for (int64_t i = 0; i < blocks.count; ++i) {
      block(pixels.begin + blocks.begin(i), pixels.begin + blocks.begin(i + 1), pixels.end, part);
    }
  }
};

// ---- NCHW: rows are outputs, lanes are pixels ----

struct PixelColumns {
  const PixelProduct& p;
  int64_t per_image;  // blocks of kColumns pixels
  Cut cut;

  static Cut choose_cut(const PixelProduct& p, int64_t blocks) {
    const int64_t parts = parts_of(p.multiplications()), by_outputs = std::min(parts, ceil_div(p.K, kOutputStep));
    if (blocks >= 4 * parts || by_outputs == 1) return {std::min(parts, blocks), 1};
    return {std::clamp<int64_t>(parts / by_outputs, 1, blocks), by_outputs};
  }

  // Pixels [begin, end) of the batch, all of one image.
  void pack(int64_t begin, int64_t end, float* to) const {
    for (int64_t i = begin; i < end; i += kPanelColumns, to += kPanelColumns * p.C) {
      const int64_t lanes = std::min(kPanelColumns, end - i);
      if (p.x_grid.even(i, i + lanes)) {
        pack_panel({p.x + p.x_grid.offset(i), p.x_grid.step(), p.x_channel}, lanes, p.C, to);
      } else {
        if (lanes < kPanelColumns) std::fill_n(to, kPanelColumns * p.C, 0.0f);
        gather(p.x, p.x_grid, i, i + lanes, p.C, p.x_channel, to, 1, kPanelColumns);
      }
    }
  }

  // Outputs from k on.
  Factors rows(int64_t k) const {
    if (p.packed == nullptr) return {p.w + k * p.w_output, p.w_output, p.w_term};
    return {p.packed + k / kPanelColumns * kPanelColumns * p.C + k % kPanelColumns, 1, kPanelColumns};
  }

  Outputs outputs(int64_t begin) const {
    Outputs y{p.y + p.y_grid.offset(begin), p.y_channel};
    if (p.residual != nullptr) {
      y.residual = p.residual + p.residual_grid.offset(begin), y.residual_row = p.residual_channel;
    }
    y.row_bias = p.bias, y.activation = p.activation;
    return y;
  }

  void block(int64_t begin, int64_t end, const Part& part) const {
    ThreadScratch scratch(ScratchUse::pixels);
    float* const packed = scratch.take(product_packed_floats(end - begin, p.C));
    pack(begin, end, packed);
    const Panels x{packed, p.C};
    const Outputs y = outputs(begin);
    const int64_t group = p.packed != nullptr ? kPanelColumns : p.K;  // rows that follow each other at one distance
    for (int64_t first = part.begin; first < part.end; first += group) {
      const Pieces pieces(std::min(group, part.end - first), kRows);
      for (int64_t piece = 0; piece < pieces.count; ++piece) {
        const int64_t k = first + pieces.begin(piece), height = pieces.begin(piece + 1) - pieces.begin(piece);
        for (int64_t j = 0; j < end - begin; j += kColumns) {
          multiply(rows(k), x.from(j), y.from(k, j), height, std::min(kColumns, end - begin - j));
        }
      }
    }
  }

  void operator()(int64_t task) const {
    const int64_t near = kNearPixels / (p.C * kColumns * int64_t{sizeof(float)});
    const Part blocks(p.y_grid.N * per_image, cut.pixel_parts, task / cut.output_parts);
    const Part part(p.K, cut.output_parts, task % cut.output_parts, kOutputStep);
    const int64_t pixels = p.y_grid.per_image();
    for (int64_t b = blocks.begin, next; b < blocks.end; b = next) {
      const int64_t image = b / per_image, first = b % per_image;
      next = std::min({blocks.end, (image + 1) * per_image, b + std::max<int64_t>(1, near)});
      const int64_t last = std::min(pixels, (first + next - b) * kColumns);
      block(image * pixels + first * kColumns, image * pixels + last, part);
    }
  }
};

// ---- either ----

inline void multiply_in_parallel(const PixelProduct& p) {
  if (p.lanes_are_outputs()) {
    const PixelRows product{p, PixelRows::choose_cut(p)};
    parallel(product.cut.tasks(), product);
  } else {
    const int64_t per_image = ceil_div(p.y_grid.per_image(), kColumns);
    const PixelColumns product{p, per_image, PixelColumns::choose_cut(p, p.y_grid.N * per_image)};
    parallel(product.cut.tasks(), product);
  }
}

// The weight is packed where it is read by vectors, or number by number from far apart: some outputs at a time, so that
// what is packed stays in some cache.
inline void run(const PixelProduct& p) {
  if (p.y_grid.count() == 0 || p.K == 0) return;
  const bool as_it_lies = !p.lanes_are_outputs() && p.w_term == 1;
  if (p.packed != nullptr || as_it_lies) return multiply_in_parallel(p);
  const int64_t fitting = kMostPacked / (p.C * int64_t{sizeof(float)}) / kOutputStep * kOutputStep;
  const int64_t outputs = std::min(p.K, std::max(fitting, kOutputStep));
  ThreadScratch scratch(ScratchUse::weights);
  float* const packed = scratch.take(product_packed_floats(outputs, p.C));
  for (int64_t k = 0; k < p.K; k += outputs) {
    const PixelProduct some = p.some_outputs(k, std::min(outputs, p.K - k), packed);
    pack_weight(some.K, p.C, p.w + k * p.w_output, p.w_output, p.w_term, packed);
    multiply_in_parallel(some);
  }
}

#endif
