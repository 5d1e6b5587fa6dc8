#include "machine.h"

#include <algorithm>
#include <numeric>

namespace ptx {

constexpr uint32_t kMostTicks = 1 << 25;  // of a block: some seconds

Machine::Machine(const Program& p, const Launch& l, GlobalMemory& g, uint64_t seed)
    : program(p),
      launch(l),
      global(g),
      random(seed),
      executed(p.code.size()),
      elected(static_cast<uint32_t>(random() % 32)) {
  const uint32_t threads = l.block[0] * l.block[1] * l.block[2];
  if (threads == 0 || threads > 1024) throw Fault("a block of " + std::to_string(threads) + " threads");
  if (threads > static_cast<uint32_t>(p.most_threads)) {
    throw Fault("a block of " + std::to_string(threads) + " threads, .maxntid is " + std::to_string(p.most_threads));
  }
  if (l.parameters.size() < p.parameter_bytes) throw Fault("too few bytes of parameters");
}

void Machine::run() {
  global.begin_launch();
  std::vector<uint32_t> order(size_t{launch.grid[0]} * launch.grid[1] * launch.grid[2]);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (const uint32_t number : order) run_block(number);
  for (size_t i = 0; i < executed.size(); ++i) {
    if (executed[i]) counts.executed[program.code[i].opcode] += executed[i];
  }
}

void Machine::start(Block& block, Warp& warp) {
  const auto& size = launch.block;
  const uint32_t threads = size[0] * size[1] * size[2];
  // Nobody has written the registers: what they hold is anything.
  warp.registers.assign(static_cast<size_t>(program.register_count) * 32, 0x7FF4DEAD7FADFACEull);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t t = warp.index * 32 + lane;
    if (t < threads) warp.alive |= 1u << lane;
  }
  warp.frames = {{0, static_cast<int>(program.code.size()), warp.alive}};
  for (const auto& [name, reg] : program.registers) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint32_t t = warp.index * 32 + lane;
      const std::array<uint32_t, 3> thread = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
      const size_t axis = name.back() == 'y' ? 1 : name.back() == 'z' ? 2 : 0;
      const uint64_t value = name.rfind("%tid.", 0) == 0      ? thread[axis]
                             : name.rfind("%ntid.", 0) == 0   ? size[axis]
                             : name.rfind("%ctaid.", 0) == 0  ? block.index[axis]
                             : name.rfind("%nctaid.", 0) == 0 ? launch.grid[axis]
                             : name == "%laneid"              ? lane
                             : name == "%warpid"              ? warp.index
                                                              : (threads + 31) / 32;
      warp.registers[static_cast<size_t>(reg) * 32 + lane] = value;
    }
  }
}

void Machine::run_block(uint32_t number) {
  Block block;
  block.number = number;
  block.index = {number % launch.grid[0], number / launch.grid[0] % launch.grid[1],
                 number / launch.grid[0] / launch.grid[1]};
  block.shared.begin_block(program.static_shared + launch.dynamic_shared);
  const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
  block.fences.assign((threads + 31) / 32 * 32, 0);
  block.warps.resize((threads + 31) / 32);
  for (size_t i = 0; i < block.warps.size(); ++i) {
    block.warps[i].index = static_cast<uint32_t>(i);
    start(block, block.warps[i]);
  }
  for (;;) {
    std::vector<Warp*> ready;
    for (Warp& w : block.warps) {
      if (w.waits == Wait::no) ready.push_back(&w);
    }
    if (!ready.empty()) {
      run_warp(block, *ready[random() % ready.size()]);
      continue;
    }
    if (std::all_of(block.warps.begin(), block.warps.end(), [](const Warp& w) { return w.waits == Wait::done; })) break;
    if (!release_barriers(block)) {
      throw Fault(program.name + ": block " + std::to_string(number) + " waits for ever: " +
                  std::to_string(std::count_if(block.warps.begin(), block.warps.end(),
                                               [](const Warp& w) { return w.waits == Wait::done; })) +
                  " of " + std::to_string(block.warps.size()) + " warps have ended, the others are at a barrier");
    }
  }
  counts.reads.end_block(), counts.writes.end_block();
  counts.in_flight = 0;
  for (const auto& [address, barrier] : block.mbarriers) {
    if (!barrier.in_flight.empty()) throw Fault(program.name + ": the block ends before its copies have come");
  }
}

// When nobody can run: copies land for those who wait for a phase; else the barrier is complete if every warp is there.
bool Machine::release_barriers(Block& block) {
  const auto any = [&](Wait wait) {
    return std::any_of(block.warps.begin(), block.warps.end(), [&](const Warp& w) { return w.waits == wait; });
  };
  if (any(Wait::phase)) return land_copies(*this, block);
  if (any(Wait::done)) return false;
  block.barrier_clock = block.clock++;
  block.shared.tell_all();
  for (Warp& w : block.warps) w.waits = Wait::no;
  return true;
}

static bool touches_global(const Instruction& in) { return in.has("global") && in.words[0] != "cvta"; }

void Machine::run_warp(Block& block, Warp& warp) {
  while (warp.waits == Wait::no) {
    while (!warp.frames.empty() && (!warp.frames.back().lanes || warp.frames.back().pc == warp.frames.back().join)) {
      warp.frames.pop_back();
    }
    if (warp.frames.empty()) {
      if (launch.early && !warp.waited) throw Fault(program.name + ": a warp ends without griddepcontrol.wait");
      warp.waits = Wait::done;
      return;
    }
    const int pc = warp.frames.back().pc;
    const Instruction& in = program.code[static_cast<size_t>(pc)];
    uint32_t lanes = warp.frames.back().lanes;
    if (in.guard >= 0) {
      const uint64_t* guard = &warp.registers[static_cast<size_t>(in.guard) * 32];
      uint32_t chosen = 0;
      for (uint32_t lane = 0; lane < 32; ++lane)
        chosen |= static_cast<uint32_t>((guard[lane] & 1) ^ in.guard_negated) << lane;
      lanes &= chosen;
    }
    Step step{*this, block, warp, in, lanes, pc + 1};
    try {
      if (lanes && in.aligned && lanes != warp.alive) {
        throw Fault("diverged: an aligned instruction for a part of the warp");
      }
      if (launch.early && lanes & ~warp.waited && touches_global(in)) {
        throw Fault("global memory before griddepcontrol.wait: the launch before may still write or read it");
      }
      if (lanes) in.execute(step);
    } catch (const Fault& fault) {
      throw Fault(std::string(fault.what()) + "\n  in " + program.name + "\n  " + program.text_of(in) + "\n  block " +
                  std::to_string(block.index[0]) + "," + std::to_string(block.index[1]) + "," +
                  std::to_string(block.index[2]) + " warp " + std::to_string(warp.index) + " lane " +
                  std::to_string(step.lane));
    }
    if (step.again) {
      warp.waits = Wait::phase;
      return;
    }
    ++executed[static_cast<size_t>(pc)];
    if (++block.clock > kMostTicks) throw Fault(program.name + ": a block runs for ever");
    if (!step.diverged) warp.frames.back().pc = step.next;
  }
}

}  // namespace ptx
