// regularizer and its gradient: two launches each for all layers together.
//
// Forward: the moments of every layer; then the distance of every pair of every layer, after which
// the last block to finish sums the overlaps. Backward: the gradient of every distance, and for
// each class the list of pairs that touch it; then each class walks its pairs and spreads the
// result over its samples.
#pragma once

#include <span>
#include <vector>

#include "class_moments.cuh"
#include "overlap.cuh"
#include "pair_distance.cuh"

namespace cwbr::cuda {

template <class A>
struct DistanceLayer {
  const A* mean;  // (K, dims)
  const A* var;
  int64_t dims;
};

template <class A>
struct PairSettings {
  const int64_t* pairs;  // (M, 2)
  const A* weights;      // (M,)
  int64_t count;         // M
  int64_t groups;        // K
  A eps;
  bool log;
};

template <class A>
struct RegularizerShared {
  A scratch[kMaxWarps];
  int last;
};

// The overlap of one layer from its distances.
template <class A>
__device__ OverlapPart<A> layer_overlap(const PairSettings<A>& settings, const A* distance,
                                        A (&scratch)[kMaxWarps]) {
  return overlap_sum<A>(settings.log, scratch, [&](auto visit) {
    for (int64_t m = threadIdx.x; m < settings.count; m += blockDim.x)
      visit_pair(settings.log, settings.weights[m], distance[m], visit);
  });
}

// One block per layer and pair; the last of all layers writes the value.
template <class A>
__global__ void __launch_bounds__(kColumnThreads, 1)
    layer_distances_kernel(const __grid_constant__ Layers<DistanceLayer<A>> layers, int first_layer,
                           int total_layers, PairSettings<A> settings, A* distance, int* ticket,
                           A* value) {
  RegularizerShared<A>& shared = shared_memory<RegularizerShared<A>>();
  if (settings.count > 0) {
    const int64_t layer = blockIdx.x / settings.count, m = blockIdx.x % settings.count;
    const DistanceLayer<A>& at = layers.layer[layer];
    const A sum = distance_of_pair(at.mean, at.var, settings.groups, at.dims,
                                   settings.pairs + 2 * m, settings.eps, shared.scratch);
    if (threadIdx.x == 0) distance[(first_layer + layer) * settings.count + m] = sum;
  }
  const int64_t blocks = settings.count > 0 ? total_layers * settings.count : 1;
  if (!arrives_last(ticket, blocks, shared.last)) return;
  const A total = sum_of(settings.weights, settings.count, shared.scratch);
  A sum = 0;
  for (int layer = 0; layer < total_layers; ++layer)
    sum += overlap_value(layer_overlap(settings, distance + layer * settings.count, shared.scratch),
                         total, settings.eps, settings.log);
  if (threadIdx.x == 0) *value = sum / total_layers;
}

// The first blocks find the pairs that touch each group, one more block per layer the gradient of
// its distances.
template <class A>
__global__ void __launch_bounds__(kColumnThreads, 1)
    distance_gradients_kernel(PairSettings<A> settings, Touching touching, const A* grad,
                              const A* distance, int total_layers, A* grad_distance) {
  RegularizerShared<A>& shared = shared_memory<RegularizerShared<A>>();
  const int64_t layer = static_cast<int64_t>(blockIdx.x) - (settings.groups + 1);
  if (layer < 0) {
    find_touching(blockIdx.x, settings.groups, settings.pairs, static_cast<int>(settings.count),
                  touching, shared_memory<ScanShared>().scratch);
    return;
  }
  distance += layer * settings.count;
  grad_distance += layer * settings.count;
  const A total = sum_of(settings.weights, settings.count, shared.scratch);
  const OverlapPart<A> all = layer_overlap(settings, distance, shared.scratch);
  const A value = overlap_value(all, total, settings.eps, settings.log);
  for (int64_t m = threadIdx.x; m < settings.count; m += blockDim.x)
    grad_distance[m] = overlap_gradient(settings.log, *grad / total_layers, settings.weights[m],
                                        distance[m], value, total, settings.eps);
}

template <class T>
struct DistanceGradientLayer : GradientLayer<T> {
  const accumulate_t<T>* grad_distance;  // (M,)
};

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1)
    regularizer_backward_kernel(const __grid_constant__ Layers<DistanceGradientLayer<T>> layers,
                                Groups groups, const int64_t* pairs, Touching touching,
                                accumulate_t<T> eps) {
  moments_backward<T>(
      layers, groups, eps,
      [&](const DistanceGradientLayer<T>& layer, int64_t group, int64_t column, auto& grad_mean,
          auto& grad_var) {
        walk_pairs(PairGradients<accumulate_t<T>>{layer.grad_distance, pairs, touching}, layer.mean,
                   layer.var, layer.dims, group, column, eps, grad_mean, grad_var);
      });
}

// Calls run(T(), first, last) for each run of layers that one launch takes: they agree in the dtype
// T of z.
template <class A>
void for_launches(const std::vector<Layer<A>>& layers, const auto& run) {
  for (size_t first = 0, last; first < layers.size(); first = last) {
    const ElementType type = layers[first].type;
    for (last = first; last < layers.size() && layers[last].type == type; ++last)
      if (last - first == kMaxLayers) break;
    with_element_type_of<A>(type, [&](auto element) { run(element, first, last); });
  }
}

template <class A>
PairSettings<A> settings_of(Groups groups, WeightedPairs<A> pairs, double eps, bool log) {
  return {pairs.index, pairs.weights, pairs.count, groups.count, A(eps), log};
}

// Writes the moments of every layer, distance (L, M) and value.
template <class A, class Launcher>
void regularizer(Launcher& launch, const std::vector<Layer<A>>& layers, Groups groups,
                 WeightedPairs<A> pairs, double eps, bool log, A* distance, A* value) {
  int* ticket = launch.template scratch<int>(1);
  for_launches(layers, [&]<class T>(T, size_t first, size_t last) {
    Layers<MomentLayer<T>> some{};
    int64_t slices = 0;
    for (const Layer<A>& layer : std::span(layers).subspan(first, last - first))
      add_layer<T>(some, slices,
                   {static_cast<const T*>(layer.z), layer.mean, layer.var, layer.dims});
    const int64_t grid = slices * groups.count;
    launch(class_moments_kernel<T>, grid > 0 ? grid : 1, kColumnThreads, 0, some, groups, A(eps),
           ticket);
  });
  const int total = static_cast<int>(layers.size());
  for (int first = 0; first < total; first += kMaxLayers) {
    Layers<DistanceLayer<A>> some{};
    for (int l = first; l < total && some.count < kMaxLayers; ++l)
      some.layer[some.count++] = {layers[l].mean, layers[l].var, layers[l].dims};
    const int64_t grid = some.count * pairs.count;
    if (grid == 0 && first > 0) break;  // without pairs one block writes the value
    launch(layer_distances_kernel<A>, grid > 0 ? grid : 1, kColumnThreads,
           sizeof(RegularizerShared<A>), some, first, total, settings_of(groups, pairs, eps, log),
           distance, ticket, value);
  }
}

// Writes the gradient of every layer.
template <class A, class Launcher>
void regularizer_backward(Launcher& launch, const A* grad, const std::vector<Layer<A>>& layers,
                          Groups groups, WeightedPairs<A> pairs, double eps, bool log,
                          const A* distance) {
  const int total = static_cast<int>(layers.size());
  A* grad_distance = launch.template scratch<A>(total * pairs.count);
  const Touching touching = new_touching(launch, groups.count, pairs.count);
  launch(distance_gradients_kernel<A>, groups.count + 1 + total, kColumnThreads,
         sizeof(RegularizerShared<A>), settings_of(groups, pairs, eps, log), touching, grad,
         distance, total, grad_distance);
  for_launches(layers, [&]<class T>(T, size_t first, size_t last) {
    Layers<DistanceGradientLayer<T>> some{};
    int64_t slices = 0;
    for (size_t l = first; l < last; ++l)
      add_layer<T>(some, slices,
                   {{static_cast<const T*>(layers[l].z), layers[l].mean, layers[l].var,
                     static_cast<T*>(layers[l].grad), layers[l].dims},
                    grad_distance + l * pairs.count});
    launch(regularizer_backward_kernel<T>, slices * (groups.count > 0 ? groups.count : 1),
           kColumnThreads, 0, some, groups, pairs.index, touching, A(eps));
  });
}

}  // namespace cwbr::cuda
