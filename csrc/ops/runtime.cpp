#include "ops/runtime.h"

#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace sepconv {
namespace {

bool strict_from_environment() {
  const char* value = std::getenv("SEPCONV_STRICT");
  return value != nullptr && std::strcmp(value, "") != 0 && std::strcmp(value, "0") != 0;
}

std::atomic<bool>& strict_flag() {
  static std::atomic<bool> flag{strict_from_environment()};
  return flag;
}

// A fixed open table keyed by the literal's address: counting is one relaxed increment, without a lock.
struct Counter {
  std::atomic<const char*> name{nullptr};
  std::atomic<int64_t> count{0};
};
std::array<Counter, 128> counters;

thread_local const PlanByHand* by_hand = nullptr;

}  // namespace

bool strict() { return strict_flag().load(std::memory_order_relaxed); }
bool set_strict(bool on) { return strict_flag().exchange(on, std::memory_order_relaxed); }

void count_kernel(const char* name) {
  for (Counter& counter : counters) {
    const char* seen = counter.name.load(std::memory_order_acquire);
    if (seen == nullptr && counter.name.compare_exchange_strong(seen, name)) seen = name;
    if (seen == name) {
      counter.count.fetch_add(1, std::memory_order_relaxed);
      return;
    }
  }
}

std::map<std::string, int64_t> kernel_counts() {
  std::map<std::string, int64_t> counts;  // the same text may stand at two addresses: add them up
  for (const Counter& counter : counters) {
    const char* name = counter.name.load(std::memory_order_acquire);
    const int64_t count = counter.count.load(std::memory_order_relaxed);
    if (name != nullptr && count != 0) counts[name] += count;
  }
  return counts;
}

void reset_kernel_counts() {
  for (Counter& counter : counters) counter.count.store(0, std::memory_order_relaxed);
}

void count_aten(const char* reason) {
  TORCH_CHECK(!strict(), "SEPCONV_STRICT is set and this call would take the ATen route: ", reason);
  count_kernel("aten");
}

const PlanByHand* plan_by_hand() { return by_hand; }
const PlanByHand* set_plan_by_hand(const PlanByHand* plan) { return std::exchange(by_hand, plan); }

}  // namespace sepconv
