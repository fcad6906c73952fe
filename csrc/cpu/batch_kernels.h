// The kernels that work on a batch: groups, moments, confusion weights, pairs, the fused
// regularizer, and the class bank. Free of torch. Each function computes what the function of its
// name in cwbr_fused/reference.py, reference_backward.py or reference_bank.py does, bit for bit the
// same on any number of threads. T is the accumulation type, In the type of the input; matrices are
// row-major.
#pragma once

#include <cstdint>

#include "cpu/input_types.h"

namespace cwbr {

template <class In>
struct Matrix {
  In* data;
  int64_t rows, cols;
  int64_t stride;  // between rows, in elements
};

// Group k holds the samples order[offsets[k]], ..., order[offsets[k + 1] - 1].
struct Groups {
  const int64_t* order;
  const int64_t* offsets;
  int64_t count;

  const int64_t* samples(int64_t k) const { return order + offsets[k]; }
  int64_t size(int64_t k) const { return offsets[k + 1] - offsets[k]; }
};

// Returns how many groups are in use. order: (batch), offsets: (groups + 1), classes: (groups)
// with groups = batch / min_count.
int64_t group_by_class(const int64_t* targets, int64_t batch, int64_t min_count, int64_t* order,
                       int64_t* offsets, int64_t* classes);

// mean, var: (groups, z.cols).
template <class In, class T>
void class_moments(Matrix<const In> z, Groups groups, double eps, T* mean, T* var);

// The inputs of (groups, z.cols) are contiguous, grad_z too.
template <class In, class T>
void class_moments_backward(const T* grad_mean, const T* grad_var, Matrix<const In> z,
                            const T* mean, const T* var, Groups groups, double eps, In* grad_z);

// alpha: (groups, groups). classes: (groups), negative for the groups to leave out.
template <class In, class T>
void confusion_weights(Matrix<const In> logits, Groups groups, const int64_t* classes, T* alpha);

// alpha: (used, used), the leading block of a (groups, groups) matrix that is zero elsewhere.
// pairs: (m, 2), weights: (m) with m <= groups (groups - 1) / 2.
template <class T>
void top_pairs(const T* alpha, int64_t used, int64_t groups, int64_t m, int64_t* pairs, T* weights);

// group_by_class, confusion_weights and top_pairs in one. Throws where a target is not in
// [0, logits.cols).
template <class In, class T>
void plan(Matrix<const In> logits, const int64_t* targets, int64_t min_count, int64_t m,
          int64_t* order, int64_t* offsets, int64_t* classes, int64_t* pairs, T* weights);

// One layer of the regularizer. grad, (batch, dims) contiguous, is written by the backward pass.
template <class T>
struct Layer {
  InputType type;
  const void* z;
  int64_t stride, dims;
  void* grad;
};

// The planned pairs; those of weight zero take no part.
template <class T>
struct Pairs {
  const int64_t* index;  // (count, 2)
  const T* weights;      // (count)
  int64_t count;
};

// Returns the value; writes distance (layers, pairs), zero for pairs of weight zero.
template <class T>
T regularizer(const Layer<T>* layers, int64_t layer_count, int64_t batch, Groups groups,
              Pairs<T> pairs, double eps, bool log, T* distance);

template <class T>
void regularizer_backward(T grad, const Layer<T>* layers, int64_t layer_count, int64_t batch,
                          Groups groups, Pairs<T> pairs, double eps, bool log, const T* distance);

// targets: (logits.rows), in [0, logits.cols). seen: (logits.cols). index, weight: (logits.rows,
// top) with top < logits.cols, or 0. own: (logits.rows).
template <class In, class T>
void top_confusions(Matrix<const In> logits, const int64_t* targets, const bool* seen, int64_t top,
                    int64_t* index, T* weight, T* own);

// mean: (classes, z.cols) contiguous. var: (z.cols). index, coefficient: (z.rows, count), classes
// from -1 on. energy: (z.rows). gradient: (z.rows, z.cols).
template <class In, class T>
void class_attraction(Matrix<const In> z, const T* mean, const T* var, const int64_t* index,
                      const T* coefficient, int64_t count, T* energy, T* gradient);

// Distinct classes, negative for those to leave out, and what a batch has of each.
template <class T>
struct BatchClasses {
  const int64_t* classes;  // (count)
  const T* weight;         // (count)
  const T* mean;           // (count, dims)
  int64_t count;
};

// mean, count: (classes, dims) and (classes). Writes var (dims), updates (1), weight (batch.count)
// and metric (dims). batch_var: (batch.count, dims).
template <class T>
void observe_classes(const T* mean, const T* count, T* var, T* updates, BatchClasses<T> batch,
                     const T* batch_var, int64_t dims, double momentum, double floor, T* weight,
                     T* metric);

// Writes mean (classes, dims) and count (classes).
template <class T>
void follow_classes(T* mean, T* count, BatchClasses<T> batch, int64_t dims, double momentum);

}  // namespace cwbr
