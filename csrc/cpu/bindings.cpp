// The CPU dispatch key: what convolve.h has to know of this device.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "core/explain.h"
#include "cpu/kernels.h"
#include "cpu/layout/transposed_copy.h"
#include "cpu/plan.h"
#include "cpu/simd/huge_pages.h"
#include "ops/aten_route.h"
#include "ops/convolve.h"
#include "ops/runtime.h"

namespace sepconv::cpu {

void parallel_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  at::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(context, task);
  });
}

int num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

Explanation explain(Map map, const ConvShape& shape, DType dtype) {
  const Plan chosen = plan(map, shape, dtype, strict(), num_threads());
  return {chosen.name, with_copies(chosen.reason, map, chosen.copies), chosen.is_torchs(), "", 0};
}

Explanation explain(const SeparableShape& shape, DType dtype) {
  const Plan chosen = plan_separable(shape, dtype, strict());
  return {chosen.name, with_copies(chosen.reason, Map::forward, chosen.copies), false, "", 0};
}

namespace {

using at::Tensor;

// A pointwise convolution as ATen's matrix products, on views: [N*H*W, C] for channels_last, N times [C, H*W] else.
namespace matmul {

// Images of one pixel lie both ways: one product over the batch then beats one an image.
bool by_planes(const ConvShape& s) {
  return s.H * s.W > 1 && input_layout(s) == Layout::nchw && output_layout(s) == Layout::nchw;
}

Tensor pixels(const Tensor& image) { return image.permute({0, 2, 3, 1}).reshape({-1, image.size(1)}); }
Tensor planes(const Tensor& image) { return image.reshape({image.size(0), image.size(1), -1}); }
Tensor channels(const Tensor& image) { return image.transpose(0, 1).reshape({image.size(1), -1}); }
Tensor matrix(const Tensor& weight) { return weight.reshape({weight.size(0), weight.size(1)}); }

// The bias is the product's addend, so that a half type is rounded once.
void forward(const ConvShape& shape, const Tensor& input, const Tensor& weight, const Tensor& bias,
             const Tensor& output) {
  const Tensor w = matrix(weight);
  if (by_planes(shape)) {
    Tensor y = planes(output);
    const Tensor ws = w.unsqueeze(0).expand({shape.N, -1, -1});
    if (bias.defined()) {
      at::baddbmm_out(y, bias.view({1, -1, 1}), ws, planes(input));
    } else {
      at::bmm_out(y, ws, planes(input));
    }
  } else {
    Tensor y = pixels(output);
    if (bias.defined()) {
      at::addmm_out(y, bias, pixels(input), w.t());
    } else {
      at::mm_out(y, pixels(input), w.t());
    }
  }
}

void grad_input(const ConvShape& shape, const Tensor& grad_output, const Tensor& weight, const Tensor& grad_input) {
  const Tensor w = matrix(weight);
  if (by_planes(shape)) {
    Tensor gx = planes(grad_input);
    at::bmm_out(gx, w.t().unsqueeze(0).expand({shape.N, -1, -1}), planes(grad_output));
  } else {
    Tensor gx = pixels(grad_input);
    at::mm_out(gx, pixels(grad_output), w);
  }
}

void grad_weight(const ConvShape& shape, const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight) {
  // In half types one product sums over the whole batch, for which planes are copied side by side: a sum of rounded
  // products would be less exact than torch's.
  const bool planes_apart = call_layout(Map::grad_weight, shape) == Layout::nchw && shape.H * shape.W > 1;
  Tensor gw = matrix(grad_weight);  // a view: the last two dimensions are of size 1
  if (by_planes(shape) && grad_output.element_size() > 2) {
    const Tensor per_image = at::bmm(planes(grad_output), planes(input).transpose(1, 2));
    at::sum_out(gw, per_image, at::IntArrayRef{0});
  } else if (planes_apart) {
    at::mm_out(gw, channels(grad_output), channels(input).t());
  } else {
    at::mm_out(gw, pixels(grad_output).t(), pixels(input));
  }
}

void run(const Call& c, const Tensor& result) {
  const Tensor first = as_image(*c.first, c.args.for_sequences()), second = as_image(*c.second, c.args.for_sequences()),
               out = as_image(result, c.args.for_sequences());
  switch (c.map) {
    case Map::forward:
      forward(c.shape, first, second, c.bias ? *c.bias : Tensor(), out);
      aten::activate_in_place(out, c.activation);
      return;
    case Map::grad_input: return grad_input(c.shape, first, second, out);
    case Map::grad_weight: return grad_weight(c.shape, first, second, out);
  }
}

}  // namespace matmul

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static constexpr const char* kBorders = "cpu_borders";
  static constexpr bool kKeepsIntermediate = true;

  static Plan plan(const Call& c) { return cpu::plan(c.map, c.shape, c.dtype(), strict(), num_threads()); }

  static Tensor aten(const Plan& plan, const Call& c) {
    return plan.kernel == Kernel::aten_float32 ? in_float32(c, plan.copies.layout) : by_aten(c);
  }

  // A gradient by the weight of half types by torch's call for float32, rounded once. Both images become dense on the
  // way: else torch would copy the wide ones.
  static Tensor in_float32(const Call& c, Layout layout) {
    const auto format = layout == Layout::nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    const auto widened = [&](const Tensor& t) {
      Tensor image = as_image(t, c.args.for_sequences()).to(at::kFloat, false, false, format);
      return Call::Operand::owned(t.dim() == 4 ? std::move(image) : image.view(t.sizes()));
    };
    const Call wide{c.map, widened(*c.first), widened(*c.second), c.args, c.shape, c.result, c.size, c.stride};
    return by_aten(wide).to(c.first->scalar_type());
  }

  static Tensor prepared(const Tensor& out) {
    advise_huge_pages(out.mutable_data_ptr(), out.nbytes());
    return out;
  }

  static void copy_image(const Tensor& to, const Tensor& from) {
    const ImageShape image = image_shape(from);
    const Strides strides = image_shape(to).strides;
    if (!is_transposed_copy(image, strides)) {
      to.copy_(from);
      return;
    }
    transposed_copy(image, dtype_of(from), from.const_data_ptr(), strides, to.mutable_data_ptr());
  }

  static void run(const Plan& plan, const Call& c, const Tensor& out) {
    if (plan.kernel == Kernel::pointwise_matmul) return matmul::run(c, out);
    cpu::run(plan, c.map, c.shape, c.dtype(), c.first_data(), c.second_data(), c.epilogue(), out.mutable_data_ptr());
  }

  static void run_borders(const Call& c, const Tensor& out) {
    cpu::run_borders(c.map, c.shape, c.args.padding_mode, c.dtype(), c.first_data(), c.second_data(), c.epilogue(),
                     out.mutable_data_ptr());
  }

  static Plan plan_separable(const SeparableShape& shape, const Tensor& input) {
    return cpu::plan_separable(shape, dtype_of(input), strict());
  }

  static void run_separable(const Plan& plan, const SeparableShape& shape, DType dtype, const SeparableMemory& memory) {
    cpu::run_separable(plan, shape, dtype, memory);
  }

  static const char* spatial_kernel(const ConvShape&, DType) { return "cpu_spatial_separable"; }

  static void run_spatial(const ConvShape& shape, DType dtype, const void* x, const SpatialFilters& filters, void* y) {
    spatial_separable_forward(shape, dtype, x, filters, y);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(sepconv_ext, CPU, m) { register_ops<Cpu>(m); }

}  // namespace sepconv::cpu
