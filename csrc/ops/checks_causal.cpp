#include <ATen/core/Tensor.h>

#include <array>

#include "ops/causal.h"

namespace sepconv::causal {
namespace {

using at::IntArrayRef;
using at::Tensor;

SequenceStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// The padding that makes a convolution causal: what conv2d's own checks say holds here too.
struct CausalArgs {
  std::array<int64_t, 1> one{1}, dilation;
  std::array<int64_t, 2> padding;

  CausalArgs(int64_t width, int64_t step) : dilation{step}, padding{width > 1 ? (width - 1) * step : 0, 0} {}
  ConvArgs of(int64_t channels) const { return {one, padding, dilation, channels}; }
};

void check_dilation(int64_t dilation) {
  TORCH_CHECK(dilation >= 1 && dilation < (int64_t{1} << 31), "dilation must be from 1 to 2^31 - 1, but is ", dilation);
}

void check_ranks(const char* name, const Tensor& sequence, const Tensor& weight) {
  TORCH_CHECK(sequence.dim() == 3, name, " must be [N, C, L], but has size ", sequence.sizes());
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == sequence.size(1) && weight.size(1) >= 1,
              "weight must be [C, S] of ", name, "'s ", sequence.size(1), " channels, but has size ", weight.sizes());
}

void check_states(const std::optional<Tensor>& states, const char* name, const Tensor& input, int64_t reach) {
  if (!given(states)) return;
  const std::array<int64_t, 3> expected{input.size(0), input.size(1), reach};
  TORCH_CHECK(states->sizes() == IntArrayRef(expected), name, " must have size ", IntArrayRef(expected),
              ", (width - 1) * dilation positions, but has ", states->sizes());
  TORCH_CHECK(states->scalar_type() == input.scalar_type(), name, " has dtype ", states->scalar_type(),
              ", but input has dtype ", input.scalar_type());
  TORCH_CHECK(states->device() == input.device(), name, " is on device ", states->device(), ", but input is on device ",
              input.device());
  check_storage(name, *states);
}

void check_whole_numbers(const std::optional<Tensor>& t, const char* name, IntArrayRef size, const Tensor& input) {
  if (!given(t)) return;
  TORCH_CHECK(at::isIntegralType(t->scalar_type(), /*includeBool=*/false), name, " must be of whole numbers, but is ",
              t->scalar_type());
  TORCH_CHECK(t->sizes() == size, name, " must have size ", size, ", but has ", t->sizes());
  TORCH_CHECK(t->device() == input.device(), name, " is on device ", t->device(), ", but input is on device ",
              input.device());
  check_storage(name, *t);
}

void check_seq_idx(const std::optional<Tensor>& seq_idx, const Tensor& input) {
  check_whole_numbers(seq_idx, "seq_idx", std::array<int64_t, 2>{input.size(0), input.size(2)}, input);
}

CausalShape shape_of(const Tensor& sequence, int64_t width, int64_t dilation, const std::optional<Tensor>& states) {
  CausalShape shape;
  shape.N = sequence.size(0), shape.C = sequence.size(1), shape.L = sequence.size(2);
  shape.S = width, shape.dilation = dilation;
  if (given(states)) shape.states = strides_of(*states);
  return shape;
}

SequenceStrides strides_of(const Result& result) { return {result.stride[0], result.stride[1], result.stride[2]}; }

}  // namespace

CheckedCausal check(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& initial_states, const std::optional<Tensor>& seq_idx,
                    int64_t dilation) {
  check_dilation(dilation);
  check_ranks("input", input, weight);
  const CausalArgs args(weight.size(1), dilation);
  const Checked checked = check_forward(input, weight.unsqueeze(1), bias, args.of(input.size(1)));
  check_states(initial_states, "initial_states", input, args.padding[0]);
  check_seq_idx(seq_idx, input);
  CausalShape shape = shape_of(input, weight.size(1), dilation, initial_states);
  if (!given(initial_states)) shape.forget_states();
  shape.x = strides_of(input), shape.y = strides_of(checked.result);
  shape.w_c = weight.stride(0), shape.w_s = weight.stride(1);
  return {shape, checked.result};
}

CheckedCausal check_grad_input(const Tensor& grad_output, const Tensor& weight, const std::optional<Tensor>& seq_idx,
                               IntArrayRef input_stride, int64_t dilation) {
  check_dilation(dilation);
  check_ranks("grad_output", grad_output, weight);
  const CausalArgs args(weight.size(1), dilation);
  const Checked checked = sepconv::check_grad_input(grad_output, weight.unsqueeze(1), grad_output.sizes(), input_stride,
                                                    args.of(grad_output.size(1)));
  check_seq_idx(seq_idx, grad_output);
  CausalShape shape = shape_of(grad_output, weight.size(1), dilation, std::nullopt);
  shape.x = strides_of(checked.result), shape.y = strides_of(grad_output);
  shape.w_c = weight.stride(0), shape.w_s = weight.stride(1);
  return {shape, checked.result};
}

CheckedCausal check_grad_weight(const Tensor& grad_output, const Tensor& input,
                                const std::optional<Tensor>& initial_states, const std::optional<Tensor>& seq_idx,
                                int64_t width, int64_t dilation) {
  check_dilation(dilation);
  TORCH_CHECK(input.dim() == 3, "input must be [N, C, L], but has size ", input.sizes());
  TORCH_CHECK(width >= 1, "width must be at least 1, but is ", width);
  const CausalArgs args(width, dilation);
  const int64_t C = input.size(1);
  const Checked checked = sepconv::check_grad_weight(grad_output, input, std::array<int64_t, 3>{C, 1, width},
                                                     std::array<int64_t, 3>{width, width, 1}, args.of(C));
  check_states(initial_states, "initial_states", input, args.padding[0]);
  check_seq_idx(seq_idx, input);
  CausalShape shape = shape_of(input, width, dilation, initial_states);
  if (!given(initial_states)) shape.forget_states();
  shape.x = strides_of(input), shape.y = strides_of(grad_output);
  shape.w_c = width, shape.w_s = 1;
  return {shape, checked.result};
}

CausalUpdateShape check_update(const Tensor& x, const Tensor& state, const Tensor& weight,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& cache_seqlens,
                               const std::optional<Tensor>& state_indices, int64_t dilation) {
  check_dilation(dilation);
  check_ranks("x", x, weight);
  TORCH_CHECK(has_kernel_dtype(x), "x must be float32, float64, float16 or bfloat16, but is ", x.scalar_type());
  const int64_t N = x.size(0), C = x.size(1), reach = (weight.size(1) - 1) * dilation;
  TORCH_CHECK(state.dim() == 3 && state.size(1) == C && (given(state_indices) || state.size(0) == N), "state must be [",
              given(state_indices) ? "states" : std::to_string(N), ", ", C, ", length], but has size ", state.sizes());
  TORCH_CHECK(state.size(2) >= std::max<int64_t>(reach, given(cache_seqlens) ? 1 : 0),
              "state must have at least (width - 1) * dilation = ", reach, " positions, but has ", state.size(2));
  TORCH_CHECK(state.scalar_type() == x.scalar_type(), "state has dtype ", state.scalar_type(), ", but x has dtype ",
              x.scalar_type());
  const bool wide = weight.scalar_type() == at::kFloat && x.scalar_type() != at::kDouble;
  TORCH_CHECK(wide || weight.scalar_type() == x.scalar_type(), "weight has dtype ", weight.scalar_type(),
              ", but x has dtype ", x.scalar_type());
  if (given(bias)) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == C, "bias must have size [", C, "], but has ", bias->sizes());
    TORCH_CHECK(bias->scalar_type() == weight.scalar_type(), "bias has dtype ", bias->scalar_type(),
                ", but weight has dtype ", weight.scalar_type());
  }
  const Tensor& add = given(bias) ? *bias : x;
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor*>{"state", &state}, {"weight", &weight}, {"bias", &add}}) {
    TORCH_CHECK(t->device() == x.device(), name, " is on device ", t->device(), ", but x is on device ", x.device());
    check_storage(name, *t);
  }
  check_storage("x", x);
  check_whole_numbers(cache_seqlens, "cache_seqlens", {N}, x);
  check_whole_numbers(state_indices, "state_indices", {N}, x);
  CausalUpdateShape shape;
  shape.N = N, shape.C = C, shape.T = x.size(2), shape.S = weight.size(1), shape.dilation = dilation;
  shape.length = state.size(2), shape.states = state.size(0);
  shape.x = strides_of(x), shape.state = strides_of(state);
  shape.w_c = weight.stride(0), shape.w_s = weight.stride(1);
  shape.float_weight = wide;
  return shape;
}

void check_rows(const int64_t* rows, int64_t count, int64_t states) {
  for (int64_t n = 0; n < count; ++n) {
    TORCH_CHECK_INDEX(rows[n] < states, "state_indices must be below the ", states, " states, but has ", rows[n],
                      " at ", n);
  }
}

}  // namespace sepconv::causal
