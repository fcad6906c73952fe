// Registers the CPU kernels of the class bank under the schemas that cwbr_fused/schema.py declares.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/batch_kernels.h"
#include "tensors.h"

namespace cwbr {
namespace {

std::tuple<Tensor, Tensor, Tensor> top_confusions_op(const Tensor& logits, const Tensor& targets,
                                                     const Tensor& seen, int64_t top) {
  check(top >= 0, "top: expected at least 0, got ", top);
  const InputMatrix input = input_matrix(logits, "logits");
  const Tensor classes_of = int64_targets(targets);
  check(classes_of.size(0) == input.rows, "targets: expected shape (", input.rows, "), got (",
        classes_of.size(0), ")");
  check_classes(classes_of, "targets", 0, input.cols);
  const Tensor candidates = checked<bool, 1>(seen, "seen", {input.cols});
  const int64_t width = std::clamp<int64_t>(input.cols - 1, 0, top);
  return with_input_type(input.type, [&](auto in) {
    using In = decltype(in);
    using T = Accumulate<In>;
    const Tensor index = empty<int64_t, 2>({input.rows, width});
    const Tensor weight = empty<T, 2>({input.rows, width});
    const Tensor own = empty<T, 1>({input.rows});
    top_confusions(input.as<In>(), const_data<int64_t>(classes_of), const_data<bool>(candidates),
                   width, data<int64_t>(index), data<T>(weight), data<T>(own));
    return std::make_tuple(index, weight, own);
  });
}

std::tuple<Tensor, Tensor> class_attraction_op(const Tensor& z, const Tensor& mean,
                                               const Tensor& var, const Tensor& index,
                                               const Tensor& coefficient) {
  const InputMatrix input = input_matrix(z, "z");
  return with_input_type(input.type, [&](auto in) {
    using In = decltype(in);
    using T = Accumulate<In>;
    const Tensor bank = checked<T, 2>(mean, "mean", {-1, input.cols});
    const Tensor variances = checked<T, 1>(var, "var", {input.cols});
    const Tensor chosen = checked<int64_t, 2>(index, "index", {input.rows, -1});
    check_classes(chosen, "index", -1, bank.size(0));
    const int64_t count = chosen.size(1);
    const Tensor factor = checked<T, 2>(coefficient, "coefficient", {input.rows, count});
    const Tensor energy = empty<T, 1>({input.rows});
    const Tensor gradient = empty<T, 2>({input.rows, input.cols});
    class_attraction(input.as<In>(), const_data<T>(bank), const_data<T>(variances),
                     const_data<int64_t>(chosen), const_data<T>(factor), count, data<T>(energy),
                     data<T>(gradient));
    return std::make_tuple(energy, gradient);
  });
}

std::tuple<Tensor, Tensor> observe_classes_op(const Tensor& mean, const Tensor& count,
                                              const Tensor& var, const Tensor& updates,
                                              const Tensor& classes, const Tensor& size,
                                              const Tensor& batch_mean, const Tensor& batch_var,
                                              double momentum, double floor) {
  return with_float_type(mean, [&](auto type) {
    using T = decltype(type);
    const Tensor bank = checked<T, 2>(mean, "mean", {-1, -1});
    const int64_t dims = bank.size(1);
    const Tensor seen = checked<T, 1>(count, "count", {bank.size(0)});
    T* const variances = written<T, 1>(var, "var", {dims});
    T* const number = written<T, 0>(updates, "updates", {});
    const Tensor rows = checked<int64_t, 1>(classes, "classes", {-1});
    check_classes(rows, "classes", -1, bank.size(0));
    const int64_t groups = rows.size(0);
    const Tensor sizes = checked<T, 1>(size, "size", {groups});
    const Tensor means = checked<T, 2>(batch_mean, "batch_mean", {groups, dims});
    const Tensor scatter = checked<T, 2>(batch_var, "batch_var", {groups, dims});
    const Tensor weight = empty<T, 1>({groups}), metric = empty<T, 1>({dims});
    const BatchClasses<T> batch{const_data<int64_t>(rows), const_data<T>(sizes),
                                const_data<T>(means), groups};
    observe_classes(const_data<T>(bank), const_data<T>(seen), variances, number, batch,
                    const_data<T>(scatter), dims, momentum, floor, data<T>(weight),
                    data<T>(metric));
    return std::make_tuple(weight, metric);
  });
}

void follow_classes_op(const Tensor& mean, const Tensor& count, const Tensor& classes,
                       const Tensor& weight, const Tensor& batch_mean, double momentum) {
  with_float_type(mean, [&](auto type) {
    using T = decltype(type);
    T* const bank = written<T, 2>(mean, "mean", {-1, -1});
    const int64_t num_classes = mean.size(0), dims = mean.size(1);
    T* const seen = written<T, 1>(count, "count", {num_classes});
    const Tensor rows = checked<int64_t, 1>(classes, "classes", {-1});
    check_classes(rows, "classes", -1, num_classes);
    const int64_t groups = rows.size(0);
    const Tensor weights = checked<T, 1>(weight, "weight", {groups});
    const Tensor means = checked<T, 2>(batch_mean, "batch_mean", {groups, dims});
    follow_classes(bank, seen,
                   BatchClasses<T>{const_data<int64_t>(rows), const_data<T>(weights),
                                   const_data<T>(means), groups},
                   dims, momentum);
  });
}

}  // namespace
}  // namespace cwbr

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CPU, m) {
  m.impl("top_confusions", TORCH_BOX(&cwbr::top_confusions_op));
  m.impl("class_attraction", TORCH_BOX(&cwbr::class_attraction_op));
  m.impl("observe_classes", TORCH_BOX(&cwbr::observe_classes_op));
  m.impl("follow_classes", TORCH_BOX(&cwbr::follow_classes_op));
}
