// Registers the CPU kernels, but for those of the class bank, under the schemas that
// cwbr_fused/schema.py declares.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/batch_kernels.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "tensors.h"

namespace cwbr {

void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(begin, end, grain, body);
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

namespace {

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

std::tuple<Tensor, Tensor> class_moments_op(const Tensor& z, const Tensor& order,
                                            const Tensor& offsets, double eps) {
  const InputMatrix input = input_matrix(z, "z");
  const CheckedGroups checked_groups(order, offsets, input.rows);
  return with_input_type(input.type, [&](auto in) {
    using In = decltype(in);
    using T = Accumulate<In>;
    const Groups& groups = checked_groups.groups;
    const Tensor mean = empty<T, 2>({groups.count, input.cols});
    const Tensor var = empty<T, 2>({groups.count, input.cols});
    class_moments(input.as<In>(), groups, eps, data<T>(mean), data<T>(var));
    return std::make_tuple(mean, var);
  });
}

Tensor class_moments_backward_op(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& z,
                                 const Tensor& mean, const Tensor& var, const Tensor& order,
                                 const Tensor& offsets, double eps) {
  const InputMatrix input = input_matrix(z, "z");
  const CheckedGroups checked_groups(order, offsets, input.rows);
  return with_input_type(input.type, [&](auto in) {
    using In = decltype(in);
    using T = Accumulate<In>;
    const Groups& groups = checked_groups.groups;
    const std::array<int64_t, 2> sizes{groups.count, input.cols};
    const Tensor grad_m = checked<T>(grad_mean, "grad_mean", sizes);
    const Tensor grad_v = checked<T>(grad_var, "grad_var", sizes);
    const Tensor m = checked<T>(mean, "mean", sizes), v = checked<T>(var, "var", sizes);
    const Tensor grad = empty<In, 2>({input.rows, input.cols});
    class_moments_backward(const_data<T>(grad_m), const_data<T>(grad_v), input.as<In>(),
                           const_data<T>(m), const_data<T>(v), groups, eps, data<In>(grad));
    return grad;
  });
}

Tensor confusion_weights_op(const Tensor& logits, const Tensor& order, const Tensor& offsets,
                            const Tensor& classes) {
  const InputMatrix input = input_matrix(logits, "logits");
  const CheckedGroups checked_groups(order, offsets, input.rows);
  const Groups& groups = checked_groups.groups;
  const Tensor columns = checked<int64_t, 1>(classes, "classes", {groups.count});
  const int64_t* column = const_data<int64_t>(columns);
  for (int64_t k = 0; k < groups.count; ++k) {
    check(column[k] < input.cols, "classes: expected classes below ", input.cols, ", got ",
          column[k]);
  }
  return with_input_type(input.type, [&](auto in) {
    using In = decltype(in);
    const Tensor alpha = empty<Accumulate<In>, 2>({groups.count, groups.count});
    confusion_weights(input.as<In>(), groups, column, data<Accumulate<In>>(alpha));
    return alpha;
  });
}

std::tuple<Tensor, Tensor> top_pairs_op(const Tensor& alpha, int64_t top_m) {
  check(top_m >= 0, "top_m: expected at least 0, got ", top_m);
  return with_float_type(alpha, [&](auto type) {
    using T = decltype(type);
    const int64_t groups = alpha.dim() == 2 ? alpha.size(0) : -1;
    const Tensor weights_of = checked<T, 2>(alpha, "alpha", {groups, groups});
    const int64_t m = std::min(top_m, groups * (groups - 1) / 2);
    const Tensor pairs = empty<int64_t, 2>({m, 2});
    const Tensor weights = empty<T, 1>({m});
    top_pairs(const_data<T>(weights_of), groups, groups, m, data<int64_t>(pairs), data<T>(weights));
    return std::make_tuple(pairs, weights);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plan_op(const Tensor& logits,
                                                           const Tensor& targets, int64_t top_m,
                                                           int64_t min_count) {
  check(top_m >= 0, "top_m: expected at least 0, got ", top_m);
  check(min_count >= 1, "min_count: expected at least 1, got ", min_count);
  const InputMatrix input = input_matrix(logits, "logits");
  const Tensor classes_of = int64_targets(targets);
  check(classes_of.size(0) == input.rows, "targets: expected shape (", input.rows, "), got (",
        classes_of.size(0), ")");
  const int64_t groups = input.rows / min_count;
  const int64_t m = std::min(top_m, groups * (groups - 1) / 2);
  const Tensor order = empty<int64_t, 1>({input.rows});
  const Tensor offsets = empty<int64_t, 1>({groups + 1});
  const Tensor classes = empty<int64_t, 1>({groups});
  const Tensor pairs = empty<int64_t, 2>({m, 2});
  const Tensor weights = with_input_type(input.type, [&](auto in) {
    using In = decltype(in);
    const Tensor result = empty<Accumulate<In>, 1>({m});
    plan(input.as<In>(), const_data<int64_t>(classes_of), min_count, m, data<int64_t>(order),
         data<int64_t>(offsets), data<int64_t>(classes), data<int64_t>(pairs),
         data<Accumulate<In>>(result));
    return result;
  });
  return {order, offsets, classes, pairs, weights};
}

Tensor pair_distance_op(const Tensor& mean, const Tensor& var, const Tensor& pairs, double eps) {
  return with_float_type(mean, [&](auto type) {
    using T = decltype(type);
    const Moments<T> moments(mean, var);
    const Tensor index = checked_pairs(pairs, moments.rows);
    const Tensor distance = empty<T, 1>({index.size(0)});
    pair_distance(moments.mean(), moments.var(), const_data<int64_t>(index), index.size(0),
                  moments.rows, moments.dims, eps, data<T>(distance));
    return distance;
  });
}

std::tuple<Tensor, Tensor> pair_distance_backward_op(const Tensor& grad, const Tensor& mean,
                                                     const Tensor& var, const Tensor& pairs,
                                                     double eps) {
  return with_float_type(mean, [&](auto type) {
    using T = decltype(type);
    const Moments<T> moments(mean, var);
    const Tensor index = checked_pairs(pairs, moments.rows);
    const Tensor g = checked<T, 1>(grad, "grad", {index.size(0)});
    const auto [grad_mean, grad_var] = moments.empty_gradients();
    pair_distance_backward(const_data<T>(g), moments.mean(), moments.var(),
                           const_data<int64_t>(index), index.size(0), moments.rows, moments.dims,
                           eps, data<T>(grad_mean), data<T>(grad_var));
    return std::make_tuple(grad_mean, grad_var);
  });
}

Tensor all_pair_distance_op(const Tensor& mean, const Tensor& var, double eps) {
  return with_float_type(mean, [&](auto type) {
    using T = decltype(type);
    const Moments<T> moments(mean, var);
    const Tensor distance = empty<T, 2>({moments.rows, moments.rows});
    all_pair_distance(moments.mean(), moments.var(), moments.rows, moments.dims, eps,
                      data<T>(distance));
    return distance;
  });
}

std::tuple<Tensor, Tensor> all_pair_distance_backward_op(const Tensor& grad, const Tensor& mean,
                                                         const Tensor& var, double eps) {
  return with_float_type(mean, [&](auto type) {
    using T = decltype(type);
    const Moments<T> moments(mean, var);
    const Tensor g = checked<T, 2>(grad, "grad", {moments.rows, moments.rows});
    const auto [grad_mean, grad_var] = moments.empty_gradients();
    all_pair_distance_backward(const_data<T>(g), moments.mean(), moments.var(), moments.rows,
                               moments.dims, eps, data<T>(grad_mean), data<T>(grad_var));
    return std::make_tuple(grad_mean, grad_var);
  });
}

Tensor weighted_overlap_op(const Tensor& mean, const Tensor& var, const Tensor& alpha, double eps,
                           bool log) {
  return with_float_type(mean, [&](auto type) {
    using T = decltype(type);
    const Moments<T> moments(mean, var);
    const Tensor weights = checked<T, 2>(alpha, "alpha", {moments.rows, moments.rows});
    const Tensor value = empty<T, 0>({});
    *data<T>(value) = weighted_overlap(moments.mean(), moments.var(), const_data<T>(weights),
                                       moments.rows, moments.dims, eps, log);
    return value;
  });
}

std::tuple<Tensor, Tensor, Tensor> weighted_overlap_with_gradient_op(const Tensor& grad,
                                                                     const Tensor& mean,
                                                                     const Tensor& var,
                                                                     const Tensor& alpha,
                                                                     double eps, bool log) {
  return with_float_type(mean, [&](auto type) {
    using T = decltype(type);
    const Moments<T> moments(mean, var);
    const Tensor weights = checked<T, 2>(alpha, "alpha", {moments.rows, moments.rows});
    const Tensor value = empty<T, 0>({});
    const auto [grad_mean, grad_var] = moments.empty_gradients();
    *data<T>(value) = weighted_overlap_with_gradient(
        scalar<T>(grad, "grad"), moments.mean(), moments.var(), const_data<T>(weights),
        moments.rows, moments.dims, eps, log, data<T>(grad_mean), data<T>(grad_var));
    return std::make_tuple(value, grad_mean, grad_var);
  });
}

std::tuple<Tensor, Tensor> weighted_overlap_backward_op(const Tensor& grad, const Tensor& value,
                                                        const Tensor& mean, const Tensor& var,
                                                        const Tensor& alpha, double eps, bool log) {
  return with_float_type(mean, [&](auto type) {
    scalar<decltype(type)>(value, "value");  // the kernel sums it again
    const auto [again, grad_mean, grad_var] =
        weighted_overlap_with_gradient_op(grad, mean, var, alpha, eps, log);
    return std::make_tuple(grad_mean, grad_var);
  });
}

// The arguments that regularizer and its backward share. No moments pass between the two: the
// lists for them are empty here.
template <class T>
struct RegularizerArguments {
  std::vector<InputMatrix> features;
  CheckedGroups groups;
  Tensor index, weights;

  RegularizerArguments(const std::vector<Tensor>& features_of, const Tensor& order,
                       const Tensor& offsets, const Tensor& pairs, const Tensor& weights_of)
      : features(input_matrices(features_of)),
        groups(order, offsets, features[0].rows),
        index(checked_pairs(pairs, groups.groups.count)),
        weights(checked<T, 1>(weights_of, "weights", {index.size(0)})) {
    for (const InputMatrix& z : features) {
      check(z.rows == features[0].rows, "features: expected one batch size, got ", features[0].rows,
            " and ", z.rows);
      check((z.type == InputType::kDouble) == std::is_same_v<T, double>,
            "features: expected layers that accumulate in the dtype of weights, ",
            name_of(scalar_type_of<T>), ", got ", name_of(z.tensor.scalar_type()));
    }
  }

  static std::vector<InputMatrix> input_matrices(const std::vector<Tensor>& features) {
    check(!features.empty(), "features: expected at least one layer");
    std::vector<InputMatrix> matrices;
    for (const Tensor& z : features) matrices.push_back(input_matrix(z, "features"));
    return matrices;
  }

  int64_t batch() const { return features[0].rows; }
  int64_t layer_count() const { return features.size(); }
  Pairs<T> pairs() const {
    return {const_data<int64_t>(index), const_data<T>(weights), index.size(0)};
  }

  // With `grads` the tensors that the backward pass writes.
  std::vector<Layer<T>> layers(const std::vector<Tensor>& grads = {}) const {
    std::vector<Layer<T>> result;
    for (size_t l = 0; l < features.size(); ++l) {
      const InputMatrix& z = features[l];
      result.push_back({z.type, z.tensor.const_data_ptr(), z.stride, z.cols,
                        grads.empty() ? nullptr : grads[l].mutable_data_ptr()});
    }
    return result;
  }
};

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor> regularizer_op(
    const std::vector<Tensor>& features, const Tensor& order, const Tensor& offsets,
    const Tensor& pairs, const Tensor& weights, double eps, bool log) {
  return with_float_type(weights, [&](auto type) {
    using T = decltype(type);
    const RegularizerArguments<T> arguments(features, order, offsets, pairs, weights);
    const Tensor distance = empty<T, 2>({arguments.layer_count(), arguments.index.size(0)});
    const Tensor value = empty<T, 0>({});
    *data<T>(value) =
        regularizer(arguments.layers().data(), arguments.layer_count(), arguments.batch(),
                    arguments.groups.groups, arguments.pairs(), eps, log, data<T>(distance));
    return std::make_tuple(value, std::vector<Tensor>(), std::vector<Tensor>(), distance);
  });
}

std::vector<Tensor> regularizer_backward_op(const Tensor& grad, const std::vector<Tensor>& features,
                                            const std::vector<Tensor>& mean,
                                            const std::vector<Tensor>& var, const Tensor& distance,
                                            const Tensor& order, const Tensor& offsets,
                                            const Tensor& pairs, const Tensor& weights, double eps,
                                            bool log) {
  return with_float_type(weights, [&](auto type) {
    using T = decltype(type);
    const RegularizerArguments<T> arguments(features, order, offsets, pairs, weights);
    check(mean.empty(), "mean: expected none, it is computed again, got ", mean.size());
    check(var.empty(), "var: expected none, it is computed again, got ", var.size());
    std::vector<Tensor> grads;
    for (const InputMatrix& z : arguments.features) {
      grads.push_back(with_input_type(
          z.type, [&](auto in) { return empty<decltype(in), 2>({z.rows, z.cols}); }));
    }
    const Tensor distances =
        checked<T, 2>(distance, "distance", {arguments.layer_count(), arguments.index.size(0)});
    regularizer_backward(scalar<T>(grad, "grad"), arguments.layers(grads).data(),
                         arguments.layer_count(), arguments.batch(), arguments.groups.groups,
                         arguments.pairs(), eps, log, const_data<T>(distances));
    return grads;
  });
}

std::string cpu_isa_op() { return isa_name(); }

}  // namespace
}  // namespace cwbr

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CPU, m) {
  m.impl("group_by_class", TORCH_BOX(&cwbr::group_by_class_op));
  m.impl("class_moments", TORCH_BOX(&cwbr::class_moments_op));
  m.impl("class_moments_backward", TORCH_BOX(&cwbr::class_moments_backward_op));
  m.impl("confusion_weights", TORCH_BOX(&cwbr::confusion_weights_op));
  m.impl("top_pairs", TORCH_BOX(&cwbr::top_pairs_op));
  m.impl("plan", TORCH_BOX(&cwbr::plan_op));
  m.impl("pair_distance", TORCH_BOX(&cwbr::pair_distance_op));
  m.impl("pair_distance_backward", TORCH_BOX(&cwbr::pair_distance_backward_op));
  m.impl("all_pair_distance", TORCH_BOX(&cwbr::all_pair_distance_op));
  m.impl("all_pair_distance_backward", TORCH_BOX(&cwbr::all_pair_distance_backward_op));
  m.impl("weighted_overlap", TORCH_BOX(&cwbr::weighted_overlap_op));
  m.impl("weighted_overlap_backward", TORCH_BOX(&cwbr::weighted_overlap_backward_op));
  m.impl("weighted_overlap_with_gradient", TORCH_BOX(&cwbr::weighted_overlap_with_gradient_op));
  m.impl("regularizer", TORCH_BOX(&cwbr::regularizer_op));
  m.impl("regularizer_backward", TORCH_BOX(&cwbr::regularizer_backward_op));
}

// For `python -m cwbr_fused.info`: a fact of this build, not an operation of schema.py.
STABLE_TORCH_LIBRARY(cwbr_fused_build, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused_build, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cwbr::cpu_isa_op));
}
