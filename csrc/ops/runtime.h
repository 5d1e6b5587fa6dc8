// What the process knows about its own calls: the strict switch and a count of kernel runs.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace sepconv {

// SEPCONV_STRICT=1: ATen is never taken where a kernel here exists, and where none does the call raises.
bool strict();
bool set_strict(bool);  // returns the former value

// Counts one run of a kernel. `name` is a literal: the counter keeps the pointer.
void count_kernel(const char* name);
std::map<std::string, int64_t> kernel_counts();
void reset_kernel_counts();

// Counts one call that takes the ATen route; raises in strict mode, with the reason.
void count_aten(const char* reason);

// What the calls of this thread run on a GPU in the place of the plan's choice, by plan_overrule.cpp; null: nothing.
// Private, to try what other kernels and cuts take.
struct PlanByHand {
  std::string kernel;  // "depthwise_nhwc"; empty: the plan's
  std::map<std::string, int64_t> cut;
};
const PlanByHand* plan_by_hand();
const PlanByHand* set_plan_by_hand(const PlanByHand*);  // returns the former one

}  // namespace sepconv
