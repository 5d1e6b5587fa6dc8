// depthwise_nhwc_grad_weight.cpp in the order of memory: what one input row adds to the weight gradients of some
// channel vectors. A fragment like simd.h, read once for each instruction set.
//
// Loop-to-data map. A row goes by in tiles of kColumns output columns, a tile vector by vector, and a vector joins its
// kernel rows kRows at a time: their sums come from the first-level cache, meet the pixels in registers, and go back.
// So an input row comes once, as few long runs, which the processor's own prefetching follows, where a tile of many
// rows is a cache line here and a cache line there; its rows of grad_y come from memory with the first input row that
// meets them, and from the caches with the others. The price is a load and a store of each sum for each kColumns
// products.

inline constexpr int64_t kVectorsAhead = 8;  // of tiles, about: the way to memory is as long as they take

// What a call sees: the pixels that the input row and the newest output row that meets it begin with, and the sums of
// the kernel row between the two.
template <typename T>
struct StreamedRow {
  const T* x;
  const T* grad_y;
  accumulate_t<T>* sums;  // [v1 - v0, R, S, kLanes], from that kernel row of vector v0 on
  int64_t rows;           // kernel rows that meet the input row, each a stride below the one before
  int64_t v0, v1;         // channel vectors
  bool ahead;             // fetch what comes next meanwhile
};

// `from` and `end`: the part of the tile's pixels that the image has.
template <typename T, int kTaps, int kStride, int kRows>
SEPCONV_INLINE void stream_tile(const ConvShape& k, const T* x, const T* grad_y, accumulate_t<T>* to, int64_t from,
                                int64_t end, int count) {
  using A = accumulate_t<T>;
  constexpr int kWidth = (kColumns - 1) * kStride + kTaps;
  constexpr int64_t kSumRow = kStride * kTaps * kLanes<A>;
  // Sums that are added last wait for no load; but of many taps the additions cost more than the waiting.
  constexpr bool kAddLast = kTaps <= 3;
  Vector<A> sums[kRows][kTaps] = {};
  Vector<A> grads[kRows][kColumns];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    load_grads(grads[r], grad_y - r * k.y.h, k.y.w, count);
#pragma GCC unroll 8
    for (int s = 0; s < kTaps && !kAddLast; ++s) sums[r][s] = load(to + r * kSumRow + s * kLanes<A>);
  }
#pragma GCC unroll 32
  for (int j = 0; j < kWidth; ++j) {
    if (j < from || j >= end) continue;
    const Vector<A> value = load(x + j * k.x.w);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < kTaps; ++s) {
        if (j >= s && (j - s) % kStride == 0 && (j - s) / kStride < kColumns) {
          sums[r][s] += value * grads[r][(j - s) / kStride];
        }
      }
    }
  }
  if constexpr (kAddLast) {
    add_sums<A>(to, kSumRow, sums);
  } else {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < kTaps; ++s) store(to + r * kSumRow + s * kLanes<A>, sums[r][s]);
    }
  }
}

// Stride kStride both ways, dilation 1, C >= kLanes.
template <typename T, int kTaps, int kStride>
void stream_row(const ConvShape& k, const StreamedRow<T>& b) {
  using A = accumulate_t<T>;
  constexpr int kMaxRows = std::clamp(31 / (kTaps + kColumns), 1, 3);
  const int64_t tiles_ahead = std::max<int64_t>((kVectorsAhead + (b.v1 - b.v0) / 2) / (b.v1 - b.v0), 1);
  const int64_t later = (tiles_ahead - 1) * kColumns;  // output columns between the next tile and the one to fetch
  for (int64_t q = 0; q < k.Q; q += kColumns) {
    const int count = static_cast<int>(std::min<int64_t>(kColumns, k.Q - q));
    const int64_t column = q * kStride - k.pad_w;
    const int64_t from = -column, end = std::min<int64_t>(k.W - column, (count - 1) * kStride + kTaps);
    for (int64_t v = b.v0; v < b.v1; ++v) {
      const int64_t c = first_channel<A>(k, v);
      const T* x = b.x + column * k.x.w + c;
      const T* grad_y = b.grad_y + q * k.y.w + c;
      if (b.ahead) {
        fetch<T, kColumns * kStride>(x + ((count - 1 + later) * kStride + kTaps) * k.x.w, k.x.w);
        fetch<T, kColumns>(grad_y + (count + later) * k.y.w, k.y.w);
      }
      A* sums = b.sums + (v - b.v0) * k.R * kTaps * kLanes<A>;
      for (int64_t left = b.rows; left > 0;) {
        if (kMaxRows == 3 && left >= 3) {
          stream_tile<T, kTaps, kStride, kMaxRows>(k, x, grad_y, sums, from, end, count);
        } else if (left >= 2) {
          stream_tile<T, kTaps, kStride, 2>(k, x, grad_y, sums, from, end, count);
        } else {
          stream_tile<T, kTaps, kStride, 1>(k, x, grad_y, sums, from, end, count);
        }
        const int64_t rows = std::min<int64_t>(left, kMaxRows);
        grad_y -= rows * k.y.h, sums += rows * kStride * kTaps * kLanes<A>, left -= rows;
      }
    }
  }
}
