// How a grouped convolution becomes sums of shifted rows: the tables of grouped_planes.cpp and
// grouped_planes_grad_weight.cpp.
//
// The two axes of an image do not know of each other, so each has its own table. Along one axis:
//
//   forward      out[t] = sum over taps r of in[t * stride + r * dilation - pad] * w[r]
//   grad_input   out[u] = sum over taps r of in[(u + pad - r * dilation) / stride] * w[r], where that division is exact
//
// A strided axis is split into phases (positions with one remainder modulo the stride), and then every tap is a plain
// shift: in forward the input is split, and tap r reads phase (r * dilation) % stride; in grad_input the output is
// split, into classes that each have their own taps. With stride 1 there is one phase and one class. Taps of one phase
// follow at equal distances; a run is a few of them in a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"

namespace sepconv::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Tap `index` of the filter: out position t of its class reads position t + offset of that phase.
struct Tap {
  int64_t index, phase, offset;
};

// `count` taps whose indices rise by PlaneAxis::index_step and whose offsets rise by PlaneAxis::run_step.
struct Run {
  Tap first;
  int count;
};
inline constexpr int kMaxRun = 5;

// Out positions first, first + PlaneAxis::out_step, ...: `count` of them.
struct AxisClass {
  int64_t first, count;
  std::vector<Tap> taps = {};  // by phase, then by rising offset
};

struct PlaneAxis {
  int64_t taps;  // of the filter, also those that no out position reads
  int64_t in_size, in_step, out_step;
  std::vector<int64_t> phases = {};  // position i of a phase is the in position phases[...] + i * in_step
  std::vector<AxisClass> classes = {};
  int64_t run_step, index_step;
  int64_t out_size = 0;
  int64_t count = 0;  // the largest count of a class
  int64_t reach = 0;  // the largest offset

  void measure() {
    for (const AxisClass& c : classes) {
      out_size += c.count;
      count = std::max(count, c.count);
      for (const Tap& tap : c.taps) reach = std::max(reach, tap.offset);
    }
  }
};

inline PlaneAxis forward_axis(int64_t in, int64_t taps, int64_t out, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation);
  PlaneAxis axis{.taps = taps,
                 .in_size = in,
                 .in_step = stride,
                 .out_step = 1,
                 .run_step = dilation / common,
                 .index_step = stride / common};
  AxisClass all{.first = 0, .count = out};
  for (int64_t phase = 0; phase < std::min(axis.index_step, taps); ++phase) {
    axis.phases.push_back(phase * dilation % stride - pad);
    for (int64_t r = phase; r < taps; r += axis.index_step) all.taps.push_back({r, phase, r * dilation / stride});
  }
  axis.classes.push_back(all);
  axis.measure();
  return axis;
}

// in is the output gradient (of that size), out the input gradient.
inline PlaneAxis grad_input_axis(int64_t in, int64_t taps, int64_t out, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation);
  PlaneAxis axis{.taps = taps,
                 .in_size = in,
                 .in_step = 1,
                 .out_step = stride,
                 .run_step = dilation / common,
                 .index_step = -stride / common};
  int64_t lowest = 0;
  for (int64_t first = 0; first < std::min(stride, out); ++first) {
    const int64_t remainder = (first + pad) % stride, start = (first + pad) / stride;
    AxisClass positions{.first = first, .count = (out - 1 - first) / stride + 1};
    for (int64_t r = taps - 1; r >= 0; --r) {
      if (r * dilation % stride == remainder) positions.taps.push_back({r, 0, start - r * dilation / stride});
    }
    if (!positions.taps.empty()) lowest = std::min(lowest, positions.taps.front().offset);
    axis.classes.push_back(positions);
  }
  for (AxisClass& c : axis.classes) {
    for (Tap& tap : c.taps) tap.offset -= lowest;
  }
  axis.phases.push_back(lowest);
  axis.measure();
  return axis;
}

// The taps of a class as runs of at most kMaxRun, as equal in length as can be.
inline std::vector<Run> runs_of(const AxisClass& positions) {
  std::vector<Run> runs;
  const std::vector<Tap>& taps = positions.taps;
  for (size_t begin = 0, end; begin < taps.size(); begin = end) {
    for (end = begin; end < taps.size() && taps[end].phase == taps[begin].phase;) ++end;
    const int64_t total = end - begin, pieces = ceil_div(total, kMaxRun);
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t from = total * i / pieces, to = total * (i + 1) / pieces;
      runs.push_back({taps[begin + from], static_cast<int>(to - from)});
    }
  }
  return runs;
}

// Where the columns of an image row go in scratch memory: phase after phase, `pitch` numbers apart, with zeros around.
// What lies before the first column is also what lies behind the row before. Reading whole vectors from any tap of any
// position meets zeros, not numbers of another row, outside the image: the sums of grouped_planes_grad_weight.cpp rely
// on it.
struct RowLayout {
  struct Span {
    int64_t begin, count, source;  // positions [begin, begin + count) hold the columns source, source + in_step, ...
  };
  std::vector<Span> spans;  // by phase
  int64_t pitch = 0;        // of one phase
  int64_t lowest = 0;       // the least begin
  int64_t shift = 0;        // numbers before position 0 of the first row, so that rows are stored at aligned addresses
  int64_t tail = 0;         // numbers that may be read from position 0 of the last phase on

  RowLayout(const PlaneAxis& axis, int64_t lanes) {
    tail = round_up(axis.count, lanes) + axis.reach;
    lowest = tail;
    int64_t stored = 0, end = 0;
    for (const int64_t first : axis.phases) {
      const int64_t begin = std::max<int64_t>(0, ceil_div(-first, axis.in_step));
      const int64_t source = first + begin * axis.in_step;
      const int64_t count = source < axis.in_size ? (axis.in_size - 1 - source) / axis.in_step + 1 : 0;
      spans.push_back({begin, count, source});
      if (count == 0) continue;
      lowest = std::min(lowest, begin);
      stored = std::max(stored, begin + round_up(count, lanes));
      end = std::max(end, begin + count);
    }
    if (stored == 0) lowest = 0;  // no tap of any position meets the image
    pitch = round_up(std::max({tail - lowest, stored - lowest, end}), lanes);
    shift = round_up(spans[0].begin, lanes) - spans[0].begin;
  }
  int64_t row() const { return pitch * static_cast<int64_t>(spans.size()); }
};

}  // namespace sepconv::cpu
