// The loop of `moments`, written once and compiled per instruction set: a variant_*.cpp includes
// its simd_*.h, defines GRADSTAT_VARIANT as the namespace, and includes this file.
//
// A block of kBlock elements first runs without a thought for NaN and Inf. If one shows up (or an
// fp64 block leaves the range whose squares a double holds), the block's results are dropped and
// the block, still in the L1 cache, runs again with care. So each gradient is read from memory
// once.

namespace gradstat::GRADSTAT_VARIANT {
namespace {

constexpr int64_t kBlock = 4096;

// Its callers are several, and the accumulators must stay in registers.
#define GRADSTAT_INLINE __attribute__((always_inline)) inline

// Elements of one register of bytes.
constexpr int64_t kStep = 4 * kLanes;

// Asks for the lines of a step, to lie in the L1 cache (kLocality 3) or in the L2 cache (2).
template <int kLocality, class Element>
GRADSTAT_INLINE void prefetch(const Element* at) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  for (int64_t i = 0; i < kStep; i += kLine) __builtin_prefetch(at + i, 0, kLocality);
}

// What else to do with the elements of a block as they are read, in order: step() for each kStep of
// them, with their place in the block, and group() for each group, or rest() for what is in
// neither. `Nothing`, here.
template <class Element>
struct Nothing {
  static constexpr bool kAsksAhead = false;  // whether step() prefetches what follows
  void step(const Element*, int64_t) const {}
  void group(const Element*, int64_t) const {}
  void rest(const Element*, int64_t) const {}  // at most kGroup elements
};

constexpr uint32_t kMagnitudeMask = 0x7fffffffu;
constexpr uint32_t kInfinityBits = 0x7f800000u;

// ---- histogram of one block ---------------------------------------------------------------------

// Byte exponents of a block; 64 spare bytes so that the last vector may be padded.
struct Exponents {
  alignas(64) uint8_t bin[kBlock + 64];
};

// Adds the bins low..high of n exponents. A block of gradients spans some 16 binary exponents, and
// 64 compares a bin and instruction beat incrementing counters in memory.
inline void count_bins(Exponents* exponents, int64_t n, int low, int high, uint32_t* histogram) {
  constexpr int kFewBins = 48;
  if (high - low >= kFewBins) {
    uint32_t counts[4][kHistogramBins] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[i & 3][exponents->bin[i]];
    for (int bin = low; bin <= high; ++bin) {
      histogram[bin] += counts[0][bin] + counts[1][bin] + counts[2][bin] + counts[3][bin];
    }
    return;
  }
  for (int64_t i = n; i % 64 != 0; ++i) exponents->bin[i] = static_cast<uint8_t>(high + 1);
  for (int bin = low; bin <= high; ++bin) {
    histogram[bin] += count_bytes(exponents->bin, (n + 63) / 64, static_cast<uint8_t>(bin));
  }
}

}  // namespace
}  // namespace gradstat::GRADSTAT_VARIANT

// After what they use.
#include "moments32_body.h"
#include "moments64_body.h"

namespace gradstat::GRADSTAT_VARIANT {
namespace {

template <class OfChunk>
void moments_of(const void* data, int64_t n, Moments* result, uint32_t* histogram) {
  const auto* from = static_cast<const typename OfChunk::Element*>(data);
  OfChunk moments;
  if (n <= kBlock) moments.expect_zeros();  // a lone block would be read twice for one
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    moments.add_block(from + begin, n - begin < kBlock ? n - begin : kBlock, histogram,
                      Nothing<typename OfChunk::Element>());
  }
  moments.add_to(result);
}

}  // namespace
}  // namespace gradstat::GRADSTAT_VARIANT
