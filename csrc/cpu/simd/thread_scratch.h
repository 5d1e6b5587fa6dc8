// Scratch memory that a thread keeps from call to call, as fresh pages cost more than what is written to them.
#pragma once

#include <cstdint>
#include <memory>

namespace sepconv::cpu {

// What the memory is for: all uses may stand side by side in one thread.
enum class ScratchUse : int { weights, pixels, ring, image };
inline constexpr int kScratchUses = 4;

// With SEPCONV_POISON_SCRATCH=1, as the tests set it, memory of unknown contents is filled with NaN. Else a number that
// a kernel forgets to write may be there all the same, from an earlier call.
void poison_scratch(float* memory, int64_t count);

// take() gives `count` floats, aligned to a cache line, with any values in them. They are valid for the life of this
// object, or until the thread takes the same use again. Up to 4 MiB a use are kept; more is given back at the end.
class ThreadScratch {
 public:
  explicit ThreadScratch(ScratchUse use) : use_(use) {}
  float* take(int64_t count);

 private:
  ScratchUse use_;
  std::unique_ptr<float[]> own_;
};

}  // namespace sepconv::cpu
