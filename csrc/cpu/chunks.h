// All chunks of a list of tensors, and a parallel loop over them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../moments.h"
#include "parallel.h"

namespace gradstat::cpu {

class Chunks {
 public:
  Chunks(const TensorRef* tensors, int64_t count)
      : plans_(static_cast<size_t>(count)), first_slots_(static_cast<size_t>(count) + 1) {
    for (size_t i = 0; i < plans_.size(); ++i) {
      plans_[i] = plan_chunks(tensors[i]);
      first_slots_[i + 1] = first_slots_[i] + plans_[i].count;
      if (tensors[i].numel > 0) elements_ += tensors[i].numel;
    }
  }

  // Chunks of all tensors together; each has a slot in [0, count()), a tensor's slots in a row.
  int64_t count() const { return first_slots_.back(); }
  int64_t first_slot(int64_t tensor) const { return first_slots_[static_cast<size_t>(tensor)]; }
  const ChunkPlan& plan(int64_t tensor) const { return plans_[static_cast<size_t>(tensor)]; }

  // Calls body(tensor, index of the chunk in its tensor, slot) once for each chunk.
  template <class Body>
  void for_each(int threads, const Body& body) const {
    if (count() == 0) return;
    // Pieces of about one full chunk's elements, however small the tensors are.
    const int64_t grain = kChunkElements / (elements_ / count() + 1) + 1;
    parallel_for(count(), grain, elements_ < kSerialElements ? 1 : threads,
                 [&](int64_t begin, int64_t end) {
                   auto after = std::upper_bound(first_slots_.begin(), first_slots_.end(), begin);
                   int64_t tensor = after - first_slots_.begin() - 1;
                   for (int64_t slot = begin; slot < end; ++slot) {
                     while (slot >= first_slot(tensor + 1)) ++tensor;
                     body(tensor, slot - first_slot(tensor), slot);
                   }
                 });
  }

 private:
  std::vector<ChunkPlan> plans_;
  std::vector<int64_t> first_slots_;
  int64_t elements_ = 0;
};

}  // namespace gradstat::cpu
