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
    // The exponents that infinity and NaN have, and zero.
    constexpr T infinite = sizeof(T) == 4 ? 128 : 1024, zero = 1 - infinite;
    if (!all((sums.highest < infinite) & (sums.lowest > zero)))
      sums.both.quadratic = broadcast(std::numeric_limits<T>::quiet_NaN());
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

// One vector of dimensions of one row, and the sums over its pairs.
template <class T>
struct RowVector {
  Vec<T> mean, w, inverse;  // inverse = 1 / w
  Vec<T> by_mean, by_var;
};

template <bool Whole, class T>
CWBR_INLINE void load_rows(const Rows<T>& rows, const int64_t* used, int64_t n, int64_t first,
                           int64_t count, int64_t vectors, RowVector<T>* work) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = used[r] * rows.d + first;
      const Vec<T> w = load_vector<Whole>(rows.var + at, v, count, T(1)) + rows.eps;
      const Vec<T> mean = load_vector<Whole>(rows.mean + at, v, count, T(0));
      work[r * vectors + v] = {mean, w, reciprocal(w), Vec<T>{}, Vec<T>{}};
    }
}

template <bool Whole, class T>
CWBR_INLINE void store_rows(const Rows<T>& rows, const int64_t* used, int64_t n, int64_t first,
                            int64_t count, int64_t vectors, const RowVector<T>* work, T* grad_mean,
                            T* grad_var) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = used[r] * rows.d + first + v * kLanes<T>, left = count - v * kLanes<T>;
      const Vec<T> by_mean = work[r * vectors + v].by_mean * T(0.5);
      const Vec<T> by_var = work[r * vectors + v].by_var * T(0.25);
      if (Whole || left >= kLanes<T>) {
        store(grad_mean + at, by_mean);
        store(grad_var + at, by_var);
      } else {
        store_first(grad_mean + at, left, by_mean);
        store_first(grad_var + at, left, by_var);
      }
    }
}

template <class T>
void pair_distance_backward(const Rows<T>& rows, const T* grad, const int64_t* pairs, int64_t m,
                            const int64_t* used, int64_t n, int64_t first, int64_t count, T* work,
                            T* grad_mean, T* grad_var) {
  const int64_t vectors = (count + kLanes<T> - 1) / kLanes<T>;
  const bool whole = count % kLanes<T> == 0;
  auto* kept = reinterpret_cast<RowVector<T>*>(work);
  const auto load_all = whole ? load_rows<true, T> : load_rows<false, T>;
  load_all(rows, used, n, first, count, vectors, kept);
  for (int64_t p = 0; p < m; ++p) {
    RowVector<T>*i = kept + pairs[2 * p] * vectors, *j = kept + pairs[2 * p + 1] * vectors;
    const Vec<T> g = broadcast(grad[p]);
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> r = reciprocal(i[v].w + j[v].w);
      const Vec<T> t = (i[v].mean - j[v].mean) * r, z = (i[v].w - j[v].w) * r, t2 = t * t;
      i[v].by_mean = fma(g, t, i[v].by_mean);
      j[v].by_mean = fnma(g, t, j[v].by_mean);
      i[v].by_var = fma(g, fma(z, i[v].inverse, -t2), i[v].by_var);
      j[v].by_var = fnma(g, fma(z, j[v].inverse, t2), j[v].by_var);
    }
  }
  const auto store_all = whole ? store_rows<true, T> : store_rows<false, T>;
  store_all(rows, used, n, first, count, vectors, kept, grad_mean, grad_var);
}

}  // namespace cwbr::CWBR_ISA
