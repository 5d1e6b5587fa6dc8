// Groups of 4, 8 or 16 channels under 3x3 kernels in channels_last, on tensor cores: the gradient by the input of
// stride
// 2. Threads to data: as grouped_nhwc_mma.cuh says; a position is the 2 x 2 pixels of grad_x that are written from the
// 2 x 2 pixels of grad_y around them.
//
// Rows of grad_x are counted with the padding: even ones meet rows 0 and 2 of the kernel, by two rows of grad_y, odd
// ones row 1, by the lower of the two. Columns likewise. So even rows and columns meet all four pixels of grad_y, and
// odd ones the lower right one alone. A fragment of eight channels has both columns of a row as the halves of its k:
// two fragments serve all. Of 16 channels each pixel of grad_y is a fragment of its own.
#include "cuda/grouped/grouped_nhwc_mma.cuh"

namespace sepconv::cuda {
namespace {

using namespace grouped;

template <typename T, int kDeep>
struct Spread {
  static constexpr int kIn = 1, kOut = 2, kTail = 1, kStep = 1, kWide = 2;
  static constexpr int kN = Weights<T, kDeep>::kOutputs;
  int at[2];  // of this lane's row of a fragment in a row of the stage: the left and the right column

  __device__ __forceinline__ Spread(int lane, int piece) {
    const int half = lane / 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) at[i] = swizzled<1>(lane % 16 + i, piece + half);
    if constexpr (kDeep == 0) at[0] = swizzled<1>(lane % 16 + half, piece);  // both, as the halves of k
  }

  __device__ __forceinline__ void multiply(float (&sums)[2][2][kN][4], const Weights<T, kDeep>& weights,
                                           const unsigned char* const (&rows)[2], int tile) const {
    const auto& words = weights.words;
    if constexpr (kDeep == 0) {
      uint32_t upper[4], lower[4];
      ldmatrix_x4(upper, rows[0] + (at[0] + tile));
      ldmatrix_x4(lower, rows[1] + (at[0] + tile));
      mma_m16n8k16<T>(sums[0][0][0], upper, {words[2][2], words[2][0]});
      mma_m16n8k16<T>(sums[0][0][0], lower, {words[0][2], words[0][0]});
      mma_m16n8k16<T>(sums[0][1][0], {upper[2], upper[3], lower[2], lower[3]}, {words[2][1], words[0][1]});
      mma_m16n8k16<T>(sums[1][0][0], lower, {words[1][2], words[1][0]});
      mma_m16n8k16<T>(sums[1][1][0], {lower[2], lower[3], 0, 0}, {words[1][1], 0});
    } else {
#pragma unroll
      for (int i = 0; i < kDeep * 4; ++i) {
        const int k = i / 4, row = i / 2 % 2, column = i % 2;  // of grad_y
        uint32_t pixels[4];
        ldmatrix_x4(pixels, rows[row] + (at[column] ^ (k * 32)) + tile);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const auto& taps = words[k];
          mma_m16n8k16<T>(sums[0][0][n], pixels, taps[2 - 2 * row][2 - 2 * column][n]);
          if (column == 1) mma_m16n8k16<T>(sums[0][1][n], pixels, taps[2 - 2 * row][1][n]);
          if (row == 1) mma_m16n8k16<T>(sums[1][0][n], pixels, taps[1][2 - 2 * column][n]);
          if (row == 1 && column == 1) mma_m16n8k16<T>(sums[1][1][n], pixels, taps[1][1][n]);
        }
      }
    }
  }

  // One pixel of grad_x, of an image.
  static __device__ __forceinline__ float single(const ProductArgs& a, const T* in, const T* w, int row, int column,
                                                 int k) {
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < 9 * a.group; ++i) {
      const int c = i / 9, twice_h = row + a.shift_h - i / 3 % 3 + 2 * (1 - a.pad_h),
                twice_v = column + a.shift_w - i % 3 + 2 * (1 - a.pad_w), h = twice_h / 2, v = twice_v / 2;
      if (twice_h >= 0 && twice_v >= 0 && twice_h % 2 == 0 && twice_v % 2 == 0 && h < a.in_rows && v < a.in_columns) {
        const int64_t tap = a.w_first + k / a.group * a.w_group + k % a.group * a.w_output + c * a.w_input +
                            i / 3 % 3 * a.w_h + i % 3 * a.w_w;
        sum += to_acc(in[h * a.in_h + v * a.in_w + k / a.group * a.group + c]) * to_acc(w[tap]);
      }
    }
    return sum;
  }
};

template <typename T, int kDeep>
__global__ void __launch_bounds__(kThreads, 2)
    spread_kernel(const ProductArgs a, const T* __restrict__ in, const T* __restrict__ w, T* __restrict__ out) {
  wait_for_earlier_kernels();
  product<T, kDeep, Spread<T, kDeep>>(a, in, w, nullptr, out);
}

}  // namespace

cudaError_t launch_grouped_nhwc_mma_grad_input_stride2(const Launch& call, const GroupedMmaCut& cut) {
  const ProductArgs a = product_args(call, cut, true);
  const LaunchConfig config{dim3(static_cast<unsigned>(cut.blocks * a.slabs)), dim3(kThreads),
                            static_cast<size_t>(grouped_mma_tile(Map::grad_input, call.shape, cut).bytes), call.stream};
  return dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_group(a.group, [&](auto deep) {
      return launch(spread_kernel<T, decltype(deep)::value>, config, a, call.first_as<T>(), call.second_as<T>(),
                    call.out_as<T>());
    });
  });
}

}  // namespace sepconv::cuda
