// Threads for the CPU kernels.
#pragma once

#include <cstdint>

namespace gradstat::cpu {

// Calls body(context, begin, end) so that the calls together cover [0, count) once, on up to
// `threads` threads, in pieces of about `grain`. Which thread takes which piece is not fixed: body
// must write each result to a place of its own. Subnormals are honoured inside body whatever
// flush-to-zero mode the caller or a thread is in. body must not throw.
void parallel_for(int64_t count, int64_t grain, int threads,
                  void (*body)(void* context, int64_t begin, int64_t end), void* context);

template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, Body body) {
  parallel_for(
      count, grain, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
      &body);
}

// With fewer elements, one thread does the work of a call: of 262144 fp32 in memory it takes 62 us,
// two take 88 us where the second one slept (most of it for waking), and 38 and 32 us where it did
// not. From 2^20 on, two are faster in either case.
constexpr int64_t kSerialElements = 262144;

// Where the threads come from: "OpenMP (libgomp.so.1)" or "std::thread".
const char* thread_source();

}  // namespace gradstat::cpu
