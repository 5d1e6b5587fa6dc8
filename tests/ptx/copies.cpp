// Asynchronous copies. A copy holds its destination from its issue on, and lands as late as it may: cp.async when its
// thread waits for its group, a box when somebody waits for its mbarrier's phase and nobody else can run.
#include <cstring>

#include "meaning.h"
#include "tensor_map.h"

namespace ptx {
namespace {

// ---- cp.async, by threads

// cp.async.ca|cg.shared.global [destination], [source], bytes {, source_bytes}: zeros behind the source's bytes.
void cp_async(Step& s) {
  const std::vector<Operand>& o = s.in.operands;
  const Addresses destinations(s, o.at(0)), sources(s, o.at(1));
  const auto bytes = static_cast<uint32_t>(o.at(2).number);
  if (bytes != 16 && (s.in.words[2] == "cg" || (bytes != 4 && bytes != 8))) throw Fault("cp.async of an unknown size");
  std::vector<Access> to, from;
  for_lanes(s, [&](int lane) {
    const uint32_t wanted = o.size() > 3 ? static_cast<uint32_t>(Values(s, o[3])[lane]) : bytes;
    if (wanted > bytes) throw Fault("cp.async reads more than it writes");
    const auto destination = static_cast<uint32_t>(destinations[lane]);
    s.block.shared.begin_copy(destination, bytes, bytes, s.toucher(lane), nullptr);
    if (sources[lane] % bytes) throw Fault("misaligned: cp.async reads off its size");
    if (wanted) {
      s.machine.global.read(sources[lane], wanted, 1, ~0ull, s.thread(lane));
      from.push_back({lane, sources[lane], wanted});
    }
    s.machine.counts.begin_copy(bytes);
    to.push_back({lane, destination, bytes});
    s.warp.copies[static_cast<size_t>(lane)].open.push_back({destination, bytes, wanted, sources[lane]});
  });
  if (!from.empty()) s.machine.counts.global(s.in.opcode, from);
  s.machine.counts.shared(s.in.opcode + " (to shared)", to);
}

void commit_group(Step& s) {
  for_lanes(s, [&](int lane) {
    LaneCopies& copies = s.warp.copies[static_cast<size_t>(lane)];
    copies.committed.push_back(std::move(copies.open));
    copies.open.clear();
  });
}

void land(Step& s, int lane, const std::vector<AsyncCopy>& group) {
  for (const AsyncCopy& c : group) {
    uint8_t* to = s.block.shared.end_copy(c.destination, c.bytes, s.toucher(lane), 0);
    memset(to, 0, c.bytes);
    memcpy(to, reinterpret_cast<const void*>(c.source), c.source_bytes);
    s.machine.counts.end_copy(c.bytes);
  }
}

// Until at most N of the thread's latest groups are on their way.
void wait_group(Step& s) {
  const size_t left = s.in.operands.at(0).number;
  for_lanes(s, [&](int lane) {
    auto& groups = s.warp.copies[static_cast<size_t>(lane)].committed;
    for (; groups.size() > left; groups.pop_front()) land(s, lane, groups.front());
  });
}

// ---- mbarriers

Mbarrier& find_mbarrier(Step& s, uint64_t address, int lane) {
  const auto at = static_cast<uint32_t>(address);
  s.block.shared.read(at, 8, 8, ~0ull, s.toucher(lane));  // is it there, and has this thread heard of it?
  const auto found = s.block.mbarriers.find(at);
  if (found == s.block.mbarriers.end()) throw Fault("no mbarrier has been initialised at " + std::to_string(at));
  return found->second;
}

void end_phase_if_complete(Block& block, Mbarrier& b) {
  if (b.pending || b.transactions) return;
  ++b.phase;
  b.last_event = b.event;
  b.event = ++block.events;
  b.pending = b.expected;
  for (Warp& w : block.warps) {
    if (w.waits == Wait::phase) w.waits = Wait::no;
  }
}

void mbarrier_init(Step& s) {
  const Addresses addresses(s, s.in.operands.at(0));
  const Values counts(s, s.in.operands.at(1));
  for_lanes(s, [&](int lane) {
    const auto at = static_cast<uint32_t>(addresses[lane]), count = static_cast<uint32_t>(counts[lane]);
    if (count < 1 || count >= 1u << 20) throw Fault("an mbarrier of " + std::to_string(count) + " arrivals");
    if (s.block.mbarriers.count(at)) throw Fault("an mbarrier is initialised again");
    memset(s.block.shared.write(at, 8, 8, s.toucher(lane)), 0xBA, 8);
    Mbarrier b;
    b.expected = b.pending = count;
    b.event = ++s.block.events;
    b.maker = s.toucher(lane).thread;
    s.block.mbarriers[at] = b;
  });
}

void fence_mbarrier_init(Step& s) {
  for_lanes(s, [&](int lane) {
    for (auto& [at, b] : s.block.mbarriers) {
      if (b.maker == s.toucher(lane).thread) b.fenced = true;
    }
  });
}

void fence_proxy(Step& s) {
  for_lanes(s, [&](int lane) { s.block.fences[s.toucher(lane).thread] = s.block.clock; });
}

// mbarrier.arrive.expect_tx.shared::cta.b64 _, [address], bytes: announces bytes, then arrives.
void arrive_expect(Step& s) {
  if (s.in.operands.at(0).form != Operand::Form::sink) throw Fault("the state of an mbarrier is not known here");
  const Addresses addresses(s, s.in.operands.at(1));
  const Values bytes(s, s.in.operands.at(2));
  for_lanes(s, [&](int lane) {
    Mbarrier& b = find_mbarrier(s, addresses[lane], lane);
    if (!b.pending) throw Fault("more arrivals than the mbarrier expects");
    b.transactions += static_cast<uint32_t>(bytes[lane]);
    --b.pending;
    end_phase_if_complete(s.block, b);
  });
}

// mbarrier.try_wait.parity p, [address], parity: true once the phase of that parity is over.
void try_wait(Step& s) {
  const Addresses addresses(s, s.in.operands.at(1));
  const Values parities(s, s.in.operands.at(2));
  bool complete = true;
  for_lanes(s, [&](int lane) {
    complete = complete && (find_mbarrier(s, addresses[lane], lane).phase & 1) != (parities[lane] & 1);
  });
  if (!complete) {
    s.again = true;
    return;
  }
  uint64_t* p = result(s, s.in.operands[0]);
  for_lanes(s, [&](int lane) {
    const Mbarrier& b = find_mbarrier(s, addresses[lane], lane);
    if (b.last_event) s.block.shared.saw(b.last_event, s.warp.index, 1u << lane);
    p[lane] = 1;
  });
}

// ---- boxes, by the copy engine

TensorMap read_map(Step& s, uint64_t address) {
  const auto base = reinterpret_cast<uint64_t>(s.machine.launch.parameters.data());
  if (address < base || address + 128 > base + s.machine.program.parameter_bytes) {
    throw Fault("a tensor map that is no parameter");
  }
  if ((address - base) % 64) throw Fault("misaligned: a tensor map not on 64 bytes");
  TensorMap map;
  memcpy(&map, reinterpret_cast<const void*>(address), sizeof map);
  if (map.magic != TensorMap::kMagic) throw Fault("a tensor map that nobody has encoded");
  return map;
}

// cp.async.bulk.tensor.4d [destination], [map, {c, w, h, n}], [mbarrier]
void copy_box(Step& s) {
  const Addresses destinations(s, s.in.operands.at(0)), barriers(s, s.in.operands.at(2));
  const Operand& from = s.in.operands[1];
  const Values maps(s, from);
  if (from.parts.size() != 4) throw Fault("a box of four coordinates expected");
  for_lanes(s, [&](int lane) {
    const TensorMap map = read_map(s, maps[lane]);
    int64_t at[4];
    for (size_t i = 0; i < 4; ++i) at[i] = static_cast<int32_t>(Values(s, from.parts[i])[lane]);
    BulkCopy copy;
    copy.destination = static_cast<uint32_t>(destinations[lane]);
    copy.bytes = map.box[0] * map.box[1] * map.box[2] * map.box[3] * map.element_bytes;
    copy.issuer = s.toucher(lane).thread;
    if (copy.destination % 128) throw Fault("misaligned: a box's destination not on 128 bytes");
    s.block.shared.begin_copy(copy.destination, copy.bytes, 128, s.toucher(lane), &s.block.fences);
    uint32_t offset = 0;
    for (int64_t n = at[3]; n < at[3] + map.box[3]; ++n)
      for (int64_t h = at[2]; h < at[2] + map.box[2]; ++h)
        for (int64_t w = at[1]; w < at[1] + map.box[1]; ++w, offset += map.box[0] * map.element_bytes) {
          const int64_t first = std::max<int64_t>(at[0], 0), end = std::min<int64_t>(at[0] + map.box[0], map.sizes[0]);
          const bool inside = n >= 0 && n < map.sizes[3] && h >= 0 && h < map.sizes[2] && w >= 0 && w < map.sizes[1];
          if (!inside || first >= end) continue;
          const uint64_t source =
              map.base + static_cast<uint64_t>(n) * map.strides[2] + static_cast<uint64_t>(h) * map.strides[1] +
              static_cast<uint64_t>(w) * map.strides[0] + static_cast<uint64_t>(first) * map.element_bytes;
          const auto bytes = static_cast<uint32_t>(end - first) * map.element_bytes;
          s.machine.global.read(source, bytes, 1, ~0ull, s.thread(lane));
          s.machine.counts.touch(s.in.opcode, source, bytes);
          copy.inside.push_back({offset + static_cast<uint32_t>(first - at[0]) * map.element_bytes, bytes, source});
        }
    Mbarrier& b = find_mbarrier(s, barriers[lane], lane);
    if (!b.fenced) throw Fault("the copy engine has not been told of this mbarrier (fence.mbarrier_init)");
    Count& count = s.machine.counts.memory[s.in.opcode];
    ++count.requests;
    count.bytes += copy.bytes;
    s.machine.counts.begin_copy(copy.bytes);
    b.in_flight.push_back(std::move(copy));
  });
}

}  // namespace

bool land_copies(Machine& machine, Block& block) {
  std::vector<Mbarrier*> waited;
  for (auto& [at, b] : block.mbarriers) {
    if (!b.in_flight.empty()) waited.push_back(&b);
  }
  if (waited.empty()) return false;
  Mbarrier& b = *waited[machine.random() % waited.size()];
  const size_t which = machine.random() % b.in_flight.size();
  const BulkCopy copy = b.in_flight[which];
  b.in_flight.erase(b.in_flight.begin() + static_cast<ptrdiff_t>(which));
  const Toucher issuer{copy.issuer, block.clock, 0, 0};
  uint8_t* to = block.shared.end_copy(copy.destination, copy.bytes, issuer, b.event);
  memset(to, 0, copy.bytes);
  for (const BulkCopy::Run& run : copy.inside) {
    memcpy(to + run.offset, reinterpret_cast<const void*>(run.source), run.bytes);
  }
  machine.counts.end_copy(copy.bytes);
  b.transactions -= copy.bytes;
  block.shared.saw(b.event, 0, 0);
  end_phase_if_complete(block, b);
  return true;
}

Meaning copies(const Instruction& in) {
  if (in.opcode == "cp.async.ca.shared.global" || in.opcode == "cp.async.cg.shared.global") return cp_async;
  if (in.opcode == "cp.async.commit_group") return commit_group;
  if (in.opcode == "cp.async.wait_group") return wait_group;
  if (in.opcode == "mbarrier.init.shared::cta.b64") return mbarrier_init;
  if (in.opcode == "mbarrier.arrive.expect_tx.shared::cta.b64") return arrive_expect;
  if (in.opcode == "mbarrier.try_wait.parity.shared::cta.b64") return try_wait;
  if (in.opcode == "fence.mbarrier_init.release.cluster") return fence_mbarrier_init;
  if (in.opcode == "fence.proxy.async.shared::cta") return fence_proxy;
  if (in.opcode == "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes") return copy_box;
  return nullptr;
}

}  // namespace ptx
