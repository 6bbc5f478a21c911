// Moments of fp32, fp16 and bf16; a part of moments_body.h.

namespace gradstat::GRADSTAT_VARIANT {
namespace {

// Accumulators of one chunk, one value a lane.
struct Lanes32 {
  D sum[2] = {splat_f64(0), splat_f64(0)};
  D abs_sum[2] = {splat_f64(0), splat_f64(0)};
  D sq_sum[2] = {splat_f64(0), splat_f64(0)};
};

// What values are taken to hold. Without negative ones magnitudes are the values themselves, and
// without zeros none are counted nor kept away from the smallest magnitude: each spares a fifth of
// the instructions. A zero that was not foreseen shows as the smallest magnitude, a negative value
// as the largest.
template <bool kNegativesToo, bool kZerosToo>
struct Holding {
  static constexpr bool kNegatives = kNegativesToo;
  static constexpr bool kZeros = kZerosToo;
};
using HoldingAll = Holding<true, true>;

struct Extremes32 {
  U max_bits = splat_u32(0);
  // Zero wraps to the largest and never wins. Where no zeros are held the bits themselves, until
  // the end of the groups.
  U min_bits_less_1 = splat_u32(0xffffffffu);
  U32Count zeros = {};

  template <class Held>
  void add(U magnitude) {
    max_bits = max_u32(max_bits, magnitude);
    const U bits = Held::kZeros ? sub_u32(magnitude, splat_u32(1)) : magnitude;
    min_bits_less_1 = min_u32(min_bits_less_1, bits);
  }
};

struct Counts32 {
  Extremes32 extremes;
  U32Count nans = {};
  U32Count infs = {};
};

// What was met in a block.
struct Block32 {
  uint32_t max_bits = 0;
  uint32_t min_bits_less_1 = 0xffffffffu;
  int64_t zeros = 0;
  int64_t nans = 0;
  int64_t infs = 0;
  bool unforeseen_zeros = false;  // it holds some, and was taken to hold none

  void add(uint32_t max, uint32_t min_less_1, int64_t more_zeros) {
    max_bits = max > max_bits ? max : max_bits;
    min_bits_less_1 = min_less_1 < min_bits_less_1 ? min_less_1 : min_bits_less_1;
    zeros += more_zeros;
  }
};

template <bool kCareful>
inline void step(U bits, Lanes32* lanes, Counts32* counts) {
  U magnitude = and_u32(bits, splat_u32(kMagnitudeMask));
  count_equal(&counts->extremes.zeros, magnitude, splat_u32(0));
  if (kCareful) {
    const U infinity = splat_u32(kInfinityBits);
    count_above(&counts->nans, magnitude, infinity);
    count_equal(&counts->infs, magnitude, infinity);
    bits = keep_below_u32(bits, magnitude, infinity);
    magnitude = keep_below_u32(magnitude, magnitude, infinity);
  }
  counts->extremes.add<HoldingAll>(magnitude);
  const D low = low_f64(bits);
  const D high = high_f64(bits);
  lanes->sum[0] = add_f64(lanes->sum[0], low);
  lanes->sum[1] = add_f64(lanes->sum[1], high);
  lanes->abs_sum[0] = add_f64(lanes->abs_sum[0], abs_f64(low));
  lanes->abs_sum[1] = add_f64(lanes->abs_sum[1], abs_f64(high));
  lanes->sq_sum[0] = square_add_f64(low, lanes->sq_sum[0]);
  lanes->sq_sum[1] = square_add_f64(high, lanes->sq_sum[1]);
}

// ---- groups: sums of 16 registers, lane by lane, in fp32
// -----------------------------------------

// Sixteen times fewer conversions to double, which are a fifth of the work with eight registers.
// The sums are taken pairwise, so that each value goes through at most 7 roundings (in bf16): their
// error is at most 7 * 2^-24 = 4.2e-7 of the sum of magnitudes or squares. The squares need the
// block's largest magnitude to lie in [kGroupFrom, kGroupBelow): above, a sum of them could
// overflow; below, the squares that an instruction set takes for zero, at most kBlock of less than
// 2^-126, could matter beside 2^-88.
constexpr uint32_t kGroupFrom = 0x29800000u;   // 2^-44
constexpr uint32_t kGroupBelow = 0x5d800000u;  // 2^60
// Steps of the largest group; fewer where registers are few.
constexpr int kMostSteps = kLanes > 8 ? 8 : 4;
constexpr int64_t kGroup = kMostSteps * kStep;

inline bool squares_fit(uint32_t max_bits) {
  return max_bits == 0 || (max_bits >= kGroupFrom && max_bits < kGroupBelow);
}

struct GroupSums {
  U sum;
  U abs_sum;
  U sq_sum;
};

inline GroupSums add_sums(const GroupSums& a, const GroupSums& b) {
  return {add_f32(a.sum, b.sum), add_f32(a.abs_sum, b.abs_sum), add_f32(a.sq_sum, b.sq_sum)};
}

inline GroupSums sums_of_two(U first, U second) {
  const U mask = splat_u32(kMagnitudeMask);
  return {add_f32(first, second), add_f32(and_u32(first, mask), and_u32(second, mask)),
          square_add_f32(second, square_add_f32(first, splat_u32(0)))};
}

// Sums of kSteps steps from element `index` of a block on; beside.step() follows each of them.
// Reads memory upwards, which the prefetcher wants: the halves are named since arguments may be
// evaluated last to first.
template <class Type, class Held, int kSteps, class Beside>
GRADSTAT_INLINE GroupSums sum_group(const typename Type::Element* block, int64_t index,
                                    typename Type::Extremes* extremes, const Beside& beside) {
  if constexpr (kSteps == 1) {
    // Lines are met in the order of memory then, whatever order the compiler gives the loads of a
    // group, and the processor's own prefetcher needs nothing else. Without, fp32 takes up to a
    // quarter longer; with the lines 8 KB ahead instead, up to a tenth.
    if (!Beside::kAsksAhead) prefetch<3>(block + index);
    const GroupSums sums = Type::template sum_step<Held>(block + index, extremes);
    beside.step(block + index, index);
    return sums;
  } else {
    constexpr int kHalf = kSteps / 2;
    const GroupSums low = sum_group<Type, Held, kHalf>(block, index, extremes, beside);
    const GroupSums high =
        sum_group<Type, Held, kHalf>(block, index + kHalf * kStep, extremes, beside);
    return add_sums(low, high);
  }
}

inline void add_widened(U from, D* to) {
  to[0] = add_f64(to[0], low_f64(from));
  to[1] = add_f64(to[1], high_f64(from));
}

// Adds the groups of kSteps steps that the elements [index, n) of a block hold, with beside.step
// and beside.group; returns where they end.
template <class Type, class Held, int kSteps, class Beside>
GRADSTAT_INLINE int64_t add_groups(const typename Type::Element* block, int64_t index, int64_t n,
                                   Lanes32* lanes, typename Type::Extremes* extremes,
                                   const Beside& beside) {
  constexpr int64_t kSize = kSteps * kStep;
  for (; index + kSize <= n; index += kSize) {
    const GroupSums group = sum_group<Type, Held, kSteps>(block, index, extremes, beside);
    add_widened(group.sum, lanes->sum);
    add_widened(Held::kNegatives ? group.abs_sum : group.sum, lanes->abs_sum);
    add_widened(group.sq_sum, lanes->sq_sum);
    beside.group(block + index, kSize);
  }
  return index;
}

// Runs the whole steps of a block, in groups as far as they go; returns how many elements those
// are.
template <class Type, class Held, class Beside>
inline int64_t run_groups(const typename Type::Element* at, int64_t n, Lanes32* lanes,
                          Block32* block, Beside beside) {
  if (n < kStep) return 0;
  typename Type::Extremes extremes;
  Lanes32 sums = *lanes;  // a copy stays in registers
  int64_t done = add_groups<Type, Held, Type::kGroupSteps>(at, 0, n, &sums, &extremes, beside);
  done = add_groups<Type, Held, Type::kGroupSteps / 2>(at, done, n, &sums, &extremes, beside);
  done = add_groups<Type, Held, 1>(at, done, n, &sums, &extremes, beside);
  *lanes = sums;
  Type::template add_extremes<Held>(extremes, block);
  return done;
}

// How to read and write a dtype, kLanes elements at a time.
struct F32 {
  using Element = float;
  using Extremes = Extremes32;
  static U load(const float* at) { return load_f32(at); }
  static void store(float* at, U u) { store_f32(at, u); }
  static constexpr int kGroupSteps = kMostSteps / 2;
  template <class Held>
  GRADSTAT_INLINE static GroupSums sum_step(const float* at, Extremes32* extremes) {
    const GroupSums low = sum_pair<Held>(at, extremes);
    const GroupSums high = sum_pair<Held>(at + 2 * kLanes, extremes);
    return add_sums(low, high);
  }
  template <class Held>
  GRADSTAT_INLINE static GroupSums sum_pair(const float* at, Extremes32* extremes) {
    const U first = load_f32(at);
    const U second = load_f32(at + kLanes);
    for (int i = 0; i < 2; ++i) {
      const U bits = i == 0 ? first : second;
      const U magnitude = Held::kNegatives ? and_u32(bits, splat_u32(kMagnitudeMask)) : bits;
      if (Held::kZeros) count_equal(&extremes->zeros, magnitude, splat_u32(0));
      extremes->add<Held>(magnitude);
    }
    return sums_of_two(first, second);
  }
  template <class Held>
  static void add_extremes(const Extremes32& from, Block32* block) {
    const uint32_t least = reduce_min_u32(from.min_bits_less_1);
    block->unforeseen_zeros = !Held::kZeros && least == 0;
    block->add(reduce_max_u32(from.max_bits), Held::kZeros ? least : least - 1, total(from.zeros));
  }
  static bool fits_groups(uint32_t max_bits) { return squares_fit(max_bits); }
};

struct Extremes16 {
  U max_bits = splat_u16(0);
  U min_bits_less_1 = splat_u16(0xffff);
  U16Count zeros = {};

  template <class Held>
  void add(U magnitude) {
    if (Held::kZeros) count_zero_u16(&zeros, magnitude);
    max_bits = max_u16(max_bits, magnitude);
    const U bits = Held::kZeros ? sub_u16(magnitude, splat_u16(1)) : magnitude;
    min_bits_less_1 = min_u16(min_bits_less_1, bits);
  }
};

// Split gives the first and the second half of a register's 16-bit values as fp32.
template <void (*kSplit)(U raw, U* first, U* second)>
struct Wide16 {
  using Element = uint16_t;
  using Extremes = Extremes16;
  static constexpr int kGroupSteps = kMostSteps;
  template <class Held>
  GRADSTAT_INLINE static GroupSums sum_step(const uint16_t* at, Extremes16* extremes) {
    const GroupSums low = sum_register<Held>(at, extremes);
    const GroupSums high = sum_register<Held>(at + 2 * kLanes, extremes);
    return add_sums(low, high);
  }
  template <class Held>
  GRADSTAT_INLINE static GroupSums sum_register(const uint16_t* at, Extremes16* extremes) {
    const U raw = load_u16(at);
    extremes->add<Held>(Held::kNegatives ? and_u32(raw, splat_u16(0x7fff)) : raw);
    U first, second;
    kSplit(raw, &first, &second);
    return sums_of_two(first, second);
  }
  template <class Held>
  static void add_extremes(const Extremes16& from, Block32* block) {
    const uint16_t least = reduce_min_u16(from.min_bits_less_1);
    block->unforeseen_zeros = !Held::kZeros && least == 0;
    const uint32_t min_less_1 =
        least == 0xffff ? 0xffffffffu : widen(static_cast<uint16_t>(least + Held::kZeros)) - 1;
    block->add(widen(reduce_max_u16(from.max_bits)), min_less_1, total(from.zeros));
  }
  static uint32_t widen(uint16_t bits) {
    U first, second;
    kSplit(splat_u16(bits), &first, &second);
    uint32_t lane;
    memcpy(&lane, &first, sizeof lane);
    return lane;
  }
};

struct F16 : Wide16<split_f16> {
  static U load(const uint16_t* at) { return load_f16(at); }
  static void store(uint16_t* at, U u) { store_f16(at, u); }
  static bool fits_groups(uint32_t) { return true; }  // its squares reach from 2^-48 to 2^32
};

struct BF16 : Wide16<split_bf16> {
  static U load(const uint16_t* at) { return load_bf16(at); }
  static void store(uint16_t* at, U u) { store_bf16(at, u); }
  static bool fits_groups(uint32_t max_bits) { return squares_fit(max_bits); }
#ifdef GRADSTAT_HAS_DOT_BF16
  // One instruction multiplies and adds a register of bf16, in two of the groups' roundings; the
  // products with 1 are the values.
  template <class Held>
  GRADSTAT_INLINE static GroupSums sum_step(const uint16_t* at, Extremes16* extremes) {
    const U zero = splat_u32(0);
    const GroupSums first = add_dots<Held>(at, extremes, {zero, zero, zero});
    return add_dots<Held>(at + 2 * kLanes, extremes, first);
  }
  template <class Held>
  GRADSTAT_INLINE static GroupSums add_dots(const uint16_t* at, Extremes16* extremes,
                                            const GroupSums& sums) {
    const U raw = load_u16(at);
    const U magnitude = Held::kNegatives ? and_u32(raw, splat_u16(0x7fff)) : raw;
    extremes->add<Held>(magnitude);
    const U one = splat_u16(0x3f80);
    return {dot_bf16(sums.sum, raw, one), dot_bf16(sums.abs_sum, magnitude, one),
            dot_bf16(sums.sq_sum, raw, raw)};
  }
#endif
};

// Registers of n elements one by one. Zeros that fill up the last are taken off again.
template <class Type, bool kCareful>
inline void run_steps(const typename Type::Element* at, int64_t n, Lanes32* lanes, Block32* block) {
  Lanes32 sums = *lanes;  // a copy stays in registers
  Counts32 counts;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step<kCareful>(Type::load(at + i), &sums, &counts);
  const int64_t padding = i < n ? kLanes - (n - i) : 0;
  if (padding > 0) {
    typename Type::Element tail[kLanes] = {};
    memcpy(tail, at + i, static_cast<size_t>(n - i) * sizeof *at);
    step<kCareful>(Type::load(tail), &sums, &counts);
  }
  *lanes = sums;
  block->add(reduce_max_u32(counts.extremes.max_bits),
             reduce_min_u32(counts.extremes.min_bits_less_1),
             total(counts.extremes.zeros) - padding);
  block->nans += total(counts.nans);
  block->infs += total(counts.infs);
}

// Byte exponents of n elements: bits 23 to 30 of their fp32 values.
template <class Type>
inline void take_exponents(const typename Type::Element* from, int64_t n, Exponents* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_exponents(to->bin + i, Type::load(from + i));
  if (i < n) {
    typename Type::Element tail[kLanes] = {};
    memcpy(tail, from + i, static_cast<size_t>(n - i) * sizeof *from);
    store_exponents(to->bin + i, Type::load(tail));
  }
}

inline double magnitude_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The moments of a chunk of fp32, fp16 or bf16, block by block.
template <class Type>
class Moments32 {
 public:
  using Element = typename Type::Element;

  // Makes no block run again for a zero.
  void expect_zeros() { any_zeros_ = true; }

  // Adds at most kBlock elements; returns how many are NaN. `beside` meets each of them once as
  // soon as it lies in the L1 cache.
  template <class Beside>
  int64_t add_block(const Element* from, int64_t size, uint32_t* histogram, const Beside& beside) {
    if (size < kGroup / 2) {
      beside.rest(from, size);
      return add_singly<false>(from, size, histogram);
    }
    if (!begun_) look_at(Type::load(from));
    Lanes32 attempt = lanes_;
    Block32 block;
    const int64_t grouped = run(from, size, &attempt, &block, beside);
    while (note(block.max_bits, block.unforeseen_zeros)) {
      attempt = lanes_;
      block = Block32();
      run(from, size, &attempt, &block, Nothing<Element>());
    }
    if (grouped < size) {
      beside.rest(from + grouped, size - grouped);
      run_steps<Type, false>(from + grouped, size - grouped, &attempt, &block);
    }
    if (block.max_bits >= kInfinityBits || !Type::fits_groups(block.max_bits)) {
      return add_singly<true>(from, size, histogram);
    }
    keep(attempt, block, from, size, histogram);
    return 0;
  }

  void add_to(Moments* result) const {
    result->zeros += zeros_;
    result->nans += nans_;
    result->infs += infs_;
    result->sum += reduce_add_f64(add_f64(lanes_.sum[0], lanes_.sum[1]));
    result->abs_sum += reduce_add_f64(add_f64(lanes_.abs_sum[0], lanes_.abs_sum[1]));
    result->sq_sum[kMiddle] += reduce_add_f64(add_f64(lanes_.sq_sum[0], lanes_.sq_sum[1]));
    const double abs_max = magnitude_of(max_bits_);
    if (abs_max > result->abs_max) result->abs_max = abs_max;
    if (min_bits_less_1_ != 0xffffffffu) {
      const double abs_min = magnitude_of(min_bits_less_1_ + 1);
      if (abs_min < result->abs_min) result->abs_min = abs_min;
    }
  }

 private:
  // A block's first values foretell the others.
  void look_at(U bits) {
    begun_ = true;
    note(reduce_max_u32(bits), reduce_min_u32(and_u32(bits, splat_u32(kMagnitudeMask))) == 0);
  }

  // Notes that a block holds negative values or zeros, as those that follow probably will; returns
  // whether that is new.
  bool note(uint32_t max_bits, bool zeros) {
    const bool negatives = max_bits > kMagnitudeMask;
    const bool is_new = (negatives && !negatives_) || (zeros && !any_zeros_);
    negatives_ = negatives_ || negatives;
    any_zeros_ = any_zeros_ || zeros;
    return is_new;
  }

  template <class Beside>
  int64_t run(const Element* from, int64_t size, Lanes32* lanes, Block32* block,
              const Beside& beside) const {
    if (negatives_) {
      return any_zeros_ ? run_groups<Type, Holding<true, true>>(from, size, lanes, block, beside)
                        : run_groups<Type, Holding<true, false>>(from, size, lanes, block, beside);
    }
    return any_zeros_ ? run_groups<Type, Holding<false, true>>(from, size, lanes, block, beside)
                      : run_groups<Type, Holding<false, false>>(from, size, lanes, block, beside);
  }

  // The same by single registers. What a function of its own holds stays in registers.
  template <bool kCareful>
  int64_t add_singly(const Element* from, int64_t size, uint32_t* histogram) {
    Lanes32 attempt = lanes_;
    Block32 block;
    run_steps<Type, kCareful>(from, size, &attempt, &block);
    if (!kCareful && block.max_bits >= kInfinityBits) {
      return add_singly<true>(from, size, histogram);
    }
    keep(attempt, block, from, size, histogram);
    nans_ += block.nans;
    infs_ += block.infs;
    return block.nans;
  }

  // Takes the results of a block over.
  GRADSTAT_INLINE void keep(const Lanes32& attempt, const Block32& block, const Element* from,
                            int64_t size, uint32_t* histogram) {
    lanes_ = attempt;
    zeros_ += block.zeros;
    max_bits_ = block.max_bits > max_bits_ ? block.max_bits : max_bits_;
    min_bits_less_1_ =
        block.min_bits_less_1 < min_bits_less_1_ ? block.min_bits_less_1 : min_bits_less_1_;
    if (histogram != nullptr && block.max_bits != 0) {
      Exponents exponents;
      take_exponents<Type>(from, size, &exponents);
      const int low = static_cast<int>((block.min_bits_less_1 + 1) >> 23);
      count_bins(&exponents, size, low, static_cast<int>(block.max_bits >> 23), histogram);
      if (low == 0) histogram[0] -= static_cast<uint32_t>(block.zeros);
    }
  }

  Lanes32 lanes_;
  bool begun_ = false;
  bool negatives_ = false;  // whether one was met
  bool any_zeros_ = false;  // met, or expected
  uint32_t max_bits_ = 0;
  uint32_t min_bits_less_1_ = 0xffffffffu;
  int64_t zeros_ = 0;
  int64_t nans_ = 0;
  int64_t infs_ = 0;
};

}  // namespace
}  // namespace gradstat::GRADSTAT_VARIANT
