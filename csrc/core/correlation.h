// A depthwise map of stride 1, as the correlation of planes that it is:
//   result[i, j] = sum over f, g of  image[i + f * dilation - pad_h, j + g * dilation - pad_w] * filter[f, g]
//
// Forward: the weight is the filter. grad_input: grad_y is the image, and the weight, turned around, the filter.
// grad_weight: grad_y is the filter, the weight's gradient the result, and the images of the batch are added up.
#pragma once

#include "core/conv_shape.h"

namespace sepconv {

struct Correlation {
  int64_t N, channels;  // planes of results, but for the sum
  int64_t image_h, image_w, filter_h, filter_w, result_h, result_w, pad_h, pad_w;
  Strides image, result;  // grad_weight: of x, and of the weight
  bool turned;            // the filter is the weight with its rows and columns in reverse order
  bool sums_images;
  bool channels_dense;  // neighbouring channels lie beside each other in memory
};

inline Correlation correlation(Map map, const ConvShape& s) {
  const bool dense = s.C > 1 && s.x.c == 1 && s.y.c == 1;
  if (map == Map::grad_weight) {
    return {s.N, s.K, s.H, s.W, s.P, s.Q, s.R, s.S, s.pad_h, s.pad_w, s.x, s.w, false, true, dense};
  }
  if (map == Map::forward) {
    return {s.N, s.K, s.H, s.W, s.R, s.S, s.P, s.Q, s.pad_h, s.pad_w, s.x, s.y, false, false, dense};
  }
  const int64_t pad_h = s.dilation_h * (s.R - 1) - s.pad_h, pad_w = s.dilation_w * (s.S - 1) - s.pad_w;
  return {s.N, s.C, s.P, s.Q, s.R, s.S, s.H, s.W, pad_h, pad_w, s.y, s.x, true, false, dense};
}

}  // namespace sepconv
