// Convolution in groups of 2, 4 or 8 channels that make as many, of float32 images whose channels are dense: forward
// and gradient by the input. Images, rows and pixels may lie apart in any way, and the weight has any strides.
//
//   forward: out = y, in = x       grad_input: out = grad_x, in = grad_y, the filters turned by half a turn
//
// Loop-to-data map. Both are correlations, for which the weight is packed once a call: lanes are neighbouring output
// channels, each with the taps of the channels of its own group. A task is a strip of output rows of one image, and
// goes down it as depthwise_rows_simd.h says. The gradient of a strided convolution is one correlation of stride 1 for
// each phase of its rows and columns, as each sees other taps.
//
// Floor: R x S x group multiply-adds an output at the rate of the registers, or the bytes of both images.
#include <algorithm>
#include <vector>

#include "cpu/depthwise/depthwise_rows.h"
#include "cpu/kernels.h"
#include "cpu/pointwise/product_shared.h"
#include "cpu/simd/thread_scratch.h"

namespace sepconv::cpu {
namespace {

// One dimension of a correlation: output i sees input i * stride - pad + t * dilation at its tap t of `taps`, which is
// tap first + t * step of the filter.
struct Axis {
  int64_t inputs, outputs, stride, pad, dilation;
  int64_t taps, first, step;
  int64_t begin = 0, apart = 1;  // output i stands at begin + i * apart of the image
};

Axis forward_axis(int64_t inputs, int64_t taps, int64_t outputs, int64_t stride, int64_t pad, int64_t dilation) {
  return {inputs, outputs, stride, pad, dilation, taps, 0, 1};
}

// Phase `phase` of `stride` of a gradient by the input: its outputs are phase, phase + stride, ...
Axis grad_input_axis(int64_t inputs, int64_t taps, int64_t outputs, int64_t stride, int64_t pad, int64_t dilation,
                     int64_t phase) {
  if (stride == 1) return {inputs, outputs, 1, (taps - 1) * dilation - pad, dilation, taps, taps - 1, -1};
  const int64_t least = (phase + pad) % stride, count = least < taps ? ceil_div(taps - least, stride) : 0;
  const int64_t padded = count - 1 - (phase + pad) / stride;
  return {inputs, ceil_div(outputs - phase, stride), 1,       padded, 1,
          count,  least + (count - 1) * stride,      -stride, phase,  stride};
}

// A correlation of all images.
struct Correlation {
  Axis rows, columns;
  int64_t C, group;
  Strides in, out;
  const float *x, *bias;
  float* y;
  Activation activation;
  const float* packed = nullptr;

  int64_t packed_floats() const { return depthwise_packed_floats(C, rows.taps, columns.taps) * group; }

  // The weight's strides are by output channel of a group, by input channel of one, by row and by column.
  void pack(const float* w, int64_t w_group, const Strides& strides, float* to) {
    packed = to;
    int64_t offsets[kDepthwiseLanes];  // of the lanes' output channels; groups fill panels
    for (int64_t lane = 0; lane < kDepthwiseLanes; ++lane) {
      offsets[lane] = lane / group * w_group + lane % group * strides.n;
    }
    for (int64_t c = 0; c < C; c += kDepthwiseLanes) {
      const int64_t lanes = std::min(kDepthwiseLanes, C - c);
      for (int64_t r = 0; r < rows.taps; ++r) {
        for (int64_t s = 0; s < columns.taps; ++s) {
          const int64_t row = rows.first + r * rows.step, column = columns.first + s * columns.step;
          const float* from = w + c / group * w_group + row * strides.h + column * strides.w;
          for (int64_t i = 0; i < group; ++i, from += strides.c, to += kDepthwiseLanes) {
            for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = from[offsets[lane]];
            std::fill(to + lanes, to + kDepthwiseLanes, 0.0f);
          }
        }
      }
    }
  }

  // Strip `part` of `parts` of the rows of image n.
  void run(int64_t n, int64_t parts, int64_t part) const {
    const Part strip(rows.outputs, parts, part);
    DepthwiseShape shape;
    shape.H = rows.inputs, shape.W = columns.inputs, shape.P = rows.outputs, shape.Q = columns.outputs;
    shape.R = rows.taps, shape.S = columns.taps, shape.stride_h = rows.stride, shape.stride_w = columns.stride;
    shape.pad_h = rows.pad, shape.pad_w = columns.pad;
    shape.dilation_h = rows.dilation, shape.dilation_w = columns.dilation, shape.group = group;
    DepthwiseRows d{};
    d.shape = &shape, d.channels = C, d.activation = activation, d.packed = packed, d.bias = bias;
    d.x = x + n * in.n, d.ring = rows.inputs, d.x_row = in.h, d.x_pixel = in.w;
    d.y = y + n * out.n + rows.begin * out.h + columns.begin * out.w;
    d.y_row = rows.apart * out.h, d.y_pixel = columns.apart * out.w;
    d.far = rows.inputs * columns.inputs * C * int64_t{sizeof(float)} > kNearImage;
    depthwise_bands(d, strip.begin, strip.end);
  }
};

struct Task {
  const std::vector<Correlation>& phases;
  int64_t parts;

  // The same strip of all phases, so that their input is still in cache.
  static void run(void* context, int64_t i) {
    const Task& task = *static_cast<const Task*>(context);
    for (const Correlation& phase : task.phases) phase.run(i / task.parts, task.parts, i % task.parts);
  }
};

void correlate(const ConvShape& s, std::vector<Correlation>& phases, const float* w, const Strides& strides,
               int64_t rows) {
  ThreadScratch scratch(ScratchUse::weights);
  float* to = scratch.take(depthwise_packed_floats(s.C, s.R, s.S) * s.channels_per_group());
  for (Correlation& phase : phases) {
    phase.pack(w, s.w.n * s.channels_per_group(), strides, to);
    to += phase.packed_floats();
  }
  const int64_t threads = parts_of(s.output_elements() * s.R * s.S * s.channels_per_group());
  Task task{phases, s.N % threads == 0 ? 1 : std::clamp<int64_t>(threads, 1, rows)};
  parallel_tasks(s.N * task.parts, Task::run, &task);
}

}  // namespace

void grouped_nhwc_forward(const ConvShape& s, const float* x, const float* w, const Epilogue& epilogue, float* y) {
  if (s.output_elements() == 0) return;
  const Axis rows = forward_axis(s.H, s.R, s.P, s.stride_h, s.pad_h, s.dilation_h);
  const Axis columns = forward_axis(s.W, s.S, s.Q, s.stride_w, s.pad_w, s.dilation_w);
  std::vector<Correlation> all{{rows, columns, s.K, s.channels_per_group(), s.x, s.y, x,
                                static_cast<const float*>(epilogue.bias), y, epilogue.activation}};
  correlate(s, all, w, s.w, s.P);
}

void grouped_nhwc_grad_input(const ConvShape& s, const float* grad_y, const float* w, float* grad_x) {
  if (s.input_elements() == 0) return;
  std::vector<Correlation> phases;
  for (int64_t i = 0; i < std::min(s.stride_h, s.H); ++i) {
    const Axis rows = grad_input_axis(s.P, s.R, s.H, s.stride_h, s.pad_h, s.dilation_h, i);
    for (int64_t j = 0; j < std::min(s.stride_w, s.W); ++j) {
      const Axis columns = grad_input_axis(s.Q, s.S, s.W, s.stride_w, s.pad_w, s.dilation_w, j);
      phases.push_back({rows, columns, s.C, s.channels_per_group(), s.y, s.x, grad_y, nullptr, grad_x, kNoActivation});
    }
  }
  correlate(s, phases, w, {s.w.c, s.w.n, s.w.h, s.w.w}, s.H);
}

}  // namespace sepconv::cpu
