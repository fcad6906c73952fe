// The CPU's kernel of each operation, free of torch: it computes what the function of its name in
// cwbr_fused's references does, bit for bit the same on any number of threads. Results are
// contiguous; every element of a gradient is written. The first parameter says where a kernel runs,
// as on a GPU the launcher does.
#pragma once

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace cwbr {

struct Cpu {};

// Half precision is converted by bits, so that neither torch nor a hardware instruction is needed.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Calls f(In()) with the element type that `type` names, of those that accumulate in T.
template <class T>
auto with_element_type_of(ElementType type, const auto& f) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return f(double());
  } else if (type == ElementType::kHalf) {
    return f(Half());
  } else if (type == ElementType::kBFloat16) {
    return f(BFloat16());
  } else {
    return f(float());
  }
}

// For explicit instantiation: each input type with its accumulation type.
#define CWBR_FOR_EACH_INPUT(instantiate)                                         \
  instantiate(float, float) instantiate(double, double) instantiate(Half, float) \
      instantiate(BFloat16, float)

// Returns how many groups are in use. order: (batch), offsets: (groups + 1), classes: (groups)
// with groups = batch / min_count.
int64_t group_by_class(Cpu, const int64_t* targets, int64_t batch, int64_t min_count,
                       int64_t* order, int64_t* offsets, int64_t* classes);

// mean, var: (groups, z.cols).
template <class In, class T>
void class_moments(Cpu, Matrix<const In> z, Groups groups, double eps, T* mean, T* var);

// All but z of (groups, z.cols); grad_z of (z.rows, z.cols).
template <class In, class T>
void class_moments_backward(Cpu, const T* grad_mean, const T* grad_var, Matrix<const In> z,
                            const T* mean, const T* var, Groups groups, double eps, In* grad_z);

// alpha: (groups, groups). classes: (groups), negative for the groups to leave out.
template <class In, class T>
void confusion_weights(Cpu, Matrix<const In> logits, Groups groups, const int64_t* classes,
                       T* alpha);

// alpha: (used, used), the leading block of a (groups, groups) matrix that is zero elsewhere.
// pairs: (m, 2), weights: (m) with m <= groups (groups - 1) / 2.
template <class T>
void top_pairs_of_used(const T* alpha, int64_t used, int64_t groups, int64_t m, int64_t* pairs,
                       T* weights);
template <class T>
void top_pairs(Cpu, const T* alpha, int64_t groups, int64_t m, int64_t* pairs, T* weights) {
  top_pairs_of_used(alpha, groups, groups, m, pairs, weights);
}

// group_by_class, confusion_weights and top_pairs in one. targets: in [0, logits.cols).
template <class In, class T>
void plan(Cpu, Matrix<const In> logits, const int64_t* targets, int64_t min_count, int64_t m,
          int64_t* order, int64_t* offsets, int64_t* classes, int64_t* pairs, T* weights);

// distance: (pairs.count). `eps` is added to every variance.
template <class T>
void pair_distance(Cpu, Moments<T> of, Pairs pairs, double eps, T* distance);

// grad: (pairs.count). grad_mean, grad_var: (rows, dims), here as below.
template <class T>
void pair_distance_backward(Cpu, const T* grad, Moments<T> of, Pairs pairs, double eps,
                            T* grad_mean, T* grad_var);

// distance: (rows, rows), symmetric with a zero diagonal.
template <class T>
void all_pair_distance(Cpu, Moments<T> of, double eps, T* distance);

// grad: (rows, rows), which need not be symmetric.
template <class T>
void all_pair_distance_backward(Cpu, const T* grad, Moments<T> of, double eps, T* grad_mean,
                                T* grad_var);

// alpha: (rows, rows).
template <class T>
void weighted_overlap(Cpu, Moments<T> of, const T* alpha, double eps, bool log, T* value);
template <class T>
void weighted_overlap_with_gradient(Cpu, const T* grad, Moments<T> of, const T* alpha, double eps,
                                    bool log, T* value, T* grad_mean, T* grad_var);
// The value is computed again.
template <class T>
void weighted_overlap_backward(Cpu cpu, const T* grad, const T*, Moments<T> of, const T* alpha,
                               double eps, bool log, T* grad_mean, T* grad_var) {
  T value;
  weighted_overlap_with_gradient(cpu, grad, of, alpha, eps, log, &value, grad_mean, grad_var);
}

// No moments pass from forward to backward. distance: (layers, pairs), zero for pairs of weight
// zero.
template <class T>
void regularizer(Cpu, const std::vector<Layer<T>>& layers, Groups groups, WeightedPairs<T> pairs,
                 double eps, bool log, T* distance, T* value);
template <class T>
void regularizer_backward(Cpu, const T* grad, const std::vector<Layer<T>>& layers, Groups groups,
                          WeightedPairs<T> pairs, double eps, bool log, const T* distance);

// targets: (logits.rows), in [0, logits.cols). seen: (logits.cols). index, weight: (logits.rows,
// top) with top < logits.cols, or 0. own: (logits.rows).
template <class In, class T>
void top_confusions(Cpu, Matrix<const In> logits, const int64_t* targets, const bool* seen,
                    int64_t top, int64_t* index, T* weight, T* own);

// var: (z.cols). unit: (layers).
template <class In, class T>
void class_attraction(Cpu, Matrix<const In> z, const std::vector<Bank<const T>>& layers,
                      const T* var, const T* unit, Acting<T> acting, Attraction<T> result);

// weight: (layers, batch.count).
template <class T>
void observe_classes(Cpu, const std::vector<Observed<T>>& layers, BatchClasses<T> batch,
                     double momentum, double floor, T* weight);

// Writes the bank.
template <class T>
void follow_classes(Cpu, const std::vector<Bank<T>>& layers, BatchClasses<T> batch,
                    double momentum);

// The instruction set in use, "avx512", "avx2" or "portable": the best this processor has, or the
// one named by the environment variable CWBR_CPU_ISA. Throws std::invalid_argument where that names
// an unknown or unsupported one.
const char* isa_name();

}  // namespace cwbr
