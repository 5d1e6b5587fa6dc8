// Loads, stores, and addresses from one space to another.
//
// Global addresses are the host's; shared ones count from the block's first byte; those of parameters from the first
// parameter. The parameters' own place in memory is what cvta.param makes of them. A generic address is a global one:
// none is made of shared memory's, as cvta.shared is unknown.
#include <cstring>

#include "meaning.h"

namespace ptx {
namespace {

uint64_t extended(const uint8_t* from, const Type& type) {
  uint64_t value = 0;
  memcpy(&value, from, static_cast<size_t>(type.bytes()));
  if (type.kind == Kind::signed_ && type.bits < 64 && (value >> (type.bits - 1) & 1))
    value |= ~uint64_t{0} << type.bits;
  return value;
}

// The registers that an access moves: one, or those of {a, b, c, d}.
std::vector<const Operand*> moved(const Step& s, const Operand& o) {
  if (o.form != Operand::Form::vector) return {&o};
  std::vector<const Operand*> parts;
  for (const Operand& part : o.parts) parts.push_back(&part);
  if (static_cast<int>(parts.size()) != s.in.vector) throw Fault("as many registers as the vector has elements");
  return parts;
}

// The sum of a 32-bit register and an offset wraps: a base may lie before the array.
uint32_t shared_address(const Addresses& addresses, int lane) {
  if (addresses.base(lane) >> 32) throw Fault("out of bounds: shared address of more than 32 bits");
  return static_cast<uint32_t>(addresses[lane]);
}

enum class Space { parameter, global, shared, generic };
Space named_space(const Instruction& in) {
  const std::string& word = in.words[1];
  return word == "param"    ? Space::parameter
         : word == "global" ? Space::global
         : word == "shared" ? Space::shared
                            : Space::generic;
}
Space space_of(const Instruction& in) {
  const Space space = named_space(in);
  return space == Space::generic ? Space::global : space;
}

void count(Step& s, const Addresses& addresses, uint32_t bytes) {
  std::vector<Access> lanes;
  const bool shared = space_of(s.in) == Space::shared;
  for_lanes(
      s, [&](int lane) { lanes.push_back({lane, shared ? shared_address(addresses, lane) : addresses[lane], bytes}); });
  if (space_of(s.in) == Space::global) s.machine.counts.global(s.in.opcode, lanes);
  if (shared) s.machine.counts.shared(s.in.opcode, lanes);
}

void ld(Step& s) {
  const Addresses addresses(s, s.in.operands.at(1));
  const auto to = moved(s, s.in.operands[0]);
  const auto element = static_cast<uint32_t>(s.in.type.bytes()), bytes = element * static_cast<uint32_t>(to.size());
  const Space space = space_of(s.in);
  uint64_t found[4][32];
  for_lanes(s, [&](int lane) {
    const uint64_t at = addresses[lane];
    const uint8_t* from = nullptr;
    if (space == Space::parameter) {
      const auto& parameters = s.machine.launch.parameters;
      if (at % bytes) throw Fault("misaligned: parameter");
      if (at + bytes > s.machine.program.parameter_bytes) throw Fault("out of bounds: parameter");
      from = &parameters[at];
    } else if (space == Space::global) {
      from = s.machine.global.read(at, bytes, bytes, s.in.used_bytes, s.thread(lane));
    } else {
      from = s.block.shared.read(shared_address(addresses, lane), bytes, bytes, s.in.used_bytes, s.toucher(lane));
    }
    for (size_t i = 0; i < to.size(); ++i) found[i][lane] = extended(from + i * element, s.in.type);
  });
  for (size_t i = 0; i < to.size(); ++i) {
    if (to[i]->form == Operand::Form::sink) continue;
    uint64_t* d = result(s, *to[i]);
    for_lanes(s, [&](int lane) { d[lane] = found[i][lane]; });
  }
  count(s, addresses, bytes);
}

void st(Step& s) {
  const Addresses addresses(s, s.in.operands.at(0));
  const auto from = moved(s, s.in.operands.at(1));
  const auto element = static_cast<uint32_t>(s.in.type.bytes()), bytes = element * static_cast<uint32_t>(from.size());
  const Space space = space_of(s.in);
  std::vector<Values> values;
  for (const Operand* o : from) values.emplace_back(s, *o);
  for_lanes(s, [&](int lane) {
    const uint64_t at = addresses[lane];
    uint8_t* to = nullptr;
    if (space == Space::global) {
      to = s.machine.global.write(at, bytes, bytes, s.thread(lane));
    } else {
      to = s.block.shared.write(shared_address(addresses, lane), bytes, bytes, s.toucher(lane));
    }
    for (size_t i = 0; i < values.size(); ++i) {
      const uint64_t value = values[i][lane];
      memcpy(to + i * element, &value, element);
    }
  });
  count(s, addresses, bytes);
}

void cvta_to_global(Step& s) {
  const Values a(s, s.in.operands.at(1));
  uint64_t* d = result(s, s.in.operands[0]);
  for_lanes(s, [&](int lane) { d[lane] = a[lane]; });
}

void cvta_param(Step& s) {
  const Values a(s, s.in.operands.at(1));
  uint64_t* d = result(s, s.in.operands[0]);
  const auto base = reinterpret_cast<uint64_t>(s.machine.launch.parameters.data());
  for_lanes(s, [&](int lane) { d[lane] = base + a[lane]; });
}

// Only these words may stand between ld or st and the type: caching hints change nothing here.
bool is_plain(const Instruction& in) {
  for (size_t i = named_space(in) == Space::generic ? 1 : 2; i < in.words.size(); ++i) {
    const std::string& w = in.words[i];
    if (w != "nc" && w != "v2" && w != "v4" && type_of(w).kind == Kind::none) return false;
  }
  return true;
}

}  // namespace

Meaning access(const Instruction& in) {
  if (in.words.size() < 2) return nullptr;
  if (in.words[0] == "ld" && is_plain(in)) return ld;
  if (in.words[0] == "st" && named_space(in) != Space::parameter && is_plain(in)) return st;
  if (in.opcode == "cvta.to.global.u64") return cvta_to_global;
  if (in.opcode == "cvta.param.u64") return cvta_param;
  return nullptr;
}

Meaning meaning_of(const Instruction& in) {
  for (const auto family : {arithmetic, control, access, copies, products}) {
    if (const Meaning found = family(in)) return found;
  }
  return nullptr;
}

}  // namespace ptx
