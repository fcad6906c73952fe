#include <algorithm>
#include <array>
#include <limits>
#include <memory>

#include "cpu/kernels.h"
#include "harness.h"

using namespace cwbr;

namespace {

// top < classes; with `ties` logits are whole numbers.
struct Case {
  const char* name;
  int64_t batch, classes, dims, top;
  bool ties;
};
constexpr Case kCases[] = {
    {"odd", 37, 53, 131, 5, false},       {"one class", 9, 1, 7, 0, false},
    {"one dimension", 5, 2, 1, 1, false}, {"no samples", 0, 8, 8, 3, false},
    {"all others", 6, 40, 17, 39, true},  {"blocks", 70, 3001, 700, 7, true},
};

template <class T>
struct Results {
  Array<int64_t> index;
  Array<T> weight, own, energy, right, nearest, squares, gradient;
};

// The columns of two layers, of which the first is the wider one.
template <class T>
std::vector<Array<T>> split(const Array<T>& matrix, int64_t dims) {
  const int64_t middle = (dims + 1) / 2;
  std::vector<Array<T>> parts(2);
  for (size_t i = 0; i < matrix.size(); ++i)
    parts[static_cast<int64_t>(i) % dims >= middle].push_back(matrix[i]);
  return parts;
}

template <class M>
std::vector<Bank<M>> layers_of(std::vector<Array<std::remove_const_t<M>>>& means,
                               std::vector<Array<std::remove_const_t<M>>>& counts, int64_t classes,
                               int64_t dims) {
  const int64_t middle = (dims + 1) / 2;
  return {{means[0].data(), counts[0].data(), classes, middle, 0},
          {means[1].data(), counts[1].data(), classes, dims - middle, middle}};
}

template <class T>
Results<T> run(const Case& c, const Array<T>& logits, const Array<int64_t>& targets,
               const bool* seen, const Array<T>& z, const Array<T>& mean, const Array<T>& var) {
  Results<T> r;
  r.index.resize(c.batch * c.top);
  r.weight.resize(c.batch * c.top);
  r.own.resize(c.batch);
  for (auto* numbers : {&r.energy, &r.nearest, &r.right, &r.squares}) numbers->resize(2 * c.batch);
  r.gradient.resize(c.batch * c.dims);
  top_confusions(Cpu(), Matrix<const T>{logits.data(), c.batch, c.classes, c.classes},
                 targets.data(), seen, c.top, r.index.data(), r.weight.data(), r.own.data());
  std::vector<Array<T>> means = split(mean, c.dims), counts(2);
  class_attraction(Cpu(), Matrix<const T>{z.data(), c.batch, c.dims, c.dims},
                   layers_of<const T>(means, counts, c.classes, c.dims), var.data(),
                   std::array<T, 2>{T(0.5), 2}.data(),
                   Acting<T>{targets.data(), nullptr, r.own.data(), r.index.data(), r.weight.data(),
                             seen, 1, c.top, 1},
                   Attraction<T>{r.energy.data(), r.nearest.data(), r.right.data(),
                                 r.squares.data(), r.gradient.data()});
  return r;
}

// What acts on sample b at the columns [first, last) of layer l: its class, then its rivals.
template <class T>
void define_attraction(const Case& c, int64_t b, int64_t l, const Array<int64_t>& acting,
                       const Array<T>& z, const Array<T>& mean, const Array<T>& var,
                       Results<double>& r) {
  const int64_t middle = (c.dims + 1) / 2, first = l * middle, last = l == 0 ? middle : c.dims;
  double energy = 0, own = 0, rival = std::numeric_limits<double>::infinity(), squares = 0;
  for (size_t j = 0; j < acting.size(); ++j) {
    const double coefficient = j == 0 ? 1 : -r.weight[b * c.top + j - 1];
    double distance = 0;
    for (int64_t d = first; d < last; ++d) {
      const double x = z[b * c.dims + d], difference = x - mean[acting[j] * c.dims + d];
      distance += difference * difference / var[d];
      r.gradient[b * c.dims + d] += (l == 0 ? 0.5 : 2) * coefficient * difference / var[d];
    }
    energy += coefficient * distance / 2;
    (j == 0 ? own : rival) = j == 0 ? distance : std::min(rival, distance);
  }
  for (int64_t d = first; d < last; ++d) squares += std::pow(r.gradient[b * c.dims + d], 2);
  r.energy.push_back(last > first ? energy / (last - first) : 0);
  r.squares.push_back(squares);
  r.nearest.push_back(acting.size() > 1 && own < rival);
}

// The candidates of each row by falling logit, sorted in full; their probabilities and attraction.
template <class T>
Results<double> definitions(const Case& c, const Array<T>& logits, const Array<int64_t>& targets,
                            const bool* seen, const Array<T>& z, const Array<T>& mean,
                            const Array<T>& var) {
  Results<double> r;
  r.gradient.resize(c.batch * c.dims);
  for (int64_t b = 0; b < c.batch; ++b) {
    const T* row = logits.data() + b * c.classes;
    Array<int64_t> order;
    double total = 0;
    for (int64_t i = 0; i < c.classes; ++i) {
      total += std::exp(static_cast<double>(row[i]));
      if (seen[i] && i != targets[b]) order.push_back(i);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return row[i] > row[j]; });
    r.own.push_back(std::exp(static_cast<double>(row[targets[b]])) / total);
    order.resize(c.top, -1);
    for (const int64_t i : order) {
      r.index.push_back(i);
      r.weight.push_back(i < 0 ? 0 : std::exp(static_cast<double>(row[i])) / total);
    }
  }
  for (int64_t l = 0; l < 2; ++l) {
    for (int64_t b = 0; b < c.batch; ++b) {
      Array<int64_t> acting;
      bool right = true;
      if (seen[targets[b]]) acting.push_back(targets[b]);
      for (int64_t at = b * c.top; at < (b + 1) * c.top && r.index[at] >= 0; ++at) {
        right = right && r.own[b] > r.weight[at];
        if (!acting.empty()) acting.push_back(r.index[at]);
      }
      define_attraction(c, b, l, acting, z, mean, var, r);
      r.right.push_back(right);
    }
  }
  return r;
}

template <class T>
void test_type(double tolerance) {
  for (const Case& c : kCases) {
    Array<T> logits = random_normal<T>(c.batch * c.classes, 1, 2);
    if (c.ties)
      std::transform(logits.begin(), logits.end(), logits.begin(),
                     [](T x) { return std::round(x); });
    const Array<T> z = random_normal<T>(c.batch * c.dims, 2),
                   mean = random_normal<T>(c.classes * c.dims, 3);
    Array<T> var = random_normal<T>(c.dims, 4);
    for (T& v : var) v = v * v + T(0.1);
    std::mt19937 generator(5);
    Array<int64_t> targets(c.batch);
    for (int64_t& y : targets) y = generator() % c.classes;
    const std::unique_ptr<bool[]> seen(new bool[c.classes]);
    for (int64_t i = 0; i < c.classes; ++i) seen[i] = generator() % 3 > 0;

    thread_count = 1;
    const Results<T> expected = run(c, logits, targets, seen.get(), z, mean, var);
    const Results<double> truth = definitions(c, logits, targets, seen.get(), z, mean, var);
    expect_same_bits(c.name, expected.index, truth.index);
    expect_near(c.name, expected.weight, truth.weight, tolerance);
    expect_near(c.name, expected.own, truth.own, tolerance);
    expect_near(c.name, expected.energy, truth.energy, tolerance);
    expect_near(c.name, expected.gradient, truth.gradient, tolerance);
    expect_near(c.name, expected.squares, truth.squares, 4 * tolerance);
    expect_near(c.name, expected.right, truth.right, 0);
    expect_near(c.name, expected.nearest, truth.nearest, 0);
    for (thread_count = 2; thread_count <= 5; thread_count += 3) {
      const Results<T> results = run(c, logits, targets, seen.get(), z, mean, var);
      expect_same_bits(c.name, results.index, expected.index);
      for (auto field :
           {&Results<T>::weight, &Results<T>::own, &Results<T>::energy, &Results<T>::nearest,
            &Results<T>::right, &Results<T>::squares, &Results<T>::gradient}) {
        expect_same_bits(c.name, results.*field, expected.*field);
      }
    }
  }
}

// What a batch writes into a bank of which every third class is new; class 1 of the batch is left
// out, class 2 has moments too large to square.
template <class T>
struct Learned {
  Array<T> mean, count, var, updates, weight, metric;
};

struct BankCase {
  const char* name;
  int64_t classes, groups, dims;
};
constexpr BankCase kBankCases[] = {{"bank of odd size", 53, 37, 131},
                                   {"bank of one dimension", 9, 9, 1},
                                   {"bank without a batch", 8, 0, 17},
                                   {"bank without dimensions", 5, 4, 0},
                                   {"bank of many slices", 300, 200, 1100}};
constexpr double kMomentum = 0.9, kFloor = 1e-3, kMeanMomentum = 0.7;

template <class T>
struct BankInput {
  Learned<T> bank;
  Array<int64_t> rows;
  Array<T> size, mean, var;

  explicit BankInput(const BankCase& c) {
    bank.mean = random_normal<T>(c.classes * c.dims, 1);
    for (int64_t i = 0; i < c.classes; ++i) bank.count.push_back(i % 3);
    bank.var = random_normal<T>(c.dims, 2);
    for (T& v : bank.var) v *= v;
    bank.updates = {3};
    for (int64_t k = 0; k < c.groups; ++k) {
      rows.push_back(k == 1 ? -1 : c.classes - 1 - k);
      size.push_back(k % 4);
    }
    mean = random_normal<T>(c.groups * c.dims, 3);
    var = random_normal<T>(c.groups * c.dims, 4);
    for (T& v : var) v *= v;
    for (int64_t d = 0; d < c.dims && c.groups > 2; ++d)
      mean[2 * c.dims + d] = std::numeric_limits<T>::max() / 8;
  }

  // The same batch at two layers of these columns.
  Learned<T> learn(const BankCase& c) const {
    Learned<T> r = bank;
    r.weight.resize(2 * c.groups);
    r.metric.resize(c.dims);
    T unit[2], updates[2] = {r.updates[0], r.updates[0]};
    std::vector<Array<T>> means = split(r.mean, c.dims), counts(2, r.count);
    const std::vector<Bank<T>> layers = layers_of<T>(means, counts, c.classes, c.dims);
    std::vector<Observed<T>> observed;
    for (int l = 0; l < 2; ++l) {
      const Bank<T>& layer = layers[l];
      observed.push_back(
          {{layer.mean, layer.count, layer.classes, layer.dims, layer.first},
           {r.var.data() + layer.first, updates + l, r.metric.data() + layer.first, unit + l}});
    }
    BatchClasses<T> batch{rows.data(), size.data(), mean.data(), var.data(), c.groups, c.dims};
    observe_classes(Cpu(), observed, batch, kMomentum, kFloor, r.weight.data());
    batch.weight = r.weight.data();
    follow_classes(Cpu(), layers, batch, kMeanMomentum);
    Array<T> first = counts[0];
    r.count.swap(first);
    r.updates = {updates[0]};
    for (int64_t i = 0, at[2] = {0, 0}; i < std::ssize(r.mean); ++i) {
      const bool second = i % c.dims >= (c.dims + 1) / 2;
      r.mean[i] = means[second][at[second]++];
    }
    r.weight.resize(c.groups);
    return r;
  }

  Learned<double> definition(const BankCase& c) const {
    Learned<double> r;
    r.mean.assign(bank.mean.begin(), bank.mean.end());
    r.count.assign(bank.count.begin(), bank.count.end());
    r.var.assign(bank.var.begin(), bank.var.end());
    r.updates.assign(bank.updates.begin(), bank.updates.end());
    Array<double> scatter(c.dims);
    double total = 0;
    for (int64_t k = 0; k < c.groups; ++k) {
      const bool used = rows[k] >= 0 && (k != 2 || c.dims == 0);
      r.weight.push_back(used ? static_cast<double>(size[k]) : 0);
      if (r.weight[k] == 0 || r.count[rows[k]] == 0) continue;
      total += r.weight[k];
      for (int64_t d = 0; d < c.dims; ++d) {
        const double move = mean[k * c.dims + d] - r.mean[rows[k] * c.dims + d];
        scatter[d] += r.weight[k] * (move * move + var[k * c.dims + d]);
      }
    }
    if (total > 0) r.updates[0] += 1;
    const double pace = std::max(1 / r.updates[0], 1 - kMomentum);
    const int64_t middle = (c.dims + 1) / 2;
    double level[2] = {0, 0};
    for (int64_t d = 0; d < c.dims; ++d) {
      if (total > 0) r.var[d] += pace * (scatter[d] / total - r.var[d]);
      level[d >= middle] += r.var[d] / (d < middle ? middle : c.dims - middle);
    }
    for (int64_t d = 0; d < c.dims; ++d) r.metric.push_back(r.var[d] + kFloor * level[d >= middle]);
    for (int64_t k = 0; k < c.groups; ++k) {
      if (r.weight[k] == 0) continue;
      double& count = r.count[rows[k]];
      count += r.weight[k];
      const double rate = std::max(r.weight[k] / count, 1 - kMeanMomentum);
      for (int64_t d = 0; d < c.dims; ++d) {
        double& center = r.mean[rows[k] * c.dims + d];
        center += rate * (mean[k * c.dims + d] - center);
      }
    }
    return r;
  }
};

template <class T>
void test_learning(double tolerance) {
  for (const BankCase& c : kBankCases) {
    const BankInput<T> input(c);
    thread_count = 1;
    const Learned<T> expected = input.learn(c);
    const Learned<double> truth = input.definition(c);
    expect_near(c.name, expected.mean, truth.mean, tolerance);
    expect_near(c.name, expected.count, truth.count, 0);
    expect_near(c.name, expected.var, truth.var, tolerance);
    expect_near(c.name, expected.updates, truth.updates, 0);
    expect_near(c.name, expected.weight, truth.weight, 0);
    expect_near(c.name, expected.metric, truth.metric, tolerance);
    for (thread_count = 2; thread_count <= 5; thread_count += 3) {
      const Learned<T> results = input.learn(c);
      for (auto field : {&Learned<T>::mean, &Learned<T>::count, &Learned<T>::var,
                         &Learned<T>::updates, &Learned<T>::weight, &Learned<T>::metric}) {
        expect_same_bits(c.name, results.*field, expected.*field);
      }
    }
  }
}

}  // namespace

void test_class_bank() {
  test_type<double>(1e-12);
  test_type<float>(4e-6);
  test_learning<double>(1e-13);
  test_learning<float>(2e-6);
}
