#include <algorithm>

#include "cpu/isa_batch_table.h"
#include "cpu/kernels.h"
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
  for_each(tasks, grain_of(kGrain, batch * dims / tasks), [&](int64_t task) {
    const int64_t begin = task % slices * kWidth;
    body(task / slices, begin, std::min(kWidth, dims - begin));
  });
}

}  // namespace

template <class In, class T>
void class_moments(Cpu, Matrix<const In> z, Groups groups, double eps, T* mean, T* var) {
  const auto& loops = batch_loops<In>();
  for_each_slice(groups.count, z.rows, z.cols, [&](int64_t k, int64_t begin, int64_t width) {
    const int64_t at = k * z.cols + begin;
    loops.moments(group_rows(z, groups, k, begin, width), static_cast<T>(eps), mean + at, var + at);
  });
}

template <class In, class T>
void class_moments_backward(Cpu, const T* grad_mean, const T* grad_var, Matrix<const In> z,
                            const T* mean, const T* var, Groups groups, double eps, In* grad_z) {
  const auto& loops = batch_loops<In>();
  const auto slice = [&](int64_t k, int64_t begin, int64_t width) {
    if (k == groups.count) {  // the samples of no group
      for (int64_t s = groups.offsets[k]; s < z.rows; ++s) {
        std::fill_n(grad_z + groups.order[s] * z.cols + begin, width, In{});
      }
      return;
    }
    const int64_t at = k * z.cols + begin;
    loops.moments_gradient(group_rows(z, groups, k, begin, width), static_cast<T>(eps), mean + at,
                           var + at, grad_mean + at, grad_var + at, grad_z + begin, z.cols);
  };
  for_each_slice(groups.count + 1, z.rows, z.cols, slice);
}

#define CWBR_INSTANTIATE(In, T)                                                             \
  template void class_moments(Cpu, Matrix<const In>, Groups, double, T*, T*);               \
  template void class_moments_backward(Cpu, const T*, const T*, Matrix<const In>, const T*, \
                                       const T*, Groups, double, In*);
CWBR_FOR_EACH_INPUT(CWBR_INSTANTIATE)

}  // namespace cwbr
