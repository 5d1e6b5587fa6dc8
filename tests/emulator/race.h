// The race detector, live in the race build only (-DEMULATOR_RACE): g++ -fsanitize=thread makes every load and store of
// a kernel call a hook, and the hooks are ours. For every byte of shared memory, and of every global buffer that the
// kernel may write, the last writer and the last readers are kept with the number of barriers that they had passed. Two
// accesses of one byte by different threads, one of them a write, need a barrier between them: a __syncthreads, or a
// __syncwarp if both are of one warp. Between blocks nothing orders them at all. What a bulk copy wrote is for threads
// that have waited for its phase of an mbarrier themselves, and for all behind the next __syncthreads. Reads of shared
// memory that nobody has written, and touching the bytes of an unfinished copy, are reported too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator::race {

#if defined(EMULATOR_RACE)
void begin_launch();
void begin_block();
// Watches a global buffer (an output or a workspace) from now on; forget() drops all of them.
void watch(const void* begin, size_t bytes);
void forget();
// The same for what a kernel reads first, and changes.
void watch_in_place(const void* begin, size_t bytes);
// For emulated instructions that touch memory on behalf of a thread other than the running one.
void access(int thread, const void* p, size_t bytes, bool write);
void copy_begins(const void* p, size_t bytes);
void copy_ends(const void* p, size_t bytes);
// Of a bulk copy, as part of a phase of an mbarrier: who has waited for that phase may read.
void bulk_copy_ends(const void* p, size_t bytes, uint32_t phase);
// Which thread wrote a byte of a watched buffer last.
std::string describe_writer(const void* p);
#else
inline void begin_launch() {}
inline void begin_block() {}
inline void watch(const void*, size_t) {}
inline void watch_in_place(const void*, size_t) {}
inline void forget() {}
inline void access(int, const void*, size_t, bool) {}
inline void copy_begins(const void*, size_t) {}
inline void copy_ends(const void*, size_t) {}
inline void bulk_copy_ends(const void*, size_t, uint32_t) {}
inline std::string describe_writer(const void*) { return {}; }
#endif

}  // namespace emulator::race
