// Causal sequences in float64, by their definition, and the whole numbers that come with a call.
#pragma once

#include <cstdint>
#include <vector>

#include "core/causal_shape.h"
#include "reference.h"
#include "tensor.h"

namespace emulator {

// Whole numbers in memory of their own, of 32 or 64 bits, [N, L] with gaps between them.
class Numbers {
 public:
  Numbers(const std::vector<int64_t>& values, int64_t L, bool wide);
  sepconv::WholeNumbers as_they_lie() { return {memory_.data(), wide_, kGap * L_, kGap}; }

 private:
  static constexpr int64_t kGap = 2;
  int64_t L_;
  bool wide_;
  Buffer memory_;
};

// Of causal_conv1d: y [N, C, L]. `states` may be null, `numbers` ([N, L]) empty.
std::vector<Expected> causal_reference(const sepconv::CausalShape&, const Buffer& x, const Buffer* states,
                                       const Buffer& w, const Buffer* bias, sepconv::Activation,
                                       const std::vector<int64_t>& numbers);

// Of causal_conv1d_update: y [N, C, T] and the states afterwards. `lengths` (of rings) and `rows` may be empty; a row
// that there is not makes its outputs NaN.
struct Updated {
  std::vector<Expected> y, state;
};
Updated update_reference(const sepconv::CausalUpdateShape&, const Buffer& x, const Buffer& w, const Buffer* bias,
                         sepconv::Activation, const std::vector<int64_t>& lengths, const std::vector<int64_t>& rows,
                         const Buffer& state);

}  // namespace emulator
