// class_moments and its gradient: a thread owns a few columns of one class group.
//
// Samples come in chunks of eight that stay in registers, so z is read from memory once although
// the variance of a chunk is taken by two passes. Chunks are merged exactly (Chan, Golub and
// LeVeque 1983): with d the difference of their means, M2 = M2_a + M2_b + d^2 n_a n_b / (n_a +
// n_b).
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

constexpr int kChunk = 8;

// What a launch over several layers knows of one: its tensors and where its blocks begin.
template <class T>
struct MomentLayer {
  const T* z;             // (B, dims)
  accumulate_t<T>* mean;  // (K, dims)
  accumulate_t<T>* var;   // (K, dims)
  int64_t dims;
  int64_t first_slice = 0;
};

template <class T>
struct GradientLayer {
  const T* z;                   // (B, dims)
  const accumulate_t<T>* mean;  // (K, dims)
  const accumulate_t<T>* var;   // (K, dims)
  T* grad_z;                    // (B, dims)
  int64_t dims;
  int64_t first_slice = 0;

  __device__ bool vectors() const {
    return vectors_fit(z, dims) && vectors_fit(mean, dims) && vectors_fit(var, dims) &&
           vectors_fit(grad_z, dims);
  }
};

// A layer whose gradients with respect to the moments are given.
template <class T>
struct MomentGradientLayer : GradientLayer<T> {
  const accumulate_t<T>* grad_mean;  // (K, dims)
  const accumulate_t<T>* grad_var;   // (K, dims)

  __device__ bool vectors() const {
    return GradientLayer<T>::vectors() && vectors_fit(grad_mean, this->dims) &&
           vectors_fit(grad_var, this->dims);
  }
};

template <class T, int WIDTH>
__device__ void moments_of_columns(const MomentLayer<T>& layer, const Groups& groups, int64_t group,
                                   int64_t column, accumulate_t<T> eps) {
  using A = accumulate_t<T>;
  const int64_t begin = groups.offsets[group], end = groups.offsets[group + 1];
  A origin[WIDTH] = {}, mean[WIDTH] = {}, squares[WIDTH] = {};
  for (int64_t first = begin; first < end; first += kChunk) {
    Vector<T, WIDTH> rows[kChunk] = {};
    const int count = end - first < kChunk ? end - first : kChunk;
#pragma unroll
    for (int r = 0; r < kChunk; ++r)
      if (r < count)  // mask: the last chunk is short
        rows[r] = load<WIDTH>(layer.z + groups.order[first + r] * layer.dims + column);
    const A before = first - begin, share = count / (before + count);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      if (first == begin) origin[w] = widen(rows[0].item[w]);
      A sum = 0, chunk_squares = 0;
#pragma unroll
      for (int r = 0; r < kChunk; ++r) {
        if (r < count)  // mask: the rows beyond a short chunk hold zeros
          sum += widen(rows[r].item[w]) - origin[w];
      }
      const A chunk_mean = sum / count;
#pragma unroll
      for (int r = 0; r < kChunk; ++r) {
        const A centred = widen(rows[r].item[w]) - origin[w] - chunk_mean;
        if (r < count)  // mask: the rows beyond a short chunk hold zeros
          chunk_squares += centred * centred;
      }
      const A difference = chunk_mean - mean[w];
      squares[w] += chunk_squares + difference * difference * before * share;
      mean[w] += difference * share;
    }
  }
  A var[WIDTH];
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    var[w] = end > begin ? squares[w] / (end - begin) : A{0};
    if (var[w] < eps) var[w] = eps;  // NaN stays NaN
    mean[w] += origin[w];
  }
  store_many(layer.mean + group * layer.dims + column, mean);
  store_many(layer.var + group * layer.dims + column, var);
}

// One block per slice of a layer and group, over all layers.
template <class T>
__global__ void __launch_bounds__(kColumnThreads)
    class_moments_kernel(const __grid_constant__ Layers<MomentLayer<T>> layers, Groups groups,
                         accumulate_t<T> eps, int* ticket) {
  if (ticket && blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
  if (groups.count == 0) return;
  const int64_t slice = blockIdx.x / groups.count, group = blockIdx.x % groups.count;
  const MomentLayer<T>& layer = layer_of(layers, slice);
  const bool vectors = vectors_fit(layer.z, layer.dims);
  for_columns<T>(slice - layer.first_slice, layer.dims, vectors, [&](auto width, int64_t column) {
    moments_of_columns<T, width.value>(layer, groups, group, column, eps);
  });
}

// dL/dz = (dL/dmean + 2 dL/dvar (z - mean)) / n for the samples of one group.
template <class T, int WIDTH>
__device__ void spread_gradient(const GradientLayer<T>& layer, const Groups& groups, int64_t group,
                                int64_t column, const accumulate_t<T> (&grad_mean)[WIDTH],
                                const accumulate_t<T> (&grad_var)[WIDTH], accumulate_t<T> eps) {
  using A = accumulate_t<T>;
  const int64_t begin = groups.offsets[group], end = groups.offsets[group + 1];
  const int64_t at = group * layer.dims + column;
  A mean[WIDTH], var[WIDTH], constant[WIDTH], slope[WIDTH];
  load_many(layer.mean + at, mean);
  load_many(layer.var + at, var);
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    constant[w] = grad_mean[w] / (end - begin);
    slope[w] = var[w] > eps ? 2 * grad_var[w] / (end - begin) : A{0};
  }
#pragma unroll 4
  for (int64_t position = begin; position < end; ++position) {
    const int64_t element = groups.order[position] * layer.dims + column;
    const Vector<T, WIDTH> z = load<WIDTH>(layer.z + element);
    Vector<T, WIDTH> grad;
#pragma unroll
    for (int w = 0; w < WIDTH; ++w)
      grad.item[w] = narrow<T>(constant[w] + slope[w] * (widen(z.item[w]) - mean[w]));
    store(layer.grad_z + element, grad);
  }
}

// Zero gradients for every `stride`-th of the samples of no group.
template <class T, int WIDTH>
__device__ void clear_gradient(const GradientLayer<T>& layer, const Groups& groups, int64_t start,
                               int64_t stride, int64_t column) {
  const Vector<T, WIDTH> zero = {};
  for (int64_t position = groups.offsets[groups.count] + start; position < groups.batch;
       position += stride)
    store(layer.grad_z + groups.order[position] * layer.dims + column, zero);
}

// One block per slice of a layer and group; the samples of no group are dealt out to all of them.
// `gradients(layer, group, column, grad_mean, grad_var)` fills in the gradients of the moments.
template <class T, class Layer, class Gradients>
__device__ void moments_backward(const Layers<Layer>& layers, const Groups& groups,
                                 accumulate_t<T> eps, Gradients gradients) {
  const int64_t rows = groups.count > 0 ? groups.count : 1;
  const int64_t slice = blockIdx.x / rows, group = blockIdx.x % rows;
  const Layer& layer = layer_of(layers, slice);
  const bool vectors = layer.vectors();
  for_columns<T>(slice - layer.first_slice, layer.dims, vectors, [&](auto width, int64_t column) {
    clear_gradient<T, width.value>(layer, groups, group, rows, column);
    if (group == groups.count || groups.offsets[group] == groups.offsets[group + 1]) return;
    accumulate_t<T> grad_mean[width.value], grad_var[width.value];
    gradients(layer, group, column, grad_mean, grad_var);
    spread_gradient<T, width.value>(layer, groups, group, column, grad_mean, grad_var, eps);
  });
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads)
    class_moments_backward_kernel(const __grid_constant__ Layers<MomentGradientLayer<T>> layers,
                                  Groups groups, accumulate_t<T> eps) {
  moments_backward<T>(layers, groups, eps,
                      [](const MomentGradientLayer<T>& layer, int64_t group, int64_t column,
                         auto& grad_mean, auto& grad_var) {
                        load_many(layer.grad_mean + group * layer.dims + column, grad_mean);
                        load_many(layer.grad_var + group * layer.dims + column, grad_var);
                      });
}

// Appends a layer whose blocks follow those of the layers before it.
template <class T, class Layer>
void add_layer(Layers<Layer>& layers, int64_t& slices, Layer layer) {
  layer.first_slice = slices;
  slices += ceil_div<int64_t>(layer.dims, kSliceColumns<T>);
  layers.layer[layers.count++] = layer;
}

// z (B, D) and groups -> mean, var (K, D).
template <class T, class Launcher, class A>
void class_moments(Launcher& launch, Matrix<const T> z, Groups groups, double eps, A* mean,
                   A* var) {
  Layers<MomentLayer<T>> layers{};
  int64_t slices = 0;
  add_layer<T>(layers, slices, {z.data, mean, var, z.cols});
  launch(class_moments_kernel<T>, slices * groups.count, kColumnThreads, 0, layers, groups, A(eps),
         static_cast<int*>(nullptr));
}

template <class T, class Launcher, class A>
void class_moments_backward(Launcher& launch, const A* grad_mean, const A* grad_var,
                            Matrix<const T> z, const A* mean, const A* var, Groups groups,
                            double eps, T* grad_z) {
  Layers<MomentGradientLayer<T>> layers{};
  int64_t slices = 0;
  add_layer<T>(layers, slices, {{z.data, mean, var, grad_z, z.cols}, grad_mean, grad_var});
  launch(class_moments_backward_kernel<T>, slices * (groups.count > 0 ? groups.count : 1),
         kColumnThreads, 0, layers, groups, A(eps));
}

}  // namespace cwbr::cuda
