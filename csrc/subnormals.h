// Subnormal numbers count in full, whatever flush-to-zero mode a thread is in.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <cstdint>
#endif

namespace gradstat {

// Clears flush-to-zero and denormals-are-zero on this thread for its lifetime.
class SubnormalsOn {
 public:
#if defined(__SSE__)
  SubnormalsOn() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~SubnormalsOn() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  SubnormalsOn() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_) : : "memory");
    const uint64_t on = saved_ & ~(uint64_t{1} << 24 | uint64_t{1} << 19);
    asm volatile("msr fpcr, %0" : : "r"(on) : "memory");
  }
  ~SubnormalsOn() { asm volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }

 private:
  uint64_t saved_;
#else
  SubnormalsOn() {}
#endif
};

}  // namespace gradstat
