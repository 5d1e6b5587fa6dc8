// Forward and grad_input of any grouped convolution, any strides, any dtype: sums of shifted rows (grouped_planes.h).
//
// A task is a range of units; a unit is one image n, one group, one strip of rows (and a part of the group's outputs
// where there are few units). It copies the zero-padded rows of the group's planes into scratch memory that stays in
// cache, as sums' type, one plane for each row and column phase; several units of small planes are copied before any is
// computed, as a load that overlaps two recent stores would wait for them. Then, for every output plane, row_block
// computes up to kMaxRows rows x 1 vector of columns in registers: a loaded input vector serves every kernel row of a
// run, so loads are fewer than multiplications. Output goes straight to memory, or through a tile of sums where rows
// must be interleaved (grad_input of a strided convolution), converted (half types) or scattered (other layouts).
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/grouped/grouped_planes.cpp"
#include "cpu/grouped/grouped_planes.h"

namespace sepconv::cpu {

// One of the two maps: out[n, k] = sum over c of in[n, c] * w[k, c], along the two axes.
struct PlanesJob {
  PlaneAxis rows, columns;
  int64_t images, groups, ins, outs;  // ins and outs: channels of one group
  Strides in, out;
  int64_t w_group, w_out, w_in, w_row, w_column;  // steps of the weight
  const void *in_data, *w_data, *bias;
  void* out_data;
  Activation activation;
};

}  // namespace sepconv::cpu

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void grouped_planes_forward(const ConvShape& s, DType dtype, const void* x, const void* w, const Epilogue& epilogue,
                            void* y) {
  if (s.output_elements() == 0) return;
  const PlanesJob job{.rows = forward_axis(s.H, s.R, s.P, s.stride_h, s.pad_h, s.dilation_h),
                      .columns = forward_axis(s.W, s.S, s.Q, s.stride_w, s.pad_w, s.dilation_w),
                      .images = s.N,
                      .groups = s.groups,
                      .ins = s.channels_per_group(),
                      .outs = s.outputs_per_group(),
                      .in = s.x,
                      .out = s.y,
                      .w_group = s.w.n * s.outputs_per_group(),
                      .w_out = s.w.n,
                      .w_in = s.w.c,
                      .w_row = s.w.h,
                      .w_column = s.w.w,
                      .in_data = x,
                      .w_data = w,
                      .bias = epilogue.bias,
                      .out_data = y,
                      .activation = epilogue.activation};
  SEPCONV_BEST_ISA(run_planes)(job, dtype);
}

void grouped_planes_grad_input(const ConvShape& s, DType dtype, const void* grad_y, const void* w, void* grad_x) {
  if (s.input_elements() == 0) return;
  const PlanesJob job{.rows = grad_input_axis(s.P, s.R, s.H, s.stride_h, s.pad_h, s.dilation_h),
                      .columns = grad_input_axis(s.Q, s.S, s.W, s.stride_w, s.pad_w, s.dilation_w),
                      .images = s.N,
                      .groups = s.groups,
                      .ins = s.outputs_per_group(),
                      .outs = s.channels_per_group(),
                      .in = s.y,
                      .out = s.x,
                      .w_group = s.w.n * s.outputs_per_group(),
                      .w_out = s.w.c,
                      .w_in = s.w.n,
                      .w_row = s.w.h,
                      .w_column = s.w.w,
                      .in_data = grad_y,
                      .w_data = w,
                      .bias = nullptr,
                      .out_data = grad_x,
                      .activation = Activation::identity};
  SEPCONV_BEST_ISA(run_planes)(job, dtype);
}

}  // namespace sepconv::cpu
#else
#include "cpu/simd/activate_simd.h"

#include "cpu/grouped/grouped_planes_simd.h"

#include "cpu/grouped/grouped_planes_rows.h"

template <typename T>
class Planes {
 public:
  using A = accumulate_t<T>;
  static constexpr bool kSameType = std::is_same_v<A, T>;
  // Bytes of scratch that a single plane may take, before it is cut in strips.
  static constexpr int64_t kKeep = 32 << 10;
  static constexpr int64_t kKeepGroup = 256 << 10;  // the same for the planes of a group
  static constexpr int64_t kMaxScratch = 1 << 20;   // bytes of input scratch: more channels are taken in blocks
  static constexpr int64_t kMaxTile = 256 << 10;    // bytes of tiles and of converted weights
  static constexpr int64_t kOutAhead = 2 << 10;     // bytes from where a row is stored to what is fetched meanwhile
  static constexpr int64_t kTasks = 64;

  explicit Planes(const PlanesJob& job) : job_(job), layout_(job.columns, kLanes<A>) {
    const PlaneAxis &rows = job.rows, &columns = job.columns;
    const int64_t row_bytes = layout_.row() * static_cast<int64_t>(sizeof(A) * rows.phases.size());
    tile_pitch_ = round_up(columns.count, kLanes<A>);
    tile_row_ = tile_pitch_ * columns.classes.size();
    const int64_t planes = job.images * job.groups;
    far_ = planes * (job.ins * rows.in_size * columns.in_size + job.outs * rows.out_size * columns.out_size) *
               static_cast<int64_t>(sizeof(T)) >
           kNearBytes;
    in_place_ = kMasks && kSameType && job.ins == 1 && job.in.w == 1 && rows.in_step == 1 && columns.in_step == 1 &&
                rows.run_step == 1;
    // Strips: of whole blocks of rows, not much shorter than what they share with their neighbours.
    const int64_t keep = job.ins == 1 ? kKeep : kKeepGroup;
    int64_t fitting = keep / (row_bytes * job.ins) - rows.reach;
    if (in_place_) {
      const bool tiled = job.out.w != 1 || columns.out_step != 1;
      const int64_t tile_row_bytes = tile_row_ * rows.classes.size() * sizeof(A);
      fitting = std::min(tiled ? kKeep / tile_row_bytes : rows.count, ceil_div(rows.count * planes, kTasks / 2));
    }
    strip_ = rows.count;
    if (fitting < rows.count) {
      const int64_t least = in_place_ ? kMaxRows : std::max(rows.reach, kMaxRows * rows.run_step);
      strip_ = std::min(rows.count, round_up(std::max(fitting - kMaxRows, least), kMaxRows * rows.run_step));
    }
    strips_ = ceil_div(rows.count, strip_);
    scratch_rows_ = strip_ + rows.reach;
    slot_ = in_place_ ? 0 : scratch_rows_ * layout_.row() * rows.phases.size();
    const int64_t slot_bytes = slot_ * sizeof(A);
    in_block_ = in_place_ ? job.ins : std::clamp<int64_t>(kMaxScratch / slot_bytes, 1, job.ins);
    direct_ = kSameType && job.out.w == 1 && columns.out_step == 1 && in_block_ == job.ins;
    batch_ = 1;
    if (!in_place_ && job.ins == 1 && job.outs == 1 && strips_ == 1)
      batch_ = std::clamp<int64_t>(kKeep / slot_bytes, 1, 8);
    tile_ = direct_ ? 0 : strip_ * tile_row_ * rows.classes.size();
    taps_ = rows.taps * columns.taps;
    const int64_t units = planes * strips_;
    parts_ = std::clamp<int64_t>(kTasks / 2 / units, 1, job.outs);
    const int64_t bytes_of_one = std::max<int64_t>(1, sizeof(A) * std::max(tile_, kSameType ? 0 : in_block_ * taps_));
    out_block_ =
        in_block_ == job.ins && kSameType ? job.outs : std::clamp<int64_t>(kMaxTile / bytes_of_one, 1, job.outs);
    units_ = units * parts_;
    tasks_ = std::min(units_, kTasks);
    // Converted weights are dense: [out, in, row, column].
    w_column_ = kSameType ? job.w_column : 1;
    w_row_ = kSameType ? job.w_row : columns.taps;
    w_in_ = kSameType ? job.w_in : taps_;
    w_out_ = kSameType ? job.w_out : taps_ * in_block_;

    for (const AxisClass& c : rows.classes) {
      runs_.emplace_back();
      for (const Run& run : runs_of(c)) {
        const int64_t in = (run.first.phase * scratch_rows_ + run.first.offset) * layout_.row();
        runs_.back().push_back({in, run.first.index * w_row_, run.first.offset, run.count});
      }
    }
    for (const AxisClass& c : columns.classes) {
      column_steps_.emplace_back();
      for (const Tap& tap : c.taps) {
        const int64_t in = in_place_ ? columns.phases[0] : tap.phase * layout_.pitch;
        column_steps_.back().push_back({in + tap.offset, tap.index * w_column_});
      }
      masks_.push_back(in_place_ ? column_masks(columns, c, kLanes<A>) : std::vector<uint32_t>());
    }
  }

  int64_t tasks() const { return tasks_; }

  void operator()(int64_t task) const {
    if constexpr (kSameType) {
      if (in_place_) return compute_in_place(units_ * task / tasks_, units_ * (task + 1) / tasks_);
    }
    const int64_t in_size = layout_.shift + slot_ * batch_ * in_block_ + layout_.tail + 2 * kLanes<A>;
    const int64_t tile_count = tile_ == 0 ? 0 : (in_block_ < job_.ins ? out_block_ : 1);
    const int64_t w_size = kSameType ? 0 : out_block_ * in_block_ * taps_;
    const int64_t total = round_up(in_size, kLanes<A>) + tile_ * tile_count + w_size;
    const std::unique_ptr<A[]> memory(new A[total + 64 / sizeof(A)]);
    void* start = memory.get();
    size_t space = (total + 64 / sizeof(A)) * sizeof(A);
    A* scratch = static_cast<A*>(std::align(64, total * sizeof(A), start, space));
    std::fill_n(scratch, in_size, A(0));
    A* const tiles = scratch + round_up(in_size, kLanes<A>);
    A* const weights = tiles + tile_ * tile_count;
    scratch += layout_.shift;

    const int64_t end = units_ * (task + 1) / tasks_;
    Place at = place(units_ * task / tasks_);
    for (int64_t unit = units_ * task / tasks_; unit < end; unit += batch_) {
      const int64_t batch = std::min(batch_, end - unit);
      const int64_t part = at.part;
      const int64_t k_end = job_.outs * (part + 1) / parts_;
      for (int64_t k0 = job_.outs * part / parts_, first = k0; k0 < k_end; k0 += out_block_) {
        const int64_t k1 = std::min(k_end, k0 + out_block_);
        for (int64_t c0 = 0; c0 < job_.ins; c0 += in_block_) {
          const int64_t c1 = std::min(job_.ins, c0 + in_block_);
          if (in_block_ < job_.ins || k0 == first) {
            Place from = at;
            for (int64_t i = 0; i < batch; ++i, advance(from)) copy_in(scratch + i * slot_, from, c0, c1);
          }
          Place to = at, after = at;
          for (int64_t i = 0; i < batch; ++i) advance(after);
          for (int64_t i = 0; i < batch; ++i, advance(to)) {
            Ahead next;
            if (unit + batch + i < end) next = ahead_of(after), advance(after);
            compute(scratch + i * slot_, tiles, weights, to, c0, c1, k0, k1, next);
          }
        }
      }
      for (int64_t i = 0; i < batch; ++i) advance(at);
    }
  }

 private:
  struct Place {
    int64_t n, group, strip, part;
  };
  Place place(int64_t unit) const {
    const int64_t strip = unit / parts_, plane = strip / strips_;
    return {plane / job_.groups, plane % job_.groups, strip % strips_, unit % parts_};
  }
  void advance(Place& at) const {  // to the next unit, without a division
    if (++at.part < parts_) return;
    at.part = 0;
    if (++at.strip < strips_) return;
    at.strip = 0;
    if (++at.group < job_.groups) return;
    at.group = 0;
    ++at.n;
  }

  // The units [begin, end) without scratch memory: sums and tensors are of one type, and groups of one input.
  void compute_in_place(int64_t begin, int64_t end) const {
    const PlaneAxis& rows = job_.rows;
    const std::vector<A> zeros(job_.columns.in_size + kLanes<A>);
    std::vector<A> tile(tile_);
    std::vector<const A*> in_rows(scratch_rows_);
    RowBlock<A> b{};
    b.channels = 1;
    b.in_row = job_.in.h;
    b.ahead = far_;
    b.w_row = w_row_ * rows.index_step;
    b.activation = direct_ ? job_.activation : Activation::identity;
    Place at = place(begin);
    for (int64_t unit = begin; unit < end; ++unit, advance(at)) {
      const int64_t top = rows.phases[0] + at.strip * strip_;
      b.first_row = std::clamp<int64_t>(-top, 0, scratch_rows_);
      b.last_row = std::clamp(rows.in_size - top, b.first_row, scratch_rows_);
      const A* image = static_cast<const A*>(job_.in_data) + at.n * job_.in.n + at.group * job_.in.c;
      for (int64_t i = 0; i < b.first_row; ++i) in_rows[i] = zeros.data();
      for (int64_t i = b.first_row; i < b.last_row; ++i) in_rows[i] = image + (top + i) * job_.in.h;
      for (int64_t i = b.last_row; i < scratch_rows_; ++i) in_rows[i] = zeros.data();
      const int64_t k1 = job_.outs * (at.part + 1) / parts_;
      for (int64_t k = job_.outs * at.part / parts_; k < k1; ++k) {
        const int64_t channel = at.group * job_.outs + k;
        const A bias = job_.bias == nullptr ? A(0) : static_cast<const A*>(job_.bias)[channel];
        const A* w = static_cast<const A*>(job_.w_data) + at.group * job_.w_group + k * job_.w_out;
        T* out = static_cast<T*>(job_.out_data) + at.n * job_.out.n + channel * job_.out.c;
        b.bias = direct_ ? bias : A(0);
        compute_plane(b, nullptr, in_rows.data(), w, out, tile.data(), at.strip);
        if (!direct_) copy_out(out, tile.data(), at.strip, bias);
      }
    }
  }

  void copy_in(A* scratch, const Place& at, int64_t c0, int64_t c1) const {
    const T* image = static_cast<const T*>(job_.in_data) + at.n * job_.in.n + at.group * job_.ins * job_.in.c;
    for (int64_t c = c0; c < c1; ++c, scratch += slot_) {
      copy_plane(scratch, image + c * job_.in.c, job_.in.h, job_.in.w, job_.rows, job_.columns, layout_,
                 at.strip * strip_, scratch_rows_, strips_ > 1);
    }
  }

  // What a unit reads, to be fetched while another one is computed.
  Ahead ahead_of(const Place& at) const {
    const PlaneAxis& rows = job_.rows;
    if (job_.ins > 1 || job_.in.w != 1) return {};
    const T* image = static_cast<const T*>(job_.in_data) + at.n * job_.in.n + at.group * job_.in.c;
    const int64_t h0 = std::max<int64_t>(0, at.strip * strip_ * rows.in_step + rows.phases[0]);
    const int64_t h1 = std::min(rows.in_size, h0 + scratch_rows_ * rows.in_step);
    const int64_t vectors = job_.outs * rows.classes.size() * job_.columns.classes.size() * ceil_div(strip_, kMaxRows) *
                            (tile_pitch_ / kLanes<A>);
    return {image + h0 * job_.in.h, (h1 - h0) * job_.in.h, vectors};
  }

  void compute(const A* scratch, A* tiles, A* weights, const Place& at, int64_t c0, int64_t c1, int64_t k0, int64_t k1,
               Ahead& next) const {
    const T* w = static_cast<const T*>(job_.w_data) + at.group * job_.w_group + k0 * job_.w_out + c0 * job_.w_in;
    const A* w_sums;
    if constexpr (kSameType) {
      w_sums = w;
    } else {
      convert_weights(weights, w, k1 - k0, c1 - c0);
      w_sums = weights;
    }
    RowBlock<A> b{};
    b.channels = c1 - c0;
    b.in_channel = slot_;
    b.w_channel = w_in_;
    b.in_row = layout_.row() * job_.rows.run_step;
    b.w_row = w_row_ * job_.rows.index_step;
    b.add = c0 > 0;
    b.ahead = far_ && direct_;
    b.next = far_ ? &next : nullptr;
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t channel = at.group * job_.outs + k;
      const A bias = job_.bias == nullptr ? A(0) : load_one(static_cast<const T*>(job_.bias) + channel);
      T* out = static_cast<T*>(job_.out_data) + at.n * job_.out.n + channel * job_.out.c;
      A* tile = in_block_ < job_.ins ? tiles + (k - k0) * tile_ : tiles;
      b.bias = direct_ ? bias : A(0);
      b.activation = direct_ ? job_.activation : Activation::identity;
      compute_plane(b, scratch, nullptr, w_sums + (k - k0) * w_out_, out, tile, at.strip);
      if (!direct_ && c1 == job_.ins) copy_out(out, tile, at.strip, bias);
    }
  }

  void compute_plane(RowBlock<A>& b, const A* in, const A* const* in_rows, const A* w, T* out, A* tile,
                     int64_t strip) const {
    const PlaneAxis &rows = job_.rows, &columns = job_.columns;
    for (size_t rc = 0; rc < rows.classes.size(); ++rc) {
      const int64_t row_count = std::min(strip_, rows.classes[rc].count - strip * strip_);
      b.runs = runs_[rc].data();
      b.run_count = static_cast<int>(runs_[rc].size());
      for (size_t cc = 0; cc < columns.classes.size(); ++cc) {
        b.taps = column_steps_[cc].data();
        b.tap_count = static_cast<int>(column_steps_[cc].size());
        b.masks = masks_[cc].data();
        int64_t out_row = tile_row_;
        A* to = tile + rc * strip_ * tile_row_ + cc * tile_pitch_;
        b.columns = tile_pitch_;
        if constexpr (kSameType) {
          if (direct_) {
            out_row = rows.out_step * job_.out.h;
            to = out + (rows.classes[rc].first + strip * strip_ * rows.out_step) * job_.out.h;
            b.columns = columns.count;
          }
        }
        b.out_row = out_row * rows.run_step;
        if (in_place_) {
          row_blocks<A, true>(b, nullptr, in_rows, w, to, row_count);
          continue;
        }
        // Rows that share inputs are run_step apart.
        for (int64_t first = 0; first < std::min(rows.run_step, row_count); ++first) {
          row_blocks<A, false>(b, in + first * layout_.row(), nullptr, w, to + first * out_row,
                               rows.run_step == 1 ? row_count : ceil_div(row_count - first, rows.run_step));
        }
      }
    }
  }

  // Row after row as they lie in the image.
  void copy_out(T* out, const A* tile, int64_t strip, A bias) const {
    const PlaneAxis& rows = job_.rows;
    const int64_t ahead = far_ && job_.out.w == 1 ? kOutAhead / static_cast<int64_t>(sizeof(T)) : 0;
    for (int64_t i = 0; i < strip_; ++i) {
      for (size_t rc = 0; rc < rows.classes.size(); ++rc) {
        const int64_t row = strip * strip_ + i;
        if (row >= rows.classes[rc].count) continue;
        T* to = out + (rows.classes[rc].first + row * rows.out_step) * job_.out.h;
        copy_out_row(to, job_.out.w, tile + (rc * strip_ + i) * tile_row_, tile_pitch_, job_.columns, bias,
                     job_.activation, ahead);
      }
    }
  }

  void convert_weights(A* to, const T* w, int64_t outs, int64_t ins) const {
    for (int64_t k = 0; k < outs; ++k) {
      for (int64_t c = 0; c < ins; ++c) {
        A* filter = to + k * w_out_ + c * w_in_;
        for (int64_t r = 0; r < job_.rows.taps; ++r) {
          const T* from = w + k * job_.w_out + c * job_.w_in + r * job_.w_row;
          for (int64_t s = 0; s < job_.columns.taps; ++s) *filter++ = load_one(from + s * job_.w_column);
        }
      }
    }
  }

  const PlanesJob& job_;
  RowLayout layout_;
  int64_t strip_, strips_, scratch_rows_, slot_, in_block_, batch_;
  int64_t tile_, tile_pitch_, tile_row_, out_block_;
  int64_t taps_;
  int64_t w_out_, w_in_, w_row_, w_column_;
  int64_t parts_, units_, tasks_;
  bool far_;                                            // input and output come from memory
  bool in_place_;                                       // reads the input where it is, without scratch memory
  bool direct_;                                         // stores sums where they belong, without a tile
  std::vector<std::vector<RunSteps>> runs_;             // by row class
  std::vector<std::vector<ColumnSteps>> column_steps_;  // by column class
  std::vector<std::vector<uint32_t>> masks_;            // by column class
};

inline void run_planes(const PlanesJob& job, DType dtype) {
  with_dtype(dtype, [&](auto type) {
    const Planes<decltype(type)> planes(job);
    parallel(planes.tasks(), planes);
  });
}
#endif
