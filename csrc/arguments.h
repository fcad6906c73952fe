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

// One layer of a class bank, M = const T where it is read only. The matrices of a batch have all
// layers side by side, this one from column `first` on.
template <class M>
struct Bank {
  M* mean;   // (classes, dims)
  M* count;  // (classes,) samples seen
  int64_t classes, dims, first;
};

// Distinct classes, negative for those to leave out, and what a batch has of each.
template <class T>
struct BatchClasses {
  const int64_t* classes;  // (count,)
  const T* weight;         // (count,); what is due to each layer: (layers, count)
  const T* mean;           // (count, width)
  const T* var;            // (count, width)
  int64_t count, width;
};

// What a layer knows of its variances, and what it makes of them.
template <class T>
struct Variances {
  T* var;      // (dims,)
  T* updates;  // scalar
  T* metric;   // (dims,)
  T* unit;     // scalar
};

// What observe_classes knows of a layer.
template <class T>
struct Observed {
  Bank<const T> bank;
  Variances<T> variances;
};

// The classes that act on each sample.
template <class T>
struct Acting {
  const int64_t* labels;  // (batch, own), the main one first; negative for none
  const T* shares;        // (batch, own), or null: 1 for each
  const T* main_weight;   // (batch,)
  const int64_t* rivals;  // (batch, others); negative for none
  const T* weight;        // (batch, others)
  const bool* seen;       // (classes,) of which classes something is known
  int64_t own, others;
  T push;
};

// What class_attraction writes of each layer and sample.
template <class T>
struct Attraction {
  T* energy;    // (layers, batch)
  T* nearest;   // (layers, batch)
  T* right;     // (layers, batch)
  T* squares;   // (layers, batch)
  T* gradient;  // (batch, width)
};

}  // namespace cwbr
