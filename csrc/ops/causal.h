// Causal depthwise convolutions of sequences that continue from a state or lie packed side by side, as ops.
//
//   input [N, C, L], weight [C, S], bias [C], initial_states [N, C, reach] with reach = (S - 1) * dilation, and seq_idx
//   [N, L] of whole numbers: where the number changes, another sequence begins, and what is negative is padding
//
// Without states and seq_idx a call is conv2d's of an image of one row. core/causal_shape.h has the formula.
#pragma once

#include "core/causal_shape.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace sepconv {

namespace ops {

inline constexpr Op<"sepconv_ext::causal_conv1d",
                    Tensor(const Tensor& input, const Tensor& weight, Bias bias, Bias initial_states, Bias seq_idx,
                           c10::SymInt dilation, Name activation)>
    causal_conv1d{};

// (by the input, by the states): the latter is empty where it is not wanted.
inline constexpr Op<"sepconv_ext::causal_conv1d_grad_input",
                    std::tuple<Tensor, Tensor>(const Tensor& grad_output, const Tensor& weight, Bias seq_idx,
                                               Ints input_stride, c10::SymInt dilation, bool states)>
    causal_conv1d_grad_input{};

inline constexpr Op<"sepconv_ext::causal_conv1d_grad_weight",
                    Tensor(const Tensor& grad_output, const Tensor& input, Bias initial_states, Bias seq_idx,
                           c10::SymInt width, c10::SymInt dilation)>
    causal_conv1d_grad_weight{};

inline constexpr Op<"sepconv_ext::causal_conv1d_update",
                    Tensor(const Tensor& x, Tensor& state, const Tensor& weight, Bias bias, Bias cache_seqlens,
                           Bias state_indices, c10::SymInt dilation, Name activation)>
    causal_conv1d_update{};

}  // namespace ops

namespace causal {

// The ops made of other ops, on every device and under every transform; differentiable.
SignatureOf<ops::causal_conv1d> composite;
SignatureOf<ops::causal_conv1d_grad_input> composite_grad_input;
SignatureOf<ops::causal_conv1d_grad_weight> composite_grad_weight;
SignatureOf<ops::causal_conv1d_update> composite_update;

// The same for a device whose kernels do not take a call: checked, and with the strides that the checks promise.
SignatureOf<ops::causal_conv1d> elsewhere;
SignatureOf<ops::causal_conv1d_update> update_elsewhere;

// What checks_causal.cpp finds; x of the shape is the input's strides or those of its gradient.
struct CheckedCausal {
  CausalShape shape;
  Result result;  // the output, the gradient of the input, or nothing
};
CheckedCausal check(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const std::optional<at::Tensor>& initial_states, const std::optional<at::Tensor>& seq_idx,
                    int64_t dilation);
CheckedCausal check_grad_input(const at::Tensor& grad_output, const at::Tensor& weight,
                               const std::optional<at::Tensor>& seq_idx, at::IntArrayRef input_stride,
                               int64_t dilation);
CheckedCausal check_grad_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                const std::optional<at::Tensor>& initial_states,
                                const std::optional<at::Tensor>& seq_idx, int64_t width, int64_t dilation);
CausalUpdateShape check_update(const at::Tensor& x, const at::Tensor& state, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& cache_seqlens,
                               const std::optional<at::Tensor>& state_indices, int64_t dilation);
void check_rows(const int64_t* rows, int64_t count, int64_t states);

inline bool given(const std::optional<at::Tensor>& t) { return t && t->defined(); }

}  // namespace causal

}  // namespace sepconv
