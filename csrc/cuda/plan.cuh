// plan: class groups, mean softmax and the most confused pairs, in four launches.
#pragma once

#include "confusion_weights.cuh"
#include "group_by_class.cuh"
#include "top_pairs.cuh"

namespace cwbr::cuda {

// logits (B, C), targets (B,) -> order (B,), offsets (K + 1,), classes (K,), pairs (M, 2) and
// weights (M,) with K = B / min_count. The weights are made symmetric as they are ranked.
template <class T, class Launcher>
void plan(Launcher& launch, const T* logits, int64_t num_classes, const int64_t* targets,
          int64_t batch, int64_t min_count, int64_t top_m, int64_t* order, int64_t* offsets,
          int64_t* classes, int64_t* pairs, accumulate_t<T>* weights) {
  using A = accumulate_t<T>;
  const int64_t groups = batch / min_count;
  A* mean_probs = launch.template scratch<A>(groups * groups);
  group_by_class(launch, targets, batch, min_count, num_classes, order, offsets, classes);
  mean_softmax(launch, logits, num_classes, order, offsets, classes, groups, mean_probs);
  top_pairs<A>(launch, SymmetricWeights<A>{mean_probs, groups}, top_m, pairs, weights);
}

}  // namespace cwbr::cuda
