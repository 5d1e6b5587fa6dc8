// The tables of borders.h.
#include "cpu/borders/borders.h"

namespace sepconv::cpu {

GatherAxis GatherAxis::forward(const PaddedAxis& axis) {
  GatherAxis g;
  g.size = axis.outputs;
  g.frame = axis.outputs_outside();
  g.first = g.frame.leading, g.last = axis.outputs - g.frame.trailing;
  g.period = 1, g.step = axis.stride;
  const auto list = [&](int64_t o) {
    std::vector<ReadTap> taps;
    for (int64_t t = 0; t < axis.taps; ++t) taps.push_back({axis.source(axis.position(o, t)), t});
    return taps;
  };
  for (int64_t o = 0; o < g.first; ++o) g.before.push_back(list(o));
  if (g.first < g.last) g.regular.push_back(list(g.first));
  for (int64_t o = g.last; o < g.size; ++o) g.after.push_back(list(o));
  return g;
}

GatherAxis GatherAxis::grad_input(const PaddedAxis& axis) {
  GatherAxis g;
  g.size = axis.size;
  g.frame = axis.pixels_with_images();
  // Regular: outside of the frame, and no tap falls off the ends of grad_y.
  const int64_t reach = (axis.taps - 1) * axis.dilation - axis.pad;
  const int64_t end = (axis.outputs - 1) * axis.stride - axis.pad;
  g.first = std::clamp<int64_t>(std::max(g.frame.leading, reach), 0, g.size);
  g.last = std::clamp(std::min(g.size - g.frame.trailing, end + 1), g.first, g.size);
  g.period = axis.stride, g.step = 1;
  const auto list = [&](int64_t pixel) {
    std::vector<ReadTap> taps;
    const auto add = [&](Range positions) {
      for (int64_t i = positions.begin; i < positions.end; ++i) {
        for (int64_t t = 0; t < axis.taps; ++t) {
          const int64_t from = i + axis.pad - t * axis.dilation;
          if (from < 0 || from % axis.stride != 0 || from / axis.stride >= axis.outputs) continue;
          taps.push_back({from / axis.stride, t});
        }
      }
    };
    add({pixel, pixel + 1});
    add(axis.images_before(pixel));
    add(axis.images_after(pixel));
    return taps;
  };
  for (int64_t i = 0; i < g.first; ++i) g.before.push_back(list(i));
  for (int64_t i = g.first; i < std::min(g.first + g.period, g.last); ++i) g.regular.push_back(list(i));
  for (int64_t i = g.last; i < g.size; ++i) g.after.push_back(list(i));
  return g;
}

namespace {

// Positions begin, begin + step, ... of an axis, which share a list.
struct Sequence {
  int64_t begin, count, step;
};

// The positions from begin to end - 1 as few sequences.
std::vector<Sequence> sequences(const GatherAxis& axis, int64_t begin, int64_t end) {
  std::vector<Sequence> all;
  const int64_t first = std::clamp(axis.first, begin, end), last = std::clamp(axis.last, first, end);
  for (int64_t i = begin; i < first; ++i) all.push_back({i, 1, 1});
  for (int64_t i = first; i < std::min(first + axis.period, last); ++i) {
    all.push_back({i, (last - 1 - i) / axis.period + 1, axis.period});
  }
  for (int64_t i = last; i < end; ++i) all.push_back({i, 1, 1});
  return all;
}

// How far the position that is read moves from the beginning of the regular positions to i.
int64_t moved(const GatherAxis& axis, int64_t i) {
  return i >= axis.first && i < axis.last ? (i - axis.first) / axis.period * axis.step : 0;
}

}  // namespace

std::vector<Strip> frame_strips(const GatherAxis& rows, const GatherAxis& columns, int64_t taps_a_row,
                                const Strides& in, const Strides& out, bool sides) {
  std::vector<Strip> strips;
  const auto add = [&](const Sequence& h, const Sequence& w) {
    Strip strip{h.begin * out.h + w.begin * out.w, h.count * w.count, 0, 0, {}};
    strip.in_step = h.count > 1 ? rows.step * in.h : columns.step * in.w;
    strip.out_step = h.count > 1 ? h.step * out.h : w.step * out.w;
    const int64_t shift = moved(rows, h.begin) * in.h + moved(columns, w.begin) * in.w;
    for (const ReadTap& r : rows.list(h.begin)) {
      for (const ReadTap& s : columns.list(w.begin)) {
        strip.taps.push_back({shift + r.position * in.h + s.position * in.w, r.tap * taps_a_row + s.tap});
      }
    }
    strips.push_back(std::move(strip));
  };
  const int64_t top = rows.frame.leading, bottom = rows.size - rows.frame.trailing;
  const int64_t left = columns.frame.leading, right = columns.size - columns.frame.trailing;
  const std::vector<Sequence> across = sides ? sequences(columns, left, right) : sequences(columns, 0, columns.size);
  const std::vector<Sequence> down = sequences(rows, top, bottom);
  for (int64_t h = 0; h < rows.size; ++h) {
    if (h >= top && h < bottom) continue;
    for (const Sequence& w : across) add({h, 1, 1}, w);
  }
  for (int64_t w = 0; w < columns.size; ++w) {
    if (sides || (w >= left && w < right)) continue;
    for (const Sequence& h : down) add(h, {w, 1, 1});
  }
  return strips;
}

void Sides::add_sides(const PaddedAxes& axes, const GatherAxis& axis, int64_t first, int64_t step, const Strides& in,
                      const Strides& out) {
  const int64_t right = axis.size - axis.frame.trailing;
  for (int64_t w = 0; w < axis.size; ++w) {
    if (w >= axis.frame.leading && w < right) continue;
    Side side{w * out.w, {}};
    for (const ReadTap& s : axis.list(w)) {
      const int64_t column = s.position * in.w + moved(axis, w) * in.w;
      const int64_t copy = std::find(columns.begin(), columns.end(), column) - columns.begin();
      if (copy == static_cast<int64_t>(columns.size())) columns.push_back(column);
      for (int64_t r = 0; r < axes.h.taps; ++r) {
        side.taps.push_back({copy, first + r * step, r * axes.w.taps + s.tap});
      }
    }
    sides.push_back(std::move(side));
  }
}

Sides Sides::forward(const PaddedAxes& axes, const GatherAxis& columns, const Strides& in, const Strides& out) {
  const PaddedAxis& h = axes.h;
  const int64_t reach = (h.taps - 1) * h.dilation;
  Sides s;
  s.sums = h.outputs;
  for (int64_t i = 0; i < h.outputs + reach; ++i) s.rows.push_back(h.source(i - h.pad) * in.h);
  s.written = h.outputs;
  s.add_sides(axes, columns, 0, h.dilation, in, out);
  return s;
}

// The sums are the gradient by the padded image, which is folded.
Sides Sides::grad_input(const PaddedAxes& axes, const GatherAxis& columns, const Strides& in, const Strides& out) {
  const PaddedAxis& h = axes.h;
  const int64_t reach = (h.taps - 1) * h.dilation;
  Sides s;
  s.sums = h.outputs + reach;
  for (int64_t i = -reach; i < h.outputs + reach; ++i) s.rows.push_back(i >= 0 && i < h.outputs ? i * in.h : -1);
  s.written = h.size, s.own = h.pad;  // the sums cover the padded image: with stride 1 every position is met
  for (int64_t pixel = 0; pixel < h.size; ++pixel) {
    for (const Range& range : {h.images_before(pixel), h.images_after(pixel)}) {
      for (int64_t i = range.begin; i < range.end; ++i) s.images.push_back({pixel, i + h.pad});
    }
  }
  s.add_sides(axes, columns, reach, -h.dilation, in, out);
  return s;
}

std::vector<ProductRun> padding_products(const PaddedAxes& axes, int64_t r, int64_t s, const Strides& x,
                                         const Strides& y) {
  std::vector<ProductRun> runs;
  const PaddedAxis &h = axes.h, &w = axes.w;
  const Ends rows = h.outputs_outside(r, r), columns = w.outputs_outside(s, s);
  const int64_t top = rows.leading, bottom = h.outputs - rows.trailing;
  const int64_t left = columns.leading, right = w.outputs - columns.trailing;
  const auto one = [&](int64_t p, int64_t q) {
    runs.push_back({p * y.h + q * y.w, h.source(h.position(p, r)) * x.h + w.source(w.position(q, s)) * x.w, 1, 0, 0});
  };
  for (int64_t p = 0; p < h.outputs; ++p) {
    if (p >= top && p < bottom) continue;
    for (int64_t q = 0; q < left; ++q) one(p, q);
    if (left < right) {
      runs.push_back({p * y.h + left * y.w, h.source(h.position(p, r)) * x.h + w.position(left, s) * x.w, right - left,
                      y.w, w.stride * x.w});
    }
    for (int64_t q = right; q < w.outputs; ++q) one(p, q);
  }
  for (int64_t q = 0; q < w.outputs; ++q) {
    if ((q >= left && q < right) || top >= bottom) continue;
    runs.push_back({top * y.h + q * y.w, h.position(top, r) * x.h + w.source(w.position(q, s)) * x.w, bottom - top, y.h,
                    h.stride * x.h});
  }
  return runs;
}

}  // namespace sepconv::cpu
