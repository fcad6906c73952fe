// sum(w exp(-D)) / sum(w) of some pairs, plainly or in the log domain.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace cwbr {

// sum(w exp(-D)) as sum * exp(highest), which may lie far below the range of a double.
struct OverlapSum {
  double sum = 0, highest = -std::numeric_limits<double>::infinity();

  double top() const { return std::isinf(highest) ? 0 : highest; }

  void add(const OverlapSum& other) {
    if (highest == other.highest) {
      sum += other.sum;
      return;
    }
    const double top = std::max(highest, other.highest);
    sum = sum * std::exp(highest - top) + other.sum * std::exp(other.highest - top);
    highest = top;
  }
};

// The sum over the pairs that `each(use)` enumerates: it calls use(weight, distance) for each of
// them. Plainly, `highest` is 0. Pairs of weight zero count nothing whatever their distance; NaN
// stays NaN.
template <class T>
OverlapSum overlap_sum(bool log, const auto& each) {
  OverlapSum result;
  if (!log)
    result.highest = 0;
  else
    each([&](T weight, T distance) {
      if (weight != 0) result.highest = std::max(result.highest, -double(distance));
    });
  const double top = result.top();
  each([&](T weight, T distance) {
    if (!log)
      result.sum += weight * std::exp(-distance);
    else if (weight != 0)
      result.sum += weight * std::exp(-double(distance) - top);
  });
  return result;
}

// The overlap, or its logarithm; 0 where nothing is weighted.
inline double overlap_value(const OverlapSum& all, double total, double eps, bool log) {
  if (!log) return all.sum / std::max(total, eps);
  if (total == 0) return 0;
  return std::log(all.sum / total) + (all.sum == 0 ? 0 : all.highest);
}

// The gradient of the value with respect to the distance of one pair; `all` is for the logarithm.
template <class T>
double overlap_gradient(bool log, double grad, T weight, T distance, const OverlapSum& all,
                        double total, double eps) {
  if (!log) return -grad * weight * std::exp(-distance) / std::max(total, eps);
  if (weight == 0) return 0;
  return -grad * weight * std::exp(-double(distance) - all.top()) / all.sum;
}

}  // namespace cwbr
