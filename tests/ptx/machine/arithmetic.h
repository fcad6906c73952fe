// What single instructions compute in one lane.
#pragma once

#include <cmath>
#include <limits>

#include "warp.h"

namespace machine {

// How far the approximate instructions are from the right result, in units of the largest error
// that NVIDIA's PTX manual allows them; the sign and a factor below 1 depend on the argument.
inline double approximation_error = 1;

inline double noise(uint64_t argument) {
  uint64_t z = (argument + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9;
  return approximation_error * (static_cast<double>(z >> 32) / 2147483648.0 - 1);
}

inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

// `exact` with a relative error of at most `bound`.
inline float approximate(double exact, double bound, uint64_t argument) {
  return static_cast<float>(exact * (1 + bound * noise(argument)));
}

inline float reciprocal(float x) { return approximate(1 / double(x), 0x1p-23, bits<uint32_t>(x)); }
inline float square_root(float x) {
  return approximate(std::sqrt(double(x)), 0x1p-23, bits<uint32_t>(x));
}
inline float inverse_root(float x) {
  return approximate(1 / std::sqrt(double(x)), 0x1p-22, bits<uint32_t>(x));
}
inline float power_of_2(float x) {
  return approximate(std::exp2(double(x)), 0x1p-22, bits<uint32_t>(x));
}
inline float log_2(float x) {
  const double exact = std::log2(double(x));
  if (!std::isfinite(exact)) return static_cast<float>(exact);
  const double size = x > 0.5f && x < 2 ? 1 : std::abs(exact);
  return static_cast<float>(exact + 0x1p-22 * size * noise(bits<uint32_t>(x)));
}
inline float quotient(float a, float b) {
  return approximate(double(a) / double(b), 0x1p-22, bits<uint32_t>(a) ^ (bits<uint32_t>(b) << 8));
}
// div.approx multiplies by a reciprocal, which is subnormal, and flushed, for a large divisor.
inline float fast_quotient(float a, float b) {
  if (std::isfinite(a) && std::isfinite(b) && std::abs(b) > 0x1p126f)
    return std::copysign(0.0f, a) * std::copysign(1.0f, b);
  return quotient(a, b);
}
// Of the upper 32 bits alone; those of the result have 20 bits of a mantissa.
inline double rough_reciprocal(double x) {
  const double upper = bits<double>(bits<uint64_t>(x) & 0xffffffff00000000);
  if (std::fpclassify(upper) == FP_SUBNORMAL) return std::copysign(INFINITY, x);
  const double result = bits<double>(bits<uint64_t>(1 / upper) & 0xffffffff00000000);
  return std::fpclassify(result) == FP_SUBNORMAL ? std::copysign(0.0, x) : result;
}

template <class T>
T smaller(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a || b != b) return a != a ? b : a;
    return a < b || (a == b && std::signbit(a)) ? a : b;
  } else {
    return a < b ? a : b;
  }
}
template <class T>
T larger(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a || b != b) return a != a ? b : a;
    return a > b || (a == b && std::signbit(b)) ? a : b;
  } else {
    return a > b ? a : b;
  }
}
template <class T>
T nan_or(T a, T b, T otherwise) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : otherwise;
}

// Shifts of all bits or more give 0, or the sign.
template <class T>
T shifted_left(T x, uint32_t n) {
  return n >= 8 * sizeof(T) ? 0 : static_cast<T>(x << n);
}
template <class T>
T shifted_right(T x, uint32_t n) {
  if (n >= 8 * sizeof(T)) return x < 0 ? static_cast<T>(-1) : 0;
  return static_cast<T>(x >> n);
}

template <class T>
T upper_product(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Wide>(a) * b) >> (8 * sizeof(T)));
}

// Division by zero and the one that overflows are unspecified in PTX, and traps in C++.
template <class T>
T integer_quotient(T a, T b) {
  if (b == 0) throw Fault("integer division by zero");
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - uint64_t(a));
  return static_cast<T>(a / b);
}
template <class T>
T integer_remainder(T a, T b) {
  if (b == 0) throw Fault("integer division by zero");
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? 0 : static_cast<T>(a % b);
}

// The `count` bits of x from `first` on, extended by zeros or, of a signed type, by their sign.
template <class T>
T bit_field(T x, uint32_t first, uint32_t count) {
  constexpr uint32_t size = 8 * sizeof(T);
  first &= 255, count &= 255;
  if (count == 0) return 0;
  if (first >= size) return x < 0 ? static_cast<T>(-1) : 0;
  const uint32_t kept = std::min(count, size - first);
  return static_cast<T>(
      static_cast<T>(static_cast<std::make_unsigned_t<T>>(x) << (size - first - kept)) >>
      (size - kept));
}

inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> (4 * i);
    uint8_t byte = static_cast<uint8_t>(bytes >> (8 * (which & 7)));
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= uint32_t(byte) << (8 * i);
  }
  return result;
}

// Rounded as `round` does, saturated, and for NaN as the manual's table says.
template <class To, class From>
To to_integer(From x, From (*round)(From)) {
  constexpr bool wide = sizeof(To) == 8 || sizeof(From) == 8;
  if (x != x) return wide ? static_cast<To>(uint64_t{1} << (8 * sizeof(To) - 1)) : 0;
  const double whole = round(x);
  if (whole >= std::ldexp(1.0, std::numeric_limits<To>::digits))
    return std::numeric_limits<To>::max();
  if (whole <= static_cast<double>(std::numeric_limits<To>::min()))
    return std::numeric_limits<To>::min();
  return static_cast<To>(whole);
}

inline float from_half(uint16_t x) { return static_cast<float>(bits<_Float16>(x)); }
inline uint16_t to_half(float x) { return bits<uint16_t>(static_cast<_Float16>(x)); }
inline float from_bfloat(uint16_t x) { return bits<float>(uint32_t(x) << 16); }
inline uint16_t to_bfloat(float x) {
  if (x != x) return 0x7fff;
  const uint32_t v = bits<uint32_t>(x);
  return static_cast<uint16_t>((v + 0x7fff + ((v >> 16) & 1)) >> 16);
}

}  // namespace machine
