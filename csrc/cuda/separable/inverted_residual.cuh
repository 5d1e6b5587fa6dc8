// Stages of inverted_residual.cu: a tile's place, copies to shared memory, expansion and depthwise convolution of a
// chunk of channels. That file has the map from threads to data.
#pragma once

#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/separable/cut.h"

namespace sepconv::cuda::block {

inline constexpr int kThreads = 256, kWarps = kThreads / 32;
inline constexpr int kVec = 8;  // elements of 16 bytes
inline constexpr int kPitch = kBlockPitch, kChannels = kBlockChannels;
inline constexpr uint16_t kNowhere = 0xFFFF;

template <typename T>
struct BlockArgs {
  const T *x, *expand, *expand_bias, *filters, *depthwise_bias, *project, *project_bias;
  T* y;
  int C, E, K, H, W, P, Q, pad_h, pad_w;
  int rows, columns, halo_h, halo_w;
  int x_pitch, x_pixels;
  FastDiv tiles_across, tiles, of_column;  // of an image; columns of a tile
  FastDiv of_piece, of_chunk, of_rest;     // vectors of a pixel of x, of a chunk of e's channels and of the last one
  int64_t x_n, x_h, x_w, y_n, y_h, y_w;
  int at_e, at_d, at_expand, at_project, at_filters, at_places, at_starts, at_sources;  // in shared memory
  Activation expand_activation, depthwise_activation, project_activation;
  bool residual, saturates;
};

// Two elements of a word.
template <typename T>
__device__ __forceinline__ float2 both(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
  } else {
    const Vec<T, 2> v = reinterpret_cast<const Vec<T, 2>&>(word);
    return {to_acc(v.v[0]), to_acc(v.v[1])};
  }
}
template <typename T>
__device__ __forceinline__ float2 load_both(const T* p) {
  return both<T>(*reinterpret_cast<const uint32_t*>(p));
}

// The largest number of a half type, and infinity's bits.
template <typename T>
inline constexpr float kLargest = std::is_same_v<T, __half> ? 65504.f : 3.3895314e38f;
template <typename T>
inline constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7C00 : 0x7F80;

// The output whose weights are row 8i + 2t + e of 16: a thread has columns 2t and 2t + 1 of both i, which become
// outputs 4t to 4t + 3.
__device__ __forceinline__ int row_of(int output) {
  return output / 16 * 16 + output / 2 % 2 * 8 + output / 4 % 4 * 2 + output % 2;
}

// Where e of a pixel of the halo lies. For stride 2 even columns come first, then odd ones: what 16 outputs see under a
// tap lies side by side, on other banks.
template <int kStride>
__device__ __forceinline__ int spot(int halo_w, int h, int w) {
  return h * halo_w + (kStride == 1 ? w : w % 2 * ((halo_w + 1) / 2) + w / 2);
}

// A tile's place: its first output, and the rectangle of pixels under it that lies inside of the image.
struct Place {
  int n, p, q, h, w;  // h and w: of the halo's first pixel
  int first_h, first_w, inner_h, inner_w;

  template <typename T>
  __device__ __forceinline__ explicit Place(const BlockArgs<T>& a, int stride) {
    auto rest = static_cast<uint32_t>(blockIdx.x);
    n = static_cast<int>(a.tiles.split(rest));
    p = static_cast<int>(a.tiles_across.split(rest)) * a.rows;
    q = static_cast<int>(rest) * a.columns;
    h = p * stride - a.pad_h, w = q * stride - a.pad_w;
    first_h = max(h, 0), first_w = max(w, 0);
    inner_h = max(min(h + a.halo_h, a.H) - first_h, 0), inner_w = max(min(w + a.halo_w, a.W) - first_w, 0);
  }
  __device__ __forceinline__ int pixels() const { return inner_h * inner_w; }
};

// Rows of `channels` (whole vectors) from `from`, `step` elements apart, zeros up to whole sixteens and beyond the last
// of `rows`.
template <typename T, typename Row>
__device__ __forceinline__ void copy_rows(T* to, int pitch, const T* from, int64_t step, int rows, int all_rows,
                                          int channels, const FastDiv& pieces, const Row& row_of) {
  const int count = all_rows * static_cast<int>(pieces.divisor);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    auto piece = static_cast<uint32_t>(i);
    const int row = static_cast<int>(pieces.split(piece)), column = static_cast<int>(piece) * kVec;
    const bool inside = row < rows && column < channels;
    cp_async16(to + row_of(row) * pitch + column, inside ? from + row * step + column : from, inside);
  }
}
// So many elements one after the other, zeros up to `all`; null: all zeros.
template <typename T>
__device__ __forceinline__ void copy_line(T* to, const T* from, int count, int all, const T* none) {
  for (int i = static_cast<int>(threadIdx.x) * kVec; i < all; i += kThreads * kVec) {
    const bool inside = from != nullptr && i < count;
    cp_async16(to + i, inside ? from + i : none, inside);
  }
}

// 16 pixels x 32 channels at a time.
template <typename T>
__device__ __forceinline__ void expand_stage(const BlockArgs<T>& a, const unsigned char* smem, T* e, int pixels,
                                             int channels) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const T* const x = reinterpret_cast<const T*>(smem);
  const T* const w = reinterpret_cast<const T*>(smem + a.at_expand);
  const T* const bias = w + kChannels * a.x_pitch;
  const auto* const places = reinterpret_cast<const uint16_t*>(smem + a.at_places);
  const int halves = channels > 32 ? 2 : 1, steps = (a.C + 15) / 16;
  for (int item = warp; item < (pixels + 15) / 16 * halves; item += kWarps) {
    const int row = item / halves * 16, column = item % halves * 32, groups = (channels - column) / 16;
    const T* const left = x + (row + lane % 16) * a.x_pitch + lane / 16 * kVec;
    const T* const right = w + (column + lane / 16 * 8 + lane % 8) * a.x_pitch + lane / 8 % 2 * kVec;
    const int channel = column + lane % 4 * 2;
    float sums[2][2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 b = i < 2 * groups ? load_both(bias + channel + i * 8) : float2{0.f, 0.f};
      float (&s)[4] = sums[i / 2][i % 2];
      s[0] = s[2] = b.x, s[1] = s[3] = b.y;
    }
#pragma unroll 2
    for (int k = 0; k < steps; ++k) {
      uint32_t pixel[4];
      ldmatrix_x4(pixel, left + k * 16);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (j >= groups) break;
        uint32_t weight[4];
        ldmatrix_x4(weight, right + j * 16 * a.x_pitch + k * 16);
        mma_m16n8k16<T>(sums[j][0], pixel, {weight[0], weight[1]});
        mma_m16n8k16<T>(sums[j][1], pixel, {weight[2], weight[3]});
      }
    }
    activate_all<T>(a.expand_activation, reinterpret_cast<float (&)[16]>(sums));
    if (a.saturates) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& v = sums[i / 8][i / 4 % 2][i % 4];
        v = v > kLargest<T> ? kLargest<T> : v < -kLargest<T> ? -kLargest<T> : v;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = places[row + lane / 4 + half * 8];
      if (place == kNowhere) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= 2 * groups) break;
        const float pair[2] = {sums[i / 2][i % 2][half * 2], sums[i / 2][i % 2][half * 2 + 1]};
        store_vec<2>(e + place * kPitch + channel + i * 8, pair);
      }
    }
  }
}

// Whether one of two elements is infinite or NaN.
template <typename T>
__device__ __forceinline__ uint32_t not_finite(uint32_t word) {
  return ((word & 0x7FFF7FFFu) + (0x8000u - kInfinity<T>)*0x10001u) & 0x80008000u;
}

// Without an expansion: e of a chunk is x, zeros beyond the last channel.
template <typename T>
__device__ __forceinline__ void copy_e(const BlockArgs<T>& a, const unsigned char* smem, T* e, const T* image,
                                       int pixels, int channels, const FastDiv& pieces) {
  const auto* const places = reinterpret_cast<const uint16_t*>(smem + a.at_places);
  const auto* const sources = reinterpret_cast<const uint32_t*>(smem + a.at_sources);
  for (int i = static_cast<int>(threadIdx.x); i < pixels * static_cast<int>(pieces.divisor); i += kThreads) {
    auto piece = static_cast<uint32_t>(i);
    const int pixel = static_cast<int>(pieces.split(piece)), channel = static_cast<int>(piece) * kVec;
    const bool inside = channel < channels;
    cp_async16(e + places[pixel] * kPitch + channel, inside ? image + sources[pixel] + channel : a.x, inside);
  }
}
// When the thread's own copies of it have come: what is infinite becomes the largest number.
template <typename T>
__device__ __forceinline__ void saturate_e(const BlockArgs<T>& a, const unsigned char* smem, T* e, int pixels,
                                           const FastDiv& pieces) {
  const auto* const places = reinterpret_cast<const uint16_t*>(smem + a.at_places);
  for (int i = static_cast<int>(threadIdx.x); i < pixels * static_cast<int>(pieces.divisor); i += kThreads) {
    auto piece = static_cast<uint32_t>(i);
    const int pixel = static_cast<int>(pieces.split(piece));
    T* const at = e + places[pixel] * kPitch + static_cast<int>(piece) * kVec;
    const uint4 words = *reinterpret_cast<const uint4*>(at);
    if ((not_finite<T>(words.x) | not_finite<T>(words.y) | not_finite<T>(words.z) | not_finite<T>(words.w)) == 0) {
      continue;
    }
    auto* const bits = reinterpret_cast<uint16_t*>(at);
    for (int j = 0; j < kVec; ++j) {
      if ((bits[j] & 0x7FFF) == kInfinity<T>) bits[j] -= 1;
    }
  }
}

// A warp has eight channels, and 16 outputs at a time: a tap is a product of e under it and a diagonal of eight
// weights, and an m16n8k16 takes two taps. All eight warps are at work where groups of eight channels are 8, 4 or 2.
template <typename T, int kSide, int kStride>
__device__ __forceinline__ void depthwise_stage(const BlockArgs<T>& a, const unsigned char* smem, const T* e, T* d,
                                                int channels, int padded) {
  constexpr int kTaps = kSide * kSide, kSteps = (kTaps + 1) / 2;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int eights = padded / 8, parts = kWarps / eights, group = warp % eights;
  if (warp / eights >= parts) return;
  const T* const filters = reinterpret_cast<const T*>(smem + a.at_filters);
  const auto* const starts = reinterpret_cast<const uint16_t*>(smem + a.at_starts);
  const int own = lane / 4;  // the lane's channel of the diagonal, which it has only on it
  const bool on = own / 2 == lane % 4;
  uint32_t weights[kSteps][2];
  int offsets[kSteps];  // of e under the tap of the lane's half
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tap = 2 * i + half;
      const bool there = on && tap < kTaps;
      const T* const from = filters + (group * 8 + own) * kTaps + (there ? tap : 0);
      const uint32_t bits = *reinterpret_cast<const uint16_t*>(from);
      weights[i][half] = there ? bits << (own % 2 * 16) : 0;
    }
    const int first = spot<kStride>(a.halo_w, 2 * i / kSide, 2 * i % kSide);
    const int second = 2 * i + 1 < kTaps ? spot<kStride>(a.halo_w, (2 * i + 1) / kSide, (2 * i + 1) % kSide) : first;
    offsets[i] = (lane < 16 ? first : second) * kPitch;
  }
  const int channel = group * 8 + lane % 4 * 2;
  const float2 bias = load_both(filters + kChannels * kTaps + channel);
  for (int row = warp / eights * 16; row < a.rows * a.columns; row += parts * 16) {
    const T* const from = e + starts[row + lane % 16] * kPitch + group * 8;
    float sums[4] = {bias.x, bias.y, bias.x, bias.y};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t pixels[4];
      ldmatrix_x4(pixels, from + offsets[i]);
      mma_m16n8k16<T>(sums, pixels, weights[i]);
    }
    activate_all<T>(a.depthwise_activation, sums);
    // Beyond the last channel infinite pixels of x times the zeros of w_e are NaN.
    if (group * 8 >= channels) sums[0] = sums[1] = sums[2] = sums[3] = 0.f;
    T* const to = d + (row + lane / 4) * kPitch + channel;
    store_vec<2>(to, reinterpret_cast<const float (&)[2]>(sums[0]));
    store_vec<2>(to + 8 * kPitch, reinterpret_cast<const float (&)[2]>(sums[2]));
  }
}

}  // namespace sepconv::cuda::block
