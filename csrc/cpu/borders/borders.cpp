// What a padding mode other than zeros changes (padding_mode.h): the frame of the result of forward and grad_input is
// computed again, over what a kernel for zero padding wrote there.
//
// Loop-to-data map. The frame is cut into strips (borders.h), each of which reads its taps from a list; the lists are
// made once a call and serve every image and channel. Where channels are dense (depthwise, channels_last), a task is a
// strip of one image, and a vector holds neighbouring channels of one pixel. Else a task is one plane of the result,
// all strips of it; a vector holds neighbouring columns of a strip where the columns of both images are dense, and
// neighbouring rows of the sides where rows have stride 1 and groups one channel; what remains (strided or scattered
// memory) is computed number by number. Sums are formed in one fixed order.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/borders/borders.cpp"
#include "cpu/borders/borders.h"

#include "cpu/kernels.h"

namespace sepconv::cpu {

// One of the two gathers: out[n, k] = sum over m of in[n, m] * w[k, m], on the strips.
struct BordersJob {
  std::vector<Strip> strips;
  Sides sides;
  int64_t images, groups, ins, outs;  // ins and outs: channels of one group
  int64_t taps, taps_a_row;
  Strides in, out;
  int64_t w_group, w_out, w_in, w_row, w_column;  // steps of the weight
  const void *in_data, *w_data, *bias;
  void* out_data;
  Activation activation;

  bool channels_are_dense() const { return ins == 1 && outs == 1 && groups > 1 && in.c == 1 && out.c == 1; }
};

}  // namespace sepconv::cpu

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

// Vectors down the sides: not where vectors hold channels, nor down a few rows.
static bool sides_apart(const ConvShape& s, int64_t rows, int64_t read_per_group) {
  const bool channels = s.groups > 1 && s.K == s.C && s.x.c == 1 && s.y.c == 1;
  return read_per_group == 1 && s.stride_h == 1 && rows >= 6 && !channels;
}

void borders_forward(const ConvShape& s, PaddingMode mode, DType dtype, const void* x, const void* w,
                     const Epilogue& epilogue, void* y) {
  const PaddedAxes axes(s, mode);
  const GatherAxis rows = GatherAxis::forward(axes.h), columns = GatherAxis::forward(axes.w);
  const bool sides = sides_apart(s, s.P, s.channels_per_group());
  const BordersJob job{.strips = frame_strips(rows, columns, s.S, s.x, s.y, sides),
                       .sides = sides ? Sides::forward(axes, columns, s.x, s.y) : Sides(),
                       .images = s.N,
                       .groups = s.groups,
                       .ins = s.channels_per_group(),
                       .outs = s.outputs_per_group(),
                       .taps = s.R * s.S,
                       .taps_a_row = s.S,
                       .in = s.x,
                       .out = s.y,
                       .w_group = s.w.n * s.outputs_per_group(),
                       .w_out = s.w.n,
                       .w_in = s.w.c,
                       .w_row = s.w.h,
                       .w_column = s.w.w,
                       .in_data = x,
                       .w_data = w,
                       .bias = epilogue.bias,
                       .out_data = y,
                       .activation = epilogue.activation};
  SEPCONV_BEST_ISA(run_borders)(job, dtype);
}

void borders_grad_input(const ConvShape& s, PaddingMode mode, DType dtype, const void* grad_y, const void* w,
                        void* grad_x) {
  const PaddedAxes axes(s, mode);
  const GatherAxis rows = GatherAxis::grad_input(axes.h), columns = GatherAxis::grad_input(axes.w);
  const bool sides = sides_apart(s, s.H, s.outputs_per_group());
  const BordersJob job{.strips = frame_strips(rows, columns, s.S, s.y, s.x, sides),
                       .sides = sides ? Sides::grad_input(axes, columns, s.y, s.x) : Sides(),
                       .images = s.N,
                       .groups = s.groups,
                       .ins = s.outputs_per_group(),
                       .outs = s.channels_per_group(),
                       .taps = s.R * s.S,
                       .taps_a_row = s.S,
                       .in = s.y,
                       .out = s.x,
                       .w_group = s.w.n * s.outputs_per_group(),
                       .w_out = s.w.c,
                       .w_in = s.w.n,
                       .w_row = s.w.h,
                       .w_column = s.w.w,
                       .in_data = grad_y,
                       .w_data = w,
                       .bias = nullptr,
                       .out_data = grad_x,
                       .activation = Activation::identity};
  SEPCONV_BEST_ISA(run_borders)(job, dtype);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

inline constexpr int kBlock = 4;  // vectors of channels whose sums stay in registers

// ---- forward and grad_input

// Channels c to c + kVectors * lanes - 1 (`count` of them, where kVectors is 1) of one pixel.
template <typename T, int kVectors>
SEPCONV_INLINE void sum_channels(const BordersJob& job, const Strip& strip, const T* in, const accumulate_t<T>* w,
                                 const T* bias, T* out, int count) {
  using A = accumulate_t<T>;
  constexpr int kCount = kLanes<A>;
  Vector<A> sums[kVectors] = {};
  if (bias != nullptr) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[v] = kVectors == 1 ? load_first(bias, count) : load(bias + v * kCount);
  }
  for (const ReadTap& tap : strip.taps) {
    const T* from = in + tap.position;
    const A* weights = w + tap.tap * job.groups;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kVectors == 1) {
        sums[v] += load_first(from, count) * load_first(weights, count);
      } else {
        sums[v] += load(from + v * kCount) * load(weights + v * kCount);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vector<A> result = activate_lanes<A>(job.activation, sums[v]);
    if constexpr (kVectors == 1) {
      store_first(out, result, count);
    } else {
      store(out + v * kCount, result);
    }
  }
}

// One strip of one image, all channels.
template <typename T>
struct ChannelsTask {
  const BordersJob& job;
  const accumulate_t<T>* weights;  // [taps, C]
  void operator()(int64_t task) const {
    constexpr int kCount = kLanes<accumulate_t<T>>;
    const int64_t strips = job.strips.size(), C = job.groups;
    const Strip& strip = job.strips[task % strips];
    const T* in = static_cast<const T*>(job.in_data) + task / strips * job.in.n;
    T* out = static_cast<T*>(job.out_data) + task / strips * job.out.n + strip.out;
    const T* bias = static_cast<const T*>(job.bias);
    for (int64_t i = 0; i < strip.count; ++i, in += strip.in_step, out += strip.out_step) {
      int64_t c = 0;
      for (; c + kBlock * kCount <= C; c += kBlock * kCount) {
        sum_channels<T, kBlock>(job, strip, in + c, weights + c, bias == nullptr ? bias : bias + c, out + c, kCount);
      }
      for (; c < C; c += kCount) {
        sum_channels<T, 1>(job, strip, in + c, weights + c, bias == nullptr ? bias : bias + c, out + c,
                           static_cast<int>(std::min<int64_t>(kCount, C - c)));
      }
    }
  }
};

// One plane of the result.
template <typename T>
struct PlaneTask {
  using A = accumulate_t<T>;
  const BordersJob& job;
  const A* weights;  // [groups, outs, ins, taps]
  void operator()(int64_t task) const {
    const int64_t channels = job.groups * job.outs, n = task / channels, k = task % channels;
    const T* in = static_cast<const T*>(job.in_data) + n * job.in.n + k / job.outs * job.ins * job.in.c;
    T* out = static_cast<T*>(job.out_data) + n * job.out.n + k * job.out.c;
    const A* w = weights + k * job.ins * job.taps;
    const A bias = job.bias == nullptr ? A(0) : load_one(static_cast<const T*>(job.bias) + k);
    for (const Strip& strip : job.strips) {
      if (strip.count > 1 && strip.in_step == 1 && strip.out_step == 1) {
        dense_strip(strip, in, w, bias, out + strip.out);
      } else {
        for (int64_t i = 0; i < strip.count; ++i) {
          one_sum(strip, in + i * strip.in_step, w, bias, out + strip.out + i * strip.out_step);
        }
      }
    }
    if (!job.sides.sides.empty()) down_sides(in, w, bias, out);
  }

 private:
  void dense_strip(const Strip& strip, const T* in, const A* w, A bias, T* out) const {
    constexpr int kCount = kLanes<A>;
    for (int64_t i = 0; i < strip.count; i += kCount) {
      const int left = static_cast<int>(std::min<int64_t>(kCount, strip.count - i));
      Vector<A> sum = broadcast<A>(bias);
      for (int64_t m = 0; m < job.ins; ++m) {
        const T* from = in + m * job.in.c + i;
        const A* filter = w + m * job.taps;
        if (left == kCount) {
          for (const ReadTap& tap : strip.taps) sum += load(from + tap.position) * broadcast<A>(filter[tap.tap]);
        } else {
          for (const ReadTap& tap : strip.taps) {
            sum += load_first(from + tap.position, left) * broadcast<A>(filter[tap.tap]);
          }
        }
      }
      store_first(out + i, activate_lanes<A>(job.activation, sum), left);
    }
  }

  // The columns of the frame, from top to bottom.
  void down_sides(const T* in, const A* w, A bias, T* out) const {
    constexpr int kCount = kLanes<A>;
    const Sides& s = job.sides;
    const int64_t rows = s.rows.size(), copies = s.columns.size(), pitch = rows + kCount;
    const std::unique_ptr<A[]> memory(new A[copies * pitch + s.sums + kCount]);
    A *to = memory.get(), *const sums = to + copies * pitch;
    for (int64_t copy = 0; copy < copies; ++copy, to += pitch) {
      const T* from = in + s.columns[copy];
      for (int64_t i = 0; i < rows; ++i) to[i] = s.rows[i] < 0 ? A(0) : load_one(from + s.rows[i]);
      for (int64_t i = rows; i < pitch; ++i) to[i] = 0;
    }
    for (const Sides::Side& side : s.sides) {
      for (int64_t i = 0; i < s.sums; i += kCount) {
        Vector<A> sum = broadcast<A>(bias);
        for (const Sides::Tap& tap : side.taps) {
          sum += load(memory.get() + tap.copy * pitch + tap.offset + i) * broadcast<A>(w[tap.tap]);
        }
        store(sums + i, activate_lanes<A>(job.activation, sum));
      }
      A* own = sums + s.own;
      for (const Sides::Image& image : s.images) own[image.row] += sums[image.sum];  // grad_input alone has images
      T* column = out + side.out;
      for (int64_t h = 0; h < s.written; ++h) store_one(column + h * job.out.h, own[h]);
    }
  }

  SEPCONV_INLINE void one_sum(const Strip& strip, const T* in, const A* w, A bias, T* out) const {
    A sum = bias;
    for (int64_t m = 0; m < job.ins; ++m) {
      const T* from = in + m * job.in.c;
      const A* filter = w + m * job.taps;
      for (const ReadTap& tap : strip.taps) sum += load_one(from + tap.position) * filter[tap.tap];
    }
    store_one(out, activate(job.activation, sum));
  }
};

template <typename T>
void run_borders_typed(const BordersJob& job) {
  using A = accumulate_t<T>;
  const bool dense = job.channels_are_dense();
  const int64_t channels = job.groups * job.outs;
  const std::unique_ptr<A[]> weights(new A[channels * job.ins * job.taps]);
  for (int64_t k = 0; k < channels; ++k) {
    for (int64_t m = 0; m < job.ins; ++m) {
      const T* from =
          static_cast<const T*>(job.w_data) + k / job.outs * job.w_group + k % job.outs * job.w_out + m * job.w_in;
      for (int64_t tap = 0; tap < job.taps; ++tap) {
        const A weight = load_one(from + tap / job.taps_a_row * job.w_row + tap % job.taps_a_row * job.w_column);
        weights[dense ? tap * channels + k : (k * job.ins + m) * job.taps + tap] = weight;
      }
    }
  }
  if (dense) {
    parallel(job.images * static_cast<int64_t>(job.strips.size()), ChannelsTask<T>{job, weights.get()});
  } else {
    parallel(job.images * channels, PlaneTask<T>{job, weights.get()});
  }
}

inline void run_borders(const BordersJob& job, DType dtype) {
  with_dtype(dtype, [&](auto type) { run_borders_typed<decltype(type)>(job); });
}

#endif
