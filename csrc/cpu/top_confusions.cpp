#include "cpu/isa_batch_table.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

constexpr int64_t kGrain = 1 << 15;  // logits per thread

}  // namespace

template <class In, class T>
void top_confusions(Cpu, Matrix<const In> logits, const int64_t* targets, const bool* seen,
                    int64_t top, int64_t* index, T* weight, T* own) {
  const auto& loops = batch_loops<In>();
  for_each(logits.rows, grain_of(kGrain, logits.cols), [&](int64_t b) {
    own[b] = loops.top_confusions(logits.data + b * logits.stride, logits.cols, targets[b], seen,
                                  top, index + b * top, weight + b * top);
  });
}

#define CWBR_INSTANTIATE(In, T)                                                             \
  template void top_confusions(Cpu, Matrix<const In>, const int64_t*, const bool*, int64_t, \
                               int64_t*, T*, T*);
CWBR_FOR_EACH_INPUT(CWBR_INSTANTIATE)

}  // namespace cwbr
