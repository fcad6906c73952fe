#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "pair_blocks.h"
#include "parallel.h"

namespace cwbr {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// exp(-D) is 0 in T where D exceeds this: a pair known to be that far apart needs no exact
// distance. The environment variable CWBR_EARLY_EXIT=0 computes all distances to the end.
template <class T>
T far_apart(bool log) {
  const char* setting = std::getenv("CWBR_EARLY_EXIT");
  if (log || (setting != nullptr && std::strcmp(setting, "0") == 0)) return -1;
  return sizeof(T) == 4 ? T(105) : T(747);
}

// Sum of numbers, in as many parts as the processor adds at once.
template <class T>
double sum(const T* begin, const T* end) {
  constexpr int kParts = 8;
  double parts[kParts] = {};
  for (; end - begin >= kParts; begin += kParts)
    for (int p = 0; p < kParts; ++p) parts[p] += begin[p];
  for (int p = 0; begin + p < end; ++p) parts[p] += begin[p];
  return std::accumulate(parts, parts + kParts, 0.0);
}

// Sum of the weights of all pairs i < j.
template <class T>
double total_weight(const T* alpha, int64_t k) {
  std::vector<double> by_row(k);
  parallel_for(0, k, 1 + (1 << 18) / (k + 1), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      by_row[i] = sum(alpha + i * k + i + 1, alpha + (i + 1) * k);
  });
  return sum(by_row.data(), by_row.data() + k);
}

// The shares of all pairs in a logarithm's gradient sum to 1, but for the rounding of the
// logarithm, which moves each by the same factor.
template <class T>
void scale_all(double factor, int64_t size, T* grad_mean, T* grad_var) {
  parallel_for(0, size, 1 << 16, [&](int64_t first, int64_t last) {
    for (int64_t x = first; x < last; ++x) {
      grad_mean[x] *= T(factor);
      grad_var[x] *= T(factor);
    }
  });
}

// sum * exp(highest): the weighted overlap of some pairs, far below the range of a double.
struct LogSum {
  double sum = 0, highest = -kInfinity;

  void add(const LogSum& other) {
    if (highest == other.highest) {
      sum += other.sum;
      return;
    }
    const double top = std::max(highest, other.highest);
    sum = sum * std::exp(highest - top) + other.sum * std::exp(other.highest - top);
    highest = top;
  }
};

// Calls use(weight, distance) for the pairs of a tile.
template <class T, class Use>
void for_pairs(const Tile<T>& tile, const T* alpha, int64_t k, const Use& use) {
  const auto& [i, j, count_i, count_j] = tile.rows;
  for (int64_t r = 0; r < count_i; ++r)
    for (int64_t c = i == j ? r + 1 : 0; c < count_j; ++c)
      use(alpha[(i + r) * k + j + c], tile.distance[r * kTile + c]);
}

template <class T>
LogSum tile_overlap(const Tile<T>& tile, const T* alpha, int64_t k, bool log) {
  LogSum result;
  if (!log) {
    result.highest = 0;
    for_pairs(tile, alpha, k,
              [&](T weight, T distance) { result.sum += weight * std::exp(-distance); });
    return result;
  }
  for_pairs(tile, alpha, k, [&](T weight, T distance) {
    if (weight != 0) result.highest = std::max(result.highest, -double(distance));
  });
  const double top = result.highest == -kInfinity ? 0 : result.highest;
  for_pairs(tile, alpha, k, [&](T weight, T distance) {
    if (weight != 0) result.sum += weight * std::exp(-double(distance) - top);
  });
  return result;
}

}  // namespace

template <class T>
T weighted_overlap(const T* mean, const T* var, const T* alpha, int64_t k, int64_t d, double eps,
                   bool log) {
  const double total = total_weight(alpha, k);
  if (log && total == 0) return 0;
  PairBlocks<T> blocks(mean, var, k, d, eps);
  const T limit = far_apart<T>(log);
  LogSum overlap;
  std::vector<LogSum> by_tile;
  for_blocks(blocks.count(), [&](int64_t a, int64_t b) {
    by_tile.assign(blocks.tiles(a, b).size(), LogSum());
    blocks.distances(a, b, limit, [&](const Tile<T>& tile) {
      by_tile[tile.index] = tile_overlap(tile, alpha, k, log);
    });
    for (const LogSum& sum : by_tile) overlap.add(sum);
  });
  if (!log) return T(overlap.sum / std::max(total, eps));
  return T(std::log(overlap.sum / total) + (overlap.sum == 0 ? 0 : overlap.highest));
}

template <class T>
void weighted_overlap_backward(T grad, T value, const T* mean, const T* var, const T* alpha,
                               int64_t k, int64_t d, double eps, bool log, T* grad_mean,
                               T* grad_var) {
  const double total = total_weight(alpha, k);
  if (k < 2 || (log && total == 0)) {
    std::fill_n(grad_mean, k * d, T(0));
    std::fill_n(grad_var, k * d, T(0));
    return;
  }
  // Overlaps of far pairs are counted in small units, so that their products do not underflow.
  const T unit = log ? T(1) : T(0x1p-64);
  const double scale = -double(grad) / std::max(total, eps) / unit;
  PairBlocks<T> blocks(mean, var, k, d, eps);
  BlockGradient<T> gradient(blocks.max_rows());
  const T limit = far_apart<T>(log);
  std::vector<double> by_tile;
  double shares = 0;
  for_blocks(blocks.count(), [&](int64_t a, int64_t b) {
    by_tile.assign(blocks.tiles(a, b).size(), 0);
    gradient.reset(blocks.block(a, b), unit);
    blocks.distances(a, b, limit, [&](const Tile<T>& tile) {
      gradient.write_tile(tile.rows, [&](int64_t i, int64_t j) {
        const T weight = alpha[i * k + j];
        const T distance = tile.distance[(i - tile.rows.i) * kTile + j - tile.rows.j];
        if (!log) return T(scale * weight * std::exp(-distance));
        if (weight == 0) return T(0);
        const double share = weight / total * std::exp(-double(distance) - double(value));
        by_tile[tile.index] += share;
        return T(-grad * share);
      });
    });
    for (double share : by_tile) shares += share;
    blocks.gradients(gradient, grad_mean, grad_var);
  });
  if (log) scale_all(1 / shares, k * d, grad_mean, grad_var);
}

#define CWBR_INSTANTIATE(T)                                                                     \
  template T weighted_overlap(const T*, const T*, const T*, int64_t, int64_t, double, bool);    \
  template void weighted_overlap_backward(T, T, const T*, const T*, const T*, int64_t, int64_t, \
                                          double, bool, T*, T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)
#undef CWBR_INSTANTIATE

}  // namespace cwbr
