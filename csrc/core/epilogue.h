// What happens to an accumulated output before it is stored. Apart from activation.h, so that a new activation compiles
// anew what names activations, and nothing else.
#pragma once

namespace sepconv {

enum class Activation : int;                   // activation.h names them
inline constexpr Activation kNoActivation{0};  // Activation::identity

// activation(output + bias + residual).
struct Epilogue {
  const void* bias = nullptr;  // [K], dense, in the tensors' dtype; or null
  Activation activation = kNoActivation;
  const void* residual = nullptr;  // an image that lies as the output does; or null
};

// What a plan knows of it. A bias is no matter to it.
struct Finish {
  Activation activation = kNoActivation;
  bool residual = false;
};

}  // namespace sepconv
