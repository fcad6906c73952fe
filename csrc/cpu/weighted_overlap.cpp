#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/overlap.h"
#include "cpu/pair_blocks.h"
#include "cpu/parallel.h"

namespace cwbr {

namespace {

constexpr int64_t kTileGrain = 32;  // tiles of logarithmic shares that are worth a thread

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
  for_each(k, grain_of(1 << 18, k),
           [&](int64_t i) { by_row[i] = sum(alpha + i * k + i + 1, alpha + (i + 1) * k); });
  return sum(by_row.data(), by_row.data() + k);
}

template <class T>
void scale_all(double factor, int64_t size, T* grad_mean, T* grad_var) {
  for_each(size, 1 << 16, [&](int64_t x) {
    grad_mean[x] *= T(factor);
    grad_var[x] *= T(factor);
  });
}

// Calls use(weight, p) for the pairs of a tile, whose distances are tile.distance[p].
template <class T, class Use>
void for_pairs(const Tile<T>& tile, const T* alpha, int64_t k, const Use& use) {
  const auto& [i, j, count_i, count_j] = tile.rows;
  for (int64_t r = 0; r < count_i; ++r)
    for (int64_t c = i == j ? r + 1 : 0; c < count_j; ++c)
      use(alpha[(i + r) * k + j + c], r * kTile + c);
}

template <class T>
OverlapSum tile_overlap(const Tile<T>& tile, const T* alpha, int64_t k, bool log) {
  return overlap_sum<T>(log, [&](const auto& use) {
    for_pairs(tile, alpha, k, [&](T weight, int64_t p) { use(weight, tile.distance[p]); });
  });
}

// Plainly; leaves exp(-D) of each pair in `overlap`.
template <class T>
OverlapSum tile_overlap(const Tile<T>& tile, const T* alpha, int64_t k, T* overlap) {
  OverlapSum result = {0, 0};
  for_pairs(tile, alpha, k, [&](T weight, int64_t p) {
    overlap[p] = std::exp(-tile.distance[p]);
    result.sum += weight * overlap[p];
  });
  return result;
}

// The gradient of the overlap from that of each pair's distance, block by block.
//
// Plainly, dL/dD = -grad w exp(-D) / total is known with the distance. For the logarithm
// dL/dD = -grad w exp(-D) / sum(w exp(-D)), and no distance but those of earlier blocks is known:
// gradients are taken of sum(w exp(-D - top)), of the nearest pair so far, brought to the new top
// when a block has a nearer one, and divided by the whole sum at the end.
template <class T>
class OverlapGradient {
 public:
  OverlapGradient(double grad, PairBlocks<T>& blocks, const T* alpha, const Moments<T>& of,
                  double total, double eps, bool log, T* grad_mean, T* grad_var)
      : blocks_(blocks),
        gradient_(blocks.max_rows()),
        alpha_(alpha),
        k_(of.rows),
        d_(of.dims),
        total_(total),
        grad_(grad),
        unit_(log ? 1 : small_unit(grad)),
        scale_(-grad / std::max(total, eps) / unit_),
        log_(log),
        grad_mean_(grad_mean),
        grad_var_(grad_var) {}

  void begin(int64_t a, int64_t b) { gradient_.reset(blocks_.block(a, b), T(unit_)); }

  OverlapSum add(const Tile<T>& tile) {
    const auto& [first_i, first_j, count_i, count_j] = tile.rows;
    if (log_) {
      for (int64_t r = 0; r < count_i; ++r)
        for (int64_t c = 0; c < count_j; ++c)
          gradient_.at(first_i + r, first_j + c) = tile.distance[r * kTile + c];
      return tile_overlap(tile, alpha_, k_, true);
    }
    T overlap[kTile * kTile];
    const OverlapSum sum = tile_overlap(tile, alpha_, k_, overlap);
    gradient_.write_tile(tile.rows, [&](int64_t i, int64_t j) {
      return T(scale_ * alpha_[i * k_ + j] * overlap[(i - tile.rows.i) * kTile + j - tile.rows.j]);
    });
    return sum;
  }

  // `before` and `now` are the sums over all blocks without and with this one.
  void end(int64_t a, int64_t b, const OverlapSum& before, const OverlapSum& now) {
    if (log_) {
      if (now.highest > before.highest)
        scale_all(std::exp(before.highest - now.highest), written(a, b), grad_mean_, grad_var_);
      share_out(blocks_.tiles(a, b), now.top());
    }
    blocks_.gradients(gradient_, grad_mean_, grad_var_);
  }

  void finish(const OverlapSum& overlap) {
    if (log_) scale_all(grad_ * total_ / overlap.sum, k_ * d_, grad_mean_, grad_var_);
  }

 private:
  // Overlaps of far pairs are counted in small units, so that their products do not underflow.
  static double small_unit(double grad) {
    constexpr int least = -100, most = 100;  // what float32 has room for
    const int exponent = grad == 0 || !std::isfinite(grad) ? 0 : std::ilogb(grad);
    return std::ldexp(1, std::clamp(exponent - 64, least, most));
  }

  // How many numbers of a gradient have been written before this block: blocks of the same rows
  // come first, one after the other.
  int64_t written(int64_t a, int64_t b) const { return a == b ? blocks_.first(a) * d_ : k_ * d_; }

  // Turns the distances that a block holds into -w exp(-D - top) / total.
  void share_out(const std::vector<TileRows>& tiles, double top) {
    for_each(tiles.size(), kTileGrain, [&](int64_t t) {
      gradient_.write_tile(tiles[t], [&](int64_t i, int64_t j) {
        const T weight = alpha_[i * k_ + j];
        if (weight == 0) return T(0);
        return T(-weight / total_ * std::exp(-double(gradient_.at(i, j)) - top));
      });
    });
  }

  PairBlocks<T>& blocks_;
  BlockGradient<T> gradient_;
  const T* alpha_;
  int64_t k_, d_;
  double total_, grad_, unit_, scale_;
  bool log_;
  T *grad_mean_, *grad_var_;
};

// What is asked of a block's tiles where no gradient is wanted.
template <class T>
struct OverlapAlone {
  const T* alpha;
  int64_t k;
  bool log;

  void begin(int64_t, int64_t) const {}
  OverlapSum add(const Tile<T>& tile) const { return tile_overlap(tile, alpha, k, log); }
  void end(int64_t, int64_t, const OverlapSum&, const OverlapSum&) const {}
};

// Sums of all tiles, in an order that does not depend on the threads.
template <class T, class Blocks>
OverlapSum sum_blocks(PairBlocks<T>& blocks, bool log, Blocks&& each) {
  const T limit = far_apart<T>(log);
  OverlapSum overlap;
  std::vector<OverlapSum> by_tile;
  for_blocks(blocks.count(), [&](int64_t a, int64_t b) {
    by_tile.assign(blocks.tiles(a, b).size(), OverlapSum());
    each.begin(a, b);
    blocks.distances(a, b, limit,
                     [&](const Tile<T>& tile) { by_tile[tile.index] = each.add(tile); });
    const OverlapSum before = overlap;
    for (const OverlapSum& sum : by_tile) overlap.add(sum);
    each.end(a, b, before, overlap);
  });
  return overlap;
}

}  // namespace

template <class T>
void weighted_overlap(Cpu, Moments<T> of, const T* alpha, double eps, bool log, T* value) {
  const double total = total_weight(alpha, of.rows);
  PairBlocks<T> blocks(of, eps);
  const OverlapSum all = log && total == 0
                             ? OverlapSum()
                             : sum_blocks(blocks, log, OverlapAlone<T>{alpha, of.rows, log});
  *value = T(overlap_value(all, total, eps, log));
}

template <class T>
void weighted_overlap_with_gradient(Cpu, const T* grad, Moments<T> of, const T* alpha, double eps,
                                    bool log, T* value, T* grad_mean, T* grad_var) {
  const double total = total_weight(alpha, of.rows);
  if (of.rows < 2 || (log && total == 0)) {
    std::fill_n(grad_mean, of.rows * of.dims, T(0));
    std::fill_n(grad_var, of.rows * of.dims, T(0));
    *value = 0;
    return;
  }
  PairBlocks<T> blocks(of, eps);
  OverlapGradient<T> gradient(*grad, blocks, alpha, of, total, eps, log, grad_mean, grad_var);
  const OverlapSum all = sum_blocks(blocks, log, gradient);
  gradient.finish(all);
  *value = T(overlap_value(all, total, eps, log));
}

#define CWBR_INSTANTIATE(T)                                                                       \
  template void weighted_overlap(Cpu, Moments<T>, const T*, double, bool, T*);                    \
  template void weighted_overlap_with_gradient(Cpu, const T*, Moments<T>, const T*, double, bool, \
                                               T*, T*, T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
