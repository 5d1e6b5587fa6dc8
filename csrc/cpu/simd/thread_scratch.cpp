#include "cpu/simd/thread_scratch.h"

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

}  // namespace

float* ThreadScratch::take(int64_t count) {
  if (count > kKept) {
    own_.reset(new float[count + kLine]);
    advise_huge_pages(own_.get(), (count + kLine) * sizeof(float));
    return aligned(own_.get());
  }
  thread_local Kept kept[kScratchUses];
  Kept& mine = kept[static_cast<int>(use_)];
  if (mine.count < count) {
    mine.memory.reset();  // before the larger one is taken
    mine.memory.reset(new float[count + kLine]);
    mine.count = count;
  }
  return aligned(mine.memory.get());
}

}  // namespace sepconv::cpu
