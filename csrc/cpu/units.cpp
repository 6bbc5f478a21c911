// The driver of `units`: cut into chunks, run them on threads, add the counts, merge the moments.
#include "../units.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "../subnormals.h"
#include "dispatch.h"
#include "parallel.h"

namespace gradstat::cpu {
namespace {

// Counts a band, or what is outside of it, as `what`. A band that is counted already is not counted
// again.
void add_pass(const Format& format, Band band, bool outside, UnitCount what, UnitTask* task) {
  const int64_t infinity = infinity_key(format);
  if (band.from == -1 - infinity && band.to >= 0 && band.to < infinity) {
    // The values above are told in one comparison.
    band = {band.to + 1, infinity};
    outside = !outside;
  }
  task->is_outside[what] = outside;
  if (band.to < band.from) return;
  int i = 0;
  while (i < task->n_passes &&
         (task->pass[i].band.from != band.from || task->pass[i].band.to != band.to)) {
    ++i;
  }
  if (i == task->n_passes) {
    ++task->n_passes;
    task->pass[i] = {band,
                     band.from >= 0 && band.to == infinity ? BandKind::kAbove
                     : band.from < 0 && band.to >= 0       ? BandKind::kBothSigns
                                                           : BandKind::kOneSign,
                     value_of_key(format, band.from),
                     value_of_key(format, band.to),
                     {}};
  }
  task->pass[i].sign[what] = outside ? -1 : 1;
}

// A cache line of counters: no instruction set counts more columns at once.
struct alignas(64) CounterLine {
  uint8_t counters[64] = {};
};
constexpr int64_t kLine = sizeof(CounterLine);

UnitTask plan_task(const TensorRef& activation, const UnitRule& rule) {
  const Format format = format_of(activation.dtype);
  const UnitBands bands = bands_of(activation.dtype, rule);
  UnitTask task = {};
  task.data = activation.data;
  task.numel = activation.numel;
  task.units = activation.rows;
  task.run = activation.run;
  task.plan = plan_units(activation);
  task.infinity = bands.numbers.to;
  task.pitch = task.plan.by_runs ? 0 : (task.plan.stride + kLine - 1) / kLine * kLine;
  add_pass(format, bands.active, bands.active_outside, kActive, &task);
  add_pass(format, bands.low, false, kLow, &task);
  add_pass(format, bands.high, false, kHigh, &task);
  return task;
}

// Pieces that a thread takes: enough to share the work evenly.
constexpr int64_t kPieces = 4;

// Chunks of a piece: no more than the counters of columns hold between two folds.
int64_t piece_size(const UnitPlan& plan, int threads) {
  if (threads <= 1) return plan.chunks;
  const int64_t fold = plan.by_runs ? plan.chunks : chunks_a_fold(plan);
  return std::min(fold, plan.chunks / (kPieces * threads) + 1);
}

}  // namespace

void units(const TensorRef& activation, const UnitRule& rule, int64_t* counts, double* row,
           int threads) {
  const SubnormalsOn subnormals_on;  // merging and finalising meet them too
  const UnitTask task = plan_task(activation, rule);
  const auto read = variant().kernels->units[static_cast<int>(activation.dtype)];
  const int64_t chunks = task.plan.chunks;
  if (activation.numel < kSerialElements) threads = 1;
  const std::unique_ptr<Moments[]> results(new Moments[static_cast<size_t>(chunks)]);
  const auto n_counts = static_cast<size_t>(kNumUnitCounts * task.units);
  const int64_t size = piece_size(task.plan, threads);
  std::atomic<int64_t> next{0};
  std::mutex adding;
  // One call a thread: its counts are made, and added to the others', once.
  parallel_for(threads, 1, threads, [&](int64_t, int64_t) {
    std::vector<int64_t> own_counts(n_counts);
    std::vector<CounterLine> lines(static_cast<size_t>(task.n_passes * task.pitch / kLine));
    UnitTask own = task;
    own.counts = own_counts.data();
    own.counters = lines.empty() ? nullptr : lines.front().counters;
    for (int64_t begin; (begin = next.fetch_add(size, std::memory_order_relaxed)) < chunks;) {
      read(own, begin, std::min(begin + size, chunks), results.get());
    }
    // Integers: the order in which threads add does not show.
    const std::lock_guard<std::mutex> lock(adding);
    for (size_t i = 0; i < n_counts; ++i) counts[i] += own_counts[i];
  });
  for (int what = 0; what < kNumUnitCounts; ++what) {
    if (!task.is_outside[what] || task.units == 0) continue;
    // What was added so far is less than 0: the elements that do not count.
    const int64_t all = activation.numel / task.units;
    for (int64_t unit = 0; unit < task.units; ++unit) counts[what * task.units + unit] += all;
  }
  Moments total = empty_moments();
  for (int64_t i = 0; i < chunks; ++i) merge(&total, results[static_cast<size_t>(i)]);
  merge_into_row(total, static_cast<double>(activation.numel), static_cast<double>(task.units),
                 row);
}

}  // namespace gradstat::cpu
