// How the ops behave under torch's own transforms: autocast, and torch.func (vmap, grad, jvp and their compositions);
// and on backends without kernels. Each rule is the same for every op, so that it is a template on the op's signature.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/aten_route.h"
#include "ops/causal.h"
#include "ops/inverted_residual.h"
#include "ops/ops.h"
#include "ops/residual.h"
#include "ops/runtime.h"
#include "ops/separable.h"

namespace sepconv {
namespace {

using at::Tensor;

// What autocast makes of an argument: tensors are cast, weights once for all calls; everything else stays.
template <c10::DeviceType device>
struct Cast {
  at::ScalarType type = at::autocast::get_autocast_dtype(device);

  Tensor operator()(const Tensor& t) const { return at::autocast::cached_cast(type, t, device); }
  std::optional<Tensor> operator()(const std::optional<Tensor>& t) const {
    return t ? std::make_optional((*this)(*t)) : std::nullopt;
  }
  template <typename Other>
  Other operator()(Other other) const {
    return other;
  }
};

template <typename Signature>
struct Rules;

template <typename Result, typename... Arguments>
struct Rules<Result(Arguments...)> {
  // Under autocast a convolution runs in the reduced type, as torch's conv2d does. Gradients need no rule: they are
  // computed outside autocast, on tensors that are reduced already.
  template <const auto& op, c10::DeviceType device, c10::DispatchKey key>
  static Result autocast(Arguments... arguments) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const Cast<device> cast;
    return op(cast(std::forward<Arguments>(arguments))...);
  }

  // The whole call made of ATen's functions.
  template <auto function, const char* reason>
  static Result by_aten(Arguments... arguments) {
    count_aten(reason);
    return function(std::forward<Arguments>(arguments)...);
  }
};

template <const auto& op>
using RulesOf = Rules<SignatureOf<op>>;

template <c10::DeviceType device, c10::DispatchKey key>
void register_autocast(torch::Library& m) {
  m.impl("conv2d", RulesOf<ops::conv2d>::autocast<ops::conv2d, device, key>);
  m.impl("conv2d_residual", RulesOf<ops::conv2d_residual>::autocast<ops::conv2d_residual, device, key>);
  m.impl("separable_conv2d", RulesOf<ops::separable_conv2d>::autocast<ops::separable_conv2d, device, key>);
  m.impl("spatial_separable_conv2d",
         RulesOf<ops::spatial_separable_conv2d>::autocast<ops::spatial_separable_conv2d, device, key>);
  m.impl("inverted_residual", RulesOf<ops::inverted_residual>::autocast<ops::inverted_residual, device, key>);
  m.impl("causal_conv1d", RulesOf<ops::causal_conv1d>::autocast<ops::causal_conv1d, device, key>);
}

template <const char* reason>
void register_aten(torch::Library& m) {
  m.impl("conv2d", RulesOf<ops::conv2d>::by_aten<aten::conv2d, reason>);
  m.impl("conv2d_residual", RulesOf<ops::conv2d_residual>::by_aten<residual::by_aten, reason>);
  m.impl("conv2d_grad_input", RulesOf<ops::conv2d_grad_input>::by_aten<aten::conv2d_grad_input, reason>);
  m.impl("conv2d_grad_weight", RulesOf<ops::conv2d_grad_weight>::by_aten<aten::conv2d_grad_weight, reason>);
  m.impl("separable_conv2d", RulesOf<ops::separable_conv2d>::by_aten<separable::as_op<separable::by_aten>, reason>);
  m.impl("spatial_separable_conv2d",
         RulesOf<ops::spatial_separable_conv2d>::by_aten<aten::spatial_separable_conv2d, reason>);
  m.impl("inverted_residual",
         RulesOf<ops::inverted_residual>::by_aten<inverted_residual::as_op<inverted_residual::by_aten>, reason>);
}

constexpr char kTransform[] = "a torch.func transform";
constexpr char kNoBackend[] = "no kernel for this backend";

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, AutocastCPU, m) { register_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>(m); }
TORCH_LIBRARY_IMPL(sepconv_ext, AutocastCUDA, m) { register_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>(m); }

// torch.func traces through differentiable functions; C++ autograd functions are closed to it. So a call is made of
// ATen's functions at the door of the outermost transform.
TORCH_LIBRARY_IMPL(sepconv_ext, FuncTorchDynamicLayerFrontMode, m) {
  register_aten<kTransform>(m);
  m.impl("causal_conv1d", RulesOf<ops::causal_conv1d>::by_aten<causal::composite, kTransform>);
  m.impl("causal_conv1d_grad_input",
         RulesOf<ops::causal_conv1d_grad_input>::by_aten<causal::composite_grad_input, kTransform>);
  m.impl("causal_conv1d_grad_weight",
         RulesOf<ops::causal_conv1d_grad_weight>::by_aten<causal::composite_grad_weight, kTransform>);
  m.impl("causal_conv1d_update", RulesOf<ops::causal_conv1d_update>::by_aten<causal::composite_update, kTransform>);
}

// A backend without kernels here, oneDNN's own tensors for example: autograd asks too, but not in inference mode.
TORCH_LIBRARY_IMPL(sepconv_ext, CompositeExplicitAutograd, m) { register_aten<kNoBackend>(m); }

}  // namespace sepconv
