#include "async_copy.h"

#include <cstring>
#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif

#include "machine.h"
#include "race.h"
#include "shared_memory.h"

namespace emulator {
namespace {

void finish(const AsyncCopy& copy) {
  shared_memory::unpoison(copy.destination, copy.bytes);
  race::copy_ends(copy.destination, copy.bytes);
  memset(copy.destination, 0, copy.bytes);
  if (copy.source) memcpy(copy.destination, copy.source, copy.source_bytes);
}

}  // namespace

void check_global_read(const void* p, uint32_t bytes, uint32_t alignment) {
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    die("a global address is not a multiple of the " + std::to_string(alignment) + " bytes read");
#if defined(EMULATOR_ASAN)
  if (__asan_region_is_poisoned(const_cast<void*>(p), bytes)) die("reads global memory outside of its buffer");
#endif
}

void copy_async(void* destination, const void* source, uint32_t bytes, uint32_t source_bytes) {
  shared_memory::check_range(destination, bytes, bytes, "cp.async");
  if (source_bytes > bytes) die("cp.async of more bytes than it writes");
  if (source) check_global_read(source, source_bytes, bytes);
  race::access(current().linear, destination, bytes, true);
  race::copy_begins(destination, bytes);
  memset(destination, 0xFF, bytes);
  if (bytes >= 8) shared_memory::poison(destination, bytes);  // AddressSanitizer's grain is 8 bytes
  current().open_copies.push_back({static_cast<unsigned char*>(destination), source, bytes, source_bytes});
}

void commit_copies() {
  Thread& me = current();
  me.committed_copies.push_back(std::move(me.open_copies));
  me.open_copies.clear();
}

void wait_copies(int groups_left) {
  auto& groups = current().committed_copies;
  while (groups.size() > size_t(groups_left)) {
    for (const AsyncCopy& copy : groups.front()) finish(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace emulator
