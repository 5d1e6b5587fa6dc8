#include "memory.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ptx {

[[gnu::format(printf, 1, 2)]] static std::string text(const char* format, ...) {
  char line[300];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

// ---- global memory

// Some kernels compute a result that is not finite once more, in the same thread: by PTX_REWRITES=1 they may.
const bool kMayRewrite = getenv("PTX_REWRITES") != nullptr;

void GlobalMemory::add(const void* begin, size_t bytes) {
  const auto address = reinterpret_cast<uint64_t>(begin);
  buffers_[address] = {address, bytes, false, {}, {}, {}};
  last_ = nullptr;
}

void GlobalMemory::remove(const void* begin) {
  buffers_.erase(reinterpret_cast<uint64_t>(begin));
  last_ = nullptr;
}

void GlobalMemory::watch(const void* begin, size_t bytes) {
  add(begin, bytes);
  GlobalBuffer& b = buffers_[reinterpret_cast<uint64_t>(begin)];
  b.watched = true;
  b.known.assign(bytes, 0);
  b.launch.assign(bytes, 0);
  b.writer.assign(bytes, 0);
}

void GlobalMemory::fill(const void* begin) {
  GlobalBuffer& b = buffers_.at(reinterpret_cast<uint64_t>(begin));
  b.known.assign(b.bytes, 1);
}

GlobalBuffer& GlobalMemory::find(uint64_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  if (address % alignment) throw Fault(text("misaligned: %s of %u bytes at %#lx", what, alignment, address));
  if (last_ && address >= last_->begin && address + bytes <= last_->begin + last_->bytes) return *last_;
  auto after = buffers_.upper_bound(address);
  if (after == buffers_.begin()) throw Fault(text("out of bounds: %s at %#lx, where nothing is", what, address));
  GlobalBuffer& b = std::prev(after)->second;
  if (address + bytes > b.begin + b.bytes) {
    throw Fault(text("out of bounds: %s of %u bytes at byte %ld of a buffer of %ld", what, bytes,
                     static_cast<long>(address - b.begin), static_cast<long>(b.bytes)));
  }
  last_ = &b;
  return b;
}

const uint8_t* GlobalMemory::read(uint64_t address, uint32_t bytes, uint32_t alignment, uint64_t used,
                                  uint32_t thread) {
  const GlobalBuffer& b = find(address, bytes, alignment, "read");
  if (b.watched) {
    for (uint32_t i = 0; i < bytes; ++i) {
      const uint64_t at = address - b.begin + i;
      if (!(used >> i & 1)) continue;
      if (!b.known[at]) throw Fault(text("read of unwritten global memory, byte %ld", static_cast<long>(at)));
      if (b.launch[at] == launch_ && b.writer[at] != thread) {
        throw Fault(text("race: global byte %ld is read in the launch in which another thread (%u) writes it",
                         static_cast<long>(at), b.writer[at]));
      }
    }
  }
  return reinterpret_cast<const uint8_t*>(address);
}

uint8_t* GlobalMemory::write(uint64_t address, uint32_t bytes, uint32_t alignment, uint32_t thread) {
  GlobalBuffer& b = find(address, bytes, alignment, "write");
  if (!b.watched) throw Fault(text("write to an operand, byte %ld", static_cast<long>(address - b.begin)));
  for (uint32_t i = 0; i < bytes; ++i) {
    const uint64_t at = address - b.begin + i;
    if (b.launch[at] == launch_ && !(kMayRewrite && b.writer[at] == thread)) {
      throw Fault(text("written twice: global byte %ld, by thread %u before", static_cast<long>(at), b.writer[at]));
    }
    b.known[at] = 1;
    b.launch[at] = launch_;
    b.writer[at] = thread;
  }
  return reinterpret_cast<uint8_t*>(address);
}

// ---- shared memory

void SharedMemory::begin_block(uint32_t bytes) {
  size_ = bytes;
  data_.assign(bytes, 0xFF);
  bytes_.assign(bytes, Byte{});
  seen_.assign(1, {});
}

void SharedMemory::check(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) const {
  if (address % alignment) throw Fault(text("misaligned: shared %s of %u bytes at %u", what, alignment, address));
  if (address > size_ || bytes > size_ - address) {
    throw Fault(text("out of bounds: shared %s of %u bytes at %u of %u", what, bytes, address, size_));
  }
}

// Whether what `by` did at `when` lies behind the toucher.
bool SharedMemory::ordered(uint16_t by, uint32_t when, const Toucher& t) const {
  if (by == t.thread || when <= t.block_barrier) return true;
  return by / 32 == t.thread / 32 && when <= t.warp_barrier;
}

const uint8_t* SharedMemory::read(uint32_t address, uint32_t bytes, uint32_t alignment, uint64_t used,
                                  const Toucher& t) {
  check(address, bytes, alignment, "read");
  for (uint32_t i = 0; i < bytes; ++i) {
    Byte& b = bytes_[address + i];
    if (!(used >> i & 1)) continue;
    if (b.state == State::unwritten) throw Fault(text("read of unwritten shared memory, byte %u", address + i));
    if (b.state == State::flying)
      throw Fault(text("read before the wait: a copy is on its way to byte %u", address + i));
    if (b.by_copy) {
      const auto& lanes = seen_[b.written];
      if (!(lanes[t.thread / 32] >> t.thread % 32 & 1)) {
        throw Fault(
            text("read before the wait: thread %u has not waited for what came to byte %u", t.thread, address + i));
      }
    } else if (!ordered(b.writer, b.written, t)) {
      throw Fault(
          text("race: shared byte %u, written by thread %u, is read without a barrier between", address + i, b.writer));
    }
    if (b.reader != t.thread) b.other = b.reader, b.other_read = b.read;
    if (b.read <= t.block_barrier) b.warps = 0;
    b.warps |= 1u << t.thread / 32;
    b.reader = t.thread;
    b.read = t.now;
  }
  return &data_[address];
}

// Nobody who has read the byte may still be without a barrier between him and the toucher: of other warps all are
// known, of the toucher's own the last two readers.
void SharedMemory::check_readers(const Byte& b, uint32_t address, const Toucher& t, const char* what) const {
  const auto fault = [&](uint32_t reader) {
    throw Fault(
        text("race: shared byte %u, read by thread %u, is %s without a barrier between", address, reader, what));
  };
  if (b.read && !ordered(b.reader, b.read, t)) fault(b.reader);
  if (b.other_read && !ordered(b.other, b.other_read, t)) fault(b.other);
  const uint32_t others = b.read > t.block_barrier ? b.warps & ~(1u << t.thread / 32) : 0;
  if (others) fault(static_cast<uint32_t>(__builtin_ctz(others)) * 32);
}

uint8_t* SharedMemory::write(uint32_t address, uint32_t bytes, uint32_t alignment, const Toucher& t) {
  check(address, bytes, alignment, "write");
  for (uint32_t i = 0; i < bytes; ++i) {
    Byte& b = bytes_[address + i];
    if (b.state == State::flying) throw Fault(text("write to byte %u, to which a copy is on its way", address + i));
    if (b.state == State::written && !b.by_copy && !ordered(b.writer, b.written, t)) {
      throw Fault(text("race: shared byte %u is written by thread %u and again without a barrier between", address + i,
                       b.writer));
    }
    check_readers(b, address + i, t, "overwritten");
    b.state = State::written;
    b.by_copy = false;
    b.writer = t.thread;
    b.written = t.now;
  }
  return &data_[address];
}

void SharedMemory::begin_copy(uint32_t address, uint32_t bytes, uint32_t alignment, const Toucher& t,
                              const std::vector<uint32_t>* fences) {
  check(address, bytes, alignment, "copy");
  for (uint32_t i = 0; i < bytes; ++i) {
    Byte& b = bytes_[address + i];
    if (b.state == State::flying) throw Fault(text("two copies are on their way to shared byte %u", address + i));
    if (b.state == State::written && !b.by_copy && !ordered(b.writer, b.written, t)) {
      throw Fault(text("race: a copy to shared byte %u, which thread %u writes, without a barrier between", address + i,
                       b.writer));
    }
    check_readers(b, address + i, t, "overwritten by a copy");
    if (b.read && fences && (*fences)[b.reader] < b.read) {
      throw Fault(
          text("no fence: the copy engine writes shared byte %u, which thread %u has read", address + i, b.reader));
    }
    b.state = State::flying;
  }
}

uint8_t* SharedMemory::end_copy(uint32_t address, uint32_t bytes, const Toucher& t, uint32_t event) {
  for (uint32_t i = 0; i < bytes; ++i) {
    Byte& b = bytes_[address + i] = Byte{};
    b.state = State::written, b.by_copy = event != 0, b.writer = t.thread, b.written = event ? event : t.now;
  }
  return &data_[address];
}

void SharedMemory::saw(uint32_t event, uint32_t warp, uint32_t lanes) {
  while (seen_.size() <= event) seen_.emplace_back(32, 0);
  seen_[event][warp] |= lanes;
}

void SharedMemory::tell_all() {
  for (auto& lanes : seen_) {
    bool anybody = false;
    for (const uint32_t l : lanes) anybody |= l != 0;
    if (anybody) lanes.assign(lanes.size(), ~0u);
  }
}

void SharedMemory::tell_warp(uint32_t warp) {
  for (auto& lanes : seen_) {
    if (warp < lanes.size() && lanes[warp]) lanes[warp] = ~0u;
  }
}

}  // namespace ptx
