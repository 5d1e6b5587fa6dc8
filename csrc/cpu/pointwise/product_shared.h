// What the files of the products share (product.h has their doors).
#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/pointwise/product.h"
#include "cpu/team.h"

namespace sepconv::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `items` cut into pieces of at most `most`, as even as can be.
struct Pieces {
  int64_t count, size, larger;  // the first `larger` pieces have one item more than `size`
  Pieces(int64_t items, int64_t most) : count(ceil_div(items, most)) {
    size = count > 0 ? items / count : 0, larger = items - size * count;
  }
  int64_t begin(int64_t piece) const { return piece * size + (piece < larger ? piece : larger); }
};

// Part `index` of `parts` of [0, items), in steps of `step`.
struct Part {
  int64_t begin, end;
  Part(int64_t items, int64_t parts, int64_t index, int64_t step = 1) {
    const int64_t steps = ceil_div(items, step);
    begin = steps * index / parts * step, end = steps * (index + 1) / parts * step;
    if (end > items) end = items;
  }
};

// How a product is cut into tasks, whose results do not depend on the cut.
struct Cut {
  int64_t pixel_parts = 1, output_parts = 1;
  int64_t tasks() const { return pixel_parts * output_parts; }
};

// In how many tasks so many multiply-adds are cut: as many as there are threads, if that is worth waking them. A team
// gets some for each thread: the one whose core others use too leaves some of its own to the others.
inline int64_t parts_of(int64_t multiplications) {
  constexpr int64_t kTaskProducts = 128 * 1024, kTurnProducts = 512 * 1024, kTurns = 4;
  const int64_t parts = multiplications / kTaskProducts, threads = num_threads();
  if (parts < threads || threads == 1) return parts < 1 || threads == 1 ? 1 : parts;
  const int64_t turns = led_team() == nullptr ? 1 : multiplications / (kTurnProducts * threads);
  return threads * std::clamp<int64_t>(turns, 1, kTurns);
}

// Where the pixels of a batch of images lie: pixel i of N * P * Q, in this order. Strides in elements.
struct PixelGrid {
  int64_t N, P, Q;
  int64_t image, row, column;

  int64_t per_image() const { return P * Q; }
  int64_t count() const { return N * P * Q; }
  int64_t offset(int64_t i) const { return i / (P * Q) * image + i / Q % P * row + i % Q * column; }
  // The distance from one pixel to the next, where it is the same.
  int64_t step() const { return Q > 1 ? column : P > 1 ? row : image; }
  bool even_rows() const { return P == 1 || Q == 1 || row == Q * column; }
  bool even_images() const { return even_rows() && (N == 1 || P * Q == 1 || image == P * Q * step()); }
  // Whether that is so within the pixels [begin, end).
  bool even(int64_t begin, int64_t end) const {
    if (even_images()) return true;
    const int64_t run = even_rows() ? P * Q : Q;
    return begin / run == (end - 1) / run;
  }
};

// y[i, k] = activation(bias[k] + sum over c of x[i, c] * w[k, c] + residual[i, k]), for pixels i.
struct PixelProduct {
  int64_t C, K;
  const float *x, *w;   // w is null where `packed` is not
  const float* packed;  // the weight in panels: product_pack()
  const float *bias, *residual;
  float* y;
  PixelGrid x_grid, y_grid, residual_grid;
  int64_t x_channel, y_channel, residual_channel, w_output, w_term;
  Activation activation;

  // Outputs [k, k + count), with their weight packed.
  PixelProduct some_outputs(int64_t k, int64_t count, const float* panels) const {
    PixelProduct some = *this;
    some.K = count, some.packed = panels, some.y += k * y_channel;
    if (bias != nullptr) some.bias += k;
    if (residual != nullptr) some.residual += k * residual_channel;
    return some;
  }
  // Which operand is read by vectors: that of the output's dense dimension.
  bool lanes_are_outputs() const { return y_channel == 1 && y_grid.even_images(); }
  bool lanes_are_pixels() const { return (y_grid.per_image() == 1 || y_grid.step() == 1) && y_grid.even_rows(); }
  int64_t multiplications() const { return y_grid.count() * C * K; }
};

}  // namespace sepconv::cpu
