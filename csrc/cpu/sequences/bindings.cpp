// The causal ops on the CPU (ops/causal.h).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/sequences/causal.h"
#include "cpu/simd/huge_pages.h"
#include "ops/causal.h"
#include "ops/runtime.h"

namespace sepconv::cpu {
namespace {

using at::Tensor;
using ops::Bias;

constexpr char kKernel[] = "cpu_causal", kUpdate[] = "cpu_causal_update";

// Without numbers each sequence of the batch is one run.
Packing packing_of(const CausalShape& s, const std::optional<Tensor>& seq_idx) {
  Packing packing;
  packing.first.reserve(s.N + 1);
  Tensor numbers;
  if (causal::given(seq_idx)) numbers = seq_idx->to(at::kLong).contiguous();
  for (int64_t n = 0; n < s.N; ++n) {
    packing.first.push_back(static_cast<int64_t>(packing.runs.size()));
    if (!numbers.defined()) {
      packing.runs.push_back({0, s.L, false});
      continue;
    }
    const int64_t* const own = numbers.const_data_ptr<int64_t>() + n * s.L;
    for (int64_t begin = 0, q = 1; q <= s.L; ++q) {
      if (q < s.L && own[q] == own[q - 1]) continue;
      packing.runs.push_back({begin, q, own[begin] < 0});
      begin = q;
    }
  }
  packing.first.push_back(static_cast<int64_t>(packing.runs.size()));
  return packing;
}

// A sequence beside one whose channels are dense lies the same way, or is copied so: else vectors would hold positions.
Tensor beside(const Tensor& t, const Tensor& other, SequenceStrides& strides) {
  const bool channels = other.size(1) > 1 && other.stride(1) == 1;
  if (!channels || t.stride(1) == 1 || t.size(1) != other.size(1)) return t;
  const Tensor copy = t.transpose(1, 2).contiguous().transpose(1, 2);
  strides = {copy.stride(0), copy.stride(1), copy.stride(2)};
  return copy;
}

const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
Tensor dense(const std::optional<Tensor>& t) { return causal::given(t) ? t->contiguous() : Tensor(); }

Tensor forward(const Tensor& input, const Tensor& weight, Bias bias, Bias states, Bias seq_idx, int64_t dilation,
               std::string_view activation) {
  if (!has_kernel_dtype(input) || (!causal::given(states) && !causal::given(seq_idx))) {
    return causal::composite(input, weight, bias, states, seq_idx, dilation, activation);
  }
  auto [shape, result] = causal::check(input, weight, bias, states, seq_idx, dilation);
  const Epilogue epilogue{nullptr, parse_activation(activation)};
  const Tensor output = result.empty(input), dense_bias = dense(bias);
  advise_huge_pages(output.mutable_data_ptr(), output.nbytes());
  Tensor before = causal::given(states) ? *states : Tensor();
  if (before.defined()) before = beside(before, input, shape.states);
  count_kernel(kKernel);
  causal_forward(shape, packing_of(shape, seq_idx), dtype_of(input), input.const_data_ptr(), data(before),
                 weight.const_data_ptr(), {data(dense_bias), epilogue.activation}, output.mutable_data_ptr());
  return output;
}

std::tuple<Tensor, Tensor> grad_input(const Tensor& grad_output, const Tensor& weight, Bias seq_idx,
                                      at::IntArrayRef input_stride, int64_t dilation, bool states) {
  auto [shape, result] = causal::check_grad_input(grad_output, weight, seq_idx, input_stride, dilation);
  if (!states) shape.forget_states();
  const Tensor by_input = result.empty(grad_output);
  advise_huge_pages(by_input.mutable_data_ptr(), by_input.nbytes());
  const Tensor g = beside(grad_output, by_input, shape.y);
  Tensor by_states = at::empty({0}, grad_output.options()), written;
  if (states) {
    // Zero where the first run is padding.
    by_states = at::zeros({shape.N, shape.C, shape.reach()}, grad_output.options());
    written = beside(by_states, by_input, shape.states);
    if (written.is_same(by_states)) shape.states = {by_states.stride(0), by_states.stride(1), by_states.stride(2)};
  }
  count_kernel(kKernel);
  causal_grad_input(shape, packing_of(shape, seq_idx), dtype_of(g), g.const_data_ptr(), weight.const_data_ptr(),
                    by_input.mutable_data_ptr(), written.defined() ? written.mutable_data_ptr() : nullptr);
  if (states && !written.is_same(by_states)) by_states.copy_(written);
  return {by_input, by_states};
}

Tensor grad_weight(const Tensor& grad_output, const Tensor& input, Bias states, Bias seq_idx, int64_t width,
                   int64_t dilation) {
  CausalShape shape = causal::check_grad_weight(grad_output, input, states, seq_idx, width, dilation).shape;
  const Tensor result = at::empty({shape.C, shape.S}, input.options());
  const Tensor g = beside(grad_output, input, shape.y);
  Tensor before = causal::given(states) ? *states : Tensor();
  if (before.defined()) before = beside(before, input, shape.states);
  count_kernel(kKernel);
  causal_grad_weight(shape, packing_of(shape, seq_idx), dtype_of(input), g.const_data_ptr(), input.const_data_ptr(),
                     data(before), result.mutable_data_ptr());
  return result;
}

Tensor update(const Tensor& x, Tensor& state, const Tensor& weight, Bias bias, Bias cache_seqlens, Bias state_indices,
              int64_t dilation, std::string_view activation) {
  CausalUpdateShape shape = causal::check_update(x, state, weight, bias, cache_seqlens, state_indices, dilation);
  const Activation name = parse_activation(activation);
  const auto numbers = [](const std::optional<Tensor>& t) {
    return causal::given(t) ? t->to(at::kLong).contiguous() : Tensor();
  };
  const Tensor lengths = numbers(cache_seqlens), rows = numbers(state_indices), dense_bias = dense(bias);
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<int64_t>() : nullptr; };
  if (rows.defined()) causal::check_rows(pointer(rows), shape.N, state.size(0));
  const Tensor output = at::empty(x.sizes(), x.options());
  shape.y = {output.stride(0), output.stride(1), output.stride(2)};
  count_kernel(kUpdate);
  causal_update(shape, dtype_of(x), x.const_data_ptr(), weight.const_data_ptr(), {data(dense_bias), name},
                pointer(lengths), pointer(rows), state.mutable_data_ptr(), output.mutable_data_ptr());
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, CPU, m) {
  m.impl("causal_conv1d", forward);
  m.impl("causal_conv1d_grad_input", grad_input);
  m.impl("causal_conv1d_grad_weight", grad_weight);
  m.impl("causal_conv1d_update", update);
}

}  // namespace sepconv::cpu
