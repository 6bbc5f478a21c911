// Runs every policy with groups of several threads, as the last block on CUDA does, and compares
// with one thread. Built by test_policy_group.py, with ThreadSanitizer where there is one.
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "policy.h"

namespace gradstat {
namespace {

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t turn = turn_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++turn_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return turn_ != turn; });
    }
  }

 private:
  const int size_;
  int arrived_ = 0;
  int64_t turn_ = 0;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

class ThreadGroup {
 public:
  ThreadGroup(int rank, int size, Barrier* barrier, double* slots)
      : rank_(rank), size_(size), barrier_(barrier), slots_(slots) {}

  int rank() const { return rank_; }
  int size() const { return size_; }
  void sync() const { barrier_->wait(); }
  double sum(double value) const {
    slots_[rank_] = value;
    sync();
    double total = 0;
    for (int i = 0; i < size_; ++i) total += slots_[i];
    sync();
    return total;
  }

 private:
  int rank_;
  int size_;
  Barrier* barrier_;
  double* slots_;
};

constexpr int64_t kTensors = 37;
constexpr int kSteps = 60;
constexpr int64_t kWindow = 23;

struct Step {
  std::vector<double> table;
  Moments totals;
};

// Norms around 1 with spikes, equal values, missing tensors, NaN and all-zero steps.
std::vector<Step> make_steps() {
  std::mt19937 generator(7);
  std::lognormal_distribution<double> draw(0.0, 0.5);
  std::vector<Step> steps(kSteps);
  for (int s = 0; s < kSteps; ++s) {
    Step& step = steps[s];
    step.table.assign((kTensors + 1) * kNumColumns, 0.0);
    step.totals = empty_moments();
    const double level = s % 11 == 10 ? 100.0 : s % 17 == 16 ? 0.0 : 1.0;
    for (int64_t i = 0; i < kTensors; ++i) {
      double* row = step.table.data() + i * kNumColumns;
      if ((i + s) % 13 == 0) {
        write_missing_row(row);
        continue;
      }
      // Two digits only: the windows then meet equal values.
      row[kL2] = level * std::round(10 * draw(generator)) / 10;
      step.totals.sq_sum[kMiddle] += row[kL2] * row[kL2];
    }
    if (s % 19 == 18) step.totals.nans = 1;
  }
  return steps;
}

Program make_program(int choice) {
  Program program = {};
  program.norm_kind = NormKind::kL2;
  program.nonfinite = Nonfinite::kSkip;
  const int64_t first = kNumClipCounters;
  const int64_t window = 3 + 2 * kWindow;
  const PolicyStep percentile = {PolicyKind::kPercentile, {50, kWindow, 1.2, 5, 1.0, 0.8}, first};
  const PolicyStep adagc = {PolicyKind::kAdaGc, {1.05, 1.0, 0.9, 6}, first + window};
  const PolicyStep zclip = {
      PolicyKind::kZClip, {0.9, 2.0, 5, HUGE_VAL}, first + window + 1 + kTensors};
  const PolicyStep skip = {
      PolicyKind::kSkipOnSpike, {4.0, kWindow, 8}, first + window + 5 + kTensors};
  const PolicyStep layer = {PolicyKind::kPerLayer, {0.9}, 0};
  const PolicyStep global = {PolicyKind::kGlobalNorm, {2.0}, 0};
  const PolicyStep chosen[][4] = {{percentile, layer, global, adagc},
                                  {skip, percentile, zclip, global},
                                  {adagc, skip, layer, zclip}};
  program.count = 4;
  for (int i = 0; i < 4; ++i) program.step[i] = chosen[choice][i];
  return program;
}
constexpr int kChoices = 3;

class Run {
 public:
  explicit Run(int choice)
      : state_(kNumClipCounters + 3 + 2 * kWindow + 1 + kTensors + 4 + 2 + kWindow, 0.0),
        coefficients_(kTensors),
        out_(kNumClipOut) {
    const int64_t gammas = kNumClipCounters + 3 + 2 * kWindow + 1;
    for (int64_t i = 0; i < kTensors; ++i) state_[gammas + i] = HUGE_VAL;
    clip_.program = make_program(choice);
    clip_.out = out_.data();
    clip_.state = state_.data();
    clip_.coefficients = coefficients_.data();
    clip_.grad_scale = &scale_;
    clip_.found_inf = &found_inf_;
  }

  template <class Group>
  void steps(const std::vector<Step>& all, const Group& group) {
    for (const Step& step : all) {
      run_program(clip_, step.table.data(), kTensors, step.totals, group);
      group.sync();  // the end of a launch
      if (group.rank() == 0) keep();
      group.sync();
    }
  }

  const std::vector<double>& values() const { return values_; }

 private:
  void keep() {
    for (const auto* from : {&out_, &coefficients_, &state_}) {
      values_.insert(values_.end(), from->begin(), from->end());
    }
    values_.push_back(found_inf_);
  }

  std::vector<double> state_;
  std::vector<double> coefficients_;
  std::vector<double> out_;
  float scale_ = 2.0f;
  float found_inf_ = -1.0f;
  ClipRequest clip_ = {};
  std::vector<double> values_;  // out, coefficients and state after every step
};

bool is_close(double a, double b) {
  return a == b || (std::isnan(a) && std::isnan(b)) ||
         std::abs(a - b) <= 1e-11 * std::max(std::abs(a), std::abs(b)) || std::abs(a - b) < 1e-14;
}

int check(int choice, int size) {
  const std::vector<Step> all = make_steps();
  Run alone(choice);
  alone.steps(all, SingleThread());
  Run together(choice);
  Barrier barrier(size);
  std::vector<double> slots(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back(
        [&, rank] { together.steps(all, ThreadGroup(rank, size, &barrier, slots.data())); });
  }
  for (std::thread& thread : threads) thread.join();
  if (alone.values().size() != together.values().size()) return 1;
  for (size_t i = 0; i < alone.values().size(); ++i) {
    if (is_close(alone.values()[i], together.values()[i])) continue;
    std::printf("choice %d, %d threads, value %zu: alone %.17g, together %.17g\n", choice, size, i,
                alone.values()[i], together.values()[i]);
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace gradstat

int main() {
  int failures = 0;
  for (int choice = 0; choice < gradstat::kChoices; ++choice) {
    for (const int size : {2, 5, 8}) failures += gradstat::check(choice, size);
  }
  std::printf(failures == 0 ? "all equal\n" : "%d differ\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
