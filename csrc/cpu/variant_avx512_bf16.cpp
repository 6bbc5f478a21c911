// The kernels compiled for avx512_bf16; CMakeLists.txt gives this file its instruction-set flags.
#define GRADSTAT_VARIANT avx512_bf16
#include "../moments.h"
#include "dispatch.h"
#include "simd_avx512.h"
// After everything they use.
#include "moments_body.h"
#include "units_body.h"
// Last: it lists the kernels of all three.
#include "scale_body.h"
