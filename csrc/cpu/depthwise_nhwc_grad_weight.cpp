// Depthwise convolution (multiplier 1) of channels_last images: gradient by the weight.
//
//   grad_w[c, r, s] = sum over n, p, q of
//       grad_y[n, p, q, c] * x[n, p * stride_h - pad_h + r * dilation_h, q * stride_w - pad_w + s * dilation_w, c]
//
// Loop-to-data map. A vector holds neighbouring channels. A task is a part of the N * P output rows and a chunk of
// the channels whose sums fit the first-level cache; inside it the loops go: a group of output rows, a block of
// kColumns output columns, channel vector, up to three kernel rows. The sums of those kernel rows stay in registers
// while the group of rows goes by; then they are added to the task's sums. So grad_y and x come from memory once, and
// a long sum is a sum of short ones.
//
// The parts depend on the shape alone, and are added in order by a second pass: the result does not depend on the
// number of threads.
#ifndef SEPCONV_KERNELS
#define SEPCONV_KERNELS "depthwise_nhwc_grad_weight.cpp"
#include "foreach_isa.h"

namespace sepconv::cpu {

void depthwise_nhwc_grad_weight(const ConvShape& shape, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  if (shape.C == 0) return;
  SEPCONV_BEST_ISA(grad_weight)(shape, dtype, grad_y, x, grad_w);
}

}  // namespace sepconv::cpu
#else

inline constexpr int kMaxTaps = 7;               // taps of a kernel row whose sums share registers
inline constexpr int kColumns = 7;               // output columns of a block; divides the widths 7, 14, 28, 56, 112
inline constexpr int64_t kRowGroup = 8;          // output rows that go by before sums leave their registers
inline constexpr int64_t kTasks = 32;            // parts x chunks aimed at
inline constexpr int64_t kMinChunk = 4;          // channel vectors
inline constexpr int64_t kSumBytes = 16 * 1024;  // of a chunk's sums

// Kernel rows whose sums are kept in registers together: the more of them, the more additions are independent.
constexpr int max_rows(int taps) { return SEPCONV_ISA_LEVEL == 2 ? 3 : std::clamp(12 / taps, 1, 3); }

// What one call of a block function sees: one channel vector, output rows [p0, p1), columns from q (`count` of them),
// kernel rows from r0 on and taps from s0 on, as many as the function is made for. All the input rows meant here
// exist.
template <typename T>
struct Block {
  const T* x;             // [H, W, C] of the image, at the vector's first channel
  const T* grad_y;        // [P, Q, C], likewise
  accumulate_t<T>* sums;  // [R, S, kLanes]
  int64_t p0, p1, q, r0 = 0, s0 = 0;
  int count;
  int64_t rows = 0;  // for the generic function: kernel rows from r0 on
  const T* x_ahead =
      nullptr;  // if not null: a pixel of x and one of grad_y, that the next block starts with; what output row p
  const T* grad_y_ahead;  // fetches lies p steps below
};

// Needs C >= kLanes and dilation_w 1.
template <typename T, int kTaps, int kStride, int kRows>
void block(const ConvShape& k, const Block<T>& b) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  const int64_t C = k.C, x_row = k.dilation_h * k.W * C, x_step = k.stride_h * k.W * C, y_row = k.Q * C;
  const int64_t column = b.q * kStride - k.pad_w + b.s0;  // of tap 0 of output column 0
  const int count = b.count;
  const int64_t from = -column, to = std::min<int64_t>(k.W - column, (count - 1) * kStride + kTaps);
  const T* x_first = b.x + ((b.p0 * k.stride_h - k.pad_h + b.r0 * k.dilation_h) * k.W + column) * C;
  const T* g = b.grad_y + (b.p0 * k.Q + b.q) * C;
  Vector<A> sums[kRows][kTaps] = {};
  for (int64_t p = b.p0; p < b.p1; ++p) {
    Vector<A> grads[kColumns];
    const T* g_pixel = g;
#pragma GCC unroll 8
    for (int q = 0; q < kColumns; ++q) {
      grads[q] = q < count ? load(g_pixel) : Vector<A>{};
      g_pixel += C;
    }
    const T* x = x_first;
#pragma GCC unroll 32
    for (int j = 0; j < (kColumns - 1) * kStride + kTaps; ++j) {
      if (j >= from && j < to) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vector<A> value = load(x + r * x_row);
#pragma GCC unroll 8
          for (int s = 0; s < kTaps; ++s) {
            if (j >= s && (j - s) % kStride == 0 && (j - s) / kStride < kColumns) {
              sums[r][s] += value * grads[(j - s) / kStride];
            }
          }
        }
      }
      x += C;
    }
    if (b.x_ahead != nullptr) {
      const T* x_ahead = b.x_ahead + p * x_step;
      const T* y_ahead = b.grad_y_ahead + p * y_row;
#pragma GCC unroll 32
      for (int j = 0; j < (kColumns - 1) * kStride + kTaps; ++j) {
        __builtin_prefetch(x_ahead);
        if (kStride == 2) __builtin_prefetch(x_ahead - k.W * C);
        x_ahead += C;
      }
#pragma GCC unroll 8
      for (int q = 0; q < kColumns; ++q) {
        __builtin_prefetch(y_ahead);
        y_ahead += C;
      }
    }
    x_first += x_step;
    g += y_row;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s) {
      A* sum = b.sums + ((b.r0 + r) * k.S + b.s0 + s) * L;
      store(sum, load(sum) + sums[r][s]);
    }
  }
}

// Any stride, dilation and number of channels.
template <typename T>
void block_generic(const ConvShape& k, const Block<T>& b) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  const int lanes = static_cast<int>(std::min<int64_t>(k.C, L));
  for (int64_t r = b.r0; r < b.r0 + b.rows; ++r) {
    for (int64_t s = 0; s < k.S; ++s) {
      Vector<A> sum{};
      for (int64_t p = b.p0; p < b.p1; ++p) {
        const int64_t row = p * k.stride_h - k.pad_h + r * k.dilation_h;
        for (int64_t q = b.q; q < b.q + b.count; ++q) {
          const int64_t column = q * k.stride_w - k.pad_w + s * k.dilation_w;
          if (column < 0 || column >= k.W) continue;
          sum +=
              load_first(b.grad_y + (p * k.Q + q) * k.C, lanes) * load_first(b.x + (row * k.W + column) * k.C, lanes);
        }
      }
      A* to = b.sums + (r * k.S + s) * L;
      store(to, load(to) + sum);
    }
  }
}

// The block functions for a kernel width. A kernel row longer than kMaxTaps takes several passes, of `taps` or taps -
// 1 taps.
template <typename T>
struct Kernel {
  using Function = void (*)(const ConvShape&, const Block<T>&);
  struct Functions {
    Function by_rows[4] = {};  // for 1, 2 and 3 kernel rows
    int max_rows = 0;
  };
  Functions longer, shorter;  // for passes of `taps`, and of one tap less
  int64_t passes = 1, taps = 0;

  explicit Kernel(const ConvShape& k) {
    if (k.C < kLanes<accumulate_t<T>> || (k.dilation_w != 1 && k.S > 1) || k.stride_w > 2) return;
    passes = (k.S + kMaxTaps - 1) / kMaxTaps;
    taps = (k.S + passes - 1) / passes;
    longer = functions(taps, k.stride_w), shorter = functions(taps - 1, k.stride_w);
    if (taps * passes != k.S && shorter.max_rows == 0) longer = {};
  }
  bool generic() const { return longer.max_rows == 0; }

 private:
  template <int kTaps, int kStride>
  static Functions make() {
    constexpr int kMax = max_rows(kTaps);
    return {{nullptr, block<T, kTaps, kStride, 1>, block<T, kTaps, kStride, std::min(2, kMax)>,
             block<T, kTaps, kStride, std::min(3, kMax)>},
            kMax};
  }
  static Functions functions(int64_t taps, int64_t stride) {
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

// How the work is cut. Depends on the shape alone.
struct Partition {
  int64_t vectors, chunk, chunks;  // of channels
  int64_t images, strips, parts;   // `images` groups of images, each image in `strips` strips of rows
  Partition(const ConvShape& k, int64_t lanes, int64_t sum_bytes) {
    // A part costs R * S sums a channel to clear and to add: no more of them than the work is worth.
    const int64_t worth = k.N * k.P * k.Q / (16 * k.R * k.S) + 1;
    vectors = (k.C + lanes - 1) / lanes;
    const int64_t fit = kSumBytes / (k.R * k.S * lanes * sum_bytes + 1);
    const int64_t wide = vectors / std::max<int64_t>(kTasks / worth, 1);  // as wide as leaves enough tasks
    chunk = std::clamp<int64_t>(std::min(fit, std::max(wide, kMinChunk)), 1, vectors);
    chunks = (vectors + chunk - 1) / chunk;
    chunk = (vectors + chunks - 1) / chunks;
    chunks = (vectors + chunk - 1) / chunk;
    const int64_t wanted = std::min((kTasks + chunks - 1) / chunks, worth);
    images = std::clamp<int64_t>(k.N, 1, wanted);
    strips = std::clamp<int64_t>(wanted / images, 1, k.P / kRowGroup + 1);
    parts = images * strips;
  }
};

template <typename T>
struct SumTask {
  using A = accumulate_t<T>;
  const ConvShape& k;
  const Kernel<T>& kernel;
  const Partition& cut;
  const T* grad_y;
  const T* x;
  A* sums;  // [parts, vectors, R, S, kLanes]

  void operator()(int64_t task) const {
    const int64_t part = task / cut.chunks, v0 = task % cut.chunks * cut.chunk,
                  v1 = std::min(v0 + cut.chunk, cut.vectors);
    const int64_t size = k.R * k.S * kLanes<A>;
    A* own = sums + part * cut.vectors * size;
    std::fill(own + v0 * size, own + v1 * size, A(0));
    const int64_t group = part / cut.strips, strip = part % cut.strips;
    for (int64_t n = k.N * group / cut.images; n < k.N * (group + 1) / cut.images; ++n) {
      const int64_t p0 = k.P * strip / cut.strips, p1 = k.P * (strip + 1) / cut.strips;
      const int64_t groups = (p1 - p0 + kRowGroup - 1) / kRowGroup;
      for (int64_t i = 0; i < groups; ++i) {
        add_group(n, p0 + (p1 - p0) * i / groups, p0 + (p1 - p0) * (i + 1) / groups, v0, v1, own);
      }
    }
  }

 private:
  // Output rows [p, end) of image n, channel vectors [v0, v1).
  void add_group(int64_t n, int64_t p, int64_t end, int64_t v0, int64_t v1, A* sums) const {
    Block<T> b;
    const T* x_ahead;
    for (b.q = 0; b.q < k.Q; b.q += kColumns) {
      b.count = static_cast<int>(std::min<int64_t>(kColumns, k.Q - b.q));
      for (int64_t v = v0; v < v1; ++v) {
        const int64_t c = first_channel(v);
        b.x = x + n * k.H * k.W * k.C + c;
        b.grad_y = grad_y + n * k.P * k.Q * k.C + c;
        b.sums = sums + v * k.R * k.S * kLanes<A>;
        // The next block is the next vector of the same pixels, or the first vector of the next ones.
        const bool last = v + 1 == v1;
        const int64_t q = last ? b.q + kColumns : b.q, c_next = last ? first_channel(v0) : first_channel(v + 1);
        const int64_t newest = (p == 0 ? 0 : k.R - 1) * k.dilation_h - (p == 0 ? 0 : k.pad_h);
        x_ahead = q >= k.Q ? nullptr : b.x + (newest * k.W + q * k.stride_w - k.pad_w) * k.C + c_next - c;
        b.grad_y_ahead = b.grad_y + q * k.C + c_next - c;
        add_rows(b, p, end, x_ahead);
      }
    }
  }

  int64_t first_channel(int64_t v) const {
    return std::max<int64_t>(std::min<int64_t>(v * kLanes<A>, k.C - kLanes<A>), 0);
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

  // Output rows [p, end), in runs that see the same kernel rows.
  void add_rows(Block<T>& b, int64_t p, int64_t end, const T* x_ahead) const {
    for (; p < end; p = b.p1) {
      const int64_t first = first_row(p), last = end_row(p);
      b.p0 = p, b.p1 = p + 1;
      while (b.p1 < end && first_row(b.p1) == first && end_row(b.p1) == last) ++b.p1;
      if (first >= last) continue;
      if (kernel.generic()) {
        b.r0 = first, b.rows = last - first;
        block_generic(k, b);
        continue;
      }
      b.s0 = 0;
      for (int64_t pass = 0; pass < kernel.passes; ++pass) {
        const int64_t s1 = k.S * (pass + 1) / kernel.passes;
        const auto& functions = s1 - b.s0 == kernel.taps ? kernel.longer : kernel.shorter;
        for (b.r0 = first; b.r0 < last;) {
          const int64_t left = last - b.r0;
          // Rather 2 + 2 rows than 3 + 1.
          const int64_t rows =
              left == 4 ? std::min(2, functions.max_rows) : std::min<int64_t>(left, functions.max_rows);
          b.x_ahead = b.r0 + rows == last && s1 == k.S ? x_ahead : nullptr;
          functions.by_rows[rows](k, b);
          b.r0 += rows;
        }
        b.s0 = s1;
      }
    }
  }
};

// Adds the parts up, one channel vector a task.
template <typename T>
struct ReduceTask {
  using A = accumulate_t<T>;
  const ConvShape& k;
  const Partition& cut;
  const A* sums;
  T* grad_w;
  void operator()(int64_t v) const {
    const int64_t c = std::max<int64_t>(std::min<int64_t>(v * kLanes<A>, k.C - kLanes<A>), 0);
    const int64_t lane0 = v * kLanes<A> - c;  // the lanes before it are the vector before's
    const int64_t lanes = std::min<int64_t>(kLanes<A>, k.C);
    const int64_t size = k.R * k.S * kLanes<A>;
    for (int64_t r = 0; r < k.R; ++r) {
      for (int64_t s = 0; s < k.S; ++s) {
        const A* from = sums + v * size + (r * k.S + s) * kLanes<A>;
        Vector<A> sum = load(from);
        for (int64_t part = 1; part < cut.parts; ++part) sum += load(from + part * cut.vectors * size);
        A values[kLanes<A>];
        store(values, sum);
        T* to = grad_w + c * k.w.n + r * k.w.h + s * k.w.w;
        for (int64_t i = lane0; i < lanes; ++i) store_one(to + i * k.w.n, values[i]);
      }
    }
  }
};

template <typename T>
void grad_weight_typed(const ConvShape& shape, const T* grad_y, const T* x, T* grad_w) {
  using A = accumulate_t<T>;
  const Kernel<T> kernel(shape);
  const Partition cut(shape, kLanes<A>, sizeof(A));
  const std::unique_ptr<A[]> sums(new A[cut.parts * cut.vectors * shape.R * shape.S * kLanes<A>]);
  parallel(cut.parts * cut.chunks, SumTask<T>{shape, kernel, cut, grad_y, x, sums.get()});
  parallel(cut.vectors, ReduceTask<T>{shape, cut, sums.get(), grad_w});
}

void grad_weight(const ConvShape& shape, DType dtype, const void* grad_y, const void* x, void* grad_w) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    grad_weight_typed(shape, static_cast<const T*>(grad_y), static_cast<const T*>(x), static_cast<T*>(grad_w));
  });
}

#endif
