#include "reference.h"

#include <cmath>

namespace emulator {

using sepconv::Map;

namespace {

// The pixel at a position of the padded image, -1 for none: walked step by step, not as the kernels compute it.
int64_t pixel_at(sepconv::PaddingMode mode, int64_t position, int64_t size) {
  using sepconv::PaddingMode;
  while (position < 0 || position >= size) {
    switch (mode) {
      case PaddingMode::zeros: return -1;
      case PaddingMode::reflect: position = position < 0 ? -position : 2 * size - 2 - position; break;
      case PaddingMode::replicate: position += position < 0 ? 1 : -1; break;
      case PaddingMode::circular: position += position < 0 ? size : -size; break;
    }
  }
  return position;
}

}  // namespace

std::vector<Expected> reference(Map map, const sepconv::ConvShape& s, sepconv::PaddingMode mode, const Buffer& a,
                                const Buffer& b, const Buffer* bias, sepconv::Activation activation,
                                const Buffer* residual) {
  const int64_t Cg = s.channels_per_group(), Kg = s.outputs_per_group();
  std::vector<Expected> result(map == Map::forward      ? s.output_elements()
                               : map == Map::grad_input ? s.input_elements()
                                                        : s.weight_elements());
  // Every term of the bilinear map once: x[n, c, h, w] * weight[k, j, r, t] belongs to y[n, k, p, q].
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t k = 0; k < s.K; ++k)
      for (int64_t p = 0; p < s.P; ++p)
        for (int64_t q = 0; q < s.Q; ++q)
          for (int64_t j = 0; j < Cg; ++j)
            for (int64_t r = 0; r < s.R; ++r)
              for (int64_t t = 0; t < s.S; ++t) {
                const int64_t c = k / Kg * Cg + j;
                const int64_t h = pixel_at(mode, p * s.stride_h + r * s.dilation_h - s.pad_h, s.H);
                const int64_t w = pixel_at(mode, q * s.stride_w + t * s.dilation_w - s.pad_w, s.W);
                if (h < 0 || w < 0) continue;
                double product = 0;
                int64_t index = 0;
                switch (map) {
                  case Map::forward:
                    product = a.at(n, c, h, w) * b.at(k, j, r, t);
                    index = ((n * s.K + k) * s.P + p) * s.Q + q;
                    break;
                  case Map::grad_input:
                    product = a.at(n, k, p, q) * b.at(k, j, r, t);
                    index = ((n * s.C + c) * s.H + h) * s.W + w;
                    break;
                  case Map::grad_weight:
                    product = a.at(n, k, p, q) * b.at(n, c, h, w);
                    index = ((k * Cg + j) * s.R + r) * s.S + t;
                    break;
                }
                result[index].value += product;
                result[index].magnitude += std::fabs(product);
                ++result[index].terms;
              }
  if (map != Map::forward) return result;
  for (size_t i = 0; i < result.size(); ++i) {
    Expected& e = result[i];
    const auto add = [&](double value) {
      e.value += value;
      e.magnitude += std::fabs(value);
      ++e.terms;
    };
    const int64_t k = i / (s.P * s.Q) % s.K;
    if (bias) add(bias->at(0, k, 0, 0));
    if (residual) add(residual->at(i / (s.K * s.P * s.Q), k, i / s.Q % s.P, i % s.Q));
    e.value = activate(activation, e.value);
  }
  return result;
}

double Expected::bound(sepconv::DType dtype) const {
  const double unit = unit_roundoff(dtype);
  const double accumulate = dtype == sepconv::DType::float64 ? unit : unit_roundoff(sepconv::DType::float32);
  const double smallest = dtype == sepconv::DType::float16 ? 0x1p-25 : 1e-38;
  // The activations' slopes are below 1.2; their own error is a few units of the accumulation type.
  return 1.2 * (accumulate * ((terms + 2) * magnitude + 8 * std::fabs(value)) + inherited) +
         1.01 * unit * std::fabs(value) + smallest;
}

// Adds a number that is exact.
static void add(Expected& e, double value) {
  e.value += value;
  e.magnitude += std::fabs(value);
  ++e.terms;
}

std::vector<Expected> reference_depthwise(const sepconv::ConvShape& s, const std::vector<Expected>& x,
                                          sepconv::DType dtype, const Buffer& weight, const Buffer* bias,
                                          sepconv::Activation activation) {
  std::vector<Expected> result(s.output_elements());
  for (int64_t plane = 0; plane < s.N * s.C; ++plane)
    for (int64_t p = 0; p < s.P; ++p)
      for (int64_t q = 0; q < s.Q; ++q) {
        Expected& e = result[(plane * s.P + p) * s.Q + q];
        const int64_t c = plane % s.C;
        for (int64_t r = 0; r < s.R; ++r)
          for (int64_t t = 0; t < s.S; ++t) {
            const int64_t h = p * s.stride_h + r - s.pad_h, w = q * s.stride_w + t - s.pad_w;
            if (h < 0 || w < 0 || h >= s.H || w >= s.W) continue;
            const Expected& seen = x[(plane * s.H + h) * s.W + w];
            add(e, seen.value * weight.at(c, 0, r, t));
            e.inherited += seen.bound(dtype) * std::fabs(weight.at(c, 0, r, t));
          }
        if (bias) add(e, bias->at(0, c, 0, 0));
        e.value = activate(activation, e.value);
      }
  return result;
}

std::vector<Expected> reference_pointwise(const sepconv::ConvShape& s, const std::vector<Expected>& depthwise,
                                          sepconv::DType dtype, const Buffer& weight, const Buffer* bias,
                                          sepconv::Activation activation, const Buffer* residual) {
  std::vector<Expected> result(s.output_elements());
  const int64_t plane = s.P * s.Q;
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t k = 0; k < s.K; ++k)
      for (int64_t pixel = 0; pixel < plane; ++pixel) {
        Expected& e = result[(n * s.K + k) * plane + pixel];
        for (int64_t c = 0; c < s.C; ++c) {
          const Expected& h = depthwise[(n * s.C + c) * plane + pixel];
          const double w = weight.at(k, c, 0, 0);
          add(e, h.value * w);
          e.inherited += h.bound(dtype) * std::fabs(w);
        }
        if (bias) add(e, bias->at(0, k, 0, 0));
        if (residual) add(e, residual->at(n, k, pixel / s.Q, pixel % s.Q));
        e.value = activate(activation, e.value);
      }
  return result;
}

std::vector<Expected> spatial_reference(const sepconv::ConvShape& s, const Buffer& x, const Buffer& column,
                                        const Buffer& row, bool shared_column, bool shared_row) {
  std::vector<Expected> result;
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t p = 0; p < s.P; ++p)
        for (int64_t q = 0; q < s.Q; ++q) {
          Expected& e = result.emplace_back();
          e.terms = s.R + s.S;  // roundings: the column's sum, then the row's
          for (int64_t r = 0; r < s.R; ++r)
            for (int64_t t = 0; t < s.S; ++t) {
              const int64_t h = p + r - s.pad_h, w = q + t - s.pad_w;
              if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
              const double product =
                  x.at(n, c, h, w) * column.at(shared_column ? 0 : c, 0, 0, r) * row.at(shared_row ? 0 : c, 0, 0, t);
              e.value += product;
              e.magnitude += std::fabs(product);
            }
        }
  return result;
}

}  // namespace emulator
