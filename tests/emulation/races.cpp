// Runs operations once on real threads, for ThreadSanitizer: races OPERATION [DEFECT].
//
// The numbers do not matter here, only who touches them when.
#include <cstdio>
#include <random>
#include <string>

#include "operations.cpp"

namespace {

std::mt19937 generator(1);

std::vector<float> floats(size_t count, float low = -1) {
  std::uniform_real_distribution<float> draw(low, 1);
  std::vector<float> values(count);
  for (float& value : values) value = draw(generator);
  return values;
}

constexpr int kFloat = 1;
constexpr double kEps = 1e-6;

// A batch grouped by class, with as many groups as two samples each allow, most of them empty,
// pairs of its classes, features and moments, and rows for all pairs.
struct Problem {
  int64_t batch = 70, classes = 9, groups = batch / 2, dims = 9, rows = 70, top_m = 20;
  std::vector<int64_t> targets, order, offsets = {0}, present, pairs;
  std::vector<float> logits = floats(batch * classes), z = floats(batch * dims);
  std::vector<float> mean = floats(rows * 40), var = floats(rows * 40, 0.1f);
  std::vector<float> alpha = floats(rows * rows, 0), weights = floats(top_m, 0);
  std::vector<float> distance = floats(rows * rows), grad = floats(rows * rows);
  float value = 0, one = 1;

  Problem() {
    for (int64_t b = 0; b < batch; ++b) targets.push_back(b % classes);
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t b = c; b < batch; b += classes) order.push_back(b);
      offsets.push_back(static_cast<int64_t>(order.size()));
      present.push_back(c);
      for (int64_t d = c + 1; d < classes && std::ssize(pairs) < 2 * top_m; ++d)
        pairs.insert(pairs.end(), {c, d});
    }
    offsets.resize(groups + 1, batch);
    present.resize(groups, -1);
  }

  void plan() {
    run_plan(kFloat, logits.data(), classes, targets.data(), batch, 2, top_m, order.data(),
             offsets.data(), present.data(), pairs.data(), weights.data());
  }

  void moments() {
    std::vector<float> m(groups * dims), v(groups * dims), g = floats(batch * dims);
    run_class_moments(kFloat, z.data(), dims, order.data(), offsets.data(), groups, batch, kEps,
                      m.data(), v.data());
    run_class_moments_backward(kFloat, m.data(), v.data(), z.data(), dims, m.data(), v.data(),
                               order.data(), offsets.data(), groups, batch, kEps, g.data());
    run_confusion_weights(kFloat, logits.data(), classes, order.data(), offsets.data(),
                          present.data(), groups, alpha.data());
  }

  void pair_lists() {
    std::vector<float> grad_mean(rows * 40), grad_var(rows * 40);
    run_pair_distance(kFloat, mean.data(), var.data(), rows, 40, pairs.data(), top_m, kEps,
                      distance.data());
    run_pair_distance_backward(kFloat, grad.data(), mean.data(), var.data(), rows, 40, pairs.data(),
                               top_m, kEps, grad_mean.data(), grad_var.data());
  }

  void all_pairs() {
    std::vector<float> grad_mean(rows * 40), grad_var(rows * 40);
    run_all_pair_distance(kFloat, mean.data(), var.data(), rows, 40, kEps, distance.data());
    run_all_pair_distance_backward(kFloat, grad.data(), mean.data(), var.data(), rows, 40, kEps,
                                   grad_mean.data(), grad_var.data());
  }

  void overlap() {
    std::vector<float> grad_mean(rows * 40), grad_var(rows * 40);
    for (const int log : {0, 1}) {
      run_weighted_overlap(kFloat, mean.data(), var.data(), alpha.data(), rows, 40, kEps, log,
                           &value);
      run_weighted_overlap_backward(kFloat, &one, &value, mean.data(), var.data(), alpha.data(),
                                    rows, 40, kEps, log, grad_mean.data(), grad_var.data());
    }
    run_weighted_overlap_with_gradient(kFloat, &one, mean.data(), var.data(), alpha.data(), rows,
                                       40, kEps, 0, &value, grad_mean.data(), grad_var.data());
  }

  void regularizer() {
    std::vector<float> m(groups * dims), v(groups * dims), g(batch * dims);
    void *features = z.data(), *means = m.data(), *vars = v.data(), *grads = g.data();
    run_regularizer(kFloat, &features, &dims, 1, order.data(), offsets.data(), groups, batch,
                    pairs.data(), top_m, weights.data(), kEps, 1, &value, &means, &vars,
                    distance.data());
    run_regularizer_backward(kFloat, &one, &features, &dims, 1, &means, &vars, distance.data(),
                             order.data(), offsets.data(), groups, batch, pairs.data(), top_m,
                             weights.data(), kEps, 1, &grads);
  }

  void class_bank() {
    constexpr int64_t top = 5;
    const std::unique_ptr<bool[]> seen(new bool[classes]);
    for (int64_t c = 0; c < classes; ++c) seen[c] = c % 3 > 0;
    std::vector<int64_t> index(batch * top);
    std::vector<float> weight(batch * top), own(batch), energy(batch), gradient(batch * dims);
    run_top_confusions(kFloat, logits.data(), batch, classes, targets.data(), seen.get(), top,
                       index.data(), weight.data(), own.data());
    run_class_attraction(kFloat, z.data(), batch, mean.data(), var.data(), classes, dims,
                         index.data(), weight.data(), top, energy.data(), gradient.data());
    std::vector<int64_t> distinct(classes);
    for (int64_t c = 0; c < classes; ++c) distinct[c] = c;
    std::vector<float> bank = floats(classes * dims), count(classes, 2), size(classes, 1);
    std::vector<float> moments = floats(classes * dims, 0), metric(dims);
    run_observe_classes(kFloat, bank.data(), count.data(), classes, dims, var.data(), &one,
                        distinct.data(), size.data(), moments.data(), moments.data(), classes, 0.95,
                        1e-3, weight.data(), metric.data());
    run_follow_classes(kFloat, bank.data(), count.data(), classes, dims, distinct.data(),
                       weight.data(), moments.data(), classes, 0.9);
  }
};

}  // namespace

int main(int count, char** arguments) {
  const std::string operation = count > 1 ? arguments[1] : "";
  configure(1, count > 2 ? atoi(arguments[2]) : -1, 2);
  Problem problem;
  if (operation == "plan") problem.plan();
  if (operation == "moments") problem.moments();
  if (operation == "pair_lists") problem.pair_lists();
  if (operation == "all_pairs") problem.all_pairs();
  if (operation == "overlap") problem.overlap();
  if (operation == "regularizer") problem.regularizer();
  if (operation == "class_bank") problem.class_bank();
  puts("done");
}
