// The C face of the emulated kernels, for ctypes. Every function returns the text of an error, or
// an empty one.
#include <cuda_runtime.h>

#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include "../../csrc/cuda/batch.h"
#include "../../csrc/kernels.h"
#include "emulation.h"

namespace {

using emulation::g_state;

std::string g_error;

template <class Body>
const char* guarded(uint64_t seed, const Body& body) {
  g_error.clear();
  g_state.seed = seed;
  try {
    body();
  } catch (const std::exception& error) {
    g_error = error.what();
  }
  return g_error.c_str();
}

// Threads of a warp that wait at different places, for the test of the emulation itself.
void unbalanced_kernel(const int& threads) {
  if (static_cast<int>(threadIdx.x) < threads) __syncthreads();
}

}  // namespace

extern "C" {

const char* emulated_moments(const gradstat::TensorRef* tensors, int64_t count, double* table,
                             int64_t* histogram, double max_norm, int kind, double* clip_out,
                             int device, uint64_t seed) {
  return guarded(seed, [&] {
    const int64_t bytes = gradstat::cuda::moments_workspace_bytes(tensors, count);
    // Of exactly that size and full of junk: an overrun or a missing initialisation shows.
    const auto workspace = std::make_unique<char[]>(static_cast<size_t>(bytes));
    std::memset(workspace.get(), 0xa5, static_cast<size_t>(bytes));
    const auto counter = std::make_unique<uint32_t>(0);
    gradstat::ClipRequest clip = {};
    clip.program.norm_kind = static_cast<gradstat::NormKind>(kind);
    clip.program.nonfinite = gradstat::Nonfinite::kKeep;
    if (max_norm < HUGE_VAL) {
      clip.program.nonfinite = gradstat::Nonfinite::kClip;
      clip.program.count = 1;
      clip.program.step[0] = {gradstat::PolicyKind::kGlobalNorm, {max_norm}, 0};
    }
    clip.out = clip_out;
    gradstat::cuda::moments(tensors, count, table, histogram, clip, workspace.get(), counter.get(),
                            device, nullptr);
    if (*counter != 0) g_error = "the counter does not hold 0 again";
  });
}

const char* emulated_scale(const gradstat::TensorRef* tensors, int64_t count,
                           const double* coefficient, int64_t stride, int device, uint64_t seed) {
  return guarded(
      seed, [&] { gradstat::cuda::scale(tensors, count, coefficient, stride, device, nullptr); });
}

const char* emulated_clamp(const gradstat::TensorRef* tensors, int64_t count, double limit,
                           int device, uint64_t seed) {
  return guarded(seed, [&] { gradstat::cuda::clamp(tensors, count, limit, device, nullptr); });
}

const char* emulated_units(const gradstat::TensorRef* activation, int active, double low_from,
                           double low_to, double high_from, int64_t* counts, double* row,
                           int device, uint64_t seed) {
  return guarded(seed, [&] {
    const gradstat::UnitRule rule = {static_cast<gradstat::ActiveRule>(active), low_from, low_to,
                                     high_from};
    const int64_t bytes = gradstat::cuda::units_workspace_bytes(*activation);
    const auto workspace = std::make_unique<char[]>(static_cast<size_t>(bytes));
    std::memset(workspace.get(), 0xa5, static_cast<size_t>(bytes));
    const auto counter = std::make_unique<uint32_t>(0);
    gradstat::cuda::units(*activation, rule, counts, row, workspace.get(), counter.get(), device,
                          nullptr);
    if (*counter != 0) g_error = "the counter does not hold 0 again";
  });
}

// Checks, without reading any memory, that the chunks of all batches are the list's elements, each
// once and in order, and that packing loses nothing.
const char* emulated_packing(const gradstat::TensorRef* tensors, int64_t count, int64_t* batches) {
  using namespace gradstat;
  return guarded(0, [&] {
    const auto batch = std::make_unique<cuda::Batch>();
    *batches = 0;
    for (int64_t first = 0; first < count; ++*batches) {
      const int64_t end = cuda::fill_batch(tensors, count, first, batch.get());
      int64_t reached = 0;  // elements of the current tensor that were seen
      int current = 0;
      const auto finish = [&](int until) {
        for (; current < until; ++current, reached = 0) {
          const TensorRef& in = tensors[first + current];
          const TensorRef out = cuda::tensor_at(*batch, current);
          const bool missing = in.numel == kMissing;
          if (out.data != in.data || out.dtype != in.dtype || out.numel != in.numel ||
              (!missing && (out.rows != in.rows || out.run != in.run))) {
            g_error = "a tensor was not packed as it is";
          }
          if (reached != (missing ? 0 : in.numel)) g_error = "chunks do not fill their tensor";
        }
      };
      for (uint32_t chunk = 0; chunk < batch->chunks; ++chunk) {
        finish(cuda::tensor_of_chunk(*batch, chunk));
        const TensorRef tensor = cuda::tensor_at(*batch, current);
        const Chunk place =
            chunk_at(plan_chunks(tensor), tensor.numel, chunk - batch->first_chunk[current]);
        if (place.begin != reached || place.size <= 0 || place.size > kChunkElements) {
          g_error = "a chunk does not begin where the last one ended";
        }
        reached += place.size;
      }
      finish(batch->tensors);
      first = end;
    }
  });
}

const char* emulated_barrier(int threads, uint64_t seed) {
  return guarded(seed, [&] {
    void* arguments[] = {&threads};
    if (cudaLaunchKernel(unbalanced_kernel, dim3(1), dim3(64), arguments, 0, nullptr) !=
        cudaSuccess) {
      g_error = g_state.error_text;
    }
  });
}

int emulated_device_count(int devices, int driver, const char** reason) {
  g_state.devices = devices;
  g_state.driver = driver;
  const int count = gradstat::cuda::device_count(reason);
  g_state.devices = 2;
  g_state.driver = 13000;
  return count;
}

// {launches, device of the last one, current device, calls of cudaSetDevice}, and starts anew.
void emulated_history(int64_t* out) {
  out[0] = g_state.launches;
  out[1] = g_state.launch_device;
  out[2] = g_state.device;
  out[3] = g_state.set_device_calls;
  g_state.launches = g_state.set_device_calls = 0;
}

}  // extern "C"
