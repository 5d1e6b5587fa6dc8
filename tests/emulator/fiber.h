// A fiber: a stack of its own and the place where its function stopped. A CUDA thread is one fiber, so that a barrier
// in the middle of a kernel can simply stop the function there and go on with another thread's.
#pragma once

#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  // Makes the fiber begin at entry (which must never return) with an empty stack. Stacks are kept between uses.
  void prepare(void (*entry)());
  // Stops `from`, continues `to`; returns when something switches back to `from`. `from_ends`: nothing ever will.
  static void switch_to(Fiber& from, Fiber& to, bool from_ends = false);
  // The first thing a fresh fiber must call: AddressSanitizer wants to know that the switch is over.
  static void arrived(Fiber& main);

 private:
  static constexpr size_t kStackBytes = 256
                                        << 10;  // unrolled kernels with AddressSanitizer's redzones need tens of KiB

  char* stack_ = nullptr;  // null for the process's own stack
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  // What AddressSanitizer's fiber interface asks to be kept.
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace emulator
