// The second stage of every grad_weight: grad_w[i] = sum over splits of partials[split][i], always in the same order.
//
// A block owns kWeights neighbouring weights; kSlices threads share each weight, thread slice j adding the splits j,
// j + kSlices, ... in turn, and the slices are then added in their order. Neighbouring threads own neighbouring
// weights, so that a warp reads whole sectors; the partial sums are few and still in L2, so the kernel costs little
// more than its launch.
#include "cuda/device/common.cuh"
#include "cuda/device/ptx.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kWeights = 16;
constexpr int kSlices = 16;

template <typename Index>
struct SumArgs {
  int64_t elements;  // K * C / groups * R * S
  int splits;
  Divider<Index> by_s, by_r, by_c;  // weight index -> (k, c, r, s)
  Strides w;
};

template <typename T, typename Index>
__global__ void __launch_bounds__(kWeights* kSlices)
    sum_partials_kernel(const SumArgs<Index> a, const acc_t<T>* __restrict__ partials, T* __restrict__ grad_w) {
  wait_for_earlier_kernels();
  SMEM_ARRAY(acc_t<T>, slices, [kSlices][kWeights]);
  const int lane = threadIdx.x % kWeights, slice = threadIdx.x / kWeights;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWeights + lane;
  acc_t<T> sum = 0;
  if (i < a.elements) {
#pragma unroll 4
    for (int split = slice; split < a.splits; split += kSlices) sum += partials[split * a.elements + i];
  }
  slices[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || i >= a.elements) return;
#pragma unroll
  for (int j = 1; j < kSlices; ++j) sum += slices[j][lane];
  Index s = static_cast<Index>(i);
  Index r = a.by_s.split(s);
  Index c = a.by_r.split(r);
  const Index k = a.by_c.split(c);
  grad_w[k * a.w.n + c * a.w.c + r * a.w.h + s * a.w.w] = from_acc<T>(sum);
}

template <typename T, typename Index>
cudaError_t start(const Launch& call, int splits) {
  const ConvShape& shape = call.shape;
  const SumArgs<Index> a{shape.weight_elements(),
                         splits,
                         Divider<Index>(shape.S),
                         Divider<Index>(shape.R),
                         Divider<Index>(shape.channels_per_group()),
                         shape.w};
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div<int64_t>(a.elements, kWeights))),
                            dim3(kWeights * kSlices), 0, call.stream};
  return launch(sum_partials_kernel<T, Index>, config, a, call.workspace_as<const acc_t<T>>(), call.out_as<T>());
}

}  // namespace

cudaError_t launch_sum_partials(const Launch& call, int splits) {
  return dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return call.shape.weight_elements() < kNarrowLimit ? start<T, uint32_t>(call, splits)
                                                       : start<T, int64_t>(call, splits);
  });
}

}  // namespace sepconv::cuda
