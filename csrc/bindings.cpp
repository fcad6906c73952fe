// Registers the CPU kernels under the schemas that cwbr_fused/schema.py declares.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/batch_kernels.h"
#include "cpu/parallel.h"
#include "tensors.h"

namespace cwbr {

void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(begin, end, grain, body);
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

namespace {

// Classes of any integer dtype as contiguous int64.
Tensor int64_targets(const Tensor& targets) {
  check(targets.dim() == 1, "targets: expected shape (B,), got ", shape(targets.sizes()));
  switch (targets.scalar_type()) {
    case ScalarType::Long:
      return targets.is_contiguous() ? targets : torch::stable::contiguous(targets);
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
    case ScalarType::Bool:
      return torch::stable::contiguous(torch::stable::to(targets, ScalarType::Long));
    default:
      check(false, "targets: expected an integer dtype, got ",
            torch::headeronly::toString(targets.scalar_type()));
      return targets;
  }
}

std::tuple<Tensor, Tensor, Tensor> group_by_class_op(const Tensor& targets, int64_t min_count) {
  check(min_count >= 1, "min_count: expected at least 1, got ", min_count);
  const Tensor classes_of = int64_targets(targets);
  const int64_t batch = classes_of.size(0), groups = batch / min_count;
  const Tensor order = empty<int64_t, 1>({batch});
  const Tensor offsets = empty<int64_t, 1>({groups + 1});
  const Tensor classes = empty<int64_t, 1>({groups});
  group_by_class(const_data<int64_t>(classes_of), batch, min_count, data<int64_t>(order),
                 data<int64_t>(offsets), data<int64_t>(classes));
  return {order, offsets, classes};
}

template <class T>
std::tuple<Tensor, Tensor> top_pairs_as(const Tensor& alpha, int64_t top_m) {
  const int64_t groups = alpha.dim() == 2 ? alpha.size(0) : -1;
  const Tensor weights_of = checked<T, 2>(alpha, "alpha", {groups, groups});
  const int64_t m = std::min(top_m, groups * (groups - 1) / 2);
  const Tensor pairs = empty<int64_t, 2>({m, 2});
  const Tensor weights = empty<T, 1>({m});
  top_pairs(const_data<T>(weights_of), groups, groups, m, data<int64_t>(pairs), data<T>(weights));
  return {pairs, weights};
}

std::tuple<Tensor, Tensor> top_pairs_op(const Tensor& alpha, int64_t top_m) {
  check(top_m >= 0, "top_m: expected at least 0, got ", top_m);
  const bool wide = alpha.scalar_type() == ScalarType::Double;
  return wide ? top_pairs_as<double>(alpha, top_m) : top_pairs_as<float>(alpha, top_m);
}

}  // namespace
}  // namespace cwbr

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CPU, m) {
  m.impl("group_by_class", TORCH_BOX(&cwbr::group_by_class_op));
  m.impl("top_pairs", TORCH_BOX(&cwbr::top_pairs_op));
}
