// What a padding mode other than zeros changes (padding_mode.h): forward and grad_input compute the frame of their result
// again, and overwrite what a kernel for zero padding wrote there; grad_weight adds the products in the padding.
//
// Loop-to-data map. The frame is cut into strips (borders.h), each of which reads its taps from a list; the lists are
// made once a call and serve every image and channel. Where channels are dense (depthwise, channels_last), a task is a strip
// of one image, and a vector holds neighbouring channels of one pixel. Else a task is one plane of the result, all strips of
// it; a vector holds neighbouring columns of a strip where the columns of both images are dense, and what remains (the sides
// of a frame, strided or scattered memory) is computed number by number. Sums are formed in one fixed order.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "borders.cpp"
#include "borders.h"

#include "kernels.h"

namespace sepconv::cpu {

// One of the two gathers: out[n, k] = sum over m of in[n, m] * w[k, m], on the strips.
struct BordersJob {
  std::vector<Strip> strips;
  int64_t images, groups, ins, outs;  // ins and outs: channels of one group
  int64_t taps, taps_a_row;
  Strides in, out;
  int64_t w_group, w_out, w_in, w_row, w_column;  // steps of the weight
  const void *in_data, *w_data, *bias;
  void* out_data;
  Activation activation;

  bool channels_are_dense() const { return ins == 1 && outs == 1 && groups > 1 && in.c == 1 && out.c == 1; }
};

// The products of one tap in the padding.
struct PaddingTap {
  int64_t r, s;
  std::vector<ProductRun> runs;
};

}  // namespace sepconv::cpu

#include "foreach_isa.h"

namespace sepconv::cpu {

void borders_forward(const ConvShape& s, PaddingMode mode, DType dtype, const void* x, const void* w,
                     const Epilogue& epilogue, void* y) {
  const PaddedAxes axes(s, mode);
  const BordersJob job{.strips = frame_strips(GatherAxis::forward(axes.h), GatherAxis::forward(axes.w), s.S, s.x, s.y),
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
  const BordersJob job{
      .strips = frame_strips(GatherAxis::grad_input(axes.h), GatherAxis::grad_input(axes.w), s.S, s.y, s.x),
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

void borders_grad_weight(const ConvShape& s, PaddingMode mode, DType dtype, const void* grad_y, const void* x,
                         void* grad_w) {
  const PaddedAxes axes(s, mode);
  std::vector<PaddingTap> taps;
  for (int64_t r = 0; r < s.R; ++r) {
    for (int64_t t = 0; t < s.S; ++t) {
      PaddingTap tap{r, t, padding_products(axes, r, t, s.x, s.y)};
      if (!tap.runs.empty()) taps.push_back(std::move(tap));
    }
  }
  SEPCONV_BEST_ISA(add_padding_products)(s, taps, dtype, grad_y, x, grad_w);
}

}  // namespace sepconv::cpu
#else

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

// ---- grad_weight: float and double, which are summed in their own type

// One tap of one vector of channels.
template <typename T>
struct ChannelProducts {
  const ConvShape& shape;
  const std::vector<PaddingTap>& taps;
  const T *grad_y, *x;
  T* grad_w;
  int64_t blocks;  // of channels
  void operator()(int64_t task) const {
    constexpr int kCount = kLanes<T>;
    const PaddingTap& tap = taps[task / blocks];
    const int64_t c = task % blocks * kCount;
    const int count = static_cast<int>(std::min<int64_t>(kCount, shape.C - c));
    Vector<T> total{};
    for (int64_t n = 0; n < shape.N; ++n) {
      Vector<T> sum{};
      for (const ProductRun& run : tap.runs) {
        const T *from_y = grad_y + n * shape.y.n + run.y + c, *from_x = x + n * shape.x.n + run.x + c;
        for (int64_t i = 0; i < run.count; ++i, from_y += run.y_step, from_x += run.x_step) {
          sum += load_first(from_y, count) * load_first(from_x, count);
        }
      }
      total += sum;
    }
    for (int i = 0; i < count; ++i) grad_w[(c + i) * shape.w.n + tap.r * shape.w.h + tap.s * shape.w.w] += total[i];
  }
};

// All taps of one filter plane.
template <typename T>
struct PlaneProducts {
  const ConvShape& shape;
  const std::vector<PaddingTap>& taps;
  const T *grad_y, *x;
  T* grad_w;
  void operator()(int64_t task) const {
    const int64_t ins = shape.channels_per_group(), k = task / ins, m = task % ins;
    const T* from_y = grad_y + k * shape.y.c;
    const T* from_x = x + (k / shape.outputs_per_group() * ins + m) * shape.x.c;
    T* filter = grad_w + k * shape.w.n + m * shape.w.c;
    for (const PaddingTap& tap : taps) {
      T total = 0;
      for (int64_t n = 0; n < shape.N; ++n) {
        T sum = 0;
        for (const ProductRun& run : tap.runs) {
          sum += products(run, from_y + n * shape.y.n + run.y, from_x + n * shape.x.n + run.x);
        }
        total += sum;
      }
      filter[tap.r * shape.w.h + tap.s * shape.w.w] += total;
    }
  }

 private:
  SEPCONV_INLINE T products(const ProductRun& run, const T* y, const T* x) const {
    T sum = 0;
    if (run.y_step == 1 && run.x_step == 1) {
      constexpr int kCount = kLanes<T>;
      Vector<T> sums{};
      int64_t i = 0;
      for (; i + kCount <= run.count; i += kCount) sums += load(y + i) * load(x + i);
      const int left = static_cast<int>(run.count - i);
      if (left > 0) sums += load_first(y + i, left) * load_first(x + i, left);
      return sum_lanes<T>(sums);
    }
    for (int64_t i = 0; i < run.count; ++i) sum += y[i * run.y_step] * x[i * run.x_step];
    return sum;
  }
};

template <typename T>
void add_padding_products_typed(const ConvShape& s, const std::vector<PaddingTap>& taps, const T* grad_y, const T* x,
                                T* grad_w) {
  if (s.is_depthwise() && s.K == s.C && s.C > 1 && s.x.c == 1 && s.y.c == 1) {
    const int64_t blocks = (s.C + kLanes<T> - 1) / kLanes<T>;
    parallel(static_cast<int64_t>(taps.size()) * blocks, ChannelProducts<T>{s, taps, grad_y, x, grad_w, blocks});
  } else {
    parallel(s.K * s.channels_per_group(), PlaneProducts<T>{s, taps, grad_y, x, grad_w});
  }
}

inline void add_padding_products(const ConvShape& s, const std::vector<PaddingTap>& taps, DType dtype,
                                 const void* grad_y, const void* x, void* grad_w) {
  if (dtype == DType::float64) {
    using T = double;
    add_padding_products_typed(s, taps, static_cast<const T*>(grad_y), static_cast<const T*>(x),
                               static_cast<T*>(grad_w));
  } else {
    using T = float;
    add_padding_products_typed(s, taps, static_cast<const T*>(grad_y), static_cast<const T*>(x),
                               static_cast<T*>(grad_w));
  }
}

#endif
