// The drivers of `scale` and `clamp`.
#include <cmath>
#include <cstring>

#include "chunks.h"
#include "dispatch.h"

namespace gradstat::cpu {
namespace {

// Calls write(tensor, data, elements) for every chunk of every tensor.
template <class Write>
void for_each_chunk(const TensorRef* tensors, int64_t count, int threads, const Write& write) {
  const Chunks chunks(tensors, count);
  chunks.for_each(threads, [&](int64_t i, int64_t index, int64_t) {
    const TensorRef& tensor = tensors[i];
    const Chunk chunk = chunk_at(chunks.plan(i), tensor.numel, index);
    const int64_t first_byte = chunk.begin * element_bytes(tensor.dtype);
    write(i, static_cast<char*>(tensor.data) + first_byte, chunk.size);
  });
}

}  // namespace

void scale(const TensorRef* tensors, int64_t count, const double* coefficient, int64_t stride,
           int threads) {
  if (stride == 0 && (*coefficient == 1.0 || std::isnan(*coefficient))) return;
  const Kernels& kernels = *variant().kernels;
  for_each_chunk(tensors, count, threads, [&](int64_t i, char* data, int64_t n) {
    const double factor = coefficient[i * stride];
    if (factor == 1.0 || std::isnan(factor)) return;
    const DType dtype = tensors[i].dtype;
    if (factor == 0.0) {
      std::memset(data, 0, static_cast<size_t>(n * element_bytes(dtype)));
    } else {
      kernels.scale[static_cast<int>(dtype)](data, n, factor);
    }
  });
}

void clamp(const TensorRef* tensors, int64_t count, double limit, int threads) {
  const Kernels& kernels = *variant().kernels;
  for_each_chunk(tensors, count, threads, [&](int64_t i, char* data, int64_t n) {
    kernels.clamp[static_cast<int>(tensors[i].dtype)](data, n, limit);
  });
}

}  // namespace gradstat::cpu
