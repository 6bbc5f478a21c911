// What CPU and CUDA share of `units`: the bands that an element may lie in, and the chunks in which
// an activation is read.
#pragma once

#include <cmath>
#include <cstdint>

#include "moments.h"
#include "subnormals.h"

namespace gradstat {

// ---- bands --------------------------------------------------------------------------------------

// Elements in the order of their values, as signed integers of their own width: the bits, with the
// magnitude of negative ones inverted. -0 is -1 and 0 is 0; NaN lie beyond both infinities.
struct Band {
  int64_t from;
  int64_t to;  // below `from` where the band is empty
};

struct UnitBands {
  Band active;
  Band low;
  Band high;
  Band numbers;         // everything but NaN
  bool active_outside;  // active are the numbers outside of `active`
};

struct Format {
  int bits;
  int mantissa_bits;
};

static inline Format format_of(DType dtype) {
  return dtype == DType::kF64   ? Format{64, 52}
         : dtype == DType::kF32 ? Format{32, 23}
         : dtype == DType::kF16 ? Format{16, 10}
                                : Format{16, 7};
}

// The value that stands at a place of the order; none of NaN.
static inline double value_of_key(const Format& format, int64_t key) {
  const bool negative = key < 0;
  const int64_t magnitude = negative ? -1 - key : key;
  const int64_t exponent = magnitude >> format.mantissa_bits;
  const int64_t mantissa = magnitude & ((int64_t{1} << format.mantissa_bits) - 1);
  const int exponent_bits = format.bits - 1 - format.mantissa_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  double value = HUGE_VAL;
  if (exponent == 0) {
    value = std::ldexp(static_cast<double>(mantissa), 1 - bias - format.mantissa_bits);
  } else if (exponent < (1 << exponent_bits) - 1) {
    value = std::ldexp(static_cast<double>(mantissa + (int64_t{1} << format.mantissa_bits)),
                       static_cast<int>(exponent) - bias - format.mantissa_bits);
  }
  return negative ? -value : value;
}

static inline int64_t infinity_key(const Format& format) {
  return ((int64_t{1} << (format.bits - 1 - format.mantissa_bits)) - 1) << format.mantissa_bits;
}

// The values y of a dtype with from <= y <= to, found by bisection: no bound is rounded. Empty
// where a bound is NaN.
static inline Band band_between(const Format& format, double from, double to) {
  const int64_t infinity = infinity_key(format);
  const auto first_where = [&](auto holds) {  // holds(y) for all y from here on, and not before
    int64_t low = -1 - infinity;
    int64_t high = infinity + 1;
    while (low < high) {
      const int64_t middle = (low & high) + ((low ^ high) >> 1);  // high - low may overflow
      if (holds(value_of_key(format, middle))) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  };
  if (std::isnan(from) || std::isnan(to)) return {0, -1};
  return {first_where([from](double y) { return y >= from; }),
          first_where([to](double y) { return y > to; }) - 1};
}

static inline UnitBands bands_of(DType dtype, const UnitRule& rule) {
  const SubnormalsOn subnormals_on;  // or the smallest bounds would be as good as zero
  const Format format = format_of(dtype);
  UnitBands bands;
  bands.low = band_between(format, rule.low_from, rule.low_to);
  bands.high = band_between(format, rule.high_from, HUGE_VAL);
  bands.numbers = band_between(format, -HUGE_VAL, HUGE_VAL);
  bands.active_outside = rule.active != ActiveRule::kPositive;
  // 0x1p-1074 is the smallest of all positive values.
  bands.active = rule.active == ActiveRule::kPositive  ? band_between(format, 0x1p-1074, HUGE_VAL)
                 : rule.active == ActiveRule::kNonzero ? band_between(format, 0, 0)
                                                       : bands.low;
  return bands;
}

// ---- chunks -------------------------------------------------------------------------------------

// An activation is read in rows of at most a few thousand elements. Where a unit's runs are short,
// a row is as long as a whole number of periods (all units once), so that an element's unit follows
// from its column alone; a period that is too long for that is cut into tiles of columns. Where the
// runs are long the rows are mere pieces, and units are found by the run.
constexpr int64_t kUnitColumns = 4096;
constexpr int64_t kLongRun = 512;

struct UnitPlan {
  bool by_runs;
  int64_t period;
  int64_t stride;          // from row to row
  int64_t columns;         // of a tile
  int64_t tiles;           // beside each other
  int64_t rows;            // the last one may be shorter
  int64_t rows_per_chunk;  // of one tile
  int64_t chunks;
};

static inline UnitPlan plan_units(const TensorRef& activation) {
  UnitPlan plan = {};
  plan.period = activation.rows * activation.run;
  if (activation.numel <= 0) return plan;
  plan.by_runs = activation.run >= kLongRun;
  const int64_t periods = kUnitColumns / plan.period;
  plan.stride = plan.by_runs ? kUnitColumns : periods > 1 ? periods * plan.period : plan.period;
  plan.columns = plan.stride < kUnitColumns ? plan.stride : kUnitColumns;
  plan.tiles = (plan.stride + plan.columns - 1) / plan.columns;
  plan.rows = (activation.numel + plan.stride - 1) / plan.stride;
  plan.rows_per_chunk = kChunkElements / plan.columns;
  plan.chunks = (plan.rows + plan.rows_per_chunk - 1) / plan.rows_per_chunk * plan.tiles;
  return plan;
}

struct UnitChunk {
  int64_t begin;    // first element
  int64_t rows;     // stride apart
  int64_t columns;  // of each row; of the tensor's last one perhaps fewer
  int64_t column;   // that the rows begin at
};

GRADSTAT_HD static inline UnitChunk unit_chunk_at(const UnitPlan& plan, int64_t index) {
  const int64_t first_row = index / plan.tiles * plan.rows_per_chunk;
  const int64_t column = index % plan.tiles * plan.columns;
  const int64_t rows_left = plan.rows - first_row;
  const int64_t columns_left = plan.stride - column;
  return {first_row * plan.stride + column,
          rows_left < plan.rows_per_chunk ? rows_left : plan.rows_per_chunk,
          columns_left < plan.columns ? columns_left : plan.columns, column};
}

// Chunks from one on that meet no column in more rows than a counter of one byte holds.
static inline int64_t chunks_a_fold(const UnitPlan& plan) {
  return plan.tiles * (UINT8_MAX / plan.rows_per_chunk);
}

// ---- the window's row ---------------------------------------------------------------------------

GRADSTAT_HD static inline void merge_into_row(const Moments& m, double numel, double units,
                                              double* row) {
  double own[kNumColumns];
  write_row(m, numel, units, own);
  for (int column = kNumel; column <= kSqSum; ++column) row[column] += own[column];
  if (own[kAbsMax] > row[kAbsMax]) row[kAbsMax] = own[kAbsMax];
  const bool smaller = row[kAbsMin] == 0 || own[kAbsMin] < row[kAbsMin];
  if (own[kAbsMin] > 0 && smaller) row[kAbsMin] = own[kAbsMin];
  row[kRows] = units;
  row[kDeadRows] = 0;
  row[kL2] = hypot(row[kL2], own[kL2]);
}

}  // namespace gradstat
