// 16-bit formats for emulated_device.h, from their definitions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace blip2fast {

struct Half {};
struct BFloat16 {};

namespace emulated {

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits >> 15) << 31;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return sign ? -magnitude : magnitude;
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7E00;
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  // nearbyint rounds to nearest even, as cvt.rn does
  if (magnitude < 6.103515625e-5f)
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude = f * 2^exponent, f in [0.5, 1)
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + (fraction - 1024));
}

inline float bfloat_to_float(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (std::isnan(value)) return 0x7FC0;
  return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

template <typename Format>
float decode(uint16_t bits);
template <>
inline float decode<Half>(uint16_t bits) {
  return half_to_float(bits);
}
template <>
inline float decode<BFloat16>(uint16_t bits) {
  return bfloat_to_float(bits);
}
template <typename Format>
uint16_t encode(float value);
template <>
inline uint16_t encode<Half>(float value) {
  return float_to_half(value);
}
template <>
inline uint16_t encode<BFloat16>(float value) {
  return float_to_bfloat(value);
}

}  // namespace emulated
}  // namespace blip2fast
