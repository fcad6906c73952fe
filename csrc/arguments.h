// What the kernels take, on the CPU as on a GPU: plain addresses and sizes, free of torch. Matrices
// are row-major. In is the type of an input, T = accumulate_t<In> that of what is computed from it.
#pragma once

#include <cstdint>
#include <type_traits>

namespace cwbr {

// The dtypes in which features and logits arrive.
enum class ElementType { kFloat, kDouble, kHalf, kBFloat16 };

// Sums are float64 for float64, float32 for all others.
template <class In>
using accumulate_t = std::conditional_t<std::is_same_v<In, double>, double, float>;

template <class In>
struct Matrix {
  In* data;
  int64_t rows, cols;
  int64_t stride;  // between rows, in elements; cols on a GPU
};

// Group k holds the samples order[offsets[k]], ..., order[offsets[k + 1] - 1].
struct Groups {
  const int64_t* order;    // (batch,)
  const int64_t* offsets;  // (count + 1,)
  int64_t count, batch;

  const int64_t* samples(int64_t k) const { return order + offsets[k]; }
  int64_t size(int64_t k) const { return offsets[k + 1] - offsets[k]; }
};

template <class T>
struct Moments {
  const T* mean;  // (rows, dims)
  const T* var;   // (rows, dims)
  int64_t rows, dims;
};

struct Pairs {
  const int64_t* index;  // (count, 2) rows
  int64_t count;
};

// Those of weight zero take no part.
template <class T>
struct WeightedPairs : Pairs {
  const T* weights;  // (count,)
};

// One layer of the regularizer.
template <class T>
struct Layer {
  ElementType type;
  const void* z;         // (batch, dims)
  int64_t stride, dims;  // stride: as in Matrix
  T* mean;               // (groups, dims): the moments, where the forward pass keeps them
  T* var;
  void* grad;  // (batch, dims), written by the backward pass
};

// The class means of a bank, M = const T where they are read only.
template <class M>
struct Bank {
  M* mean;   // (classes, dims)
  M* count;  // (classes,) samples seen
  int64_t classes, dims;
};

// Distinct classes, negative for those to leave out, and what a batch has of each.
template <class T>
struct BatchClasses {
  const int64_t* classes;  // (count,)
  const T* weight;         // (count,)
  const T* mean;           // (count, dims)
  const T* var;            // (count, dims)
  int64_t count;
};

// What a bank knows of the variances, and what it makes of them.
template <class T>
struct Variances {
  T* var;      // (dims,)
  T* updates;  // scalar
  T* metric;   // (dims,)
};

// The classes that act on each sample, from -1 on, and how much.
template <class T>
struct Acting {
  const int64_t* index;  // (batch, count)
  const T* coefficient;  // (batch, count)
  int64_t count;
};

}  // namespace cwbr
