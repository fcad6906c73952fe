// The parts of the pair kernels that are compiled once per instruction set, as a table of
// functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "arguments.h"

namespace cwbr {

// Dimensions are taken by vectors of `PairKernels::lanes`; this many vectors share a denominator.
constexpr int kGroup = 8;
// Distances come in tiles of this many rows by this many rows.
constexpr int kTile = 8;
// Tiles take this many rows i at once.
constexpr int kTileRows = 4;
// Gradients take this many rows i at once against each row j.
constexpr int kGradientRows = 4;
// Gradients read this many vectors of a row at once.
constexpr int kGradientVectors = 4;

template <class T>
struct Rows {
  Rows(const Moments<T>& of, double epsilon)
      : mean(of.mean), var(of.var), k(of.rows), d(of.dims), eps(T(epsilon)) {}

  const T* mean;  // (k, d)
  const T* var;   // (k, d)
  int64_t k, d;
  T eps;
};

// D does not change when a dimension's means are multiplied by c and its variances by c^2. Powers
// of two c centre each dimension's variances on 1, so that products of kGroup of them rarely leave
// T's range; `safe` says for which groups of vectors they never do, for any two rows.
template <class T>
struct Scaling {
  int64_t vectors;
  T* mean;        // (vectors * lanes,), padded with 1
  T* var;         // (vectors * lanes,), the squares
  uint8_t* safe;  // (groups,)
};

// Rows ready for distances, in the order in which tiles read them: what a tile reads of one group
// is contiguous. For each vector of dimensions the scaled means, then the scaled variances. L(row),
// half the log-determinant of twice the variances up to the factor 1/2, is kept as exponent *
// log(2) + log. A partial exponent is kept every kCheckpoint groups.
template <class T>
struct Panel {
  T* values;       // (rows / kTile, groups, kTile, kGroup, 2, lanes)
  T* exponent;     // (rows,)
  T* log;          // (rows,)
  T* checkpoints;  // (rows, checkpoints(vectors))
};

constexpr int64_t groups(int64_t vectors) { return (vectors + kGroup - 1) / kGroup; }
constexpr int kCheckpoint = 4;
constexpr int64_t checkpoints(int64_t vectors) { return vectors / (kGroup * kCheckpoint); }

// Rows i and rows j of a block of pairs; they either are the same or share none.
struct BlockRows {
  int64_t first_i, count_i, first_j, count_j;
};

// The gradient of each distance of a block, zero but for i < j. `nonzero` says which parts of
// kGradientRows x kTile pairs have any.
template <class T>
struct GradientBlock {
  const T* grad;           // (ceil(count_i / kGradientRows), count_j, kGradientRows)
  const uint8_t* nonzero;  // (ceil(count_i / kGradientRows), ceil(count_j / kTile))
  BlockRows rows;
  T unit;  // what `grad` counts in
};

// Pairs measured closer than this are near: the logarithm of a product of d factors is off by up to
// 8 + 2 sqrt(d) roundings of 1, however small the distance, so they are measured again.
template <class T>
T near_limit(int64_t d) {
  constexpr double rounding = std::numeric_limits<T>::epsilon() / 2;
  return T(1024 * rounding * (8 + 2 * std::sqrt(double(d))));
}

template <class T>
struct PairKernels {
  int lanes;

  // Writes the scaling of groups [first, last).
  void (*scale)(const Rows<T>& rows, int64_t first, int64_t last, const Scaling<T>& scaling);

  // Writes panel rows [0, count) from rows first, first + 1, ...; the last one stands in for rows
  // that do not exist. Tiles of kTileRows rows i read rows up to a multiple of it.
  void (*pack)(const Rows<T>& rows, const Scaling<T>& scaling, int64_t first, int64_t count,
               const Panel<T>& panel);

  // distance (kTile, kTile) of the first rows_i rows of panel i and rows_j of panel j. Where
  // `upper`, only i < j are specified. Where every distance is proven to exceed `limit` they may
  // all be infinity instead.
  void (*tile)(const Panel<T>& i, const Panel<T>& j, const Scaling<T>& scaling, int64_t rows_i,
               int64_t rows_j, bool upper, T limit, T* distance);

  // Gradients of a block for vectors [first, last): written where rows i and j are the same, else
  // added. `work` holds 4 kGradientVectors vectors for each row of either side, their numbers
  // rounded up to kGradientRows.
  void (*gradient)(const Rows<T>& rows, const Scaling<T>& scaling, const GradientBlock<T>& block,
                   int64_t first, int64_t last, T* work, T* grad_mean, T* grad_var);

  // distance of pairs [first, last); var_scale is a power of two that brings typical variances
  // to 1.
  void (*pair_distance)(const Rows<T>& rows, const int64_t* pairs, int64_t first, int64_t last,
                        T var_scale, T* distance);

  // The distance of rows i and j that are near, to a few roundings of itself.
  T (*near_distance)(const Rows<T>& rows, int64_t i, int64_t j);

  // Writes the gradients of the rows that pairs name, for `count` dimensions from `first` on, a
  // multiple of lanes. `pairs` names them by their position in `used` (n,). `work` holds 4 numbers
  // for each row used and each dimension, rounded up to lanes.
  void (*pair_distance_backward)(const Rows<T>& rows, const T* grad, const int64_t* pairs,
                                 int64_t m, const int64_t* used, int64_t n, int64_t first,
                                 int64_t count, T* work, T* grad_mean, T* grad_var);
};

// The table for the instruction set that isa_name() names.
template <class T>
const PairKernels<T>& pair_kernels();

}  // namespace cwbr
