// Blocks of gradients of distances for one instruction set; see simd.h.
//
// With w = var + eps, S = w_i + w_j, t = (mean_j - mean_i)/S and z = (w_j - w_i)/S, a distance has
//     dD/dmean_i = -t/2,   w_i dD/dw_i = -(z + t^2 w_i)/4,
// and for j the same with t and z negated. Differences of variances are taken before they are
// divided, so that nothing cancels; the division by w_i is left to the end of the sum over j. Lanes
// are dimensions: a sum over pairs needs no reduction, and whoever owns the dimension owns the sum.

namespace cwbr::CWBR_ISA {

// Sums over pairs, of one row and one vector of dimensions, each times the pair's gradient:
// t = (mean_other - mean) / S, and q = z + t^2 w with z = (w_other - w) / S.
template <class T>
struct RowGradient {
  Vec<T> t, q;
};

// r[k] = 1 / (w + w_i) for the kGradientRows rows i; shared, by one reciprocal of the product of
// all sums.
template <bool Shared, class T>
CWBR_INLINE void reciprocals(const Vec<T>* moments_i, Vec<T> w, Vec<T>* r) {
  static_assert(kGradientRows == 4);
  Vec<T> s[kGradientRows];
  CWBR_UNROLL(4)
  for (int k = 0; k < kGradientRows; ++k) s[k] = w + moments_i[2 * k + 1];
  if (Shared) {
    const Vec<T> first = s[0] * s[1], second = s[2] * s[3], all = reciprocal(first * second);
    const Vec<T> by_first = all * second, by_second = all * first;
    r[0] = by_first * s[1], r[1] = by_first * s[0];
    r[2] = by_second * s[3], r[3] = by_second * s[2];
  } else {
    CWBR_UNROLL(4)
    for (int k = 0; k < kGradientRows; ++k) r[k] = reciprocal(s[k]);
  }
}

// The pairs of kGradientRows rows i with rows j in [first, last). moments holds mean and w of each
// row; grad is (j, kGradientRows). Reciprocals are a row j ahead, unless kDivideAtOnce: the chain
// from the variances to the sums is longer than the processor looks ahead.
template <bool Shared, class T>
CWBR_INLINE void gradient_rows(const Vec<T>* moments_i, RowGradient<T>* sums_i,
                               const Vec<T>* moments_j, RowGradient<T>* sums_j, const T* grad,
                               int64_t first, int64_t last) {
  RowGradient<T> i[kGradientRows];
  Vec<T> r[kGradientRows], next[kGradientRows];
  CWBR_UNROLL(4)
  for (int k = 0; k < kGradientRows; ++k) i[k] = sums_i[k];
  if (!kDivideAtOnce) reciprocals<Shared, T>(moments_i, moments_j[2 * first + 1], next);
  for (int64_t j = first; j < last; ++j) {
    if (kDivideAtOnce) {
      reciprocals<Shared, T>(moments_i, moments_j[2 * j + 1], r);
    } else {
      CWBR_UNROLL(4)
      for (int k = 0; k < kGradientRows; ++k) r[k] = next[k];
      const int64_t ahead = j + 1 < last ? j + 1 : j;
      reciprocals<Shared, T>(moments_i, moments_j[2 * ahead + 1], next);
    }
    const Vec<T> mean = moments_j[2 * j], w = moments_j[2 * j + 1];
    RowGradient<T> sum = sums_j[j];
    CWBR_UNROLL(4)
    for (int k = 0; k < kGradientRows; ++k) {
      const Vec<T> g = broadcast(grad[j * kGradientRows + k]);
      const Vec<T> mean_i = moments_i[2 * k], w_i = moments_i[2 * k + 1];
      const Vec<T> t = (mean - mean_i) * r[k], z = (w - w_i) * r[k], t2 = t * t;
      i[k].t = fma(g, t, i[k].t);
      i[k].q = fma(g, fma(t2, w_i, z), i[k].q);
      sum.t = fnma(g, t, sum.t);
      sum.q = fnma(g, fnma(t2, w, z), sum.q);
    }
    sums_j[j] = sum;
  }
  CWBR_UNROLL(4)
  for (int k = 0; k < kGradientRows; ++k) sums_i[k] = i[k];
}

template <class T>
CWBR_INLINE bool any_nonzero(const GradientBlock<T>& block, int64_t i, int64_t first_j,
                             int64_t last_j) {
  const int64_t tiles = (block.rows.count_j + kTile - 1) / kTile;
  const uint8_t* nonzero = block.nonzero + i / kGradientRows * tiles;
  bool any = false;
  for (int64_t tile = first_j / kTile; tile * kTile < last_j; ++tile) any |= nonzero[tile] != 0;
  return any;
}

// One side of a block: rows, and what is kept of each for up to kGradientVectors vectors of
// dimensions at a time, since a row is best read from memory by several cache lines.
template <class T>
struct GradientSide {
  int64_t first, count, padded;
  Vec<T>* moments;       // (vectors, padded, 2): mean and w, scaled
  RowGradient<T>* sums;  // (vectors, padded)
};

// Asks for the lines of some vectors of a row that comes a few rows later: rows lie too far apart
// for the processor to guess.
template <class T>
CWBR_INLINE void prefetch_row(const T* a, const T* b, const Rows<T>& rows, int64_t row,
                              int64_t vector, int vectors) {
  constexpr int64_t kAhead = 8;
  const int64_t later = row + kAhead < rows.k ? row + kAhead : row;
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = later * rows.d + (vector + v) * kLanes<T>;
    __builtin_prefetch(a + at);
    __builtin_prefetch(b + at);
  }
}

template <bool Whole, class T>
CWBR_INLINE void load_moments(const Rows<T>& rows, const Scaling<T>& scaling,
                              const GradientSide<T>& side, int64_t vector, int vectors,
                              bool* shared) {
  Vec<T> low[kGradientVectors], high[kGradientVectors];
  for (int v = 0; v < vectors; ++v) low[v] = high[v] = broadcast(T(1));
  // Rows beyond the last, up to a multiple of kGradientRows, are copies of it.
  for (int64_t r = 0; r < side.padded; ++r) {
    const int64_t row = side.first + (r < side.count ? r : side.count - 1);
    prefetch_row(rows.mean, rows.var, rows, row, vector, vectors);
    for (int v = 0; v < vectors; ++v) {
      Vec<T>* moments = side.moments + 2 * (v * side.padded + r);
      moments[0] =
          load_mean<Whole>(rows, row, vector + v) * load(scaling.mean + (vector + v) * kLanes<T>);
      moments[1] = load_variance<Whole>(rows, row, vector + v) *
                   load(scaling.var + (vector + v) * kLanes<T>);
      low[v] = smaller(moments[1], low[v]);
      high[v] = larger(moments[1], high[v]);
    }
  }
  // Whether the product of four sums of two variances keeps all its bits.
  constexpr T bound = sizeof(T) == 4 ? T(0x1p-24) : T(0x1p-250);
  for (int v = 0; v < vectors; ++v) shared[v] &= all((low[v] > bound) & (high[v] < 1 / bound));
}

// Writes, or adds, the gradients that sums amount to: dD/dmean = -t/2 and dD/dw = -q/(4 w), scaled
// back.
template <bool Whole, class T>
CWBR_INLINE void store_gradients(const Rows<T>& rows, const Scaling<T>& scaling,
                                 const GradientSide<T>& side, int64_t vector, int vectors, T unit,
                                 bool add, T* grad_mean, T* grad_var) {
  const auto put = [&](T* at, int64_t left, Vec<T> x) CWBR_LAMBDA_INLINE {
    if (Whole || left >= kLanes<T>)
      store(at, add ? load(at) + x : x);
    else
      store_first(at, left, add ? load_first(at, left, T(0)) + x : x);
  };
  for (int64_t r = 0; r < side.count; ++r) {
    prefetch_row<T>(grad_mean, grad_var, rows, side.first + r, vector, vectors);
    for (int v = 0; v < vectors; ++v) {
      const int64_t dim = (vector + v) * kLanes<T>, at = (side.first + r) * rows.d + dim;
      const RowGradient<T>& sums = side.sums[v * side.padded + r];
      const Vec<T> inverse = reciprocal(side.moments[2 * (v * side.padded + r) + 1]);
      const Vec<T> by_var = sums.q * inverse;
      put(grad_mean + at, rows.d - dim, sums.t * load(scaling.mean + dim) * (unit * T(-0.5)));
      put(grad_var + at, rows.d - dim, by_var * load(scaling.var + dim) * (unit * T(-0.25)));
    }
  }
}

// Adds what rows collected as rows j to what they collected as rows i.
template <class T>
CWBR_INLINE void join_sums(const GradientSide<T>& side_i, const GradientSide<T>& side_j,
                           int vectors) {
  for (int64_t r = 0; r < vectors * side_i.padded; ++r) {
    side_i.sums[r].t += side_j.sums[r].t;
    side_i.sums[r].q += side_j.sums[r].q;
  }
}

// All pairs of a block, for vector v of those kept.
template <class T>
CWBR_INLINE void add_gradients(const GradientBlock<T>& block, const GradientSide<T>& side_i,
                               const GradientSide<T>& side_j, int v, bool shared) {
  constexpr int64_t block_j = 64;  // rows j whose moments and sums stay in the first-level cache
  const bool diagonal = side_i.first == side_j.first;
  const Vec<T>*moments_i = side_i.moments + 2 * v * side_i.padded,
        *moments_j = side_j.moments + 2 * v * side_j.padded;
  RowGradient<T>*sums_i = side_i.sums + v * side_i.padded,
  *sums_j = side_j.sums + v * side_j.padded;
  const RowGradient<T> none = {Vec<T>{}, Vec<T>{}};
  for (int64_t r = 0; r < side_i.padded; ++r) sums_i[r] = none;
  for (int64_t r = 0; r < side_j.padded; ++r) sums_j[r] = none;
  for (int64_t j = 0; j < side_j.count; j += block_j) {
    const int64_t last_j = j + block_j < side_j.count ? j + block_j : side_j.count;
    for (int64_t i = 0; i < side_i.count && (!diagonal || i < last_j); i += kGradientRows) {
      const int64_t from_j = diagonal && i >= j ? i + 1 : j;
      if (!any_nonzero(block, i, from_j, last_j)) continue;
      const auto add = shared && !kDivideAtOnce ? gradient_rows<true, T> : gradient_rows<false, T>;
      add(moments_i + 2 * i, sums_i + i, moments_j, sums_j, block.grad + i * side_j.count, from_j,
          last_j);
    }
  }
}

template <bool Whole, class T>
CWBR_INLINE void gradient_vectors(const Rows<T>& rows, const Scaling<T>& scaling,
                                  const GradientBlock<T>& block, const GradientSide<T>& side_i,
                                  const GradientSide<T>& side_j, int64_t first, int vectors,
                                  T* grad_mean, T* grad_var) {
  const bool diagonal = side_i.first == side_j.first;
  bool shared[kGradientVectors] = {true, true, true, true};
  load_moments<Whole>(rows, scaling, side_i, first, vectors, shared);
  if (!diagonal) load_moments<Whole>(rows, scaling, side_j, first, vectors, shared);
  for (int v = 0; v < vectors; ++v) add_gradients(block, side_i, side_j, v, shared[v]);
  if (diagonal) {
    join_sums(side_i, side_j, vectors);
    store_gradients<Whole>(rows, scaling, side_i, first, vectors, block.unit, false, grad_mean,
                           grad_var);
  } else {
    store_gradients<Whole>(rows, scaling, side_i, first, vectors, block.unit, true, grad_mean,
                           grad_var);
    store_gradients<Whole>(rows, scaling, side_j, first, vectors, block.unit, true, grad_mean,
                           grad_var);
  }
}

template <class T>
void gradient(const Rows<T>& rows, const Scaling<T>& scaling, const GradientBlock<T>& block,
              int64_t first, int64_t last, T* work, T* grad_mean, T* grad_var) {
  const auto& [first_i, count_i, first_j, count_j] = block.rows;
  const int64_t padded_i = (count_i + kGradientRows - 1) / kGradientRows * kGradientRows;
  const int64_t padded_j = (count_j + kGradientRows - 1) / kGradientRows * kGradientRows;
  auto* moments_i = reinterpret_cast<Vec<T>*>(work);
  auto* moments_j = moments_i + 2 * kGradientVectors * padded_i;
  auto* sums_i = reinterpret_cast<RowGradient<T>*>(moments_j + 2 * kGradientVectors * padded_j);
  auto* sums_j = sums_i + kGradientVectors * padded_i;
  const GradientSide<T> side_i = {first_i, count_i, padded_i, moments_i, sums_i};
  const GradientSide<T> side_j = {first_j, count_j, padded_j,
                                  first_i == first_j ? moments_i : moments_j, sums_j};
  for (int64_t x = first; x < last; x += kGradientVectors) {
    const int vectors = int(x + kGradientVectors < last ? kGradientVectors : last - x);
    if ((x + vectors) * kLanes<T> <= rows.d)
      gradient_vectors<true>(rows, scaling, block, side_i, side_j, x, vectors, grad_mean, grad_var);
    else
      gradient_vectors<false>(rows, scaling, block, side_i, side_j, x, vectors, grad_mean,
                              grad_var);
  }
}

}  // namespace cwbr::CWBR_ISA
