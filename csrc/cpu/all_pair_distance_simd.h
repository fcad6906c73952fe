// Tiles of distances and blocks of gradients for one instruction set; see simd.h.
//
// With w = var + eps and S = w_i + w_j, a distance is
//     sum_d (mean_i - mean_j)^2 / (4 S) + (L_ij - (L_i + L_j) / 2) / 2,   L_ij = sum_d log(S),
// and L_i = L_ii. A running sum of fractions is kept as one fraction, n/d + a/S = (n S + a d)/(d
// S), whose denominator is also the product whose logarithm is L_ij: a group of vectors costs one
// reciprocal and one split into exponent and mantissa. L_i is computed by the same products, so
// that equal rows cancel exactly.

namespace cwbr::CWBR_ISA {

constexpr double kLog2 = 0.693147180559945309417;

constexpr int kFlush = 16;  // groups

// A sum of fractions, and the product of their denominators as mantissa * 2^exponent, lane by lane.
template <class T>
struct Sums {
  Vec<T> quadratic, product, exponents;
  Vec<T> earlier;  // quadratic up to the last flush

  // Not a default constructor: GCC compiles those it writes itself for the wrong instruction set.
  static CWBR_INLINE Sums zero() { return {Vec<T>{}, broadcast(T(1)), Vec<T>{}, Vec<T>{}}; }
  // Sums in two levels round off less than one long sum.
  CWBR_INLINE void flush() {
    earlier += quadratic;
    quadratic = Vec<T>{};
  }
  CWBR_INLINE void multiply(Vec<T> denominator) {
    const Vec<T> p = product * denominator;
    exponents += exponent(p);
    product = mantissa(p);
  }
  CWBR_INLINE void add(Vec<T> numerator, Vec<T> denominator) {
    quadratic = fma(numerator, reciprocal(denominator), quadratic);
    multiply(denominator);
  }
};

// log(product) of each of kLanes sums, as exponent * log(2) + result.
template <class T>
CWBR_INLINE Vec<T> log_products(const Vec<T>* products, const Vec<T>* exponents,
                                Vec<T>& exponent_sum) {
  const Vec<T> product = product_each<T>(products);
  Vec<T> halvings;
  const Vec<T> log = log_mantissa<T>(mantissa(product), halvings);
  exponent_sum = sum_each<T>(exponents) + exponent(product) + halvings;
  return log;
}

// One vector of a row of d numbers; where not `Whole`, it may reach beyond the row, padded with
// fill.
template <bool Whole, class T>
CWBR_INLINE Vec<T> load_vector(const T* row, int64_t vector, int64_t d, T fill) {
  const int64_t first = vector * kLanes<T>, left = d - first;
  return Whole || left >= kLanes<T> ? load(row + first) : load_first(row + first, left, fill);
}

template <bool Whole, class T>
CWBR_INLINE Vec<T> load_mean(const Rows<T>& rows, int64_t row, int64_t vector) {
  return load_vector<Whole>(rows.mean + row * rows.d, vector, rows.d, T(0));
}

template <bool Whole, class T>
CWBR_INLINE Vec<T> load_variance(const Rows<T>& rows, int64_t row, int64_t vector) {
  return load_vector<Whole>(rows.var + row * rows.d, vector, rows.d, T(1) - rows.eps) + rows.eps;
}

template <class T>
struct Bounds {
  Vec<T> mean_low, mean_high, var_low, var_high;
};

// Smallest and largest over all rows, for `Count` vectors of dimensions.
template <int Count, bool Whole, class T>
CWBR_INLINE void find_bounds(const Rows<T>& rows, int64_t vector, Bounds<T>* bounds) {
  const Vec<T> infinity = broadcast(std::numeric_limits<T>::infinity());
  Bounds<T> found[Count];
  CWBR_UNROLL(4)
  for (int x = 0; x < Count; ++x) found[x] = {infinity, -infinity, infinity, -infinity};
  for (int64_t row = 0; row < rows.k; ++row) {
    CWBR_UNROLL(4)
    for (int x = 0; x < Count; ++x) {
      const Vec<T> mean = load_mean<Whole>(rows, row, vector + x);
      const Vec<T> var = load_variance<Whole>(rows, row, vector + x);
      found[x].mean_low = smaller(mean, found[x].mean_low);
      found[x].mean_high = larger(mean, found[x].mean_high);
      found[x].var_low = smaller(var, found[x].var_low);
      found[x].var_high = larger(var, found[x].var_high);
    }
  }
  for (int x = 0; x < Count; ++x) bounds[x] = found[x];
}

// Writes the scaling of one group, `bounds` being those of its `count` vectors.
template <class T>
void scale_group(const Bounds<T>* bounds, int64_t begin, int count, const Scaling<T>& scaling) {
  // Exponents that bound every product of denominators, and every numerator over it.
  Vec<T> lowest = {}, highest = {}, quadratic = {};
  for (int x = 0; x < count; ++x) {
    const auto& [mean_low, mean_high, var_low, var_high] = bounds[x];
    Vec<T> k = (exponent(var_low) + exponent(var_high)) * T(-0.25);
    const auto usable = (k > T(-32)) & (k < T(32)) & (var_low > T(0));
    k = usable ? k : Vec<T>{};
    // Rounds to a whole number: adding 1.5 * 2^p leaves no fraction bits.
    constexpr T whole = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);
    k = (k + whole) - whole;
    store(scaling.mean + (begin + x) * kLanes<T>, power_of_two<T>(k));
    store(scaling.var + (begin + x) * kLanes<T>, power_of_two<T>(k + k));
    const Vec<T> spread = mean_high - mean_low;
    lowest += exponent(var_low) + (k + k) + T(1);
    highest += larger(exponent(var_high) + (k + k) + T(2), Vec<T>{});
    quadratic = larger(exponent(spread * spread) + (k + k) + T(1), quadratic);
  }
  constexpr T range = kExponentRange<T>;
  scaling.safe[begin / kGroup] =
      all((lowest > -range) & (highest + quadratic + T(3) < range + T(20)) & (highest < range));
}

template <class T>
void scale(const Rows<T>& rows, int64_t first, int64_t last, const Scaling<T>& scaling) {
  const int64_t whole_vectors = rows.d / kLanes<T>;
  for (int64_t group = first; group < last; ++group) {
    const int64_t begin = group * kGroup;
    const int count = int(begin + kGroup < scaling.vectors ? kGroup : scaling.vectors - begin);
    Bounds<T> bounds[kGroup];
    int x = 0;
    for (; x + 4 <= count && begin + x + 4 <= whole_vectors; x += 4)
      find_bounds<4, true>(rows, begin + x, bounds + x);
    for (; x < count; ++x) find_bounds<1, false>(rows, begin + x, bounds + x);
    scale_group(bounds, begin, count, scaling);
  }
}

// What packing finds out about a row beside its product.
template <class T>
struct RowCheck {
  Vec<T> low;   // the smallest variance, or 1
  Vec<T> zero;  // NaN where a variance is infinite or NaN
};

// Packs `count` vectors of a row and multiplies twice their variances into its product, in the
// order in which `add_vectors` multiplies those of two rows.
template <bool Whole, class T>
CWBR_INLINE void pack_group(const Rows<T>& rows, const Scaling<T>& scaling, int64_t row,
                            int64_t begin, int count, T* out, Sums<T>& sums, RowCheck<T>& check) {
  constexpr int N = kLanes<T>;
  const bool safe = scaling.safe[begin / kGroup];
  Vec<T> denominator = {};
  CWBR_UNROLL(8)
  for (int x = 0; x < count; ++x) {
    const int64_t vector = begin + x;
    const Vec<T> var = load_variance<Whole>(rows, row, vector);
    const Vec<T> w = var * load(scaling.var + N * vector), twice = w + w;
    store(out + 2 * N * vector,
          load_mean<Whole>(rows, row, vector) * load(scaling.mean + N * vector));
    store(out + 2 * N * vector + N, w);
    check.low = smaller(var, check.low);
    check.zero += var - var;
    denominator = x == 0 ? twice : denominator * twice;
    if (!safe) sums.multiply(twice);
  }
  if (safe) sums.multiply(denominator);
}

template <class T>
CWBR_INLINE void pack_row(const Rows<T>& rows, const Scaling<T>& scaling, int64_t row, T* out,
                          T* marks, Sums<T>& sums, RowCheck<T>& check) {
  const int64_t whole_vectors = rows.d / kLanes<T>;
  for (int64_t x = 0; x < scaling.vectors; x += kGroup) {
    if (x + kGroup <= whole_vectors)
      pack_group<true>(rows, scaling, row, x, kGroup, out, sums, check);
    else
      pack_group<false>(rows, scaling, row, x,
                        int(x + kGroup < scaling.vectors ? kGroup : scaling.vectors - x), out, sums,
                        check);
    const int64_t groups = x / kGroup + 1;
    if (groups % kCheckpoint == 0 && groups / kCheckpoint <= checkpoints(scaling.vectors))
      marks[groups / kCheckpoint - 1] = sum_lanes<T>(sums.exponents);
  }
}

template <class T>
void pack(const Rows<T>& rows, const Scaling<T>& scaling, int64_t first, int64_t count,
          const Panel<T>& panel) {
  constexpr int N = kLanes<T>;
  for (int64_t begin = 0; begin < count; begin += N) {
    Vec<T> products[N], exponents[N];
    T valid[N];
    for (int r = 0; r < N; ++r) {
      products[r] = broadcast(T(1));
      exponents[r] = Vec<T>{};
    }
    const int batch = int(begin + N < count ? N : count - begin);
    for (int r = 0; r < batch; ++r) {
      const int64_t row = first + begin + r < rows.k ? first + begin + r : rows.k - 1;
      auto sums = Sums<T>::zero();
      RowCheck<T> check = {broadcast(T(1)), Vec<T>{}};
      pack_row(rows, scaling, row, panel.values + (begin + r) * panel.stride,
               panel.checkpoints + (begin + r) * checkpoints(scaling.vectors), sums, check);
      valid[r] = all((check.low > T(0)) & (check.zero == T(0))) ? T(0) : T(NAN);
      products[r] = sums.product;
      exponents[r] = sums.exponents;
    }
    Vec<T> exponent_sum;
    const Vec<T> log =
        log_products<T>(products, exponents, exponent_sum) + load_first(valid, batch, T(0));
    store_first(panel.log + begin, batch, log);
    store_first(panel.exponent + begin, batch, exponent_sum);
  }
}

// Adds the fractions of `count` vectors of dimensions to the sums of R x C pairs. Not inlined: in a
// loop, the compiler would rather keep all addresses in registers than the fractions.
template <int R, int C, class T>
CWBR_INLINE void add_vectors(const T* i, int64_t stride_i, const T* j, int64_t stride_j, int count,
                             Sums<T>* sums) {
  constexpr int N = kLanes<T>;
  Vec<T> numerator[R][C] = {}, denominator[R][C] = {};
  CWBR_UNROLL(8)
  for (int x = 0; x < count; ++x) {
    Vec<T> mean_j[C], var_j[C];
    CWBR_UNROLL(4)
    for (int c = 0; c < C; ++c) {
      mean_j[c] = load(j + c * stride_j + 2 * N * x);
      var_j[c] = load(j + c * stride_j + 2 * N * x + N);
    }
    CWBR_UNROLL(4)
    for (int r = 0; r < R; ++r) {
      const Vec<T> mean_i = load(i + r * stride_i + 2 * N * x);
      const Vec<T> var_i = load(i + r * stride_i + 2 * N * x + N);
      CWBR_UNROLL(4)
      for (int c = 0; c < C; ++c) {
        const Vec<T> difference = mean_i - mean_j[c], s = var_i + var_j[c];
        const Vec<T> square = difference * difference;
        numerator[r][c] = x == 0 ? square : fma(numerator[r][c], s, square * denominator[r][c]);
        denominator[r][c] = x == 0 ? s : denominator[r][c] * s;
      }
    }
  }
  CWBR_UNROLL(4)
  for (int r = 0; r < R; ++r) {
    CWBR_UNROLL(4)
    for (int c = 0; c < C; ++c) sums[r * kTile + c].add(numerator[r][c], denominator[r][c]);
  }
}

template <int R, int C, class T>
CWBR_NOINLINE void add_group(const T* i, int64_t stride_i, const T* j, int64_t stride_j,
                             Sums<T>* sums) {
  add_vectors<R, C>(i, stride_i, j, stride_j, kGroup, sums);
}

template <int R, int C, class T>
CWBR_NOINLINE void add_part(const T* i, int64_t stride_i, const T* j, int64_t stride_j, int count,
                            Sums<T>* sums) {
  add_vectors<R, C>(i, stride_i, j, stride_j, count, sums);
}

// Whether every distance of the tile already exceeds `limit` after the groups up to a checkpoint:
// no later term is negative, and an exponent misses less than 1 of each lane's logarithm.
template <class T>
bool tile_exceeds(const Sums<T>* sums, const T* self_i, const T* self_j, int64_t marks,
                  int64_t rows_i, int64_t rows_j, T limit) {
  for (int64_t r = 0; r < rows_i; ++r)
    for (int64_t c = 0; c < rows_j; ++c) {
      const Sums<T>& pair = sums[r * kTile + c];
      const T log = sum_lanes<T>(pair.exponents) - (self_i[r * marks] + self_j[c * marks]) / 2;
      const T bound =
          sum_lanes<T>(pair.earlier + pair.quadratic) / 4 + T(kLog2) / 2 * (log - kLanes<T>);
      if (!(bound > limit)) return false;
    }
  return true;
}

template <class T>
void tile(const Panel<T>& panel_i, const Panel<T>& panel_j, const Scaling<T>& scaling,
          int64_t rows_i, int64_t rows_j, bool upper, T limit, T* distance) {
  constexpr int N = kLanes<T>, R = 2, C = 2;
  const int64_t marks = checkpoints(scaling.vectors);
  Sums<T> sums[kTile * kTile];
  for (auto& pair : sums) pair = Sums<T>::zero();
  for (int64_t x = 0; x < scaling.vectors; x += kGroup) {
    const int64_t left = scaling.vectors - x;
    const bool safe = scaling.safe[x / kGroup];
    for (int64_t r = 0; r < rows_i; r += R)
      for (int64_t c = upper ? r : 0; c < rows_j; c += C) {
        const T* i = panel_i.values + r * panel_i.stride + 2 * N * x;
        const T* j = panel_j.values + c * panel_j.stride + 2 * N * x;
        Sums<T>* pairs = sums + r * kTile + c;
        if (safe && left >= kGroup)
          add_group<R, C>(i, panel_i.stride, j, panel_j.stride, pairs);
        else if (safe)
          add_part<R, C>(i, panel_i.stride, j, panel_j.stride, int(left), pairs);
        else
          for (int64_t y = 0; y < left && y < kGroup; ++y)
            add_part<R, C>(i + 2 * N * y, panel_i.stride, j + 2 * N * y, panel_j.stride, 1, pairs);
      }
    const int64_t groups = x / kGroup + 1;
    if (groups % kFlush == 0)
      for (auto& pair : sums) pair.flush();
    if (limit >= 0 && !upper && groups % kCheckpoint == 0 && left > kGroup) {
      const int64_t mark = groups / kCheckpoint - 1;
      if (tile_exceeds(sums, panel_i.checkpoints + mark, panel_j.checkpoints + mark, marks, rows_i,
                       rows_j, limit)) {
        for (int p = 0; p < kTile * kTile; ++p) distance[p] = std::numeric_limits<T>::infinity();
        return;
      }
    }
  }
  T self_exponent[kTile * kTile] = {}, self_log[kTile * kTile] = {};
  for (int64_t r = 0; r < rows_i; ++r)
    for (int64_t c = 0; c < rows_j; ++c) {
      self_exponent[r * kTile + c] = (panel_i.exponent[r] + panel_j.exponent[c]) / 2;
      self_log[r * kTile + c] = (panel_i.log[r] + panel_j.log[c]) / 2;
    }
  for (int p = 0; p < kTile * kTile; p += N) {
    Vec<T> quadratics[N], products[N], exponents[N], exponent_sum;
    for (int l = 0; l < N; ++l) {
      quadratics[l] = sums[p + l].earlier + sums[p + l].quadratic;
      products[l] = sums[p + l].product;
      exponents[l] = sums[p + l].exponents;
    }
    const Vec<T> log = log_products<T>(products, exponents, exponent_sum) - load(self_log + p);
    const Vec<T> log_term = fma(exponent_sum - load(self_exponent + p), broadcast(T(kLog2)), log);
    const Vec<T> sum = fma(sum_each<T>(quadratics), broadcast(T(0.25)), log_term * T(0.5));
    store(distance + p, sum < T(0) ? Vec<T>{} : sum);
  }
}

// Sums over pairs, of one row and one vector of dimensions, each times the pair's gradient, with
// t = (mean_other - mean) / S and z = (w_other - w) / S.
template <class T>
struct RowGradient {
  Vec<T> t, z, t2;
};

// 1 / s[r] for each r; shared, by one reciprocal of the product of all four.
template <bool Shared, class T>
CWBR_INLINE void reciprocals(Vec<T>* s) {
  static_assert(kGradientRows == 4);
  if (Shared) {
    const Vec<T> first = s[0] * s[1], second = s[2] * s[3], all = reciprocal(first * second);
    const Vec<T> by_first = all * second, by_second = all * first;
    const Vec<T> r0 = by_first * s[1], r1 = by_first * s[0];
    const Vec<T> r2 = by_second * s[3], r3 = by_second * s[2];
    s[0] = r0, s[1] = r1, s[2] = r2, s[3] = r3;
  } else {
    CWBR_UNROLL(4)
    for (int r = 0; r < kGradientRows; ++r) s[r] = reciprocal(s[r]);
  }
}

// The pairs of kGradientRows rows i with rows j in [first, last). moments holds mean and w of each
// row; grad is (j, kGradientRows).
template <bool Shared, class T>
CWBR_INLINE void gradient_rows(const Vec<T>* moments_i, RowGradient<T>* sums_i,
                               const Vec<T>* moments_j, RowGradient<T>* sums_j, const T* grad,
                               int64_t first, int64_t last) {
  RowGradient<T> i[kGradientRows];
  CWBR_UNROLL(4)
  for (int r = 0; r < kGradientRows; ++r) i[r] = sums_i[r];
  for (int64_t j = first; j < last; ++j) {
    const Vec<T> mean = moments_j[2 * j], w = moments_j[2 * j + 1];
    RowGradient<T> sum = sums_j[j];
    Vec<T> r[kGradientRows];
    CWBR_UNROLL(4)
    for (int k = 0; k < kGradientRows; ++k) r[k] = w + moments_i[2 * k + 1];
    reciprocals<Shared, T>(r);
    CWBR_UNROLL(4)
    for (int k = 0; k < kGradientRows; ++k) {
      const Vec<T> g = broadcast(grad[j * kGradientRows + k]);
      const Vec<T> t = (mean - moments_i[2 * k]) * r[k], z = (w - moments_i[2 * k + 1]) * r[k];
      const Vec<T> t2 = t * t;
      i[k].t = fma(g, t, i[k].t);
      i[k].z = fma(g, z, i[k].z);
      i[k].t2 = fma(g, t2, i[k].t2);
      sum.t = fnma(g, t, sum.t);
      sum.z = fnma(g, z, sum.z);
      sum.t2 = fma(g, t2, sum.t2);
    }
    sums_j[j] = sum;
  }
  CWBR_UNROLL(4)
  for (int r = 0; r < kGradientRows; ++r) sums_i[r] = i[r];
}

// Reads one vector of dimensions of rows [first, first + count), padded with copies of the last to
// a multiple of kGradientRows. Returns whether four sums of them can share a reciprocal.
template <bool Whole, class T>
bool load_moments(const Rows<T>& rows, const Scaling<T>& scaling, int64_t first, int64_t count,
                  int64_t vector, Vec<T>* moments) {
  const Vec<T> mean_scale = load(scaling.mean + vector * kLanes<T>);
  const Vec<T> var_scale = load(scaling.var + vector * kLanes<T>);
  Vec<T> low = broadcast(T(1)), high = low;
  const int64_t padded = (count + kGradientRows - 1) / kGradientRows * kGradientRows;
  for (int64_t r = 0; r < padded; ++r) {
    const int64_t row = first + (r < count ? r : count - 1);
    moments[2 * r] = load_mean<Whole>(rows, row, vector) * mean_scale;
    moments[2 * r + 1] = load_variance<Whole>(rows, row, vector) * var_scale;
    low = smaller(moments[2 * r + 1], low);
    high = larger(moments[2 * r + 1], high);
  }
  constexpr T bound = sizeof(T) == 4 ? T(0x1p-24) : T(0x1p-250);
  return all((low > bound) & (high < 1 / bound));
}

// Adds the sums of rows [first, first + count) to the gradients:
// dD/dmean = -t/2 and dD/dw = -(z/w + t^2)/4, scaled back.
template <bool Whole, class T>
void store_gradients(const Rows<T>& rows, const Scaling<T>& scaling, int64_t first, int64_t count,
                     int64_t vector, const Vec<T>* moments, const RowGradient<T>* sums,
                     T* grad_mean, T* grad_var) {
  const Vec<T> mean_scale = load(scaling.mean + vector * kLanes<T>) * T(-0.5);
  const Vec<T> var_scale = load(scaling.var + vector * kLanes<T>) * T(-0.25);
  const int64_t left = rows.d - vector * kLanes<T>;
  for (int64_t r = 0; r < count; ++r) {
    const Vec<T> by_mean = sums[r].t * mean_scale;
    const Vec<T> by_var = fma(sums[r].z, reciprocal(moments[2 * r + 1]), sums[r].t2) * var_scale;
    T* mean = grad_mean + (first + r) * rows.d + vector * kLanes<T>;
    T* var = grad_var + (first + r) * rows.d + vector * kLanes<T>;
    if (Whole || left >= kLanes<T>) {
      store(mean, load(mean) + by_mean);
      store(var, load(var) + by_var);
    } else {
      store_first(mean, left, load_first(mean, left, T(0)) + by_mean);
      store_first(var, left, load_first(var, left, T(0)) + by_var);
    }
  }
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

// Where the sums of a block are kept.
template <class T>
struct GradientWork {
  Vec<T>*moments_i, *moments_j;  // of diagonal blocks, the same
  RowGradient<T>*sums_i, *sums_j;
};

template <bool Whole, class T>
CWBR_INLINE void gradient_vector(const Rows<T>& rows, const Scaling<T>& scaling,
                                 const GradientBlock<T>& block, int64_t vector,
                                 const GradientWork<T>& work, T* grad_mean, T* grad_var) {
  constexpr int64_t block_j = 64;  // rows j whose moments and sums stay in the first-level cache
  const auto& [first_i, rows_i, first_j, rows_j] = block.rows;
  const bool diagonal = first_i == first_j;
  bool shared = load_moments<Whole>(rows, scaling, first_i, rows_i, vector, work.moments_i);
  if (!diagonal)
    shared &= load_moments<Whole>(rows, scaling, first_j, rows_j, vector, work.moments_j);
  const RowGradient<T> none = {Vec<T>{}, Vec<T>{}, Vec<T>{}};
  for (int64_t r = 0; r < rows_i + kGradientRows - 1; ++r) work.sums_i[r] = none;
  for (int64_t r = 0; r < rows_j; ++r) work.sums_j[r] = none;
  for (int64_t j = 0; j < rows_j; j += block_j) {
    const int64_t last_j = j + block_j < rows_j ? j + block_j : rows_j;
    for (int64_t i = 0; i < rows_i && (!diagonal || i < last_j); i += kGradientRows) {
      const int64_t from_j = diagonal && i > j ? i : j;
      if (!any_nonzero(block, i, from_j, last_j)) continue;
      const auto add = shared ? gradient_rows<true, T> : gradient_rows<false, T>;
      add(work.moments_i + 2 * i, work.sums_i + i, work.moments_j, work.sums_j,
          block.grad + i * rows_j, from_j, last_j);
    }
  }
  store_gradients<Whole>(rows, scaling, first_i, rows_i, vector, work.moments_i, work.sums_i,
                         grad_mean, grad_var);
  store_gradients<Whole>(rows, scaling, first_j, rows_j, vector, work.moments_j, work.sums_j,
                         grad_mean, grad_var);
}

template <class T>
void gradient(const Rows<T>& rows, const Scaling<T>& scaling, const GradientBlock<T>& block,
              int64_t first, int64_t last, T* work, T* grad_mean, T* grad_var) {
  const int64_t padded = block.rows.count_i + kGradientRows - 1;
  auto* moments_i = reinterpret_cast<Vec<T>*>(work);
  auto* sums_i = reinterpret_cast<RowGradient<T>*>(moments_i + 2 * padded);
  auto* moments_j = reinterpret_cast<Vec<T>*>(sums_i + padded);
  const int64_t padded_j = block.rows.count_j + kGradientRows - 1;
  auto* sums_j = reinterpret_cast<RowGradient<T>*>(moments_j + 2 * padded_j);
  const bool diagonal = block.rows.first_i == block.rows.first_j;
  const GradientWork<T> parts = {moments_i, diagonal ? moments_i : moments_j, sums_i, sums_j};
  for (int64_t vector = first; vector < last; ++vector)
    if ((vector + 1) * kLanes<T> <= rows.d)
      gradient_vector<true>(rows, scaling, block, vector, parts, grad_mean, grad_var);
    else
      gradient_vector<false>(rows, scaling, block, vector, parts, grad_mean, grad_var);
}

}  // namespace cwbr::CWBR_ISA
