// __half: 1 bit of sign, 5 of exponent, 10 of fraction.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half number) {
  const int exponent = number.bits >> 10 & 31, fraction = number.bits & 1023;
  float size;
  if (exponent == 31) {
    size = fraction ? NAN : INFINITY;
  } else {
    size = exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
  }
  return number.bits >> 15 ? -size : size;
}

// To the nearest, ties to even.
inline __half __float2half_rn(float number) {
  const uint16_t sign = std::signbit(number) ? 0x8000 : 0;
  const float size = std::fabs(number);
  if (std::isnan(number)) return {uint16_t(sign | 0x7fff)};
  if (size >= 65520) return {uint16_t(sign | 0x7c00)};  // half way from the largest to the next power of two
  int exponent = size > 0 ? std::ilogb(size) : -14;
  if (exponent < -14) exponent = -14;  // smaller numbers are multiples of 2^-24
  const int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 1024 to 2048, fewer for small numbers
  return {uint16_t(sign | (((exponent + 14) << 10) + units))};              // 1024 units, or 2048, carry over
}
