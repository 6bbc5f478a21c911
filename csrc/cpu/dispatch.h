// Which compiled variant of the CPU kernels runs on this machine.
#pragma once

#include <cstdint>

#include "../units.h"

namespace gradstat {

constexpr int kNumDTypes = 4;

// How to tell whether a value of 16 or 32 bits lies in a band. kAbove: positive values up to
// infinity, by one comparison of their bits, which takes positive NaN for more of them. kOneSign:
// by a range of the bits. kBothSigns: by a range of values put in order.
enum class BandKind : int { kAbove, kOneSign, kBothSigns };

// One band to be counted, and what its count is added to (1) or taken from (-1), by UnitCount.
struct UnitPass {
  Band band;
  BandKind kind;
  double from_value;
  double to_value;
  int sign[kNumUnitCounts];
};

constexpr int kMaxUnitPasses = 3;

// What `units` does with each chunk of an activation.
struct UnitTask {
  const void* data;
  int64_t numel;
  int64_t units;
  int64_t run;
  UnitPlan plan;
  UnitPass pass[kMaxUnitPasses];
  int n_passes;
  // By UnitCount: counted are all elements, less those of a band, and so less the NaN too.
  bool is_outside[kNumUnitCounts];
  int64_t infinity;  // its place in the order of values
  int64_t* counts;   // [kNumUnitCounts][units]
  // [n_passes][pitch], zeros: the counts of columns that are not in `counts` yet.
  uint8_t* counters;
  int64_t pitch;
};

// One variant: each entry handles a contiguous run of n elements, indexed by DType.
struct Kernels {
  // Adds the run to *result; `histogram` may be null.
  void (*moments[kNumDTypes])(const void* data, int64_t n, Moments* result, uint32_t* histogram);
  // Makes the moments of the chunks [begin, end), at their index in results, and adds their counts
  // to task.counts.
  void (*units[kNumDTypes])(const UnitTask& task, int64_t begin, int64_t end, Moments* results);
  void (*scale[kNumDTypes])(void* data, int64_t n, double coefficient);
  void (*clamp[kNumDTypes])(void* data, int64_t n, double limit);
};

namespace scalar {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
namespace neon {
extern const Kernels kKernels;
}

namespace cpu {

struct Variant {
  const char* name;
  const Kernels* kernels;
  bool (*is_supported)();
};

// All variants of this build, best first.
const Variant* variants(int* count);

// The variant in use: the best one supported, or the one that GRADSTAT_CPU or use_variant() named.
// Throws std::invalid_argument where GRADSTAT_CPU names none that runs here.
const Variant& variant();

// Changes the variant for all later calls; an empty name returns to the default.
void use_variant(const char* name);

// Why variant() is what it is, in a few words.
const char* variant_reason();

}  // namespace cpu
}  // namespace gradstat
