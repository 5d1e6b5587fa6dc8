// What the kernels of depthwise_nchw*.cu share: a block's tile, and its way in and out of shared memory.
//
// A block owns `planes` neighbouring whole planes of the image that it writes, or a band of rows of one plane. Where
// rows are dense (and planes, where there are several), what it writes is one contiguous range of memory, and so is
// what it reads. The range that is read comes in by 16-byte asynchronous copies, exactly as it lies in memory and at
// the same offset from a 16-byte boundary: rows of any width follow each other without gaps. Blocks are small (one tile
// each) and several of them share a multiprocessor, so that while some compute, the tiles of the others are on their
// way. Then every thread walks down a few columns of one plane, with the edges of the image as a mask of its columns.
// Results wait in shared memory as they lie in memory, and leave by stores of whole vectors.
#pragma once

#include "core/correlation.h"
#include "cuda/depthwise/nchw/cut.h"
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {

inline constexpr int kNchwThreads = 256;  // at most, of a block

// "in" is the image that is read and "out" the image that is written: grad_y and grad_x for grad_input. Rows are dense.
struct PlaneArgs {
  int64_t in_n, in_c, out_n, out_c;  // strides, in elements
  int in_rows, in_columns, out_rows, out_columns;
  int pad_h, pad_w;
  int channels;  // of out
  int rows;      // that a thread walks down
  int band;      // rows of a block, from its planes' first
  int planes;    // of a block; 1 where the band is not the whole plane
  int in_bytes, out_bytes, filter_bytes;
  FastDiv by_runs, by_strips;   // threads: runs of columns fastest, strips of a band, planes
  FastDiv by_bands, by_groups;  // blocks: bands fastest, groups of planes of an image, images
  FastDiv by_multiplier;
  bool turned;  // read the filter from its last tap to its first
};

// `band_row` is the first row of the band.
struct PlaneBlock {
  int n, first, planes, band_row;
  __device__ __forceinline__ explicit PlaneBlock(const PlaneArgs& a) {
    uint32_t band = blockIdx.x;
    uint32_t group = a.by_bands.split(band);
    n = static_cast<int>(a.by_groups.split(group));
    first = static_cast<int>(group) * a.planes;
    planes = min(a.planes, a.channels - first);
    band_row = static_cast<int>(band) * a.band;
  }
};

// A thread's run of columns, its strip and its plane, all counted from the block's first.
struct PlaneThread {
  int run, strip, plane;
  __device__ __forceinline__ PlaneThread(const PlaneArgs& a, int item) {
    uint32_t i = static_cast<uint32_t>(item);
    uint32_t strips = a.by_runs.split(i);
    plane = static_cast<int>(a.by_strips.split(strips));
    run = static_cast<int>(i), strip = static_cast<int>(strips);
  }
};

// Elements between the 16-byte boundary before p and p.
template <typename T>
__device__ __forceinline__ int elements_off(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// A range of memory cut into aligned pieces of kN elements, counted from the last 16-byte boundary at or before `p`.
template <typename T, int kN = kVec16<T>>
struct Pieces {
  int begin, whole, whole_end;  // the first in elements, the others in pieces
  int single;  // the ends, less than a piece each, go by elements: one for each of the first threads, or -1
  __device__ __forceinline__ Pieces(const T* p, int count) : begin(elements_off(p)) {
    const int end = begin + count, t = static_cast<int>(threadIdx.x);
    whole = ceil_div(begin, kN), whole_end = end / kN;
    const int head = min(whole * kN, end) - begin;
    const int i = t < head ? begin + t : max(whole, whole_end) * kN + t - head;
    single = i < end ? i : -1;
  }
};

// A range on its way to tile + elements_off(from). The tile is on a 16-byte boundary. To begin all ranges before the
// first is waited for, a block calls begin() for each, load() for each, and only then store().
template <typename T>
struct StagedRange {
  T* const tile;
  const T* const base;
  const Pieces<T> pieces;
  T end;
  __device__ __forceinline__ StagedRange(T* to, const T* __restrict__ from, int count)
      : tile(to), base(from - elements_off(from)), pieces(from, count) {}
  __device__ __forceinline__ void begin() const {
#pragma unroll 1
    for (int i = pieces.whole + static_cast<int>(threadIdx.x); i < pieces.whole_end;
         i += static_cast<int>(blockDim.x)) {
      cp_async16(reinterpret_cast<uint4*>(tile) + i, reinterpret_cast<const uint4*>(base) + i, true);
    }
  }
  __device__ __forceinline__ void load() {
    if (pieces.single >= 0) end = base[pieces.single];
  }
  __device__ __forceinline__ void store() const {
    if (pieces.single >= 0) tile[pieces.single] = end;
  }
};

// The taps of a dense filter in shared memory, turned around or not.
template <int kKernel, typename T>
__device__ __forceinline__ void load_filter(float (&taps)[kKernel][kKernel], const T* filter, bool turned) {
  constexpr int kTaps = kKernel * kKernel;
  if (turned) {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) taps[i / kKernel][i % kKernel] = to_acc(filter[kTaps - 1 - i]);
  } else {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) taps[i / kKernel][i % kKernel] = to_acc(filter[i]);
  }
}

// Bit i: column first + i is one of `columns`, for i in [0, kCount).
template <int kCount>
__device__ __forceinline__ uint32_t columns_inside(int first, int columns) {
  const int begin = min(max(-first, 0), kCount), end = min(max(columns - first, 0), kCount);
  return ((1u << end) - 1) & ~((1u << begin) - 1);
}

// Neighbouring values of a row; those that the mask leaves out stay what they are.
template <int kCount, typename T>
__device__ __forceinline__ void load_run(float (&values)[kCount], const T* row, uint32_t inside) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (inside >> i & 1) values[i] = to_acc(row[i]);
  }
}
template <int kCount, typename T>
__device__ __forceinline__ void store_run(T* row, const float (&values)[kCount], uint32_t inside) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (inside >> i & 1) row[i] = from_acc<T>(values[i]);
  }
}

// ---- on the host

// "in" and "out" of the map; a band has cut.strips strips.
inline PlaneArgs make_plane_args(Map map, const Launch& call, const NchwCut& cut) {
  const ConvShape& shape = call.shape;
  const NchwWork work = nchw_work(map, shape);
  const Strides &in = map == Map::forward ? shape.x : shape.y, &out = map == Map::forward ? shape.y : shape.x;
  const NchwMemory memory = nchw_memory(work, shape, call.dtype, cut.rows * cut.strips, cut.planes);
  PlaneArgs a{};
  a.in_n = in.n, a.in_c = in.c, a.out_n = out.n, a.out_c = out.c;
  a.in_rows = static_cast<int>(work.in_rows), a.in_columns = static_cast<int>(work.in_columns);
  a.out_rows = static_cast<int>(work.rows), a.out_columns = static_cast<int>(work.columns);
  a.pad_h = static_cast<int>(shape.pad_h), a.pad_w = static_cast<int>(shape.pad_w);
  a.channels = static_cast<int>(work.channels);
  a.rows = cut.rows, a.band = cut.rows * cut.strips, a.planes = cut.planes;
  a.in_bytes = static_cast<int>(memory.in), a.out_bytes = static_cast<int>(memory.out);
  a.filter_bytes = static_cast<int>(memory.filters);
  a.by_runs = FastDiv(work.runs), a.by_strips = FastDiv(cut.strips);
  a.by_bands = FastDiv(ceil_div<int64_t>(work.steps, a.band));
  a.by_groups = FastDiv(ceil_div<int64_t>(work.channels, a.planes));
  a.by_multiplier = FastDiv(shape.K / shape.C);
  return a;
}

inline LaunchConfig plane_config(Map map, const Launch& call, const PlaneArgs& a) {
  const ConvShape& shape = call.shape;
  const int64_t items = int64_t{a.planes} * a.by_strips.divisor * a.by_runs.divisor;
  const int64_t passes = ceil_div<int64_t>(items, kNchwThreads);
  const auto threads = static_cast<unsigned>(ceil_div<int64_t>(items, passes * 32) * 32);
  const auto blocks = static_cast<unsigned>(shape.N * a.by_groups.divisor * a.by_bands.divisor);
  const int64_t bytes = nchw_memory(nchw_work(map, shape), shape, call.dtype, a.band, a.planes).bytes();
  return {dim3(blocks), dim3(threads), static_cast<size_t>(bytes), call.stream};
}

// Calls f(type, kernel) with the two as types.
template <typename F>
cudaError_t dispatch_nchw(DType dtype, int64_t kernel, F&& f) {
  if (dtype == DType::float64) return cudaErrorInvalidValue;
  const auto with_kernel = [&](auto tag) {
    switch (kernel) {
      case 3: return f(tag, Int<3>{});
      case 5: return f(tag, Int<5>{});
      case 7: return f(tag, Int<7>{});
      default: return cudaErrorInvalidValue;
    }
  };
  return dtype == DType::float32 ? with_kernel(TypeTag<float>{}) : dispatch_half(dtype, with_kernel);
}

}  // namespace sepconv::cuda
