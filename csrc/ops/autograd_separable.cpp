// The derivative formulas of the fourth op, y = act_p(wp * act_d(wd (x) x + bd) + bp), in terms of the three maps.
//
//   u = C(x, wd) + bd       h = act_d(u)       z = C(h, wp) + bp       y = act_p(z)
//
//   gz = act_p'(y or z) gy      gwp = Cw(gz, h)     gbp = sum gz       gh = Cx(gz, wp)
//   gu = act_d'(h or u) gh      gwd = Cw(gu, x)     gbd = sum gu       gx = Cx(gu, wd)
//
// The forward pass keeps its inputs, and its output where act_p' is read off it. The backward pass computes again what
// lies between the stages (h, or u where act_d' needs that), or finds it kept where save_intermediate asked for it;
// both have the same bits. For a derivative of the derivative, everything between is computed by differentiable calls.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>

#include "core/activation.h"
#include "ops/aten_route.h"
#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/runtime.h"
#include "ops/separable.h"

namespace sepconv {
namespace {

using at::Tensor;
using c10::SymInt;
using separable::Call;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SeparableConv2d : torch::autograd::Function<SeparableConv2d> {
  // The biases come last: needs_input_grad() counts the tensors that are there.
  // The tensors are arguments of their own because torch records those alone; `call` has them too.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& depthwise_weight,
                        const Tensor& pointwise_weight, ops::Bias depthwise_bias, ops::Bias pointwise_bias,
                        const Call& call, bool save_intermediate) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Activation depthwise_activation = call.depthwise_activation, pointwise_activation = call.pointwise_activation;
    const Tensor &bias_d = tensor_or_none(depthwise_bias), &bias_p = tensor_or_none(pointwise_bias);
    const auto wanted = [](const Tensor& t) { return t.defined() && t.requires_grad(); };
    const bool through_depthwise = wanted(input) || wanted(depthwise_weight) || wanted(bias_d);
    const bool needs_z = !derivative_from_output(pointwise_activation);
    const bool needs_h =
        wanted(pointwise_weight) || needs_z || (through_depthwise && depthwise_activation != Activation::identity);
    const bool keep = save_intermediate && needs_h;
    const auto [output, kept] = separable::training_by_dispatcher(call, /*output=*/true, /*intermediate=*/keep);

    auto& data = ctx->saved_data;
    data["stride"] = call.stride, data["padding"] = call.padding, data["dilation"] = call.dilation;
    data["depthwise_activation"] = static_cast<int64_t>(depthwise_activation);
    data["pointwise_activation"] = static_cast<int64_t>(pointwise_activation);
    data["bias_d"] = depthwise_bias.has_value(), data["bias_p"] = pointwise_bias.has_value();
    data["through_depthwise"] = through_depthwise, data["needs_h"] = needs_h;
    data["channels_last"] = output.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    SavedGeometry::store(ctx, "input", input);
    SavedGeometry::store(ctx, "depthwise_weight", depthwise_weight);
    SavedGeometry::store(ctx, "pointwise_weight", pointwise_weight);
    ctx->save_for_backward(
        {saved_if(needs_h || wanted(depthwise_weight), input), saved_if(needs_h || wanted(input), depthwise_weight),
         saved_if(needs_h, bias_d), saved_if(needs_h || through_depthwise, pointwise_weight), saved_if(needs_z, bias_p),
         saved_if(!needs_z && pointwise_activation != Activation::identity, output), saved_if(keep, kept)});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto optional = [](const Tensor& t) { return t.defined() ? std::make_optional(t) : std::nullopt; };
    const std::optional<Tensor> bias_d = optional(saved[2]), bias_p = optional(saved[4]);
    const auto stride = data["stride"].toSymIntVector(), padding = data["padding"].toSymIntVector(),
               dilation = data["dilation"].toSymIntVector();
    const Call call{saved[0],
                    saved[1],
                    bias_d,
                    saved[3],
                    bias_p,
                    stride,
                    padding,
                    dilation,
                    static_cast<Activation>(data["depthwise_activation"].toInt()),
                    static_cast<Activation>(data["pointwise_activation"].toInt())};
    const Tensor &output = saved[5], &saved_kept = saved[6];
    const bool through_depthwise = data["through_depthwise"].toBool(), needs_h = data["needs_h"].toBool();

    Tensor kept, h;  // kept: h, or u where the derivative needs that
    if (needs_h) {
      kept = at::GradMode::is_enabled() ? separable::depthwise(call) : saved_kept.defined() ? saved_kept : again(call);
      h = separable::activated(call, kept);
    }
    Tensor gz = grads[0];
    if (derivative_from_output(call.pointwise_activation)) {
      gz = activation_backward(gz, output, call.pointwise_activation);
    } else {
      gz = activation_backward(gz, separable::pointwise(call, h, Activation::identity), call.pointwise_activation);
    }

    variable_list result(7);
    const bool has_bias_d = data["bias_d"].toBool(), has_bias_p = data["bias_p"].toBool();
    const std::array<SymInt, 2> one{1, 1}, zero{0, 0};
    std::vector<SymInt> size = gz.sym_sizes().vec();
    size[size.size() - 3] = SavedGeometry::load(ctx, "pointwise_weight").size[1];
    Tensor gu;
    std::tie(gu, result[2]) =
        gradients(through_depthwise, ctx->needs_input_grad(2), gz,
                  {h, {size, dense_strides(size, data["channels_last"].toBool())}},
                  {call.pointwise_weight, SavedGeometry::load(ctx, "pointwise_weight")}, {one, zero, one, 1});
    if (has_bias_p && ctx->needs_input_grad(has_bias_d ? 4 : 3)) result[4] = sum_to_channels(gz, 2);
    if (!through_depthwise) return result;

    h.reset();  // frees memory, unless kept is the same
    gz.reset();
    if (call.depthwise_activation != Activation::identity) {
      gu = activation_backward(gu, kept, call.depthwise_activation);
    }
    const SavedOperand x{call.input, SavedGeometry::load(ctx, "input")};
    std::tie(result[0], result[1]) =
        gradients(ctx->needs_input_grad(0), ctx->needs_input_grad(1), gu, x,
                  {call.depthwise_weight, SavedGeometry::load(ctx, "depthwise_weight")},
                  {stride, padding, dilation, x.geometry.size[x.geometry.size.size() - 3]});
    if (has_bias_d && ctx->needs_input_grad(3)) result[3] = sum_to_channels(gu, 2);
    return result;
  }

 private:
  // What the forward pass had between its stages, bit for bit.
  static Tensor again(const Call& c) {
    return std::get<1>(separable::training_by_dispatcher(c, /*output=*/false, /*intermediate=*/true));
  }

  static std::vector<SymInt> dense_strides(const std::vector<SymInt>& n, bool channels_last) {
    const size_t d = n.size();  // [C, H, W] where there is no batch
    std::vector<SymInt> strides = channels_last ? std::vector<SymInt>{1, n[d - 1] * n[d - 3], n[d - 3]}
                                                : std::vector<SymInt>{n[d - 2] * n[d - 1], n[d - 1], 1};
    if (d == 4) strides.insert(strides.begin(), n[1] * n[2] * n[3]);
    return strides;
  }
};

Tensor separable_conv2d(const Call& c, bool save_intermediate) {
  const auto tensors = {&c.input, &c.depthwise_weight, &c.pointwise_weight, &tensor_or_none(c.depthwise_bias),
                        &tensor_or_none(c.pointwise_bias)};
  if (const char* reason = needs_aten(2, tensors)) {
    count_aten(reason);
    return separable::by_aten(c);
  }
  if (!differentiates(tensors)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return separable::by_dispatcher(c, save_intermediate);
  }
  return SeparableConv2d::apply(c.input, c.depthwise_weight, c.pointwise_weight, c.depthwise_bias, c.pointwise_bias, c,
                                save_intermediate);
}

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, Autograd, m) { m.impl("separable_conv2d", separable::as_op<separable_conv2d>); }

}  // namespace sepconv
