// The threads that run a clip program together: one on the CPU, the last block on CUDA.
//
// A group has
//   rank()       0 .. size() - 1
//   size()
//   sync()       waits for all; what any thread wrote before is visible to all after
//   sum(value)   the sum of all threads' values, equal bits for all of them and in every run; all
//                threads have arrived before any returns
// All threads of a group take the same branches around sync() and sum().
#pragma once

#include "moments.h"

namespace gradstat {

struct SingleThread {
  GRADSTAT_HD int rank() const { return 0; }
  GRADSTAT_HD int size() const { return 1; }
  GRADSTAT_HD void sync() const {}
  GRADSTAT_HD double sum(double value) const { return value; }
};

}  // namespace gradstat
