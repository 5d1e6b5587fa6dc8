#include "cpu/simd/thread_scratch.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "cpu/simd/huge_pages.h"

namespace sepconv::cpu {
namespace {

constexpr int64_t kLine = 16, kKept = int64_t{1} << 20;  // in floats

struct Kept {
  std::unique_ptr<float[]> memory;
  int64_t count = 0;
};

float* aligned(float* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return p + (kLine - address / sizeof(float) % kLine) % kLine;
}

float* poisoned(float* memory, int64_t count) {
  poison_scratch(memory, count);
  return memory;
}

}  // namespace

void poison_scratch(float* memory, int64_t count) {
  static const bool wanted = [] {
    const char* value = std::getenv("SEPCONV_POISON_SCRATCH");
    return value != nullptr && *value == '1';
  }();
  if (wanted) std::fill_n(memory, count, std::numeric_limits<float>::quiet_NaN());
}

float* ThreadScratch::take(int64_t count) {
  if (count > kKept) {
    own_.reset(new float[count + kLine]);
    advise_huge_pages(own_.get(), (count + kLine) * sizeof(float));
    return poisoned(aligned(own_.get()), count);
  }
  thread_local Kept kept[kScratchUses];
  Kept& mine = kept[static_cast<int>(use_)];
  if (mine.count < count) {
    mine.memory.reset();  // before the larger one is taken
    mine.memory.reset(new float[count + kLine]);
    mine.count = count;
  }
  return poisoned(aligned(mine.memory.get()), count);
}

}  // namespace sepconv::cpu
