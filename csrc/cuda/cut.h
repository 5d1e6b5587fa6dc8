// Every kernel's cut: how a plan cuts the work, which a door is told.
#pragma once

#include <variant>

#include "cuda/depthwise/cut.h"
#include "cuda/depthwise/large/cut.h"
#include "cuda/depthwise/nchw/cut.h"
#include "cuda/depthwise/nhwc/cut.h"
#include "cuda/depthwise/toeplitz/cut.h"
#include "cuda/grouped/cut.h"
#include "cuda/pointwise/cut.h"
#include "cuda/separable/cut.h"
#include "cuda/sequences/cut.h"
#include "cuda/spatial/cut.h"

namespace sepconv::cuda {

// What is not launched: torch's own call, or two calls.
struct NoCut {
  template <typename Self, typename F>
  static void each(Self&, F&&) {}
};

// each(cut, f) calls f(name, value) for every number of a cut; those that are 1 go without saying.
using Cut = std::variant<NoCut, NhwcCut, NhwcMmaCut, NhwcTmaCut, NchwCut, NchwMmaCut, DirectCut, GradWeightCut,
                         GradWeightRowsCut, ToeplitzCut, LargeCut, SplitsCut, ProductCut, GroupedMmaCut, SeparableCut,
                         BlockCut, CausalCut>;

}  // namespace sepconv::cuda
