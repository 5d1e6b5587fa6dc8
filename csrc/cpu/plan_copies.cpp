#include "cpu/plan_copies.h"

#include "core/arithmetic.h"

namespace sepconv::cpu {
namespace {

// benchmarks/notes/views.md, "narrow rows of half types": of fewer columns they are copied where they
// lie apart.
constexpr int64_t kNarrowRow = 8;

// Rows of a half type that do not fill a vector and lie apart: the blocks convert and transpose them one by one, and
// dense planes a vector at a time.
bool has_narrow_rows(DType dtype, const ImageShape& image) {
  return is_half(dtype) && image.columns < kNarrowRow && !has_dense_rows(image);
}

}  // namespace

bool takes(Kernel kernel, Map map, DType dtype, Layout layout, const ImageShape& image) {
  switch (kernel) {
    case Kernel::grouped_nhwc:
    case Kernel::grouped_planes:
    case Kernel::depthwise_nchw_3x3:
    case Kernel::depthwise_nhwc: return is_dense_along(layout, image);
    case Kernel::depthwise_nchw_blocked: return is_dense_along(layout, image) && !has_narrow_rows(dtype, image);
    case Kernel::pointwise_product:
      return is_dense_along(layout, image) || (map != Map::grad_weight && is_one_pixel(image));
    case Kernel::pointwise:
      return image.rows * image.columns == 1 ? is_dense_along(Layout::nhwc, image) : is_dense(layout, image);
    // In half types one product over all pixels, for which bindings.cpp copies pixels or rows where it has to. From the
    // other layout its copy would go number by number.
    case Kernel::pointwise_matmul:
      return is_dense(layout, image) ||
             (map == Map::grad_weight && is_half(dtype) && (is_dense_along(layout, image) || is_one_pixel(image)));
    case Kernel::aten:
    case Kernel::in_float32:  // torch copies, slowly from another layout, as which it takes an expanded batch, too
      return own_layout(image) == Layout::strided ||
             (own_layout(image) == layout && (layout != Layout::nhwc || !is_expanded_batch(image)));
    default: return is_dense(layout, image);
  }
}

}  // namespace sepconv::cpu
