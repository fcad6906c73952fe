// The operations on a batch and on the class bank, on any Device; see operations.h.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "tensors.h"

#ifdef CWBR_CUDA
#include "class_attraction.cuh"
#include "class_moments.cuh"
#include "confusion_weights.cuh"
#include "follow_classes.cuh"
#include "group_by_class.cuh"
#include "observe_classes.cuh"
#include "plan.cuh"
#include "top_confusions.cuh"
#include "top_pairs.cuh"
#endif

// What registers the operations goes through this list.
#define CWBR_FOR_EACH_BATCH_OPERATION(use)                                                    \
  use(group_by_class) use(class_moments) use(class_moments_backward) use(confusion_weights)   \
      use(top_pairs) use(plan) use(top_confusions) use(class_attraction) use(observe_classes) \
          use(follow_classes)

namespace cwbr {

inline int64_t pairs_of(int64_t rows) { return rows * (rows - 1) / 2; }

template <class Device>
Three group_by_class_op(const Tensor& targets, int64_t min_count) {
  check_at_least("min_count", min_count, 1);
  Device on(targets);
  const Tensor classes_of = int64_targets(on, targets);
  const int64_t batch = classes_of.size(0), groups = batch / min_count;
  const Tensor order = empty<int64_t>(on, {batch}), offsets = empty<int64_t>(on, {groups + 1});
  const Tensor classes = empty<int64_t>(on, {groups});
  group_by_class(on, elements<int64_t>(classes_of), batch, min_count, data<int64_t>(order),
                 data<int64_t>(offsets), data<int64_t>(classes));
  return {order, offsets, classes};
}

template <class Device>
Two class_moments_op(const Tensor& z, const Tensor& order, const Tensor& offsets, double eps) {
  Device on(z);
  const InputMatrix features = input_matrix(on, z, "z");
  const GroupTensors groups(on, order, offsets, features.rows);
  return on.with_element_type(features.type, [&]<class In>(In) {
    using T = accumulate_t<In>;
    const Tensor mean = empty<T>(on, {groups.count(), features.cols});
    const Tensor var = empty<T>(on, {groups.count(), features.cols});
    class_moments(on, features.as<In>(), groups.groups(), eps, data<T>(mean), data<T>(var));
    return Two(mean, var);
  });
}

template <class Device>
Tensor class_moments_backward_op(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& z,
                                 const Tensor& mean, const Tensor& var, const Tensor& order,
                                 const Tensor& offsets, double eps) {
  Device on(z);
  const InputMatrix features = input_matrix(on, z, "z");
  const GroupTensors groups(on, order, offsets, features.rows);
  const Tensor grad = on.empty(z.scalar_type(), {features.rows, features.cols});
  on.with_element_type(features.type, [&]<class In>(In) {
    using T = accumulate_t<In>;
    const Sizes sizes = {groups.count(), features.cols};
    const Tensor grad_m = input<T>(on, grad_mean, "grad_mean", sizes);
    const Tensor grad_v = input<T>(on, grad_var, "grad_var", sizes);
    const Tensor m = input<T>(on, mean, "mean", sizes), v = input<T>(on, var, "var", sizes);
    class_moments_backward(on, elements<T>(grad_m), elements<T>(grad_v), features.as<In>(),
                           elements<T>(m), elements<T>(v), groups.groups(), eps, data<In>(grad));
  });
  return grad;
}

template <class Device>
Tensor confusion_weights_op(const Tensor& logits, const Tensor& order, const Tensor& offsets,
                            const Tensor& classes) {
  Device on(logits);
  const InputMatrix rows = input_matrix(on, logits, "logits");
  const GroupTensors groups(on, order, offsets, rows.rows);
  const Tensor columns = input<int64_t>(on, classes, "classes", {groups.count()});
  check_below(on, columns, "classes", rows.cols);
  return on.with_element_type(rows.type, [&]<class In>(In) {
    using T = accumulate_t<In>;
    const Tensor alpha = empty<T>(on, {groups.count(), groups.count()});
    confusion_weights(on, rows.as<In>(), groups.groups(), elements<int64_t>(columns),
                      data<T>(alpha));
    return alpha;
  });
}

template <class Device>
Two top_pairs_op(const Tensor& alpha, int64_t top_m) {
  check_at_least("top_m", top_m, 0);
  Device on(alpha);
  return with_float_type(alpha, [&]<class T>(T) {
    const int64_t groups = alpha.dim() == 2 ? alpha.size(0) : -1;
    const Tensor weights_of = input<T>(on, alpha, "alpha", {groups, groups});
    const int64_t m = std::min(top_m, pairs_of(groups));
    const Tensor pairs = empty<int64_t>(on, {m, 2}), weights = empty<T>(on, {m});
    top_pairs(on, elements<T>(weights_of), groups, m, data<int64_t>(pairs), data<T>(weights));
    return Two(pairs, weights);
  });
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plan_op(const Tensor& logits,
                                                           const Tensor& targets, int64_t top_m,
                                                           int64_t min_count) {
  check_at_least("top_m", top_m, 0);
  check_at_least("min_count", min_count, 1);
  Device on(logits);
  const InputMatrix rows = input_matrix(on, logits, "logits");
  const Tensor classes_of = int64_targets(on, targets, rows.rows);
  check_classes(on, classes_of, "targets", 0, rows.cols);
  const int64_t groups = rows.rows / min_count, m = std::min(top_m, pairs_of(groups));
  const Tensor order = empty<int64_t>(on, {rows.rows}), offsets = empty<int64_t>(on, {groups + 1});
  const Tensor classes = empty<int64_t>(on, {groups}), pairs = empty<int64_t>(on, {m, 2});
  const Tensor weights = on.with_element_type(rows.type, [&]<class In>(In) {
    using T = accumulate_t<In>;
    const Tensor result = empty<T>(on, {m});
    plan(on, rows.as<In>(), elements<int64_t>(classes_of), min_count, m, data<int64_t>(order),
         data<int64_t>(offsets), data<int64_t>(classes), data<int64_t>(pairs), data<T>(result));
    return result;
  });
  return {order, offsets, classes, pairs, weights};
}

template <class Device>
Three top_confusions_op(const Tensor& logits, const Tensor& targets, const Tensor& seen,
                        int64_t top) {
  check_at_least("top", top, 0);
  Device on(logits);
  const InputMatrix rows = input_matrix(on, logits, "logits");
  const Tensor classes_of = int64_targets(on, targets, rows.rows);
  check_classes(on, classes_of, "targets", 0, rows.cols);
  const Tensor candidates = input<bool>(on, seen, "seen", {rows.cols});
  const int64_t width = std::clamp<int64_t>(rows.cols - 1, 0, top);
  return on.with_element_type(rows.type, [&]<class In>(In) {
    using T = accumulate_t<In>;
    const Tensor index = empty<int64_t>(on, {rows.rows, width});
    const Tensor weight = empty<T>(on, {rows.rows, width}), own = empty<T>(on, {rows.rows});
    top_confusions(on, rows.as<In>(), elements<int64_t>(classes_of), elements<bool>(candidates),
                   width, data<int64_t>(index), data<T>(weight), data<T>(own));
    return Three(index, weight, own);
  });
}

// The layers of a class bank: `mean` of (classes, dims) each.
template <class T>
struct BankTensors {
  std::vector<Tensor> mean;
  int64_t classes = 0, width = 0;

  BankTensors(const auto& on, const std::vector<Tensor>& mean_of) {
    check(!mean_of.empty(), "mean: expected at least one layer");
    for (const Tensor& m : mean_of) {
      mean.push_back(input<T>(on, m, "mean", {mean.empty() ? -1 : classes, -1}));
      classes = m.size(0);
      width += m.size(1);
    }
  }

  int64_t count() const { return std::ssize(mean); }

  // Another tensor of each layer.
  void check_count(const std::vector<Tensor>& others, const char* name) const {
    check(others.size() == mean.size(), name, ": expected ", mean.size(), " layers, got ",
          others.size());
  }

  // Calls visit(layer, its dims, its first column).
  void for_each_layer(const auto& visit) const {
    int64_t first = 0;
    for (int64_t l = 0; l < count(); first += mean[l++].size(1)) visit(l, mean[l].size(1), first);
  }
};

template <class Device>
Two class_attraction_op(const Tensor& z, const std::vector<Tensor>& mean, const Tensor& var,
                        const Tensor& unit, const Tensor& labels, const Tensor& shares,
                        const Tensor& own, const Tensor& rivals, const Tensor& weight,
                        const Tensor& seen, double push) {
  Device on(z);
  const InputMatrix features = input_matrix(on, z, "z");
  const int64_t batch = features.rows;
  const Tensor mine = input<int64_t>(on, labels, "labels", {batch, -1});
  const Tensor others = input<int64_t>(on, rivals, "rivals", {batch, -1});
  const bool equal_shares = shares.dim() == 2 && shares.size(1) == 0;
  return on.with_element_type(features.type, [&]<class In>(In) {
    using T = accumulate_t<In>;
    const BankTensors<T> bank(on, mean);
    check(features.cols == bank.width, "z: expected the ", bank.width,
          " dimensions of all layers, got ", features.cols);
    const Tensor variances = input<T>(on, var, "var", {bank.width});
    const Tensor units = input<T>(on, unit, "unit", {bank.count()});
    check_below(on, mine, "labels", bank.classes);
    check_below(on, others, "rivals", bank.classes);
    const Tensor parts = input<T>(on, shares, "shares", {batch, equal_shares ? 0 : mine.size(1)});
    const Tensor main_weight = input<T>(on, own, "own", {batch});
    const Tensor weights = input<T>(on, weight, "weight", {batch, others.size(1)});
    const Tensor known = input<bool>(on, seen, "seen", {bank.classes});
    std::vector<Bank<const T>> layers;
    bank.for_each_layer([&](int64_t l, int64_t dims, int64_t first) {
      layers.push_back({elements<T>(bank.mean[l]), nullptr, bank.classes, dims, first});
    });
    const Tensor gradient = empty<T>(on, {batch, bank.width});
    const Tensor numbers = empty<T>(on, {4, bank.count(), batch});
    const int64_t size = bank.count() * batch;
    T* const first = data<T>(numbers);
    class_attraction(
        on, features.as<In>(), layers, elements<T>(variances), elements<T>(units),
        Acting<T>{elements<int64_t>(mine), equal_shares ? nullptr : elements<T>(parts),
                  elements<T>(main_weight), elements<int64_t>(others), elements<T>(weights),
                  elements<bool>(known), mine.size(1), others.size(1), T(push)},
        Attraction<T>{first, first + size, first + 2 * size, first + 3 * size, data<T>(gradient)});
    return Two(gradient, numbers);
  });
}

template <class Device>
Three observe_classes_op(const std::vector<Tensor>& mean, const std::vector<Tensor>& count,
                         const std::vector<Tensor>& var, const std::vector<Tensor>& updates,
                         const Tensor& classes, const Tensor& size, const Tensor& batch_mean,
                         const Tensor& batch_var, double momentum, double floor) {
  Device on(classes);
  return with_float_type(batch_mean, [&]<class T>(T) {
    const BankTensors<T> bank(on, mean);
    bank.check_count(count, "count");
    bank.check_count(var, "var");
    bank.check_count(updates, "updates");
    const Tensor rows = input<int64_t>(on, classes, "classes", {-1});
    check_classes(on, rows, "classes", -1, bank.classes);
    const int64_t groups = rows.size(0);
    const Tensor sizes = input<T>(on, size, "size", {groups});
    const Tensor means_of = input<T>(on, batch_mean, "batch_mean", {groups, bank.width});
    const Tensor vars_of = input<T>(on, batch_var, "batch_var", {groups, bank.width});
    const Tensor weight = empty<T>(on, {bank.count(), groups}), unit = empty<T>(on, {bank.count()});
    const Tensor metric = empty<T>(on, {bank.width});
    std::vector<Tensor> seen;
    std::vector<Observed<T>> layers;
    bank.for_each_layer([&](int64_t l, int64_t dims, int64_t first) {
      seen.push_back(input<T>(on, count[l], "count", {bank.classes}));
      layers.push_back(
          {{elements<T>(bank.mean[l]), elements<T>(seen[l]), bank.classes, dims, first},
           {written<T>(on, var[l], "var", {dims}), written<T>(on, updates[l], "updates", {}),
            data<T>(metric) + first, data<T>(unit) + l}});
    });
    observe_classes(
        on, layers,
        BatchClasses<T>{elements<int64_t>(rows), elements<T>(sizes), elements<T>(means_of),
                        elements<T>(vars_of), groups, bank.width},
        momentum, floor, data<T>(weight));
    return Three(weight, metric, unit);
  });
}

template <class Device>
void follow_classes_op(const std::vector<Tensor>& mean, const std::vector<Tensor>& count,
                       const Tensor& classes, const Tensor& weight, const Tensor& batch_mean,
                       double momentum) {
  Device on(classes);
  with_float_type(batch_mean, [&]<class T>(T) {
    const BankTensors<T> bank(on, mean);
    bank.check_count(count, "count");
    const Tensor rows = input<int64_t>(on, classes, "classes", {-1});
    check_classes(on, rows, "classes", -1, bank.classes);
    const int64_t groups = rows.size(0);
    const Tensor weights = input<T>(on, weight, "weight", {bank.count(), groups});
    const Tensor means_of = input<T>(on, batch_mean, "batch_mean", {groups, bank.width});
    std::vector<Bank<T>> layers;
    bank.for_each_layer([&](int64_t l, int64_t dims, int64_t first) {
      layers.push_back({written<T>(on, mean[l], "mean", {bank.classes, dims}),
                        written<T>(on, count[l], "count", {bank.classes}), bank.classes, dims,
                        first});
    });
    follow_classes(on, layers,
                   BatchClasses<T>{elements<int64_t>(rows), elements<T>(weights),
                                   elements<T>(means_of), nullptr, groups, bank.width},
                   momentum);
  });
}

}  // namespace cwbr
