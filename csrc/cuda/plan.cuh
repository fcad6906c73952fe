// plan: class groups, mean softmax and the most confused pairs, in four launches.
#pragma once

#include "confusion_weights.cuh"
#include "group_by_class.cuh"
#include "top_pairs.cuh"

namespace cwbr::cuda {

// logits (B, C), targets (B,) -> order (B,), offsets (K + 1,), classes (K,), pairs (M, 2) and
// weights (M,) with K = B / min_count. The weights are made symmetric as they are ranked.
template <class T, class Launcher, class A>
void plan(Launcher& launch, Matrix<const T> logits, const int64_t* targets, int64_t min_count,
          int64_t top_m, int64_t* order, int64_t* offsets, int64_t* classes, int64_t* pairs,
          A* weights) {
  const Groups groups{order, offsets, logits.rows / min_count, logits.rows};
  A* mean_probs = launch.template scratch<A>(groups.count * groups.count);
  group_by_class(launch, targets, logits.rows, min_count, order, offsets, classes, logits.cols);
  mean_softmax(launch, logits, groups, classes, mean_probs);
  top_pairs_of(launch, SymmetricWeights<A>{mean_probs, groups.count}, top_m, pairs, weights);
}

}  // namespace cwbr::cuda
