// The operations on pairs of classes, on any Device; see operations.h.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "tensors.h"

#ifdef CWBR_CUDA
#include "all_pair_distance.cuh"
#include "pair_distance.cuh"
#include "regularizer.cuh"
#include "weighted_overlap.cuh"
#endif

// What registers the operations goes through this list.
#define CWBR_FOR_EACH_PAIR_OPERATION(use)                                                  \
  use(pair_distance) use(pair_distance_backward) use(all_pair_distance)                    \
      use(all_pair_distance_backward) use(weighted_overlap) use(weighted_overlap_backward) \
          use(weighted_overlap_with_gradient) use(regularizer) use(regularizer_backward)

namespace cwbr {

template <class Device>
Tensor pair_distance_op(const Tensor& mean, const Tensor& var, const Tensor& pairs, double eps) {
  Device on(mean);
  return with_moments(on, mean, var, [&]<class T>(const MomentTensors<T>& of) {
    const PairTensor index(on, pairs, of.rows());
    const Tensor distance = empty<T>(on, {index.count()});
    pair_distance(on, of.moments(), index.pairs(), eps, data<T>(distance));
    return distance;
  });
}

template <class Device>
Two pair_distance_backward_op(const Tensor& grad, const Tensor& mean, const Tensor& var,
                              const Tensor& pairs, double eps) {
  Device on(mean);
  return with_moments(on, mean, var, [&]<class T>(const MomentTensors<T>& of) {
    const PairTensor index(on, pairs, of.rows());
    const Tensor g = input<T>(on, grad, "grad", {index.count()});
    const auto [grad_mean, grad_var] = of.empty_gradients(on);
    pair_distance_backward(on, elements<T>(g), of.moments(), index.pairs(), eps, data<T>(grad_mean),
                           data<T>(grad_var));
    return Two(grad_mean, grad_var);
  });
}

template <class Device>
Tensor all_pair_distance_op(const Tensor& mean, const Tensor& var, double eps) {
  Device on(mean);
  return with_moments(on, mean, var, [&]<class T>(const MomentTensors<T>& of) {
    const Tensor distance = empty<T>(on, {of.rows(), of.rows()});
    all_pair_distance(on, of.moments(), eps, data<T>(distance));
    return distance;
  });
}

template <class Device>
Two all_pair_distance_backward_op(const Tensor& grad, const Tensor& mean, const Tensor& var,
                                  double eps) {
  Device on(mean);
  return with_moments(on, mean, var, [&]<class T>(const MomentTensors<T>& of) {
    const Tensor g = input<T>(on, grad, "grad", {of.rows(), of.rows()});
    const auto [grad_mean, grad_var] = of.empty_gradients(on);
    all_pair_distance_backward(on, elements<T>(g), of.moments(), eps, data<T>(grad_mean),
                               data<T>(grad_var));
    return Two(grad_mean, grad_var);
  });
}

template <class Device>
Tensor weighted_overlap_op(const Tensor& mean, const Tensor& var, const Tensor& alpha, double eps,
                           bool log) {
  Device on(mean);
  return with_moments(on, mean, var, [&]<class T>(const MomentTensors<T>& of) {
    const Tensor weights = input<T>(on, alpha, "alpha", {of.rows(), of.rows()});
    const Tensor value = empty<T>(on, {});
    weighted_overlap(on, of.moments(), elements<T>(weights), eps, log, data<T>(value));
    return value;
  });
}

template <class Device>
Two weighted_overlap_backward_op(const Tensor& grad, const Tensor& value, const Tensor& mean,
                                 const Tensor& var, const Tensor& alpha, double eps, bool log) {
  Device on(mean);
  return with_moments(on, mean, var, [&]<class T>(const MomentTensors<T>& of) {
    const Tensor weights = input<T>(on, alpha, "alpha", {of.rows(), of.rows()});
    const Tensor g = input<T>(on, grad, "grad", {}), v = input<T>(on, value, "value", {});
    const auto [grad_mean, grad_var] = of.empty_gradients(on);
    weighted_overlap_backward(on, elements<T>(g), elements<T>(v), of.moments(),
                              elements<T>(weights), eps, log, data<T>(grad_mean),
                              data<T>(grad_var));
    return Two(grad_mean, grad_var);
  });
}

template <class Device>
Three weighted_overlap_with_gradient_op(const Tensor& grad, const Tensor& mean, const Tensor& var,
                                        const Tensor& alpha, double eps, bool log) {
  Device on(mean);
  return with_moments(on, mean, var, [&]<class T>(const MomentTensors<T>& of) {
    const Tensor weights = input<T>(on, alpha, "alpha", {of.rows(), of.rows()});
    const Tensor g = input<T>(on, grad, "grad", {}), value = empty<T>(on, {});
    const auto [grad_mean, grad_var] = of.empty_gradients(on);
    weighted_overlap_with_gradient(on, elements<T>(g), of.moments(), elements<T>(weights), eps, log,
                                   data<T>(value), data<T>(grad_mean), data<T>(grad_var));
    return Three(value, grad_mean, grad_var);
  });
}

// What regularizer and its backward share. Layers may differ in dtype, as long as all accumulate in
// T.

template <class T>
struct LayerTensors {
  std::vector<InputMatrix> features;
  GroupTensors groups;
  PairTensor index;
  Tensor weights;

  LayerTensors(const auto& on, const std::vector<Tensor>& features_of, const Tensor& order,
               const Tensor& offsets, const Tensor& pairs, const Tensor& weights_of)
      : features(matrices(on, features_of)),
        groups(on, order, offsets, features[0].rows),
        index(on, pairs, groups.count()),
        weights(input<T>(on, weights_of, "weights", {index.count()})) {}

  static std::vector<InputMatrix> matrices(const auto& on, const std::vector<Tensor>& features) {
    check(!features.empty(), "features: expected at least one layer");
    std::vector<InputMatrix> result;
    for (const Tensor& z : features) {
      result.push_back(input_matrix(on, z, "features"));
      check(z.size(0) == features[0].size(0), "features: expected one batch size, got ",
            features[0].size(0), " and ", z.size(0));
      check((z.scalar_type() == ScalarType::Double) == std::is_same_v<T, double>,
            "features: expected layers that accumulate in the dtype of weights, ",
            name_of(scalar_type_of<T>), ", got ", name_of(z.scalar_type()));
    }
    return result;
  }

  int64_t count() const { return features.size(); }
  WeightedPairs<T> pairs() const { return {{index.pairs()}, elements<T>(weights)}; }

  // A tensor (groups, dims) for each layer, where the device keeps moments.
  template <class Device>
  std::vector<Tensor> empty_moments(const Device& on) const {
    std::vector<Tensor> result;
    for (size_t l = 0; Device::kKeepsMoments && l < features.size(); ++l)
      result.push_back(empty<T>(on, {groups.count(), features[l].cols}));
    return result;
  }
  template <class Device>
  std::vector<Tensor> kept_moments(const Device& on, const std::vector<Tensor>& moments,
                                   const char* name) const {
    const size_t expected = Device::kKeepsMoments ? features.size() : 0;
    check(moments.size() == expected, name, ": expected ", expected, " tensors, got ",
          moments.size());
    std::vector<Tensor> result;
    for (size_t l = 0; l < expected; ++l)
      result.push_back(input<T>(on, moments[l], name, {groups.count(), features[l].cols}));
    return result;
  }

  // `grads`: what the backward pass writes.
  std::vector<Layer<T>> layers(const std::vector<Tensor>& mean, const std::vector<Tensor>& var,
                               const std::vector<Tensor>& grads = {}) const {
    const auto at = [](const std::vector<Tensor>& tensors, size_t l) {
      return tensors.empty() ? nullptr : tensors[l].mutable_data_ptr();
    };
    std::vector<Layer<T>> result;
    for (size_t l = 0; l < features.size(); ++l) {
      const InputMatrix& z = features[l];
      result.push_back({z.type, z.tensor.const_data_ptr(), z.stride, z.cols,
                        static_cast<T*>(at(mean, l)), static_cast<T*>(at(var, l)), at(grads, l)});
    }
    return result;
  }
};

template <class Device>
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor> regularizer_op(
    const std::vector<Tensor>& features, const Tensor& order, const Tensor& offsets,
    const Tensor& pairs, const Tensor& weights, double eps, bool log) {
  Device on(weights);
  return with_float_type(weights, [&]<class T>(T) {
    const LayerTensors<T> all(on, features, order, offsets, pairs, weights);
    const std::vector<Tensor> mean = all.empty_moments(on), var = all.empty_moments(on);
    const Tensor distance = empty<T>(on, {all.count(), all.index.count()});
    const Tensor value = empty<T>(on, {});
    regularizer(on, all.layers(mean, var), all.groups.groups(), all.pairs(), eps, log,
                data<T>(distance), data<T>(value));
    return std::make_tuple(value, mean, var, distance);
  });
}

template <class Device>
std::vector<Tensor> regularizer_backward_op(const Tensor& grad, const std::vector<Tensor>& features,
                                            const std::vector<Tensor>& mean,
                                            const std::vector<Tensor>& var, const Tensor& distance,
                                            const Tensor& order, const Tensor& offsets,
                                            const Tensor& pairs, const Tensor& weights, double eps,
                                            bool log) {
  Device on(weights);
  return with_float_type(weights, [&]<class T>(T) {
    const LayerTensors<T> all(on, features, order, offsets, pairs, weights);
    const std::vector<Tensor> means = all.kept_moments(on, mean, "mean");
    const std::vector<Tensor> vars = all.kept_moments(on, var, "var");
    std::vector<Tensor> grads;
    for (const InputMatrix& z : all.features)
      grads.push_back(on.empty(z.tensor.scalar_type(), {z.rows, z.cols}));
    const Tensor g = input<T>(on, grad, "grad", {});
    const Tensor d = input<T>(on, distance, "distance", {all.count(), all.index.count()});
    regularizer_backward(on, elements<T>(g), all.layers(means, vars, grads), all.groups.groups(),
                         all.pairs(), eps, log, elements<T>(d));
    return grads;
  });
}

}  // namespace cwbr
