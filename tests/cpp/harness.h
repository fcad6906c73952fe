// What the kernels need from outside torch, and small helpers of the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

inline int thread_count = 1;  // what parallel_for uses

[[noreturn]] inline void fail(const char* what, const char* detail, double actual,
                              double expected) {
  std::printf("FAILED %s: %s: %.9g, expected %.9g\n", what, detail, actual, expected);
  std::exit(1);
}

// Heap memory of exactly this size, so that the address sanitizer sees the first byte beyond.
template <class T>
using Array = std::vector<T>;

template <class T>
Array<T> random_normal(int64_t size, unsigned seed, double scale = 1, double shift = 0) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  Array<T> values(size);
  for (T& x : values) x = static_cast<T>(shift + scale * normal(generator));
  return values;
}

template <class T, class U>
void expect_near(const char* what, const Array<T>& actual, const Array<U>& truth,
                 double tolerance) {
  double scale = 0;
  for (const U x : truth) scale = std::max(scale, std::abs(static_cast<double>(x)));
  for (size_t i = 0; i < truth.size(); ++i) {
    const double error = std::abs(static_cast<double>(actual[i]) - static_cast<double>(truth[i]));
    if (!(error <= tolerance * (scale + 1e-30))) fail(what, "value", actual[i], truth[i]);
  }
}

template <class T>
void expect_same_bits(const char* what, const Array<T>& actual, const Array<T>& expected) {
  if (actual.size() == expected.size() && actual.empty()) return;
  if (actual.size() != expected.size() ||
      std::memcmp(actual.data(), expected.data(), actual.size() * sizeof(T)) != 0) {
    fail(what, "differs with the number of threads", thread_count, 1);
  }
}
