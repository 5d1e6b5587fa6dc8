// Dense convolution of float32 to NHWC as a matrix product of windows, which are read where the image lies.
//
// Loop-to-data map. Rows of the product are the pixels of an output row, lanes are output channels, and a window of R x
// S pixels is R runs of S * C neighbouring numbers (R * S runs of C where the columns are dilated). A task has a band
// of output rows of one image, or some of its output channels: for each panel of the weight the band's rows, for each
// row blocks of pixels. Where the image has no padding and dense channels, its windows are read in place; else the rows
// that a band sees are first copied, with zeros around them. Taps that see nothing but zeros at all pixels, as where a
// dilation is as large as the image, are left out.
//
// Floor: R * S * C multiply-adds an output at the rate of the registers.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/pointwise/product_windows.cpp"
#include "cpu/pointwise/product_windows.h"

#include <cstring>

#include "cpu/pointwise/product_shared.h"
#include "cpu/simd/thread_scratch.h"

namespace sepconv::cpu {

struct WindowsCall {
  const ConvShape& shape;
  const float *x, *packed;
  const Epilogue& epilogue;
  const Residual& residual;
  float* y;
};

}  // namespace sepconv::cpu

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void windows_forward(const ConvShape& shape, const float* x, const float* packed, const Epilogue& epilogue,
                     const Residual& residual, float* y) {
  if (shape.output_elements() == 0) return;
  SEPCONV_BEST_ISA(run)({shape, x, packed, epilogue, residual, y});
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

#include "cpu/pointwise/product_simd.h"

#include "cpu/pointwise/product_rows_simd.h"

inline constexpr int64_t kBandBytes = 256 << 10;  // of the input rows that a band sees
inline constexpr int64_t kNearPanels = 16 << 10;  // of a weight beside which pixels stay in the first-level cache
inline constexpr int64_t kOutputStep = 32;        // tasks have whole panels, two of them with the widest vectors

// Pixels of an image with a few channels, from planes or from anywhere.
template <int kC>
void interleave(const float* from, int64_t pixel, int64_t channel, int64_t pixels, float* to) {
  for (int64_t i = 0; i < pixels; ++i, from += pixel, to += kC) {
    for (int c = 0; c < kC; ++c) to[c] = from[c * channel];
  }
}

// Three planes by vectors: each vector that is written takes its numbers from all of them.
template <int kVector, int... kI>
SEPCONV_INLINE Vector<float> of_three(Vector<float> a, Vector<float> b, Vector<float> c,
                                      std::integer_sequence<int, kI...>) {
  constexpr int L = kLanes<float>;
  const Vector<float> two =
      __builtin_shufflevector(a, b, ((kVector * L + kI) / 3 + ((kVector * L + kI) % 3 == 1) * L)...);
  return __builtin_shufflevector(two, c, ((kVector * L + kI) % 3 == 2 ? L + (kVector * L + kI) / 3 : kI)...);
}
inline void interleave_planes(const float* from, int64_t channel, int64_t pixels, float* to) {
  constexpr int L = kLanes<float>;
  const std::make_integer_sequence<int, L> lanes;
  int64_t i = 0;
  for (; i + L <= pixels; i += L, to += 3 * L) {
    const Vector<float> a = load(from + i), b = load(from + channel + i), c = load(from + 2 * channel + i);
    store(to, of_three<0>(a, b, c, lanes));
    store(to + L, of_three<1>(a, b, c, lanes));
    store(to + 2 * L, of_three<2>(a, b, c, lanes));
  }
  interleave<3>(from + i, 1, channel, pixels - i, to);
}

// Of `taps` taps along one dimension those that see the image at all: [begin, end), one at least.
struct SeenTaps {
  int64_t begin = 0, end;
  SeenTaps(int64_t taps, int64_t dilation, int64_t pad, int64_t stride, int64_t size, int64_t outputs) : end(taps) {
    const int64_t last = (outputs - 1) * stride - pad;  // where the last output's first tap is
    while (end - begin > 1 && last + begin * dilation < 0) ++begin;
    while (end - begin > 1 && (end - 1) * dilation - pad >= size) --end;
  }
};

struct Windows {
  const WindowsCall& call;
  ConvShape s;  // with the seen taps alone, so that a padding may be less than zero
  Panels w;
  bool in_place;
  int64_t pitch, columns;  // of a copied row, in numbers and in pixels
  int64_t band, bands, output_parts;
  std::vector<int64_t> jumps;

  explicit Windows(const WindowsCall& c) : call(c), s(c.shape), w{c.packed, s.R * s.S * s.C} {
    leave_out_taps();
    const int64_t reach_w = (s.S - 1) * s.dilation_w + 1, reach_h = (s.R - 1) * s.dilation_h + 1;
    const bool inside = s.pad_h <= 0 && s.pad_w <= 0 && (s.P - 1) * s.stride_h - s.pad_h + reach_h <= s.H &&
                        (s.Q - 1) * s.stride_w - s.pad_w + reach_w <= s.W;
    in_place = inside && s.x.c == 1 && (s.x.w == s.C || s.S == 1);
    columns = (s.Q - 1) * s.stride_w + reach_w;
    pitch = in_place ? s.x.h : columns * s.C;
    for (int64_t r = 0; r < s.R; ++r) {
      const int64_t down = s.dilation_h * pitch, back = (s.S - 1) * s.dilation_w * s.C + s.C;
      for (int64_t t = 1; s.dilation_w > 1 && t < s.S; ++t) jumps.push_back((s.dilation_w - 1) * s.C);
      jumps.push_back(down - back);
    }
    const int64_t near = kBandBytes / std::max<int64_t>(1, s.stride_h * columns * s.C * int64_t{sizeof(float)});
    const int64_t parts = parts_of(s.N * s.P * s.Q * s.K * s.R * s.S * s.C), rows = ceil_div(s.N * s.P, parts);
    band = std::clamp<int64_t>(std::min(near, rows), 1, s.P);
    bands = ceil_div(s.P, band), band = ceil_div(s.P, bands);
    output_parts = s.N * bands >= parts ? 1 : std::min(parts, ceil_div(s.K, kOutputStep));
  }

  int64_t tasks() const { return s.N * bands * output_parts; }

  // Rows of taps; and columns where one row is left, whose terms follow each other in a panel.
  void leave_out_taps() {
    const SeenTaps rows(s.R, s.dilation_h, s.pad_h, s.stride_h, s.H, s.P);
    w.stored = w.terms, w.data += rows.begin * s.S * s.C * kPanelColumns;
    s.R = rows.end - rows.begin, s.pad_h -= rows.begin * s.dilation_h;
    if (s.R == 1) {
      const SeenTaps columns(s.S, s.dilation_w, s.pad_w, s.stride_w, s.W, s.Q);
      w.data += columns.begin * s.C * kPanelColumns;
      s.S = columns.end - columns.begin, s.pad_w -= columns.begin * s.dilation_w;
    }
    w.terms = s.R * s.S * s.C;
  }

  // Input row `row` of an image, which may be outside, with zeros beside it.
  void copy_row(const float* image, int64_t row, float* to) const {
    if (row < 0 || row >= s.H) {
      std::fill_n(to, pitch, 0.0f);
      return;
    }
    const int64_t skipped = std::max<int64_t>(-s.pad_w, 0);  // of the image's columns
    const int64_t first = std::clamp<int64_t>(s.pad_w, 0, columns), last = std::clamp(s.pad_w + s.W, first, columns);
    const int64_t pixels = last - first;
    std::fill_n(to, first * s.C, 0.0f);
    std::fill_n(to + last * s.C, (columns - last) * s.C, 0.0f);
    const float* from = image + row * s.x.h + skipped * s.x.w;
    to += first * s.C;
    if (s.x.c == 1 && s.x.w == s.C) {
      std::memcpy(to, from, pixels * s.C * sizeof(float));
    } else if (s.x.c == 1) {
      for (int64_t i = 0; i < pixels; ++i) std::memcpy(to + i * s.C, from + i * s.x.w, s.C * sizeof(float));
    } else if (s.C == 3 && s.x.w == 1) {
      interleave_planes(from, s.x.c, pixels, to);
    } else if (s.C == 3) {
      interleave<3>(from, s.x.w, s.x.c, pixels, to);
    } else {
      for (int64_t i = 0; i < pixels; ++i, from += s.x.w) {
        for (int64_t c = 0; c < s.C; ++c) *to++ = from[c * s.x.c];
      }
    }
  }

  // Output rows in blocks of pixels, each of which meets all outputs where their weight stays in the first-level cache;
  // else all rows meet a panel first.
  void multiply_rows(const Factors& windows, const Outputs& y, int64_t rows, const Part& part) const {
    const bool near = (part.end - part.begin) * w.terms * int64_t{sizeof(float)} <= kNearPanels;
    const int64_t step = near ? part.end - part.begin : kPanelColumns;
    for (int64_t k = part.begin; k < part.end; k += step) {
      const Panels panels = w.from(k);
      const int64_t columns = std::min(step, part.end - k);
      for (int64_t p = 0; p < rows; ++p) {
        Factors row = windows;
        row.data += p * s.stride_h * pitch;
        const Fetched next =
            Fetched{panels.data + panels.distance(), near ? 0 : w.terms * kPanelColumns}.share(p, rows);
        multiply_in_blocks(row, panels, y.from(p * s.Q, k), s.Q, columns, shared(next, s.Q, columns));
      }
    }
  }

  void operator()(int64_t task) const {
    const int64_t n = task / (bands * output_parts);
    const Part rows(s.P, bands, task / output_parts % bands);
    const Part part(s.K, output_parts, task % output_parts, kOutputStep);
    const float* image = call.x + n * s.x.n;
    const int64_t top = rows.begin * s.stride_h - s.pad_h;
    ThreadScratch scratch(ScratchUse::pixels);
    const int64_t pixel_step = in_place ? s.x.w : s.C;
    Factors windows{image + top * pitch - s.pad_w * pixel_step, s.stride_w * pixel_step, 1};
    windows.run = s.dilation_w > 1 ? s.C : s.S * s.C;
    if (windows.run < w.terms) windows.jumps = jumps.data();
    if (!in_place) {
      const int64_t seen = (rows.end - rows.begin - 1) * s.stride_h + (s.R - 1) * s.dilation_h + 1;
      float* const copy = scratch.take(seen * pitch);
      for (int64_t i = 0; i < seen; ++i) copy_row(image, top + i, copy + i * pitch);
      windows.data = copy;
    }
    const int64_t pixel = (n * s.P + rows.begin) * s.Q, residual_pitch = call.residual.strides.w;
    Outputs y{call.y + pixel * s.y.w, s.y.w};
    if (call.residual.data != nullptr) {
      y.residual = call.residual.data + pixel * residual_pitch, y.residual_row = residual_pitch;
    }
    y.column_bias = static_cast<const float*>(call.epilogue.bias), y.activation = call.epilogue.activation;
    const bool one_chain = windows.jumps == nullptr || w.terms <= kChain;
    if (one_chain && are_dense(windows, s.Q)) return multiply_rows(windows, y, rows.end - rows.begin, part);
    const Pieces pieces(s.Q, kRows);
    const int64_t step = columns_of(std::min<int64_t>(s.Q, kRows)), all = (rows.end - rows.begin) * pieces.count;
    const Shares shares(step / kPanelColumns * w.terms, all, w.terms);
    for (int64_t k = part.begin; k < part.end; k += step) {
      for (int64_t p = 0; p < rows.end - rows.begin; ++p) {
        Factors row = windows;
        row.data += p * s.stride_h * pitch;
        for (int64_t piece = 0; piece < pieces.count; ++piece) {
          const int64_t i = pieces.begin(piece);
          const Panels panels = w.from(k).before(step, shares, p * pieces.count + piece);
          multiply(row.from(i), panels, y.from(p * s.Q + i, k), pieces.begin(piece + 1) - i,
                   std::min(step, part.end - k));
        }
      }
    }
  }
};

inline void run(const WindowsCall& call) {
  const Windows windows(call);
  parallel(windows.tasks(), windows);
}

#endif
