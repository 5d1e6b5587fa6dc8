// A spatially separable convolution as the two depthwise ones that it fuses: what its derivatives are made of, and what
// is called where no kernel fuses them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "core/conv_shape.h"
#include "ops/ops.h"

namespace sepconv {

struct SpatialPasses {
  at::Tensor column, row;  // as weights: views of [C, 1, R, 1] and [C, 1, 1, S]
  std::array<c10::SymInt, 4> column_padding{0, 0, 0, 0}, row_padding{0, 0, 0, 0};
  std::array<c10::SymInt, 2> one{1, 1};  // stride and dilation
  c10::SymInt groups;

  // column is [C, R], [1, R] or [R], row [C, S], [1, S] or [S]; padding has 2 or 4 entries.
  SpatialPasses(c10::SymInt channels, const at::Tensor& column_filter, const at::Tensor& row_filter,
                c10::SymIntArrayRef padding)
      : groups(std::move(channels)) {
    const bool asymmetric = padding.size() == 4;
    for (const int side : {0, 1}) {
      column_padding[side] = padding.at(asymmetric ? side : 0);
      row_padding[2 + side] = padding.at(asymmetric ? 2 + side : 1);
    }
    const auto one_row_each = [](const at::Tensor& filter) {
      return filter.dim() == 1 ? filter : filter.unsqueeze(-2);
    };
    column = one_row_each(column_filter).unsqueeze(-1).expand_symint({groups, 1, column_filter.sym_size(-1), 1});
    row = one_row_each(row_filter).unsqueeze(-2).expand_symint({groups, 1, 1, row_filter.sym_size(-1)});
  }

  // The two calls, by the op table or by what has its signature.
  template <typename Convolution>
  at::Tensor between(const at::Tensor& input, const Convolution& conv2d) const {
    return conv2d(input, column, std::nullopt, one, column_padding, one, groups, "identity", "zeros");
  }
  template <typename Convolution>
  at::Tensor run(const at::Tensor& input, const Convolution& conv2d) const {
    return conv2d(between(input, conv2d), row, std::nullopt, one, row_padding, one, groups, "identity", "zeros");
  }
};

// The filters as a kernel takes them: dense, kept alive here.
struct SpatialTensors {
  at::Tensor column, row;
  SpatialTensors(const at::Tensor& column_filter, const at::Tensor& row_filter)
      : column(column_filter.contiguous()), row(row_filter.contiguous()) {}

  SpatialFilters raw() const {
    const auto channel = [](const at::Tensor& filter) {
      return filter.dim() == 1 || filter.size(0) == 1 ? 0 : filter.size(1);
    };
    return {column.const_data_ptr(), row.const_data_ptr(), channel(column), channel(row)};
  }
};

}  // namespace sepconv
