#include <algorithm>
#include <array>

#include "cpu/batch_kernels.h"
#include "cpu/batch_loops.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

// Columns per task: the rows of a group are read twice, the second time from the nearest cache.
constexpr int64_t kWidth = 512;
constexpr int64_t kGrain = 1 << 16;  // elements of z per thread

// Calls body(group, first column, width) for every slice of every group, in parallel.
template <class F>
void for_each_slice(int64_t groups, int64_t batch, int64_t dims, const F& body) {
  const int64_t slices = (dims + kWidth - 1) / kWidth;
  if (groups == 0 || slices == 0) return;
  const int64_t tasks = groups * slices;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, batch * dims / tasks));
  parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % slices * kWidth;
      body(task / slices, begin, std::min(kWidth, dims - begin));
    }
  });
}

}  // namespace

template <class In, class T>
void class_moments(Matrix<const In> z, Groups groups, double eps, T* mean, T* var) {
  for_each_slice(groups.count, z.rows, z.cols, [&](int64_t k, int64_t begin, int64_t width) {
    group_moments(z.data + begin, z.stride, groups.samples(k), groups.size(k), width,
                  static_cast<T>(eps), mean + k * z.cols + begin, var + k * z.cols + begin);
  });
}

template <class In, class T>
void class_moments_backward(const T* grad_mean, const T* grad_var, Matrix<const In> z,
                            const T* mean, const T* var, Groups groups, double eps, In* grad_z) {
  const auto slice = [&](int64_t k, int64_t begin, int64_t width) {
    if (k == groups.count) {  // the samples of no group
      for (int64_t s = groups.offsets[k]; s < z.rows; ++s) {
        std::fill_n(grad_z + groups.order[s] * z.cols + begin, width, In{});
      }
      return;
    }
    const int64_t at = k * z.cols + begin;
    std::array<T, kWidth> constant, slope;
    moments_gradient_terms(grad_mean + at, grad_var + at, var + at, groups.size(k), width,
                           static_cast<T>(eps), constant.data(), slope.data());
    for (int64_t s = 0; s < groups.size(k); ++s) {
      const int64_t row = groups.samples(k)[s];
      moments_gradient(z.data + row * z.stride + begin, mean + at, constant.data(), slope.data(),
                       width, grad_z + row * z.cols + begin);
    }
  };
  for_each_slice(groups.count + 1, z.rows, z.cols, slice);
}

#define CWBR_INSTANTIATE(In, T)                                                                  \
  template void class_moments(Matrix<const In>, Groups, double, T*, T*);                         \
  template void class_moments_backward(const T*, const T*, Matrix<const In>, const T*, const T*, \
                                       Groups, double, In*);
CWBR_FOR_EACH_INPUT(CWBR_INSTANTIATE)

}  // namespace cwbr
