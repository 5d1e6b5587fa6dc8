// Depthwise convolution (multiplier 1) of images whose channels are dense: forward and gradient by the input. Images,
// rows and pixels may lie apart in any way: slices of channels, crops, expanded gradients.
//
// Loop-to-data map. A vector holds neighbouring channels of one pixel. A task is a strip of output rows of one image,
// or part of a row where there are few; inside it the loops go: phase of a dilation, a group of kRowGroup output rows,
// block of neighbouring output columns, chunk of channels that fits the first-level cache, output row, channel group
// (one or two vectors). The sums of a block stay in registers while the R x S taps pass; an input vector is loaded once
// for each kernel row and feeds every sum that sees it. Going down the rows of a group, a block finds all but the
// newest input row in the first-level cache, and it prefetches what the next block needs. Columns outside the image are
// skipped by comparing with a range, uniformly for the block; rows outside are not visited: nothing is padded or
// copied.
//
// Taps that lie apart are neighbours among the rows and columns that one phase of the outputs sees: a dilated
// correlation is several that are not, over images whose pixels and rows lie further apart.
//
// The gradient by the input is the same correlation with the filter turned round. With a stride, the pixels of grad_x
// split into stride_h x stride_w phases; each is a correlation of stride 1 over grad_y with every stride-th tap of
// the filter.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/depthwise/depthwise_nhwc.cpp"
#include "cpu/depthwise/depthwise_nhwc.h"

#include <numeric>

#include "core/activation.h"
#include "core/arithmetic.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

template <typename T>
NhwcKernel<T>::NhwcKernel(int64_t C, int64_t S, int64_t stride, int64_t dilation) {
  SEPCONV_BEST_ISA(choose_functions<T>)(*this, C, S, stride, dilation);
}

template <typename T>
void correlate(const Correlation<T>& k, const NhwcKernel<T>& kernel, int64_t p0, int64_t p1) {
  SEPCONV_BEST_ISA(correlate_rows<T>)(k, kernel, p0, p1);
}

template <typename T>
Correlation<T> forward_correlation(const ConvShape& shape, const T* x, const T* w, const Epilogue& epilogue,
                                   const ChannelGroups& groups, std::vector<accumulate_t<T>>& packed, T* y) {
  return SEPCONV_BEST_ISA(forward_of<T>)(shape, x, w, epilogue, groups, packed, y);
}

#define SEPCONV_NHWC(T)                                                                              \
  template struct NhwcKernel<T>;                                                                     \
  template void correlate(const Correlation<T>&, const NhwcKernel<T>&, int64_t, int64_t);            \
  template Correlation<T> forward_correlation(const ConvShape&, const T*, const T*, const Epilogue&, \
                                              const ChannelGroups&, std::vector<accumulate_t<T>>&, T*);
SEPCONV_NHWC(float)
SEPCONV_NHWC(double)
SEPCONV_NHWC(float16)
SEPCONV_NHWC(bfloat16)
#undef SEPCONV_NHWC

void depthwise_nhwc_forward(const ConvShape& shape, DType dtype, const void* x, const void* w, const Epilogue& epilogue,
                            void* y) {
  if (shape.output_elements() == 0) return;
  SEPCONV_BEST_ISA(forward)(shape, dtype, x, w, epilogue, y);
}

void depthwise_nhwc_grad_input(const ConvShape& shape, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  if (shape.input_elements() == 0) return;
  SEPCONV_BEST_ISA(grad_input)(shape, dtype, grad_y, w, grad_x);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

// Each calls what stands before it.
// clang-format off
#include "cpu/depthwise/depthwise_nhwc_correlate.h"
#include "cpu/depthwise/depthwise_nhwc_few.h"
#include "cpu/depthwise/depthwise_nhwc_phases.h"
// clang-format on

// Outputs of a part of a row: less is done in the time of handing it to a thread.
inline constexpr int64_t kLeastPart = 16 * 1024;

// How each image is cut, so that there is work for every thread: into strips of rows, and where there are few rows, as
// in a sequence, those into parts.
struct Cut {
  int64_t strips, parts = 1;

  Cut(int64_t images, int64_t rows, int64_t columns, int64_t channels) {
    const int64_t threads = num_threads();
    const int64_t wanted = threads == 1 ? 1 : ceil_div(4 * threads, images);
    strips = std::min(wanted, rows);
    if (rows < wanted) parts = std::clamp<int64_t>(columns * channels / kLeastPart, 1, ceil_div(wanted, rows));
  }
  int64_t tasks() const { return strips * parts; }
};

template <typename T>
Correlation<T> part_of(const Correlation<T>& k, int64_t part, int64_t parts) {
  return parts == 1 ? k : columns_of(k, k.Q * part / parts, k.Q * (part + 1) / parts);
}

template <typename T>
struct ForwardTask {
  Correlation<T> image0;
  const NhwcKernel<T>& kernel;
  const ConvShape& shape;
  Cut cut;
  void operator()(int64_t task) const {
    const int64_t part = task % cut.parts, strip = task / cut.parts % cut.strips, n = task / cut.tasks();
    Correlation<T> k = part_of(image0, part, cut.parts);
    k.x += n * shape.x.n;
    k.y += n * shape.y.n;
    correlate_rows(k, kernel, k.P * strip / cut.strips, k.P * (strip + 1) / cut.strips);
  }
};

template <typename T>
void forward_typed(const ConvShape& shape, const T* x, const T* w, const Epilogue& epilogue, T* y) {
  using A = accumulate_t<T>;
  const NhwcKernel<T> kernel(shape.C, shape.S, shape.stride_w, shape.dilation_w);
  std::vector<A> packed;
  const Correlation<T> k = forward_of(shape, x, w, epilogue, kernel.groups, packed, y);
  const Cut cut(shape.N, shape.P, shape.Q, shape.C);
  parallel(shape.N * cut.tasks(), ForwardTask<T>{k, kernel, shape, cut});
}

// Phase f of one dimension of grad_x: pixels f, f + stride, ... They see the taps `last`, `last` - step, ... (`count`
// of them, in the order in which they meet the rows of grad_y), and tap t of pixel i meets grad_y's i - pad + t *
// dilation.
struct Phase {
  int64_t size, last = 0, step = 1, count = 0, pad = 0, dilation = 1;
  Phase(int64_t f, int64_t pixels, int64_t taps, int64_t stride, int64_t padding, int64_t tap_distance) {
    size = pixels > f ? (pixels - f + stride - 1) / stride : 0;
    const int64_t common = std::gcd(stride, tap_distance);
    step = stride / common;
    dilation = tap_distance / common;
    for (int64_t first = 0; first < std::min(step, taps); ++first) {
      if ((f + padding - first * tap_distance) % stride != 0) continue;
      count = (taps - 1 - first) / step + 1;
      last = first + (count - 1) * step;
      pad = -(f + padding - last * tap_distance) / stride;
    }
  }
};

template <typename T>
struct GradInputTask {
  const std::vector<Correlation<T>>& phases;  // [rows][columns], of image 0
  const std::vector<NhwcKernel<T>>& kernels;
  const ConvShape& shape;
  int64_t columns;
  Cut cut;
  void operator()(int64_t task) const {
    const int64_t part = task % cut.parts, strip = task / cut.parts % cut.strips, n = task / cut.tasks();
    const int64_t h0 = shape.H * strip / cut.strips, h1 = shape.H * (strip + 1) / cut.strips,
                  group = kRowGroup * shape.stride_h;
    for (int64_t h = h0; h < h1; h += group) {
      for (size_t phase = 0; phase < phases.size(); ++phase) {
        Correlation<T> k = part_of(phases[phase], part, cut.parts);
        k.x += n * shape.y.n;
        k.y += n * shape.x.n;
        // Rows i of the phase: those with h <= i * stride_h + f < the group's end.
        const int64_t f = static_cast<int64_t>(phase) / columns;
        const int64_t end = std::min(h + group, h1);
        correlate_rows(k, kernels[phase], (h - f + shape.stride_h - 1) / shape.stride_h,
                       (end - f + shape.stride_h - 1) / shape.stride_h);
      }
    }
  }
};

template <typename T>
void grad_input_typed(const ConvShape& shape, const T* grad_y, const T* w, T* grad_x) {
  using A = accumulate_t<T>;
  const int64_t C = shape.C;
  const int64_t padded = C + 2 * kWidest<T>;  // no less than ChannelGroups::padded()
  std::vector<A> packed(padded * shape.R * shape.S), zeros(padded);
  A* next = packed.data();
  std::vector<Correlation<T>> phases;
  std::vector<NhwcKernel<T>> kernels;
  const int64_t phase_rows = std::min(shape.stride_h, shape.H), phase_columns = std::min(shape.stride_w, shape.W);
  for (int64_t fh = 0; fh < phase_rows; ++fh) {
    const Phase h(fh, shape.H, shape.R, shape.stride_h, shape.pad_h, shape.dilation_h);
    for (int64_t fw = 0; fw < phase_columns; ++fw) {
      const Phase v(fw, shape.W, shape.S, shape.stride_w, shape.pad_w, shape.dilation_w);
      Correlation<T> k;
      k.x = grad_y, k.y = grad_x + fh * shape.x.h + fw * shape.x.w, k.w = next, k.bias = zeros.data();
      k.C = C, k.H = shape.P, k.W = shape.Q, k.P = h.size, k.Q = v.size;
      k.R = v.count > 0 ? h.count : 0, k.S = v.count;  // without taps, all zeros
      k.x_row = shape.y.h, k.x_pixel = shape.y.w;
      k.y_row = shape.stride_h * shape.x.h, k.y_pixel = shape.stride_w * shape.x.w;
      k.pad_h = h.pad, k.pad_w = v.pad, k.dilation_h = h.dilation, k.dilation_w = v.dilation;
      phases.push_back(k);
      const NhwcKernel<T>& kernel = kernels.emplace_back(C, k.R == 0 ? 0 : k.S, 1, k.dilation_w);
      pack(shape, w, kernel.groups, h.last, -h.step, k.R, v.last, -v.step, k.S, next);
      next += k.R * k.S * kernel.groups.padded();
    }
  }
  const Cut cut(shape.N, shape.H, shape.W, shape.C);
  parallel(shape.N * cut.tasks(), GradInputTask<T>{phases, kernels, shape, phase_columns, cut});
}

void forward(const ConvShape& shape, DType dtype, const void* x, const void* w, const Epilogue& epilogue, void* y) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward_typed(shape, static_cast<const T*>(x), static_cast<const T*>(w), epilogue, static_cast<T*>(y));
  });
}

void grad_input(const ConvShape& shape, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    grad_input_typed(shape, static_cast<const T*>(grad_y), static_cast<const T*>(w), static_cast<T*>(grad_x));
  });
}

#endif
