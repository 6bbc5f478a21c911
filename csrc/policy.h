// Clip policies: from the norms of a step to its coefficients, with state that stays on the device.
//
// A program is up to kMaxPolicySteps policies, run in order by the group of threads that finishes
// the statistics. Each sees the norms that the ones before it leave. A norm that is NaN or Inf, or
// 0, never enters a state. tests/policy_reference.py holds the plain version of every policy.
#pragma once

#include <cmath>
#include <cstdint>

#include "moments.h"
#include "policy_group.h"
#include "policy_window.h"

namespace gradstat {

// Guards a division as the published versions do: torch.nn.utils.clip_grad_norm_ and ZClip.
constexpr double kPolicyEpsilon = 1e-6;
// A spread of less than this share of the mean counts as this share: a history that is constant up
// to rounding must not make an outlier of the next rounding error.
constexpr double kRelativeSpreadFloor = 1e-3;

GRADSTAT_HD static inline double larger(double a, double b) { return a > b ? a : b; }
GRADSTAT_HD static inline double smaller(double a, double b) { return a < b ? a : b; }

// torch's factor for a limit that a user set: min(1, limit / (norm + eps)).
GRADSTAT_HD static inline double factor_to_set(double limit, double norm) {
  return smaller(1.0, limit / (norm + kPolicyEpsilon));
}

// The factor for a limit learnt from norms. Without eps: a run whose norms are all 1e-7 would
// otherwise be clipped on every step.
GRADSTAT_HD static inline double factor_to_learnt(double limit, double norm) {
  return norm > limit ? limit / norm : 1.0;
}

// ---- policies of the total norm: each returns the norm allowed, +Inf for any --------------------

// Percentile p of the last norms, this one included, times a factor, and at most a share of the
// highest such percentile so far; a set norm until enough norms are known. Parameters: percentile,
// window, factor, least history, norm until then, share. State: a window with sorted values, then
// the highest percentile. (AutoClip: Seetharaman et al. 2020, arXiv:2007.14469, where the factor
// and the least history are 1 and no share is taken.)
template <class Group>
GRADSTAT_HD static inline double allow_percentile(const PolicyStep& step, double* state,
                                                  double norm, const Group& group) {
  const Window window = {state, static_cast<int64_t>(step.param[1])};
  push_sorted(window, norm, group);
  if (state[0] < smaller(step.param[3], step.param[1])) return step.param[4];
  const double level = percentile_of(window, step.param[0]);
  double* stored_peak = window.sorted() + window.length;
  const double peak = larger(*stored_peak, level);
  group.sync();  // all have read it
  if (group.rank() == 0) *stored_peak = peak;
  return smaller(step.param[2] * level, step.param[5] * peak);
}

// ZClip (Kumar et al. 2025, arXiv:2504.02507). Parameters: alpha, z threshold, warm-up steps,
// largest norm. State: {count, mean, variance, sum of squared deviations during warm-up}.
GRADSTAT_HD static inline double allow_zclip(const PolicyStep& step, double* state, double norm) {
  const double alpha = step.param[0];
  const double z_threshold = step.param[1];
  const double max_norm = step.param[3];
  if (state[0] < step.param[2]) {
    state[0] += 1;
    const double delta = norm - state[1];
    state[1] += delta / state[0];
    state[3] += delta * (norm - state[1]);
    state[2] = state[3] / state[0];
    return max_norm;
  }
  const double deviation = larger(sqrt(state[2]), kRelativeSpreadFloor * state[1]);
  const double z = (norm - state[1]) / (deviation + kPolicyEpsilon);
  double allowed = HUGE_VAL;
  if (z > z_threshold) allowed = state[1] + z_threshold * deviation / (z / z_threshold);
  const double seen = smaller(norm, allowed);
  state[1] = alpha * state[1] + (1 - alpha) * seen;
  state[2] = alpha * state[2] + (1 - alpha) * (seen - state[1]) * (seen - state[1]);
  return smaller(allowed, max_norm);
}

// Whether a norm is above mean + sigma * deviation of the window before it (OLMo-core's
// SkipStepOptimizer). Parameters: sigma, window, least history with this norm.
template <class Group>
GRADSTAT_HD static inline bool is_spike(const PolicyStep& step, double* state, double norm,
                                        const Group& group) {
  const Window window = {state, static_cast<int64_t>(step.param[1])};
  const int64_t count = window.count();
  bool spike = false;
  const double least = smaller(step.param[2], step.param[1]);
  if (count > 1 && static_cast<double>(count + 1) >= least) {
    double sum = 0;
    for (int64_t i = group.rank(); i < count; i += group.size()) sum += window.ring()[i];
    const double mean = group.sum(sum) / static_cast<double>(count);
    double squares = 0;
    for (int64_t i = group.rank(); i < count; i += group.size()) {
      squares += (window.ring()[i] - mean) * (window.ring()[i] - mean);
    }
    const double deviation = sqrt(group.sum(squares) / static_cast<double>(count - 1));
    spike = norm > mean + step.param[0] * larger(deviation, kRelativeSpreadFloor * mean);
  }
  push(window, norm, group);
  return spike;
}

// ---- policies of each tensor's norm -------------------------------------------------------------

// AdaGC (Wang et al. 2025, arXiv:2502.11034, algorithm 1). Parameters: lambda_rel, lambda_abs,
// beta, warm-up steps. State: {count, gamma[tensors]}, gamma starting at +Inf.
GRADSTAT_HD static inline double adagc_factor(const PolicyStep& step, double count, double* gamma,
                                              double norm, double total_norm) {
  if (!(norm > 0)) return 1.0;  // nothing to scale, nothing to learn
  if (count < step.param[3]) {
    const double factor = factor_to_learnt(step.param[1], total_norm);
    *gamma = smaller(*gamma, factor * norm);
    return factor;
  }
  if (*gamma == HUGE_VAL) *gamma = norm;  // first gradient of a tensor that came late
  const double factor = factor_to_learnt(step.param[0] * *gamma, norm);
  *gamma = step.param[2] * *gamma + (1 - step.param[2]) * factor * norm;
  return factor;
}

// ---- the program --------------------------------------------------------------------------------

// What the policies of a program have made of a step so far; equal for all threads.
struct Decision {
  double norm;     // total norm that the next policy sees
  double factor;   // of the policies of the total norm
  double allowed;  // by the last of these
  bool skip;
};

template <class Group>
GRADSTAT_HD static inline void run_total_step(const PolicyStep& step, double* state,
                                              Decision* decision, const Group& group) {
  const double norm = decision->norm;
  if (step.kind == PolicyKind::kGlobalNorm) {
    decision->allowed = step.param[0];
    const double factor = factor_to_set(step.param[0], norm);
    decision->factor *= factor;
    decision->norm *= factor;
    return;
  }
  if (!(norm > 0)) return;  // an all-zero step teaches nothing
  double allowed = HUGE_VAL;
  if (step.kind == PolicyKind::kSkipOnSpike) {
    decision->skip = is_spike(step, state, norm, group);
  } else if (step.kind == PolicyKind::kPercentile) {
    allowed = allow_percentile(step, state, norm, group);
  } else {
    allowed = group.sum(group.rank() == 0 ? allow_zclip(step, state, norm) : 0.0);
  }
  if (allowed < HUGE_VAL) {
    decision->allowed = allowed;
    const double factor = factor_to_learnt(allowed, norm);
    decision->factor *= factor;
    decision->norm *= factor;
  }
}

template <class Group>
GRADSTAT_HD static inline void run_tensor_step(const PolicyStep& step, double* state,
                                               const double* table, int64_t count,
                                               double inverse_scale, double* coefficients,
                                               Decision* decision, const Group& group) {
  const double norm = decision->norm;
  if (!(norm > 0)) return;
  const bool is_adagc = step.kind == PolicyKind::kAdaGc;
  const double seen = is_adagc ? state[0] : 0.0;
  double squares = 0;
  for (int64_t i = group.rank(); i < count; i += group.size()) {
    const double l2 = table[i * kNumColumns + kL2];
    if (l2 != l2) continue;  // missing
    const double before = l2 * inverse_scale * coefficients[i] * decision->factor;
    const double factor = is_adagc ? adagc_factor(step, seen, state + 1 + i, before, norm)
                                   : factor_to_set(step.param[0], before);
    coefficients[i] *= factor;
    const double share = before * factor / norm;  // at most 1: its square cannot overflow
    squares += share * share;
  }
  decision->norm = norm * sqrt(group.sum(squares));
  if (is_adagc && group.rank() == 0) state[0] = seen + 1;
}

// Runs a program after the table is complete, writing what `clip` points at. All threads of the
// group call it with equal arguments; `table` must be visible to all.
template <class Group>
GRADSTAT_HD static inline void run_program(const ClipRequest& clip, const double* table,
                                           int64_t count, const Moments& totals,
                                           const Group& group) {
  const Program& program = clip.program;
  const double inverse_scale =
      clip.grad_scale != nullptr ? 1.0 / static_cast<double>(*clip.grad_scale) : 1.0;
  const double torch_norm = norm_of(totals, program.norm_kind);
  const bool finite = torch_norm < HUGE_VAL;
  const bool over_finite = !finite && program.nonfinite == Nonfinite::kZero;
  const double norm = (over_finite ? l2_of(totals) : torch_norm) * inverse_scale;
  const bool usable = norm < HUGE_VAL;

  Decision decision = {norm, 1.0, HUGE_VAL, !finite && program.nonfinite == Nonfinite::kSkip};
  if (!finite && program.nonfinite == Nonfinite::kClip) decision.factor = norm > 0 ? 0.0 : 1.0;
  double* coefficients = clip.coefficients;
  if (coefficients != nullptr) {
    // Each thread keeps to its own places, here and below.
    for (int64_t i = group.rank(); i < count; i += group.size()) coefficients[i] = 1.0;
  }
  for (int s = 0; usable && !decision.skip && s < program.count; ++s) {
    const PolicyStep& step = program.step[s];
    double* state = clip.state != nullptr ? clip.state + step.state : nullptr;
    if (step.kind == PolicyKind::kPerLayer || step.kind == PolicyKind::kAdaGc) {
      run_tensor_step(step, state, table, count, inverse_scale, coefficients, &decision, group);
    } else {
      run_total_step(step, state, &decision, group);
    }
  }

  const bool skip = decision.skip;
  const double factor = skip ? 1.0 : decision.factor;
  if (coefficients != nullptr) {
    for (int64_t i = group.rank(); i < count; i += group.size()) {
      coefficients[i] = skip ? 1.0 : coefficients[i] * factor;
    }
  }
  if (group.rank() != 0) return;
  const bool by_norm = !skip && usable && norm > 0;
  const double coefficient = by_norm ? decision.norm / norm : factor;
  clip.out[kOutNorm] = torch_norm * inverse_scale;
  clip.out[kOutFactor] = factor;
  clip.out[kOutCoefficient] = coefficient;
  clip.out[kOutSkip] = skip ? 1.0 : 0.0;
  clip.out[kOutAllowed] = decision.allowed;
  clip.out[kOutFinite] = finite ? 1.0 : 0.0;
  if (clip.norm_f32 != nullptr) *clip.norm_f32 = static_cast<float>(clip.out[kOutNorm]);
  if (clip.found_inf != nullptr) *clip.found_inf = skip ? 1.0f : 0.0f;
  if (clip.state != nullptr) {
    clip.state[kCounterSteps] += 1;
    // Rounding apart: per-tensor factors of 1 may give back a norm that differs in its last bit.
    clip.state[kCounterClipped] += !skip && coefficient < 1.0 - 1e-12 ? 1 : 0;
    clip.state[kCounterSkipped] += skip ? 1 : 0;
    clip.state[kCounterSkippedInARow] = skip ? clip.state[kCounterSkippedInARow] + 1 : 0;
  }
}

}  // namespace gradstat
