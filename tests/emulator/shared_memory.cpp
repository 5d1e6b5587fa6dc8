#include "shared_memory.h"

#include <cstdlib>
#include <cstring>
#include <vector>
#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif

#include "machine.h"

namespace emulator::shared_memory {
namespace {

struct Array {
  const void* site;
  unsigned char* at;
};
unsigned char* arena = nullptr;
size_t top = 0;  // the end of what this block has allocated
std::vector<Array> arrays;

constexpr size_t kRedzone = 32;  // poisoned bytes after every allocation

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

void poison([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(EMULATOR_ASAN)
  __asan_poison_memory_region(p, bytes);
#endif
}

void unpoison([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(EMULATOR_ASAN)
  __asan_unpoison_memory_region(p, bytes);
#endif
}

void begin_block(size_t dynamic_bytes) {
  if (!arena) {
    arena = static_cast<unsigned char*>(std::aligned_alloc(1024, kArenaBytes));
    poison(arena, kArenaBytes);
    top = kArenaBytes;
  }
  unpoison(arena, top);
  memset(arena, 0xFF, top);  // NaN as float, double, half and bfloat16
  poison(arena, top);
  unpoison(arena, dynamic_bytes);
  top = dynamic_bytes ? round_up(dynamic_bytes, 16) + kRedzone : 0;
  arrays.clear();
}

unsigned char* dynamic() { return arena; }

void* array(const void* site, size_t bytes) {
  for (const Array& a : arrays) {
    if (a.site == site) return a.at;
  }
  unsigned char* at = arena + top;
  top = round_up(top + bytes, 16) + kRedzone;
  if (top > kArenaBytes) die("shared memory is exhausted");
  unpoison(at, bytes);
  arrays.push_back({site, at});
  return at;
}

ptrdiff_t offset_of(const void* p) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - arena;
  return arena && offset >= 0 && offset < ptrdiff_t(kArenaBytes) ? offset : -1;
}

void check_range(const void* p, size_t bytes, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % alignment) {
    die(std::string(what) + ": shared-memory address is not a multiple of " + std::to_string(alignment));
  }
  const ptrdiff_t offset = offset_of(p);
  if (offset < 0 || offset + bytes > top) die(std::string(what) + ": address is outside of the block's shared memory");
#if defined(EMULATOR_ASAN)
  if (__asan_region_is_poisoned(const_cast<void*>(p), bytes)) {
    die(std::string(what) +
        ": touches shared memory beyond an array, or bytes of a cp.async that nobody has waited for");
  }
#endif
}

}  // namespace emulator::shared_memory
