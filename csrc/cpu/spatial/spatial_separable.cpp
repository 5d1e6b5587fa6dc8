// Spatially separable convolution: a column filter and then a row filter over every channel, in one pass through
// memory.
//
//   t[p, w] = sum over r of column[c, r] * x[n, c, p + r - pad_h, w]
//   y[n, c, p, q] = sum over s of row[c, s] * t[p, q + s - pad_w]
//
// Loop-to-data map. A line is what lies next to each other in memory: a row of one plane (NCHW), or a row of pixels
// with all their channels (channels_last), where the neighbour of a pixel is C elements away and a vector holds
// neighbouring channels. A unit of work is a strip of output rows of one plane or image, and of it a tile of the lines
// that fits the first cache levels with its halo. Inside, the column pass writes kRowsAtOnce lines of t to scratch
// memory of one tile, in the accumulation type, loading each input vector once for up to kRunTaps taps of all these
// lines; the row pass then reads them shifted. So t never reaches memory, and a half type is rounded once. Outside the
// image t is zero, and rows outside the image are read from a line of zeros.
//
// Filters are widened once a call. For channels_last with a filter for each channel, tap by tap, they are repeated
// beyond their end by a vector, so that the vector of filter values from any channel on is one load.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/spatial/spatial_separable.cpp"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void spatial_separable_forward(const ConvShape& shape, DType dtype, const void* x, const SpatialFilters& filters,
                               void* y) {
  if (shape.output_elements() == 0) return;
  SEPCONV_BEST_ISA(forward)(shape, dtype, x, filters, y);
}

}  // namespace sepconv::cpu
#else

inline constexpr int kRowsAtOnce = 8;
inline constexpr int kRunTaps = 4;         // input vectors that stay in registers with them
inline constexpr int kRowPassVectors = 4;  // independent sums that hide the latency of an addition
inline constexpr int64_t kTileElements = 512;

// The filter values of one pass. For lanes that are channels: tap r of the channels from c on is the vector at
// values[r * tap + c]; else the number values[r], for every lane.
template <typename A>
struct Taps {
  const A* values;
  int64_t count, tap;
};

template <bool kChannels, typename A>
SEPCONV_INLINE Vector<A> filter_value(const Taps<A>& taps, int64_t r, int64_t channel) {
  if constexpr (kChannels) {
    return load(taps.values + r * taps.tap + channel);
  } else {
    return broadcast<A>(taps.values[r]);
  }
}

// The channel that is `distance` (below their number) after another one, round the pixel.
SEPCONV_INLINE int64_t later_channel(int64_t channel, int64_t distance, int64_t channels) {
  const int64_t later = channel + distance;
  return later < channels ? later : later - channels;
}

// The filters in the accumulation type, as Taps wants them.
template <typename T>
struct WideFilters {
  using A = accumulate_t<T>;
  std::vector<A> values;
  int64_t count, channel = 0, tap = 1;  // distance between channels, and between taps

  // As lanes: channels lie next to each other. Else: taps do.
  WideFilters(const void* from, int64_t taps, int64_t channel_distance, int64_t channels, bool as_lanes) : count(taps) {
    const T* filter = static_cast<const T*>(from);
    const bool shared = channel_distance == 0;
    if (as_lanes && !shared) {
      tap = channels + kLanes<A>;
      values.resize(taps * tap);
      for (int64_t r = 0; r < taps; ++r) {
        for (int64_t i = 0; i < tap; ++i) values[r * tap + i] = load_one(filter + i % channels * channel_distance + r);
      }
      return;
    }
    channel = shared ? 0 : taps;
    values.resize(shared ? taps : channels * taps);
    for (size_t i = 0; i < values.size(); ++i) values[i] = load_one(filter + i);
  }

  Taps<A> of(int64_t c) const { return {values.data() + c * channel, count, tap}; }
};

// ---- the column pass ----

template <typename T, int kRows, int kTaps, bool kChannels, bool kWhole>
SEPCONV_INLINE void add_run(Vector<accumulate_t<T>> (&sums)[kRows], const T* const* rows, int64_t at, int count,
                            const Taps<accumulate_t<T>>& taps, int64_t r, int64_t channel) {
  using A = accumulate_t<T>;
  Vector<A> weights[kTaps];
#pragma GCC unroll 4
  for (int t = 0; t < kTaps; ++t) weights[t] = filter_value<kChannels>(taps, r + t, channel);
#pragma GCC unroll 16
  for (int i = 0; i < kRows + kTaps - 1; ++i) {
    const Vector<A> v = kWhole ? load(rows[r + i] + at) : load_first(rows[r + i] + at, count);
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) {
      if (i >= t && i - t < kRows) sums[i - t] += v * weights[t];
    }
  }
}

// One vector (or its first `count` lanes) of kRows lines of t. Input row r of output row k is rows[k + r].
template <typename T, int kRows, bool kChannels, bool kWhole>
SEPCONV_INLINE void column_vector(const T* const* rows, int64_t at, int count, const Taps<accumulate_t<T>>& taps,
                                  int64_t channel, accumulate_t<T>* out, int64_t pitch) {
  using A = accumulate_t<T>;
  Vector<A> sums[kRows] = {};
  int64_t r = 0;
  for (; r + kRunTaps <= taps.count; r += kRunTaps) {
    add_run<T, kRows, kRunTaps, kChannels, kWhole>(sums, rows, at, count, taps, r, channel);
  }
  switch (taps.count - r) {
    case 1: add_run<T, kRows, 1, kChannels, kWhole>(sums, rows, at, count, taps, r, channel); break;
    case 2: add_run<T, kRows, 2, kChannels, kWhole>(sums, rows, at, count, taps, r, channel); break;
    case 3: add_run<T, kRows, 3, kChannels, kWhole>(sums, rows, at, count, taps, r, channel); break;
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
    if constexpr (kWhole) {
      store(out + k * pitch, sums[k]);
    } else {
      store_first(out + k * pitch, sums[k], count);
    }
  }
}

// `count` elements of kRows lines. The first of them belongs to `channel` of `channels`.
template <typename T, int kRows, bool kChannels>
void column_pass(const T* const* rows, int64_t count, const Taps<accumulate_t<T>>& taps, int64_t channel,
                 int64_t channels, accumulate_t<T>* out, int64_t pitch) {
  constexpr int kCount = kLanes<accumulate_t<T>>;
  int64_t i = 0;
  for (; i + kCount <= count; i += kCount) {
    column_vector<T, kRows, kChannels, true>(rows, i, kCount, taps, channel, out + i, pitch);
    channel = later_channel(channel, kCount % channels, channels);
  }
  if (i < count) {
    column_vector<T, kRows, kChannels, false>(rows, i, static_cast<int>(count - i), taps, channel, out + i, pitch);
  }
}

// ---- the row pass ----

// kVectors vectors of output from a line of t; only the first `count` lanes are stored where that is one vector.
template <typename T, int kVectors, bool kChannels>
SEPCONV_INLINE void row_vectors(const accumulate_t<T>* t, int64_t step, const Taps<accumulate_t<T>>& taps,
                                int64_t channel, int64_t channels, T* out, int count) {
  using A = accumulate_t<T>;
  constexpr int kCount = kLanes<A>;
  int64_t first[kVectors] = {channel};
#pragma GCC unroll 4
  for (int v = 1; v < kVectors; ++v) first[v] = later_channel(first[v - 1], kCount % channels, channels);
  Vector<A> sums[kVectors] = {};
  for (int64_t s = 0; s < taps.count; ++s, t += step) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[v] += load(t + v * kCount) * filter_value<kChannels>(taps, s, first[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    if (kVectors > 1 || count == kCount) {
      store(out + v * kCount, sums[v]);
    } else {
      store_first(out, sums[v], count);
    }
  }
}

template <typename T, bool kChannels>
void row_pass(const accumulate_t<T>* t, int64_t step, const Taps<accumulate_t<T>>& taps, int64_t channel,
              int64_t channels, T* out, int64_t count) {
  constexpr int kCount = kLanes<accumulate_t<T>>, kMany = kRowPassVectors * kCount;
  int64_t i = 0;
  for (; i + kMany <= count; i += kMany) {
    row_vectors<T, kRowPassVectors, kChannels>(t + i, step, taps, channel, channels, out + i, kCount);
    channel = later_channel(channel, kMany % channels, channels);
  }
  for (; i < count; i += kCount) {
    const int left = static_cast<int>(std::min<int64_t>(kCount, count - i));
    row_vectors<T, 1, kChannels>(t + i, step, taps, channel, channels, out + i, left);
    channel = later_channel(channel, kCount % channels, channels);
  }
}

// ---- units of work ----

template <typename T>
struct SpatialJob {
  using A = accumulate_t<T>;
  const ConvShape& shape;
  const T* x;
  T* y;
  bool lanes_are_channels;  // channels_last
  bool dense;               // lines of x lie as those of y do
  WideFilters<T> column, row;
  int64_t slabs, step, line, tile, tiles,
      strips;            // step: elements between neighbours; line: elements of an output line
  std::vector<T> zeros;  // an input row outside of the image

  SpatialJob(const ConvShape& s, const T* x, const SpatialFilters& filters, T* y)
      : shape(s),
        x(x),
        y(y),
        lanes_are_channels(output_layout(s) != Layout::nchw),
        column(filters.column, s.R, filters.column_channel, s.C, lanes_are_channels),
        row(filters.row, s.S, filters.row_channel, s.C, lanes_are_channels) {
    dense = !lanes_are_channels || s.W == 1 || s.x.w == s.C;
    slabs = lanes_are_channels ? s.N : s.N * s.C;
    step = lanes_are_channels ? s.C : 1;
    line = s.Q * step;
    // The column pass computes the halo of every tile anew: little of it, against a tile that stays in the cache.
    tile = std::min(line, std::max(kTileElements, 4 * (s.S - 1) * step));
    tiles = (line + tile - 1) / tile;
    const int64_t threads = num_threads(), wanted = threads == 1 ? 1 : 4 * threads;
    strips = std::clamp<int64_t>(wanted / (slabs * tiles), 1, (s.P + kRowsAtOnce - 1) / kRowsAtOnce);
    zeros.resize(halo_tile());
  }

  int64_t halo_tile() const { return tile + (shape.S - 1) * step; }
  int64_t units() const { return slabs * tiles * strips; }
};

// Scratch memory of one thread for its units.
template <typename T>
struct SpatialScratch {
  using A = accumulate_t<T>;
  int64_t pitch;
  std::vector<A> lines;        // [kRowsAtOnce, pitch]: t, from the left edge of the halo on
  std::vector<const T*> rows;  // input rows, from the first one that the group of output rows sees
  explicit SpatialScratch(const SpatialJob<T>& job)
      : pitch(job.halo_tile() + kRowPassVectors * kLanes<A>),
        lines(kRowsAtOnce * pitch),
        rows(job.shape.R + kRowsAtOnce - 1) {}
};

// kRows rows of a unit, from output row p on: elements [begin, begin + count) of their lines.
template <typename T, int kRows, bool kColumnChannels>
void output_rows(const SpatialJob<T>& job, SpatialScratch<T>& scratch, int64_t slab, int64_t p, int64_t begin,
                 int64_t count) {
  const ConvShape& s = job.shape;
  const int64_t n = job.lanes_are_channels ? slab : slab / s.C, c = job.lanes_are_channels ? 0 : slab % s.C;
  const T* image = job.x + n * s.x.n + c * s.x.c;
  const int64_t left = begin - s.pad_w * job.step;  // the input element at the start of scratch
  const int64_t first = std::max<int64_t>(left, 0);
  const int64_t last = std::min(s.W * job.step, left + count + (s.S - 1) * job.step);
  // In one piece, or pixel by pixel where these lie apart.
  for (int64_t at = first, piece; at < last; at += piece) {
    const int64_t channel = at % job.step, offset = job.dense ? at : at / job.step * s.x.w + channel;
    piece = job.dense ? last - at : std::min(job.step - channel, last - at);
    for (int64_t i = 0; i < s.R + kRows - 1; ++i) {
      const int64_t h = p + i - s.pad_h;
      scratch.rows[i] = h < 0 || h >= s.H ? job.zeros.data() : image + h * s.x.h + offset;
    }
    column_pass<T, kRows, kColumnChannels>(scratch.rows.data(), piece, job.column.of(c), channel, job.step,
                                           scratch.lines.data() + at - left, scratch.pitch);
  }
  const bool row_channels = job.lanes_are_channels && job.row.tap != 1;
  for (int k = 0; k < kRows; ++k) {
    T* out = job.y + (slab * s.P + p + k) * job.line + begin;
    const accumulate_t<T>* t = scratch.lines.data() + k * scratch.pitch;
    if (row_channels) {
      row_pass<T, true>(t, job.step, job.row.of(c), begin % job.step, job.step, out, count);
    } else {
      row_pass<T, false>(t, job.step, job.row.of(c), 0, 1, out, count);
    }
  }
}

template <typename T, bool kColumnChannels>
void unit_of_work(const SpatialJob<T>& job, SpatialScratch<T>& scratch, int64_t unit) {
  const int64_t slab = unit / (job.tiles * job.strips), tile = unit / job.strips % job.tiles, strip = unit % job.strips;
  const int64_t begin = tile * job.tile, count = std::min(job.tile, job.line - begin);
  std::fill(scratch.lines.begin(), scratch.lines.end(), accumulate_t<T>(0));  // t outside of the image
  int64_t p = job.shape.P * strip / job.strips;
  const int64_t end = job.shape.P * (strip + 1) / job.strips;
  for (; end - p >= kRowsAtOnce; p += kRowsAtOnce) {
    output_rows<T, kRowsAtOnce, kColumnChannels>(job, scratch, slab, p, begin, count);
  }
  for (; end - p >= 4; p += 4) output_rows<T, 4, kColumnChannels>(job, scratch, slab, p, begin, count);
  for (; end - p >= 2; p += 2) output_rows<T, 2, kColumnChannels>(job, scratch, slab, p, begin, count);
  for (; end - p >= 1; p += 1) output_rows<T, 1, kColumnChannels>(job, scratch, slab, p, begin, count);
}

template <typename T>
struct SpatialTask {
  const SpatialJob<T>& job;
  int64_t tasks;
  void operator()(int64_t task) const {
    SpatialScratch<T> scratch(job);
    const int64_t units = job.units();
    for (int64_t unit = units * task / tasks; unit < units * (task + 1) / tasks; ++unit) {
      if (job.lanes_are_channels && job.column.tap != 1) {
        unit_of_work<T, true>(job, scratch, unit);
      } else {
        unit_of_work<T, false>(job, scratch, unit);
      }
    }
  }
};

template <typename T>
void forward_typed(const ConvShape& shape, const T* x, const SpatialFilters& filters, T* y) {
  const SpatialJob<T> job(shape, x, filters, y);
  const int64_t tasks = std::min<int64_t>(job.units(), 4 * num_threads());
  parallel(tasks, SpatialTask<T>{job, tasks});
}

void forward(const ConvShape& shape, DType dtype, const void* x, const SpatialFilters& filters, void* y) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward_typed(shape, static_cast<const T*>(x), filters, static_cast<T*>(y));
  });
}

#endif
