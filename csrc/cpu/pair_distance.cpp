#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pair_blocks.h"
#include "cpu/parallel.h"

namespace cwbr {

namespace {

// Work below this many (pair, vector of dimensions)s is not worth a second thread.
constexpr int64_t kGrain = 20000;

// A power of two that brings typical variances of these pairs to 1, from a few of them.
template <class T>
T typical_scale(const Rows<T>& rows, const Pairs& pairs) {
  constexpr int64_t most_pairs = 16, most_dims = 4;
  int64_t sum = 0, count = 0;
  for (int64_t p = 0; p < pairs.count; p += (pairs.count + most_pairs - 1) / most_pairs)
    for (int64_t x = 0; x < rows.d; x += (rows.d + most_dims - 1) / most_dims) {
      const T w = rows.var[pairs.index[2 * p] * rows.d + x] + rows.eps;
      if (!(w > 0) || !std::isfinite(w)) continue;
      sum += std::ilogb(w);
      ++count;
    }
  return count == 0 ? T(1) : std::ldexp(T(1), -int(sum / count));
}

// The rows that occur in pairs, and the pairs as positions among them.
struct NamedRows {
  std::vector<int64_t> rows, pairs;
  std::vector<int64_t> position;  // of each of the k rows, -1 for those in no pair

  NamedRows(const Pairs& named, int64_t k) : pairs(2 * named.count), position(k, -1) {
    for (int64_t p = 0; p < 2 * named.count; ++p) {
      int64_t& at = position[named.index[p]];
      if (at < 0) {
        at = rows.size();
        rows.push_back(named.index[p]);
      }
      pairs[p] = at;
    }
  }
};

}  // namespace

template <class T>
void pair_distance(Cpu, Moments<T> of, Pairs pairs, double eps, T* distance) {
  if (pairs.count == 0) return;
  const PairKernels<T>& kernels = pair_kernels<T>();
  const Rows<T> rows(of, eps);
  const T scale = typical_scale(rows, pairs), near = near_limit<T>(rows.d);
  const int64_t vectors = rows.d / kernels.lanes + 1;
  parallel_for(0, pairs.count, grain_of(kGrain, vectors), [&](int64_t first, int64_t last) {
    kernels.pair_distance(rows, pairs.index, first, last, scale, distance);
    for (int64_t p = first; p < last; ++p)
      if (distance[p] < near)
        distance[p] = kernels.near_distance(rows, pairs.index[2 * p], pairs.index[2 * p + 1]);
  });
}

template <class T>
void pair_distance_backward(Cpu, const T* grad, Moments<T> of, Pairs pairs, double eps,
                            T* grad_mean, T* grad_var) {
  const PairKernels<T>& kernels = pair_kernels<T>();
  const Rows<T> rows(of, eps);
  const int64_t d = rows.d, m = pairs.count;
  const NamedRows named(pairs, rows.k);
  for (int64_t row = 0; row < rows.k; ++row)
    if (named.position[row] < 0) {
      std::fill_n(grad_mean + row * d, d, T(0));
      std::fill_n(grad_var + row * d, d, T(0));
    }
  // Threads share out the dimensions, so that every sum over pairs has one order. A slice of the
  // rows is small enough to stay in the second-level cache.
  constexpr int64_t cache_bytes = 1 << 20;
  const int64_t n = named.rows.size(), vector_bytes = kernels.lanes * sizeof(T);
  const int64_t vectors = std::clamp<int64_t>(cache_bytes / (4 * vector_bytes * (n + 1)), 1, 4);
  const int64_t width = vectors * kernels.lanes, slices = (d + width - 1) / width;
  parallel_for(
      0, slices, grain_of(kGrain, 3 * vectors * (m + n + 1)), [&](int64_t begin, int64_t end) {
        const Buffer<T> work(n * 4 * width);
        for (int64_t slice = begin; slice < end; ++slice)
          kernels.pair_distance_backward(rows, grad, named.pairs.data(), m, named.rows.data(), n,
                                         slice * width, std::min(d - slice * width, width),
                                         work.get(), grad_mean, grad_var);
      });
}

#define CWBR_INSTANTIATE(T)                                        \
  template void pair_distance(Cpu, Moments<T>, Pairs, double, T*); \
  template void pair_distance_backward(Cpu, const T*, Moments<T>, Pairs, double, T*, T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
