// The kernels compiled for neon; CMakeLists.txt gives this file its instruction-set flags.
#include "simd_neon.h"

#define GRADSTAT_VARIANT neon
#include "../moments.h"
#include "dispatch.h"
// After everything they use.
#include "moments_body.h"
#include "units_body.h"
// Last: it lists the kernels of all three.
#include "scale_body.h"
