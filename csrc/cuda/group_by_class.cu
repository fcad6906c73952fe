#include <tuple>

#include "group_by_class.cuh"
#include "launcher.h"

namespace cwbr::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> group_by_class_op(const Tensor& targets, int64_t min_count) {
  check(min_count >= 1, "min_count: expected at least 1, got ", min_count);
  Launcher launch(targets);
  const Tensor target = int64_targets(targets);
  const int64_t batch = target.size(0), groups = batch / min_count;
  check(batch <= kMaxSamples, "targets: expected at most ", kMaxSamples, " samples, got ", batch);
  const Tensor order = launch.empty<int64_t>({batch});
  const Tensor offsets = launch.empty<int64_t>({groups + 1});
  const Tensor classes = launch.empty<int64_t>({groups});
  group_by_class(launch, elements<int64_t>(target), batch, min_count, kMaxClasses,
                 data<int64_t>(order), data<int64_t>(offsets), data<int64_t>(classes));
  return {order, offsets, classes};
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("group_by_class", TORCH_BOX(&cwbr::cuda::group_by_class_op));
}
