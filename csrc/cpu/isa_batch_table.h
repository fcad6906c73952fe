// The inner loops of the batch kernels, compiled once per instruction set, as a table of functions.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace cwbr {

// Columns [0, width) of the samples of one group.
template <class In>
struct GroupRows {
  const In* z;  // the first column of sample 0
  int64_t stride, width;
  const int64_t* samples;
  int64_t count;
};

template <class In>
GroupRows<In> group_rows(Matrix<const In> z, Groups groups, int64_t k, int64_t begin,
                         int64_t width) {
  return {z.data + begin, z.stride, width, groups.samples(k), groups.size(k)};
}

template <class T>
struct SoftmaxStatistics {
  T max, sum;
};

// The classes that act on a sample, each a row of the means, and its squared distance to each.
template <class T>
struct ActingRows {
  const int64_t* index;  // (count,)
  const T* coefficient;  // (count,)
  T* distance;           // (count,)
  int64_t count;
};

template <class In>
struct BatchLoops {
  using T = accumulate_t<In>;

  // mean, var (width,): the variance by a second pass, and clamped from below to eps.
  void (*moments)(const GroupRows<In>& rows, T eps, T* mean, T* var);

  // The gradient of z from those of the moments, (width,) each: for every sample
  // (grad_mean + 2 grad_var (z - mean)) / count, without the second term where var is clamped.
  void (*moments_gradient)(const GroupRows<In>& rows, T eps, const T* mean, const T* var,
                           const T* grad_mean, const T* grad_var, In* grad_z, int64_t grad_stride);

  // The largest of n logits and the sum of exp(logit - largest).
  SoftmaxStatistics<T> (*softmax_statistics)(const In* logits, int64_t n);

  // total[j] += softmax(logits)[columns[j]] for j < n.
  void (*add_probabilities)(const In* logits, SoftmaxStatistics<T> statistics,
                            const int64_t* columns, int64_t n, T* total);

  // One row of top_confusions: n logits; index, weight (top,); returns the own probability.
  T (*top_confusions)(const In* logits, int64_t n, int64_t own_class, const bool* seen, int64_t top,
                      int64_t* index, T* weight);

  // One sample of class_attraction at one layer, the variances given as their inverses (dims,):
  // writes gradient (dims,) and the distances, and returns the gradient's squared length.
  T (*class_attraction)(const In* z, const T* mean, const T* inverse_var, int64_t dims,
                        ActingRows<T> acting, T unit, T* gradient);

  // The sum of mean^2 + var over (dims,).
  T (*second_moments)(const T* mean, const T* var, int64_t dims);

  // sum += share (var + (mean - bank_mean)^2), (n,) each.
  void (*add_scatter)(T share, const T* bank_mean, const T* mean, const T* var, int64_t n, T* sum);

  // mean += rate (target - mean), (n,) each.
  void (*move_towards)(T rate, const T* target, int64_t n, T* mean);
};

// The table for the instruction set that isa_name() names.
template <class In>
const BatchLoops<In>& batch_loops();

}  // namespace cwbr
