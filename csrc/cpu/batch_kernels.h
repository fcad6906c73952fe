// The kernels that work on a batch: groups, moments, confusion weights, pairs, and the fused
// regularizer. Free of torch; every matrix is row-major. Each function computes what the function
// of its name in cwbr_fused/reference.py does, bit for bit the same on any number of threads.
#pragma once

#include <cstdint>

namespace cwbr {

// Returns how many groups are in use. order: (batch), offsets: (groups + 1), classes: (groups)
// with groups = batch / min_count.
int64_t group_by_class(const int64_t* targets, int64_t batch, int64_t min_count, int64_t* order,
                       int64_t* offsets, int64_t* classes);

// alpha: (used, used), the leading block of a (groups, groups) matrix that is zero elsewhere.
// pairs: (m, 2), weights: (m) with m <= groups (groups - 1) / 2.
template <class T>
void top_pairs(const T* alpha, int64_t used, int64_t groups, int64_t m, int64_t* pairs, T* weights);

}  // namespace cwbr
