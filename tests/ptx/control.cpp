// Branches, the end, barriers, and what lanes tell each other.
#include "meaning.h"

namespace ptx {
namespace {

void bra(Step& s) {
  Warp& w = s.warp;
  Frame& frame = w.frames.back();
  const int target = static_cast<int>(s.in.operands[0].number);
  const uint32_t others = frame.lanes & ~s.lanes;
  if (!others) {
    s.next = target;
    return;
  }
  if (s.in.has("uni")) throw Fault("diverged: bra.uni is not taken by all lanes");
  s.diverged = true;
  const int join = s.in.join;
  Frame ways[] = {{s.next, join, others}, {target, join, s.lanes}};
  frame.pc = join;  // what waits there for both
  const size_t first = s.machine.random() % 2;
  w.frames.push_back(ways[first]);
  w.frames.push_back(ways[1 - first]);
}

void ret(Step& s) {
  for (Frame& frame : s.warp.frames) frame.lanes &= ~s.lanes;
  s.warp.alive &= ~s.lanes;
}

void bar_sync(Step& s) {
  const Operand& which = s.in.operands.at(0);
  if (s.in.operands.size() > 1 || which.form != Operand::Form::immediate || which.number != 0) {
    throw Fault("only barrier 0 of the whole block is known here");
  }
  s.warp.waits = Wait::barrier;
}

// Every lane that the mask names has to come here, and alone those.
void check_mask(Step& s, const Operand& mask) {
  const Values masks(s, mask);
  for_lanes(s, [&](int lane) {
    const auto m = static_cast<uint32_t>(masks[lane]);
    if (!(m >> lane & 1)) throw Fault("a lane executes that its own mask does not name");
    if ((m & s.warp.alive) != s.lanes) throw Fault("diverged: lanes of the mask are elsewhere");
  });
}

void bar_warp_sync(Step& s) {
  check_mask(s, s.in.operands.at(0));
  if (s.lanes != s.warp.alive) throw Fault("only bar.warp.sync of the whole warp is known here");
  s.warp.synchronised = s.block.clock;
  s.block.shared.tell_warp(s.warp.index);
}

// shfl.sync.mode.b32 d|p, a, b, c, membermask: c holds the last lane, and from bit 8 on the bits that stay.
void shfl(Step& s) {
  const std::vector<Operand>& o = s.in.operands;
  check_mask(s, o.at(4));
  const Operand& to = o[0].form == Operand::Form::vector ? o[0].parts.at(0) : o[0];
  const Values a(s, o[1]), b(s, o[2]), c(s, o[3]);
  const std::string& mode = s.in.words[2];
  uint64_t got[32];
  bool in_range[32];
  for_lanes(s, [&](int lane) {
    const int by = static_cast<int>(b[lane] & 31), clamp = static_cast<int>(c[lane] & 31);
    const int kept = static_cast<int>(c[lane] >> 8 & 31);
    const int last = (lane & kept) | (clamp & ~kept), first = lane & kept;
    int from = 0;
    bool valid = false;
    if (mode == "up") {
      from = lane - by;
      valid = from >= last;
    } else if (mode == "down") {
      from = lane + by;
      valid = from <= last;
    } else if (mode == "bfly") {
      from = lane ^ by;
      valid = from <= last;
    } else if (mode == "idx") {
      from = first | (by & ~kept);
      valid = from <= last;
    } else {
      throw Fault("unknown mode of shfl");
    }
    if (!valid) from = lane;
    if (!(s.lanes >> from & 1)) throw Fault("shfl from a lane that does not execute it");
    got[lane] = cut(a[from], 32);
    in_range[lane] = valid;
  });
  uint64_t* d = result(s, to);
  for_lanes(s, [&](int lane) { d[lane] = got[lane]; });
  if (o[0].form == Operand::Form::vector && o[0].parts.at(1).form == Operand::Form::reg) {
    uint64_t* p = result(s, o[0].parts[1]);
    for_lanes(s, [&](int lane) { p[lane] = in_range[lane]; });
  }
}

void griddepcontrol_wait(Step& s) { s.warp.waited |= s.lanes; }

// vote.sync.ballot.b32 d, p, membermask
void ballot(Step& s) {
  check_mask(s, s.in.operands.at(2));
  const Values p(s, s.in.operands[1]);
  uint64_t bits = 0;
  for_lanes(s, [&](int lane) { bits |= (p[lane] & 1) << lane; });
  uint64_t* d = result(s, s.in.operands[0]);
  for_lanes(s, [&](int lane) { d[lane] = bits; });
}

// elect.sync d|p, membermask: p in one lane, always the same for one mask.
void elect(Step& s) {
  check_mask(s, s.in.operands.at(1));
  uint32_t leader = s.machine.elected;
  while (!(s.lanes >> leader & 1)) leader = (leader + 1) % 32;
  const std::vector<Operand>& pair = s.in.operands[0].parts;
  uint64_t* p = result(s, pair.at(1));
  for_lanes(s, [&](int lane) { p[lane] = static_cast<uint32_t>(lane) == leader; });
  if (pair[0].form == Operand::Form::reg) {
    uint64_t* d = result(s, pair[0]);
    for_lanes(s, [&](int lane) { d[lane] = leader; });
  }
}

}  // namespace

Meaning control(const Instruction& in) {
  const std::string& base = in.words[0];
  if (base == "bra") return bra;
  if (base == "ret" || base == "exit") return ret;
  if (in.opcode == "bar.sync") return bar_sync;
  if (in.opcode == "bar.warp.sync") return bar_warp_sync;
  if (base == "shfl" && in.words.size() == 4 && in.words[1] == "sync") return shfl;
  if (in.opcode == "vote.sync.ballot.b32") return ballot;
  if (in.opcode == "elect.sync") return elect;
  if (in.opcode == "griddepcontrol.wait") return griddepcontrol_wait;
  return nullptr;
}

}  // namespace ptx
