// From a plan to the door that it names.
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "cpu/pointwise/product.h"

namespace sepconv::cpu {
namespace {

// A plan that names a kernel without such a map is a fault of plan.cpp: nothing is computed.
[[noreturn]] void no_door(const Plan& p, const char* map) {
  throw std::logic_error(std::string("the CPU kernel ") + p.name + " has no door for " + map);
}

// The products, and groups of channels_last, are of float32 alone, as the plan knows.
const float* floats(const void* p) { return static_cast<const float*>(p); }
float* floats(void* p) { return static_cast<float*>(p); }

void run_forward(const Plan& p, const ConvShape& shape, DType dtype, const void* x, const void* w,
                 const Epilogue& epilogue, void* y) {
  switch (p.kernel) {
    case Kernel::grouped_planes: return grouped_planes_forward(shape, dtype, x, w, epilogue, y);
    case Kernel::depthwise_nchw_3x3: return depthwise_nchw_3x3_forward(shape, dtype, x, w, epilogue, y);
    case Kernel::depthwise_nchw_blocked: return depthwise_nchw_blocked_forward(shape, dtype, x, w, epilogue, y);
    case Kernel::depthwise_nhwc: return depthwise_nhwc_forward(shape, dtype, x, w, epilogue, y);
    case Kernel::pointwise: return pointwise_forward(shape, dtype, x, w, epilogue, y);
    case Kernel::grouped_nhwc: return grouped_nhwc_forward(shape, floats(x), floats(w), epilogue, floats(y));
    case Kernel::pointwise_product: return product_forward(shape, floats(x), floats(w), epilogue, floats(y));
    default: no_door(p, "forward");
  }
}

void run_grad_input(const Plan& p, const ConvShape& shape, DType dtype, const void* grad_y, const void* w,
                    void* grad_x) {
  switch (p.kernel) {
    case Kernel::grouped_planes: return grouped_planes_grad_input(shape, dtype, grad_y, w, grad_x);
    case Kernel::depthwise_nchw_3x3: return depthwise_nchw_3x3_grad_input(shape, dtype, grad_y, w, grad_x);
    case Kernel::depthwise_nchw_blocked: return depthwise_nchw_blocked_grad_input(shape, dtype, grad_y, w, grad_x);
    case Kernel::depthwise_nhwc: return depthwise_nhwc_grad_input(shape, dtype, grad_y, w, grad_x);
    case Kernel::pointwise: return pointwise_grad_input(shape, dtype, grad_y, w, grad_x);
    case Kernel::grouped_nhwc: return grouped_nhwc_grad_input(shape, floats(grad_y), floats(w), floats(grad_x));
    case Kernel::pointwise_product: return product_grad_input(shape, floats(grad_y), floats(w), floats(grad_x));
    default: no_door(p, "grad_input");
  }
}

void run_grad_weight(const Plan& p, const ConvShape& shape, DType dtype, const void* grad_y, const void* x,
                     void* grad_w) {
  switch (p.kernel) {
    case Kernel::grouped_planes: return grouped_planes_grad_weight(shape, dtype, grad_y, x, grad_w);
    case Kernel::depthwise_nchw_blocked: return depthwise_nchw_blocked_grad_weight(shape, dtype, grad_y, x, grad_w);
    case Kernel::depthwise_nhwc: return depthwise_nhwc_grad_weight(shape, dtype, grad_y, x, grad_w);
    case Kernel::pointwise: return pointwise_grad_weight(shape, dtype, grad_y, x, grad_w);
    case Kernel::grouped_nhwc: return grouped_nhwc_grad_weight(shape, floats(grad_y), floats(x), floats(grad_w));
    case Kernel::pointwise_product: return product_grad_weight(shape, floats(grad_y), floats(x), floats(grad_w));
    default: no_door(p, "grad_weight");
  }
}

}  // namespace

void run(const Plan& p, Map map, const ConvShape& shape, DType dtype, const void* first, const void* second,
         const Epilogue& epilogue, void* out) {
  switch (map) {
    case Map::forward: return run_forward(p, shape, dtype, first, second, epilogue, out);
    case Map::grad_input: return run_grad_input(p, shape, dtype, first, second, out);
    case Map::grad_weight: return run_grad_weight(p, shape, dtype, first, second, out);
  }
}

void run_separable(const Plan& p, const SeparableShape& shape, DType dtype, const SeparableMemory& memory) {
  switch (p.kernel) {
    case Kernel::separable: return separable_forward(shape, dtype, memory);
    default: no_door(p, "separable_conv2d");
  }
}

void run_borders(Map map, const ConvShape& shape, PaddingMode mode, DType dtype, const void* first, const void* second,
                 const Epilogue& epilogue, void* out) {
  switch (map) {
    case Map::forward: return borders_forward(shape, mode, dtype, first, second, epilogue, out);
    case Map::grad_input: return borders_grad_input(shape, mode, dtype, first, second, out);
    case Map::grad_weight: return borders_grad_weight(shape, mode, dtype, first, second, out);
  }
}

}  // namespace sepconv::cpu
