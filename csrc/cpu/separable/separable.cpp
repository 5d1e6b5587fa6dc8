// Depthwise and pointwise convolution in one pass: the intermediate never reaches memory.
//
// Loop-to-data map. A tile is some rows of output pixels of one image (part of a row where that is long, several images
// where they are small). A task is a range of tiles; for each of them
//   1. the depthwise stage writes the tile's intermediate, in the type of the sums, into a buffer in the second-level
//      cache:
//        [pixels, C]       channels_last, multiplier 1: the correlation of depthwise_nhwc.cpp
//        [C * T, pixels]   else: plane by plane, see separable_planes.h
//   2. the pointwise stage multiplies it by the weight, in blocks of sums in registers (separable_product.h), adds the
//      bias, activates and stores the output:
//        lanes are output channels, rows are pixels            channels_last output; the weight is turned once a call
//        lanes are pixels, rows are output channels            contiguous output; the weight is read where it is
//      A panel of columns is the outer loop, so that the larger operand is read from memory once a tile.
// Every output is one sum over the channels in their order: it depends neither on tiles nor on threads.
//
// Floor: the bytes of x and y once, and the multiplications at the rate of a matrix product.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/separable/separable.cpp"
#include <numeric>

#include "cpu/depthwise/depthwise_nhwc.h"

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void separable_forward(const SeparableShape& shape, DType dtype, const SeparableMemory& memory) {
  if (shape.depthwise.output_elements() == 0 || shape.pointwise.output_elements() == 0) return;
  SEPCONV_BEST_ISA(forward)(shape, dtype, memory);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

#include "cpu/separable/separable_planes.h"
#include "cpu/separable/separable_product.h"

inline constexpr int64_t kTileBytes =
    192 * 1024;  // of intermediate: with a panel of the weight it fits the second-level cache
inline constexpr int64_t kFewestPixels = 48;  // of a tile: each of them is a use of the weight, which a tile reads once
inline constexpr int64_t kMostPixels = 1024;

// How the outputs are cut into tiles: `images` whole images, or one image's `rows` rows of `columns` pixels.
struct Tiling {
  int64_t images = 1, rows, columns;     // of a tile; the last one may be smaller
  int64_t image_groups, strips, pieces;  // tiles along the batch, down an image, along a row

  Tiling(const ConvShape& s, int64_t element_bytes) {
    const int64_t threads = num_threads();
    const int64_t target = std::clamp(kTileBytes / (element_bytes * s.K), kFewestPixels, kMostPixels);
    image_groups = s.N, strips = pieces = 1;
    if (2 * s.P * s.Q <= target) {
      const int64_t most = target / (s.P * s.Q);
      image_groups = (s.N + most - 1) / most;
      image_groups = std::min(s.N, (image_groups + threads - 1) / threads * threads);
    } else {
      const int64_t fitting = std::max<int64_t>(1, target / s.Q);
      strips = (s.P + fitting - 1) / fitting;
      while (s.N * strips < 8 * threads && s.N * strips % threads != 0 && strips < s.P) ++strips;
      if (strips == s.P) pieces = (s.Q + 2 * target - 1) / (2 * target);
    }
    images = (s.N + image_groups - 1) / image_groups, image_groups = (s.N + images - 1) / images;
    rows = (s.P + strips - 1) / strips, strips = (s.P + rows - 1) / rows;
    columns = (s.Q + pieces - 1) / pieces, pieces = (s.Q + columns - 1) / columns;
  }
  int64_t count() const { return image_groups * strips * pieces; }
  int64_t pixels() const { return images * rows * columns; }
};

struct SeparableTile {
  int64_t n, images, p, rows, q, columns;
  SeparableTile(const ConvShape& s, const Tiling& t, int64_t index) {
    q = index % t.pieces * t.columns, index /= t.pieces;
    p = index % t.strips * t.rows, index /= t.strips;
    n = index * t.images;
    images = std::min(t.images, s.N - n), rows = std::min(t.rows, s.P - p), columns = std::min(t.columns, s.Q - q);
  }
  int64_t pixels_per_image() const { return rows * columns; }
  int64_t pixels() const { return images * rows * columns; }
};

template <typename T>
struct Separable {
  using A = accumulate_t<T>;
  static constexpr int64_t L = kLanes<A>;

  const ConvShape &d, &p;
  const SeparableMemory& memory;
  Tiling tiling;
  bool by_pixel;           // the tile is [pixels, C], else [C * T, pixels]
  bool lanes_are_outputs;  // else pixels
  bool activate_late;      // the intermediate is kept as it is before its activation
  int64_t pitch;           // of the tile's rows, in elements
  NhwcKernel<T> kernel;
  Correlation<T> correlation{};
  PlaneStage<T> planes;
  std::vector<A> packed_d;          // depthwise weight and bias
  std::vector<A> packed_p, bias_p;  // pointwise; the weight in panels [K / kColumns][C][kColumns], or [K][C]
  const A* w_p;                     // [K][C] where lanes are pixels
  int64_t w_row;
  int64_t tasks;

  Separable(const SeparableShape& shape, const SeparableMemory& m)
      : d(shape.depthwise),
        p(shape.pointwise),
        memory(m),
        tiling(d, sizeof(A)),
        by_pixel(d.K == d.C && d.C > 1 && d.x.c == 1 && output_layout(p) == Layout::nhwc),
        lanes_are_outputs(output_layout(p) == Layout::nhwc),
        activate_late(m.intermediate != nullptr && !derivative_from_output(m.depthwise.activation)),
        kernel(d.C, d.S, d.stride_w, d.dilation_w),
        planes(d, static_cast<const T*>(m.x), tiling.rows, tiling.columns) {
    // A row more than is stored, as whole vectors are; an odd number of cache lines, to spread over the cache's sets.
    pitch = (((by_pixel ? d.K : tiling.pixels() + L) / L + 1) | 1) * L;
    tasks = std::min(tiling.count(), 4 * static_cast<int64_t>(num_threads()));
    if (num_threads() == 1) tasks = 1;
    pack_depthwise();
    if (memory.y != nullptr) pack_pointwise();
  }

  Activation stage_activation() const { return activate_late ? Activation::identity : memory.depthwise.activation; }

  void pack_depthwise() {
    const T *x = static_cast<const T*>(memory.x), *w = static_cast<const T*>(memory.depthwise_weight);
    const Epilogue epilogue{memory.depthwise.bias, stage_activation()};
    if (by_pixel) {
      correlation = forward_correlation(d, x, w, epilogue, kernel.groups, packed_d, static_cast<T*>(nullptr));
      correlation.y_pixel = pitch;
      return;
    }
    for (int64_t c = 0; c < d.K; ++c) {
      for (int64_t r = 0; r < d.R; ++r) {
        for (int64_t s = 0; s < d.S; ++s) packed_d.push_back(load_one(w + c * d.w.n + r * d.w.h + s * d.w.w));
      }
    }
    const T* bias = static_cast<const T*>(epilogue.bias);
    for (int64_t c = 0; c < d.K; ++c) packed_d.push_back(bias ? load_one(bias + c) : A(0));
  }

  void pack_panel(int64_t panel) {
    const T* w = static_cast<const T*>(memory.pointwise_weight);
    const int64_t k0 = panel * kColumns<A>, count = std::min(kColumns<A>, p.K - k0);
    A* to = packed_p.data() + k0 * p.C;
    for (int64_t c = 0; c < p.C; ++c, to += kColumns<A>) {
      const T* from = w + k0 * p.w.n + c * p.w.c;
      for (int64_t k = 0; k < count; ++k) {
        if constexpr (kIsHalf<T>) {
          to[k] = load_one(from + k * p.w.n);
        } else {
          to[k] = from[k * p.w.n];
        }
      }
    }
  }
  struct PackPanel {
    Separable& self;
    void operator()(int64_t panel) const { self.pack_panel(panel); }
  };

  void pack_pointwise() {
    const T* w = static_cast<const T*>(memory.pointwise_weight);
    const int64_t panels = (p.K + kColumns<A> - 1) / kColumns<A>;
    const T* bias = static_cast<const T*>(memory.pointwise.bias);
    bias_p.assign(panels * kColumns<A>, A(0));
    for (int64_t k = 0; bias != nullptr && k < p.K; ++k) bias_p[k] = load_one(bias + k);
    w_row = p.C;
    if (lanes_are_outputs) {
      packed_p.assign(panels * kColumns<A> * p.C, A(0));
      parallel(panels, PackPanel{*this});
    } else if (std::is_same_v<T, A> && (p.w.c == 1 || p.C == 1)) {
      w_p = reinterpret_cast<const A*>(w), w_row = p.w.n;
    } else {
      packed_p.resize(p.K * p.C);
      for (int64_t k = 0; k < p.K; ++k) {
        for (int64_t c = 0; c < p.C; ++c) packed_p[k * p.C + c] = load_one(w + k * p.w.n + c * p.w.c);
      }
      w_p = packed_p.data();
    }
  }

  // ---- the depthwise stage ----

  void correlate_tile(const SeparableTile& tile, T* narrow, A* wide) const {
    T* to;
    if constexpr (kIsHalf<T>) {
      to = narrow;
    } else {
      to = wide;
    }
    for (int64_t i = 0; i < tile.images; ++i) {
      Correlation<T> k = correlation;
      k.x += (tile.n + i) * d.x.n;
      k.pad_w -= tile.q * d.stride_w, k.Q = tile.columns;
      k.y_row = tile.columns * pitch;
      k.y = to + i * tile.pixels_per_image() * pitch - tile.p * k.y_row;
      correlate(k, kernel, tile.p, tile.p + tile.rows);
    }
    if constexpr (kIsHalf<T>) {
      for (int64_t i = 0; i < tile.pixels() * pitch; i += L) store(wide + i, load(narrow + i));
    }
  }

  void planes_tile(const SeparableTile& tile, A* strip, A* wide) const {
    const int64_t multiplier = d.K / d.C, taps = d.R * d.S;
    const T* x = static_cast<const T*>(memory.x) + tile.n * d.x.n;
    for (int64_t c = 0; c < d.C; ++c) {
      for (int64_t i = 0; i < tile.images; ++i) {
        const T* plane = x + i * d.x.n + c * d.x.c;
        const T* next = i + 1 < tile.images ? plane + d.x.n : c + 1 < d.C ? x + (c + 1) * d.x.c : nullptr;
        planes.copy_strip(plane, next, tile.p, tile.rows, tile.q, tile.columns, strip);
        for (int64_t k = c * multiplier; k < (c + 1) * multiplier; ++k) {
          planes(strip, packed_d.data() + k * taps, packed_d[d.K * taps + k], stage_activation(), tile.rows,
                 tile.columns, wide + k * pitch + i * tile.pixels_per_image());
        }
      }
    }
  }

  // Writes the tile into the tensor that the backward pass will read.
  void keep(const SeparableTile& tile, const A* wide) const {
    T* h = static_cast<T*>(memory.intermediate);
    for (int64_t i = 0; i < tile.images; ++i) {
      for (int64_t row = 0; row < tile.rows; ++row) {
        const int64_t first = (i * tile.rows + row) * tile.columns;
        T* to = h + (tile.n + i) * d.y.n + (tile.p + row) * d.y.h + tile.q * d.y.w;
        if (by_pixel) {
          for (int64_t q = 0; q < tile.columns; ++q) {
            copy(wide + (first + q) * pitch, d.K, to + q * d.y.w, d.y.c);
          }
        } else {
          for (int64_t k = 0; k < d.K; ++k) copy(wide + k * pitch + first, tile.columns, to + k * d.y.c, d.y.w);
        }
      }
    }
  }
  static void copy(const A* from, int64_t count, T* to, int64_t step) {
    if (step != 1) {
      for (int64_t i = 0; i < count; ++i) store_one(to + i * step, from[i]);
      return;
    }
    int64_t i = 0;
    for (; i + L <= count; i += L) store(to + i, load(from + i));
    if (i < count) store_first(to + i, load(from + i), static_cast<int>(count - i));
  }

  // ---- the pointwise stage ----

  // Pixels [i, i + rows), output channels [k, k + columns): from sums [kRows, kColumns] to y.
  void store_outputs(const SeparableTile& tile, const A* sums, int64_t i, int64_t rows, int64_t k,
                     int64_t columns) const {
    const Activation activation = memory.pointwise.activation;
    T* to = static_cast<T*>(memory.y) + ((tile.n * p.P + tile.p) * p.Q + tile.q + i) * p.K + k;
    for (int64_t row = 0; row < rows; ++row, to += p.K, sums += kColumns<A>) {
      for (int64_t v = 0; v < columns; v += L) {
        const Vector<A> sum = load(sums + v) + load(bias_p.data() + k + v);
        const Vector<A> value = activation == Activation::identity ? sum : activate_lanes<A>(activation, sum);
        if (columns - v >= L) {
          store(to + v, value);
        } else {
          store_first(to + v, value, static_cast<int>(columns - v));
        }
      }
    }
  }

  // Output channels [k, k + rows), pixels [j, j + columns): the same, where the pixels of an image are neighbours.
  void store_planes(const SeparableTile& tile, A* sums, int64_t k, int64_t rows, int64_t j, int64_t columns) const {
    const Activation activation = memory.pointwise.activation;
    const int64_t per_image = tile.pixels_per_image();
    for (int64_t row = 0; row < rows; ++row, ++k, sums += kColumns<A>) {
      const Vector<A> bias = broadcast<A>(bias_p[k]);
      for (int64_t v = 0; v < columns; v += L) {
        const Vector<A> sum = load(sums + v) + bias;
        store(sums + v, activation == Activation::identity ? sum : activate_lanes<A>(activation, sum));
      }
      T* plane = static_cast<T*>(memory.y) + tile.n * p.y.n + k * p.y.c + tile.p * p.Q + tile.q;
      for (int64_t v = 0; v < columns;) {
        const int64_t image = tile.images == 1 ? 0 : (j + v) / per_image, in_image = j + v - image * per_image;
        const int64_t count = std::min(columns - v, per_image - in_image);
        copy(sums + v, count, plane + image * p.y.n + in_image, 1);
        v += count;
      }
    }
  }

  void multiply_tile(const SeparableTile& tile, const A* wide) const {
    A sums[kRows * (kColumns<A> + L)];  // a vector more than is written: copies read whole ones
    const int64_t pixels = tile.pixels();
    if (lanes_are_outputs) {
      const int64_t height = block_height(pixels);
      const int64_t a_row = by_pixel ? pitch : 1, a_term = by_pixel ? 1 : pitch;
      for (int64_t k = 0; k < p.K; k += kColumns<A>) {
        const int64_t columns = std::min(kColumns<A>, p.K - k);
        for (int64_t i = 0; i < pixels; i += height) {
          const int64_t rows = std::min(height, pixels - i);
          multiply_of<A>(rows, columns)({wide + i * a_row, packed_p.data() + k * p.C, a_row, a_term, kColumns<A>, p.C},
                                        sums);
          store_outputs(tile, sums, i, rows, k, columns);
        }
      }
    } else {
      const int64_t height = block_height(p.K);
      for (int64_t k = 0; k < p.K; k += height) {
        const int64_t rows = std::min(height, p.K - k);
        for (int64_t j = 0; j < pixels; j += kColumns<A>) {
          const int64_t columns = std::min(kColumns<A>, pixels - j);
          multiply_of<A>(rows, columns)({w_p + k * w_row, wide + j, w_row, 1, pitch, p.C}, sums);
          store_planes(tile, sums, k, rows, j, columns);
        }
      }
    }
  }

  // ---- a task ----

  void operator()(int64_t task) const {
    const int64_t tile_rows = by_pixel ? tiling.pixels() : d.K;
    std::vector<A> wide(tile_rows * pitch), strip(by_pixel ? 0 : planes.strip_elements());
    std::vector<T> narrow(by_pixel && kIsHalf<T> ? tile_rows * pitch : 0);
    const int64_t count = tiling.count();
    for (int64_t index = task * count / tasks; index < (task + 1) * count / tasks; ++index) {
      const SeparableTile tile(d, tiling, index);
      if (by_pixel) {
        correlate_tile(tile, narrow.data(), wide.data());
      } else {
        planes_tile(tile, strip.data(), wide.data());
      }
      if (memory.intermediate != nullptr) keep(tile, wide.data());
      if (memory.y == nullptr) continue;
      if (activate_late) activate_array(memory.depthwise.activation, wide.data(), static_cast<int>(tile_rows * pitch));
      multiply_tile(tile, wide.data());
    }
  }
};

inline void forward(const SeparableShape& shape, DType dtype, const SeparableMemory& memory) {
  with_dtype(dtype, [&](auto zero) {
    const Separable<decltype(zero)> task(shape, memory);
    parallel(task.tasks, task);
  });
}

#endif
