// The causal ops on CUDA (ops/causal.h): forward and decoding. The gradients are compositions (ops/causal.cpp).
//
// As in cuda/bindings.cpp nothing synchronises: a CUDA graph captures every call. So a number that names no state
// cannot raise here, and makes its outputs NaN (causal_update.cu).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/plan.h"
#include "cuda/runtime.h"
#include "cuda/sequences/cut.h"
#include "ops/causal.h"
#include "ops/runtime.h"

namespace sepconv::cuda {
namespace {

using at::Tensor;
using ops::Bias;

constexpr char kUpdate[] = "cuda_causal_update";

// As they lie where they have 32 or 64 bits; `kept` holds a copy of others.
WholeNumbers numbers_of(const std::optional<Tensor>& t, Tensor& kept) {
  if (!causal::given(t)) return {};
  kept = t->scalar_type() == at::kInt ? *t : t->to(at::kLong);
  return {kept.const_data_ptr(), kept.scalar_type() == at::kLong, kept.stride(0), kept.dim() > 1 ? kept.stride(1) : 0};
}

const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
Tensor dense(const std::optional<Tensor>& t) { return causal::given(t) ? t->contiguous() : Tensor(); }

Tensor forward(const Tensor& input, const Tensor& weight, Bias bias, Bias states, Bias seq_idx, int64_t dilation,
               std::string_view activation) {
  if (!has_kernel_dtype(input) || (!causal::given(states) && !causal::given(seq_idx))) {
    return causal::composite(input, weight, bias, states, seq_idx, dilation, activation);
  }
  auto [shape, result] = causal::check(input, weight, bias, states, seq_idx, dilation);
  const Activation name = parse_activation(activation);
  const c10::cuda::CUDAGuard guard(input.device());
  if (input.numel() == 0) return result.empty(input);
  const Plan plan =
      plan_causal(shape, dtype_of(input), device_facts(input.get_device()), common_alignment({input.const_data_ptr()}));
  if (plan.is_composite()) {
    return causal::elsewhere(input, weight, bias, states, seq_idx, dilation, activation);
  }
  const Tensor output = result.empty(input), dense_bias = dense(bias);
  Tensor numbers;
  const CausalMemory memory{input.const_data_ptr(),       causal::given(states) ? states->const_data_ptr() : nullptr,
                            weight.const_data_ptr(),      {data(dense_bias), name},
                            numbers_of(seq_idx, numbers), output.mutable_data_ptr()};
  count_kernel(plan.name);
  raise_if(run_causal(plan, shape, dtype_of(input), memory, c10::cuda::getCurrentCUDAStream()), plan.name);
  return output;
}

Tensor update(const Tensor& x, Tensor& state, const Tensor& weight, Bias bias, Bias cache_seqlens, Bias state_indices,
              int64_t dilation, std::string_view activation) {
  CausalUpdateShape shape = causal::check_update(x, state, weight, bias, cache_seqlens, state_indices, dilation);
  const Activation name = parse_activation(activation);
  const c10::cuda::CUDAGuard guard(x.device());
  const bool ring = causal::given(cache_seqlens);
  if (!device_facts(x.get_device()).has_code || !causal_update_cut(shape, ring).runs) {
    return causal::update_elsewhere(x, state, weight, bias, cache_seqlens, state_indices, dilation, activation);
  }
  const Tensor output = at::empty(x.sizes(), x.options());
  if (output.numel() == 0) return output;
  shape.y = {output.stride(0), output.stride(1), output.stride(2)};
  const Tensor dense_bias = dense(bias);
  Tensor lengths, rows;
  const CausalUpdateMemory memory{x.const_data_ptr(),
                                  weight.const_data_ptr(),
                                  {data(dense_bias), name},
                                  numbers_of(cache_seqlens, lengths),
                                  numbers_of(state_indices, rows),
                                  state.mutable_data_ptr(),
                                  output.mutable_data_ptr()};
  count_kernel(kUpdate);
  raise_if(launch_causal_update(shape, dtype_of(x), memory, c10::cuda::getCurrentCUDAStream()), kUpdate);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, CUDA, m) {
  m.impl("causal_conv1d", forward);
  m.impl("causal_conv1d_update", update);
}

}  // namespace sepconv::cuda
