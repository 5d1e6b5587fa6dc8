// The second stage of every grad_weight: grad_w[i] = sum over splits of partials[split][i], always in the same order.
//
// A thread owns one weight. Neighbouring threads own neighbouring weights, so a warp reads every row of partials in whole
// lines; there are few splits and the partials are still in L2, so the kernel costs little more than its launch.
#include "common.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = 128;

template <typename Index>
struct SumArgs {
  int64_t elements;  // K * C / groups * R * S
  int splits;
  Divider<Index> by_s, by_r, by_c;  // weight index -> (k, c, r, s)
  Strides w;
};

template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const SumArgs<Index> a, const acc_t<T>* __restrict__ partials, T* __restrict__ grad_w) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.elements) return;
  Index s = static_cast<Index>(i);
  Index r = a.by_s.split(s);
  Index c = a.by_r.split(r);
  const Index k = a.by_c.split(c);
  T* out = grad_w + k * a.w.n + c * a.w.c + r * a.w.h + s * a.w.w;
  // Four running sums hide the latency of the loads; which split goes to which sum never changes.
  acc_t<T> sums[4] = {};
  int split = 0;
  for (; split + 4 <= a.splits; split += 4) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] += partials[(split + j) * a.elements + i];
  }
  for (; split < a.splits; ++split) sums[0] += partials[split * a.elements + i];
  *out = from_acc<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T, typename Index>
cudaError_t start(const ConvShape& shape, const void* partials, int splits, void* grad_w, cudaStream_t stream) {
  const SumArgs<Index> a{shape.weight_elements(),       splits,
                         Divider<Index>(shape.S),       Divider<Index>(shape.R),
                         Divider<Index>(shape.channels_per_group()), shape.w};
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div<int64_t>(a.elements, kThreads))), dim3(kThreads), 0,
                            stream};
  return launch(sum_partials_kernel<T, Index>, config, a, static_cast<const acc_t<T>*>(partials),
                static_cast<T*>(grad_w));
}

}  // namespace

cudaError_t launch_sum_partials(const ConvShape& shape, DType dtype, const void* partials, int splits, void* grad_w,
                                cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return shape.weight_elements() < kNarrowLimit ? start<T, uint32_t>(shape, partials, splits, grad_w, stream)
                                                  : start<T, int64_t>(shape, partials, splits, grad_w, stream);
  });
}

}  // namespace sepconv::cuda
