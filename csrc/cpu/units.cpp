// The driver of `units`: cut into chunks, run them on threads, add the counts, merge the moments.
#include "../units.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "subnormals.h"

namespace gradstat::cpu {
namespace {

void add_pass(const Format& format, const Band& band, UnitCount what, int sign, UnitTask* task) {
  if (band.to < band.from) return;
  UnitPass* pass = &task->pass[task->n_passes++];
  *pass = {band, value_of_key(format, band.from), value_of_key(format, band.to), {0, 0, 0}};
  pass->sign[what] = sign;
}

UnitTask plan_task(const TensorRef& activation, const UnitRule& rule) {
  const Format format = format_of(activation.dtype);
  const UnitBands bands = bands_of(activation.dtype, rule);
  UnitTask task = {};
  task.data = activation.data;
  task.numel = activation.numel;
  task.units = activation.rows;
  task.run = activation.run;
  task.plan = plan_units(activation);
  task.active_outside = bands.active_outside;
  task.infinity = bands.numbers.to;
  add_pass(format, bands.low, kLow, 1, &task);
  if (rule.active == ActiveRule::kNotLow) {
    if (task.n_passes > 0) task.pass[0].sign[kActive] = -1;
  } else {
    add_pass(format, bands.active, kActive, bands.active_outside ? -1 : 1, &task);
  }
  add_pass(format, bands.high, kHigh, 1, &task);
  return task;
}

// Pieces that a thread takes, each with counts of its own: enough to share the work evenly.
constexpr int64_t kPieces = 4;
// Below this, one thread is done before a second one has started.
constexpr int64_t kSerialElements = 65536;

}  // namespace

void units(const TensorRef& activation, const UnitRule& rule, int64_t* counts, double* row,
           int threads) {
  const SubnormalsOn subnormals_on;  // merging and finalising meet them too
  const UnitTask task = plan_task(activation, rule);
  const auto read = variant().kernels->units[static_cast<int>(activation.dtype)];
  const int64_t chunks = task.plan.chunks;
  if (activation.numel <= kSerialElements) threads = 1;
  const std::unique_ptr<Moments[]> results(new Moments[static_cast<size_t>(chunks)]);
  const auto n_counts = static_cast<size_t>(kNumUnitCounts * task.units);
  parallel_for(chunks, chunks / (kPieces * threads) + 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> of_piece(n_counts);
    UnitTask piece = task;
    piece.counts = of_piece.data();
    for (int64_t i = begin; i < end; ++i) {
      Moments* result = &results[static_cast<size_t>(i)];
      *result = empty_moments();
      read(piece, unit_chunk_at(task.plan, i), result);
    }
    for (size_t i = 0; i < n_counts; ++i) {
      // Integers: the order in which threads add does not show.
      if (of_piece[i] != 0) __atomic_fetch_add(&counts[i], of_piece[i], __ATOMIC_RELAXED);
    }
  });
  if (task.active_outside && task.units > 0) {
    // What was taken off so far are the elements that are not active.
    const int64_t all = activation.numel / task.units;
    for (int64_t unit = 0; unit < task.units; ++unit) counts[kActive * task.units + unit] += all;
  }
  Moments total = empty_moments();
  for (int64_t i = 0; i < chunks; ++i) merge(&total, results[static_cast<size_t>(i)]);
  merge_into_row(total, static_cast<double>(activation.numel), static_cast<double>(task.units),
                 row);
}

}  // namespace gradstat::cpu
