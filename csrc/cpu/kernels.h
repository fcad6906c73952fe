// Distances of pairs of diagonal Gaussians, and their gradients, on the CPU; free of torch.
//
// K rows (classes), D dimensions, M pairs. Every pointer is contiguous and row-major; T is float or
// double. `eps` is added to every variance. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace cwbr {

// distance (M,) of the rows named by pairs (M, 2).
template <class T>
void pair_distance(const T* mean, const T* var, const int64_t* pairs, int64_t m, int64_t k,
                   int64_t d, double eps, T* distance);

// Gradients (K, D) for grad (M,); every element is written.
template <class T>
void pair_distance_backward(const T* grad, const T* mean, const T* var, const int64_t* pairs,
                            int64_t m, int64_t k, int64_t d, double eps, T* grad_mean, T* grad_var);

// distance (K, K), symmetric with a zero diagonal.
template <class T>
void all_pair_distance(const T* mean, const T* var, int64_t k, int64_t d, double eps, T* distance);

// Gradients (K, D) for grad (K, K), which need not be symmetric; every element is written.
template <class T>
void all_pair_distance_backward(const T* grad, const T* mean, const T* var, int64_t k, int64_t d,
                                double eps, T* grad_mean, T* grad_var);

// sum(alpha exp(-D)) / max(sum(alpha), eps) over all pairs i < j, or with `log` the logarithm of
// sum(alpha exp(-D)) / sum(alpha); 0 where alpha (K, K) sums to 0.
template <class T>
T weighted_overlap(const T* mean, const T* var, const T* alpha, int64_t k, int64_t d, double eps,
                   bool log);

// The same value, and its gradients (K, D) times `grad`; every element is written.
template <class T>
T weighted_overlap_with_gradient(T grad, const T* mean, const T* var, const T* alpha, int64_t k,
                                 int64_t d, double eps, bool log, T* grad_mean, T* grad_var);

// The instruction set in use, "avx512", "avx2" or "portable": the best this processor has, or the
// one named by the environment variable CWBR_CPU_ISA. Throws std::invalid_argument where that names
// an unknown or unsupported one.
const char* isa_name();

}  // namespace cwbr
