// Depthwise convolution (multiplier 1) of small dense planes: forward and gradient by the input. plan.cpp says of which.
//
// Loop-to-data map. A task is a range of planes (n, c). Some planes at a time are copied, zero-padded, into scratch memory
// that stays in L1 and whose zeros are written once a task; a strided convolution's input is split there into its row and
// column phases, so that every tap is a plain shift. They are copied before any is computed, as a load that overlaps two
// recent stores would wait for them. The size of the filter is a template argument and nothing is masked or compared on
// the way in: `correlate` holds kRows rows x 1 vector of sums in registers and takes an input vector once for all kernel
// rows.
//
// The gradient by the input is the same correlation of grad_y with the filter turned round. With stride 2 the pixels of
// grad_x fall into 2 x 2 classes, each with its own taps; the two classes of a row are interleaved as it is stored.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "small_planes.cpp"
#include "small_planes.h"

namespace sepconv::cpu {

// The pixels of one axis that see the same taps: first, first + stride, ...
struct AxisTaps {
  int64_t first, count, taps;
  int64_t last_tap, tap_step;  // the filter's index of the tap that meets the least position, and the way to the next
  int64_t start;               // that position, of pixel `first`
};

}  // namespace sepconv::cpu

#include "foreach_isa.h"

namespace sepconv::cpu {

void small_planes_forward(const ConvShape& s, DType dtype, const void* x, const void* w, const Epilogue& epilogue,
                          void* y) {
  if (s.output_elements() == 0) return;
  SEPCONV_BEST_ISA(small_forward)(s, dtype, x, w, epilogue, y);
}

void small_planes_grad_input(const ConvShape& s, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  if (s.input_elements() == 0) return;
  SEPCONV_BEST_ISA(small_grad_input)(s, dtype, grad_y, w, grad_x);
}

}  // namespace sepconv::cpu
#else

#include "planes_simd.h"

#include "small_planes_simd.h"

inline constexpr int kRows = 7;  // divides the sizes of most networks' last planes: 7, 14, 28

struct CorrelateArgs {
  const float* in;
  int64_t pitch, row_step, row_phase;
  const float* w;  // [kR, kS]
  float bias;
  float* out;
  int64_t out_row;
  int rows, count;  // to be stored; all lanes are where there are no masked stores
};

// Output position (i, j) reads padded positions (i * kStride + r, j * kStride + s).
template <int kR, int kS, int kStride>
void correlate(const CorrelateArgs& a) {
  Floats sums[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sums[i] = broadcast(a.bias);
#pragma GCC unroll 8
  for (int s = 0; s < kS; ++s) {
#pragma GCC unroll 2
    for (int f = 0; f < kStride; ++f) {
      constexpr int kMost = (kR + kStride - 1) / kStride;
      const int taps = (kR - f + kStride - 1) / kStride;
      const float* in = a.in + s % kStride * a.pitch + s / kStride + f * a.row_phase;
      Floats w[kMost];
#pragma GCC unroll 8
      for (int t = 0; t < kMost; ++t) {
        if (t < taps) w[t] = broadcast(a.w[(t * kStride + f) * kS + s]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows + kMost - 1; ++i) {
        if (i >= kRows + taps - 1) continue;
        const Floats v = load_once(in);
        in += a.row_step;
#pragma GCC unroll 8
        for (int t = 0; t < kMost; ++t) {
          if (t < taps && i >= t && i - t < kRows) sums[i - t] += v * w[t];
        }
      }
    }
  }
  float* out = a.out;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (i >= a.rows) break;
    if constexpr (SEPCONV_ISA_LEVEL == 2) {
      store_first(out, sums[i], a.count);
    } else {
      store(out, sums[i]);
    }
    out += a.out_row;
  }
}

using Correlate = void (*)(const CorrelateArgs&);

inline Correlate correlate_for(int64_t taps_h, int64_t taps_w, int64_t stride) {
  switch (stride * 100 + taps_h * 10 + taps_w) {
    case 111: return correlate<1, 1, 1>;
    case 112: return correlate<1, 2, 1>;
    case 121: return correlate<2, 1, 1>;
    case 122: return correlate<2, 2, 1>;
    case 123: return correlate<2, 3, 1>;
    case 132: return correlate<3, 2, 1>;
    case 133: return correlate<3, 3, 1>;
    case 233: return correlate<3, 3, 2>;
    case 255: return correlate<5, 5, 2>;
  }
  return nullptr;
}

struct PixelClass {
  int64_t first_row, rows;
  int64_t in;       // where its first pixel reads, in scratch
  int64_t weights;  // where its taps stand among the packed ones
  Correlate correlate;
};

template <typename T>
struct SmallPlanes {
  const ConvShape& s;
  Frame frame;
  const T* in;
  T* out;
  Strides in_strides, out_strides;
  int64_t out_columns;
  std::vector<AxisTaps> row_classes, column_classes;
  const T* bias;
  Activation activation;
  std::vector<PixelClass> classes = {};
  std::vector<float> weights = {};  // [class, channel, taps]
  int64_t tasks = 1, batch = 1;
  int64_t calls = 0;  // of correlate() for a plane
  bool far = false;   // input and output come from memory

  void prepare(const T* w) {
    for (const AxisTaps& r : row_classes) {
      for (const AxisTaps& c : column_classes) {
        calls += ceil_div(r.count, kRows) * ceil_div(c.count, kLane);
        classes.push_back({r.first, r.count, (r.start + frame.top) * frame.row_step + c.start + frame.left,
                           static_cast<int64_t>(weights.size()), correlate_for(r.taps, c.taps, frame.stride)});
        for (int64_t k = 0; k < s.C; ++k) {
          const T* filter = w + k * s.w.n + r.last_tap * s.w.h + c.last_tap * s.w.w;
          for (int64_t i = 0; i < r.taps; ++i) {
            for (int64_t j = 0; j < c.taps; ++j) {
              weights.push_back(load_one(filter + i * r.tap_step * s.w.h + j * c.tap_step * s.w.w));
            }
          }
        }
      }
    }
    batch = std::clamp<int64_t>(kScratch / (frame.size * static_cast<int64_t>(sizeof(float))), 1, kMaxBatch);
    tasks = small_planes_tasks(s, s.N * s.C);
    far = s.N * s.C * (s.H * s.W + s.P * s.Q) * static_cast<int64_t>(sizeof(T)) > kNearBytes;
  }

  void operator()(int64_t task) const {
    const int64_t in_size = frame.scratch(batch, kLane);
    const int64_t tile_pitch = round_up(out_columns, kLane);
    const Scratch memory(in_size + tile_pitch * kRows * 2);
    float* const scratch = memory.data() + frame.shift;
    float* const tile = memory.data() + in_size;
    int64_t unit = s.N * s.C * task / tasks;
    const int64_t end = s.N * s.C * (task + 1) / tasks;
    int64_t n = unit / s.C, c = unit % s.C;
    for (; unit < end; unit += batch) {
      const int64_t count = std::min(batch, end - unit);
      int64_t from_n = n, from_c = c;
      for (int64_t i = 0; i < count; ++i) {
        copy_in(scratch + i * frame.size, in + from_n * in_strides.n + from_c * in_strides.c, frame);
        if (++from_c == s.C) from_c = 0, ++from_n;
      }
      for (int64_t i = 0; i < count; ++i) {
        T* const image = out + n * out_strides.n + c * out_strides.c;
        Ahead next_in, next_out;
        if (far) {
          next_in = {in + from_n * in_strides.n + from_c * in_strides.c, frame.rows * frame.columns, calls};
          next_out = {image + out_strides.c, out_strides.c, calls};
          if (from_n < s.N - 1 || from_c < s.C - 1) {
            if (++from_c == s.C) from_c = 0, ++from_n;
          }
        }
        compute(scratch + i * frame.size, tile, tile_pitch, image, c, next_in, next_out);
        if (++c == s.C) c = 0, ++n;
      }
    }
  }

 private:
  void compute(const float* scratch, float* tile, int64_t tile_pitch, T* image, int64_t c, Ahead& next_in,
               Ahead& next_out) const {
    const int64_t steps = column_classes.size();
    CorrelateArgs a;
    a.pitch = frame.pitch, a.row_step = frame.row_step, a.row_phase = frame.row_phase;
    a.bias = bias == nullptr ? 0.0f : load_one(bias + c);
    for (size_t first = 0; first < classes.size(); first += steps) {
      const int64_t rows = classes[first].rows;
      const int64_t block = std::min<int64_t>(rows, kRows);
      a.rows = static_cast<int>(block);
      for (int64_t done = 0; done < rows; done += kRows) {
        const int64_t row = std::min(done, rows - block);  // the last block may overlap the one before
        T* const to = image + (classes[first].first_row + row * steps) * out_columns;
        bool direct = false;
        if constexpr (std::is_same_v<T, float>) {
          direct = SEPCONV_ISA_LEVEL == 2 && steps == 1 && activation == Activation::identity;
        }
        for (int64_t step = 0; step < steps; ++step) {
          const PixelClass& k = classes[first + step];
          const int64_t columns = column_classes[step].count;
          a.w = weights.data() + k.weights + c * row_taps(first, steps) * column_classes[step].taps;
          const float* from = scratch + k.in + row * frame.row_step;
          a.out_row = direct ? out_columns : tile_pitch * steps;
          float* sums = tile + step * tile_pitch;
          if constexpr (std::is_same_v<T, float>) {
            if (direct) sums = to;
          }
          for (int64_t q = 0; q < columns; q += kLane) {
            a.in = from + q;
            a.out = sums + q;
            a.count = direct ? static_cast<int>(std::min<int64_t>(kLane, columns - q)) : kLane;
            next_in.fetch();
            next_out.template fetch<true>();
            k.correlate(a);
          }
        }
        if (!direct) copy_out(to, tile, tile_pitch, block, steps);
      }
    }
  }

  int64_t row_taps(size_t first, int64_t steps) const { return row_classes[first / steps].taps; }

  // Rows of sums, `steps` apart in the image, to where they belong.
  void copy_out(T* to, const float* tile, int64_t tile_pitch, int64_t rows, int64_t steps) const {
    for (int64_t i = 0; i < rows; ++i, to += steps * out_columns, tile += steps * tile_pitch) {
      if (steps == 1) {
        if constexpr (std::is_same_v<T, float> && SEPCONV_ISA_LEVEL < 2) {
          if (activation == Activation::identity) {
            copy_overlapping(to, tile, out_columns);
            continue;
          }
        }
        for (int64_t q = 0; q < out_columns; q += kLane) {
          store_some(to + q, activate_lanes<float>(activation, load(tile + q)), out_columns - q);
        }
      } else {
        for (int64_t q = 0; 2 * q < out_columns; q += kLane) {
          const Floats even = load(tile + q), odd = load(tile + tile_pitch + q);
          store_some(to + 2 * q, interleave<float, false>(even, odd), out_columns - 2 * q);
          store_some(to + 2 * q + kLane, interleave<float, true>(even, odd), out_columns - 2 * q - kLane);
        }
      }
    }
  }
};

inline void small_forward(const ConvShape& s, DType dtype, const void* x, const void* w, const Epilogue& epilogue,
                          void* y) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      const int64_t taps = ceil_div(s.R, s.stride_h);
      const Frame frame(s.H, s.W, s.stride_h, s.pad_h, s.pad_w, taps, taps, std::max<int64_t>(s.P, kRows), s.Q, kLane);
      SmallPlanes<T> planes{s,
                            frame,
                            static_cast<const T*>(x),
                            static_cast<T*>(y),
                            s.x,
                            s.y,
                            s.Q,
                            {{0, s.P, s.R, 0, 1, -s.pad_h}},
                            {{0, s.Q, s.S, 0, 1, -s.pad_w}},
                            static_cast<const T*>(epilogue.bias),
                            epilogue.activation};
      planes.prepare(static_cast<const T*>(w));
      parallel(planes.tasks, planes);
    }
  });
}

// Pixel h sees grad_y's (h + pad - r) / stride for the taps r for which that is exact.
inline std::vector<AxisTaps> grad_classes(int64_t pixels, int64_t taps, int64_t stride, int64_t pad) {
  std::vector<AxisTaps> classes;
  for (int64_t first = 0; first < stride; ++first) {
    const int64_t least = (first + pad) % stride, count = (taps - 1 - least) / stride + 1;
    classes.push_back({first, (pixels - first + stride - 1) / stride, count, least + (count - 1) * stride, -stride,
                       (first + pad - least) / stride - (count - 1)});
  }
  return classes;
}

inline void small_grad_input(const ConvShape& s, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      const auto rows = grad_classes(s.H, s.R, s.stride_h, s.pad_h);
      const auto columns = grad_classes(s.W, s.S, s.stride_w, s.pad_w);
      int64_t top = 0, left = 0, reach_h = 0, reach_w = 0;
      for (const AxisTaps& k : rows) top = std::max(top, -k.start), reach_h = std::max(reach_h, k.start + k.taps);
      for (const AxisTaps& k : columns) left = std::max(left, -k.start), reach_w = std::max(reach_w, k.start + k.taps);
      const Frame frame(s.P, s.Q, 1, top, left, top + reach_h, left + reach_w, std::max<int64_t>(rows[0].count, kRows),
                        columns[0].count, kLane);
      SmallPlanes<T> planes{
          s,       frame,   static_cast<const T*>(grad_y), static_cast<T*>(grad_x), s.y, s.x, s.W, rows,
          columns, nullptr, Activation::identity};
      planes.prepare(static_cast<const T*>(w));
      parallel(planes.tasks, planes);
    }
  });
}

#endif
