// The inner loops of the batch kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/input_types.h"

namespace cwbr {

inline float to_float(Half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t magnitude = h.bits & 0x7fff;
  uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;  // moves the exponent's bias; exact, subnormals too
  std::memcpy(&bits, &value, 4);
  if (magnitude >= 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(BFloat16 b) {
  const uint32_t bits = static_cast<uint32_t>(b.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

// Rounds to the nearest, ties to even.
template <class Out, class T>
inline Out from_float(T x) {
  if constexpr (sizeof(Out) == sizeof(T)) {
    return x;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    const bool nan = bits > 0x7f800000;
    if constexpr (std::is_same_v<Out, BFloat16>) {
      const uint32_t rounded = nan ? 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
      return {static_cast<uint16_t>(sign | (rounded >> 16))};
    } else {
      // Below 2^-14 the sum with 0.5 has the subnormal's last place at its own: it does the
      // rounding.
      float magnitude;
      std::memcpy(&magnitude, &bits, 4);
      magnitude += 0.5f;
      uint32_t subnormal;
      std::memcpy(&subnormal, &magnitude, 4);
      const uint32_t normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
      uint32_t half = bits < 0x38800000 ? subnormal - 0x3f000000 : normal;
      if (bits >= 0x47800000) half = 0x7c00;
      if (nan) half = 0x7e00;
      return {static_cast<uint16_t>(sign | half)};
    }
  }
}

// Mean and clamped variance of each of `width` columns over `count` rows of z, two passes with
// the second corrected by the sum of deviations that the rounding of the mean leaves.
template <class In, class T>
void group_moments(const In* z, int64_t stride, const int64_t* samples, int64_t count,
                   int64_t width, T eps, T* mean, T* var) {
  for (int64_t c = 0; c < width; ++c) {
    T sum = 0, deviations = 0, squares = 0;
    for (int64_t s = 0; s < count; ++s) sum += to_float(z[samples[s] * stride + c]);
    const T center = count > 0 ? sum / count : 0;
    for (int64_t s = 0; s < count; ++s) {
      const T deviation = to_float(z[samples[s] * stride + c]) - center;
      deviations += deviation;
      squares += deviation * deviation;
    }
    const T n = count > 0 ? count : 1;
    const T variance = (squares - deviations * deviations / n) / n;
    mean[c] = deviations == deviations ? center + deviations / n : center;  // keeps infinity
    var[c] = variance < eps ? eps : variance;
  }
}

// The gradient with respect to a sample's z is constant + slope (z - mean): constant =
// grad_mean / n and slope = 2 grad_var / n, or 0 where the clamp of the variance is active.
template <class T>
void moments_gradient_terms(const T* grad_mean, const T* grad_var, const T* var, int64_t count,
                            int64_t width, T eps, T* constant, T* slope) {
  const T n = count > 0 ? count : 1;
  for (int64_t c = 0; c < width; ++c) {
    constant[c] = grad_mean[c] / n;
    slope[c] = var[c] > eps ? 2 * grad_var[c] / n : 0;
  }
}

// One row of it.
template <class In, class T>
void moments_gradient(const In* z, const T* mean, const T* constant, const T* slope, int64_t width,
                      In* grad) {
  for (int64_t c = 0; c < width; ++c) {
    grad[c] = from_float<In>(constant[c] + slope[c] * (static_cast<T>(to_float(z[c])) - mean[c]));
  }
}

template <class T>
struct SoftmaxStatistics {
  T max, sum;
};

// Largest logit of a row and the sum of exp(logit - max).
template <class In, class T>
SoftmaxStatistics<T> softmax_statistics(const In* row, int64_t n) {
  T max = -INFINITY, sum = 0;
  for (int64_t c = 0; c < n; ++c) max = to_float(row[c]) > max ? to_float(row[c]) : max;
  for (int64_t c = 0; c < n; ++c) sum += std::exp(to_float(row[c]) - max);
  return {max, sum};
}

// total[j] += softmax(row)[columns[j]].
template <class In, class T>
void add_probabilities(const In* row, SoftmaxStatistics<T> s, const int64_t* columns, int64_t n,
                       T* total) {
  for (int64_t j = 0; j < n; ++j) total[j] += std::exp(to_float(row[columns[j]]) - s.max) / s.sum;
}

}  // namespace cwbr
