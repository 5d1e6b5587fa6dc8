// From a plan to the door that it names.
#include <iterator>

#include "cuda/launch.h"
#include "cuda/plan.h"

namespace sepconv::cuda {
namespace {

using Door = cudaError_t (*)(const Launch&, const Cut&);

// A door that takes its own kernel's cut, as one that takes any.
template <typename Own, cudaError_t (*kDoor)(const Launch&, const Own&)>
cudaError_t enter(const Launch& call, const Cut& cut) {
  return kDoor(call, std::get<Own>(cut));
}

struct Doors {
  Kernel kernel;
  Door forward, grad_input, grad_weight;  // null: the plan takes the kernel for no such call

  Door of(Map map) const { return map == Map::forward ? forward : map == Map::grad_input ? grad_input : grad_weight; }
};

// In the order of Kernel.
constexpr Doors kDoors[] = {
    {Kernel::depthwise_nhwc, enter<NhwcCut, launch_depthwise_nhwc_forward>,
     enter<NhwcCut, launch_depthwise_nhwc_grad_input>, nullptr},
    {Kernel::depthwise_nhwc_mma, enter<NhwcMmaCut, launch_depthwise_nhwc_mma_forward>,
     enter<NhwcMmaCut, launch_depthwise_nhwc_mma_grad_input>, nullptr},
    {Kernel::depthwise_nhwc_tma, enter<NhwcTmaCut, launch_depthwise_nhwc_tma_forward>,
     enter<NhwcTmaCut, launch_depthwise_nhwc_tma_grad_input>, nullptr},
    {Kernel::depthwise_nchw, enter<NchwCut, launch_depthwise_nchw_forward>,
     enter<NchwCut, launch_depthwise_nchw_grad_input>, nullptr},
    {Kernel::depthwise_nchw_mma, enter<NchwMmaCut, launch_depthwise_nchw_mma_forward>,
     enter<NchwMmaCut, launch_depthwise_nchw_mma_grad_input>, enter<NchwMmaCut, launch_depthwise_nchw_mma_grad_weight>},
    {Kernel::depthwise_direct, enter<DirectCut, launch_depthwise_direct_forward>,
     enter<DirectCut, launch_depthwise_direct_grad_input>, nullptr},
    {Kernel::depthwise_grad_weight, nullptr, nullptr, enter<GradWeightCut, launch_depthwise_grad_weight>},
    {Kernel::depthwise_grad_weight_nhwc, nullptr, nullptr, enter<GradWeightRowsCut, launch_depthwise_grad_weight_nhwc>},
    {Kernel::depthwise_grad_weight_nhwc_mma, nullptr, nullptr,
     enter<GradWeightRowsCut, launch_depthwise_grad_weight_nhwc_mma>},
    {Kernel::depthwise_grad_weight_nchw, nullptr, nullptr, enter<GradWeightRowsCut, launch_depthwise_grad_weight_nchw>},
    {Kernel::depthwise_toeplitz, enter<ToeplitzCut, launch_depthwise_toeplitz_forward>,
     enter<ToeplitzCut, launch_depthwise_toeplitz_grad_input>,
     enter<ToeplitzCut, launch_depthwise_toeplitz_grad_weight>},
    {Kernel::depthwise_large, enter<LargeCut, launch_depthwise_large_forward>,
     enter<LargeCut, launch_depthwise_large_grad_input>, enter<LargeCut, launch_depthwise_large_grad_weight>},
    {Kernel::pointwise, enter<SplitsCut, launch_pointwise_forward>, enter<SplitsCut, launch_pointwise_grad_input>,
     enter<SplitsCut, launch_pointwise_grad_weight>},
    {Kernel::pointwise_mma, enter<SplitsCut, launch_pointwise_mma_forward>,
     enter<SplitsCut, launch_pointwise_mma_grad_input>, enter<SplitsCut, launch_pointwise_mma_grad_weight>},
    {Kernel::pointwise_nhwc_mma, enter<ProductCut, launch_pointwise_nhwc_mma_forward>,
     enter<ProductCut, launch_pointwise_nhwc_mma_grad_input>, enter<SplitsCut, launch_pointwise_nhwc_mma_grad_weight>},
    {Kernel::grouped, enter<SplitsCut, launch_grouped_forward>, enter<SplitsCut, launch_grouped_grad_input>,
     enter<SplitsCut, launch_grouped_grad_weight>},
    {Kernel::grouped_nhwc_mma, enter<GroupedMmaCut, launch_grouped_nhwc_mma_forward>,
     enter<GroupedMmaCut, launch_grouped_nhwc_mma_grad_input>, enter<SplitsCut, launch_grouped_nhwc_mma_grad_weight>},
};

constexpr bool in_order() {
  for (size_t i = 0; i < std::size(kDoors); ++i) {
    if (kDoors[i].kernel != static_cast<Kernel>(i)) return false;
  }
  return std::size(kDoors) == static_cast<size_t>(Kernel::aten);
}
static_assert(in_order());

}  // namespace

cudaError_t run(const Plan& plan, Map map, const Launch& call) {
  if (plan.kernel >= Kernel::aten) return cudaErrorNotSupported;
  const Door door = kDoors[static_cast<int>(plan.kernel)].of(map);
  return door == nullptr ? cudaErrorNotSupported : door(call, plan.cut);
}

cudaError_t run_separable(const Plan& plan, const SeparableShape& shape, DType dtype, const SeparableMemory& memory,
                          cudaStream_t stream) {
  const auto* const cut = std::get_if<SeparableCut>(&plan.cut);
  if (cut == nullptr) return cudaErrorNotSupported;
  return plan.kernel == Kernel::separable_mma ? launch_separable_mma(shape, dtype, memory, *cut, stream)
                                              : launch_separable(shape, dtype, memory, *cut, stream);
}

cudaError_t run_block(const Plan& plan, const BlockShape& shape, DType dtype, const BlockMemory& memory,
                      cudaStream_t stream) {
  const auto* const cut = std::get_if<BlockCut>(&plan.cut);
  return cut == nullptr ? cudaErrorNotSupported : launch_inverted_residual(shape, dtype, memory, *cut, stream);
}

cudaError_t run_causal(const Plan& plan, const CausalShape& shape, DType dtype, const CausalMemory& memory,
                       cudaStream_t stream) {
  const auto* const cut = std::get_if<CausalCut>(&plan.cut);
  if (cut == nullptr) return cudaErrorNotSupported;
  if (plan.kernel == Kernel::causal_nlc) return launch_causal_nlc(shape, dtype, memory, *cut, stream);
  if (plan.kernel == Kernel::causal_ncl) return launch_causal_ncl(shape, dtype, memory, *cut, stream);
  return launch_causal_direct(shape, dtype, memory, stream);
}

cudaError_t run_borders(Map map, const Launch& call, PaddingMode mode) {
  if (map == Map::forward) return launch_borders_forward(call, mode);
  return map == Map::grad_input ? launch_borders_grad_input(call, mode) : launch_borders_grad_weight(call, mode);
}

}  // namespace sepconv::cuda
