// The doors of the causal kernels: depthwise convolutions of sequences that continue from a state, or lie packed side
// by side. Sequences without either are images of one row (functional.causal_conv1d), and none of these kernels'
// matter.
//
// Any strides. Where the channels of both sequences are dense, vectors hold channels; else they hold positions.
#pragma once

#include "core/causal_shape.h"
#include "core/conv_shape.h"
#include "core/epilogue.h"

namespace sepconv::cpu {

// `states` may be null: zeros. The epilogue's bias is dense.
void causal_forward(const CausalShape&, const Packing&, DType, const void* x, const void* states, const void* w,
                    const Epilogue&, void* y);
// The gradients by x and by the states, which may be null: not wanted.
void causal_grad_input(const CausalShape&, const Packing&, DType, const void* grad_y, const void* w, void* grad_x,
                       void* grad_states);
void causal_grad_weight(const CausalShape&, const Packing&, DType, const void* grad_y, const void* x,
                        const void* states, void* grad_w);

// Decoding: y of the tokens x, and the states moved on, in place. Sequence n has the state rows[n] (null: n), none
// where that is negative: its y is zero. With `lengths` a state is a ring: token t goes to (lengths[n] + t) % length.
void causal_update(const CausalUpdateShape&, DType, const void* x, const void* w, const Epilogue&,
                   const int64_t* lengths, const int64_t* rows, void* state, void* y);

}  // namespace sepconv::cpu
