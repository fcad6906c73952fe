#include <tuple>

#include "groups.h"
#include "regularizer.cuh"

namespace cwbr::cuda {
namespace {

// The arguments that regularizer and its backward share. Layers may differ in dtype, as long as all
// accumulate in A.
template <class A>
struct RegularizerTensors {
  std::vector<Tensor> features, mean, var;
  GroupTensors groups;
  Tensor index, weights;

  RegularizerTensors(const Launcher& launch, const std::vector<Tensor>& features_of,
                     const Tensor& order, const Tensor& offsets, const Tensor& pairs,
                     const Tensor& weights_of)
      : features(matrices(launch, features_of)),
        groups(launch, order, offsets, features[0].size(0)),
        index(launch.input<int64_t, 2>(pairs, "pairs", {-1, 2})),
        weights(launch.input<A, 1>(weights_of, "weights", {index.size(0)})) {}

  static std::vector<Tensor> matrices(const Launcher& launch, const std::vector<Tensor>& features) {
    check(!features.empty(), "features: expected at least one layer");
    std::vector<Tensor> result;
    for (const Tensor& z : features) {
      result.push_back(launch.matrix(z, "features"));
      check(z.size(0) == features[0].size(0), "features: expected one batch size, got ",
            features[0].size(0), " and ", z.size(0));
      check((z.scalar_type() == ScalarType::Double) == std::is_same_v<A, double>,
            "features: expected layers that accumulate in the dtype of weights, ",
            name_of(scalar_type_of<A>), ", got ", name_of(z.scalar_type()));
    }
    return result;
  }

  int layers() const { return static_cast<int>(features.size()); }
  int64_t dims(int layer) const { return features[layer].size(1); }
  PairSettings<A> settings(double eps, bool log) const {
    return {elements<int64_t>(index), elements<A>(weights), index.size(0),
            groups.count(),           static_cast<A>(eps),  log};
  }

  // Calls run(T(), first, count) for each run of layers of one dtype T.
  template <class Run>
  void for_dtypes(Run run) const {
    for (int first = 0, next; first < layers(); first = next) {
      const ScalarType dtype = features[first].scalar_type();
      for (next = first; next < layers() && features[next].scalar_type() == dtype;) ++next;
      with_element_type(features[first], "features", [&](auto type) {
        if constexpr (std::is_same_v<accumulate_t<decltype(type)>, A>)
          run(type, first, next - first);
      });
    }
  }
};

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor> regularizer_op(
    const std::vector<Tensor>& features, const Tensor& order, const Tensor& offsets,
    const Tensor& pairs, const Tensor& weights, double eps, bool log) {
  Launcher launch(weights);
  return with_accumulated_type(weights, [&](auto accumulated) {
    using A = decltype(accumulated);
    RegularizerTensors<A> all(launch, features, order, offsets, pairs, weights);
    std::vector<DistanceLayer<A>> distances;
    for (int l = 0; l < all.layers(); ++l) {
      all.mean.push_back(launch.empty<A>({all.groups.count(), all.dims(l)}));
      all.var.push_back(launch.empty<A>({all.groups.count(), all.dims(l)}));
      distances.push_back({elements<A>(all.mean[l]), elements<A>(all.var[l]), all.dims(l)});
    }
    const Tensor distance = launch.empty<A>({all.layers(), all.index.size(0)});
    const Tensor value = launch.empty<A>({});
    int* ticket = launch.scratch<int>(1);
    all.for_dtypes([&](auto type, int first, int count) {
      using T = decltype(type);
      std::vector<MomentLayer<T>> layers;
      for (int l = first; l < first + count; ++l)
        layers.push_back(
            {elements<T>(all.features[l]), data<A>(all.mean[l]), data<A>(all.var[l]), all.dims(l)});
      moments_of_layers<T>(launch, layers.data(), count, all.groups.pointers(), eps, ticket);
    });
    distances_of_layers<A>(launch, distances.data(), all.layers(), all.settings(eps, log),
                           data<A>(distance), ticket, data<A>(value));
    return std::make_tuple(value, all.mean, all.var, distance);
  });
}

std::vector<Tensor> regularizer_backward_op(const Tensor& grad, const std::vector<Tensor>& features,
                                            const std::vector<Tensor>& mean,
                                            const std::vector<Tensor>& var, const Tensor& distance,
                                            const Tensor& order, const Tensor& offsets,
                                            const Tensor& pairs, const Tensor& weights, double eps,
                                            bool log) {
  Launcher launch(weights);
  return with_accumulated_type(weights, [&](auto accumulated) {
    using A = decltype(accumulated);
    RegularizerTensors<A> all(launch, features, order, offsets, pairs, weights);
    check(mean.size() == features.size(), "mean: expected one per layer, got ", mean.size());
    check(var.size() == features.size(), "var: expected one per layer, got ", var.size());
    const int64_t num_pairs = all.index.size(0);
    std::vector<Tensor> grads;
    for (int l = 0; l < all.layers(); ++l) {
      const std::array<int64_t, 2> sizes{all.groups.count(), all.dims(l)};
      all.mean.push_back(launch.input<A>(mean[l], "mean", sizes));
      all.var.push_back(launch.input<A>(var[l], "var", sizes));
      grads.push_back(launch.empty(features[l].scalar_type(), {features[l].size(0), all.dims(l)}));
    }
    const Tensor g = launch.input<A, 0>(grad, "grad", {});
    const Tensor distances = launch.input<A, 2>(distance, "distance", {all.layers(), num_pairs});
    A* grad_distance = launch.scratch<A>(all.layers() * num_pairs);
    const Touching touching =
        distance_gradients<A>(launch, all.layers(), all.settings(eps, log), elements<A>(g),
                              elements<A>(distances), grad_distance);
    all.for_dtypes([&](auto type, int first, int count) {
      using T = decltype(type);
      std::vector<DistanceGradientLayer<T>> layers;
      for (int l = first; l < first + count; ++l)
        layers.push_back({{elements<T>(all.features[l]), elements<A>(all.mean[l]),
                           elements<A>(all.var[l]), new_elements<T>(grads[l]), all.dims(l)},
                          grad_distance + l * num_pairs});
      features_backward<T>(launch, layers.data(), count, all.groups.pointers(),
                           elements<int64_t>(all.index), touching, eps);
    });
    return grads;
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("regularizer", TORCH_BOX(&cwbr::cuda::regularizer_op));
  m.impl("regularizer_backward", TORCH_BOX(&cwbr::cuda::regularizer_backward_op));
}
