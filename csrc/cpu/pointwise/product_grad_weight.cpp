// The gradient by the weight of a pointwise convolution of float32, as a matrix product that sums over pixels.
//
// Loop-to-data map. grad_w[k, c] = sum over pixels i of grad_y[i, k] * x[i, c]: rows are output channels, lanes are
// input channels (product_simd.h has the block of sums). A task has some of both, and goes through all pixels, a block
// of them at a time. Of these, x is packed into panels, as many input channels as stay in the second-level cache; every
// row of grad_y is then multiplied by them. grad_y is packed first where its channels are dense, so that one row's
// numbers do not lie a pixel apart; where its planes are, it is read in place. The sums of a block are added to grad_w.
// Blocks of pixels are the same for any number of threads, and so are the results. Short sums added up are also more
// exact than one long one.
//
// Floor: N * P * Q multiply-adds a weight at the rate of the registers; for few channels the bytes of x and grad_y.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/pointwise/product_grad_weight.cpp"
#include "cpu/pointwise/product_shared.h"
#include "cpu/simd/thread_scratch.h"

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void product_grad_weight(const ConvShape& s, const float* grad_y, const float* x, float* grad_w) {
  SEPCONV_BEST_ISA(run)(s, grad_y, x, grad_w);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

#include "cpu/simd/transpose_simd.h"

#include "cpu/pointwise/product_pack_simd.h"
#include "cpu/pointwise/product_simd.h"

inline constexpr int64_t kFewestPixels = 64, kMostPixels = 256;  // of a block
inline constexpr int64_t kNearRows = 256 << 10;                  // bytes of packed grad_y, and
inline constexpr int64_t kNearLanes = 128 << 10;                 // of packed x, that stay in the second-level cache

struct WeightGradient {
  int64_t C, K;
  PixelGrid g_grid, x_grid;
  int64_t g_channel, x_channel, w_row;
  const float *grad_y, *x;
  float* grad_w;
  int64_t output_parts, input_parts;

  WeightGradient(const ConvShape& s, const float* grad_y, const float* x, float* grad_w)
      : C(s.C),
        K(s.K),
        g_grid{s.N, s.P, s.Q, s.y.n, s.y.h, s.y.w},
        x_grid{s.N, s.P, s.Q, s.x.n, s.stride_h * s.x.h, s.stride_w * s.x.w},
        g_channel(s.y.c),
        x_channel(s.x.c),
        w_row(s.w.n),
        grad_y(grad_y),
        x(x),
        grad_w(grad_w) {
    const int64_t parts = parts_of(g_grid.count() * C * K);
    input_parts = std::min(parts, ceil_div(C, 2 * kPanelColumns));
    output_parts = std::min(parts / input_parts, ceil_div(K, kPanelColumns));
  }

  // `lanes` channels from `first` on of an image, for the pixels [begin, end): panels whose terms are the pixels.
  static void pack(const float* image, const PixelGrid& grid, int64_t channel, int64_t begin, int64_t end,
                   int64_t first, int64_t lanes, float* to) {
    const int64_t terms = end - begin;
    for (int64_t l = 0; l < lanes; l += kPanelColumns, to += kPanelColumns * terms) {
      const int64_t count = std::min(kPanelColumns, lanes - l);
      const float* from = image + (first + l) * channel;
      if (grid.even(begin, end)) {
        pack_panel({from + grid.offset(begin), channel, grid.step()}, count, terms, to);
      } else {
        if (count < kPanelColumns) std::fill_n(to, kPanelColumns * terms, 0.0f);
        gather(from, grid, begin, end, count, channel, to, kPanelColumns, 1);
      }
    }
  }

  // grad_y for the pixels [begin, end): in place, or packed.
  struct Rows {
    const float *in_place, *packed;
    int64_t channel, terms;
    Factors from(int64_t k) const {
      if (in_place != nullptr) return {in_place + k * channel, channel, 1};
      return {packed + k / kPanelColumns * kPanelColumns * terms + k % kPanelColumns, 1, kPanelColumns};
    }
    // Rows that follow each other at one distance.
    int64_t group(int64_t rows) const { return in_place != nullptr ? rows : kPanelColumns; }
  };

  Rows rows(int64_t begin, int64_t end, const Part& outputs, float* packed) const {
    const float* from = grad_y + outputs.begin * g_channel;
    if (g_grid.even(begin, end) && g_grid.step() == 1 && g_channel != 1) {
      return {from + g_grid.offset(begin), nullptr, g_channel, end - begin};
    }
    pack(from, g_grid, g_channel, begin, end, 0, outputs.end - outputs.begin, packed);
    return {nullptr, packed, g_channel, end - begin};
  }

  void block(int64_t begin, int64_t end, const Part& outputs, const Part& inputs, float* packed_rows,
             float* packed_lanes) const {
    const Rows g = rows(begin, end, outputs, packed_rows);
    const int64_t row_count = outputs.end - outputs.begin, group = g.group(row_count);
    const int64_t step = lanes_at_a_time(end - begin);
    for (int64_t c = inputs.begin; c < inputs.end; c += step) {
      const int64_t lanes = std::min(step, inputs.end - c);
      pack(x, x_grid, x_channel, begin, end, c, lanes, packed_lanes);
      const Panels panels{packed_lanes, end - begin};
      Outputs sums{grad_w + outputs.begin * w_row + c, w_row};
      if (begin > 0) sums.residual = sums.data, sums.residual_row = w_row;
      for (int64_t first = 0; first < row_count; first += group) {
        const Pieces pieces(std::min(group, row_count - first), kRows);
        for (int64_t piece = 0; piece < pieces.count; ++piece) {
          const int64_t k = first + pieces.begin(piece), height = pieces.begin(piece + 1) - pieces.begin(piece);
          for (int64_t l = 0; l < lanes; l += kColumns) {
            multiply(g.from(k), panels.from(l), sums.from(k, l), height, std::min(kColumns, lanes - l));
          }
        }
      }
    }
  }

  static int64_t lanes_at_a_time(int64_t pixels) {
    return kNearLanes / (pixels * int64_t{sizeof(float)}) / kColumns * kColumns;
  }

  void operator()(int64_t task) const {
    const Part outputs(K, output_parts, task / input_parts, kPanelColumns);
    const Part inputs(C, input_parts, task % input_parts, 2 * kPanelColumns);
    // No block goes beyond a run. The layout alone decides it, not the gaps of a view: its results are a dense copy's.
    const int64_t run = x_channel == 1 ? g_grid.count() : g_grid.per_image();
    const int64_t most = std::clamp(kNearRows / (K * int64_t{sizeof(float)}), kFewestPixels, kMostPixels);
    const Pieces blocks(run, most);
    ThreadScratch row_scratch(ScratchUse::weights), lane_scratch(ScratchUse::pixels);
    float* const packed_rows = row_scratch.take(product_packed_floats(outputs.end - outputs.begin, most));
    float* const packed_lanes = lane_scratch.take(kNearLanes / sizeof(float) + kPanelColumns * most);
    for (int64_t first = 0; first < g_grid.count(); first += run) {
      for (int64_t i = 0; i < blocks.count; ++i) {
        block(first + blocks.begin(i), first + blocks.begin(i + 1), outputs, inputs, packed_rows, packed_lanes);
      }
    }
  }
};

inline void run(const ConvShape& s, const float* grad_y, const float* x, float* grad_w) {
  const WeightGradient gradient(s, grad_y, x, grad_w);
  parallel(gradient.output_parts * gradient.input_parts, gradient);
}

#endif
