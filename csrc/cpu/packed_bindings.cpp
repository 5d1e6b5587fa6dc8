// The packed products as torch sees them (packed.h): schemas, and the CPU dispatch key.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "cpu/pointwise/product.h"
#include "cpu/simd/huge_pages.h"
#include "ops/checks.h"
#include "ops/packed.h"
#include "ops/runtime.h"

TORCH_LIBRARY_FRAGMENT(sepconv_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("pack_pointwise(Tensor weight) -> Tensor", tags);
  m.def(
      "packed_pointwise(Tensor input, Tensor packed, Tensor? bias, Tensor? residual, int out_channels, int[] stride, "
      "str activation) -> Tensor",
      tags);
  m.def(
      "packed_pointwise.out(Tensor input, Tensor packed, Tensor? bias, Tensor? residual, int out_channels, "
      "int[] stride, str activation, *, Tensor(a!) out) -> Tensor(a!)",
      tags);
}

namespace sepconv {
namespace packed {

using at::IntArrayRef;
using at::Tensor;

Tensor pack_pointwise(const Tensor& weight) {
  check_weight(weight);
  const int64_t K = weight.size(0), C = weight.size(1);
  const Tensor packed = at::empty({(K + cpu::kPanelColumns - 1) / cpu::kPanelColumns, C, cpu::kPanelColumns},
                                  weight.options(), at::MemoryFormat::Contiguous);
  cpu::product_pack(K, C, weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1),
                    packed.mutable_data_ptr<float>());
  return packed;
}

namespace {

void run(const ConvShape& shape, const Tensor& output, const Tensor& input, const Tensor& packed,
         const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, Activation activation) {
  if (output.numel() == 0) return;
  const Tensor dense_bias = bias && bias->defined() ? bias->contiguous() : Tensor();
  Tensor added = residual && residual->defined() ? *residual : Tensor();
  if (added.defined() && added.strides() != output.strides()) added = at::empty_like(output).copy_(added);
  cpu::Residual beside;
  if (added.defined()) beside = {added.const_data_ptr<float>(), shape.y};
  count_kernel("cpu_pointwise_product");
  cpu::product_forward_packed(shape, input.const_data_ptr<float>(), packed.const_data_ptr<float>(),
                              {dense_bias.defined() ? dense_bias.const_data_ptr() : nullptr, activation}, beside,
                              output.mutable_data_ptr<float>());
}

}  // namespace

Tensor pointwise(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, int64_t out_channels, IntArrayRef stride,
                 Activation activation) {
  const auto [shape, result] = check_pointwise(input, packed, bias, residual, out_channels, stride);
  const Tensor output = result.empty(input);
  cpu::advise_huge_pages(output.mutable_data_ptr(), output.nbytes());
  run(shape, output, input, packed, bias, residual, activation);
  return output;
}

void pointwise_into(const Tensor& output, const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, int64_t out_channels, IntArrayRef stride,
                    Activation activation) {
  const ConvShape shape = check_pointwise(input, packed, bias, residual, out_channels, stride, &output).shape;
  run(shape, output, input, packed, bias, residual, activation);
}

}  // namespace packed

namespace {

at::Tensor packed_pointwise(const at::Tensor& input, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual, int64_t out_channels, at::IntArrayRef stride,
                            std::string_view activation) {
  return packed::pointwise(input, packed, bias, residual, out_channels, stride, parse_activation(activation));
}

at::Tensor& packed_pointwise_out(const at::Tensor& input, const at::Tensor& packed,
                                 const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                                 int64_t out_channels, at::IntArrayRef stride, std::string_view activation,
                                 at::Tensor& out) {
  packed::pointwise_into(out, input, packed, bias, residual, out_channels, stride, parse_activation(activation));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, CPU, m) {
  m.impl("pack_pointwise", packed::pack_pointwise);
  m.impl("packed_pointwise", packed_pointwise);
  m.impl("packed_pointwise.out", packed_pointwise_out);
}

TORCH_LIBRARY_IMPL(sepconv_ext, CUDA, m) { m.impl("packed_pointwise", packed::refuse_pointwise); }

// A derivative asked for is an error, not a result without one.
TORCH_LIBRARY_IMPL(sepconv_ext, Autograd, m) {
  m.impl("pack_pointwise", torch::autograd::autogradNotImplementedFallback());
  m.impl("packed_pointwise", torch::autograd::autogradNotImplementedFallback());
  m.impl("packed_pointwise.out", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace sepconv
