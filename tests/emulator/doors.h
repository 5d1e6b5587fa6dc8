// One shape for all launch_* functions, so that the runner can call each of them. Which doors exist is read from
// csrc/cuda/launch.h by build.py, which writes doors.inc: one line DOOR(launch_x) each. A door whose parameters no
// function here understands does not compile, and a door without a case fails in tests/test_emulated.py.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "../../csrc/cuda/launch.h"
#include "reference.h"

namespace emulator {

struct Call {
  sepconv::ConvShape shape;
  sepconv::DType dtype = sepconv::DType::float32;
  const void *a = nullptr, *b = nullptr;  // the operands: (x, w), (grad_y, w), (grad_y, x), (partials, nothing)
  sepconv::cuda::Epilogue epilogue;
  void *out = nullptr, *workspace = nullptr;
  sepconv::cuda::Tile tile;
};

using sepconv::ConvShape;
using sepconv::DType;
using sepconv::cuda::Epilogue;
using sepconv::cuda::Tile;

// forward
inline cudaError_t enter(cudaError_t (*f)(const ConvShape&, DType, const void*, const void*, const Epilogue&, void*,
                                          cudaStream_t),
                         const Call& c) {
  return f(c.shape, c.dtype, c.a, c.b, c.epilogue, c.out, nullptr);
}
inline cudaError_t enter(cudaError_t (*f)(const ConvShape&, DType, const void*, const void*, const Epilogue&, void*, void*,
                                          cudaStream_t),
                         const Call& c) {
  return f(c.shape, c.dtype, c.a, c.b, c.epilogue, c.out, c.workspace, nullptr);
}
inline cudaError_t enter(cudaError_t (*f)(const ConvShape&, DType, const void*, const void*, const Epilogue&, void*,
                                          const Tile&, cudaStream_t),
                         const Call& c) {
  return f(c.shape, c.dtype, c.a, c.b, c.epilogue, c.out, c.tile, nullptr);
}
// grad_input
inline cudaError_t enter(cudaError_t (*f)(const ConvShape&, DType, const void*, const void*, void*, cudaStream_t),
                         const Call& c) {
  return f(c.shape, c.dtype, c.a, c.b, c.out, nullptr);
}
inline cudaError_t enter(cudaError_t (*f)(const ConvShape&, DType, const void*, const void*, void*, void*, cudaStream_t),
                         const Call& c) {
  return f(c.shape, c.dtype, c.a, c.b, c.out, c.workspace, nullptr);
}
inline cudaError_t enter(cudaError_t (*f)(const ConvShape&, DType, const void*, const void*, void*, const Tile&,
                                          cudaStream_t),
                         const Call& c) {
  return f(c.shape, c.dtype, c.a, c.b, c.out, c.tile, nullptr);
}
// grad_weight
inline cudaError_t enter(cudaError_t (*f)(const ConvShape&, DType, const void*, const void*, void*, void*, const Tile&,
                                          cudaStream_t),
                         const Call& c) {
  return f(c.shape, c.dtype, c.a, c.b, c.out, c.workspace, c.tile, nullptr);
}
inline cudaError_t enter(cudaError_t (*f)(const ConvShape&, DType, const void*, const void*, void*, int, void*,
                                          cudaStream_t),
                         const Call& c) {
  return f(c.shape, c.dtype, c.a, c.b, c.out, c.tile.splits, c.workspace, nullptr);
}
// sum_partials
inline cudaError_t enter(cudaError_t (*f)(const ConvShape&, DType, const void*, int, void*, cudaStream_t), const Call& c) {
  return f(c.shape, c.dtype, c.a, c.tile.splits, c.out, nullptr);
}

struct Door {
  const char* name;
  cudaError_t (*call)(const Call&);
};

inline constexpr Door kDoors[] = {
#define DOOR(name) {#name, [](const Call& c) { return enter(sepconv::cuda::name, c); }},
#include "doors.inc"
#undef DOOR
};

}  // namespace emulator
