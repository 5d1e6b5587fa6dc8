#include "synchronise.h"

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {

bool same_place(Location a, Location b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

}  // namespace

void barrier(int id, int threads, Location at) {
  Barrier& b = block().barriers[id];
  Thread& me = current();
  me.doing = "__syncthreads";
  me.at = at;
  // Real hardware lets different __syncthreads meet, but a kernel that does so is wrong in all but contrived cases.
  if (b.arrived && !same_place(b.at, at)) {
    die("divergent barrier: other threads wait at line " + std::to_string(b.at.line));
  }
  b.at = at;
  if (++b.arrived < threads) return wait(&b, "waits in __syncthreads", at);
  b.arrived = 0;
  if (threads == block().threads) ++block().epoch;
  wake_all(&b);
  give_way();
}

void collective(uint32_t mask, void (*execute)(void**, uint32_t), void* mine, const char* name, Location at) {
  Thread& me = current();
  me.doing = name;
  me.at = at;
  const uint32_t my_bit = 1u << me.lane;
  if (!(mask & my_bit)) die("the executing lane is not in its own mask");
  auto& pending = block().warps[me.warp];
  // Lanes meet in the same instruction with the same mask. Others may wait elsewhere meanwhile, with masks that overlap
  // this one: that is legal where they can go on without it, and a deadlock, found by the scheduler, where they cannot.
  const auto same = [&](const Collective& c) { return c.mask == mask && c.execute == execute && same_place(c.at, at); };
  const size_t i = std::find_if(pending.begin(), pending.end(), same) - pending.begin();
  if (i == pending.size()) {
    Collective fresh;
    fresh.mask = mask;
    fresh.execute = execute;
    fresh.at = at;
    pending.push_back(fresh);
  }
  Collective& c = pending[i];
  c.lanes[me.lane] = mine;
  c.arrived |= my_bit;
  if (c.arrived != mask) return wait(nullptr, name, at);
  Collective complete = c;
  pending.erase(pending.begin() + i);
  execute(complete.lanes, mask);
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && lane != me.lane) wake(thread(me.warp * 32 + lane));
  }
  give_way();
}

void sync_warp(uint32_t mask, Location at) {
  collective(
      mask,
      [](void**, uint32_t mask) {
        const int first = current().warp * 32;
        uint32_t epoch = 0;
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) epoch = std::max(epoch, thread(first + i).warp_epoch);
        }
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) thread(first + i).warp_epoch = epoch + 1;
        }
      },
      nullptr, "__syncwarp", at);
}

uint32_t ballot(uint32_t mask, bool predicate, Location at) {
  struct Lane {
    bool predicate;
    uint32_t votes;
  } mine{predicate, 0};
  collective(
      mask,
      [](void** lanes, uint32_t mask) {
        uint32_t votes = 0;
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) votes |= uint32_t(static_cast<Lane*>(lanes[i])->predicate) << i;
        }
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) static_cast<Lane*>(lanes[i])->votes = votes;
        }
      },
      &mine, "warp vote", at);
  return mine.votes;
}

}  // namespace emulator
