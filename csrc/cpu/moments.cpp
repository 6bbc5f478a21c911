// The driver of `moments`: cut into chunks, run them on threads, merge in order.
#include "../moments.h"

#include <cstring>
#include <memory>

#include "../policy.h"
#include "../subnormals.h"
#include "chunks.h"
#include "dispatch.h"

namespace gradstat::cpu {
namespace {

// Whether n elements are zeros of either sign. `Bits` is the unsigned type of their size.
template <class Bits>
bool all_zero(const char* at, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, at + i * static_cast<int64_t>(sizeof bits), sizeof bits);
    if (static_cast<Bits>(bits << 1) != 0) return false;
  }
  return true;
}

bool all_zero(const void* data, int64_t begin, int64_t n, DType dtype) {
  const char* at = static_cast<const char*>(data) + begin * element_bytes(dtype);
  return dtype == DType::kF64   ? all_zero<uint64_t>(at, n)
         : dtype == DType::kF32 ? all_zero<uint32_t>(at, n)
                                : all_zero<uint16_t>(at, n);
}

// Dead rows among the rows that start in [begin, begin + size). Needed only where the zeros suffice
// for a whole row; a living row is usually left at its first element.
int64_t count_dead_rows(const TensorRef& tensor, int64_t begin, int64_t size) {
  int64_t dead = 0;
  for (int64_t at = begin; at < begin + size; at += tensor.run) {
    dead += all_zero(tensor.data, at, tensor.run, tensor.dtype);
  }
  return dead;
}

// The same for a tensor whose rows are interleaved in memory (dimension 0 not outermost).
int64_t count_interleaved_dead_rows(const TensorRef& tensor) {
  int64_t dead = 0;
  const int64_t period = tensor.run * tensor.rows;
  for (int64_t row = 0; row < tensor.rows; ++row) {
    bool is_dead = true;
    for (int64_t at = row * tensor.run; is_dead && at < tensor.numel; at += period) {
      is_dead = all_zero(tensor.data, at, tensor.run, tensor.dtype);
    }
    dead += is_dead;
  }
  return dead;
}

Moments chunk_moments(const Kernels& kernels, const TensorRef& tensor, const ChunkPlan& plan,
                      int64_t index, uint32_t* histogram) {
  const Chunk chunk = chunk_at(plan, tensor.numel, index);
  const char* data =
      static_cast<const char*>(tensor.data) + chunk.begin * element_bytes(tensor.dtype);
  Moments result = empty_moments();
  kernels.moments[static_cast<int>(tensor.dtype)](data, chunk.size, &result, histogram);
  if (rows_are_contiguous(tensor) && plan.parts_per_row == 1 && result.zeros >= tensor.run) {
    result.dead_rows =
        tensor.run == 1 ? result.zeros : count_dead_rows(tensor, chunk.begin, chunk.size);
  }
  return result;
}

// A row of several chunks is dead where each of them holds nothing but zeros.
int64_t count_dead_long_rows(const TensorRef& tensor, const ChunkPlan& plan,
                             const Moments* chunks) {
  int64_t dead = 0;
  for (int64_t row = 0; row < tensor.rows; ++row) {
    int64_t zeros = 0;
    for (int64_t part = 0; part < plan.parts_per_row; ++part) {
      zeros += chunks[row * plan.parts_per_row + part].zeros;
    }
    dead += zeros == tensor.run;
  }
  return dead;
}

Moments merge_chunks(const TensorRef& tensor, const ChunkPlan& plan, const Moments* chunks) {
  if (plan.count == 0) return empty_moments();
  Moments result = chunks[0];
  for (int64_t i = 1; i < plan.count; ++i) merge(&result, chunks[i]);
  if (!rows_are_contiguous(tensor)) {
    const bool enough_zeros = result.zeros >= tensor.numel / tensor.rows;
    result.dead_rows = enough_zeros ? count_interleaved_dead_rows(tensor) : 0;
  } else if (plan.parts_per_row > 1) {
    result.dead_rows = count_dead_long_rows(tensor, plan, chunks);
  }
  return result;
}

struct Totals {
  Moments moments = empty_moments();
  double numel = 0;
  double rows = 0;
};

void finish_tensor(const TensorRef& tensor, const Moments& moments, double* row, Totals* totals) {
  if (tensor.numel == kMissing) {
    write_missing_row(row);
    return;
  }
  const auto numel = static_cast<double>(tensor.numel);
  const auto rows = static_cast<double>(tensor.rows);
  write_row(moments, numel, rows, row);
  merge(&totals->moments, moments);
  totals->numel += numel;
  totals->rows += rows;
}

void add_histogram(const uint32_t* from, int64_t* tensor, int64_t* totals) {
  for (int bin = 0; bin < kHistogramBins; ++bin) {
    if (from[bin] == 0) continue;
    // Integers: the order in which threads add does not show.
    __atomic_fetch_add(&tensor[bin], int64_t{from[bin]}, __ATOMIC_RELAXED);
    __atomic_fetch_add(&totals[bin], int64_t{from[bin]}, __ATOMIC_RELAXED);
  }
}

}  // namespace

void moments(const TensorRef* tensors, int64_t count, double* table, int64_t* histogram,
             const ClipRequest& clip, int threads) {
  const SubnormalsOn subnormals_on;  // merging and finalising meet them too
  const Kernels& kernels = *variant().kernels;
  if (histogram != nullptr) {
    const auto bins = static_cast<size_t>(count + 1) * kHistogramBins;
    std::memset(histogram, 0, bins * sizeof *histogram);
  }

  const Chunks chunks(tensors, count);
  // Not a vector: a thousand small tensors would spend a tenth of their time on zeroing it.
  const std::unique_ptr<Moments[]> results(new Moments[static_cast<size_t>(chunks.count())]);
  chunks.for_each(threads, [&](int64_t tensor, int64_t index, int64_t slot) {
    uint32_t bins[kHistogramBins];
    if (histogram != nullptr) std::memset(bins, 0, sizeof bins);
    results[static_cast<size_t>(slot)] =
        chunk_moments(kernels, tensors[tensor], chunks.plan(tensor), index,
                      histogram != nullptr ? bins : nullptr);
    if (histogram != nullptr) {
      add_histogram(bins, histogram + tensor * kHistogramBins, histogram + count * kHistogramBins);
    }
  });

  Totals totals;
  for (int64_t i = 0; i < count; ++i) {
    const Moments* of_tensor = results.get() + chunks.first_slot(i);
    finish_tensor(tensors[i], merge_chunks(tensors[i], chunks.plan(i), of_tensor),
                  table + i * kNumColumns, &totals);
  }
  write_row(totals.moments, totals.numel, totals.rows, table + count * kNumColumns);
  if (clip.out != nullptr) run_program(clip, table, count, totals.moments, SingleThread());
}

void run_clip(const double* table, int64_t count, const ClipRequest& clip) {
  const double* row = table + count * kNumColumns;
  Moments totals = empty_moments();
  totals.nans = static_cast<int64_t>(row[kNans]);
  totals.infs = static_cast<int64_t>(row[kInfs]);
  totals.abs_sum = row[kAbsSum];
  totals.abs_max = row[kAbsMax];
  // l2 back into the three ranges: whichever holds its square.
  const Range range = range_of(row[kL2]);
  const double scaled = row[kL2] * range_scale(range);
  totals.sq_sum[range] = scaled * scaled;
  run_program(clip, table, count, totals, SingleThread());
}

}  // namespace gradstat::cpu
