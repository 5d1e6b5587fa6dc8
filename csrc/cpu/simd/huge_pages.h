// Huge pages for large outputs.
//
// malloc maps every block above 32 MiB afresh, and smaller ones often, so a large output costs one page fault per 4
// KiB: more than the convolution itself (measured, 8 x 64 x 300 x 300 float32, 3x3: 82 ms, and 23 ms with pages of 2
// MiB). Where the system leaves the choice to programs (transparent_hugepage = madvise, the usual setting), asking is
// enough. It is a hint: it changes no result, and may be ignored.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sepconv::cpu {

// For memory that is about to be written as a whole.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kWorthAsking = size_t{4} << 20, kHugePage = size_t{2} << 20;
  if (bytes < kWorthAsking) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage,
                  end = (begin + bytes) / kHugePage * kHugePage;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace sepconv::cpu
