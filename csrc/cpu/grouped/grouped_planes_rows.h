// The inner kernels of grouped_planes.cpp. Like simd.h, read once for each instruction set: no include guard and no
// include.
//
// row_block: kRows output rows, one vector of columns after the other; the sums of a vector stay in registers while all
// input channels, runs of taps and column taps go by.

// Steps in numbers of scratch and weight memory.
struct RunSteps {
  int64_t in, w, row;  // row: of the padded plane, read by output row 0
  int count;
};
struct ColumnSteps {
  int64_t in, w;
};

template <typename A>
struct RowBlock {
  int64_t channels, in_channel, w_channel;
  const RunSteps* runs;
  int run_count;
  int64_t in_row;  // from one output row (in place: from one row of the image) to the next
  int64_t w_row;   // from one tap of a run to the next
  const ColumnSteps* taps;
  int tap_count;
  int64_t out_row, columns;
  const uint32_t* masks;        // [vector of columns, tap]: the lanes that lie inside the image (in place only)
  int64_t first_row, last_row;  // of the padded plane, inside the image (in place only)
  bool add;                     // to what stands in out, instead of starting from the bias
  bool ahead;                   // fetch the next rows meanwhile
  Ahead* next;                  // what the next unit reads; may be null
  A bias;
  Activation activation;
};

template <typename A, int kRows, int kTaps>
SEPCONV_INLINE void add_run(Vector<A> (&sums)[kRows], const A* in, const A* w, const RowBlock<A>& b) {
  for (int s = 0; s < b.tap_count; ++s) {
    const A* x = in + b.taps[s].in;
    const A* taps = w + b.taps[s].w;
    Vector<A> weights[kTaps];
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t, taps += b.w_row) weights[t] = broadcast<A>(*taps);
#pragma GCC unroll 16
    for (int i = 0; i < kRows + kTaps - 1; ++i, x += b.in_row) {
      const Vector<A> v = load_once(x);
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) {
        if (i >= t && i - t < kRows) sums[i - t] += v * weights[t];
      }
    }
  }
}

// ---- in place: the same from a plane whose columns are dense, without scratch memory ----
//
// rows[i] points at row i of the padded plane: into the image, or at a row of zeros. Lanes outside the image are masked
// off.

template <typename A, int kRows, int kTaps>
SEPCONV_INLINE void add_column_in_place(Vector<A> (&sums)[kRows], const A* const* rows, int64_t column, const A* taps,
                                        int64_t w_row, uint32_t mask) {
  Vector<A> weights[kTaps];
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t, taps += w_row) weights[t] = broadcast<A>(*taps);
#pragma GCC unroll 16
  for (int i = 0; i < kRows + kTaps - 1; ++i) {
    const Vector<A> v = load_masked(rows[i] + column, mask);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) {
      if (i >= t && i - t < kRows) sums[i - t] += v * weights[t];
    }
  }
}

template <typename A, int kRows, int kTaps>
SEPCONV_INLINE void add_run_in_place(Vector<A> (&sums)[kRows], const A* const* rows, int64_t q, const A* w,
                                     const uint32_t* masks, const RowBlock<A>& b) {
  const ColumnSteps* taps = b.taps;
  const int64_t w_row = b.w_row;
  if (kTaps == 3 && b.tap_count == 3) {
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {
      add_column_in_place<A, kRows, kTaps>(sums, rows, q + taps[s].in, w + taps[s].w, w_row, masks[s]);
    }
    return;
  }
  for (int s = 0; s < b.tap_count; ++s) {
    add_column_in_place<A, kRows, kTaps>(sums, rows, q + taps[s].in, w + taps[s].w, w_row, masks[s]);
  }
}

// One output row, kVectors vectors of columns from q on: a row without neighbours (a sequence) has no other sums that
// could go on while a sum waits for its last product.
template <typename A, bool kInPlace, int kVectors>
SEPCONV_INLINE void lone_row(const RowBlock<A>& b, const A* in_row, const A* const* rows, int64_t row,
                             const A* w_filter, A* out, int64_t q) {
  constexpr int kCount = kLanes<A>;
  constexpr int kAhead = 4 * kVectors * kCount;  // numbers, in this row or in one that follows: 2 KiB of float
  Vector<A> sums[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    if (kInPlace && b.run_count > 0) __builtin_prefetch(rows[b.runs[0].row] + q + kAhead + i * kCount);
    __builtin_prefetch(out + q + kAhead + i * kCount, 1);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) sums[i] = b.add ? load(out + q + i * kCount) : broadcast<A>(b.bias);
  for (int64_t c = 0; c < b.channels; ++c) {
    for (int r = 0; r < b.run_count; ++r) {
      const RunSteps& run = b.runs[r];
      for (int s = 0; s < b.tap_count; ++s) {
        const A* w = w_filter + c * b.w_channel + run.w + b.taps[s].w;
        for (int t = 0; t < run.count; ++t, w += b.w_row) {
          const Vector<A> weight = broadcast<A>(*w);
          if constexpr (kInPlace) {
            if (row + run.row + t < b.first_row || row + run.row + t >= b.last_row) continue;  // all zeros
            const A* x = rows[run.row + t] + q + b.taps[s].in;
            const uint32_t* masks = b.masks + q / kCount * b.tap_count + s;
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) {
              sums[i] += load_masked(x + i * kCount, masks[i * b.tap_count]) * weight;
            }
          } else {
            const A* x = in_row + q + c * b.in_channel + run.in + t * b.in_row + b.taps[s].in;
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) sums[i] += load(x + i * kCount) * weight;
          }
        }
      }
    }
  }
  activate_sums<A>(b.activation, sums);
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) store(out + q + i * kCount, sums[i]);
}

// kRows output rows.
template <typename A, bool kInPlace, int kRows>
void row_block(const RowBlock<A>& b, const A* in_rows, const A* const* rows, int64_t row, const A* w_filter,
               A* out_rows) {
  constexpr int kCount = kLanes<A>;
  const int64_t columns = b.columns, out_row = b.out_row;
  int64_t q = 0;
  if constexpr (kRows == 1) {
    constexpr int kVectors = 8;
    for (; columns - q >= kVectors * kCount; q += kVectors * kCount) {
      lone_row<A, kInPlace, kVectors>(b, in_rows, rows, row, w_filter, out_rows, q);
    }
  }
  for (; q < columns; q += kCount) {
    const uint32_t* masks = kInPlace ? b.masks + q / kCount * b.tap_count : nullptr;
    if (kRows > 1 && b.ahead) {
      // A block's rows are too short for the processor's own prefetching to get under way. Past the last row of a plane
      // comes, as a rule, the next plane.
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        if constexpr (kInPlace) __builtin_prefetch(rows[kRows - 1] + (i + 2) * b.in_row + q);
        __builtin_prefetch(out_rows + (i + kRows) * out_row + q, 1);
      }
    }
    if (!kInPlace && b.next != nullptr) b.next->fetch();
    Vector<A> sums[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sums[i] = b.add ? load(out_rows + i * out_row + q) : broadcast<A>(b.bias);
    for (int64_t c = 0; c < b.channels; ++c) {
      const A* in = in_rows + q + c * b.in_channel;
      const A* w = w_filter + c * b.w_channel;
      for (int r = 0; r < b.run_count; ++r) {
        const RunSteps& run = b.runs[r];
        if constexpr (kInPlace) {
          if (row + run.row + kRows + run.count - 1 <= b.first_row || row + run.row >= b.last_row)
            continue;  // all zeros
          switch (run.count) {
            case 1: add_run_in_place<A, kRows, 1>(sums, rows + run.row, q, w + run.w, masks, b); break;
            case 2: add_run_in_place<A, kRows, 2>(sums, rows + run.row, q, w + run.w, masks, b); break;
            case 3: add_run_in_place<A, kRows, 3>(sums, rows + run.row, q, w + run.w, masks, b); break;
            case 4: add_run_in_place<A, kRows, 4>(sums, rows + run.row, q, w + run.w, masks, b); break;
            case 5: add_run_in_place<A, kRows, 5>(sums, rows + run.row, q, w + run.w, masks, b); break;
          }
        } else {
          switch (run.count) {
            case 1: add_run<A, kRows, 1>(sums, in + run.in, w + run.w, b); break;
            case 2: add_run<A, kRows, 2>(sums, in + run.in, w + run.w, b); break;
            case 3: add_run<A, kRows, 3>(sums, in + run.in, w + run.w, b); break;
            case 4: add_run<A, kRows, 4>(sums, in + run.in, w + run.w, b); break;
            case 5: add_run<A, kRows, 5>(sums, in + run.in, w + run.w, b); break;
          }
        }
      }
    }
    activate_sums<A>(b.activation, sums);
    A* out = out_rows + q;
    if (columns - q >= kCount) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) store(out + i * out_row, sums[i]);
    } else {
      const int left = static_cast<int>(columns - q);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) store_first(out + i * out_row, sums[i], left);
    }
  }
}

template <typename A, bool kInPlace>
void row_blocks(const RowBlock<A>& b, const A* in, const A* const* in_rows, const A* w, A* out, int64_t rows) {
  int64_t row = 0;
  for (int64_t blocks = ceil_div(rows, kMaxRows); blocks > 0; --blocks) {
    const int64_t count = ceil_div(rows, blocks);
    switch (count) {
      case 1: row_block<A, kInPlace, 1>(b, in, in_rows + row, row, w, out); break;
      case 2: row_block<A, kInPlace, 2>(b, in, in_rows + row, row, w, out); break;
      case 3: row_block<A, kInPlace, 3>(b, in, in_rows + row, row, w, out); break;
      case 4: row_block<A, kInPlace, 4>(b, in, in_rows + row, row, w, out); break;
      case 5: row_block<A, kInPlace, 5>(b, in, in_rows + row, row, w, out); break;
      case 6: row_block<A, kInPlace, 6>(b, in, in_rows + row, row, w, out); break;
      case 7: row_block<A, kInPlace, 7>(b, in, in_rows + row, row, w, out); break;
      case 8: row_block<A, kInPlace, 8>(b, in, in_rows + row, row, w, out); break;
    }
    rows -= count;
    row += count;
    in += count * b.in_row;
    out += count * b.out_row;
  }
}
