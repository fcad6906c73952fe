#include <algorithm>

#include "cpu/isa_batch_table.h"
#include "cpu/kernels.h"
#include "harness.h"

using namespace cwbr;

namespace {

struct Case {
  const char* name;
  int64_t batch, dims, columns, classes, min_count, top_m;
};
constexpr Case kCases[] = {
    {"odd", 37, 131, 53, 9, 2, 11},
    {"one dimension", 16, 1, 1, 1, 2, 3},
    {"singletons", 12, 33, 400, 400, 2, 8},
    {"padding", 40, 17, 20, 3, 2, 500},
    {"empty", 0, 5, 4, 3, 2, 4},
    {"no columns", 9, 0, 7, 3, 1, 4},
    {"slices", 300, 1500, 700, 60, 2, 200},
    {"no pairs", 20, 9, 9, 5, 3, 0},
};
constexpr double kEps = 1e-6;

// Everything that the kernels make from one random batch.
template <class T>
struct Results {
  Array<int64_t> order, offsets, classes, pairs;
  Array<T> weights, mean, var, distance, grad_z, value;
  Array<T> grad_features;
};

template <class In>
In from_double(double x) {
  return static_cast<In>(x);
}
// Exact for the few bits that the tests use.
template <>
BFloat16 from_double<BFloat16>(double x) {
  const float value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {static_cast<uint16_t>(bits >> 16)};
}

double to_double(double x) { return x; }
double to_double(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class In>
constexpr ElementType kType = ElementType::kFloat;
template <>
constexpr ElementType kType<double> = ElementType::kDouble;
template <>
constexpr ElementType kType<BFloat16> = ElementType::kBFloat16;

template <class In>
Array<In> inputs(int64_t size, unsigned seed, double scale) {
  Array<In> values;
  for (const double x : random_normal<double>(size, seed, scale)) {
    values.push_back(from_double<In>(x));
  }
  return values;
}

template <class In, class T = accumulate_t<In>>
Results<T> run(const Case& c, const Array<In>& z, const Array<In>& logits,
               const Array<int64_t>& targets) {
  const int64_t groups = c.batch / c.min_count;
  const int64_t m = std::min(c.top_m, groups * (groups - 1) / 2);
  Results<T> r;
  r.order.resize(c.batch);
  r.offsets.resize(groups + 1);
  r.classes.resize(groups);
  r.pairs.resize(2 * m);
  r.weights.resize(m);
  plan(Cpu(), Matrix<const In>{logits.data(), c.batch, c.columns, c.columns}, targets.data(),
       c.min_count, m, r.order.data(), r.offsets.data(), r.classes.data(), r.pairs.data(),
       r.weights.data());

  const Groups all{r.order.data(), r.offsets.data(), groups, c.batch};
  const Matrix<const In> features{z.data(), c.batch, c.dims, c.dims};
  for (Array<T>* a : {&r.mean, &r.var}) a->resize(groups * c.dims);
  class_moments(Cpu(), features, all, kEps, r.mean.data(), r.var.data());
  Array<In> grad_z(c.batch * c.dims), grad_features(c.batch * c.dims);
  class_moments_backward(Cpu(), r.var.data(), r.mean.data(), features, r.mean.data(), r.var.data(),
                         all, kEps, grad_z.data());

  const std::vector<Layer<T>> layers = {
      {kType<In>, z.data(), c.dims, c.dims, nullptr, nullptr, grad_features.data()}};
  const WeightedPairs<T> pairs{{r.pairs.data(), m}, r.weights.data()};
  const T one = 1;
  for (const bool log : {false, true}) {
    Array<T> distance(m);
    r.value.push_back(0);
    regularizer(Cpu(), layers, all, pairs, kEps, log, distance.data(), &r.value.back());
    regularizer_backward(Cpu(), &one, layers, all, pairs, kEps, log, distance.data());
    r.distance = distance;
    for (const In g : grad_features) r.grad_features.push_back(to_double(g));
  }
  for (const In g : grad_z) r.grad_z.push_back(to_double(g));
  return r;
}

// Moments of every group, and distances of the pairs of positive weight, by their definitions.
template <class In, class T>
void expect_definitions(const Case& c, const Array<In>& z, const Results<T>& r, double tolerance) {
  const int64_t groups = c.batch / c.min_count;
  Array<double> mean(groups * c.dims), var(groups * c.dims), distance(r.distance.size());
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t first = r.offsets[k], last = r.offsets[k + 1],
                  n = std::max<int64_t>(1, last - first);
    for (int64_t d = 0; d < c.dims; ++d) {
      double &mu = mean[k * c.dims + d], &v = var[k * c.dims + d];
      for (int64_t s = first; s < last; ++s) mu += to_double(z[r.order[s] * c.dims + d]) / n;
      for (int64_t s = first; s < last; ++s) {
        v += std::pow(to_double(z[r.order[s] * c.dims + d]) - mu, 2) / n;
      }
      v = std::max(v, kEps);
    }
  }
  expect_near(c.name, r.mean, mean, tolerance);
  expect_near(c.name, r.var, var, tolerance);
  for (size_t p = 0; p < distance.size(); ++p) {
    if (r.weights[p] == 0) continue;
    for (int64_t d = 0; d < c.dims; ++d) {
      const int64_t i = r.pairs[2 * p] * c.dims + d, j = r.pairs[2 * p + 1] * c.dims + d;
      const double u = var[i] + kEps, w = var[j] + kEps, s = (u + w) / 2;
      distance[p] += std::pow(mean[i] - mean[j], 2) / (8 * s) + std::log(s) / 2 - std::log(u) / 4 -
                     std::log(w) / 4;
    }
  }
  expect_near(c.name, r.distance, distance, 20 * tolerance);
}

template <class T>
void expect_same_results(const char* name, const Results<T>& a, const Results<T>& b) {
  expect_same_bits(name, a.order, b.order);
  expect_same_bits(name, a.pairs, b.pairs);
  for (auto field :
       {&Results<T>::weights, &Results<T>::mean, &Results<T>::var, &Results<T>::distance,
        &Results<T>::grad_z, &Results<T>::value, &Results<T>::grad_features}) {
    expect_same_bits(name, a.*field, b.*field);
  }
}

template <class In>
void test_input_type(double tolerance) {
  for (const Case& c : kCases) {
    const Array<In> z = inputs<In>(c.batch * c.dims, 1, 1);
    const Array<In> logits = inputs<In>(c.batch * c.columns, 2, 3);
    Array<int64_t> targets(c.batch);
    std::mt19937 generator(3);
    for (int64_t& y : targets) y = generator() % std::min(c.classes, c.columns);
    thread_count = 1;
    const auto expected = run(c, z, logits, targets);
    expect_definitions(c, z, expected, tolerance);
    for (thread_count = 2; thread_count <= 5; thread_count += 3) {
      expect_same_results(c.name, run(c, z, logits, targets), expected);
    }
  }
}

// Every float32 exponential that softmax can meet, through the one loop that gathers them.
void test_exponential_is_within_two_units() {
  const auto& loops = batch_loops<float>();
  double worst = 0;
  for (float x = 0; x > -87; x -= 0.00137f) {
    const float logits[1] = {x};
    const int64_t column = 0;
    float result = 0;
    loops.add_probabilities(logits, {0, 1}, &column, 1, &result);
    const double truth = std::exp(static_cast<double>(x));
    const float rounded = static_cast<float>(truth);
    const double unit = std::nextafter(rounded, 2.0f) - static_cast<double>(rounded);
    worst = std::max(worst, std::abs(result - truth) / unit);
  }
  if (!(worst <= 2)) fail("exp", "error in units in the last place", worst, 2);
}

}  // namespace

void test_batch_kernels() {
  test_input_type<double>(1e-12);
  test_input_type<float>(2e-6);
  test_input_type<BFloat16>(2e-6);
  test_exponential_is_within_two_units();
}
