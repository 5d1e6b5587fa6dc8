// float16 and bfloat16 as 16 bits, rounded once and to nearest even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace ptx {

inline double from_half(uint16_t bits, bool bfloat) {
  if (bfloat) return std::bit_cast<float>(uint32_t{bits} << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double value = 0;
  if (exponent == 31) {
    value = fraction ? std::nan("") : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(fraction, -24);
  } else {
    value = std::ldexp(1024 + fraction, exponent - 25);
  }
  return bits >> 15 ? -value : value;
}

inline uint16_t to_half(double value, bool bfloat) {
  const int fraction_bits = bfloat ? 7 : 10, least = bfloat ? -126 : -14, most = bfloat ? 127 : 15;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0,
                 infinite = static_cast<uint16_t>((2 * most + 1) << fraction_bits);
  if (std::isnan(value)) return 0x7FFF;
  value = std::fabs(value);
  if (value == 0) return sign;
  if (std::isinf(value)) return sign | infinite;
  const int exponent = std::max(std::ilogb(value), least);
  // In units of the last place: rounded to nearest even, it is a whole number.
  const double units = std::nearbyint(std::ldexp(value, fraction_bits - exponent));
  if (units >= std::ldexp(1.0, fraction_bits + 1) && exponent == most) return sign | infinite;
  // One unit more than the largest fraction carries into the exponent by itself.
  const auto whole = static_cast<uint32_t>(units);
  const auto hidden = 1u << fraction_bits;
  return static_cast<uint16_t>(sign | (whole < hidden ? whole : ((exponent - least) << fraction_bits) + whole));
}

// a + b in double, rounded to odd where it is not exact: what is rounded once more then is rounded as if once.
// (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.)
inline double sum_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double of_b = sum - a, error = (a - (sum - of_b)) + (b - of_b);
  if (error == 0 || (std::bit_cast<uint64_t>(sum) & 1)) return sum;
  return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

}  // namespace ptx
