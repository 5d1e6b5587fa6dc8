// Depthwise convolution (multiplier 1) of images whose channels are dense: gradient by the weight. Images, rows and
// pixels may lie apart in any way: slices of channels, crops, expanded gradients.
//
//   grad_w[c, r, s] = sum over n, p, q of
//       grad_y[n, p, q, c] * x[n, p * stride_h - pad_h + r * dilation_h, q * stride_w - pad_w + s * dilation_w, c]
//
// Loop-to-data map. A vector holds neighbouring channels. A task is a part of the N * P output rows and a chunk of
// the channels whose sums fit the first-level cache. Inside it, one of two orders:
//   - tiles: a tile of some kRowGroup output rows and kColumns output columns, channel vector, up to three kernel rows.
//     The sums of those kernel rows stay in registers while the rows of the tile go by; then they are added to the
//     task's sums. Meanwhile the same pixels of the next vector are fetched into the first-level cache.
//   - streamed: input row by input row in the order of memory; see depthwise_nhwc_grad_weight_stream.h. Every
//   short_sum()
//     pixels or so the sums are added to the task's.
// Either way grad_y and x come from memory once, and a long sum is a sum of short ones.
//
// The parts depend on the shape alone, and are added in order, by a second pass where there are several: the result
// does not depend on the number of threads.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "cpu/depthwise/depthwise_nhwc_grad_weight.cpp"
#include "cpu/simd/processor.h"

#include "cpu/simd/foreach_isa.h"

namespace sepconv::cpu {

void depthwise_nhwc_grad_weight(const ConvShape& shape, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  if (shape.C == 0) return;
  SEPCONV_BEST_ISA(grad_weight)(shape, dtype, grad_y, x, grad_w);
}

}  // namespace sepconv::cpu
#else

#include "cpu/depthwise/depthwise_nhwc_grad_weight_block.h"
#include "cpu/depthwise/depthwise_nhwc_grad_weight_stream.h"
#include "cpu/simd/transpose_simd.h"

inline constexpr int64_t kRowGroup = 14;         // output rows of a tile, about; divides 14, 28, 56, 112
inline constexpr int64_t kTasks = 32;            // parts x chunks aimed at
inline constexpr int64_t kMinChunk = 4;          // channel vectors
inline constexpr int64_t kSumBytes = 16 * 1024;  // of a chunk's sums

// Output pixels, about, whose products are added one by one there: few, so that the sum is as exact as oneDNN's, and
// more where it is a sum of many short ones anyway (benchmarks/notes).
inline int64_t short_sum(const ConvShape& k) { return k.N * k.P * k.Q <= 4096 ? 64 : 256; }

// The functions for a kernel width. A kernel row longer than kMaxTaps takes several passes, of `taps` or taps - 1 taps.
template <typename T>
struct NhwcGradWeightKernel {
  using Function = void (*)(const ConvShape&, const NhwcGradWeightBlock<T>&);
  struct Functions {
    Function by_rows[4] = {};  // for 1, 2 and 3 kernel rows
    int max_rows = 0;
  };
  Functions longer, shorter;  // for passes of `taps`, and of one tap less
  int64_t passes = 1, taps = 0;
  bool once = false;                                                  // the functions are block_once
  bool ahead = false;                                                 // fetch what comes next meanwhile
  void (*stream)(const ConvShape&, const StreamedRow<T>&) = nullptr;  // rather than tiles

  explicit NhwcGradWeightKernel(const ConvShape& k) {
    if (k.C < kLanes<accumulate_t<T>> || (k.dilation_w != 1 && k.S > 1) || k.stride_w > 2) return;
    const int64_t bytes = k.N * k.C * (k.H * k.W + k.P * k.Q) * static_cast<int64_t>(sizeof(T));
    const bool far = bytes > kNearBytes;  // x and grad_y come from memory
    // Near data keep a small kernel supplied that loads each pixel once. Of pixels a multiple of 1 KiB apart, fetched
    // lines would share so few sets of the first-level cache that they drive each other out.
    const bool supplied = bytes <= kNearBytes / 2 || k.stride_w > 1 || k.C * sizeof(T) % 1024 == 0;
    ahead = far || k.S > 3 || SEPCONV_ISA_LEVEL < 2 || !supplied;
    const bool dense = SEPCONV_ISA_LEVEL == 2 && k.dilation_h == 1;  // both need 32 registers
    if (dense && streams(k, far)) stream = streaming(k);
    // block is better than block_once at waiting for memory, which counts where the kernel is small; but it takes the
    // output rows apart that see different kernel rows, and those are many where the kernel is large.
    once = dense && k.stride_h == 1 && k.stride_w == 1 && (k.R > kMaxTaps || k.R >= k.H || (k.R <= 3 && !far));
    passes = (k.S + kMaxTaps - 1) / kMaxTaps;
    taps = (k.S + passes - 1) / passes;
    longer = functions(taps, k.stride_w), shorter = functions(taps - 1, k.stride_w);
    if (taps * passes != k.S && shorter.max_rows == 0) longer = {};
  }
  bool generic() const { return longer.max_rows == 0; }
  // How many kernel rows to take together of those left: rather 2 + 2 than 3 + 1.
  int64_t rows_of(int64_t left) const { return std::min<int64_t>(left == 4 ? 2 : left, longer.max_rows); }

 private:
  // Measured (benchmarks/notes). At stride 1 the sums weigh more, and rows are streamed only where tiles suffer, whose
  // pixels share cache sets or lie about a memory page apart; of a 3x3 kernel only where they come from memory, too. At
  // stride 2 always, or of near data and larger kernels alone.
  static bool streams(const ConvShape& k, bool far) {
    if (k.R > k.H || k.stride_h != k.stride_w) return false;
    const int64_t pixel = k.C * static_cast<int64_t>(sizeof(T));
    if (k.stride_w > 1) return likes_long_runs() || (k.S > 3 && !far);
    return (far || k.S > 3) && (pixel % 512 == 0 || pixel >= 1792);
  }
  auto streaming(const ConvShape& k) const -> decltype(stream) {
    if constexpr (SEPCONV_ISA_LEVEL == 2) {
      switch (k.S * 2 + k.stride_w) {
        case 7: return stream_row<T, 3, 1>;
        case 8: return stream_row<T, 3, 2>;
        case 11: return stream_row<T, 5, 1>;
        case 12: return stream_row<T, 5, 2>;
        case 15: return stream_row<T, 7, 1>;
        case 16: return stream_row<T, 7, 2>;
      }
    }
    return nullptr;
  }
  // Kernel rows whose sums are kept in registers together: the more of them, the more additions are independent.
  template <int kTaps, int kStride>
  Functions make() const {
    constexpr int kMax = SEPCONV_ISA_LEVEL == 2 ? 3 : std::clamp(12 / kTaps, 1, 3);
    if constexpr (SEPCONV_ISA_LEVEL == 2 && kStride == 1) {
      constexpr int kMaxOnce = std::clamp(31 / (kTaps + kColumns), 1, 3);
      if (once) {
        return {{nullptr, block_once<T, kTaps, 1, 1>, block_once<T, kTaps, 1, std::min(2, kMaxOnce)>,
                 block_once<T, kTaps, 1, kMaxOnce>},
                kMaxOnce};
      }
    }
    return {{nullptr, block<T, kTaps, kStride, 1>, block<T, kTaps, kStride, std::min(2, kMax)>,
             block<T, kTaps, kStride, kMax>},
            kMax};
  }
  Functions functions(int64_t taps, int64_t stride) const {
    switch (taps * 2 + stride) {
      case 3: return make<1, 1>();
      case 5: return make<2, 1>();
      case 7: return make<3, 1>();
      case 9: return make<4, 1>();
      case 11: return make<5, 1>();
      case 13: return make<6, 1>();
      case 15: return make<7, 1>();
      case 8: return make<3, 2>();
      case 12: return make<5, 2>();
      case 16: return make<7, 2>();
      default: return {};
    }
  }
};

// How the work is cut. Depends on the shape alone; into equal tasks for a few threads, where the shape lets itself.
struct Partition {
  int64_t vectors, chunks;        // of channels
  int64_t images, strips, parts;  // `images` groups of images, each image in `strips` strips of rows
  Partition(const ConvShape& k, int64_t lanes, int64_t sum_bytes) {
    // A part costs R * S sums a channel to clear and to add: no more of them than the work is worth.
    const int64_t worth = k.N * k.P * k.Q / (16 * k.R * k.S) + 1;
    vectors = (k.C + lanes - 1) / lanes;
    const int64_t fit = std::max<int64_t>(kSumBytes / (k.R * k.S * lanes * sum_bytes + 1), 1);
    const int64_t wide = vectors / std::max<int64_t>(kTasks / worth, 1);  // as wide as leaves enough tasks
    const int64_t chunk = std::clamp<int64_t>(std::min(fit, std::max(wide, kMinChunk)), 1, vectors);
    chunks = (vectors + chunk - 1) / chunk;
    if (chunks > 4) chunks = chunks / 4 * 4 * fit >= vectors ? chunks / 4 * 4 : std::min((chunks + 3) / 4 * 4, vectors);
    const int64_t wanted = std::min((kTasks + chunks - 1) / chunks, worth);
    images = std::clamp<int64_t>(k.N, 1, wanted);
    for (int64_t fewer = images; 2 * fewer > images; --fewer) {
      if (k.N % fewer == 0) {
        images = fewer;
        break;
      }
    }
    strips = std::clamp<int64_t>(wanted / images, 1, std::max<int64_t>(k.P / kRowGroup, 1));
    parts = images * strips;
  }
  int64_t first_vector(int64_t chunk) const { return vectors * chunk / chunks; }
};

// Adds the parts up, one channel vector a task: kLanes taps of kLanes channels at a time, turned into the weight's
// order.
template <typename T>
struct ReduceTask {
  using A = accumulate_t<T>;
  const ConvShape& k;
  const Partition& cut;
  const A* sums;
  T* grad_w;
  void operator()(int64_t v) const {
    constexpr int L = kLanes<A>;
    const int64_t c = first_channel<A>(k, v), lane0 = v * L - c;  // the lanes before it are the vector before's
    const int64_t lanes = std::min<int64_t>(L, k.C), taps = k.R * k.S;
    const bool dense = k.w.w == 1 && k.w.h == k.S;
    for (int64_t tap = 0; tap < taps; tap += L) {
      const int count = static_cast<int>(std::min<int64_t>(taps - tap, L));
      Vector<A> rows[L];
      for (int i = 0; i < L; ++i) rows[i] = i < count ? sum_of(v * taps + tap + i) : Vector<A>{};
      transpose<A>(rows);
      for (int64_t i = lane0; i < lanes; ++i) {
        T* to = grad_w + (c + i) * k.w.n;
        if (dense) {
          store_first(to + tap, rows[i], count);
          continue;
        }
        A values[L];
        store(values, rows[i]);
        for (int j = 0; j < count; ++j) store_one(to + (tap + j) / k.S * k.w.h + (tap + j) % k.S * k.w.w, values[j]);
      }
    }
  }

 private:
  Vector<A> sum_of(int64_t number) const {
    const int64_t part_size = cut.vectors * k.R * k.S * kLanes<A>;
    const A* from = sums + number * kLanes<A>;
    Vector<A> sum = load(from);
    for (int64_t part = 1; part < cut.parts; ++part) sum += load(from + part * part_size);
    return sum;
  }
};

template <typename T>
struct SumTask {
  using A = accumulate_t<T>;
  const ConvShape& k;
  const NhwcGradWeightKernel<T>& kernel;
  const Partition& cut;
  const T* grad_y;
  const T* x;
  A* sums;  // [parts, vectors, R, S, kLanes]
  T* grad_w;

  void operator()(int64_t task) const {
    const int64_t part = task / cut.chunks, chunk = task % cut.chunks;
    const int64_t v0 = cut.first_vector(chunk), v1 = cut.first_vector(chunk + 1);
    add_part(part, v0, v1);
    if (cut.parts > 1) return;
    const ReduceTask<T> reduce{k, cut, sums, grad_w};
    for (int64_t v = v0; v < v1; ++v) reduce(v);
  }

 private:
  void add_part(int64_t part, int64_t v0, int64_t v1) const {
    const int64_t size = k.R * k.S * kLanes<A>;
    A* own = sums + part * cut.vectors * size;
    std::fill(own + v0 * size, own + v1 * size, A(0));
    const int64_t group = part / cut.strips, strip = part % cut.strips;
    const int64_t p0 = k.P * strip / cut.strips, p1 = k.P * (strip + 1) / cut.strips;
    const int64_t n0 = k.N * group / cut.images, n1 = k.N * (group + 1) / cut.images;
    if (kernel.stream != nullptr) {
      std::vector<A> recent((v1 - v0) * size);
      // Long runs, as far as the sums that a row meets leave the first-level cache room for its tiles.
      const int64_t most = k.S <= 3 || k.stride_w == 2 ? 12 : 8, pieces = (v1 - v0 + most - 1) / most;
      for (int64_t n = n0; n < n1; ++n) {
        for (int64_t i = 0; i < pieces; ++i) {
          const int64_t v = v0 + (v1 - v0) * i / pieces, end = v0 + (v1 - v0) * (i + 1) / pieces;
          add_streamed(n, n - n0, p0, p1, v, end, recent.data() + (v - v0) * size, own + v * size);
        }
      }
      move_sums(recent.data(), own + v0 * size, (v1 - v0) * size);
      return;
    }
    const int64_t groups = std::max<int64_t>((p1 - p0 + kRowGroup / 2) / kRowGroup, 1);
    for (int64_t n = n0; n < n1; ++n) {
      for (int64_t i = 0; i < groups; ++i) {
        add_group(n, p0 + (p1 - p0) * i / groups, p0 + (p1 - p0) * (i + 1) / groups, v0, v1, own);
      }
    }
  }

  static void move_sums(A* from, A* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      store(to + i, load(to + i) + load(from + i));
      store(from + i, Vector<A>{});
    }
  }

  // Output rows [p0, p1) of image n, channel vectors [v0, v1), input row by input row. `recent` and `sums` are of
  // vector v0 on: after some rows, counted over the task's images (`done` of them came before), the one moves to the
  // other.
  void add_streamed(int64_t n, int64_t done, int64_t p0, int64_t p1, int64_t v0, int64_t v1, A* recent, A* sums) const {
    const int64_t top = p0 * k.stride_h, bottom = (p1 - 1) * k.stride_h;  // of the padded image
    const int64_t begin = std::max<int64_t>(top - k.pad_h, 0), end = std::min(bottom - k.pad_h + k.R, k.H);
    const int64_t together = std::max<int64_t>(short_sum(k) * k.stride_h / k.Q, 1);
    for (int64_t h = begin; h < end; ++h) {
      if ((done * (end - begin) + h - begin + 1) % together == 0) {
        move_sums(recent, sums, (v1 - v0) * k.R * k.S * kLanes<A>);
      }
      // Padded row `row` meets kernel row r and output row (row - r) / stride_h, where that is one of [p0, p1).
      const int64_t row = h + k.pad_h, r0 = std::max(row - bottom, row % k.stride_h);
      const int64_t last = std::min(k.R - 1, row - top);
      if (r0 > last) continue;
      kernel.stream(k, {x + n * k.x.n + h * k.x.h, grad_y + n * k.y.n + (row - r0) / k.stride_h * k.y.h,
                        recent + r0 * k.S * kLanes<A>, (last - r0) / k.stride_h + 1, v0, v1, kernel.ahead});
    }
  }

  // Output rows [p, end) of image n, channel vectors [v0, v1), in tiles.
  void add_group(int64_t n, int64_t p, int64_t end, int64_t v0, int64_t v1, A* sums) const {
    for (int64_t q = 0; q < k.Q; q += kColumns) {
      for (int64_t v = v0; v < v1; ++v) {
        const int64_t c = first_channel<A>(k, v);
        NhwcGradWeightBlock<T> b{x + n * k.x.n + c, grad_y + n * k.y.n + c, sums + v * k.R * k.S * kLanes<A>};
        b.p0 = p, b.p1 = end, b.q = q;
        b.count = static_cast<int>(std::min<int64_t>(kColumns, k.Q - q));
        // Next come the next vector of the same pixels, or the first vector of the next ones.
        const bool last = v + 1 == v1;
        if (kernel.ahead && (!last || q + kColumns < k.Q)) {
          const int64_t channels = first_channel<A>(k, last ? v0 : v + 1) - c;
          b.grad_y_ahead = channels + (last ? kColumns * k.y.w : 0);
          b.x_ahead = channels + (last ? kColumns * k.stride_w * k.x.w : 0);
        }
        if (kernel.once) {
          add_once(b);
        } else {
          add_runs(b);
        }
      }
    }
  }

  // Kernel rows whose input row exists for output row p: [first, end).
  int64_t first_row(int64_t p) const {
    const int64_t row = p * k.stride_h - k.pad_h;
    return row >= 0 ? 0 : std::min(k.R, (-row + k.dilation_h - 1) / k.dilation_h);
  }
  int64_t end_row(int64_t p) const {
    const int64_t row = p * k.stride_h - k.pad_h;
    return row < k.H ? std::min(k.R, (k.H - row + k.dilation_h - 1) / k.dilation_h) : 0;
  }

  // All passes for `rows` kernel rows from b.r0 on.
  void add_passes(NhwcGradWeightBlock<T>& b, int64_t rows) const {
    b.s0 = 0;
    for (int64_t pass = 0; pass < kernel.passes; ++pass) {
      const int64_t s1 = k.S * (pass + 1) / kernel.passes;
      const auto& functions = s1 - b.s0 == kernel.taps ? kernel.longer : kernel.shorter;
      functions.by_rows[rows](k, b);
      b.s0 = s1;
      ++b.call;
    }
  }

  // A tile by block_once.
  void add_once(NhwcGradWeightBlock<T>& b) const {
    const int64_t p0 = b.p0, p1 = b.p1, max_rows = kernel.longer.max_rows;
    b.calls = (k.R + max_rows - 1) / max_rows * kernel.passes;
    for (int64_t rows; b.r0 < k.R; b.r0 += rows) {
      rows = kernel.rows_of(k.R - b.r0);
      // Output rows that one of these kernel rows joins with an input row.
      b.p0 = std::max(p0, k.pad_h - (b.r0 + rows - 1));
      b.p1 = std::min(p1, k.H + k.pad_h - b.r0);
      if (b.p0 < b.p1) add_passes(b, rows);
    }
  }

  // A tile by block or block_generic, in runs of output rows that see the same kernel rows.
  void add_runs(NhwcGradWeightBlock<T>& b) const {
    const int64_t end = b.p1, x_ahead = b.x_ahead, newest = (k.R - 1) * k.dilation_h * k.x.h;
    for (int64_t p = b.p0; p < end; p = b.p1) {
      const int64_t first = first_row(p), last = end_row(p);
      b.p0 = p, b.p1 = p + 1;
      while (b.p1 < end && first_row(b.p1) == first && end_row(b.p1) == last) ++b.p1;
      if (first >= last) continue;
      if (kernel.generic()) {
        b.r0 = first, b.rows = last - first;
        block_generic(k, b);
        continue;
      }
      const int64_t max_rows = kernel.longer.max_rows;
      b.calls = (last - first + max_rows - 1) / max_rows * kernel.passes, b.call = 0;
      int64_t rows;
      for (b.r0 = first; b.r0 < last; b.r0 += rows) {
        rows = kernel.rows_of(last - b.r0);
        b.x_ahead = x_ahead == 0 ? 0 : x_ahead + newest - b.r0 * k.dilation_h * k.x.h;
        add_passes(b, rows);
      }
    }
  }
};

template <typename T>
void grad_weight_typed(const ConvShape& shape, const T* grad_y, const T* x, T* grad_w) {
  using A = accumulate_t<T>;
  const NhwcGradWeightKernel<T> kernel(shape);
  const Partition cut(shape, kLanes<A>, sizeof(A));
  const std::unique_ptr<A[]> sums(new A[cut.parts * cut.vectors * shape.R * shape.S * kLanes<A>]);
  parallel(cut.parts * cut.chunks, SumTask<T>{shape, kernel, cut, grad_y, x, sums.get(), grad_w});
  if (cut.parts > 1) parallel(cut.vectors, ReduceTask<T>{shape, cut, sums.get(), grad_w});
}

void grad_weight(const ConvShape& shape, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    grad_weight_typed(shape, static_cast<const T*>(grad_y), static_cast<const T*>(x), static_cast<T*>(grad_w));
  });
}

#endif
