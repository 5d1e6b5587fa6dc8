// The causal ops: schemas, derivatives, and the same made of other ops.
//
// With z the input behind its states, y = A(z, w), and its gradients (gx, gs) = At(g, w) and gw = B(g, z) are bilinear
// and closed under differentiation, as conv2d's three maps are (autograd.cpp).
#include "ops/causal.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/remainder.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "core/activation.h"
#include "ops/aten_route.h"
#include "ops/autograd.h"
#include "ops/runtime.h"

TORCH_LIBRARY_FRAGMENT(sepconv_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};
  m.def(
      "causal_conv1d(Tensor input, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx, "
      "SymInt dilation, str activation) -> Tensor",
      tags);
  m.def(
      "causal_conv1d_grad_input(Tensor grad_output, Tensor weight, Tensor? seq_idx, SymInt[] input_stride, "
      "SymInt dilation, bool states) -> (Tensor, Tensor)",
      tags);
  m.def(
      "causal_conv1d_grad_weight(Tensor grad_output, Tensor input, Tensor? initial_states, Tensor? seq_idx, "
      "SymInt width, SymInt dilation) -> Tensor",
      tags);
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? cache_seqlens, "
      "Tensor? state_indices, SymInt dilation, str activation) -> Tensor",
      tags);
}

namespace sepconv {
namespace causal {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using ops::Bias;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

SymInt reach_of(const SymInt& width, const SymInt& dilation) { return (width - 1) * dilation; }

// The input behind its states, which are zero where there are none.
Tensor joined(const Tensor& input, const std::optional<Tensor>& states, const SymInt& reach) {
  if (given(states)) return at::cat({*states, input}, 2);
  return at::constant_pad_nd_symint(input, std::array<SymInt, 2>{reach, 0}, 0);
}

// The stride of 1 and the padding of a convolution of the joined sequence, or of the input alone.
struct Row {
  std::array<SymInt, 1> one{1}, step;
  std::array<SymInt, 2> padding;
  SymInt channels;

  Row(const SymInt& dilation, SymInt left, SymInt groups)
      : step{dilation}, padding{std::move(left), 0}, channels(std::move(groups)) {}
  operator ops::Args() const { return {one, padding, step, channels}; }
};

// Which taps stay in the run of their output: [N, 1, L] for each.
class Runs {
 public:
  Runs(const Tensor& seq_idx, const SymInt& reach, SymInt dilation)
      : length_(seq_idx.sym_size(1)), dilation_(std::move(dilation)) {
    const Tensor changed = seq_idx.narrow_symint(1, 1, length_ - 1).ne(seq_idx.narrow_symint(1, 0, length_ - 1));
    number_ = at::constant_pad_nd(changed.to(at::kLong).cumsum(1), {1, 0}, 0);
    before_ = at::constant_pad_nd_symint(number_, std::array<SymInt, 2>{reach, 0}, 0);  // states: of the first run
    valid_ = seq_idx.ge(0);
  }
  Tensor tap(int64_t s) const {
    return before_.narrow_symint(1, s * dilation_, length_).eq(number_).logical_and(valid_).unsqueeze(1);
  }
  Tensor valid() const { return valid_.unsqueeze(1); }
  Tensor window(const Tensor& z, int64_t s) const { return z.narrow_symint(2, s * dilation_, length_); }

 private:
  SymInt length_, dilation_;
  Tensor number_, before_, valid_;
};

Tensor only(const Tensor& where, const Tensor& t) { return at::where(where, t, at::zeros({}, t.options())); }

// Half types are summed in float32.
Tensor wide(const Tensor& t) { return t.element_size() == 2 && t.is_floating_point() ? t.to(at::kFloat) : t; }

// A result that only `stride` says how to lay out.
Tensor laid_out(const Tensor& t, const Result& result) {
  if (const Tensor same = result.with_strides(t); same.defined()) return same;
  return result.empty(t).copy_(t);
}

}  // namespace

Tensor composite(const Tensor& input, const Tensor& weight, Bias bias, Bias states, Bias seq_idx, SymInt dilation,
                 std::string_view activation) {
  const SymInt width = weight.sym_size(1), reach = reach_of(width, dilation);
  if (!given(seq_idx)) {
    const Row row(dilation, given(states) ? SymInt(0) : reach, weight.sym_size(0));
    const Tensor z = given(states) ? at::cat({*states, input}, 2) : input;
    return ops::C(z, weight.unsqueeze(1), row, bias, activation);
  }
  const Runs runs(*seq_idx, reach, dilation);
  const Tensor z = wide(joined(input, states, reach)), w = wide(weight);
  Tensor y = at::zeros_like(wide(input));
  for (int64_t s = 0; s < width; ++s) y = y + only(runs.tap(s), runs.window(z, s)) * w.select(1, s).unsqueeze(1);
  if (given(bias)) y = y + wide(*bias).unsqueeze(1);
  return only(runs.valid(), aten::activate(y, parse_activation(activation))).to(input.scalar_type());
}

std::tuple<Tensor, Tensor> composite_grad_input(const Tensor& g, const Tensor& weight, Bias seq_idx,
                                                SymIntArrayRef /*input_stride*/, SymInt dilation, bool states) {
  const SymInt N = g.sym_size(0), C = g.sym_size(1), L = g.sym_size(2), width = weight.sym_size(1),
               reach = reach_of(width, dilation), all = reach + L;
  Tensor gz;
  if (given(seq_idx)) {
    const Runs runs(*seq_idx, reach, dilation);
    const Tensor wide_g = wide(g), w = wide(weight);
    gz = at::constant_pad_nd_symint(at::zeros_like(wide_g), std::array<SymInt, 2>{reach, 0}, 0);
    for (int64_t s = 0; s < width; ++s) {
      const Tensor part = only(runs.tap(s), wide_g) * w.select(1, s).unsqueeze(1);
      gz = gz + at::constant_pad_nd_symint(part, std::array<SymInt, 2>{s * dilation, reach - s * dilation}, 0);
    }
    gz = gz.to(g.scalar_type());
  } else {
    const std::array<SymInt, 3> size{N, C, all}, stride{C * all, all, 1};
    gz = ops::Cx(g, weight.unsqueeze(1), size, stride, Row(dilation, 0, C));
  }
  const Tensor none = at::empty({0}, g.options());
  return {gz.narrow_symint(2, reach, L), states ? gz.narrow_symint(2, 0, reach) : none};
}

Tensor composite_grad_weight(const Tensor& g, const Tensor& input, Bias states, Bias seq_idx, SymInt width,
                             SymInt dilation) {
  const SymInt reach = reach_of(width, dilation), C = input.sym_size(1);
  const Tensor z = joined(input, states, reach);
  if (!given(seq_idx)) {
    const std::array<SymInt, 3> size{C, 1, width}, stride{width, width, 1};
    return ops::Cw(g, z, size, stride, Row(dilation, 0, C)).squeeze(1);
  }
  const Runs runs(*seq_idx, reach, dilation);
  const Tensor wide_g = wide(g), wide_z = wide(z);
  std::vector<Tensor> taps;
  for (int64_t s = 0; s < width; ++s) {
    taps.push_back(only(runs.tap(s), wide_g * runs.window(wide_z, s)).sum({0, 2}));
  }
  return at::stack(taps, 1).to(g.scalar_type());
}

Tensor composite_update(const Tensor& x, Tensor& state, const Tensor& weight, Bias bias, Bias cache_seqlens,
                        Bias state_indices, SymInt dilation, std::string_view activation) {
  const SymInt reach = reach_of(weight.sym_size(1), dilation), length = state.sym_size(2), T = x.sym_size(2);
  const auto column = [](const Tensor& t) { return t.view_symint({t.sym_size(0), 1, 1}); };
  Tensor old = state, rows, skipped;
  if (given(state_indices)) {
    skipped = column(state_indices->lt(0)), rows = state_indices->clamp_min(0).to(at::kLong);
    old = state.index_select(0, rows);
  }
  Tensor seen, next;
  if (given(cache_seqlens)) {
    const Tensor start = column(cache_seqlens->to(at::kLong));
    const auto ring = [&](const SymInt& from, const SymInt& count) {
      const Tensor steps =
          at::arange(from.guard_int(__FILE__, __LINE__), (from + count).guard_int(__FILE__, __LINE__), start.options());
      return at::remainder(start + steps, length.guard_int(__FILE__, __LINE__)).expand_symint({-1, x.sym_size(1), -1});
    };
    seen = at::cat({old.gather(2, ring(-reach, reach)), x}, 2);
    const SymInt kept = T.min(length);  // of more tokens than places the last ones stay
    next = old.scatter(2, ring(T - kept, kept), x.narrow_symint(2, T - kept, kept));
  } else {
    const Tensor all = at::cat({old, x}, 2);
    seen = all.narrow_symint(2, length - reach, reach + T), next = all.narrow_symint(2, T, length).clone();
  }
  if (rows.defined()) {
    // What is skipped writes what another sequence writes; where all are, what stood there. Nothing waits for a GPU.
    const Tensor none = skipped.all(), other = skipped.view({-1}).logical_not().to(at::kLong).argmax();
    const Tensor writer = at::where(skipped.view({-1}), other, at::arange(skipped.size(0), rows.options()));
    state.index_copy_(0, rows.index_select(0, writer), at::where(none, old, next).index_select(0, writer));
  } else {
    state.copy_(next);
  }
  const Tensor y =
      ops::C(seen.to(weight.scalar_type()), weight.unsqueeze(1), Row(dilation, 0, weight.sym_size(0)), bias, activation)
          .to(x.scalar_type());
  return skipped.defined() ? only(skipped.logical_not(), y) : y;
}

namespace {

// The tensors of a call that may be missing are saved as undefined ones.
std::optional<Tensor> present(const Tensor& t) { return t.defined() ? std::make_optional(t) : std::nullopt; }

struct Causal : torch::autograd::Function<Causal> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, Bias bias, Bias states,
                        Bias seq_idx, const SymInt& dilation, Activation activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor output = ops::causal_conv1d(input, weight, bias, states, seq_idx, dilation, name_of(activation));
    SavedGeometry::store(ctx, "input", input);
    ctx->saved_data["width"] = weight.sym_size(1), ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    ctx->saved_data["bias"] = given(bias), ctx->saved_data["states"] = given(states);
    const bool by_weight = weight.requires_grad(), by_states = given(states) && states->requires_grad();
    ctx->save_for_backward({saved_if(by_weight, input), saved_if(input.requires_grad() || by_states, weight),
                            saved_if(by_weight, tensor_or_none(states)), tensor_or_none(seq_idx),
                            saved_if(activation != Activation::identity, output)});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<Tensor> states = present(saved[2]), seq_idx = present(saved[3]);
    const SymInt width = ctx->saved_data["width"].toSymInt(), dilation = ctx->saved_data["dilation"].toSymInt();
    const auto activation = static_cast<Activation>(ctx->saved_data["activation"].toInt());
    const Tensor grad = activation_backward(grads[0], saved[4], activation);
    variable_list result(7);
    // needs_input_grad() counts the tensors that are there.
    const bool has_bias = ctx->saved_data["bias"].toBool(), has_states = ctx->saved_data["states"].toBool();
    const bool by_states = has_states && ctx->needs_input_grad(has_bias ? 3 : 2);
    if (ctx->needs_input_grad(0) || by_states) {
      const SavedGeometry x = SavedGeometry::load(ctx, "input");
      const auto [by_input, by_state] =
          ops::causal_conv1d_grad_input(grad, saved[1], seq_idx, x.stride, dilation, by_states);
      result[0] = by_input;
      if (by_states) result[3] = by_state;
    }
    if (ctx->needs_input_grad(1)) {
      result[1] = ops::causal_conv1d_grad_weight(grad, saved[0], states, seq_idx, width, dilation);
    }
    if (has_bias && ctx->needs_input_grad(2)) {
      result[2] = sum_to_channels(seq_idx ? only(seq_idx->ge(0).unsqueeze(1), grad) : grad, 1);
    }
    return result;
  }
};

struct GradInput : torch::autograd::Function<GradInput> {
  static variable_list forward(AutogradContext* ctx, const Tensor& g, const Tensor& weight, Bias seq_idx,
                               SymIntArrayRef input_stride, const SymInt& dilation, bool states) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["width"] = weight.sym_size(1), ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["states"] = states;
    ctx->save_for_backward(
        {saved_if(weight.requires_grad(), g), saved_if(g.requires_grad(), weight), tensor_or_none(seq_idx)});
    const auto [by_input, by_states] =
        ops::causal_conv1d_grad_input(g, weight, seq_idx, input_stride, dilation, states);
    if (!states) ctx->mark_non_differentiable({by_states});
    return {by_input, by_states};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<Tensor> seq_idx = present(saved[2]);
    const std::optional<Tensor> states = ctx->saved_data["states"].toBool() ? present(grads[1]) : std::nullopt;
    const SymInt width = ctx->saved_data["width"].toSymInt(), dilation = ctx->saved_data["dilation"].toSymInt();
    variable_list result(6);
    if (ctx->needs_input_grad(0)) {
      result[0] = ops::causal_conv1d(grads[0], saved[1], std::nullopt, states, seq_idx, dilation, "identity");
    }
    if (ctx->needs_input_grad(1)) {
      result[1] = ops::causal_conv1d_grad_weight(saved[0], grads[0], states, seq_idx, width, dilation);
    }
    return result;
  }
};

struct GradWeight : torch::autograd::Function<GradWeight> {
  static Tensor forward(AutogradContext* ctx, const Tensor& g, const Tensor& input, Bias states, Bias seq_idx,
                        const SymInt& width, const SymInt& dilation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["dilation"] = dilation, ctx->saved_data["states"] = given(states);
    SavedGeometry::store(ctx, "input", input);
    const bool by_states = given(states) && states->requires_grad();
    ctx->save_for_backward({saved_if(input.requires_grad() || by_states, g), saved_if(g.requires_grad(), input),
                            saved_if(g.requires_grad(), tensor_or_none(states)), tensor_or_none(seq_idx)});
    return ops::causal_conv1d_grad_weight(g, input, states, seq_idx, width, dilation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& d = grads[0];
    const std::optional<Tensor> states = present(saved[2]), seq_idx = present(saved[3]);
    const SymInt dilation = ctx->saved_data["dilation"].toSymInt();
    variable_list result(6);
    if (ctx->needs_input_grad(0)) {
      result[0] = ops::causal_conv1d(saved[1], d, std::nullopt, states, seq_idx, dilation, "identity");
    }
    const bool by_states = ctx->saved_data["states"].toBool() && ctx->needs_input_grad(2);
    if (ctx->needs_input_grad(1) || by_states) {
      const SavedGeometry x = SavedGeometry::load(ctx, "input");
      const auto [by_input, by_state] =
          ops::causal_conv1d_grad_input(saved[0], d, seq_idx, x.stride, dilation, by_states);
      result[1] = by_input;
      if (by_states) result[2] = by_state;
    }
    return result;
  }
};

Tensor forward(const Tensor& input, const Tensor& weight, Bias bias, Bias states, Bias seq_idx, SymInt dilation,
               std::string_view activation_name) {
  const Activation activation = parse_activation(activation_name);
  if (!given(states) && !given(seq_idx)) {
    return composite(input, weight, bias, states, seq_idx, std::move(dilation), activation_name);
  }
  const auto tensors = {&input, &weight, &tensor_or_none(bias), &tensor_or_none(states)};
  if (const char* reason = needs_aten(1, tensors)) {
    count_aten(reason);
    return composite(input, weight, bias, states, seq_idx, std::move(dilation), activation_name);
  }
  if (!differentiates(tensors)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::causal_conv1d(input, weight, bias, states, seq_idx, std::move(dilation), activation_name);
  }
  if (derivative_from_output(activation)) {
    return Causal::apply(input, weight, bias, states, seq_idx, dilation, activation);
  }
  return aten::activate(Causal::apply(input, weight, bias, states, seq_idx, dilation, Activation::identity),
                        activation);
}

std::tuple<Tensor, Tensor> grad_input(const Tensor& g, const Tensor& weight, Bias seq_idx, SymIntArrayRef input_stride,
                                      SymInt dilation, bool states) {
  const auto tensors = {&g, &weight};
  if (const char* reason = needs_aten(1, tensors)) {
    count_aten(reason);
    return composite_grad_input(g, weight, seq_idx, input_stride, std::move(dilation), states);
  }
  if (!differentiates(tensors)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::causal_conv1d_grad_input(g, weight, seq_idx, input_stride, std::move(dilation), states);
  }
  const variable_list result = GradInput::apply(g, weight, seq_idx, input_stride, dilation, states);
  return {result[0], result[1]};
}

Tensor grad_weight(const Tensor& g, const Tensor& input, Bias states, Bias seq_idx, SymInt width, SymInt dilation) {
  const auto tensors = {&g, &input, &tensor_or_none(states)};
  if (const char* reason = needs_aten(1, tensors)) {
    count_aten(reason);
    return composite_grad_weight(g, input, states, seq_idx, std::move(width), std::move(dilation));
  }
  if (!differentiates(tensors)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::causal_conv1d_grad_weight(g, input, states, seq_idx, std::move(width), std::move(dilation));
  }
  return GradWeight::apply(g, input, states, seq_idx, width, dilation);
}

// A device without kernels for these: other ops, and the strides that the checks promise.
std::tuple<Tensor, Tensor> grad_input_elsewhere(const Tensor& g, const Tensor& weight, Bias seq_idx,
                                                SymIntArrayRef input_stride, SymInt dilation, bool states) {
  const Result result = check_grad_input(g, weight, seq_idx, C10_AS_INTARRAYREF_SLOW(input_stride),
                                         dilation.guard_int(__FILE__, __LINE__))
                            .result;
  const auto [by_input, by_states] =
      composite_grad_input(g, weight, seq_idx, input_stride, std::move(dilation), states);
  return {laid_out(by_input, result), by_states.contiguous()};
}

Tensor grad_weight_elsewhere(const Tensor& g, const Tensor& input, Bias states, Bias seq_idx, SymInt width,
                             SymInt dilation) {
  check_grad_weight(g, input, states, seq_idx, width.guard_int(__FILE__, __LINE__),
                    dilation.guard_int(__FILE__, __LINE__));
  return composite_grad_weight(g, input, states, seq_idx, std::move(width), std::move(dilation)).contiguous();
}

}  // namespace

Tensor elsewhere(const Tensor& input, const Tensor& weight, Bias bias, Bias states, Bias seq_idx, SymInt dilation,
                 std::string_view activation) {
  const Result result = check(input, weight, bias, states, seq_idx, dilation.guard_int(__FILE__, __LINE__)).result;
  return laid_out(composite(input, weight, bias, states, seq_idx, std::move(dilation), activation), result);
}

Tensor update_elsewhere(const Tensor& x, Tensor& state, const Tensor& weight, Bias bias, Bias cache_seqlens,
                        Bias state_indices, SymInt dilation, std::string_view activation) {
  check_update(x, state, weight, bias, cache_seqlens, state_indices, dilation.guard_int(__FILE__, __LINE__));
  return composite_update(x, state, weight, bias, cache_seqlens, state_indices, std::move(dilation), activation)
      .contiguous();
}

}  // namespace causal

TORCH_LIBRARY_IMPL(sepconv_ext, Autograd, m) {
  m.impl("causal_conv1d", causal::forward);
  m.impl("causal_conv1d_grad_input", causal::grad_input);
  m.impl("causal_conv1d_grad_weight", causal::grad_weight);
  // A derivative asked for is an error, not a result without one.
  m.impl("causal_conv1d_update", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(sepconv_ext, CompositeExplicitAutograd, m) {
  m.impl("causal_conv1d", causal::elsewhere);
  m.impl("causal_conv1d_grad_input", causal::grad_input_elsewhere);
  m.impl("causal_conv1d_grad_weight", causal::grad_weight_elsewhere);
  m.impl("causal_conv1d_update", causal::update_elsewhere);
}

}  // namespace sepconv
