// Distances and gradients of listed pairs for one instruction set; see simd.h, and
// all_pair_distance_simd.h for the mathematics. Rows are read where they lie.

namespace cwbr::CWBR_ISA {

// The sums of one pair, and the products for L_i and L_j beside that for L_ij.
template <class T>
struct PairSums {
  Sums<T> both;
  Vec<T> product_i, product_j, exponents_alone;
  Vec<T> lowest, highest;  // exponents of any group's products

  static CWBR_INLINE PairSums zero() {
    const Vec<T> one = broadcast(T(1)), none = {};
    return {Sums<T>::zero(), one, one, none, none, none};
  }
  CWBR_INLINE void add(Vec<T> numerator, Vec<T> denominator, Vec<T> twice_i, Vec<T> twice_j) {
    const Vec<T> before = both.exponents;
    both.add(numerator, denominator);
    highest = larger(both.exponents - before, highest);
    const Vec<T> i = product_i * twice_i, j = product_j * twice_j;
    const Vec<T> exponent_i = exponent(i), exponent_j = exponent(j);
    product_i = mantissa(i);
    product_j = mantissa(j);
    exponents_alone += exponent_i + exponent_j;
    lowest = smaller(exponent_i, smaller(exponent_j, lowest));
  }

  CWBR_INLINE Vec<T> quadratic() const { return both.earlier + both.quadratic; }

  CWBR_INLINE bool in_range() const {
    constexpr T range = kExponentRange<T>;
    return all((lowest > -range) & (highest < range) & (quadratic() - quadratic() == T(0)));
  }
};

// Adds `count` vectors of dimensions, shorter ones padded with equal variances.
template <bool Padded, class T>
CWBR_INLINE void add_pair(const T* mean_i, const T* var_i, const T* mean_j, const T* var_j,
                          int count, int64_t d, T scale, T eps, PairSums<T>& sums) {
  const auto at = [&](const T* x, int vector, T fill) CWBR_LAMBDA_INLINE {
    return Padded ? load_vector(x, vector, d, fill) : load(x + vector * kLanes<T>);
  };
  const Vec<T> scales = broadcast(scale), scaled_eps = broadcast(scale * eps);
  Vec<T> numerator = {}, denominator = {}, twice_i = {}, twice_j = {};
  CWBR_UNROLL(8)
  for (int x = 0; x < count; ++x) {
    const Vec<T> w_i = fma(at(var_i, x, T(1)), scales, scaled_eps);
    const Vec<T> w_j = fma(at(var_j, x, T(1)), scales, scaled_eps);
    const Vec<T> difference = at(mean_i, x, T(0)) - at(mean_j, x, T(0));
    const Vec<T> s = w_i + w_j, square = difference * difference;
    numerator = x == 0 ? square : fma(numerator, s, square * denominator);
    denominator = x == 0 ? s : denominator * s;
    // Twice w_i is what s is for equal rows: their products then round alike, to the last bit.
    twice_i = x == 0 ? w_i + w_i : twice_i * (w_i + w_i);
    twice_j = x == 0 ? w_j + w_j : twice_j * (w_j + w_j);
  }
  sums.add(numerator, denominator, twice_i, twice_j);
}

// Adds all dimensions, `Group` vectors at a time.
template <int Group, class T>
CWBR_INLINE void add_pairs(const Rows<T>& rows, int64_t i, int64_t j, T scale, PairSums<T>& sums) {
  const T *mean_i = rows.mean + i * rows.d, *mean_j = rows.mean + j * rows.d;
  const T *var_i = rows.var + i * rows.d, *var_j = rows.var + j * rows.d;
  constexpr int64_t step = Group * kLanes<T>;
  int64_t x = 0;
  for (int64_t groups = 1; x + step <= rows.d; x += step, ++groups) {
    add_pair<false>(mean_i + x, var_i + x, mean_j + x, var_j + x, Group, step, scale, rows.eps,
                    sums);
    if (groups % kFlush == 0) sums.both.flush();
  }
  if (x < rows.d) {
    const int64_t left = rows.d - x;
    const int count = int((left + kLanes<T> - 1) / kLanes<T>);
    add_pair<true>(mean_i + x, var_i + x, mean_j + x, var_j + x, count, left, scale, rows.eps,
                   sums);
  }
}

template <class T>
void pair_distance(const Rows<T>& rows, const int64_t* pairs, int64_t first, int64_t last,
                   T var_scale, T* distance) {
  for (int64_t p = first; p < last; ++p) {
    auto sums = PairSums<T>::zero();
    add_pairs<kGroup>(rows, pairs[2 * p], pairs[2 * p + 1], var_scale, sums);
    if (!sums.in_range()) {
      sums = PairSums<T>::zero();
      add_pairs<1>(rows, pairs[2 * p], pairs[2 * p + 1], var_scale, sums);
    }
    const Vec<T> product = sums.both.product;
    const Vec<T> ratio = product * product / (sums.product_i * sums.product_j);
    const T exponents = sum_lanes<T>(sums.both.exponents * T(2) - sums.exponents_alone);
    const T quadratic = sum_lanes<T>(sums.quadratic()) * var_scale;
    const T log = std::log(product_lanes<T>(ratio)) + T(kLog2) * exponents;
    const T sum = (quadratic + log) / 4;
    distance[p] = sum < 0 ? 0 : sum;
  }
}

template <class T>
void pair_distance_backward(const Rows<T>& rows, const T* grad, const int64_t* pairs, int64_t m,
                            int64_t first, int64_t last, T* work, T* grad_mean, T* grad_var) {
  constexpr int N = kLanes<T>;
  const int64_t vectors = (last - first + N - 1) / N, width = vectors * N;
  const auto dims = [&](const T* x, int64_t row, int64_t v, T fill) CWBR_LAMBDA_INLINE {
    const int64_t left = last - first - v * N;
    const T* at = x + row * rows.d + first + v * N;
    return left >= N ? load(at) : load_first(at, left, fill);
  };
  const auto add = [&](T* x, int64_t row, int64_t v, Vec<T> term) CWBR_LAMBDA_INLINE {
    const int64_t left = last - first - v * N;
    T* at = x + row * rows.d + first + v * N;
    if (left >= N)
      store(at, load(at) + term);
    else
      store_first(at, left, load_first(at, left, T(0)) + term);
  };
  for (int64_t row = 0; row < rows.k; ++row) {
    std::memset(grad_mean + row * rows.d + first, 0, (last - first) * sizeof(T));
    std::memset(grad_var + row * rows.d + first, 0, (last - first) * sizeof(T));
    for (int64_t v = 0; v < vectors; ++v)
      store(work + row * width + v * N, reciprocal(dims(rows.var, row, v, T(1)) + rows.eps));
  }
  for (int64_t p = 0; p < m; ++p) {
    const int64_t i = pairs[2 * p], j = pairs[2 * p + 1];
    const Vec<T> half = broadcast(grad[p] / 2), quarter = broadcast(grad[p] / 4);
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> w_i = dims(rows.var, i, v, T(1)) + rows.eps;
      const Vec<T> w_j = dims(rows.var, j, v, T(1)) + rows.eps;
      const Vec<T> r = reciprocal(w_i + w_j);
      const Vec<T> t = (dims(rows.mean, i, v, T(0)) - dims(rows.mean, j, v, T(0))) * r;
      const Vec<T> z = (w_i - w_j) * r, t2 = t * t;
      add(grad_mean, i, v, half * t);
      add(grad_mean, j, v, -half * t);
      add(grad_var, i, v, quarter * fma(z, load(work + i * width + v * N), -t2));
      add(grad_var, j, v, quarter * (-fma(z, load(work + j * width + v * N), t2)));
    }
  }
}

}  // namespace cwbr::CWBR_ISA
