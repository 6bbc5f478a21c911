// Stands in for the CUDA kernels in a build without nvcc.
#include <stdexcept>

#include "../kernels.h"

namespace gradstat::cuda {
namespace {

[[noreturn]] void not_built() {
  throw std::runtime_error(
      "gradstat must be built with CUDA to read CUDA tensors, and this build is not "
      "(" GRADSTAT_CUDA_REASON "); install nvcc and reinstall with GRADSTAT_CUDA=ON");
}

}  // namespace

bool is_built() { return false; }

int device_count(const char** reason) {
  if (reason != nullptr) *reason = GRADSTAT_CUDA_REASON;
  return 0;
}

int64_t moments_workspace_bytes(const TensorRef*, int64_t) { not_built(); }

void moments(const TensorRef*, int64_t, double*, int64_t*, const ClipRequest&, void*, uint32_t*,
             int, void*) {
  not_built();
}

void scale(const TensorRef*, int64_t, const double*, int64_t, int, void*) { not_built(); }

void clamp(const TensorRef*, int64_t, double, int, void*) { not_built(); }

int64_t units_workspace_bytes(const TensorRef&) { not_built(); }

void units(const TensorRef&, const UnitRule&, int64_t*, double*, void*, uint32_t*, int, void*) {
  not_built();
}

}  // namespace gradstat::cuda
