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

// Adds `count` vectors of dimensions, of d numbers in all.
template <bool Whole, class T>
CWBR_INLINE void add_pair(const T* mean_i, const T* var_i, const T* mean_j, const T* var_j,
                          int count, int64_t d, T scale, T eps, PairSums<T>& sums) {
  const auto at = [&](const T* x, int vector, T fill)
                      CWBR_LAMBDA_INLINE { return load_vector<Whole>(x, vector, d, fill); };
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
    add_pair<true>(mean_i + x, var_i + x, mean_j + x, var_j + x, Group, step, scale, rows.eps,
                   sums);
    if (groups % kFlush == 0) sums.both.flush();
  }
  if (x < rows.d) {
    const int64_t left = rows.d - x;
    const int count = int((left + kLanes<T> - 1) / kLanes<T>);
    add_pair<false>(mean_i + x, var_i + x, mean_j + x, var_j + x, count, left, scale, rows.eps,
                    sums);
  }
}

template <class T>
CWBR_INLINE PairSums<T> pair_sums(const Rows<T>& rows, int64_t i, int64_t j, T scale) {
  auto sums = PairSums<T>::zero();
  add_pairs<kGroup>(rows, i, j, scale, sums);
  if (!sums.in_range()) {
    sums = PairSums<T>::zero();
    add_pairs<1>(rows, i, j, scale, sums);
  }
  return sums;
}

template <class T>
void pair_distance(const Rows<T>& rows, const int64_t* pairs, int64_t first, int64_t last,
                   T var_scale, T* distance) {
  constexpr int N = kLanes<T>;
  for (int64_t begin = first; begin < last; begin += N) {
    const int batch = int(begin + N < last ? N : last - begin);
    Vec<T> quadratics[N], ratios[N], exponents[N], exponent_sum;
    for (int p = 0; p < N; ++p) {
      quadratics[p] = exponents[p] = Vec<T>{};
      ratios[p] = broadcast(T(1));
    }
    for (int p = 0; p < batch; ++p) {
      const int64_t* pair = pairs + 2 * (begin + p);
      const auto sums = pair_sums(rows, pair[0], pair[1], var_scale);
      const Vec<T> product = sums.both.product;
      quadratics[p] = sums.quadratic();
      ratios[p] = product * product / (sums.product_i * sums.product_j);
      exponents[p] = sums.both.exponents * T(2) - sums.exponents_alone;
    }
    const Vec<T> log = log_products<T>(ratios, exponents, exponent_sum);
    const Vec<T> log_term = fma(exponent_sum, broadcast(T(kLog2)), log);
    const Vec<T> sum = fma(sum_each<T>(quadratics), broadcast(var_scale), log_term) * T(0.25);
    store_first(distance + begin, batch, sum < T(0) ? Vec<T>{} : sum);
  }
}

// The gradients of `vectors` vectors of dimensions from `first` on, `d` numbers in all.
template <bool Whole, class T>
CWBR_INLINE void pair_gradients(const Rows<T>& rows, const T* grad, const int64_t* pairs, int64_t m,
                                int64_t first, int64_t d, T* inverse, T* grad_mean, T* grad_var) {
  constexpr int N = kLanes<T>;
  const int64_t vectors = (d + N - 1) / N;
  const auto add = [&](T* row, int64_t v, Vec<T> term) CWBR_LAMBDA_INLINE {
    const int64_t left = d - v * N;
    if (Whole || left >= N)
      store(row + v * N, load(row + v * N) + term);
    else
      store_first(row + v * N, left, load_first(row + v * N, left, T(0)) + term);
  };
  for (int64_t row = 0; row < rows.k; ++row) {
    const T* var = rows.var + row * rows.d + first;
    std::memset(grad_mean + row * rows.d + first, 0, d * sizeof(T));
    std::memset(grad_var + row * rows.d + first, 0, d * sizeof(T));
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> w = load_vector<Whole>(var, v, d, T(1)) + rows.eps;
      store(inverse + (row * vectors + v) * N, reciprocal(w));
    }
  }
  for (int64_t p = 0; p < m; ++p) {
    const int64_t i = pairs[2 * p] * rows.d + first, j = pairs[2 * p + 1] * rows.d + first;
    const T* inverse_i = inverse + pairs[2 * p] * vectors * N;
    const T* inverse_j = inverse + pairs[2 * p + 1] * vectors * N;
    const Vec<T> half = broadcast(grad[p] / 2), quarter = broadcast(grad[p] / 4);
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> w_i = load_vector<Whole>(rows.var + i, v, d, T(1)) + rows.eps;
      const Vec<T> w_j = load_vector<Whole>(rows.var + j, v, d, T(1)) + rows.eps;
      const Vec<T> r = reciprocal(w_i + w_j), z = (w_i - w_j) * r;
      const Vec<T> mean_i = load_vector<Whole>(rows.mean + i, v, d, T(0));
      const Vec<T> mean_j = load_vector<Whole>(rows.mean + j, v, d, T(0));
      const Vec<T> t = (mean_i - mean_j) * r, t2 = t * t, by_mean = half * t;
      add(grad_mean + i, v, by_mean);
      add(grad_mean + j, v, -by_mean);
      add(grad_var + i, v, quarter * fma(z, load(inverse_i + v * N), -t2));
      add(grad_var + j, v, quarter * fnma(z, load(inverse_j + v * N), -t2));
    }
  }
}

template <class T>
void pair_distance_backward(const Rows<T>& rows, const T* grad, const int64_t* pairs, int64_t m,
                            int64_t first, int64_t last, T* work, T* grad_mean, T* grad_var) {
  const auto gradients =
      (last - first) % kLanes<T> == 0 ? pair_gradients<true, T> : pair_gradients<false, T>;
  gradients(rows, grad, pairs, m, first, last - first, work, grad_mean, grad_var);
}

}  // namespace cwbr::CWBR_ISA
