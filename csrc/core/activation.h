// The activations that a kernel can apply to its output, one definition for host and device.
#pragma once

#include <cmath>

#include "core/epilogue.h"
#include "core/host_device.h"

namespace sepconv {

enum class Activation : int { identity, relu, relu6, leaky_relu, gelu, silu, hardswish, sigmoid, tanh };
static_assert(Activation::identity == kNoActivation);

inline constexpr const char* kActivationNames[] = {"identity", "relu",      "relu6",   "leaky_relu", "gelu",
                                                   "silu",     "hardswish", "sigmoid", "tanh"};
inline constexpr int kActivationCount = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

// torch's default slope of leaky_relu.
inline constexpr double kLeakySlope = 0.01;

// True where the derivative can be read off the activation's own output, so that a fused forward has to save nothing
// else.
constexpr bool derivative_from_output(Activation a) {
  return a == Activation::identity || a == Activation::relu || a == Activation::relu6 || a == Activation::leaky_relu ||
         a == Activation::sigmoid || a == Activation::tanh;
}

// T is the accumulation type, float or double. NaN passes through every activation, as in torch.
template <typename T>
SEPCONV_HOST_DEVICE inline T activate(Activation a, T v) {
  switch (a) {
    case Activation::identity: return v;
    case Activation::relu: return v < T(0) ? T(0) : v;
    case Activation::relu6: return v < T(0) ? T(0) : (v > T(6) ? T(6) : v);
    case Activation::leaky_relu: return v < T(0) ? v * T(kLeakySlope) : v;
    case Activation::gelu: return T(0.5) * v * (T(1) + std::erf(v * T(0.70710678118654752440)));
    case Activation::silu: return v / (T(1) + std::exp(-v));
    case Activation::hardswish: return v < T(-3) ? T(0) : (v > T(3) ? v : v * (v + T(3)) * T(1.0 / 6.0));
    case Activation::sigmoid: return T(1) / (T(1) + std::exp(-v));
    case Activation::tanh: return std::tanh(v);
  }
  return v;
}

}  // namespace sepconv
