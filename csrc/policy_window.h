// The last norms of a run: a ring, and the same values in order. Both lie in a policy's state.
//
// Every function is called by all threads of a group (policy_group.h) with equal arguments, and
// leaves what it wrote visible to all of them.
#pragma once

#include <cstdint>

#include "policy_group.h"

namespace gradstat {

// state = {count, position, ring[length]} and, where wanted, sorted[length] behind it.
struct Window {
  double* state;
  int64_t length;

  GRADSTAT_HD int64_t count() const { return static_cast<int64_t>(state[0]); }
  GRADSTAT_HD int64_t position() const { return static_cast<int64_t>(state[1]); }
  GRADSTAT_HD double* ring() const { return state + 2; }
  GRADSTAT_HD double* sorted() const { return state + 2 + length; }
};

// Puts a value in the place of the oldest one, in the ring alone.
template <class Group>
GRADSTAT_HD static inline void push(const Window& window, double value, const Group& group) {
  group.sync();  // all have read what changes now
  if (group.rank() == 0) {
    const int64_t position = window.position();
    window.ring()[position] = value;
    window.state[1] = static_cast<double>(position + 1 == window.length ? 0 : position + 1);
    if (window.count() < window.length) window.state[0] += 1;
  }
  group.sync();
}

// Moves values[first, last) one place up.
template <class Group>
GRADSTAT_HD static inline void move_up(double* values, int64_t first, int64_t last,
                                       const Group& group) {
  // From the top, a group's width at a time: what a turn overwrites has been read before it.
  for (int64_t top = last; top > first; top -= group.size()) {
    const int64_t i = top - 1 - group.rank();
    const double value = i >= first ? values[i] : 0.0;
    group.sync();
    if (i >= first) values[i + 1] = value;
  }
}

// Moves values[first, last) one place down.
template <class Group>
GRADSTAT_HD static inline void move_down(double* values, int64_t first, int64_t last,
                                         const Group& group) {
  for (int64_t bottom = first; bottom < last; bottom += group.size()) {
    const int64_t i = bottom + group.rank();
    const double value = i < last ? values[i] : 0.0;
    group.sync();
    if (i < last) values[i - 1] = value;
  }
}

// The number of values below a limit.
template <class Group>
GRADSTAT_HD static inline int64_t count_below(const double* values, int64_t count, double limit,
                                              const Group& group) {
  double below = 0;
  for (int64_t i = group.rank(); i < count; i += group.size()) below += values[i] < limit;
  return static_cast<int64_t>(group.sum(below));
}

// The same as `push`, in the ring and in the sorted values.
template <class Group>
GRADSTAT_HD static inline void push_sorted(const Window& window, double value, const Group& group) {
  double* sorted = window.sorted();
  const int64_t count = window.count();
  // The place that falls free: that of the value that leaves, or the one behind the last.
  const bool full = count == window.length;
  const int64_t hole =
      full ? count_below(sorted, count, window.ring()[window.position()], group) : count;
  const int64_t below = count_below(sorted, count, value, group);
  const bool up = below <= hole;
  if (up) {
    move_up(sorted, below, hole, group);
  } else {
    move_down(sorted, hole + 1, below, group);
  }
  group.sync();
  if (group.rank() == 0) sorted[up ? below : below - 1] = value;
  push(window, value, group);
}

// Percentile of the sorted values with linear interpolation, as numpy.percentile.
GRADSTAT_HD static inline double percentile_of(const Window& window, double percentile) {
  const double* sorted = window.sorted();
  const int64_t count = window.count();
  const double at = percentile / 100.0 * static_cast<double>(count - 1);
  const auto below = static_cast<int64_t>(at);
  const double above = below + 1 < count ? sorted[below + 1] : sorted[below];
  return sorted[below] + (at - static_cast<double>(below)) * (above - sorted[below]);
}

}  // namespace gradstat
