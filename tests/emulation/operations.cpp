// Every operation on the emulated GPU, behind a C interface for the tests.
//
// Arguments are addresses and sizes as in the operation's own signature; `dtype` is 0 for float64,
// 1 for float32, 2 for float16, 3 for bfloat16. Each function returns how many kernels it launched.
#include "all_pair_distance.cuh"
#include "class_attraction.cuh"
#include "class_moments.cuh"
#include "follow_classes.cuh"
#include "observe_classes.cuh"
#include "plan.cuh"
#include "regularizer.cuh"
#include "top_confusions.cuh"
#include "weighted_overlap.cuh"

using namespace cwbr::cuda;
using emulation::Launcher;

namespace {

int processors = 4;

template <class Run>
int dispatch(int dtype, Run run) {
  Launcher launch(processors);
  switch (dtype) {
    case 0:
      run(launch, double{});
      break;
    case 1:
      run(launch, float{});
      break;
    case 2:
      run(launch, __half{});
      break;
    case 3:
      run(launch, __nv_bfloat16{});
      break;
  }
  return launch.launches;
}

template <class Run>
int dispatch_accumulated(int dtype, Run run) {
  Launcher launch(processors);
  if (dtype == 0)
    run(launch, double{});
  else
    run(launch, float{});
  return launch.launches;
}

template <class T>
T* as(void* address) {
  return static_cast<T*>(address);
}

}  // namespace

extern "C" {

void configure(uint64_t seed, int mutant, int gpu_processors) {
  emulation::seed = seed;
  emulation::uneven = seed % 2 == 1;
  emulation::mutant = mutant;
  emulation::failed = nullptr;
  processors = gpu_processors;
}

const char* failure() { return emulation::failed; }

void* guarded(size_t bytes, emulation::Guarded** owner) {
  *owner = new emulation::Guarded(bytes);
  return (*owner)->data();
}
void release(emulation::Guarded* owner) { delete owner; }

int run_group_by_class(int64_t* targets, int64_t batch, int64_t min_count, int64_t num_classes,
                       int64_t* order, int64_t* offsets, int64_t* classes) {
  Launcher launch(processors);
  group_by_class(launch, targets, batch, min_count, num_classes, order, offsets, classes);
  return launch.launches;
}

int run_class_moments(int dtype, void* z, int64_t dims, int64_t* order, int64_t* offsets,
                      int64_t groups, int64_t batch, double eps, void* mean, void* var) {
  return dispatch(dtype, [&](auto& launch, auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    class_moments(launch, as<const T>(z), dims, Groups{order, offsets, groups, batch}, eps,
                  as<A>(mean), as<A>(var));
  });
}

int run_class_moments_backward(int dtype, void* grad_mean, void* grad_var, void* z, int64_t dims,
                               void* mean, void* var, int64_t* order, int64_t* offsets,
                               int64_t groups, int64_t batch, double eps, void* grad_z) {
  return dispatch(dtype, [&](auto& launch, auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    class_moments_backward(launch, as<const A>(grad_mean), as<const A>(grad_var), as<const T>(z),
                           dims, as<const A>(mean), as<const A>(var),
                           Groups{order, offsets, groups, batch}, eps, as<T>(grad_z));
  });
}

int run_confusion_weights(int dtype, void* logits, int64_t num_classes, int64_t* order,
                          int64_t* offsets, int64_t* classes, int64_t groups, void* alpha) {
  return dispatch(dtype, [&](auto& launch, auto type) {
    using T = decltype(type);
    confusion_weights(launch, as<const T>(logits), num_classes, order, offsets, classes, groups,
                      as<accumulate_t<T>>(alpha));
  });
}

int run_top_pairs(int dtype, void* alpha, int64_t groups, int64_t top_m, int64_t* pairs,
                  void* weights) {
  return dispatch_accumulated(dtype, [&](auto& launch, auto type) {
    using A = decltype(type);
    top_pairs<A>(launch, AlphaWeights<A>{as<const A>(alpha), groups}, top_m, pairs, as<A>(weights));
  });
}

int run_plan(int dtype, void* logits, int64_t num_classes, int64_t* targets, int64_t batch,
             int64_t min_count, int64_t top_m, int64_t* order, int64_t* offsets, int64_t* classes,
             int64_t* pairs, void* weights) {
  return dispatch(dtype, [&](auto& launch, auto type) {
    using T = decltype(type);
    plan(launch, as<const T>(logits), num_classes, targets, batch, min_count, top_m, order, offsets,
         classes, pairs, as<accumulate_t<T>>(weights));
  });
}

int run_pair_distance(int dtype, void* mean, void* var, int64_t groups, int64_t dims,
                      int64_t* pairs, int64_t num_pairs, double eps, void* distance) {
  return dispatch_accumulated(dtype, [&](auto& launch, auto type) {
    using A = decltype(type);
    pair_distance(launch, as<const A>(mean), as<const A>(var), groups, dims, pairs, num_pairs, eps,
                  as<A>(distance));
  });
}

int run_pair_distance_backward(int dtype, void* grad, void* mean, void* var, int64_t groups,
                               int64_t dims, int64_t* pairs, int64_t num_pairs, double eps,
                               void* grad_mean, void* grad_var) {
  return dispatch_accumulated(dtype, [&](auto& launch, auto type) {
    using A = decltype(type);
    pair_distance_backward(launch, as<const A>(grad), as<const A>(mean), as<const A>(var), groups,
                           dims, pairs, num_pairs, eps, as<A>(grad_mean), as<A>(grad_var));
  });
}

int run_all_pair_distance(int dtype, void* mean, void* var, int64_t groups, int64_t dims,
                          double eps, void* distance) {
  return dispatch_accumulated(dtype, [&](auto& launch, auto type) {
    using A = decltype(type);
    all_pair_distance(launch, as<const A>(mean), as<const A>(var), groups, dims, eps,
                      as<A>(distance));
  });
}

int run_all_pair_distance_backward(int dtype, void* grad, void* mean, void* var, int64_t groups,
                                   int64_t dims, double eps, void* grad_mean, void* grad_var) {
  return dispatch_accumulated(dtype, [&](auto& launch, auto type) {
    using A = decltype(type);
    all_pair_distance_backward(launch, as<const A>(grad), as<const A>(mean), as<const A>(var),
                               groups, dims, eps, as<A>(grad_mean), as<A>(grad_var));
  });
}

int run_weighted_overlap(int dtype, void* mean, void* var, void* alpha, int64_t groups,
                         int64_t dims, double eps, int log, void* value) {
  return dispatch_accumulated(dtype, [&](auto& launch, auto type) {
    using A = decltype(type);
    weighted_overlap(launch, as<const A>(mean), as<const A>(var), as<const A>(alpha), groups, dims,
                     eps, log != 0, as<A>(value));
  });
}

int run_weighted_overlap_backward(int dtype, void* grad, void* value, void* mean, void* var,
                                  void* alpha, int64_t groups, int64_t dims, double eps, int log,
                                  void* grad_mean, void* grad_var) {
  return dispatch_accumulated(dtype, [&](auto& launch, auto type) {
    using A = decltype(type);
    weighted_overlap_backward(launch, as<const A>(grad), as<const A>(value), as<const A>(mean),
                              as<const A>(var), as<const A>(alpha), groups, dims, eps, log != 0,
                              as<A>(grad_mean), as<A>(grad_var));
  });
}

int run_weighted_overlap_with_gradient(int dtype, void* grad, void* mean, void* var, void* alpha,
                                       int64_t groups, int64_t dims, double eps, int log,
                                       void* value, void* grad_mean, void* grad_var) {
  return dispatch_accumulated(dtype, [&](auto& launch, auto type) {
    using A = decltype(type);
    weighted_overlap_with_gradient(launch, as<const A>(grad), as<const A>(mean), as<const A>(var),
                                   as<const A>(alpha), groups, dims, eps, log != 0, as<A>(value),
                                   as<A>(grad_mean), as<A>(grad_var));
  });
}

// `features`, `mean` and `var` are arrays of L addresses, `dims` of L sizes.
int run_regularizer(int dtype, void** features, int64_t* dims, int layers, int64_t* order,
                    int64_t* offsets, int64_t groups, int64_t batch, int64_t* pairs,
                    int64_t num_pairs, void* weights, double eps, int log, void* value, void** mean,
                    void** var, void* distance) {
  return dispatch(dtype, [&](auto& launch, auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    std::vector<MomentLayer<T>> moments;
    std::vector<DistanceLayer<A>> distances;
    for (int l = 0; l < layers; ++l) {
      moments.push_back({as<const T>(features[l]), as<A>(mean[l]), as<A>(var[l]), dims[l]});
      distances.push_back({as<A>(mean[l]), as<A>(var[l]), dims[l]});
    }
    const PairSettings<A> settings{pairs,  as<const A>(weights), num_pairs,
                                   groups, static_cast<A>(eps),  log != 0};
    int* ticket = launch.template scratch<int>(1);
    moments_of_layers<T>(launch, moments.data(), layers, Groups{order, offsets, groups, batch},
                         static_cast<A>(eps), ticket);
    distances_of_layers<A>(launch, distances.data(), layers, settings, as<A>(distance), ticket,
                           as<A>(value));
  });
}

int run_regularizer_backward(int dtype, void* grad, void** features, int64_t* dims, int layers,
                             void** mean, void** var, void* distance, int64_t* order,
                             int64_t* offsets, int64_t groups, int64_t batch, int64_t* pairs,
                             int64_t num_pairs, void* weights, double eps, int log, void** grad_z) {
  return dispatch(dtype, [&](auto& launch, auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const PairSettings<A> settings{pairs,  as<const A>(weights), num_pairs,
                                   groups, static_cast<A>(eps),  log != 0};
    A* grad_distance = launch.template scratch<A>(layers * num_pairs);
    const Touching touching = distance_gradients<A>(launch, layers, settings, as<const A>(grad),
                                                    as<const A>(distance), grad_distance);
    std::vector<DistanceGradientLayer<T>> all;
    for (int l = 0; l < layers; ++l)
      all.push_back({{as<const T>(features[l]), as<const A>(mean[l]), as<const A>(var[l]),
                      as<T>(grad_z[l]), dims[l]},
                     grad_distance + l * num_pairs});
    features_backward<T>(launch, all.data(), layers, Groups{order, offsets, groups, batch}, pairs,
                         touching, static_cast<A>(eps));
  });
}

int run_top_confusions(int dtype, void* logits, int64_t batch, int64_t num_classes,
                       int64_t* targets, bool* seen, int64_t top, int64_t* index, void* weight,
                       void* own) {
  return dispatch(dtype, [&](auto& launch, auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    top_confusions(launch, as<const T>(logits), batch, num_classes, targets, seen, top, index,
                   as<A>(weight), as<A>(own));
  });
}

int run_class_attraction(int dtype, void* z, int64_t batch, void* mean, void* var,
                         int64_t num_classes, int64_t dims, int64_t* index, void* coefficient,
                         int64_t count, void* energy, void* gradient) {
  return dispatch(dtype, [&](auto& launch, auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Attraction<A> bank{as<const A>(mean),
                             as<const A>(var),
                             num_classes,
                             dims,
                             index,
                             as<const A>(coefficient),
                             count};
    class_attraction(launch, as<const T>(z), batch, bank, as<A>(energy), as<A>(gradient));
  });
}

int run_observe_classes(int dtype, void* mean, void* count, int64_t num_classes, int64_t dims,
                        void* var, void* updates, int64_t* classes, void* size, void* batch_mean,
                        void* batch_var, int64_t groups, double momentum, double floor,
                        void* weight, void* metric) {
  return dispatch_accumulated(dtype, [&](auto& launch, auto type) {
    using A = decltype(type);
    observe_classes(
        launch, Bank<A>{as<const A>(mean), as<const A>(count), num_classes, dims},
        BatchMoments<A>{classes, as<const A>(size), as<const A>(batch_mean), as<const A>(batch_var),
                        groups},
        Variances<A>{as<A>(var), as<A>(updates), as<A>(metric), A(1 - momentum), A(floor)},
        as<A>(weight));
  });
}

int run_follow_classes(int dtype, void* mean, void* count, int64_t num_classes, int64_t dims,
                       int64_t* classes, void* weight, void* batch_mean, int64_t groups,
                       double momentum) {
  return dispatch_accumulated(dtype, [&](auto& launch, auto type) {
    using A = decltype(type);
    follow_classes(
        launch, as<A>(mean), as<A>(count), num_classes, dims,
        FollowedClasses<A>{classes, as<const A>(weight), as<const A>(batch_mean), groups},
        A(1 - momentum));
  });
}

}  // extern "C"
