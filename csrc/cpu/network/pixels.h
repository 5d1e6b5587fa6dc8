// The doors of what a network does besides products: float32, NHWC; raw memory in, raw memory out. Images are dense but
// for those given as Pixels or by a ConvShape. `y` may be an operand of the same size in add, multiply, scale,
// activate, clamp and layer_norm. Results do not depend on the number of threads.
#pragma once

#include "core/pixels.h"
#include "cpu/network/program.h"

namespace sepconv::cpu::network {

// y = activation(a + b), or of a * b.
void add(const Size&, Pixels a, Pixels b, Activation, Written y);
void multiply(int64_t count, const float* a, const float* b, Activation, float* y);
// y[n, i, c] = activation(x[n, i, c] * scale[n, c] + shift[c]) with a scale for each image, or one for all of them.
struct Scale {
  const float* scale;
  int64_t per_image;             // C, or 0
  const float* shift = nullptr;  // or null
};
void scale(const Size&, const float* x, const Scale&, Activation, float* y);
void activate(int64_t count, const float* x, Activation, float* y);
// y = min(max(x * factor + shift, low), high)
struct Line {
  float factor, shift, low, high;
};
void clamp(int64_t count, const float* x, const Line&, float* y);
// Each pixel's channels at mean 0 and variance 1, then times scale plus shift (both [C], or null).
void layer_norm(const Size&, const float* x, float eps, const float* scale, const float* shift, float* y);
// The mean of each image's pixels: [N, C].
void mean(const Size&, const float* x, float* y);
// The greatest of a window, or its mean over the taps inside the image (`padded`: over all taps within the padding).
void max_pool(const ConvShape&, const float* x, float* y);
void mean_pool(const ConvShape&, bool padded, const float* x, float* y);
// channels.cpp: y is x; y[c * count + i] is x[i][c], for `count` images x of one size.
void copy_channels(const Size&, Pixels x, Written y);
void interleave(const Size&, int count, const Pixels* x, Written y);
// A dense copy.
void to_nhwc(const Size&, const float* x, const Strides&, float* y);

}  // namespace sepconv::cpu::network
