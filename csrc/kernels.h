// The contract of every kernel: what it reads, what it writes, and how accurate it is.
//
// Numerics, for every kernel and device:
//  - A moment is taken over the finite elements; NaN and Inf are counted apart.
//  - Sums of fp32 and 16-bit values run in fp32 over a few neighbours (on the CPU 16, pairwise; on
//    CUDA at most 8), where those are neither so large nor so small that their squares leave the
//    range of fp32, and in double otherwise and from there on. For fp64 input the squares run in
//    three ranges (Blue 1978), so that l2 neither underflows nor overflows. Relative error of
//    abs_sum, sq_sum and l2, and error of sum relative to abs_sum: <= 1e-6. Where abs_sum leaves
//    the range of fp64 it is Inf, and sum may be NaN.
//  - A tensor is cut into chunks by its shape alone and chunks are merged in order, so a result
//    does not depend on the number of threads or on timing: equal input, equal bits per device.
//  - Subnormals count in full: flush-to-zero modes of the caller are suspended.
#pragma once

#include <cstdint>

namespace gradstat {

enum class DType : uint8_t { kF32, kF16, kBF16, kF64 };

// A tensor in memory: `rows` slices along dimension 0, each stored as runs of `run` elements, the
// runs of row 0, row 1, ... following each other and the whole pattern repeating to `numel`.
// Where dimension 0 is outermost, as in any contiguous tensor, run == numel / rows.
// numel == kMissing marks a parameter without a gradient.
struct TensorRef {
  void* data;
  int64_t numel;
  int64_t rows;
  int64_t run;
  DType dtype;
};
constexpr int64_t kMissing = -1;

// Columns of a table row (float64). The row of a missing tensor is all NaN. abs_min is the smallest
// non-zero finite magnitude, 0 where there is none.
enum Column : int {
  kNumel,
  kZeros,
  kNans,
  kInfs,
  kSum,
  kAbsSum,
  kSqSum,
  kAbsMax,
  kAbsMin,
  kRows,
  kDeadRows,
  kL2,
  kNumColumns
};

// Histogram of magnitudes by binary exponent. Bin 0: 0 < |x| < 2^-126. Bin b in 1..254:
// 2^(b-127) <= |x| < 2^(b-126). Bin 255: finite |x| >= 2^128. Zero, NaN and Inf are in no bin.
constexpr int kHistogramBins = 256;

// Order of the norm that a clip coefficient is taken from.
enum class NormKind : int { kL1 = 1, kL2 = 2, kMax = 3 };

// ---- clipping -----------------------------------------------------------------------------------

// What each policy does stands in policy.h, with its parameters and its source.
enum class PolicyKind : int { kGlobalNorm, kPercentile, kZClip, kSkipOnSpike, kPerLayer, kAdaGc };

constexpr int kMaxPolicyParameters = 6;
struct PolicyStep {
  PolicyKind kind;
  double param[kMaxPolicyParameters];
  int64_t state;  // offset of its state in ClipRequest::state, in doubles
};

// What a norm of NaN or Inf does. kKeep: nothing is changed. kSkip: the step is to be skipped.
// kZero: the norm is taken over the finite elements (whoever scales sets the others to zero).
// kClip: Inf gives the factor 0; NaN gives 1, since there is no factor that would mend it.
enum class Nonfinite : int { kKeep, kSkip, kZero, kClip };

constexpr int kMaxPolicySteps = 4;
struct Program {
  int count;
  NormKind norm_kind;
  Nonfinite nonfinite;
  PolicyStep step[kMaxPolicySteps];
};

// Places in ClipRequest::out.
enum ClipOut : int {
  kOutNorm,         // total norm before clipping, NaN or Inf where an element is
  kOutFactor,       // what every gradient is to be multiplied by (coefficients hold it already)
  kOutCoefficient,  // total norm after clipping over total norm before
  kOutSkip,         // 1 where the step is to be skipped, else 0
  kOutAllowed,      // norm that the last global policy allowed, Inf where it allowed any
  kOutFinite,       // 1 where every gradient is finite, else 0
  kNumClipOut
};

// Places in ClipRequest::state; the policies' own state follows.
enum ClipCounter : int {
  kCounterSteps,
  kCounterClipped,
  kCounterSkipped,
  kCounterSkippedInARow,
  kNumClipCounters
};

// Everything lies on the tensors' device. Pointers other than `out` may be null.
struct ClipRequest {
  Program program;
  double* out;              // kNumClipOut doubles; null: no clipping wanted
  double* state;            // counters and the policies' state
  double* coefficients;     // one for each tensor; needed by kPerLayer and kAdaGc
  const float* grad_scale;  // gradients hold this multiple of the true ones; the norms are divided
  float* norm_f32;          // the norm once more, rounded: what most callers return
  float* found_inf;         // becomes 1 where the step is to be skipped, else 0
};

// ---- activations --------------------------------------------------------------------------------

// When an element y of an activation is active. NaN never is.
enum class ActiveRule : int { kPositive, kNonzero, kNotLow };  // y > 0, y != 0, y not low

// Low is low_from <= y <= low_to, high is y >= high_from. The bounds are compared as real numbers,
// unrounded; with a NaN among them, or low_from > low_to, no y is low (or high).
struct UnitRule {
  ActiveRule active;
  double low_from;
  double low_to;
  double high_from;
};

// What is counted of each unit, in this order.
enum UnitCount : int { kActive, kLow, kHigh, kNumUnitCounts };

namespace cpu {

// Fills table[count + 1][kNumColumns], the last row holding the totals over all tensors, and, where
// histogram is not null, histogram[count + 1][kHistogramBins]. Reads each tensor once.
void moments(const TensorRef* tensors, int64_t count, double* table, int64_t* histogram,
             const ClipRequest& clip, int threads);

// Runs a clip program on a finished table in host memory, such as `moments` fills.
void run_clip(const double* table, int64_t count, const ClipRequest& clip);

// tensor[i] *= coefficient[i * stride] (stride 0: one coefficient for all). The product is taken in
// double and rounded to the tensor's dtype, to 16 bits by way of fp32. A coefficient of 1 or NaN
// writes nothing; 0 writes zeros, over NaN and Inf too.
void scale(const TensorRef* tensors, int64_t count, const double* coefficient, int64_t stride,
           int threads);

// Clamps every element to [-limit, limit]; NaN stays. The limit is rounded to the tensor's dtype.
void clamp(const TensorRef* tensors, int64_t count, double limit, int threads);

// Adds an activation to a window. Its units are the tensor's rows: counts[kNumUnitCounts][rows]
// counts their elements, and the moments are merged into row[kNumColumns], in which kRows becomes
// the number of units and kDeadRows 0. A window begins as zeros. Reads the activation once.
void units(const TensorRef& activation, const UnitRule& rule, int64_t* counts, double* row,
           int threads);

}  // namespace cpu

namespace cuda {

// The same contracts on the device's memory, enqueued on `stream`: nothing here waits for the
// device, and every launch may be captured in a CUDA graph. Errors throw std::runtime_error.

// Bytes of device memory that `moments` needs as scratch for these tensors.
int64_t moments_workspace_bytes(const TensorRef* tensors, int64_t count);

// `workspace`: at least moments_workspace_bytes, any content. `counter`: 4 bytes holding 0; they
// hold 0 again when the work is done, so one counter serves all calls that follow each other on
// one stream.
void moments(const TensorRef* tensors, int64_t count, double* table, int64_t* histogram,
             const ClipRequest& clip, void* workspace, uint32_t* counter, int device, void* stream);

void scale(const TensorRef* tensors, int64_t count, const double* coefficient, int64_t stride,
           int device, void* stream);

void clamp(const TensorRef* tensors, int64_t count, double limit, int device, void* stream);

// Bytes of device memory that `units` needs as scratch.
int64_t units_workspace_bytes(const TensorRef& activation);

// `workspace` and `counter` as for `moments`.
void units(const TensorRef& activation, const UnitRule& rule, int64_t* counts, double* row,
           void* workspace, uint32_t* counter, int device, void* stream);

// Number of usable devices; 0 where there is no driver. `reason` (may be null) says why it is 0.
int device_count(const char** reason);

// True where the module was built with CUDA kernels.
bool is_built();

}  // namespace cuda

}  // namespace gradstat
