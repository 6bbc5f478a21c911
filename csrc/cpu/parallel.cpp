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

#include "../subnormals.h"

namespace gradstat::cpu {
namespace {

// libgomp's entry point; LLVM's and Intel's runtimes export it as well.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string name = "std::thread";
};

#if defined(__linux__)
// The libraries to ask, best first: torch's own finds the runtime that torch runs on even where
// another package has loaded a second one (scikit-learn brings its own libgomp).
constexpr const char* kLibraries[] = {"libtorch_cpu", "libgomp", "libiomp5", "libomp"};

const char* file_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash != nullptr ? slash + 1 : path;
}

struct Search {
  const char* library;
  Runtime* found;
};

int ask_library(dl_phdr_info* info, size_t, void* data) {
  const auto* search = static_cast<const Search*>(data);
  const char* file = file_name(info->dlpi_name);
  if (std::strncmp(file, search->library, std::strlen(search->library)) != 0) return 0;
  void* handle = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
  if (handle == nullptr) return 0;
  void* symbol = dlsym(handle, "GOMP_parallel");  // of the library, or of what it depends on
  dlclose(handle);                                // the one who loaded it keeps it loaded
  if (symbol == nullptr) return 0;
  Dl_info owner;
  if (dladdr(symbol, &owner) != 0) file = file_name(owner.dli_fname);
  search->found->parallel = reinterpret_cast<GompParallel>(symbol);
  search->found->name = std::string("OpenMP (") + file + ")";
  return 1;
}
#endif

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime result;
#if defined(__linux__)
    for (const char* library : kLibraries) {
      Search search = {library, &result};
      if (dl_iterate_phdr(ask_library, &search) != 0) break;
    }
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
