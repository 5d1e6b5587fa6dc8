// A block's shared memory: one arena, new for every block, filled with NaN and poisoned outside of what was asked for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator::shared_memory {

constexpr size_t kArenaBytes = 228 << 10;

void begin_block(size_t dynamic_bytes);
unsigned char* dynamic();  // 1024-byte aligned, at offset 0 of the arena
// The array that belongs to this place in the source: the first thread to come by allocates it for its block.
void* array(const void* site, size_t bytes);

// The offset of a pointer in the arena, or -1.
ptrdiff_t offset_of(const void*);
// Ends the kernel unless [p, p + bytes) lies inside shared memory and is aligned.
void check_range(const void* p, size_t bytes, size_t alignment, const char* what);

// AddressSanitizer's view of the arena; nothing in other builds.
void poison(void*, size_t);
void unpoison(void*, size_t);

}  // namespace emulator::shared_memory

#define DYN_SMEM(name) unsigned char* name = ::emulator::shared_memory::dynamic()
// SMEM_ARRAY(float, tile, [8][33]) declares tile as a reference to a float[8][33].
#define SMEM_ARRAY(T, name, ...)                                           \
  auto& name = *static_cast<T(*) __VA_ARGS__>([]() -> void* {              \
    static char site;                                                      \
    return ::emulator::shared_memory::array(&site, sizeof(T __VA_ARGS__)); \
  }())
