// sum(w exp(-D)) / sum(w) as it is summed by the block: plainly, or in the log domain.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

// A part of sum(w exp(-D)) is sum * exp(max); outside the log domain max is 0.
template <class A>
struct OverlapPart {
  A max, sum;
};

// The block's total of parts that its threads enumerate: `each(visit)` calls visit(max, sum) for
// every part of this thread, the same ones each time.
template <class A, class Each>
__device__ OverlapPart<A> overlap_sum(bool log, A (&scratch)[kMaxWarps], Each each) {
  constexpr A kNothing = -kInfinity<A>;
  A max = log ? kNothing : A{0}, sum = 0;
  if (log) {
    each([&](A part_max, A) { max = larger(max, part_max); });
    max = block_max(max, scratch);
  }
  each([&](A part_max, A part_sum) {
    if (part_max != kNothing) sum += part_sum * exponential(part_max - max);
  });
  return {max, block_sum(sum, scratch)};
}

// One pair as a part.
template <class A, class Visit>
__device__ void visit_pair(bool log, A weight, A distance, Visit visit) {
  if (log)
    visit(logarithm(weight) - distance, A{1});
  else
    visit(-distance, weight);
}

// The gradient of the overlap with respect to the distance of one pair.
template <class A>
__device__ A overlap_gradient(bool log, A grad, A weight, A distance, A value, A total, A eps) {
  if (!log) return -grad * weight * exponential(-distance) / (total < eps ? eps : total);
  return total == 0 ? A{0} : -grad * exponential(logarithm(weight) - distance - value) / total;
}

// overlap, or its logarithm, from all parts and the total weight; 0 where nothing is weighted.
template <class A>
__device__ A overlap_value(OverlapPart<A> all, A total, A eps, bool log) {
  if (!log) return all.sum / (total < eps ? eps : total);
  return total == 0 ? A{0} : all.max + logarithm(all.sum) - logarithm(total);
}

}  // namespace cwbr::cuda
