// Numbers: whole ones wrap, floating ones round to nearest even unless the opcode says otherwise.
#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>

#include "half.h"
#include "meaning.h"

namespace ptx {
namespace {

// ---- registers as numbers of C++

template <typename T>
T as(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

// d = f(a, b, c) of registers as T; the result may be of another type.
template <typename T, typename F>
void one(Step& s, F f) {
  const Values a(s, s.in.operands.at(1));
  uint64_t* d = result(s, s.in.operands[0]);
  for_lanes(s, [&](int lane) { d[lane] = bits_of(f(as<T>(a[lane]))); });
}
template <typename T, typename F>
void two(Step& s, F f) {
  const Values a(s, s.in.operands.at(1)), b(s, s.in.operands.at(2));
  uint64_t* d = result(s, s.in.operands[0]);
  for_lanes(s, [&](int lane) { d[lane] = bits_of(f(as<T>(a[lane]), as<T>(b[lane]))); });
}
template <typename T, typename F>
void three(Step& s, F f) {
  const Values a(s, s.in.operands.at(1)), b(s, s.in.operands.at(2)), c(s, s.in.operands.at(3));
  uint64_t* d = result(s, s.in.operands[0]);
  for_lanes(s, [&](int lane) { d[lane] = bits_of(f(as<T>(a[lane]), as<T>(b[lane]), as<T>(c[lane]))); });
}

template <typename T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>) with the C++ type of a register type.
template <typename F>
void with_whole(const Type& t, F f) {
  const bool is_signed = t.kind == Kind::signed_;
  switch (t.bits) {
    case 8: return is_signed ? f(Tag<int8_t>{}) : f(Tag<uint8_t>{});
    case 16: return is_signed ? f(Tag<int16_t>{}) : f(Tag<uint16_t>{});
    case 32: return is_signed ? f(Tag<int32_t>{}) : f(Tag<uint32_t>{});
    case 64: return is_signed ? f(Tag<int64_t>{}) : f(Tag<uint64_t>{});
    default: throw Fault("unknown width");
  }
}
template <typename F>
void with_float(const Type& t, F f) {
  if (t.bits == 32) return f(Tag<float>{});
  if (t.bits == 64) return f(Tag<double>{});
  throw Fault("unknown floating type");
}
template <typename F>
void with_any(const Type& t, F f) {
  if (t.kind == Kind::floating) return with_float(t, f);
  return with_whole(t, f);
}
template <typename T>
constexpr bool kIsFloat = std::is_floating_point_v<T>;
// Whole numbers wrap: computed without a sign, which is the same.
template <typename T>
using Wrapping = std::conditional_t<kIsFloat<T>, T, std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>>;

// ---- sums, products

void add(Step& s) {
  with_any(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    two<T>(s, [](T a, T b) { return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b)); });
  });
}
void sub(Step& s) {
  with_any(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    two<T>(s, [](T a, T b) { return static_cast<T>(static_cast<Wrapping<T>>(a) - static_cast<Wrapping<T>>(b)); });
  });
}

template <typename T>
using Double =
    std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                       std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                          std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>>;

enum class Part { lo, hi, wide };
Part part_of(const Instruction& in) {
  return in.words[1] == "lo" ? Part::lo : in.words[1] == "hi" ? Part::hi : Part::wide;
}

// mul.lo, mul.hi, mul.wide, and mad with a third number of the result's width.
void whole_product(Step& s, bool adds) {
  const Part part = part_of(s.in);
  const int width = part == Part::wide ? 2 * s.in.type.bits : s.in.type.bits;
  const Values a(s, s.in.operands.at(1)), b(s, s.in.operands.at(2)), c(s, s.in.operands.at(adds ? 3 : 2));
  uint64_t* d = result(s, s.in.operands[0]);
  with_whole(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_lanes(s, [&](int lane) {
      const auto product = static_cast<unsigned __int128>(static_cast<Double<T>>(as<T>(a[lane])) * as<T>(b[lane]));
      const auto kept = static_cast<uint64_t>(part == Part::hi ? product >> s.in.type.bits : product);
      d[lane] = cut(kept + (adds ? c[lane] : 0), width);
    });
  });
}
void mul(Step& s) {
  if (s.in.type.kind != Kind::floating) return whole_product(s, false);
  with_float(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    two<T>(s, [](T a, T b) { return a * b; });
  });
}
void mad(Step& s) { whole_product(s, true); }

// Two halves in one register, each rounded once.
template <typename F>
void packed(Step& s, F f) {
  const bool bfloat = s.in.type.kind == Kind::bfloat;
  const Values a(s, s.in.operands.at(1)), b(s, s.in.operands.at(2)), c(s, s.in.operands.at(3));
  uint64_t* d = result(s, s.in.operands[0]);
  for_lanes(s, [&](int lane) {
    uint64_t both = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      const auto value = [&](uint64_t v) { return from_half(static_cast<uint16_t>(v >> shift), bfloat); };
      both |= uint64_t{to_half(f(value(a[lane]), value(b[lane]), value(c[lane])), bfloat)} << shift;
    }
    d[lane] = both;
  });
}

// Two floats in one register, the first the lowest.
uint64_t fma_of_pairs(uint64_t a, uint64_t b, uint64_t c) {
  const auto part = [&](int shift) {
    const auto value = [&](uint64_t v) { return as<float>(v >> shift); };
    return bits_of(std::fma(value(a), value(b), value(c))) << shift;
  };
  return part(0) | part(32);
}

void fma(Step& s) {
  if (s.in.type.packed && s.in.type.bits == 32) return three<uint64_t>(s, fma_of_pairs);
  if (s.in.type.packed) {
    // A product of two halves is exact in double; so is its sum with a third but for the last bits of far exponents,
    // and rounding to odd there keeps the second rounding right.
    return packed(s, [](double a, double b, double c) { return sum_to_odd(a * b, c); });
  }
  const bool down = s.in.has("rm");
  with_float(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (down) std::fesetround(FE_DOWNWARD);
    three<T>(s, [](T a, T b, T c) { return std::fma(a, b, c); });
    std::fesetround(FE_TONEAREST);
  });
}

void div(Step& s) {
  with_any(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    two<T>(s, [](T a, T b) -> T {
      if constexpr (!kIsFloat<T>) {
        if (b == 0) throw Fault("division by zero");
      }
      return static_cast<T>(a / b);
    });
  });
}
void rem(Step& s) {
  with_whole(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    two<T>(s, [](T a, T b) -> T {
      if (b == 0) throw Fault("remainder of a division by zero");
      return static_cast<T>(a % b);
    });
  });
}
void neg(Step& s) {
  with_any(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    one<T>(s, [](T a) { return static_cast<T>(-static_cast<Wrapping<T>>(a)); });
  });
}
void abs(Step& s) {
  with_any(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    one<T>(s, [](T a) {
      return kIsFloat<T> ? static_cast<T>(std::fabs(static_cast<double>(a))) : a < 0 ? static_cast<T>(-a) : a;
    });
  });
}
template <bool kGreater>
void extreme(Step& s) {  // of a number and a NaN: the number
  with_any(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    two<T>(s, [](T a, T b) {
      if (a != a) return b;
      if (b != b) return a;
      return (kGreater ? a > b : a < b) ? a : b;
    });
  });
}
// The sign of the first, all else of the second.
void copysign(Step& s) {
  with_float(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    two<T>(s, [](T a, T b) { return std::copysign(b, a); });
  });
}

float flushed(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v; }

// Within two units in the last place of 2^a: here the nearest.
void ex2(Step& s) {
  const bool flush = s.in.has("ftz");
  one<float>(s, [flush](float a) {
    if (flush) return flushed(static_cast<float>(std::exp2(static_cast<double>(flushed(a)))));
    return static_cast<float>(std::exp2(static_cast<double>(a)));
  });
}
void rcp(Step& s) {
  const bool coarse = s.in.has("approx");
  if (s.in.type.bits == 32) {
    return one<float>(s, [&](float a) { return coarse ? flushed(1.0f / flushed(a)) : 1.0f / a; });
  }
  one<double>(s, [&](double a) {
    if (!coarse) return 1.0 / a;
    // rcp.approx.ftz.f64 reads the upper 32 bits of a and writes those of the result.
    constexpr uint64_t kUpper = 0xFFFFFFFF00000000ull;
    return as<double>(bits_of(1.0 / as<double>(bits_of(a) & kUpper)) & kUpper);
  });
}

// ---- bits

void and_(Step& s) {
  two<uint64_t>(s, [&](uint64_t a, uint64_t b) { return cut(a & b, s.in.type.bits); });
}
void or_(Step& s) {
  two<uint64_t>(s, [&](uint64_t a, uint64_t b) { return cut(a | b, s.in.type.bits); });
}
void xor_(Step& s) {
  two<uint64_t>(s, [&](uint64_t a, uint64_t b) { return cut(a ^ b, s.in.type.bits); });
}
void not_(Step& s) {
  one<uint64_t>(s, [&](uint64_t a) { return cut(~a, s.in.type.bits); });
}

void popc(Step& s) {
  one<uint64_t>(s, [&](uint64_t a) { return static_cast<uint64_t>(__builtin_popcountll(cut(a, s.in.type.bits))); });
}

// The count is a u32, and more than the width is as much as the width.
void shift(Step& s) {
  const bool left = s.in.words[0] == "shl";
  const int width = s.in.type.bits;
  const Values a(s, s.in.operands.at(1)), b(s, s.in.operands.at(2));
  uint64_t* d = result(s, s.in.operands[0]);
  with_whole(s.in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_lanes(s, [&](int lane) {
      const auto count = static_cast<uint32_t>(b[lane]);
      const T value = as<T>(a[lane]);
      if (left) {
        d[lane] = count >= static_cast<uint32_t>(width) ? 0 : cut(a[lane] << count, width);
      } else if (count >= static_cast<uint32_t>(width)) {
        d[lane] = bits_of(static_cast<T>(value < 0 ? -1 : 0));
      } else {
        d[lane] = bits_of(static_cast<T>(value >> count));
      }
    });
  });
}

// bfi f, a, b, c, d: the lowest d bits of a, put into b at bit c.
void bfi(Step& s) {
  const std::vector<Operand>& o = s.in.operands;
  const Values a(s, o.at(1)), b(s, o.at(2)), position(s, o.at(3)), length(s, o.at(4));
  uint64_t* f = result(s, o[0]);
  for_lanes(s, [&](int lane) {
    const int begin = static_cast<int>(position[lane] & 0xFF), count = static_cast<int>(length[lane] & 0xFF);
    uint64_t value = cut(b[lane], s.in.type.bits);
    for (int i = 0; i < count && begin + i < s.in.type.bits; ++i) {
      const uint64_t bit = uint64_t{1} << (begin + i);
      value = (a[lane] >> i & 1) ? value | bit : value & ~bit;
    }
    f[lane] = value;
  });
}

// bfe d, a, b, c: c bits of a from bit b on; above them, and above a, zeros or the sign (the last bit that is there).
void bfe(Step& s) {
  const std::vector<Operand>& o = s.in.operands;
  const Values a(s, o.at(1)), position(s, o.at(2)), length(s, o.at(3));
  uint64_t* d = result(s, o[0]);
  const int bits = s.in.type.bits;
  for_lanes(s, [&](int lane) {
    const int begin = static_cast<int>(position[lane] & 0xFF), count = static_cast<int>(length[lane] & 0xFF);
    const auto bit = [&](int i) { return i < bits ? a[lane] >> i & 1 : 0; };
    const bool negative = s.in.type.kind == Kind::signed_ && count > 0 && bit(std::min(begin + count, bits) - 1) != 0;
    uint64_t value = 0;
    for (int i = 0; i < bits; ++i) {
      const bool inside = i < count && begin + i < bits;
      if (inside ? bit(begin + i) != 0 : negative) value |= uint64_t{1} << i;
    }
    d[lane] = value;
  });
}

// ---- comparisons and choices

enum class Compare { eq, ne, lt, le, gt, ge, num, nan };

template <typename T>
bool compare(Compare how, bool if_nan, T a, T b) {
  const bool is_nan = a != a || b != b;
  if (how == Compare::num) return !is_nan;
  if (how == Compare::nan) return is_nan;
  if (is_nan) return if_nan;
  switch (how) {
    case Compare::eq: return a == b;
    case Compare::ne: return a != b;
    case Compare::lt: return a < b;
    case Compare::le: return a <= b;
    case Compare::gt: return a > b;
    default: return a >= b;
  }
}

// setp.how.type p, a, b. For whole numbers without a sign lo, ls, hi, hs are other names; a u behind a comparison of
// floating numbers: true where one is NaN.
void setp(Step& s) {
  static const std::map<std::string, std::pair<Compare, bool>> kHow = {
      {"eq", {Compare::eq, false}}, {"ne", {Compare::ne, false}},   {"lt", {Compare::lt, false}},
      {"le", {Compare::le, false}}, {"gt", {Compare::gt, false}},   {"ge", {Compare::ge, false}},
      {"lo", {Compare::lt, false}}, {"ls", {Compare::le, false}},   {"hi", {Compare::gt, false}},
      {"hs", {Compare::ge, false}}, {"equ", {Compare::eq, true}},   {"neu", {Compare::ne, true}},
      {"ltu", {Compare::lt, true}}, {"leu", {Compare::le, true}},   {"gtu", {Compare::gt, true}},
      {"geu", {Compare::ge, true}}, {"num", {Compare::num, false}}, {"nan", {Compare::nan, false}}};
  const auto found = kHow.find(s.in.words[1]);
  if (found == kHow.end() || s.in.words.size() != 3) throw Fault("unknown comparison");
  const auto [how, if_nan] = found->second;
  with_any(s.in.type, [&, how = how, if_nan = if_nan](auto tag) {
    using T = typename decltype(tag)::type;
    two<T>(s, [&](T a, T b) { return uint64_t{compare(how, if_nan, a, b)}; });
  });
}

void selp(Step& s) {
  const Values a(s, s.in.operands.at(1)), b(s, s.in.operands.at(2)), c(s, s.in.operands.at(3));
  uint64_t* d = result(s, s.in.operands[0]);
  for_lanes(s, [&](int lane) { d[lane] = cut(c[lane] & 1 ? a[lane] : b[lane], s.in.type.bits); });
}

// mov, also of a register into its parts and of parts into a register: the first part is the lowest.
void mov(Step& s) {
  const Operand &to = s.in.operands.at(0), &from = s.in.operands.at(1);
  if (to.form == Operand::Form::vector) {
    const Values a(s, from);
    const int width = s.in.type.bits / static_cast<int>(to.parts.size());
    uint64_t whole[32];
    for_lanes(s, [&](int lane) { whole[lane] = a[lane]; });
    for (size_t i = 0; i < to.parts.size(); ++i) {
      if (to.parts[i].form == Operand::Form::sink) continue;
      uint64_t* d = result(s, to.parts[i]);
      for_lanes(s, [&](int lane) { d[lane] = cut(whole[lane] >> (i * static_cast<size_t>(width)), width); });
    }
  } else if (from.form == Operand::Form::vector) {
    const int width = s.in.type.bits / static_cast<int>(from.parts.size());
    uint64_t whole[32] = {};
    for (size_t i = 0; i < from.parts.size(); ++i) {
      const Values a(s, from.parts[i]);
      for_lanes(s, [&](int lane) { whole[lane] |= cut(a[lane], width) << (i * static_cast<size_t>(width)); });
    }
    uint64_t* d = result(s, to);
    for_lanes(s, [&](int lane) { d[lane] = whole[lane]; });
  } else {
    one<uint64_t>(s, [&](uint64_t a) { return cut(a, s.in.type.bits); });
  }
}

// ---- conversions

void cvt(Step& s) {
  const Type to = s.in.type, from = s.in.from;
  const Values a(s, s.in.operands.at(1));
  uint64_t* d = result(s, s.in.operands[0]);
  const bool to_float = to.kind == Kind::floating || to.kind == Kind::bfloat;
  const bool from_float = from.kind == Kind::floating || from.kind == Kind::bfloat;
  const bool saturates = s.in.has("sat"), to_whole = s.in.has("rni");
  if (!to_float && !from_float) {
    if (saturates) throw Fault("cvt.sat of whole numbers is not known here");
    with_whole(from, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for_lanes(s, [&](int lane) { d[lane] = cut(static_cast<uint64_t>(as<T>(a[lane])), to.bits); });
    });
    return;
  }
  if (!from_float && to.bits >= 32) {  // rounded once, straight from the whole number
    with_whole(from, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for_lanes(s, [&](int lane) {
        const T value = as<T>(a[lane]);
        d[lane] = to.bits == 64 ? bits_of(static_cast<double>(value)) : bits_of(static_cast<float>(value));
      });
    });
    return;
  }
  if (!to_float || !from_float) throw Fault("this conversion between whole and floating numbers is not known here");
  for (const std::string& w : s.in.words) {
    if (w == "rz" || w == "rm" || w == "rp" || w == "rzi" || w == "rmi" || w == "rpi" || w == "ftz") {
      throw Fault("this rounding of cvt is not known here");
    }
  }
  for_lanes(s, [&](int lane) {
    double value = from.bits == 64   ? as<double>(a[lane])
                   : from.bits == 32 ? as<float>(a[lane])
                                     : from_half(static_cast<uint16_t>(a[lane]), from.kind == Kind::bfloat);
    if (to_whole) value = std::nearbyint(value);
    if (saturates) value = value > 0 ? std::fmin(value, 1.0) : 0.0;  // NaN becomes 0
    d[lane] = to.bits == 64   ? bits_of(value)
              : to.bits == 32 ? bits_of(static_cast<float>(value))
                              : to_half(value, to.kind == Kind::bfloat);
  });
}

}  // namespace

Meaning arithmetic(const Instruction& in) {
  static const std::map<std::string, Meaning> kMeanings = {{"add", add},
                                                           {"sub", sub},
                                                           {"mul", mul},
                                                           {"mad", mad},
                                                           {"fma", fma},
                                                           {"div", div},
                                                           {"rem", rem},
                                                           {"neg", neg},
                                                           {"abs", abs},
                                                           {"min", extreme<false>},
                                                           {"max", extreme<true>},
                                                           {"copysign", copysign},
                                                           {"rcp", rcp},
                                                           {"and", and_},
                                                           {"or", or_},
                                                           {"xor", xor_},
                                                           {"not", not_},
                                                           {"shl", shift},
                                                           {"shr", shift},
                                                           {"bfi", bfi},
                                                           {"bfe", bfe},
                                                           {"popc", popc},
                                                           {"setp", setp},
                                                           {"selp", selp},
                                                           {"mov", mov},
                                                           {"cvt", cvt}};
  if (in.opcode == "ex2.approx.ftz.f32" || in.opcode == "ex2.approx.f32") return ex2;
  const bool half = in.type.bits == 16 && (in.type.kind == Kind::floating || in.type.kind == Kind::bfloat);
  if (half && in.words[0] != "cvt" && !(in.words[0] == "fma" && in.type.packed)) return nullptr;
  if (in.type.packed && in.words[0] != "fma") return nullptr;
  for (const char* unknown : {"cc", "sat", "rz", "rp"}) {
    if (in.has(unknown) && in.words[0] != "cvt") return nullptr;
  }
  if (in.has("ftz") && !(in.words[0] == "rcp" && in.has("approx"))) return nullptr;
  if (in.has("rm") && in.words[0] != "fma") return nullptr;
  const auto found = kMeanings.find(in.words[0]);
  return found == kMeanings.end() ? nullptr : found->second;
}

}  // namespace ptx
