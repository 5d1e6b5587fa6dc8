// The machine: one launch of one program. Blocks run one after another in random order; a warp runs in lockstep until
// it has to wait, then another one is picked at random.
//
// Divergence: at a branch on which lanes disagree, one way runs until it comes to the branch's immediate
// post-dominator, then the other; there they join. So an instruction that is `.aligned` meets fewer lanes than the warp
// has only where the program has it inside of a branch that lanes do not share.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "counts.h"
#include "memory.h"
#include "program.h"

namespace ptx {

struct Launch {
  std::array<uint32_t, 3> grid{1, 1, 1}, block{1, 1, 1};
  uint32_t dynamic_shared = 0;
  bool early = false;               // it may begin before the launch before it has ended: griddepcontrol.wait
  std::vector<uint8_t> parameters;  // as the program lays them out
};

// ---- asynchronous copies

struct AsyncCopy {  // cp.async
  uint32_t destination, bytes, source_bytes;
  uint64_t source;
};

struct LaneCopies {
  std::vector<AsyncCopy> open;                   // not yet committed
  std::deque<std::vector<AsyncCopy>> committed;  // groups, oldest first
};

struct BulkCopy {  // a box, as runs of bytes
  struct Run {
    uint32_t offset, bytes;
    uint64_t source;
  };
  uint32_t destination, bytes;
  std::vector<Run> inside;  // the rest is zeros
  uint16_t issuer;
};

struct Mbarrier {
  uint32_t expected = 0, pending = 0;  // arrivals of a phase, and those that it still waits for
  int64_t transactions = 0;            // bytes announced and not there yet
  uint32_t phase = 0;
  uint32_t event = 0, last_event = 0;  // of this phase and of the last, among all of the block's
  uint16_t maker = 0;
  bool fenced = false;  // the copy engine may know it
  std::vector<BulkCopy> in_flight;
};

// ---- threads

struct Frame {  // lanes that run together
  int pc, join;
  uint32_t lanes;
};

enum class Wait : uint8_t { no, barrier, phase, done };

struct Warp {
  uint32_t index = 0, alive = 0;
  std::vector<Frame> frames;
  std::vector<uint64_t> registers;  // register by register, 32 lanes of each
  std::array<LaneCopies, 32> copies;
  Wait waits = Wait::no;
  uint32_t barrier = 0;
  uint32_t synchronised = 0;  // the clock at its last warp barrier
  uint32_t waited = 0;        // lanes behind griddepcontrol.wait
};

struct Block {
  std::array<uint32_t, 3> index{};
  uint32_t number = 0;
  std::vector<Warp> warps;
  SharedMemory shared;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<uint32_t> fences;  // by thread: the clock when it last fenced for the copy engine
  uint32_t clock = 1, barrier_clock = 0, events = 0;
};

class Machine {
 public:
  Machine(const Program&, const Launch&, GlobalMemory&, uint64_t seed);
  void run();

  const Program& program;
  const Launch& launch;
  GlobalMemory& global;
  Counts counts;
  std::mt19937_64 random;
  std::vector<uint64_t> executed;  // by instruction, how many warps
  uint32_t elected;                // the lane that elect.sync takes, in this launch

 private:
  void run_block(uint32_t number);
  void run_warp(Block&, Warp&);
  void start(Block&, Warp&);
  bool release_barriers(Block&);
};

// Lets the copies of one mbarrier come; false where none is on its way (copies.cpp).
bool land_copies(Machine&, Block&);

// ---- one instruction of one warp

struct Step {
  Machine& machine;
  Block& block;
  Warp& warp;
  const Instruction& in;
  uint32_t lanes;         // that execute it
  int next;               // the instruction after it, for all lanes of the frame
  bool diverged = false;  // the frames say where it goes on
  bool again = false;     // it has to wait, and is executed once more
  int lane = 0;           // the one it is at, for reports

  Toucher toucher(int of) const {
    return {static_cast<uint16_t>(warp.index * 32 + of), block.clock, block.barrier_clock, warp.synchronised};
  }
  uint32_t thread(int of) const { return block.number * 1024 + warp.index * 32 + of; }  // within the launch
};

// The lanes of one operand: a register's 32 numbers, or the same number 32 times.
class Values {
 public:
  Values(const Step& s, const Operand& o) {
    if (o.form == Operand::Form::reg || (o.form == Operand::Form::address && o.reg >= 0)) {
      at_ = &s.warp.registers[static_cast<size_t>(o.reg) * 32];
      stride_ = 1;
    } else if (o.form == Operand::Form::immediate || o.form == Operand::Form::address) {
      at_ = &o.number;
    } else {
      throw Fault("an operand of a form that is not known here");
    }
  }
  uint64_t operator[](int lane) const { return at_[lane * stride_]; }

 private:
  const uint64_t* at_;
  int stride_ = 0;
};

// The address of a lane: base and offset.
class Addresses {
 public:
  Addresses(const Step& s, const Operand& o) : base_(s, o), offset_(o.reg >= 0 ? o.number : 0) {
    if (o.form != Operand::Form::address) throw Fault("an address expected");
  }
  uint64_t operator[](int lane) const { return base_[lane] + offset_; }
  uint64_t base(int lane) const { return base_[lane]; }

 private:
  Values base_;
  uint64_t offset_;
};

inline uint64_t* result(const Step& s, const Operand& o) {
  if (o.form != Operand::Form::reg) throw Fault("a register expected");
  return &s.warp.registers[static_cast<size_t>(o.reg) * 32];
}

// Calls f(lane) for all that execute the instruction.
template <typename F>
void for_lanes(Step& s, F&& f) {
  for (uint32_t rest = s.lanes; rest; rest &= rest - 1) {
    s.lane = __builtin_ctz(rest);
    f(s.lane);
  }
}

// A number cut to the width of a type, as registers hold it.
inline uint64_t cut(uint64_t value, int bits) { return bits >= 64 ? value : value & ((uint64_t{1} << bits) - 1); }

}  // namespace ptx
