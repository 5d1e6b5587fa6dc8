// A causal depthwise convolution of sequences in plain numbers, and how sequences are packed side by side.
//
//   y[n, c, q] = sum over s of  w[c, s] * z[n, c, q - reach + s * dilation],   reach = (S - 1) * dilation
//
// where z is the input, before it the initial states (position -reach is the first of them), and zero elsewhere. A tap
// counts only where it stays in the run of its output; what is padding is zero.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/epilogue.h"

namespace sepconv {

struct SequenceStrides {  // in elements, of [N, C, L]
  int64_t n = 0, c = 0, l = 0;
};

struct CausalShape {
  int64_t N = 0, C = 0, L = 0;
  int64_t S = 0, dilation = 1;
  SequenceStrides x, states, y;  // input, initial states [N, C, reach] and output, or their gradients
  int64_t w_c = 0, w_s = 0;      // weight [C, S]

  int64_t reach() const { return (S - 1) * dilation; }
  // Where nothing stands before the input, no tap reaches farther back than it is long: a larger dilation is the same.
  void forget_states() { dilation = std::min(dilation, std::max<int64_t>(L, 1)); }
};

// Positions of one sequence of the batch that belong together; a run of padding is zero in every result.
struct Run {
  int64_t begin, end;
  bool padding;
};

// The runs of each sequence of the batch, in their order: those of n are runs[first[n]] to runs[first[n + 1] - 1].
struct Packing {
  std::vector<Run> runs;
  std::vector<int64_t> first;
};

// One token or several, with the state of what came before them: the last `length` inputs, or all of them in a ring.
struct CausalUpdateShape {
  int64_t N = 0, C = 0, T = 0, S = 0, dilation = 1;
  int64_t length = 0;  // of a state; at least reach()
  int64_t states = 0;  // that there are
  SequenceStrides x, state, y;
  int64_t w_c = 0, w_s = 0;
  bool float_weight = false;  // weight and bias are float32, whatever the others are

  int64_t reach() const { return (S - 1) * dilation; }
};

// Whole numbers as a device reads them where they lie; without memory there are none.
struct WholeNumbers {
  const void* data = nullptr;
  bool wide = false;     // of 64 bits, else 32
  int64_t n = 0, l = 0;  // strides in elements
};

// The memory of a call of causal_conv1d. States may be null: zeros; so may be the memory of `numbers`: each sequence is
// one run. The epilogue's bias is dense.
struct CausalMemory {
  const void *x, *states, *w;
  Epilogue epilogue;
  WholeNumbers numbers;
  void* y;
};

// The memory of a call of causal_conv1d_update. Weight and bias (dense) are float32 with `float_weight`.
struct CausalUpdateMemory {
  const void *x, *w;
  Epilogue epilogue;
  WholeNumbers lengths, rows;  // how many tokens came before, for rings; the state of each sequence
  void *state, *y;
};

}  // namespace sepconv
