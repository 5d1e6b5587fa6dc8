// grad_weight of any grouped convolution, any strides, any dtype, in one pass over x and grad_y.
//
// The gradient of every tap is a product of two planes: grad_y and the input, shifted (grouped_planes.h). A task owns
// some groups (or a part of one) and some of the images; it copies zero-padded input rows to scratch memory as
// grouped_planes.cpp does, and grad_block holds up to kMaxRows rows x 1 vector of grad_y in registers, against which it
// takes every shifted input vector once for all kernel rows of a run. Every tap has a whole vector of partial sums, in
// a table that stays in L1; its lanes are added at the very end. Images are split among tasks only where there are few
// groups, by the shape alone; the partial sums are then added in that order.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/grouped/grouped_planes_grad_weight.cpp"
#include "cpu/grouped/grouped_planes.h"

#include "core/activation.h"
#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void grouped_planes_grad_weight(const ConvShape& s, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  if (s.weight_elements() == 0) return;
  SEPCONV_BEST_ISA(run_grad_weight)(s, dtype, grad_y, x, grad_w);
}

}  // namespace sepconv::cpu
#else

#include "cpu/simd/activate_simd.h"

#include "cpu/grouped/grouped_planes_simd.h"

// Sums of kSize lanes of a, then of b, alternating: where vectors a and b hold sums of kSize vectors each, those of
// all.
template <typename A, int kSize>
SEPCONV_INLINE Vector<A> merge_sums(Vector<A> a, Vector<A> b) {
  using Index = typename VectorOf<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, kLanes<A>>::type;
  Index first{};
  for (int i = 0; i < kLanes<A>; ++i) {
    first[i] = i / (2 * kSize) * 2 * kSize + i % kSize + (i % (2 * kSize) >= kSize ? kLanes<A> : 0);
  }
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + kSize);
}

// Lane i: the sum of all lanes of vectors[i].
template <typename A, int kSize = kLanes<A>>
SEPCONV_INLINE Vector<A> sum_each(const Vector<A>* vectors) {
  if constexpr (kSize == 1) {
    return *vectors;
  } else {
    constexpr int kHalf = kSize / 2;
    return merge_sums<A, kHalf>(sum_each<A, kHalf>(vectors), sum_each<A, kHalf>(vectors + kHalf));
  }
}

struct TableRun {
  int64_t in, sums;  // steps in scratch, and in the table of sums: [run, column tap, tap of the run]
  int count;
};

template <typename A>
struct Products {
  int64_t channels, in_channel, sums_channel;
  const TableRun* runs;
  int run_count;
  const int64_t* taps;  // steps in scratch
  int tap_count;
  int64_t in_row, grad_row, columns;
};

template <typename A, int kRows, int kTaps>
SEPCONV_INLINE void add_products(const Vector<A> (&grad)[kRows], const A* in, Vector<A>* sums, const Products<A>& b) {
  for (int s = 0; s < b.tap_count; ++s, sums += kTaps) {
    const A* x = in + b.taps[s];
    Vector<A> total[kTaps];
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) total[t] = sums[t];
#pragma GCC unroll 16
    for (int i = 0; i < kRows + kTaps - 1; ++i, x += b.in_row) {
      const Vector<A> v = load_once(x);
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) {
        if (i >= t && i - t < kRows) total[t] += v * grad[i - t];
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) sums[t] = total[t];
  }
}

template <typename A, int kRows>
void grad_block(const Products<A>& b, const A* in_rows, const A* grad_rows, Vector<A>* table) {
  constexpr int kCount = kLanes<A>;
  for (int64_t q = 0; q < b.columns; q += kCount) {
    Vector<A> grad[kRows];
    if (b.columns - q >= kCount) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) grad[i] = load(grad_rows + q + i * b.grad_row);
    } else {
      const int left = static_cast<int>(b.columns - q);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) grad[i] = load_first(grad_rows + q + i * b.grad_row, left);
    }
    for (int64_t c = 0; c < b.channels; ++c) {
      for (int r = 0; r < b.run_count; ++r) {
        const TableRun& run = b.runs[r];
        const A* in = in_rows + q + c * b.in_channel + run.in;
        Vector<A>* sums = table + c * b.sums_channel + run.sums;
        switch (run.count) {
          case 1: add_products<A, kRows, 1>(grad, in, sums, b); break;
          case 2: add_products<A, kRows, 2>(grad, in, sums, b); break;
          case 3: add_products<A, kRows, 3>(grad, in, sums, b); break;
          case 4: add_products<A, kRows, 4>(grad, in, sums, b); break;
          case 5: add_products<A, kRows, 5>(grad, in, sums, b); break;
        }
      }
    }
  }
}

template <typename A>
void grad_blocks(const Products<A>& b, const A* in, const A* grad, Vector<A>* table, int64_t rows) {
  for (int64_t blocks = ceil_div(rows, kMaxRows); blocks > 0; --blocks) {
    const int64_t count = ceil_div(rows, blocks);
    switch (count) {
      case 1: grad_block<A, 1>(b, in, grad, table); break;
      case 2: grad_block<A, 2>(b, in, grad, table); break;
      case 3: grad_block<A, 3>(b, in, grad, table); break;
      case 4: grad_block<A, 4>(b, in, grad, table); break;
      case 5: grad_block<A, 5>(b, in, grad, table); break;
      case 6: grad_block<A, 6>(b, in, grad, table); break;
      case 7: grad_block<A, 7>(b, in, grad, table); break;
      case 8: grad_block<A, 8>(b, in, grad, table); break;
    }
    rows -= count;
    in += count * b.in_row;
    grad += count * b.grad_row;
  }
}

template <typename T>
class PlanesGradWeight {
 public:
  using A = accumulate_t<T>;
  static constexpr int kCount = kLanes<A>;
  static constexpr int64_t kKeep = 32 << 10;        // bytes of scratch that a single plane may take
  static constexpr int64_t kKeepGroup = 256 << 10;  // the same for the planes of a group
  static constexpr int64_t kMaxTable = 192 << 10;   // bytes of sums
  static constexpr int64_t kTasks = 64, kFewTasks = 16;

  PlanesGradWeight(const ConvShape& s, const T* grad_y, const T* x, T* grad_w)
      : s_(s),
        grad_y_(grad_y),
        x_(x),
        grad_w_(grad_w),
        rows_(forward_axis(s.H, s.R, s.P, s.stride_h, s.pad_h, s.dilation_h)),
        columns_(forward_axis(s.W, s.S, s.Q, s.stride_w, s.pad_w, s.dilation_w)),
        layout_(columns_, kCount),
        ins_(s.channels_per_group()),
        outs_(s.outputs_per_group()) {
    taps_ = s.R * s.S;
    taps_padded_ = round_up(taps_, kCount);
    const int64_t table_bytes = taps_padded_ * kCount * static_cast<int64_t>(sizeof(A));
    const int64_t row_bytes = layout_.row() * static_cast<int64_t>(sizeof(A) * rows_.phases.size());
    in_block_ = std::clamp<int64_t>(kMaxTable / table_bytes, 1, ins_);
    const int64_t fitting = (in_block_ == 1 ? kKeep : kKeepGroup) / (row_bytes * in_block_) - rows_.reach;
    strip_ = s.P;
    if (fitting < s.P) {
      const int64_t least = std::max(rows_.reach, kMaxRows * rows_.run_step);
      strip_ = std::min(s.P, round_up(std::max(fitting - kMaxRows, least), kMaxRows * rows_.run_step));
    }
    strip_ = std::max<int64_t>(strip_, 1);
    strips_ = ceil_div(s.P, strip_);
    scratch_rows_ = strip_ + rows_.reach;
    slot_ = scratch_rows_ * layout_.row() * rows_.phases.size();
    out_block_ = std::clamp<int64_t>(kMaxTable / (table_bytes * in_block_), 1, outs_);
    batch_ = 1;
    if (ins_ == 1 && outs_ == 1 && strips_ == 1) {
      batch_ = std::clamp<int64_t>(std::min<int64_t>(kKeep / (slot_ * sizeof(A)), kMaxTable / 4 / table_bytes), 1, 8);
    }
    in_parts_ = ceil_div(ins_, in_block_);
    out_parts_ = ceil_div(outs_, out_block_);
    items_ = ceil_div(s.groups, batch_) * in_parts_ * out_parts_;
    images_ = s.N * strips_;
    item_tasks_ = std::min(items_, kTasks);
    splits_ = item_tasks_ >= kFewTasks ? 1 : std::clamp<int64_t>(images_, 1, kFewTasks / item_tasks_);
    grad_pitch_ = round_up(s.Q, kCount);

    int64_t sums = 0;
    for (const Run& run : runs_of(rows_.classes[0])) {
      runs_.push_back({(run.first.phase * scratch_rows_ + run.first.offset) * layout_.row(), sums, run.count});
      for (const Tap& tap : columns_.classes[0].taps) {
        for (int t = 0; t < run.count; ++t, ++sums) {
          places_.push_back({run.first.index + t * rows_.index_step, tap.index});
        }
      }
    }
    for (const Tap& tap : columns_.classes[0].taps) column_steps_.push_back(tap.phase * layout_.pitch + tap.offset);
    if (splits_ > 1) partial_.reset(new A[splits_ * s.weight_elements()]);
  }

  void run() {
    parallel(item_tasks_ * splits_, *this);
    if (splits_ == 1) return;
    for (int64_t k = 0; k < s_.K; ++k) {
      for (int64_t c = 0; c < ins_; ++c) {
        for (int64_t r = 0; r < s_.R; ++r) {
          for (int64_t q = 0; q < s_.S; ++q) {
            const int64_t at = ((k * ins_ + c) * s_.R + r) * s_.S + q;
            A sum = partial_[at];
            for (int64_t i = 1; i < splits_; ++i) sum += partial_[at + i * s_.weight_elements()];
            store_one(grad_w_ + k * s_.w.n + c * s_.w.c + r * s_.w.h + q * s_.w.w, sum);
          }
        }
      }
    }
  }

  void operator()(int64_t task) const {
    const int64_t split = task % splits_, item_task = task / splits_;
    const int64_t in_size = round_up(layout_.shift + slot_ * batch_ * in_block_ + layout_.tail + 2 * kCount, kCount);
    const int64_t grad_size = strip_ * grad_pitch_ * batch_;
    const int64_t table_size = batch_ * out_block_ * in_block_ * taps_padded_ * kCount;
    const int64_t total = in_size + grad_size + table_size;
    const std::unique_ptr<A[]> memory(new A[total + 64 / sizeof(A)]);
    void* start = memory.get();
    size_t space = (total + 64 / sizeof(A)) * sizeof(A);
    A* scratch = static_cast<A*>(std::align(64, total * sizeof(A), start, space));
    std::fill_n(scratch, in_size, A(0));
    A* const grads = scratch + in_size;
    A* const table = grads + grad_size;
    scratch += layout_.shift;

    const int64_t end = items_ * (item_task + 1) / item_tasks_;
    for (int64_t item = items_ * item_task / item_tasks_; item < end; ++item) {
      const int64_t c0 = item % in_parts_ * in_block_, c1 = std::min(ins_, c0 + in_block_);
      const int64_t k0 = item / in_parts_ % out_parts_ * out_block_, k1 = std::min(outs_, k0 + out_block_);
      const int64_t group = item / (in_parts_ * out_parts_) * batch_;
      const int64_t batch = std::min(batch_, s_.groups - group);
      std::fill_n(table, table_size, A(0));
      for (int64_t image = images_ * split / splits_; image < images_ * (split + 1) / splits_; ++image) {
        const int64_t n = image / strips_, strip = image % strips_;
        for (int64_t i = 0; i < batch; ++i) {
          for (int64_t c = c0; c < c1; ++c) {
            copy_plane(scratch + (i * in_block_ + c - c0) * slot_, x_ + n * s_.x.n + ((group + i) * ins_ + c) * s_.x.c,
                       s_.x.h, s_.x.w, rows_, columns_, layout_, strip * strip_, scratch_rows_, strips_ > 1);
          }
        }
        add_image(scratch, grads, table, n, strip, group, batch, k0, k1, c1 - c0);
      }
      for (int64_t i = 0; i < batch; ++i) {
        for (int64_t k = k0; k < k1; ++k) {
          for (int64_t c = c0; c < c1; ++c) {
            const A* sums = table + ((i * out_block_ + k - k0) * in_block_ + c - c0) * taps_padded_ * kCount;
            finish(sums, (group + i) * outs_ + k, c, split);
          }
        }
      }
    }
  }

 private:
  void add_image(const A* scratch, A* grads, A* table, int64_t n, int64_t strip, int64_t group, int64_t batch,
                 int64_t k0, int64_t k1, int64_t channels) const {
    const int64_t p0 = strip * strip_, rows = std::min(strip_, s_.P - p0);
    const bool in_place = std::is_same_v<T, A> && s_.y.w == 1;
    const int64_t grad_row = in_place ? s_.y.h : grad_pitch_;
    Products<A> b{};
    b.channels = channels;
    b.in_channel = slot_;
    b.sums_channel = taps_padded_;
    b.runs = runs_.data();
    b.run_count = static_cast<int>(runs_.size());
    b.taps = column_steps_.data();
    b.tap_count = static_cast<int>(column_steps_.size());
    b.in_row = layout_.row() * rows_.run_step;
    b.grad_row = grad_row * rows_.run_step;
    b.columns = s_.Q;
    for (int64_t k = k0; k < k1; ++k) {
      const T* image = grad_y_ + n * s_.y.n + (group * outs_ + k) * s_.y.c + p0 * s_.y.h;
      if (!in_place) {
        for (int64_t i = 0; i < batch; ++i) copy_grad(grads + i * strip_ * grad_pitch_, image + i * s_.y.c, rows);
      }
      for (int64_t i = 0; i < batch; ++i) {
        const A* grad = grads + i * strip_ * grad_pitch_;
        if constexpr (std::is_same_v<T, A>) {
          if (in_place) grad = image + i * s_.y.c;
        }
        A* sums = table + (i * out_block_ + k - k0) * in_block_ * taps_padded_ * kCount;
        for (int64_t first = 0; first < std::min(rows_.run_step, rows); ++first) {
          grad_blocks(b, scratch + i * slot_ + first * layout_.row(), grad + first * grad_row,
                      reinterpret_cast<Vector<A>*>(sums),
                      rows_.run_step == 1 ? rows : ceil_div(rows - first, rows_.run_step));
        }
      }
    }
  }

  void copy_grad(A* to, const T* from, int64_t rows) const {
    if (s_.y.w == 1) return copy_rows(to, grad_pitch_, from, s_.y.h, rows, s_.Q);
    for (int64_t i = 0; i < rows; ++i) gather_row(to + i * grad_pitch_, from + i * s_.y.h, s_.y.w, s_.Q);
  }

  // The sums of one filter, to their place.
  void finish(const A* sums, int64_t k, int64_t c, int64_t split) const {
    const Vector<A>* vectors = reinterpret_cast<const Vector<A>*>(sums);
    A lanes[kCount];
    for (int64_t i = 0; i < taps_; ++i) {
      if (i % kCount == 0) store(lanes, sum_each<A>(vectors + i));
      const Place at = places_[i];
      if (splits_ == 1) {
        store_one(grad_w_ + k * s_.w.n + c * s_.w.c + at.r * s_.w.h + at.s * s_.w.w, lanes[i % kCount]);
      } else {
        partial_[split * s_.weight_elements() + ((k * ins_ + c) * s_.R + at.r) * s_.S + at.s] = lanes[i % kCount];
      }
    }
  }

  struct Place {
    int64_t r, s;
  };

  const ConvShape& s_;
  const T *grad_y_, *x_;
  T* grad_w_;
  PlaneAxis rows_, columns_;
  RowLayout layout_;
  int64_t ins_, outs_, taps_, taps_padded_;
  int64_t in_block_, out_block_, in_parts_, out_parts_, batch_;
  int64_t strip_, strips_, scratch_rows_, slot_, grad_pitch_;
  int64_t items_, images_, item_tasks_, splits_;
  std::vector<TableRun> runs_;
  std::vector<int64_t> column_steps_;
  std::vector<Place> places_;  // of the sums in the table
  std::unique_ptr<A[]> partial_;
};

inline void run_grad_weight(const ConvShape& s, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    PlanesGradWeight<T>(s, static_cast<const T*>(grad_y), static_cast<const T*>(x), static_cast<T*>(grad_w)).run();
  });
}
#endif
