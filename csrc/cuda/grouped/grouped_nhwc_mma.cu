// Groups of 4, 8 or 16 channels under 3x3 kernels in channels_last, on tensor cores: forward with stride 1 or 2,
// and the gradient by the input of stride 1, which is forward with the kernel turned around. Threads to data: as
// grouped_nhwc_mma.cuh says; a position is an output, and at stride 1 two rows of them are computed at once.
//
// An m16n8k16 multiplies 16 outputs' inputs, whose rows ldmatrix takes from anywhere. Of 16 channels,
// k is the channels of one tap. Of eight (or of twice four) it is two taps of the same channels: the first two of a
// row, and the last one of two rows. Where there is one tap only, the other half of the fragment is zeros on both
// sides, as an infinite pixel would make a NaN of a zero weight.
#include "cuda/grouped/grouped_nhwc_mma.cuh"

namespace sepconv::cuda {
namespace {

using namespace grouped;

template <typename T, int kDeep, int kStride>
struct Correlation {
  static constexpr int kIn = 2, kOut = kStride == 1 ? 2 : 1, kTail = 3 - kStride, kStep = kStride, kWide = 1;
  static constexpr int kRows = kIn + kTail, kN = Weights<T, kDeep>::kOutputs;
  int lane;
  int at[3];  // of this lane's row of a fragment in a row of the stage, by tap

  __device__ __forceinline__ Correlation(int l, int piece) : lane(l) {
    const int pixel = lane % 16 * kStride, half = lane / 16;
#pragma unroll
    for (int kw = 0; kw < 3; ++kw) at[kw] = swizzled<kStride>(pixel + kw, piece + half);
    if constexpr (kDeep == 0) {
      at[0] = swizzled<kStride>(pixel + half, piece);  // the halves of k: taps 0 and 1
      at[2] = swizzled<kStride>(pixel + 2, piece);     // and tap 2 of two rows
    }
  }

  __device__ __forceinline__ void multiply(float (&sums)[kOut][1][kN][4], const Weights<T, kDeep>& weights,
                                           const unsigned char* const (&rows)[kRows], int tile) const {
    const auto& words = weights.words;
    if constexpr (kDeep == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        uint32_t pixels[4];
        ldmatrix_x4(pixels, rows[r] + (at[0] + tile));
#pragma unroll
        for (int o = 0; o < kOut; ++o) {
          const int kh = r - o * kStride;
          if (kh >= 0 && kh < 3) mma_m16n8k16<T>(sums[o][0][0], pixels, {words[kh][0], words[kh][1]});
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; r += 2) {
        uint32_t pixels[4];
        ldmatrix_x4(pixels, (lane / 16 == 0 ? rows[r] : rows[r + 1 < kRows ? r + 1 : r]) + (at[2] + tile));
#pragma unroll
        for (int o = 0; o < kOut; ++o) {
          const int kh = r - o * kStride;
          if (kh >= 0 && kh < 2 && r + 1 < kRows) {
            mma_m16n8k16<T>(sums[o][0][0], pixels, {words[kh][2], words[kh + 1][2]});
          } else if (kh >= 0 && kh < 3) {
            mma_m16n8k16<T>(sums[o][0][0], {pixels[0], pixels[1], 0, 0}, {words[kh][2], 0});
          } else if (kh == -1) {
            mma_m16n8k16<T>(sums[o][0][0], {pixels[2], pixels[3], 0, 0}, {words[0][2], 0});
          }
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kDeep; ++k) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int kw = 0; kw < 3; ++kw) {
            uint32_t pixels[4];
            ldmatrix_x4(pixels, rows[r] + (at[kw] ^ (k * 32)) + tile);
#pragma unroll
            for (int i = 0; i < kOut * kN; ++i) {
              const int o = i / kN, n = i % kN, kh = r - o * kStride;
              if (kh >= 0 && kh < 3) mma_m16n8k16<T>(sums[o][0][n], pixels, words[k][kh][kw][n]);
            }
          }
        }
      }
    }
  }

  // One output, of an image.
  static __device__ __forceinline__ float single(const ProductArgs& a, const T* in, const T* w, int row, int column,
                                                 int k) {
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < 9 * a.group; ++i) {
      const int c = i / 9, kh = i / 3 % 3, kw = i % 3, h = row * kStride - a.pad_h + kh,
                v = column * kStride - a.pad_w + kw;
      if (static_cast<unsigned>(h) < static_cast<unsigned>(a.in_rows) &&
          static_cast<unsigned>(v) < static_cast<unsigned>(a.in_columns)) {
        const int64_t tap =
            a.w_first + k / a.group * a.w_group + k % a.group * a.w_output + c * a.w_input + kh * a.w_h + kw * a.w_w;
        sum += to_acc(in[h * a.in_h + v * a.in_w + k / a.group * a.group + c]) * to_acc(w[tap]);
      }
    }
    return sum;
  }
};

template <typename T, int kDeep, int kStride>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(const ProductArgs a, const T* __restrict__ in, const T* __restrict__ w, const T* __restrict__ bias,
                   T* __restrict__ out) {
  wait_for_earlier_kernels();
  product<T, kDeep, Correlation<T, kDeep, kStride>>(a, in, w, bias, out);
}

cudaError_t start(const Launch& call, const GroupedMmaCut& cut, const ProductArgs& a, int64_t stride, int64_t bytes) {
  const LaunchConfig config{dim3(static_cast<unsigned>(cut.blocks * a.slabs)), dim3(kThreads),
                            static_cast<size_t>(bytes), call.stream};
  return dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_group(a.group, [&](auto deep) {
      constexpr int kDeep = decltype(deep)::value;
      const auto kernel = stride == 1 ? product_kernel<T, kDeep, 1> : product_kernel<T, kDeep, 2>;
      return launch(kernel, config, a, call.first_as<T>(), call.second_as<T>(), call.bias_as<T>(), call.out_as<T>());
    });
  });
}

}  // namespace

cudaError_t launch_grouped_nhwc_mma_forward(const Launch& call, const GroupedMmaCut& cut) {
  return start(call, cut, product_args(call, cut, false), call.shape.stride_h,
               grouped_mma_tile(Map::forward, call.shape, cut).bytes);
}

cudaError_t launch_grouped_nhwc_mma_grad_input(const Launch& call, const GroupedMmaCut& cut) {
  if (call.shape.stride_h == 2) return launch_grouped_nhwc_mma_grad_input_stride2(call, cut);
  ProductArgs args = product_args(call, cut, true);
  args.w_first = 2 * (args.w_h + args.w_w), args.w_h = -args.w_h, args.w_w = -args.w_w;
  return start(call, cut, args, 1, grouped_mma_tile(Map::grad_input, call.shape, cut).bytes);
}

}  // namespace sepconv::cuda
