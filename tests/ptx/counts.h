// What a profiler would count: instructions, and of those that touch memory their requests, sectors and wavefronts.
//
// A sector is 32 aligned bytes of global memory. A wavefront is one clock of shared memory: it serves one word of 4
// bytes of each of 32 banks, any number of lanes of the same word. A request of 8 bytes a lane goes in two halves of
// the warp, one of 16 bytes in four quarters; ldmatrix in groups of eight rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_set>
#include <vector>

namespace ptx {

struct Count {
  uint64_t requests = 0, wavefronts = 0, ideal = 0, sectors = 0, bytes = 0;
};

struct Access {
  int lane;
  uint64_t address;
  uint32_t bytes;
};

struct Counts {
  std::map<std::string, uint64_t> executed;  // warp instructions, by opcode
  std::map<std::string, Count> memory;       // by opcode; cp.async has one for each side
  void global(const std::string& opcode, const std::vector<Access>&);
  void shared(const std::string& opcode, const std::vector<Access>&);

  // Sectors that differ: of the launch, as many as come from memory once; of each block, added up, what passes L2.
  bool traffic = false;  // whether they are counted
  struct Sectors {
    std::unordered_set<uint64_t> launch, block;
    uint64_t blocks = 0;
    void end_block() { blocks += block.size(), block.clear(); }
  } reads, writes;
  void touch(const std::string& opcode, uint64_t address, uint64_t bytes);
  // Bytes of asynchronous copies that a block has under way at most.
  uint64_t in_flight = 0, most_in_flight = 0;
  void begin_copy(uint64_t bytes) { most_in_flight = std::max(most_in_flight, in_flight += bytes); }
  void end_copy(uint64_t bytes) { in_flight -= bytes; }
};

}  // namespace ptx
