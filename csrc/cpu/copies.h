// Copies of tensors on the CPU, to tell by how much they have changed since.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../kernels.h"

namespace gradstat::cpu {

class Copies {
 public:
  // Whether a change of these can be told: torch subtracts fp32 and fp64 as they are.
  static bool can_hold(const std::vector<TensorRef>& tensors);

  explicit Copies(const std::vector<TensorRef>& tensors);

  // Writes the moments of the copies, of the change of each tensor since, and of both together:
  // 2 n + 1 rows. Whether it does: not where a tensor lies in memory otherwise than it did.
  bool changes(const std::vector<TensorRef>& now, double* table, int threads);

 private:
  std::vector<TensorRef> refs_;  // of the copies, then of the changes
  std::unique_ptr<char[]> memory_;
};

}  // namespace gradstat::cpu
