// Threads come from the OpenMP runtime that torch has already loaded, whatever its file is called.
//
// A second pool would compete with torch's for the same cores: after each parallel region the idle
// workers of an OpenMP pool keep spinning for milliseconds, right when the gradients are ready.
// Finding the runtime by its symbols also frees the module from linking one (libgomp is missing on
// slim images, and torch renames its copy).
#include "parallel.h"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

#include "subnormals.h"

namespace gradstat::cpu {
namespace {

// libgomp's entry point; LLVM's and Intel's runtimes export it as well.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string name = "std::thread";
};

#if defined(__linux__)
int find_openmp(dl_phdr_info* info, size_t, void* data) {
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* file = slash != nullptr ? slash + 1 : info->dlpi_name;
  for (const char* prefix : {"libgomp", "libiomp5", "libomp"}) {
    if (std::strncmp(file, prefix, std::strlen(prefix)) != 0) continue;
    void* handle = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
    if (handle == nullptr) continue;
    auto* runtime = static_cast<Runtime*>(data);
    runtime->parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
    dlclose(handle);  // the one who loaded it keeps it loaded
    if (runtime->parallel == nullptr) continue;
    runtime->name = std::string("OpenMP (") + file + ")";
    return 1;
  }
  return 0;
}
#endif

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime result;
#if defined(__linux__)
    dl_iterate_phdr(find_openmp, &result);
#endif
    return result;
  }();
  return found;
}

struct Job {
  int64_t count;
  int64_t grain;
  void (*body)(void* context, int64_t begin, int64_t end);
  void* context;
  std::atomic<int64_t> next{0};
};

void work(void* data) {
  auto* job = static_cast<Job*>(data);
  const SubnormalsOn subnormals_on;
  for (;;) {
    const int64_t begin = job->next.fetch_add(job->grain, std::memory_order_relaxed);
    if (begin >= job->count) return;
    const int64_t end = begin + job->grain;
    job->body(job->context, begin, end < job->count ? end : job->count);
  }
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads,
                  void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  if (count <= 0) return;
  Job job{count, grain < 1 ? 1 : grain, body, context};
  const int64_t pieces = (count + job.grain - 1) / job.grain;
  if (threads > pieces) threads = static_cast<int>(pieces);
  if (threads <= 1) {
    job.grain = count;
    work(&job);
  } else if (runtime().parallel != nullptr) {
    runtime().parallel(work, &job, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) others.emplace_back(work, &job);
    work(&job);
    for (std::thread& other : others) other.join();
  }
}

const char* thread_source() { return runtime().name.c_str(); }

}  // namespace gradstat::cpu
