// Depthwise convolution (multiplier 1) of planes whose columns are dense: forward and gradient by the input. plan.cpp
// says of which. Images, planes and rows may lie apart in any way.
//
// Loop-to-data map. A task is a range of units: one vector of channels of one image n, the images of the same channels
// one after another, as they share the filter. A unit's planes are turned into a tile (depthwise_nchw_blocked.h) while
// those of the next unit are fetched; `correlate` then goes through the rows of results in blocks of 1 to 8 pixels x
// one vector of channels, whose sums stay in registers while all taps go by; a block's rows that lie outside the image
// are left out, its columns outside are zeros in the tile. The results, a tile too, are turned back into planes.
//
// The gradient by the input is the same correlation of grad_y with the filter turned round; with a stride its pixels
// fall into classes, each with its own taps.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/depthwise/depthwise_nchw_blocked.cpp"
#include "cpu/depthwise/depthwise_nchw_blocked.h"

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void depthwise_nchw_blocked_forward(const ConvShape& s, DType dtype, const void* x, const void* w,
                                    const Epilogue& epilogue, void* y) {
  if (s.output_elements() == 0) return;
  SEPCONV_BEST_ISA(forward)(s, dtype, x, w, epilogue, y);
}

void depthwise_nchw_blocked_grad_input(const ConvShape& s, DType dtype, const void* grad_y, const void* w,
                                       void* grad_x) {
  if (s.input_elements() == 0) return;
  SEPCONV_BEST_ISA(grad_input)(s, dtype, grad_y, w, grad_x);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"
#include "cpu/simd/scratch_simd.h"
#include "cpu/simd/transpose_simd.h"

#include "cpu/depthwise/depthwise_nchw_blocked_simd.h"

inline constexpr int kBlock = 8;  // pixels

struct CorrelateArgs {
  const float *in, *w, *bias;  // tile of the input, [R, S, lane], one vector
  float* out;                  // of the result's block, first row
  int64_t in_rows, in_row;     // of the image; numbers from one to the next
  int64_t in_column;           // where the block's first pixel reads its first tap
  int64_t out_row, out_step;   // numbers from one row of the class, and from one pixel of the block, to the next
  int64_t taps_w, tap_w;       // and the way from one tap to the next: in the tile, in numbers,
  int64_t w_first, w_row, w_step;
  Activation activation;
};

// A block of kCount columns of all rows of one class.
template <int kCount, int kStep>
void correlate(const CorrelateArgs& a, const Reach& rows) {
  float* out = a.out;
  for (int64_t t = 0; t < rows.count; ++t, out += a.out_row) {
    const int64_t from = rows.in_first + t * rows.in_step;
    const int64_t begin = from < 0 ? std::min(rows.taps, ceil_div(-from, rows.tap_step)) : 0;
    const int64_t end = from < a.in_rows ? std::min(rows.taps, (a.in_rows - 1 - from) / rows.tap_step + 1) : 0;
    Floats sums[kCount];
    const Floats bias = load(a.bias);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sums[i] = bias;
    const float* row = a.in + (from + begin * rows.tap_step) * a.in_row + a.in_column;
    const float* w_row = a.w + a.w_first + begin * a.w_row;
    for (int64_t r = begin; r < end; ++r, row += rows.tap_step * a.in_row, w_row += a.w_row) {
      const float *x = row, *w = w_row;
      for (int64_t s = 0; s < a.taps_w; ++s, x += a.tap_w, w += a.w_step) {
        const Floats tap = load(w);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) sums[i] += load(x + i * kStep * kLane) * tap;
      }
    }
    activate_sums<float>(a.activation, sums);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) store(out + i * a.out_step, sums[i]);
  }
}

using Correlate = void (*)(const CorrelateArgs&, const Reach&);

template <int kStep>
inline Correlate correlate_for(int64_t count) {
  constexpr Correlate kCorrelate[kBlock] = {correlate<1, kStep>, correlate<2, kStep>, correlate<3, kStep>,
                                            correlate<4, kStep>, correlate<5, kStep>, correlate<6, kStep>,
                                            correlate<7, kStep>, correlate<8, kStep>};
  return kCorrelate[count - 1];
}

// Some columns of one column class.
struct ColumnBlock {
  const Reach* columns;
  int64_t first;  // of the class
  Correlate correlate;
};

template <typename T>
struct Blocked {
  const ConvShape& s;
  const T *in, *w, *bias;
  T* out;
  Activation activation;
  Strides in_strides, out_strides;
  int64_t in_rows, in_columns, out_rows, out_columns;
  std::vector<Reach> rows, columns;
  int64_t before;  // columns of the tile before the first pixel
  BlockedTile tile;
  std::vector<ColumnBlock> blocks = {};
  std::vector<int32_t> taps = {};  // 0, 1, ...
  int64_t units = 0, tasks = 1;

  void prepare() {
    for (const Reach& c : columns) {
      const int64_t pieces = ceil_div(c.count, kBlock);
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t first = c.count * i / pieces, count = c.count * (i + 1) / pieces - first;
        blocks.push_back({&c, first, c.in_step == 1 ? correlate_for<1>(count) : correlate_for<2>(count)});
      }
    }
    taps.resize(s.R * s.S);
    std::iota(taps.begin(), taps.end(), 0);
    units = ceil_div(s.C, kLane) * s.N;
    tasks = blocked_tasks(s, units);
  }

  void operator()(int64_t task) const {
    const PlaneRuns in_runs(in_rows, in_columns, in_strides.h), out_runs(out_rows, out_columns, out_strides.h);
    const int64_t out_pixels = out_rows * out_columns;
    const Scratch memory((tile.size() + out_pixels + s.R * s.S + 1) * kLane);
    float* const image = memory.data();
    float* const result = image + tile.size() * kLane;
    float* const filter = result + out_pixels * kLane;
    float* const addend = filter + s.R * s.S * kLane;
    const int64_t begin = units * task / tasks, end = units * (task + 1) / tasks;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit % s.N, c = unit / s.N * kLane;
      const int lanes = lanes_at(c);
      if (n == 0 || unit == begin) load_filter(filter, addend, c, lanes);
      turn_planes_in(image, plane(n, c), in_strides.c, lanes, tile.places.data(), in_runs);
      if (unit + 1 < end) {
        const int64_t next = (unit + 1) / s.N * kLane;
        fetch_planes(plane((unit + 1) % s.N, next), in_strides.c, lanes_at(next), in_runs);
      }
      compute(image, filter, addend, result);
      turn_planes_out(out + n * out_strides.n + c * out_strides.c, out_strides.c, lanes, result, out_runs);
    }
  }

 private:
  int lanes_at(int64_t c) const { return static_cast<int>(std::min<int64_t>(kLane, s.C - c)); }
  const T* plane(int64_t n, int64_t c) const { return in + n * in_strides.n + c * in_strides.c; }

  void load_filter(float* filter, float* addend, int64_t c, int lanes) const {
    const T* const from = w + c * s.w.n;
    if (s.w.w == 1 && s.w.h == s.S) {
      turn_in(filter, from, s.w.n, lanes, taps.data(), s.R * s.S);
    } else {
      for (int i = 0; i < lanes; ++i) {
        for (const int32_t tap : taps) {
          filter[tap * kLane + i] = load_one(from + i * s.w.n + tap / s.S * s.w.h + tap % s.S * s.w.w);
        }
      }
    }
    if (bias != nullptr) store(addend, load_first(bias + c, lanes));
  }

  void compute(const float* image, const float* filter, const float* addend, float* result) const {
    CorrelateArgs a;
    a.in = image, a.w = filter, a.bias = addend, a.activation = activation;
    a.in_rows = in_rows, a.in_row = tile.columns * kLane;
    for (const Reach& r : rows) {
      for (const ColumnBlock& block : blocks) {
        const Reach& c = *block.columns;
        a.in_column = (before + c.in_first + block.first * c.in_step) * kLane;
        a.out = result + (r.first * out_columns + c.first + block.first * c.out_step) * kLane;
        a.out_row = r.out_step * out_columns * kLane, a.out_step = c.out_step * kLane;
        a.taps_w = c.taps, a.tap_w = c.tap_step * kLane;
        a.w_first = (r.index * s.S + c.index) * kLane;
        a.w_row = r.index_step * s.S * kLane, a.w_step = c.index_step * kLane;
        block.correlate(a, r);
      }
    }
  }
};

// The columns that any result reads before the first of W pixels, and after the last.
inline int64_t columns_before(const std::vector<Reach>& columns) {
  int64_t before = 0;
  for (const Reach& c : columns) before = std::max(before, -c.in_first);
  return before;
}
inline int64_t columns_after(const std::vector<Reach>& columns, int64_t W) {
  int64_t after = 0;
  for (const Reach& c : columns) after = std::max(after, c.last_read() - (W - 1));
  return after;
}

inline void forward(const ConvShape& s, DType dtype, const void* x, const void* w, const Epilogue& epilogue, void* y) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      const auto rows = forward_reach(s.R, s.P, s.stride_h, s.pad_h, s.dilation_h);
      const auto columns = forward_reach(s.S, s.Q, s.stride_w, s.pad_w, s.dilation_w);
      Blocked<T> planes{s,
                        static_cast<const T*>(x),
                        static_cast<const T*>(w),
                        static_cast<const T*>(epilogue.bias),
                        static_cast<T*>(y),
                        epilogue.activation,
                        s.x,
                        s.y,
                        s.H,
                        s.W,
                        s.P,
                        s.Q,
                        rows,
                        columns,
                        columns_before(columns),
                        BlockedTile(s.H, s.W, columns_before(columns), columns_after(columns, s.W))};
      planes.prepare();
      parallel(planes.tasks, planes);
    }
  });
}

inline void grad_input(const ConvShape& s, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      const auto rows = grad_input_reach(s.R, s.H, s.stride_h, s.pad_h, s.dilation_h);
      const auto columns = grad_input_reach(s.S, s.W, s.stride_w, s.pad_w, s.dilation_w);
      Blocked<T> planes{s,
                        static_cast<const T*>(grad_y),
                        static_cast<const T*>(w),
                        nullptr,
                        static_cast<T*>(grad_x),
                        Activation::identity,
                        s.y,
                        s.x,
                        s.P,
                        s.Q,
                        s.H,
                        s.W,
                        rows,
                        columns,
                        columns_before(columns),
                        BlockedTile(s.P, s.Q, columns_before(columns), columns_after(columns, s.Q))};
      planes.prepare();
      parallel(planes.tasks, planes);
    }
  });
}

#endif
