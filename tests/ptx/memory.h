// Memory as a kernel may touch it: global buffers that are known byte for byte, and a block's shared memory, of which
// every byte knows who wrote and who read it last.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

// ---- global memory: the host's own addresses, in buffers that are announced here.

struct GlobalBuffer {
  uint64_t begin = 0, bytes = 0;
  bool watched = false;          // written by kernels; else only read
  std::vector<uint8_t> known;    // watched: by byte, whether it holds something
  std::vector<uint32_t> launch;  // watched: by byte, the launch that wrote it
  std::vector<uint32_t> writer;  // watched: by byte, which of that launch's threads
};

class GlobalMemory {
 public:
  void add(const void* begin, size_t bytes);
  void remove(const void* begin);
  void watch(const void* begin, size_t bytes);  // an output or a workspace, of which nothing is known yet
  void fill(const void* begin);                 // of a watched buffer all is known
  void begin_launch() { ++launch_; }

  // Faults, or returns the memory. `used`: the bytes that matter, as bits. `thread` is unique within a launch.
  const uint8_t* read(uint64_t address, uint32_t bytes, uint32_t alignment, uint64_t used, uint32_t thread);
  uint8_t* write(uint64_t address, uint32_t bytes, uint32_t alignment, uint32_t thread);

 private:
  GlobalBuffer& find(uint64_t address, uint32_t bytes, uint32_t alignment, const char* what);
  std::map<uint64_t, GlobalBuffer> buffers_;
  GlobalBuffer* last_ = nullptr;
  uint32_t launch_ = 0;
};

// ---- shared memory of one block

// Who touches a byte: a lane of a warp, and what its warp and its block have synchronised so far.
struct Toucher {
  uint16_t thread;
  uint32_t now;            // the block's clock, one tick an instruction
  uint32_t block_barrier;  // when the last barrier of the whole block was complete
  uint32_t warp_barrier;   // when this warp last synchronised
};

class SharedMemory {
 public:
  void begin_block(uint32_t bytes);

  const uint8_t* read(uint32_t address, uint32_t bytes, uint32_t alignment, uint64_t used, const Toucher&);
  uint8_t* write(uint32_t address, uint32_t bytes, uint32_t alignment, const Toucher&);
  // A copy by somebody else: from now on until it has landed, nobody may touch the bytes. `fences`: when each thread
  // last fenced for the copy engine, or null for a copy that the issuing thread orders itself.
  void begin_copy(uint32_t address, uint32_t bytes, uint32_t alignment, const Toucher&,
                  const std::vector<uint32_t>* fences);
  // It has landed, and is there for `thread` alone until the next barrier; or (event not 0) for all who have waited
  // for the event.
  uint8_t* end_copy(uint32_t address, uint32_t bytes, const Toucher&, uint32_t event);
  // Which threads have waited for an event; a barrier of the block tells all.
  void saw(uint32_t event, uint32_t warp, uint32_t lanes);
  void tell_all();
  void tell_warp(uint32_t warp);

 private:
  enum class State : uint8_t { unwritten, written, flying };
  struct Byte {
    State state;
    bool by_copy;                        // of the copy engine: `written` is the event
    uint16_t writer, reader, other;      // `other`: who read before the last reader
    uint32_t written, read, other_read;  // clocks
    uint32_t warps;                      // that have read since the block's last barrier
  };
  void check_readers(const Byte&, uint32_t address, const Toucher&, const char* what) const;
  void check(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) const;
  bool ordered(uint16_t by, uint32_t when, const Toucher& t) const;
  std::vector<uint8_t> data_;
  std::vector<Byte> bytes_;
  uint32_t size_ = 0;
  std::vector<std::vector<uint32_t>> seen_;  // by event, by warp: lanes
};

}  // namespace ptx
