// What the channels_last depthwise kernels share: how a walk down an image meets its outputs, the filter in shared
// memory, and one row's products.
//
// A thread walks down a few neighbouring output columns of one channel vector. It reads every image row once, and adds
// it at once to all output rows that the row meets: these partial outputs are a ring of registers, whose first row is
// complete after the step, is stored, and leaves the ring.
#pragma once

#include "core/correlation.h"
#include "cuda/depthwise/nhwc/cut.h"
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {

// Positions of a walk, the same along both axes. Input i and output o meet by the tap
//   i - kDown * o   at stride 1 and going down in size (stride 2);
//   o - kUp * i     going up (grad_input of stride 2): a tap of o's own parity, known at compile time as tiles begin at
//                   an even o.
// A step of the walk reads kDown rows and completes kUp.
template <int kTaps, int kDownBy, int kUpBy>
struct Walk {
  static constexpr int kKernel = kTaps, kDown = kDownBy, kUp = kUpBy;
  static constexpr int kColumns = nhwc_columns(kDown * kUp);  // of outputs
  static constexpr int kWindow =                              // columns of inputs that these meet
      kUp == 1 ? (kColumns - 1) * kDown + kKernel : (kColumns - 1) / kUp + (kKernel - 1) / kUp + 1;
  static constexpr int kRing = kUp == 1 ? (kKernel - 1) / kDown + 1 : kKernel;  // output rows under way
  static constexpr int kLag = kUp == 1 ? kRing - 1 : 0;  // step t has row kUp * t - kLag in the first row of the ring
  // Steps that reads are ahead of their use: a 3x3 step is short.
  static constexpr int kAhead = kKernel == 3 && kDown * kUp == 1 ? 2 : 1;

  // The tap by which row `in` of a step meets row `out` of the ring, and column `in` of the window column `out`; one
  // outside of 0 .. kKernel - 1 is none.
  __host__ __device__ static constexpr int row_tap(int in, int out) {
    return kUp == 1 ? in + kKernel - 1 - kDown * out : out;
  }
  __host__ __device__ static constexpr int column_tap(int in, int out) {
    return kUp == 1 ? in - kDown * out : out - kUp * in + kKernel - 1;
  }
  __host__ __device__ static constexpr bool meets(int tap) { return tap >= 0 && tap < kKernel; }
};

// Which of kCount columns lie in an image, as bits.
template <int kCount>
__device__ __forceinline__ int columns_inside(int first, int step, int size) {
  int bits = 0;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    if (static_cast<unsigned>(first + c * step) < static_cast<unsigned>(size)) bits |= 1 << c;
  }
  return bits;
}

// ---- channel vectors

// kVec channels of one pixel as they lie in memory: kept like this, a row that is read ahead takes half the registers.
template <typename T, int kVec>
struct Pixel {
  static_assert(kVec <= 2);
  static constexpr int kBytes = kVec * static_cast<int>(sizeof(T)), kWords = kBytes > 4 ? 2 : 1;
  uint32_t words[kWords];

  // Zeros where `inside` is zero: `from` is then not read.
  __device__ __forceinline__ void load(const char* from, uint32_t inside) {
    if constexpr (kWords == 2) {
      const uint2 both = load64_if(from, inside);
      words[0] = both.x, words[1] = both.y;
    } else {
      words[0] = kBytes == 4 ? load32_if(from, inside) : load16_if(from, inside);
    }
  }
  __device__ __forceinline__ void store(char* to) const {
    if constexpr (kWords == 2) {
      *reinterpret_cast<Vec<uint32_t, 2>*>(to) = {{words[0], words[1]}};
    } else if constexpr (kBytes == 4) {
      *reinterpret_cast<uint32_t*>(to) = words[0];
    } else {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0]);
    }
  }

  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i == 0 ? words[0] << 16 : words[0] & 0xffff0000u);
    } else {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(i == 0 ? words[0] : words[0] >> 16)));
    }
  }
  __device__ __forceinline__ void set(const float (&values)[kVec]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) words[i] = __float_as_uint(values[i]);
    } else {
      const Vec<T, 2> pair{{from_acc<T>(values[0]), from_acc<T>(values[kVec - 1])}};
      words[0] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
};

// ---- the filter

// The filters of a block's lanes in shared memory: [lane][R][S][kVec] in float. A kernel row takes whole vectors of
// four, a lane an odd number of them, so that eight neighbouring lanes read from all banks at once.
template <int kKernel, int kVec>
struct FilterLayout {
  static constexpr int kRow = (kKernel * kVec + 3) / 4 * 4;
  static constexpr int kLane = (kKernel * kRow / 4 | 1) * 4;
};

struct FilterSource {
  int64_t n, h, w;  // strides, in elements
  int channels;
  bool turned;  // from the last tap to the first
};

// Fills `filter` with the channels from `first` on, `lanes` vectors of them. Neighbouring threads take neighbouring
// taps of a kernel row, and the zeros after it; each walks down the rows of a few channels. All loads come before all
// stores.
template <int kThreads, int kMostLanes, int kKernel, int kVec, typename T>
__device__ __forceinline__ void stage_filter(float* filter, const FilterSource& from, const T* __restrict__ w,
                                             int first, int lanes) {
  using Layout = FilterLayout<kKernel, kVec>;
  constexpr int kTaps = Layout::kRow / kVec, kWide = kTaps <= 4 ? 4 : 8;
  constexpr int kAtOnce = kThreads / kWide, kPasses = ceil_div(kMostLanes * kVec, kAtOnce);
  const int channels = min(lanes * kVec, from.channels - first);
  const int s = static_cast<int>(threadIdx.x) % kWide, from_s = from.turned ? kKernel - 1 - s : s;
  const int64_t step = from.turned ? -from.h : from.h;
  float values[kPasses][kKernel];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int c = static_cast<int>(threadIdx.x) / kWide + pass * kAtOnce;
    const T* tap = w + (first + c) * from.n + from_s * from.w + (from.turned ? (kKernel - 1) * from.h : 0);
#pragma unroll
    for (int r = 0; r < kKernel; ++r, tap += step) {
      values[pass][r] = c < channels && s < kKernel ? to_acc(*tap) : 0.f;
    }
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int c = static_cast<int>(threadIdx.x) / kWide + pass * kAtOnce;
    if (c >= channels || s >= kTaps) continue;
#pragma unroll
    for (int r = 0; r < kKernel; ++r) {
      filter[c / kVec * Layout::kLane + r * Layout::kRow + s * kVec + c % kVec] = values[pass][r];
    }
  }
}

// ---- products

// Adds row `in` of a step to the ring. The first row of a step moves the ring on: kUp rows leave it, and new ones begin
// with `start`. That costs nothing, as the first product of each sum is added into the register of its new place.
template <typename W, int kVec>
__device__ __forceinline__ void add_row(float (&ring)[W::kRing][W::kColumns][kVec],
                                        const float (&window)[W::kWindow][kVec], const float (&start)[kVec],
                                        const float* filter, int in) {
  constexpr int kRow = FilterLayout<W::kKernel, kVec>::kRow;
  constexpr bool kPairs = kHasPairs && kVec == 2 && W::kKernel > 3;  // 3x3 waits for memory, not for issue
#pragma unroll
  for (int j = 0; j < W::kRing; ++j) {
    const int r = W::row_tap(in, j);
    if (!W::meets(r)) continue;
    float taps[kRow];
#pragma unroll
    for (int i = 0; i < kRow; i += 4) {
      const auto four = *reinterpret_cast<const Vec<float, 4>*>(filter + r * kRow + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) taps[i + k] = four.v[k];
    }
#pragma unroll
    for (int o = 0; o < W::kColumns; ++o) {
      float sums[kVec];
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        sums[v] = in > 0 ? ring[j][o][v] : j + W::kUp < W::kRing ? ring[j + W::kUp][o][v] : start[v];
#pragma unroll
        for (int c = 0; c < W::kWindow; ++c) {
          const int s = W::column_tap(c, o);
          if (!kPairs && W::meets(s)) sums[v] += window[c][v] * taps[s * kVec + v];
        }
      }
      if constexpr (kPairs) {
#pragma unroll
        for (int c = 0; c < W::kWindow; ++c) {
          const int s = W::column_tap(c, o);
          if (W::meets(s)) fma_pair(sums, window[c], {taps[2 * s], taps[2 * s + 1]});
        }
      }
#pragma unroll
      for (int v = 0; v < kVec; ++v) ring[j][o][v] = sums[v];
    }
  }
}

}  // namespace sepconv::cuda
