// The kernels compiled for avx512; CMakeLists.txt gives this file its instruction-set flags.
#include "simd_avx512.h"

#define GRADSTAT_VARIANT avx512
#include "../moments.h"
#include "dispatch.h"
// After everything they use.
#include "moments_body.h"
#include "scale_body.h"
