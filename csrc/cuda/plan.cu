#include <algorithm>
#include <tuple>

#include "launcher.h"
#include "plan.cuh"

namespace cwbr::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plan_op(const Tensor& logits,
                                                           const Tensor& targets, int64_t top_m,
                                                           int64_t min_count) {
  check(top_m >= 0, "top_m: expected at least 0, got ", top_m);
  check(min_count >= 1, "min_count: expected at least 1, got ", min_count);
  Launcher launch(logits);
  const Tensor rows = launch.matrix(logits, "logits");
  const int64_t batch = rows.size(0), groups = batch / min_count;
  check(batch <= kMaxSamples, "targets: expected at most ", kMaxSamples, " samples, got ", batch);
  const Tensor target = launch.input<int64_t, 1>(int64_targets(targets), "targets", {batch});
  const int64_t m = std::min(top_m, groups * (groups - 1) / 2);
  const Tensor order = launch.empty<int64_t>({batch});
  const Tensor offsets = launch.empty<int64_t>({groups + 1});
  const Tensor classes = launch.empty<int64_t>({groups});
  const Tensor pairs = launch.empty<int64_t>({m, 2});
  const Tensor weights = with_element_type(logits, "logits", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Tensor result = launch.empty<A>({m});
    plan(launch, elements<T>(rows), rows.size(1), elements<int64_t>(target), batch, min_count, m,
         data<int64_t>(order), data<int64_t>(offsets), data<int64_t>(classes), data<int64_t>(pairs),
         data<A>(result));
    return result;
  });
  return {order, offsets, classes, pairs, weights};
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) { m.impl("plan", TORCH_BOX(&cwbr::cuda::plan_op)); }
