// What a test may set and see of the emulated machine.
#pragma once

#include <cstdint>
#include <string>

namespace emulation {

struct State {
  uint64_t seed = 0;  // 0: ascending order of blocks and threads, 1: descending, else: shuffled
  int devices = 2;
  int driver = 13000;  // 0: none is installed
  int device = 0;      // the current one
  int launch_device = -1;
  int64_t launches = 0;
  int64_t set_device_calls = 0;
  int64_t cleared_errors = 0;
  std::string error_text;
};
extern State g_state;

}  // namespace emulation
