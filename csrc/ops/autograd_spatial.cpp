// The derivative formulas of the spatially separable convolution, in terms of the op table itself.
//
//   y = row pass of (column pass of x)     gx = the same op on gy, both filters turned round
//
// and the gradients of the filters are those of the two depthwise convolutions that it fuses. So derivatives of every
// order follow.
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/aten_route.h"
#include "ops/autograd.h"
#include "ops/ops.h"
#include "ops/runtime.h"
#include "ops/spatial_passes.h"

namespace sepconv {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SpatialSeparable : torch::autograd::Function<SpatialSeparable> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& column, const Tensor& row,
                        SymIntArrayRef padding) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["padding"] = padding;
    const bool for_filters = column.requires_grad() || row.requires_grad();
    ctx->save_for_backward({saved_if(for_filters, input), column, row});
    return ops::spatial_separable_conv2d(input, column, row, padding);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = grads[0], &input = saved[0], &column = saved[1], &row = saved[2];
    const SpatialPasses passes(grad.sym_size(-3), column, row, ctx->saved_data["padding"].toSymIntVector());
    const auto& one = passes.one;
    const auto &down = passes.column_padding, &along = passes.row_padding;
    const ops::Args column_pass{one, down, one, passes.groups}, row_pass{one, along, one, passes.groups};
    const SymInt &C = passes.groups, R = column.sym_size(-1), S = row.sym_size(-1);
    variable_list result(4);
    if (ctx->needs_input_grad(0)) {
      // Output rows and columns that lie in the padding alone saw nothing of the input.
      Tensor seen = grad;
      std::vector<SymInt> padding;
      for (const int side : {0, 1, 2, 3}) {
        const int dim = side < 2 ? -2 : -1;
        const SymInt most = (dim == -2 ? R : S) - 1;
        const SymInt &sides = dim == -2 ? down[side] : along[side], unseen = (sides - most).max(0);
        const bool at_start = side % 2 == 0;
        seen = seen.narrow_symint(dim, at_start ? unseen : SymInt(0), seen.sym_size(dim) - unseen);
        padding.push_back(most - sides + unseen);
      }
      result[0] = ops::spatial_separable_conv2d(seen, column.flip(-1), row.flip(-1), padding);
    }
    const auto filter_grad = [&](const Tensor& filter, const Tensor& weight_grad) {
      std::optional<at::AutoDispatchBelowADInplaceOrView> untracked;  // a tensor of its own, no view of weight_grad
      if (!at::GradMode::is_enabled()) untracked.emplace();
      const Tensor each = weight_grad.reshape_symint({C, filter.sym_size(-1)});
      if (filter.dim() == 1) return each.sum(0);
      return filter.sym_size(0) == 1 && C != 1 ? each.sum(0, /*keepdim=*/true) : each;
    };
    if (ctx->needs_input_grad(1)) {
      const SymInt P = grad.sym_size(-2), W = input.sym_size(-1);
      std::vector<SymInt> size{C, P, W}, stride{P * W, W, 1};
      if (input.dim() == 4) size.insert(size.begin(), input.sym_size(0)), stride.insert(stride.begin(), C * P * W);
      const Tensor between = ops::Cx(grad, passes.row, size, stride, row_pass);
      const std::array<SymInt, 4> weight{C, 1, R, 1}, dense{R, R, 1, 1};
      result[1] = filter_grad(column, ops::Cw(between, input, weight, dense, column_pass));
    }
    if (ctx->needs_input_grad(2)) {
      const Tensor between = passes.between(input, ops::conv2d);
      const std::array<SymInt, 4> weight{C, 1, 1, S}, dense{S, S, S, 1};
      result[2] = filter_grad(row, ops::Cw(grad, between, weight, dense, row_pass));
    }
    return result;
  }
};

Tensor spatial_separable_conv2d(const Tensor& input, const Tensor& column, const Tensor& row, SymIntArrayRef padding) {
  if (const char* reason = needs_aten(2, {&input, &column, &row})) {
    count_aten(reason);
    return aten::spatial_separable_conv2d(input, column, row, padding);
  }
  if (!differentiates({&input, &column, &row})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ops::spatial_separable_conv2d(input, column, row, padding);
  }
  return SpatialSeparable::apply(input, column, row, padding);
}

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, Autograd, m) { m.impl("spatial_separable_conv2d", spatial_separable_conv2d); }

}  // namespace sepconv
