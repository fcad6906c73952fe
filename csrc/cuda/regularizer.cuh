// regularizer and its gradient: two launches each for all layers together.
//
// Forward: the moments of every layer; then the distance of every pair of every layer, after which
// the last block to finish sums the overlaps. Backward: the gradient of every distance, and for
// each class the list of pairs that touch it; then each class walks its pairs and spreads the
// result over its samples.
#pragma once

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

// The layers of one launch: they agree in the dtype of z.
template <class T>
void moments_of_layers(auto& launch, const MomentLayer<T>* layer, int count, Groups groups,
                       accumulate_t<T> eps, int* ticket) {
  for (int first = 0; first < count; first += kMaxLayers) {
    Layers<MomentLayer<T>> layers{};
    int64_t slices = 0;
    for (int k = first; k < count && k < first + kMaxLayers; ++k)
      add_layer<T>(layers, slices, layer[k]);
    const int64_t grid = slices * groups.count;
    launch(class_moments_kernel<T>, grid > 0 ? grid : 1, kColumnThreads, 0, layers, groups, eps,
           ticket);
  }
}

template <class A>
void distances_of_layers(auto& launch, const DistanceLayer<A>* layer, int count,
                         PairSettings<A> settings, A* distance, int* ticket, A* value) {
  for (int first = 0; first < count; first += kMaxLayers) {
    Layers<DistanceLayer<A>> layers{};
    for (int k = first; k < count && k < first + kMaxLayers; ++k)
      layers.layer[layers.count++] = layer[k];
    const int64_t grid = layers.count * settings.count;
    if (grid == 0 && first > 0) break;  // without pairs one block writes the value
    launch(layer_distances_kernel<A>, grid > 0 ? grid : 1, kColumnThreads,
           sizeof(RegularizerShared<A>), layers, first, count, settings, distance, ticket, value);
  }
}

// dL/dD of all layers (L, M), and the pairs that touch each group.
template <class A>
Touching distance_gradients(auto& launch, int layers, PairSettings<A> settings, const A* grad,
                            const A* distance, A* grad_distance) {
  const Touching touching{launch.template scratch<int>(settings.groups + 1),
                          launch.template scratch<int>(2 * settings.count)};
  launch(distance_gradients_kernel<A>, settings.groups + 1 + layers, kColumnThreads,
         sizeof(RegularizerShared<A>), settings, touching, grad, distance, layers, grad_distance);
  return touching;
}

template <class T>
void features_backward(auto& launch, const DistanceGradientLayer<T>* layer, int count,
                       Groups groups, const int64_t* pairs, Touching touching,
                       accumulate_t<T> eps) {
  for (int first = 0; first < count; first += kMaxLayers) {
    Layers<DistanceGradientLayer<T>> layers{};
    int64_t slices = 0;
    for (int k = first; k < count && k < first + kMaxLayers; ++k)
      add_layer<T>(layers, slices, layer[k]);
    launch(regularizer_backward_kernel<T>, slices * (groups.count > 0 ? groups.count : 1),
           kColumnThreads, 0, layers, groups, pairs, touching, eps);
  }
}

}  // namespace cwbr::cuda
