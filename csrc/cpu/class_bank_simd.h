// The loops of the class bank for one instruction set; batch_loops_simd.h comes first.

namespace cwbr::CWBR_ISA {

// Bit l: whether a[l] > b[l].
#if defined(CWBR_AVX512)
CWBR_INLINE unsigned greater_lanes(Floats a, Floats b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}
CWBR_INLINE unsigned greater_lanes(Doubles a, Doubles b) {
  return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ);
}
#elif defined(CWBR_AVX2)
CWBR_INLINE unsigned greater_lanes(Floats a, Floats b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
CWBR_INLINE unsigned greater_lanes(Doubles a, Doubles b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GT_OQ));
}
#else
template <class V>
CWBR_INLINE unsigned greater_lanes(V a, V b) {
  unsigned bits = 0;
  for (unsigned l = 0; l < sizeof(a) / sizeof(a[0]); ++l) bits |= unsigned(a[l] > b[l]) << l;
  return bits;
}
#endif

// The `size` largest of the values offered so far: falling, the earlier first among equals.
template <class T>
struct TopList {
  int64_t size;
  int64_t* index;
  T* value;
  int64_t count = 0;
  // A value has a place if it is greater than this.
  T threshold = size > 0 ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();

  CWBR_INLINE void insert(int64_t i, T x) {
    int64_t at = count < size ? count++ : size - 1;
    for (; at > 0 && value[at - 1] < x; --at) {
      value[at] = value[at - 1];
      index[at] = index[at - 1];
    }
    value[at] = x;
    index[at] = i;
    if (count == size) threshold = value[size - 1];
  }
};

template <class In, class T = accumulate_t<In>>
CWBR_INLINE T input_at(const In* x, int64_t i) {
  return load_input_first(x + i, 1, T(0))[0];
}

// The candidates of a block are looked for only where its maximum has a place in the list; then a
// comparison for each vector finds the few that have.
template <class In, class T>
T top_confusions(const In* logits, int64_t n, int64_t own_class, const bool* seen, int64_t top,
                 int64_t* index, T* weight) {
  constexpr int lanes = kLanes<T>;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  TopList<T> list{top, index, weight};
  const auto search = [&](int64_t first, int64_t last, T largest) CWBR_LAMBDA_INLINE {
    if (!(largest > list.threshold)) return;
    for (int64_t c = first; c < last; c += lanes) {
      const Vec<T> x = last - c >= lanes ? load_input(logits + c)
                                         : load_input_first(logits + c, last - c, -infinity);
      unsigned above = greater_lanes(x, broadcast(list.threshold));
      if (above == 0) continue;
      T values[lanes];
      store(values, x);
      for (; above != 0; above &= above - 1) {
        const int lane = __builtin_ctz(above);
        const int64_t i = c + lane;
        if (values[lane] > list.threshold && seen[i] && i != own_class)
          list.insert(i, values[lane]);
      }
    }
  };
  const SoftmaxStatistics<T> softmax = visit_softmax<In, T>(logits, n, search);
  const auto probability = [&](T x) { return std::exp(x - softmax.max) / softmax.sum; };
  // The sum is NaN where a logit is NaN or infinity.
  const int64_t found = softmax.sum == softmax.sum ? list.count : 0;
  for (int64_t j = 0; j < found; ++j) weight[j] = probability(weight[j]);
  for (int64_t j = found; j < top; ++j) {
    weight[j] = 0;
    index[j] = -1;
  }

  const T own = input_at(logits, own_class);
  if (softmax.max < infinity) return probability(own);
  bool nan = own == infinity;
  for (int64_t c = 0; c < n; ++c) {
    const T x = input_at(logits, c);
    nan |= x != x;
  }
  return nan ? std::numeric_limits<T>::quiet_NaN() : T(0);
}

// Classes whose distances are summed lane by lane at a time.
constexpr int kTogether = 8;

// Adds to the lanes of the distances of some columns, and of the squares of their gradient, which
// it writes; the classes before `first` have left theirs there.
template <class In, int Vectors, bool Whole, class T>
CWBR_INLINE void column_attraction(Columns<In, Vectors, Whole> columns, const In* z, const T* mean,
                                   const T* inverse_var, int64_t dims, const ActingRows<T>& acting,
                                   int64_t first, int64_t last, T unit, T* gradient,
                                   Vec<T>* distances, Vec<T>& squares) {
  Vec<T> x[Vectors], inverse[Vectors], pull[Vectors] = {};
  for (int v = 0; v < Vectors; ++v) x[v] = columns.input(z, v);
  for (int v = 0; v < Vectors; ++v) inverse[v] = columns.values(inverse_var, v);
  for (int64_t j = first; j < last; ++j) {
    const T* row = mean + acting.index[j] * dims;
    Vec<T> distance = distances[j - first];
    for (int v = 0; v < Vectors; ++v) {
      const Vec<T> difference = x[v] - columns.values(row, v);
      pull[v] += difference * acting.coefficient[j];
      distance = fma(difference * difference, inverse[v], distance);
    }
    distances[j - first] = distance;
  }
  for (int v = 0; v < Vectors; ++v) {
    Vec<T> sum = pull[v] * inverse[v] * unit;
    if (first > 0) sum += columns.values(gradient, v);
    columns.put(gradient, v, sum);
    squares = fma(sum, sum, squares);
  }
}

template <class In, class T>
T class_attraction(const In* z, const T* mean, const T* inverse_var, int64_t dims,
                   ActingRows<T> acting, T unit, T* gradient) {
  Vec<T> squares = {};
  for (int64_t first = 0; first == 0 || first < acting.count; first += kTogether) {
    const int64_t last = acting.count - first < kTogether ? acting.count : first + kTogether;
    Vec<T> distances[kTogether] = {};
    squares = Vec<T>{};
    for_each_column<In>(dims, [&](auto columns) CWBR_LAMBDA_INLINE {
      column_attraction(columns, z, mean, inverse_var, dims, acting, first, last, unit, gradient,
                        distances, squares);
    });
    for (int64_t j = first; j < last; ++j) acting.distance[j] = sum_lanes<T>(distances[j - first]);
  }
  return sum_lanes<T>(squares);
}

// Calls body(columns, v) for each vector of columns.
template <class In, class Body>
CWBR_INLINE void for_each_vector(int64_t width, Body body) {
  for_each_column<In>(
      width, [&]<int Vectors, bool Whole>(Columns<In, Vectors, Whole> columns) CWBR_LAMBDA_INLINE {
        for (int v = 0; v < Vectors; ++v) body(columns, v);
      });
}

template <class In, class T>
T second_moments(const T* mean, const T* var, int64_t dims) {
  Vec<T> sum = {};
  for_each_vector<In>(dims, [&](auto columns, int v) CWBR_LAMBDA_INLINE {
    const Vec<T> m = columns.values(mean, v);
    sum += fma(m, m, columns.values(var, v));
  });
  return sum_lanes<T>(sum);
}

template <class In, class T>
void add_scatter(T share, const T* bank_mean, const T* mean, const T* var, int64_t n, T* sum) {
  for_each_vector<In>(n, [&](auto columns, int v) CWBR_LAMBDA_INLINE {
    const Vec<T> difference = columns.values(mean, v) - columns.values(bank_mean, v);
    const Vec<T> square = fma(difference, difference, columns.values(var, v));
    columns.put(sum, v, fma(broadcast(share), square, columns.values(sum, v)));
  });
}

template <class In, class T>
void move_towards(T rate, const T* target, int64_t n, T* mean) {
  for_each_vector<In>(n, [&](auto columns, int v) CWBR_LAMBDA_INLINE {
    const Vec<T> from = columns.values(mean, v);
    columns.put(mean, v, fma(broadcast(rate), columns.values(target, v) - from, from));
  });
}

}  // namespace cwbr::CWBR_ISA
