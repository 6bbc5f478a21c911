// Compares the NEON kernels with the scalar ones, which the Python tests hold to the oracle, and
// prints what differs. test_neon.py compiles it for 64-bit Arm and runs it in an emulator.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/kernels.h"

namespace gradstat {
namespace {

int g_checks = 0;
int g_failures = 0;

void check(bool right, const char* what, const char* dtype, const char* pattern, int64_t n) {
  ++g_checks;
  if (right) return;
  if (++g_failures <= 20) std::printf("FAILED: %s, %s, %s, n = %d\n", what, dtype, pattern, int(n));
}

// ---- input --------------------------------------------------------------------------------------

struct Format {
  const char* name;
  DType dtype;
  int bytes;
  int mantissa_bits;
  int exponent_bits;
  double tolerance;
};
const Format kFormats[] = {
    {"fp64", DType::kF64, 8, 52, 11, 1e-12},
    {"fp32", DType::kF32, 4, 23, 8, 1e-6},
    {"fp16", DType::kF16, 2, 10, 5, 1e-6},
    {"bf16", DType::kBF16, 2, 7, 8, 1e-6},
};

uint64_t random_bits() {  // splitmix64
  static uint64_t state = 0;
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

const char* const kPatterns[] = {"usual",   "zeros",    "any bits",        "subnormal",
                                 "widest",  "top",      "all NaN",         "one NaN",
                                 "one Inf", "all zero", "below the groups"};
constexpr int kNumPatterns = sizeof kPatterns / sizeof kPatterns[0];

uint64_t element(const Format& format, int pattern, int64_t i, int64_t n) {
  const int bits = 1 + format.exponent_bits + format.mantissa_bits;
  const uint64_t any = random_bits() >> (64 - bits);
  const uint64_t mantissa_mask = (uint64_t{1} << format.mantissa_bits) - 1;
  const uint64_t sign = any & uint64_t{1} << (bits - 1);
  const uint64_t infinity = ((uint64_t{1} << format.exponent_bits) - 1) << format.mantissa_bits;
  const int64_t top = (int64_t{1} << format.exponent_bits) - 2;
  const auto with_exponent = [&](int64_t low, int64_t high) {
    low = low < 0 ? 0 : low;
    high = high > top ? top : high;
    const auto span = static_cast<uint64_t>(high - low + 1);
    const uint64_t exponent = static_cast<uint64_t>(low) + random_bits() % span;
    return sign | exponent << format.mantissa_bits | (any & mantissa_mask);
  };
  const int64_t bias = top / 2;
  switch (pattern) {
    case 1:
      return random_bits() % 8 != 0 ? sign : with_exponent(bias - 10, bias + 3);
    case 2:
      return any;
    case 3:
      return with_exponent(0, 0);
    case 4:
      return with_exponent(0, top);
    case 5:
      return with_exponent(top - 1, top);
    case 6:
      return sign | infinity | (any & mantissa_mask) | 1;
    case 7:
      return i == n / 2 ? sign | infinity | 1 : with_exponent(bias - 10, bias + 3);
    case 8:
      return i == n - 1 ? sign | infinity : with_exponent(bias - 10, bias + 3);
    case 9:
      return sign;
    case 10:
      return with_exponent(bias - 60, bias - 54);
    default:
      return with_exponent(bias - 10, bias + 3);
  }
}

using Bytes = std::vector<char>;

uint64_t read(const Format& format, const char* at) {
  uint64_t bits = 0;
  std::memcpy(&bits, at, static_cast<size_t>(format.bytes));  // little-endian, like all of Arm's
  return bits;
}

Bytes make(const Format& format, int pattern, int64_t n) {
  Bytes bytes(static_cast<size_t>(n * format.bytes));
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t bits = element(format, pattern, i, n);
    std::memcpy(&bytes[static_cast<size_t>(i * format.bytes)], &bits,
                static_cast<size_t>(format.bytes));
  }
  return bytes;
}

bool is_nan(const Format& format, uint64_t bits) {
  const uint64_t infinity = ((uint64_t{1} << format.exponent_bits) - 1) << format.mantissa_bits;
  const uint64_t sign = infinity + (uint64_t{1} << format.mantissa_bits);
  return (bits & (sign - 1)) > infinity;
}

// ---- comparisons --------------------------------------------------------------------------------

struct Result {
  double table[2][kNumColumns];
  int64_t histogram[2][kHistogramBins];
};

Result moments_of(const char* variant, const Format& format, const char* data, int64_t n,
                  int threads = 1) {
  Result result;
  const TensorRef tensor = {const_cast<char*>(data), n, 1, n, format.dtype};
  cpu::use_variant(variant);
  cpu::moments(&tensor, 1, result.table[0], result.histogram[0], ClipRequest{}, threads);
  return result;
}

void compare_moments(const Format& format, const char* pattern, const char* data, int64_t n) {
  const Result expected = moments_of("scalar", format, data, n);
  const Result actual = moments_of("neon", format, data, n);
  const double* want = expected.table[0];
  const double* got = actual.table[0];
  for (int column : {kNumel, kZeros, kNans, kInfs, kAbsMax, kAbsMin, kRows, kDeadRows}) {
    check(got[column] == want[column], "a count or an extreme", format.name, pattern, n);
  }
  for (int column : {kSum, kAbsSum, kSqSum, kL2}) {
    if (column == kSum && want[kAbsSum] == HUGE_VAL) continue;
    const double scale = column == kSum ? want[kAbsSum] : want[column];
    const double off = fabs(got[column] - want[column]);
    const bool close = off <= format.tolerance * scale + 5e-324 || got[column] == want[column];
    check(close, "a sum", format.name, pattern, n);
  }
  check(std::memcmp(actual.histogram, expected.histogram, sizeof actual.histogram) == 0,
        "the histogram", format.name, pattern, n);
}

// Units of every kind: alone, one element each, in short runs and in long ones.
void compare_units(const Format& format, const char* pattern, const char* data, int64_t n) {
  const UnitRule rules[] = {{ActiveRule::kPositive, HUGE_VAL, -HUGE_VAL, NAN},
                            {ActiveRule::kNonzero, -HUGE_VAL, -0.99, 0.99},
                            {ActiveRule::kNotLow, -1e-3, 1e-3, 1.0}};
  const int64_t shapes[][2] = {{1, 1}, {1, n}, {n, 1}, {3, 1}, {5, 49}, {3, 1000}};
  for (const auto& [units, run] : shapes) {
    const int64_t numel = units * run == 0 ? 0 : n / (units * run) * units * run;
    const TensorRef activation = {const_cast<char*>(data), numel, units, run, format.dtype};
    for (const UnitRule& rule : rules) {
      const auto size = static_cast<size_t>(kNumUnitCounts * units);
      std::vector<int64_t> counts[2] = {std::vector<int64_t>(size), std::vector<int64_t>(size)};
      double rows[2][kNumColumns] = {};
      const char* const variants[] = {"scalar", "neon"};
      for (int i = 0; i < 2; ++i) {
        cpu::use_variant(variants[i]);
        cpu::units(activation, rule, counts[i].data(), rows[i], 1);
      }
      check(counts[0] == counts[1], "the counts of units", format.name, pattern, n);
      check(rows[0][kNans] == rows[1][kNans] && rows[0][kAbsMax] == rows[1][kAbsMax],
            "the moments beside units", format.name, pattern, n);
    }
  }
}

template <class Change>
void compare_writes(const Format& format, const char* what, const char* pattern, const Bytes& data,
                    int64_t first, const Change& change) {
  Bytes results[2] = {data, data};
  const char* const variants[] = {"scalar", "neon"};
  const auto n = static_cast<int64_t>(data.size()) / format.bytes;
  for (int i = 0; i < 2; ++i) {
    cpu::use_variant(variants[i]);
    // All but the first elements and the last one.
    const int64_t size = n - first - 1 < 0 ? 0 : n - first - 1;
    const TensorRef tensor = {results[i].data() + first * format.bytes, size, 1, size,
                              format.dtype};
    change(tensor);
  }
  bool same = true;
  for (size_t at = 0; at < data.size(); at += static_cast<size_t>(format.bytes)) {
    const uint64_t want = read(format, &results[0][at]);
    const uint64_t got = read(format, &results[1][at]);
    same = same && (got == want || (is_nan(format, got) && is_nan(format, want)));
  }
  check(same, what, format.name, pattern, n);
}

void compare_all(const Format& format, int pattern, int64_t n) {
  const char* name = kPatterns[pattern];
  const Bytes data = make(format, pattern, n);
  for (int64_t first = 0; first < 3 && first <= n; ++first) {
    compare_moments(format, name, data.data() + first * format.bytes, n - first);
    compare_units(format, name, data.data() + first * format.bytes, n - first);
  }
  for (double coefficient : {0.3, 1.5, 0.5, 1e-30, 1e-42, 1e30, 0.0}) {
    compare_writes(format, "scale", name, data, n % 3,
                   [&](const TensorRef& tensor) { cpu::scale(&tensor, 1, &coefficient, 0, 1); });
  }
  for (double limit : {0.0, 0.1, 1e-40, 65519.0, 65520.0, 1e39}) {
    compare_writes(format, "clamp", name, data, n % 3,
                   [&](const TensorRef& tensor) { cpu::clamp(&tensor, 1, limit, 1); });
  }
}

void compare_every_16_bit_value(const Format& format) {
  Bytes all(2 * 65536);
  for (int bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    std::memcpy(&all[2 * static_cast<size_t>(bits)], &half, 2);
  }
  for (int64_t begin = 0; begin < 65536; begin += 128) {
    compare_moments(format, "every value", all.data() + 2 * begin, 128);
  }
  for (double coefficient : {1 - 0x1p-30, 1.5, 1.25, 0.75, 0.5, 0x1p-24, 1 + 0x1p-10, 2.0}) {
    compare_writes(format, "scale", "every value", all, 0,
                   [&](const TensorRef& tensor) { cpu::scale(&tensor, 1, &coefficient, 0, 1); });
  }
}

// The same bits in flush-to-zero mode, and from several threads; and the mode comes back.
void check_flush_to_zero(const Format& format) {
  const int64_t n = 150001;
  const Bytes data = make(format, 3, n);
  const Result expected = moments_of("neon", format, data.data(), n);
  uint64_t mode, after;
  asm volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");
  asm volatile("msr fpcr, %0" : : "r"(mode | uint64_t{1} << 24 | uint64_t{1} << 19) : "memory");
  const Result flushed = moments_of("neon", format, data.data(), n, 3);
  asm volatile("mrs %0, fpcr" : "=r"(after) : : "memory");
  asm volatile("msr fpcr, %0" : : "r"(mode) : "memory");
  check(std::memcmp(&flushed, &expected, sizeof expected) == 0, "flush-to-zero", format.name,
        "subnormal", n);
  check(after == (mode | uint64_t{1} << 24 | uint64_t{1} << 19), "the mode afterwards", format.name,
        "subnormal", n);
}

int compare() {
  for (const Format& format : kFormats) {
    for (int pattern = 0; pattern < kNumPatterns; ++pattern) {
      for (int64_t n : {0,  1,  2,  3,  4,  5,   7,   8,   9,    15,   16,   17,  31,
                        32, 33, 63, 64, 65, 127, 129, 257, 4095, 4096, 4097, 9000}) {
        compare_all(format, pattern, n);
      }
    }
    check_flush_to_zero(format);
    if (format.bytes == 2) compare_every_16_bit_value(format);
  }
  std::printf("%d checks, %d failures\n", g_checks, g_failures);
  return g_failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace gradstat

int main() { return gradstat::compare(); }
