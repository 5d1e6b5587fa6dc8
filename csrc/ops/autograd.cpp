// The derivative formulas of the op table, and nothing else.
//
// The three maps are bilinear and closed under differentiation:
//
//   map                    derivative by its first argument     by its second
//   y  = C(x, w)           gx = Cx(gy, w)                        gw = Cw(gy, x)
//   gx = Cx(g, w)          d -> C(d, w)      for g               d -> Cw(g, d)     for w
//   gw = Cw(g, x)          d -> C(x, d)      for g               d -> Cx(g, d)     for x
//
// This holds in every padding mode: the padded input depends on the input linearly. Each formula calls the ops
// themselves, so derivatives of every order follow.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "core/activation.h"
#include "ops/aten_route.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/runtime.h"

namespace sepconv {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

SavedGeometry SavedGeometry::load(AutogradContext* ctx, const std::string& name) {
  return {ctx->saved_data[name + "_size"].toSymIntVector(), ctx->saved_data[name + "_stride"].toSymIntVector()};
}

void SavedGeometry::store(AutogradContext* ctx, const std::string& name, SymIntArrayRef size, SymIntArrayRef stride) {
  ctx->saved_data[name + "_size"] = size, ctx->saved_data[name + "_stride"] = stride;
}

void SavedGeometry::store(AutogradContext* ctx, const std::string& name, const Tensor& t) {
  store(ctx, name, t.sym_sizes(), t.sym_strides());
}

const Tensor& tensor_or_none(const std::optional<Tensor>& t) {
  static const Tensor none;
  return t ? *t : none;
}

// torch's own has no derivative: where one may be wanted, the formula.
static Tensor differentiable_silu_backward(const Tensor& grad, const Tensor& input) {
  if (!at::GradMode::is_enabled()) return at::silu_backward(grad, input);
  const Tensor s = at::sigmoid(input);
  return grad * s * (1 + input * (1 - s));
}

Tensor activation_backward(const Tensor& grad, const Tensor& output_or_input, Activation activation) {
  switch (activation) {
    case Activation::identity: return grad;
    case Activation::relu: return at::threshold_backward(grad, output_or_input, 0);
    case Activation::relu6: return at::hardtanh_backward(grad, output_or_input, 0, 6);
    case Activation::leaky_relu:
      return at::leaky_relu_backward(grad, output_or_input, kLeakySlope, /*self_is_result=*/true);
    case Activation::sigmoid: return at::sigmoid_backward(grad, output_or_input);
    case Activation::tanh: return at::tanh_backward(grad, output_or_input);
    case Activation::gelu: return at::gelu_backward(grad, output_or_input);
    case Activation::silu: return differentiable_silu_backward(grad, output_or_input);
    case Activation::hardswish: return at::hardswish_backward(grad, output_or_input);
  }
  return grad;
}

Tensor sum_to_channels(const Tensor& grad, size_t dims) {
  c10::SmallVector<int64_t, 3> summed;
  if (grad.dim() == static_cast<int64_t>(dims) + 2) summed.push_back(0);
  for (size_t dim = 0; dim < dims; ++dim) summed.push_back(-1 - static_cast<int64_t>(dim));
  return grad.sum(summed);
}

const char* needs_aten(size_t dims, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (!t->defined()) continue;
    if (t->_fw_grad(/*level=*/0).defined()) return "forward-mode differentiation";
    if (!has_kernel_dtype(*t)) return "no kernel for this dtype";
    const auto type = t->device().type();
    if (type != at::kCPU && type != at::kCUDA && type != at::kMeta) return "no kernel for this device";
    if (t->layout() != at::kStrided) return "no kernel for this tensor layout";
  }
  return no_kernel_for(**tensors.begin(), dims);
}

bool differentiates(std::initializer_list<const Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor* t : tensors) {
    if (t->defined() && t->requires_grad()) return true;
  }
  return false;
}

std::tuple<Tensor, Tensor> gradients(bool by_input, bool by_weight, const Tensor& grad_output,
                                     const SavedOperand& input, const SavedOperand& weight, const ops::Args& args) {
  if (by_input && by_weight && !at::GradMode::is_enabled()) {
    return ops::conv2d_both_grads(grad_output, input.tensor, weight.tensor, args.stride, args.padding, args.dilation,
                                  args.groups, args.padding_mode);
  }
  const auto &x = input.geometry, &w = weight.geometry;
  Tensor grad_input, grad_weight;
  if (by_input) grad_input = ops::Cx(grad_output, weight.tensor, x.size, x.stride, args);
  if (by_weight) grad_weight = ops::Cw(grad_output, input.tensor, w.size, w.stride, args);
  return {grad_input, grad_weight};
}

namespace {

// The arguments that are not tensors, as autograd keeps them from forward to backward.
struct SavedArgs {
  std::vector<SymInt> stride, padding, dilation;
  SymInt groups;
  const char* padding_mode;

  static SavedArgs load(AutogradContext* ctx) {
    auto& data = ctx->saved_data;
    return {data["stride"].toSymIntVector(), data["padding"].toSymIntVector(), data["dilation"].toSymIntVector(),
            data["groups"].toSymInt(), name_of(static_cast<PaddingMode>(data["padding_mode"].toInt()))};
  }
  static void store(AutogradContext* ctx, const ops::Args& args) {
    auto& data = ctx->saved_data;
    data["stride"] = args.stride, data["padding"] = args.padding, data["dilation"] = args.dilation;
    data["groups"] = args.groups;
    data["padding_mode"] = static_cast<int64_t>(parse_padding_mode(args.padding_mode));
  }

  operator ops::Args() const { return {stride, padding, dilation, groups, padding_mode}; }
};

struct Conv2d : torch::autograd::Function<Conv2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, const ops::Args& args, Activation activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor output = ops::C(input, weight, args, bias, name_of(activation));
    SavedArgs::store(ctx, args);
    SavedGeometry::store(ctx, "input", input);
    SavedGeometry::store(ctx, "weight", weight);
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    ctx->saved_data["bias"] = bias.has_value();
    // torch pads by a copy, which may be saved where an inference tensor may not.
    const bool padded = parse_padding_mode(args.padding_mode) != PaddingMode::zeros;
    const bool copied = padded && weight.requires_grad() && input.is_inference();
    ctx->save_for_backward({copied ? input.clone() : saved_if(weight.requires_grad(), input),
                            saved_if(input.requires_grad(), weight),
                            saved_if(activation != Activation::identity, output)});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &output = saved[2];
    const SavedArgs args = SavedArgs::load(ctx);
    const bool has_bias = ctx->saved_data["bias"].toBool();
    const auto activation = static_cast<Activation>(ctx->saved_data["activation"].toInt());
    const Tensor grad = activation_backward(grads[0], output, activation);

    variable_list result(5);
    std::tie(result[0], result[1]) =
        gradients(ctx->needs_input_grad(0), ctx->needs_input_grad(1), grad, {input, SavedGeometry::load(ctx, "input")},
                  {weight, SavedGeometry::load(ctx, "weight")}, args);
    if (has_bias && ctx->needs_input_grad(2)) result[2] = sum_to_channels(grad, args.stride.size());
    return result;
  }
};

// Cx(g, w) or Cw(g, x): `other` is w or x.
template <Map map>
struct Gradient : torch::autograd::Function<Gradient<map>> {
  static constexpr bool kByInput = map == Map::grad_input;

  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& other, SymIntArrayRef size,
                        SymIntArrayRef stride, const ops::Args& args) {
    at::AutoDispatchBelowADInplaceOrView guard;
    SavedArgs::store(ctx, args);
    SavedGeometry::store(ctx, "other", other);
    ctx->save_for_backward(
        {saved_if(other.requires_grad(), grad_output), saved_if(grad_output.requires_grad(), other)});
    return compute(grad_output, other, size, stride, args);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &d = grads[0], &grad_output = saved[0], &other = saved[1];
    const SavedArgs args = SavedArgs::load(ctx);
    variable_list result(5);
    if (ctx->needs_input_grad(0)) result[0] = kByInput ? ops::C(d, other, args) : ops::C(other, d, args);
    if (ctx->needs_input_grad(1)) {
      const SavedGeometry geometry = SavedGeometry::load(ctx, "other");
      result[1] = kByInput ? ops::Cw(grad_output, d, geometry.size, geometry.stride, args)
                           : ops::Cx(grad_output, d, geometry.size, geometry.stride, args);
    }
    return result;
  }

  static Tensor compute(const Tensor& grad_output, const Tensor& other, SymIntArrayRef size, SymIntArrayRef stride,
                        const ops::Args& args) {
    return kByInput ? ops::Cx(grad_output, other, size, stride, args) : ops::Cw(grad_output, other, size, stride, args);
  }
};

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, SymIntArrayRef stride,
              SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups, std::string_view activation_name,
              std::string_view padding_mode) {
  const Activation activation = parse_activation(activation_name);
  const ops::Args args{stride, padding, dilation, std::move(groups), padding_mode};
  const auto tensors = {&input, &weight, &tensor_or_none(bias)};
  if (const char* reason = needs_aten(stride.size(), tensors)) {
    count_aten(reason);
    return aten::conv2d(input, weight, bias, stride, padding, dilation, args.groups, activation_name, padding_mode);
  }
  if (!differentiates(tensors)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::C(input, weight, args, bias, activation_name);
  }
  // Else the derivative needs the value before the activation, which has to be written for it: nothing to fuse.
  if (derivative_from_output(activation)) return Conv2d::apply(input, weight, bias, args, activation);
  return aten::activate(Conv2d::apply(input, weight, bias, args, Activation::identity), activation);
}

template <Map map, SignatureOf<ops::conv2d_grad_input>* by_aten>
Tensor gradient(const Tensor& grad_output, const Tensor& other, SymIntArrayRef size, SymIntArrayRef size_stride,
                SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                std::string_view padding_mode) {
  const ops::Args args{stride, padding, dilation, std::move(groups), padding_mode};
  if (const char* reason = needs_aten(stride.size(), {&grad_output, &other})) {
    count_aten(reason);
    return by_aten(grad_output, other, size, size_stride, stride, padding, dilation, args.groups, padding_mode);
  }
  if (!differentiates({&grad_output, &other})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return Gradient<map>::compute(grad_output, other, size, size_stride, args);
  }
  return Gradient<map>::apply(grad_output, other, size, size_stride, args);
}

// Two calls, of which each goes its own way.
std::tuple<Tensor, Tensor> conv2d_both_grads_apart(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, SymInt groups,
                                                   std::string_view padding_mode) {
  const ops::Args args{stride, padding, dilation, std::move(groups), padding_mode};
  const Tensor grad_input = ops::Cx(grad_output, weight, input.sym_sizes(), input.sym_strides(), args);
  return {grad_input, ops::Cw(grad_output, input, weight.sym_sizes(), weight.sym_strides(), args)};
}

std::tuple<Tensor, Tensor> conv2d_both_grads(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                             SymInt groups, std::string_view padding_mode) {
  const auto tensors = {&grad_output, &input, &weight};
  if (needs_aten(stride.size(), tensors) != nullptr || differentiates(tensors)) {
    return conv2d_both_grads_apart(grad_output, input, weight, stride, padding, dilation, std::move(groups),
                                   padding_mode);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::conv2d_both_grads(grad_output, input, weight, stride, padding, dilation, std::move(groups), padding_mode);
}

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, CompositeImplicitAutograd, m) { m.impl("conv2d_both_grads", conv2d_both_grads_apart); }

TORCH_LIBRARY_IMPL(sepconv_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("conv2d_both_grads", conv2d_both_grads_apart);
}

TORCH_LIBRARY_IMPL(sepconv_ext, Autograd, m) {
  m.impl("conv2d", conv2d);
  m.impl("conv2d_both_grads", conv2d_both_grads);
  m.impl("conv2d_grad_input", gradient<Map::grad_input, aten::conv2d_grad_input>);
  m.impl("conv2d_grad_weight", gradient<Map::grad_weight, aten::conv2d_grad_weight>);
}

}  // namespace sepconv
