// Depthwise 3x3 convolution (multiplier 1) of small planes whose columns are dense: forward, and at stride 1 the
// gradient by the input. plan.cpp says of which. Images, planes and rows may lie apart in any way.
//
// Loop-to-data map. A task is a range of planes (n, c). Some planes at a time are copied, zero-padded, into scratch
// memory that stays in L1 and whose zeros are written once a task; a strided convolution's input is split there into
// its row and column phases, so that every tap is a plain shift. They are copied before any is computed, as a load that
// overlaps two recent stores would wait for them. Nothing is masked or compared on the way in: `correlate` holds kRows
// rows x 1 vector of sums in registers and takes an input vector once for all kernel rows.
//
// The gradient by the input is the same correlation of grad_y with the filter turned round.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/depthwise/depthwise_nchw_3x3.cpp"
#include "cpu/grouped/grouped_planes.h"

namespace sepconv::cpu {

// Planes in scratch memory. Padded position u of an axis is number u / stride of phase u % stride.
struct Frame {
  int64_t rows, columns, stride;  // of the image
  int64_t top, left;              // padding
  int64_t pitch;                  // from one column phase to the next
  int64_t row_step, row_phase;    // from one row to the next, from one row phase to the next
  int64_t shift;                  // numbers before the first one, so that rows are stored at aligned addresses
  int64_t size;

  // For reading `out_rows` x `out_columns` from any of the first `taps` positions of each phase on.
  Frame(int64_t image_rows, int64_t image_columns, int64_t step, int64_t pad_h, int64_t pad_w, int64_t taps,
        int64_t out_rows, int64_t out_columns, int64_t lanes)
      : rows(image_rows), columns(image_columns), stride(step), top(pad_h), left(pad_w) {
    const int64_t begin = ceil_div(left, stride), stored = round_up(ceil_div(columns, stride), lanes);
    pitch = round_up(std::max(begin + stored, round_up(out_columns, lanes) + taps - 1), lanes);
    row_step = pitch * stride;
    row_phase = row_step * std::max(ceil_div(top + rows, stride), out_rows + taps - 1);
    shift = round_up(left / stride, lanes) - left / stride;
    size = row_phase * stride;
  }
  int64_t scratch(int64_t planes, int64_t lanes) const { return round_up(shift + planes * size + lanes, lanes); }
};

constexpr int64_t kScratch = 24 << 10;  // bytes of planes that are copied before any is computed
constexpr int64_t kMaxBatch = 8;        // planes, likewise
constexpr int64_t kMaxTasks = 64;

}  // namespace sepconv::cpu

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void depthwise_nchw_3x3_forward(const ConvShape& s, DType dtype, const void* x, const void* w, const Epilogue& epilogue,
                                void* y) {
  if (s.output_elements() == 0) return;
  SEPCONV_BEST_ISA(small_forward)(s, dtype, x, w, epilogue, y);
}

void depthwise_nchw_3x3_grad_input(const ConvShape& s, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  if (s.input_elements() == 0) return;
  SEPCONV_BEST_ISA(small_grad_input)(s, dtype, grad_y, w, grad_x);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

#include "cpu/grouped/grouped_planes_simd.h"

#include "cpu/simd/scratch_simd.h"

inline constexpr int kTaps = 3;
inline constexpr int kRows = 7;  // divides the sizes of most networks' last planes: 7, 14, 28

// Copies `count` numbers in overlapping pieces where there are no masked loads.
SEPCONV_INLINE void copy_overlapping(float* to, const float* from, int64_t count) {
  using Four = typename VectorOf<float, 4>::unaligned;
  if (count >= 4) {
    for (int64_t i = 0; i < count - 4; i += 4) {
      *reinterpret_cast<Four*>(to + i) = *reinterpret_cast<const Four*>(from + i);
    }
    *reinterpret_cast<Four*>(to + count - 4) = *reinterpret_cast<const Four*>(from + count - 4);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

template <typename T>
SEPCONV_INLINE void copy_in(float* scratch, const T* image, int64_t image_row, const Frame& f) {
  if (f.stride == 1) {
    float* to = scratch + f.top * f.row_step + f.left;
    if constexpr (std::is_same_v<T, float> && SEPCONV_ISA_LEVEL < 2) {
      for (int64_t h = 0; h < f.rows; ++h) copy_overlapping(to + h * f.row_step, image + h * image_row, f.columns);
    } else {
      copy_rows(to, f.row_step, image, image_row, f.rows, f.columns);
    }
    return;
  }
  float* const even = f.left % 2 * f.pitch + f.left / 2 + scratch;
  float* const odd = (f.left + 1) % 2 * f.pitch + (f.left + 1) / 2 + scratch;
  for (int64_t h = 0; h < std::min<int64_t>(2, f.rows); ++h) {
    const int64_t row = (f.top + h) % 2 * f.row_phase + (f.top + h) / 2 * f.row_step;
    split_rows(even + row, odd + row, f.row_step, image + h * image_row, 2 * image_row, (f.rows - h + 1) / 2,
               (f.columns + 1) / 2, f.columns / 2);
  }
}

struct CorrelateArgs {
  const float* in;
  int64_t pitch, row_step, row_phase;
  const float* w;  // [3, 3]
  float bias;
  float* out;
  int64_t out_row;
  int rows, count;  // to be stored; all lanes are where there are no masked stores
};

// Output position (i, j) reads padded positions (i * kStride + r, j * kStride + s).
template <int kStride>
void correlate(const CorrelateArgs& a) {
  Floats sums[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sums[i] = broadcast(a.bias);
#pragma GCC unroll 8
  for (int s = 0; s < kTaps; ++s) {
#pragma GCC unroll 2
    for (int f = 0; f < kStride; ++f) {
      constexpr int kMost = (kTaps + kStride - 1) / kStride;
      const int taps = (kTaps - f + kStride - 1) / kStride;
      const float* in = a.in + s % kStride * a.pitch + s / kStride + f * a.row_phase;
      Floats w[kMost];
#pragma GCC unroll 8
      for (int t = 0; t < kMost; ++t) {
        if (t < taps) w[t] = broadcast(a.w[(t * kStride + f) * kTaps + s]);
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

template <typename T>
struct SmallPlanes {
  const ConvShape& s;
  Frame frame;
  const T* in;
  T* out;
  Strides in_strides, out_strides;
  int64_t out_rows, out_columns;
  const T* bias;
  Activation activation;
  const float* weights = nullptr;  // [channel, 3, 3]
  std::vector<float> gathered = {};
  int64_t tasks = 1, batch = 1;
  int64_t calls = 0;  // of correlate() for a plane
  bool far = false;   // input and output come from memory

  // `turned`: the filter's taps in reverse.
  void prepare(const T* w, bool turned) {
    if (!turned && s.w.n == kTaps * kTaps && s.w.h == kTaps && s.w.w == 1) weights = as_they_lie(w);
    if (weights == nullptr) gather(w, turned);
    calls = ceil_div(out_rows, kRows) * ceil_div(out_columns, kLane);
    batch = std::clamp<int64_t>(kScratch / (frame.size * static_cast<int64_t>(sizeof(float))), 1, kMaxBatch);
    // Tasks of about 50 microseconds.
    tasks = std::clamp<int64_t>(s.output_elements() * kTaps * kTaps >> 20, 1, std::min(s.N * s.C, kMaxTasks));
    far = s.N * s.C * (s.H * s.W + s.P * s.Q) * static_cast<int64_t>(sizeof(T)) > kNearBytes;
  }

  void operator()(int64_t task) const {
    const int64_t in_size = frame.scratch(batch, kLane);
    const int64_t tile_pitch = round_up(out_columns, kLane);
    const Scratch memory(in_size + tile_pitch * kRows);
    float* const scratch = memory.data() + frame.shift;
    float* const tile = memory.data() + in_size;
    int64_t unit = s.N * s.C * task / tasks;
    const int64_t end = s.N * s.C * (task + 1) / tasks;
    int64_t n = unit / s.C, c = unit % s.C;
    for (; unit < end; unit += batch) {
      const int64_t count = std::min(batch, end - unit);
      int64_t from_n = n, from_c = c;
      for (int64_t i = 0; i < count; ++i) {
        copy_in(scratch + i * frame.size, in + from_n * in_strides.n + from_c * in_strides.c, in_strides.h, frame);
        if (++from_c == s.C) from_c = 0, ++from_n;
      }
      for (int64_t i = 0; i < count; ++i) {
        T* const image = out + n * out_strides.n + c * out_strides.c;
        Ahead next_in, next_out;
        if (far) {
          next_in = {in + from_n * in_strides.n + from_c * in_strides.c,
                     (frame.rows - 1) * in_strides.h + frame.columns, calls};
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
  static const float* as_they_lie(const float* w) { return w; }
  static const float* as_they_lie(const void*) { return nullptr; }  // of half types: they are converted

  void gather(const T* w, bool turned) {
    gathered.reserve(s.C * kTaps * kTaps);
    for (int64_t c = 0; c < s.C; ++c) {
      for (int64_t i = 0; i < kTaps * kTaps; ++i) {
        const int64_t tap = turned ? kTaps * kTaps - 1 - i : i;
        gathered.push_back(load_one(w + c * s.w.n + tap / kTaps * s.w.h + tap % kTaps * s.w.w));
      }
    }
    weights = gathered.data();
  }

  void compute(const float* scratch, float* tile, int64_t tile_pitch, T* image, int64_t c, Ahead& next_in,
               Ahead& next_out) const {
    CorrelateArgs a;
    a.pitch = frame.pitch, a.row_step = frame.row_step, a.row_phase = frame.row_phase;
    a.w = weights + c * kTaps * kTaps;
    a.bias = bias == nullptr ? 0.0f : load_one(bias + c);
    const int64_t block = std::min<int64_t>(out_rows, kRows);
    a.rows = static_cast<int>(block);
    for (int64_t done = 0; done < out_rows; done += kRows) {
      const int64_t row = std::min(done, out_rows - block);  // the last block may overlap the one before
      T* const to = image + row * out_strides.h;
      bool direct = false;
      float* sums = tile;
      if constexpr (std::is_same_v<T, float>) {
        direct = SEPCONV_ISA_LEVEL == 2 && activation == Activation::identity;
        if (direct) sums = to;
      }
      a.out_row = direct ? out_strides.h : tile_pitch;
      for (int64_t q = 0; q < out_columns; q += kLane) {
        a.in = scratch + row * frame.row_step + q;
        a.out = sums + q;
        a.count = direct ? static_cast<int>(std::min<int64_t>(kLane, out_columns - q)) : kLane;
        next_in.fetch();
        next_out.template fetch<true>();
        frame.stride == 1 ? correlate<1>(a) : correlate<2>(a);
      }
      if (!direct) copy_out(to, tile, tile_pitch, block);
    }
  }

  void copy_out(T* to, const float* tile, int64_t tile_pitch, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i, to += out_strides.h, tile += tile_pitch) {
      if constexpr (std::is_same_v<T, float> && SEPCONV_ISA_LEVEL < 2) {
        if (activation == Activation::identity) {
          copy_overlapping(to, tile, out_columns);
          continue;
        }
      }
      for (int64_t q = 0; q < out_columns; q += kLane) {
        store_some(to + q, activate_lanes<float>(activation, load(tile + q)), out_columns - q);
      }
    }
  }
};

inline void small_forward(const ConvShape& s, DType dtype, const void* x, const void* w, const Epilogue& epilogue,
                          void* y) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      const Frame frame(s.H, s.W, s.stride_h, s.pad_h, s.pad_w, ceil_div(kTaps, s.stride_h),
                        std::max<int64_t>(s.P, kRows), s.Q, kLane);
      SmallPlanes<T> planes{s,
                            frame,
                            static_cast<const T*>(x),
                            static_cast<T*>(y),
                            s.x,
                            s.y,
                            s.P,
                            s.Q,
                            static_cast<const T*>(epilogue.bias),
                            epilogue.activation};
      planes.prepare(static_cast<const T*>(w), false);
      parallel(planes.tasks, planes);
    }
  });
}

inline void small_grad_input(const ConvShape& s, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      const Frame frame(s.P, s.Q, 1, kTaps - 1 - s.pad_h, kTaps - 1 - s.pad_w, kTaps, std::max<int64_t>(s.H, kRows),
                        s.W, kLane);
      SmallPlanes<T> planes{s,   frame,   static_cast<const T*>(grad_y), static_cast<T*>(grad_x), s.y, s.x, s.H,
                            s.W, nullptr, Activation::identity};
      planes.prepare(static_cast<const T*>(w), true);
      parallel(planes.tasks, planes);
    }
  });
}

#endif
