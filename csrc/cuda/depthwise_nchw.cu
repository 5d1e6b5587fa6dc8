// Depthwise forward and grad_input, columns dense in memory (contiguous), kernels 3x3, 5x5 and 7x7.
//
// Thread-to-data map. A thread walks down one output column (grad_input of stride 2: a pair of columns) of one plane
// for `rows` rows. Neighbouring threads take neighbouring columns, then the next strip of rows, then the next plane,
// so that no lane idles on narrow planes (7x7, 14x14) and a warp's loads are whole runs of a row. The filter is in
// registers. Every image row is loaded once on the way down, and added at once to all outputs that it meets: these
// partial outputs are a ring of registers, whose last one is complete after each step, is stored, and leaves the
// ring.
#include "common.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 256;

// Blocks a multiprocessor that the registers of a window leave room for.
template <typename T, int kKernel>
inline constexpr int kBlocks = sizeof(T) == 8 ? 1
                               : kKernel == 3 ? 4
                               : kKernel == 5 ? 3
                                              : 2;

// "in" is the image that is read and "out" the image that is written: grad_y and grad_x for grad_input.
struct Args {
  int64_t in_n, in_c, out_n, out_c;  // strides, in elements
  int in_h, out_h;
  int in_rows, in_columns, out_rows, out_columns;
  int pad_h, pad_w;
  int rows;
  int64_t threads;  // planes * strips * columns, or pairs of columns
  FastDiv by_columns, by_strips, by_channels, by_multiplier;
  int64_t w_n, w_h, w_w;
  bool turned;  // read the filter from its last tap to its first
};

struct Place {
  int column, row, n, c;
};

__device__ __forceinline__ Place find_place(const Args& a, uint32_t thread) {
  uint32_t column = thread;
  uint32_t strip = a.by_columns.split(column);
  uint32_t c = a.by_strips.split(strip);
  const uint32_t n = a.by_channels.split(c);
  return {static_cast<int>(column), static_cast<int>(strip) * a.rows, static_cast<int>(n), static_cast<int>(c)};
}

template <typename T, int kKernel>
__device__ __forceinline__ void load_filter(const Args& a, acc_t<T> (&taps)[kKernel][kKernel],
                                            const T* __restrict__ w) {
#pragma unroll
  for (int r = 0; r < kKernel; ++r) {
#pragma unroll
    for (int s = 0; s < kKernel; ++s) {
      const int from_r = a.turned ? kKernel - 1 - r : r, from_s = a.turned ? kKernel - 1 - s : s;
      taps[r][s] = to_acc(w[from_r * a.w_h + from_s * a.w_w]);
    }
  }
}

// kCount neighbouring values of an image row, zero outside the image.
template <typename T, int kCount>
__device__ __forceinline__ void load_row(const Args& a, acc_t<T> (&values)[kCount], const T* __restrict__ image,
                                         int row, int column) {
  const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(a.in_rows);
  const T* p = image + (inside ? row : 0) * a.in_h;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool valid = inside && static_cast<unsigned>(column + i) < static_cast<unsigned>(a.in_columns);
    values[i] = valid ? to_acc(p[column + i]) : acc_t<T>(0);
  }
}

// Step j adds the padded rows kStride * j ... to the outputs p = j, j - 1, ...; ring[i] is output p = j - i.
template <typename T, int kKernel, int kStride>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kKernel>)
    forward_kernel(const Args a, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                   const Activation activation, T* __restrict__ y) {
  using A = acc_t<T>;
  constexpr int kRing = (kKernel - 1) / kStride + 1;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= a.threads) return;
  const Place place = find_place(a, static_cast<uint32_t>(thread));
  A taps[kKernel][kKernel];
  load_filter<T, kKernel>(a, taps, w + place.c * a.w_n);
  const A add = bias != nullptr ? to_acc(bias[place.c]) : A(0);
  const T* image = x + place.n * a.in_n + a.by_multiplier.div(place.c) * a.in_c;
  T* out = y + place.n * a.out_n + place.c * a.out_c + place.column;
  const int column = place.column * kStride - a.pad_w;
  const int last_row = min(place.row + a.rows, a.out_rows);

  A ring[kRing] = {};
#pragma unroll 2
  for (int j = place.row; j < last_row + kRing - 1; ++j) {
#pragma unroll
    for (int phase = 0; phase < kStride; ++phase) {
      A values[kKernel];
      load_row<T, kKernel>(a, values, image, kStride * j + phase - a.pad_h, column);
#pragma unroll
      for (int r = phase; r < kKernel; r += kStride) {
#pragma unroll
        for (int s = 0; s < kKernel; ++s) ring[(r - phase) / kStride] += values[s] * taps[r][s];
      }
    }
    const int p = j - (kRing - 1);
    if (p >= place.row) {
      A result[1] = {ring[kRing - 1] + add};
      activate_all(activation, result);
      out[p * a.out_h] = from_acc<T>(result[0]);
    }
#pragma unroll
    for (int i = kRing - 1; i > 0; --i) ring[i] = ring[i - 1];
    ring[0] = 0;
  }
}

// grad_input of stride 2. With v = h + pad_h and u = w + pad_w, grad_y[p, q] * w[r, s] goes to grad_x[v = 2 p + r,
// u = 2 q + s]. A thread owns the columns u and u + 1, u even; step p adds row p of grad_y to ring[i], the row
// v = 2 p + i; the first two rows of the ring are then complete.
template <typename T, int kKernel>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kKernel>)
    grad_input_stride2_kernel(const Args a, const T* __restrict__ grad_y, const T* __restrict__ w,
                              T* __restrict__ grad_x) {
  using A = acc_t<T>;
  constexpr int kRing = kKernel + 1, kReach = (kKernel - 1) / 2;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= a.threads) return;
  const Place place = find_place(a, static_cast<uint32_t>(thread));
  A taps[kKernel][kKernel];
  load_filter<T, kKernel>(a, taps, w + place.c * a.w_n);
  const T* image = grad_y + place.n * a.in_n + place.c * a.in_c;
  T* out = grad_x + place.n * a.out_n + place.c * a.out_c;
  const int u = (a.pad_w & ~1) + 2 * place.column;
  const int first_v = (a.pad_h & ~1) + place.row;  // even: strips are
  const int end_v = min(first_v + a.rows, a.out_rows + a.pad_h);

  A ring[kRing][2] = {};
#pragma unroll 1
  for (int p = first_v / 2 - kReach; 2 * p < end_v; ++p) {
    A values[kReach + 1];
    load_row<T, kReach + 1>(a, values, image, p, u / 2 - kReach);
#pragma unroll
    for (int r = 0; r < kKernel; ++r) {
#pragma unroll
      for (int s = 0; s < kKernel; ++s) ring[r][s % 2] += values[kReach - s / 2] * taps[r][s];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int v = 2 * p + i, h = v - a.pad_h;
      if (v < first_v || v >= end_v || h < 0) continue;
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int column = u + o - a.pad_w;
        if (static_cast<unsigned>(column) < static_cast<unsigned>(a.out_columns)) {
          out[h * a.out_h + column] = from_acc<T>(ring[i][o]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
#pragma unroll
      for (int o = 0; o < 2; ++o) ring[i][o] = i + 2 < kRing ? ring[i + 2][o] : A(0);
    }
  }
}

// Everything that both directions share; in and out are (rows, columns, strides) of the images read and written.
Args make_args(const ConvShape& shape, const Tile& tile, int64_t in_rows, int64_t in_columns, const Strides& in,
               int64_t out_rows, int64_t out_columns, const Strides& out) {
  Args a{};
  a.in_n = in.n, a.in_c = in.c, a.in_h = static_cast<int>(in.h);
  a.out_n = out.n, a.out_c = out.c, a.out_h = static_cast<int>(out.h);
  a.in_rows = static_cast<int>(in_rows), a.in_columns = static_cast<int>(in_columns);
  a.out_rows = static_cast<int>(out_rows), a.out_columns = static_cast<int>(out_columns);
  a.pad_h = static_cast<int>(shape.pad_h), a.pad_w = static_cast<int>(shape.pad_w);
  a.rows = tile.rows;
  a.by_multiplier = FastDiv(shape.K / shape.C);
  a.w_n = shape.w.n, a.w_h = shape.w.h, a.w_w = shape.w.w;
  return a;
}

// `rows` and `columns` are what the threads of one plane walk over.
LaunchConfig make_config(const ConvShape& shape, Args& a, int64_t channels, int64_t rows, int64_t columns,
                         cudaStream_t stream) {
  const int64_t strips = ceil_div<int64_t>(rows, a.rows);
  a.threads = shape.N * channels * strips * columns;
  a.by_columns = FastDiv(columns);
  a.by_strips = FastDiv(strips);
  a.by_channels = FastDiv(channels);
  return {dim3(static_cast<unsigned>(ceil_div<int64_t>(a.threads, kThreads))), dim3(kThreads), 0, stream};
}

// Calls f(type, kernel) with the two as types.
template <typename F>
cudaError_t dispatch(DType dtype, int64_t kernel, F&& f) {
  return dispatch_dtype(dtype, [&](auto tag) {
    switch (kernel) {
      case 3: return f(tag, Int<3>{});
      case 5: return f(tag, Int<5>{});
      case 7: return f(tag, Int<7>{});
      default: return cudaErrorInvalidValue;
    }
  });
}

cudaError_t run_forward(const ConvShape& shape, DType dtype, Args a, int64_t stride, const void* in, const void* w,
                        const Epilogue& epilogue, void* out, cudaStream_t stream) {
  const LaunchConfig config = make_config(shape, a, shape.K, a.out_rows, a.out_columns, stream);
  return dispatch(dtype, shape.R, [&](auto tag, auto kernel) {
    using T = typename decltype(tag)::type;
    constexpr int kKernel = decltype(kernel)::value;
    const auto start = [&](auto function) {
      return launch(function, config, a, static_cast<const T*>(in), static_cast<const T*>(w),
                    static_cast<const T*>(epilogue.bias), epilogue.activation, static_cast<T*>(out));
    };
    return stride == 1 ? start(forward_kernel<T, kKernel, 1>) : start(forward_kernel<T, kKernel, 2>);
  });
}

}  // namespace

cudaError_t launch_depthwise_nchw_forward(const ConvShape& shape, DType dtype, const void* x, const void* w,
                                          const Epilogue& epilogue, void* y, const Tile& tile, cudaStream_t stream) {
  const Args a = make_args(shape, tile, shape.H, shape.W, shape.x, shape.P, shape.Q, shape.y);
  return run_forward(shape, dtype, a, shape.stride_h, x, w, epilogue, y, stream);
}

cudaError_t launch_depthwise_nchw_grad_input(const ConvShape& shape, DType dtype, const void* grad_y, const void* w,
                                             void* grad_x, const Tile& tile, cudaStream_t stream) {
  Args a = make_args(shape, tile, shape.P, shape.Q, shape.y, shape.H, shape.W, shape.x);
  if (shape.stride_h == 1) {
    a.turned = true;
    a.pad_h = static_cast<int>(shape.R - 1) - a.pad_h;
    a.pad_w = static_cast<int>(shape.S - 1) - a.pad_w;
    return run_forward(shape, dtype, a, 1, grad_y, w, Epilogue{}, grad_x, stream);
  }
  a.rows = ceil_div(tile.rows, 2) * 2;
  const LaunchConfig config = make_config(shape, a, shape.C, shape.H + (shape.pad_h & 1),
                                          ceil_div<int64_t>(shape.W + (shape.pad_w & 1), 2), stream);
  return dispatch(dtype, shape.R, [&](auto tag, auto kernel) {
    using T = typename decltype(tag)::type;
    return launch(grad_input_stride2_kernel<T, decltype(kernel)::value>, config, a, static_cast<const T*>(grad_y),
                  static_cast<const T*>(w), static_cast<T*>(grad_x));
  });
}

}  // namespace sepconv::cuda
