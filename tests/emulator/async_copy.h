// cp.async: copies from global to shared memory that finish, at the latest, when their thread waits for their group.
// Until then the destination holds NaN, and touching it is a fault in both builds.
#pragma once

#include <cstdint>

namespace emulator {

// Copies the first `source_bytes` of `bytes` (4, 8 or 16) and fills the rest with zeros; all of it where source is
// null.
void copy_async(void* destination, const void* source, uint32_t bytes, uint32_t source_bytes);
void commit_copies();
void wait_copies(int groups_left);
// Fails unless [p, p + bytes) may be read and p is a multiple of `alignment`; for reads made on behalf of a kernel by
// code that is not instrumented.
void check_global_read(const void* p, uint32_t bytes, uint32_t alignment);

}  // namespace emulator
