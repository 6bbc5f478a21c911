#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gradstat::cpu {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Variant kVariants[] = {
#ifdef GRADSTAT_HAVE_AVX512_BF16
    {"avx512_bf16", &avx512_bf16::kKernels, has_avx512_bf16},
#endif
#ifdef GRADSTAT_HAVE_AVX512
    {"avx512", &avx512::kKernels, has_avx512},
#endif
#ifdef GRADSTAT_HAVE_AVX2
    {"avx2", &avx2::kKernels, has_avx2},
#endif
#ifdef GRADSTAT_HAVE_NEON
    {"neon", &neon::kKernels, always},
#endif
    {"scalar", &scalar::kKernels, always},
};

std::atomic<const Variant*> g_variant{nullptr};
std::atomic<const char*> g_reason{"not used yet"};

const Variant& named(const std::string& name, const char* where) {
  std::string usable;
  for (const Variant& candidate : kVariants) {
    if (!candidate.is_supported()) continue;
    if (name == candidate.name) return candidate;
    usable += (usable.empty() ? "" : ", ") + std::string(candidate.name);
  }
  throw std::invalid_argument(std::string(where) +
                              " must name a CPU variant that runs here, got '" + name +
                              "'; use one of: " + usable);
}

const Variant& choose_default() {
  const char* forced = std::getenv("GRADSTAT_CPU");
  if (forced != nullptr && *forced != '\0') {
    g_reason = "set by GRADSTAT_CPU";
    return named(forced, "GRADSTAT_CPU");
  }
  g_reason = "the best one that this processor supports";
  for (const Variant& candidate : kVariants) {
    if (candidate.is_supported()) return candidate;
  }
  return kVariants[sizeof kVariants / sizeof kVariants[0] - 1];
}

}  // namespace

const Variant* variants(int* count) {
  *count = sizeof kVariants / sizeof kVariants[0];
  return kVariants;
}

const Variant& variant() {
  const Variant* current = g_variant.load(std::memory_order_acquire);
  if (current == nullptr) {
    current = &choose_default();
    g_variant.store(current, std::memory_order_release);
  }
  return *current;
}

void use_variant(const char* name) {
  if (*name == '\0') {
    g_variant = nullptr;
    return;
  }
  g_variant = &named(name, "name");
  g_reason = "set by use_variant";
}

const char* variant_reason() {
  variant();
  return g_reason;
}

}  // namespace gradstat::cpu
