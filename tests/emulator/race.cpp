#include "race.h"

#if defined(EMULATOR_RACE)

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "machine.h"
#include "shared_memory.h"

namespace emulator::race {
namespace {

// Who touched a byte last: a thread (its number in the block), or one of these.
constexpr int kNobody = -1;
constexpr int kSeveralWarps = -2;
constexpr int kSeveralLanes = -3;  // and below: several lanes of warp kSeveralLanes - who

struct Access {
  int who = kNobody;
  uint32_t block = 0;  // in the order of execution
  uint32_t epoch = 0, warp_epoch = 0;
  uint32_t phase = 0;  // not 0: a bulk copy, that arrived in this phase
};

struct Shadow {
  Access writer, reader;
  bool in_flight = false;
};

struct Watched {
  const unsigned char* begin;
  size_t bytes;
  std::vector<Shadow> shadow;
};

std::vector<Shadow> shared_shadow(shared_memory::kArenaBytes);
size_t shared_touched = 0;  // bytes of it that the running block has seen
std::vector<Watched> watched;
uint32_t block_number = 0;
std::vector<uint3> blocks;  // by block number

int warp_of(int who) { return who >= 0 ? who / 32 : kSeveralLanes - who; }

bool unordered(const Access& before, const Access& now) {
  if (before.who == kNobody && !before.phase) return false;
  if (before.block != now.block) return true;  // (of the same launch: shadows are wiped between launches)
  if (before.epoch != now.epoch) return false;
  if (before.phase) return !thread(now.who).phases_seen.contains(before.phase);
  if (before.who == now.who) return false;
  const bool same_warp = before.who != kSeveralWarps && warp_of(before.who) == warp_of(now.who);
  return !(same_warp && before.warp_epoch != now.warp_epoch);
}

void add_reader(Access& reader, const Access& now) {
  if (!unordered(reader, now) || reader.who == kNobody) {
    const bool older_epoch = reader.block != now.block || reader.epoch != now.epoch;
    if (reader.who == kSeveralWarps && !older_epoch) return;
    reader = now;
  } else if (reader.block != now.block || reader.who == kSeveralWarps || warp_of(reader.who) != warp_of(now.who)) {
    reader = now;
    reader.who = kSeveralWarps;
  } else {
    reader.who = kSeveralLanes - warp_of(now.who);
  }
}

std::string name_of(const Access& a) {
  std::string block = a.block == block_number ? "" : " of another block";
  if (a.phase) return "a bulk copy whose arrival it has not waited for";
  if (a.who == kSeveralWarps) return "threads of several warps" + block;
  if (a.who <= kSeveralLanes) return "lanes of warp " + std::to_string(warp_of(a.who)) + block;
  return "thread " + std::to_string(a.who) + block;
}

void touch(Shadow& s, const Access& now, bool write, bool is_shared, ptrdiff_t offset) {
  const auto report = [&](const std::string& what, const Access* other) {
    std::string text =
        what + " at byte " + std::to_string(offset) + (is_shared ? " of shared memory" : " of an output");
    if (other) {
      text += ": thread " + std::to_string(now.who) + " and " + name_of(*other);
      if (!other->phase) text += " with no barrier between them";
    }
    die(text);
  };
  if (s.in_flight) report("access to bytes that an asynchronous copy is still writing", nullptr);
  if (unordered(s.writer, now)) report(write ? "write-write race" : "read-after-write race", &s.writer);
  if (write) {
    if (unordered(s.reader, now)) report("write-after-read race", &s.reader);
    s.writer = now;
    s.reader = {};
  } else {
    if (is_shared && s.writer.who == kNobody && !s.writer.phase) report("read of uninitialised bytes", nullptr);
    add_reader(s.reader, now);
  }
}

}  // namespace

void begin_launch() {
  block_number = 0;
  blocks.assign(1, {});
  for (Watched& w : watched) w.shadow.assign(w.bytes, {});
}

void begin_block() {
  ++block_number;
  blocks.push_back(block().index);
  std::fill_n(shared_shadow.begin(), shared_touched, Shadow{});
  shared_touched = 0;
}

void watch(const void* begin, size_t bytes) {
  watched.push_back({static_cast<const unsigned char*>(begin), bytes, std::vector<Shadow>(bytes)});
}
void watch_in_place(const void* begin, size_t bytes) { watch(begin, bytes); }
void forget() { watched.clear(); }

void access(int who, const void* p, size_t bytes, bool write) {
  const Access now{who, block_number, block().epoch, thread(who).warp_epoch};
  const ptrdiff_t offset = shared_memory::offset_of(p);
  if (offset >= 0) {
    shared_touched = std::max(shared_touched, offset + bytes);
    for (size_t i = 0; i < bytes; ++i) touch(shared_shadow[offset + i], now, write, true, offset + i);
    return;
  }
  for (Watched& w : watched) {
    const ptrdiff_t at = static_cast<const unsigned char*>(p) - w.begin;
    if (at < 0 || at + bytes > w.bytes) continue;
    for (size_t i = 0; i < bytes; ++i) touch(w.shadow[at + i], now, write, false, at + i);
    return;
  }
}

void copy_begins(const void* p, size_t bytes) {
  const ptrdiff_t offset = shared_memory::offset_of(p);
  for (size_t i = 0; i < bytes; ++i) shared_shadow[offset + i].in_flight = true;
}
void copy_ends(const void* p, size_t bytes) {
  const ptrdiff_t offset = shared_memory::offset_of(p);
  for (size_t i = 0; i < bytes; ++i) shared_shadow[offset + i].in_flight = false;
}

void bulk_copy_ends(const void* p, size_t bytes, uint32_t phase) {
  copy_ends(p, bytes);
  const ptrdiff_t offset = shared_memory::offset_of(p);
  for (size_t i = 0; i < bytes; ++i) shared_shadow[offset + i].writer = {-1, block_number, block().epoch, 0, phase};
}

std::string describe_writer(const void* p) {
  for (const Watched& w : watched) {
    const ptrdiff_t at = static_cast<const unsigned char*>(p) - w.begin;
    if (at < 0 || at >= ptrdiff_t(w.bytes)) continue;
    const Access& writer = w.shadow[at].writer;
    if (writer.who == kNobody) return "; the last launch did not write it";
    const uint3 b = blocks[writer.block];
    return "; written by thread " + std::to_string(writer.who) + " of block (" + std::to_string(b.x) + ", " +
           std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
  }
  return {};
}

void hook(const void* p, size_t bytes, bool write) {
  if (a_kernel_runs()) access(current().linear, p, bytes, write);
}

}  // namespace emulator::race

// What code compiled with -fsanitize=thread calls; the real runtime is not linked.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define EMULATOR_TSAN_HOOKS(N)                                                  \
  void __tsan_read##N(void* p) { emulator::race::hook(p, N, false); }           \
  void __tsan_write##N(void* p) { emulator::race::hook(p, N, true); }           \
  void __tsan_unaligned_read##N(void* p) { emulator::race::hook(p, N, false); } \
  void __tsan_unaligned_write##N(void* p) { emulator::race::hook(p, N, true); }
EMULATOR_TSAN_HOOKS(1)
EMULATOR_TSAN_HOOKS(2)
EMULATOR_TSAN_HOOKS(4)
EMULATOR_TSAN_HOOKS(8)
EMULATOR_TSAN_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { emulator::race::hook(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emulator::race::hook(p, bytes, true); }
}

#endif
