// Moments of fp64; a part of moments_body.h.

namespace gradstat::GRADSTAT_VARIANT {
namespace {

struct Lanes64 {
  D sum = splat_f64(0);
  D abs_sum = splat_f64(0);
  D sq_sum[kNumRanges] = {splat_f64(0), splat_f64(0), splat_f64(0)};
};

struct Block64 {
  D abs_max = splat_f64(0);
  D abs_min = splat_f64(HUGE_VAL);
  D probe = splat_f64(0);  // becomes NaN with the first NaN or Inf
  F64Count zeros = {};
  F64Count nans = {};
  F64Count infs = {};
};

template <bool kCareful>
inline void step(D value, double scale, Lanes64* lanes, D* sq_sum, Block64* block) {
  if (kCareful) {
    count_nan(&block->nans, value);
    count_equal(&block->infs, abs_f64(value), splat_f64(HUGE_VAL));
    // Zeros are counted before a NaN or an Inf is set to zero.
    count_equal(&block->zeros, value, splat_f64(0));
    value = zero_unless_finite(value);
  } else {
    block->probe = add_f64(block->probe, sub_f64(value, value));
    count_equal(&block->zeros, value, splat_f64(0));
  }
  const D magnitude = abs_f64(value);
  block->abs_max = max_f64(block->abs_max, magnitude);
  block->abs_min = min_f64(block->abs_min, infinity_where_zero(magnitude));
  lanes->sum = add_f64(lanes->sum, value);
  lanes->abs_sum = add_f64(lanes->abs_sum, magnitude);
  const D scaled = kCareful ? mul_f64(value, splat_f64(scale)) : value;
  *sq_sum = square_add_f64(scaled, *sq_sum);
}

template <bool kCareful>
inline void run_block(const double* at, int64_t n, Range range, Lanes64* lanes, Block64* block) {
  constexpr int64_t kStep = kLanes / 2;
  const double scale = range_scale(range);
  D sq_sum = lanes->sq_sum[range];
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    __builtin_prefetch(at + i);
    step<kCareful>(load_f64(at + i), scale, lanes, &sq_sum, block);
  }
  if (i < n) {
    double tail[kStep] = {};
    memcpy(tail, at + i, static_cast<size_t>(n - i) * sizeof *at);
    step<kCareful>(load_f64(tail), scale, lanes, &sq_sum, block);
  }
  lanes->sq_sum[range] = sq_sum;
}

// As Moments32, of fp64.
class Moments64 {
 public:
  using Element = double;

  void expect_zeros() {}  // each block counts them

  template <class Beside>
  int64_t add_block(const double* from, int64_t size, uint32_t* histogram, const Beside& beside) {
    constexpr int64_t kStep = kLanes / 2;
    Lanes64 attempt = lanes_;
    Block64 block;
    run_block<false>(from, size, kMiddle, &attempt, &block);
    for (int64_t i = 0; i < size; i += kGroup) {
      beside.rest(from + i, size - i < kGroup ? size - i : kGroup);
    }
    const bool finite = reduce_add_f64(block.probe) == 0;
    double abs_max = reduce_max_f64(block.abs_max);
    if (!finite) {  // the largest finite magnitude decides the range, so find it first
      attempt = lanes_;
      block = Block64();
      run_block<true>(from, size, kMiddle, &attempt, &block);
      abs_max = reduce_max_f64(block.abs_max);
    }
    const Range range = range_of(abs_max);
    if (range != kMiddle && abs_max > 0) {
      attempt = lanes_;
      block = Block64();
      run_block<true>(from, size, range, &attempt, &block);
    }
    lanes_ = attempt;
    const int64_t nans = total(block.nans);
    const int64_t infs = total(block.infs);
    const int64_t zeros = total(block.zeros) - (kStep - size % kStep) % kStep;
    const double abs_min = reduce_min_f64(block.abs_min);
    nans_ += nans;
    infs_ += infs;
    zeros_ += zeros;
    if (abs_max > abs_max_) abs_max_ = abs_max;
    if (abs_min < abs_min_) abs_min_ = abs_min;
    if (histogram != nullptr && abs_max > 0) {
      Exponents exponents;
      for (int64_t i = 0; i < size; ++i) {
        uint64_t bits;
        memcpy(&bits, from + i, sizeof bits);
        exponents.bin[i] = static_cast<uint8_t>(histogram_bin(bits));
      }
      uint64_t min_bits, max_bits;
      memcpy(&min_bits, &abs_min, sizeof min_bits);
      memcpy(&max_bits, &abs_max, sizeof max_bits);
      const int low = histogram_bin(min_bits);
      const int high = histogram_bin(max_bits);
      count_bins(&exponents, size, low, high, histogram);
      if (low == 0) histogram[0] -= static_cast<uint32_t>(zeros);
      if (high == 255) histogram[255] -= static_cast<uint32_t>(nans + infs);
    }
    return nans;
  }

  void add_to(Moments* result) const {
    result->zeros += zeros_;
    result->nans += nans_;
    result->infs += infs_;
    result->sum += reduce_add_f64(lanes_.sum);
    result->abs_sum += reduce_add_f64(lanes_.abs_sum);
    for (int range = 0; range < kNumRanges; ++range) {
      result->sq_sum[range] += reduce_add_f64(lanes_.sq_sum[range]);
    }
    if (abs_max_ > result->abs_max) result->abs_max = abs_max_;
    if (abs_min_ < result->abs_min) result->abs_min = abs_min_;
  }

 private:
  Lanes64 lanes_;
  double abs_max_ = 0;
  double abs_min_ = HUGE_VAL;
  int64_t zeros_ = 0;
  int64_t nans_ = 0;
  int64_t infs_ = 0;
};

}  // namespace
}  // namespace gradstat::GRADSTAT_VARIANT
