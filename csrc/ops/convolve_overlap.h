// A call whose padding or dilation reaches far beyond the image, as a smaller one (core/overlap.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "core/overlap.h"
#include "ops/aten_route.h"
#include "ops/call.h"

namespace sepconv {

// convolve.h has them.
template <typename Device, typename Plan>
at::Tensor convolve_as_planned(const Call& call, const Plan& plan);
template <typename Device>
at::Tensor as_promised(const Call& call, const at::Tensor& computed);

// A call that reaches far beyond the image: what overlaps is computed by a call of its own, and the rest is known.
template <typename Device>
at::Tensor convolve_overlap(const Call& call, const Overlap& overlap) {
  const auto &h = overlap.h, &w = overlap.w;
  const bool has_rows = !call.args.for_sequences();
  const auto part = [&](const at::Tensor& t, const Span& rows, const Span& columns) {
    const at::Tensor some = t.narrow(-1, columns.begin, columns.count());
    return has_rows ? some.narrow(-2, rows.begin, rows.count()) : some;
  };
  const auto image = [&](const at::Tensor& t) { return part(t, h.pixels, w.pixels); };
  const auto filter = [&](const at::Tensor& t) { return part(t, h.taps, w.taps); };
  const auto outputs = [&](const at::Tensor& t) { return part(t, h.outputs, w.outputs); };

  at::Tensor result = call.result.empty(*call.first), place, computed;
  if (!overlap.is_empty()) {
    const std::array<int64_t, 2> strides{h.stride, w.stride}, both_sides{h.pad_before, w.pad_before};
    const std::array<int64_t, 4> sides{h.pad_before, h.pad_after, w.pad_before, w.pad_after};
    const bool symmetric = h.pad_before == h.pad_after && w.pad_before == w.pad_after;
    const at::IntArrayRef stride(strides), padding = symmetric ? at::IntArrayRef(both_sides) : at::IntArrayRef(sides);
    const auto own = [&](at::IntArrayRef entries) { return has_rows ? entries : entries.slice(entries.size() / 2); };
    const ConvArgs args{own(stride), own(padding), call.args.dilation, call.args.groups};
    const auto compute = [&](const Call& c) { return convolve_as_planned<Device>(c, Device::plan(c)); };
    switch (call.map) {
      case Map::forward:
        place = outputs(result);
        computed = compute(forward_call(image(*call.first), filter(*call.second), call.bias, args, call.activation));
        break;
      case Map::grad_input:
        place = image(result);
        computed = compute(
            gradient_call(call.map, outputs(*call.first), filter(*call.second), place.sizes(), place.strides(), args));
        break;
      case Map::grad_weight:
        place = filter(result);
        computed = compute(
            gradient_call(call.map, outputs(*call.first), image(*call.second), place.sizes(), place.strides(), args));
    }
    if (place.sizes() == result.sizes()) return as_promised<Device>(call, computed);
  }
  if (call.map == Map::forward && call.bias) {
    result.copy_(has_rows ? call.bias->view({-1, 1, 1}) : call.bias->view({-1, 1}));
  } else {
    result.zero_();
  }
  if (call.map == Map::forward) result = aten::activate_in_place(result, call.activation);
  if (place.defined()) place.copy_(computed);
  return result;
}

}  // namespace sepconv
