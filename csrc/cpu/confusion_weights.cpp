#include <algorithm>
#include <vector>

#include "cpu/isa_batch_table.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

constexpr int64_t kGrain = 1 << 15;  // logits per thread

// alpha = (P + P^T) / 2 in place, with a zero diagonal.
template <class T>
void symmetrize(T* alpha, int64_t groups) {
  for (int64_t k = 0; k < groups; ++k) {
    alpha[k * groups + k] = 0;
    for (int64_t j = 0; j < k; ++j) {
      T& lower = alpha[k * groups + j];
      T& upper = alpha[j * groups + k];
      lower = upper = (upper + lower) / 2;
    }
  }
}

}  // namespace

template <class In, class T>
void confusion_weights(Cpu, Matrix<const In> logits, Groups groups, const int64_t* classes,
                       T* alpha) {
  const auto& loops = batch_loops<In>();
  std::vector<int64_t> used, columns;
  for (int64_t k = 0; k < groups.count; ++k) {
    if (classes[k] < 0) continue;
    used.push_back(k);
    columns.push_back(classes[k]);
  }
  std::fill_n(alpha, groups.count * groups.count, T(0));
  const int64_t n = used.size();
  const int64_t cost =
      (1 + logits.cols + n) * std::max<int64_t>(1, logits.rows / std::max<int64_t>(1, n));
  parallel_for(0, n, grain_of(kGrain, cost), [&](int64_t first, int64_t last) {
    std::vector<T> sums(n);
    for (int64_t u = first; u < last; ++u) {
      const int64_t k = used[u], size = groups.size(k);
      std::fill(sums.begin(), sums.end(), T(0));
      for (int64_t s = 0; s < size; ++s) {
        const In* row = logits.data + groups.samples(k)[s] * logits.stride;
        loops.add_probabilities(row, loops.softmax_statistics(row, logits.cols), columns.data(), n,
                                sums.data());
      }
      for (int64_t j = 0; j < n; ++j) {
        alpha[k * groups.count + used[j]] = size > 0 ? sums[j] / size : 0;
      }
    }
  });
  symmetrize(alpha, groups.count);
}

#define CWBR_INSTANTIATE(In, T) \
  template void confusion_weights(Cpu, Matrix<const In>, Groups, const int64_t*, T*);
CWBR_FOR_EACH_INPUT(CWBR_INSTANTIATE)

}  // namespace cwbr
