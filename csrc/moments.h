// Arithmetic that CPU and CUDA share: cut a tensor into chunks, accumulate, merge, finalise.
//
// Everything is `static inline`: a weak symbol compiled for one instruction set could otherwise be
// kept for all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#ifdef __CUDACC__
#define GRADSTAT_HD __host__ __device__
#else
#define GRADSTAT_HD
#endif

namespace gradstat {

GRADSTAT_HD static inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
}

// ---- chunks -------------------------------------------------------------------------------------

constexpr int64_t kChunkElements = 65536;

// How a tensor is cut: by rows where rows are short, and rows into parts where they are long, so
// that no chunk holds part of one row and part of another.
struct ChunkPlan {
  int64_t size;           // elements of a chunk (the last of a row or of the tensor may be shorter)
  int64_t parts_per_row;  // 1 where a chunk holds whole rows
  int64_t row_size;
  int64_t count;
};

GRADSTAT_HD static inline bool rows_are_contiguous(const TensorRef& tensor) {
  return tensor.run * tensor.rows == tensor.numel;
}

GRADSTAT_HD static inline ChunkPlan plan_chunks(const TensorRef& tensor) {
  ChunkPlan plan = {kChunkElements, 1, tensor.numel, 0};
  if (tensor.numel <= 0) return plan;
  plan.row_size = rows_are_contiguous(tensor) ? tensor.run : tensor.numel;
  if (tensor.numel <= kChunkElements) {
    plan.size = tensor.numel;
    plan.count = 1;
  } else if (plan.row_size <= kChunkElements) {
    plan.size = kChunkElements / plan.row_size * plan.row_size;
    plan.count = (tensor.numel + plan.size - 1) / plan.size;
  } else {
    plan.parts_per_row = (plan.row_size + kChunkElements - 1) / kChunkElements;
    // Whole 64-element groups keep the parts equally aligned.
    plan.size = ((plan.row_size + plan.parts_per_row - 1) / plan.parts_per_row + 63) / 64 * 64;
    plan.parts_per_row = (plan.row_size + plan.size - 1) / plan.size;
    plan.count = tensor.numel / plan.row_size * plan.parts_per_row;
  }
  return plan;
}

struct Chunk {
  int64_t begin;
  int64_t size;
};

GRADSTAT_HD static inline Chunk chunk_at(const ChunkPlan& plan, int64_t numel, int64_t index) {
  if (plan.parts_per_row == 1) {
    const int64_t begin = index * plan.size;
    return {begin, plan.size < numel - begin ? plan.size : numel - begin};
  }
  const int64_t row = index / plan.parts_per_row;
  const int64_t offset = index % plan.parts_per_row * plan.size;
  const int64_t left = plan.row_size - offset;
  return {row * plan.row_size + offset, plan.size < left ? plan.size : left};
}

// ---- accumulate and merge -----------------------------------------------------------------------

// Squares of fp64 magnitudes are summed in three ranges, each scaled by an exact power of two
// (Blue 1978, doi:10.1145/355769.355771). Other dtypes fit the middle one: their squares reach from
// 2^-298 (the smallest fp32 subnormal) to 2^256. The squares of 2^64 elements fit each range.
enum Range : int { kSmall, kMiddle, kLarge, kNumRanges };
constexpr double kSmallBelow = 0x1p-450;
constexpr double kLargeFrom = 0x1p+480;
constexpr double kSmallScale = 0x1p+600;
constexpr double kLargeScale = 0x1p-600;

GRADSTAT_HD static inline Range range_of(double abs_max) {
  return abs_max >= kLargeFrom ? kLarge : abs_max < kSmallBelow ? kSmall : kMiddle;
}

GRADSTAT_HD static inline double range_scale(Range range) {
  return range == kLarge ? kLargeScale : range == kSmall ? kSmallScale : 1.0;
}

// The state of a chunk, of a tensor, or of all tensors.
struct Moments {
  int64_t zeros;
  int64_t nans;
  int64_t infs;
  int64_t dead_rows;
  double sum;
  double abs_sum;
  double sq_sum[kNumRanges];
  double abs_max;
  double abs_min;  // +Inf where no finite element differs from zero
};

GRADSTAT_HD static inline Moments empty_moments() {
  return {0, 0, 0, 0, 0.0, 0.0, {0.0, 0.0, 0.0}, 0.0, HUGE_VAL};
}

GRADSTAT_HD static inline void merge(Moments* into, const Moments& from) {
  into->zeros += from.zeros;
  into->nans += from.nans;
  into->infs += from.infs;
  into->dead_rows += from.dead_rows;
  into->sum += from.sum;
  into->abs_sum += from.abs_sum;
  for (int range = 0; range < kNumRanges; ++range) into->sq_sum[range] += from.sq_sum[range];
  into->abs_max = from.abs_max > into->abs_max ? from.abs_max : into->abs_max;
  into->abs_min = from.abs_min < into->abs_min ? from.abs_min : into->abs_min;
}

// Bin of a finite, non-zero magnitude given as the bits of an fp64.
GRADSTAT_HD static inline int histogram_bin(uint64_t bits_f64) {
  const int exponent = static_cast<int>(bits_f64 >> 52 & 0x7ff) - 1023;
  return exponent < -126 ? 0 : exponent > 127 ? 255 : exponent + 127;
}

// ---- finalise -----------------------------------------------------------------------------------

GRADSTAT_HD static inline double l2_of(const Moments& m) {
  // 0x1p-1200 is the square of the step between two neighbouring ranges.
  if (m.sq_sum[kLarge] > 0) {
    return sqrt(m.sq_sum[kLarge] + m.sq_sum[kMiddle] * kLargeScale * kLargeScale) / kLargeScale;
  }
  if (m.sq_sum[kMiddle] > 0) {
    return sqrt(m.sq_sum[kMiddle] + m.sq_sum[kSmall] / kSmallScale / kSmallScale);
  }
  return sqrt(m.sq_sum[kSmall]) / kSmallScale;
}

GRADSTAT_HD static inline void write_row(const Moments& m, double numel, double rows, double* row) {
  row[kNumel] = numel;
  row[kZeros] = static_cast<double>(m.zeros);
  row[kNans] = static_cast<double>(m.nans);
  row[kInfs] = static_cast<double>(m.infs);
  row[kSum] = m.sum;
  row[kAbsSum] = m.abs_sum;
  row[kSqSum] = m.sq_sum[kMiddle] + m.sq_sum[kSmall] / kSmallScale / kSmallScale +
                m.sq_sum[kLarge] / kLargeScale / kLargeScale;
  row[kAbsMax] = m.abs_max;
  row[kAbsMin] = m.abs_min == HUGE_VAL ? 0.0 : m.abs_min;
  row[kRows] = rows;
  row[kDeadRows] = static_cast<double>(m.dead_rows);
  row[kL2] = l2_of(m);
}

GRADSTAT_HD static inline void write_missing_row(double* row) {
  for (int column = 0; column < kNumColumns; ++column) row[column] = NAN;
}

// The norm over all elements in torch's sense: NaN if any element is NaN, else Inf if any is Inf.
GRADSTAT_HD static inline double norm_of(const Moments& totals, NormKind kind) {
  if (totals.nans > 0) return NAN;
  if (totals.infs > 0) return HUGE_VAL;
  return kind == NormKind::kL1    ? totals.abs_sum
         : kind == NormKind::kMax ? totals.abs_max
                                  : l2_of(totals);
}

}  // namespace gradstat
