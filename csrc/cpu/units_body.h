// The loops of `units`, compiled per instruction set like moments_body.h, which must be included
// first: the moments of a block, then, while it lies in the L1 cache, the counts of its units, one
// band after the other.

namespace gradstat::GRADSTAT_VARIANT {
namespace {

static_assert(kUnitColumns <= kBlock, "a row is a block");

// How a band is told. kWithin is right for all. A block without NaN has two cheaper ways: kAbove,
// for a band of all values from a positive one up, compares the bits as they are, since those of
// negative values are negative integers; kBelow is for all values from -Inf up to some.
enum class Tell { kWithin, kAbove, kBelow };

// Elements of fp32 and of 16 bits as integers in the order of their values. A band is a shift that
// moves its first value to the smallest signed integer, and the bound that its values then lie
// below; or one value that it lies above or below.
struct Keys32 {
  using Element = float;
  using Vector = U;
  using Counter = uint32_t;
  static constexpr int64_t kStep = kLanes;
  static float positive_nan() { return NAN; }
  static float negative_nan() { return -NAN; }
  struct Bounds {
    U shift;
    U bound;
    U before;
    U after;
  };

  static Bounds bounds(const UnitPass& pass) {
    const auto from = static_cast<uint32_t>(pass.band.from);
    const auto size = static_cast<uint32_t>(pass.band.to - pass.band.from + 1);
    return {splat_u32(from ^ 0x80000000u), splat_u32(size ^ 0x80000000u), splat_u32(from - 1),
            splat_u32(from + size)};
  }
  static U zero() { return splat_u32(0); }
  static U load(const float* at) { return load_f32(at); }
  static U load_counts(const uint32_t* at) { return load_f32(reinterpret_cast<const float*>(at)); }
  static void store_counts(uint32_t* at, U counts) {
    store_f32(reinterpret_cast<float*>(at), counts);
  }
  template <Tell kTell>
  static U count(U counts, U bits, const Bounds& bounds) {
    if (kTell == Tell::kAbove) return count_less_u32(counts, bounds.before, bits);
    const U key = order_u32(bits);
    if (kTell == Tell::kBelow) return count_less_u32(counts, key, bounds.after);
    return count_less_u32(counts, sub_u32(key, bounds.shift), bounds.bound);
  }
};

struct Keys16 {
  using Element = uint16_t;
  using Vector = U;
  using Counter = uint16_t;
  static constexpr int64_t kStep = 2 * kLanes;
  static uint16_t positive_nan() { return 0x7fff; }
  static uint16_t negative_nan() { return 0xffff; }
  using Bounds = Keys32::Bounds;

  static Bounds bounds(const UnitPass& pass) {
    const auto from = static_cast<uint16_t>(pass.band.from);
    const auto size = static_cast<uint16_t>(pass.band.to - pass.band.from + 1);
    const auto splat = [](int bits) { return splat_u16(static_cast<uint16_t>(bits)); };
    return {splat(from ^ 0x8000), splat(size ^ 0x8000), splat(from - 1), splat(from + size)};
  }
  static U zero() { return splat_u32(0); }
  static U load(const uint16_t* at) { return load_u16(at); }
  static U load_counts(const uint16_t* at) { return load_u16(at); }
  static void store_counts(uint16_t* at, U counts) {
    store_f32(reinterpret_cast<float*>(at), counts);
  }
  template <Tell kTell>
  static U count(U counts, U bits, const Bounds& bounds) {
    if (kTell == Tell::kAbove) return count_less_u16(counts, bounds.before, bits);
    const U key = order_u16(bits);
    if (kTell == Tell::kBelow) return count_less_u16(counts, key, bounds.after);
    return count_less_u16(counts, sub_u16(key, bounds.shift), bounds.bound);
  }
};

// fp64 is compared as it is, and counted in fp64.
struct Keys64 {
  using Element = double;
  using Vector = D;
  using Counter = double;
  static constexpr int64_t kStep = kLanes / 2;
  static double positive_nan() { return NAN; }
  static double negative_nan() { return NAN; }
  struct Bounds {
    D from;
    D to;
  };

  static Bounds bounds(const UnitPass& pass) {
    return {splat_f64(pass.from_value), splat_f64(pass.to_value)};
  }
  static D zero() { return splat_f64(0); }
  static D load(const double* at) { return load_f64(at); }
  static D load_counts(const double* at) { return load_f64(at); }
  static void store_counts(double* at, D counts) { store_f64(at, counts); }
  template <Tell>
  static D count(D counts, D values, const Bounds& bounds) {
    return count_within_f64(counts, values, bounds.from, bounds.to);
  }
};

// The last n < kStep elements, and beyond them what is in no band: NaN, of the sign that the way to
// tell needs.
template <class Keys, Tell kTell>
inline typename Keys::Vector load_tail(const typename Keys::Element* at, int64_t n) {
  typename Keys::Element tail[Keys::kStep];
  const auto beyond = kTell == Tell::kAbove ? Keys::negative_nan() : Keys::positive_nan();
  for (int64_t i = 0; i < Keys::kStep; ++i) tail[i] = beyond;
  memcpy(tail, at, static_cast<size_t>(n) * sizeof *at);
  return Keys::load(tail);
}

// How many of n elements, at most a block, lie in a band.
template <class Keys, Tell kTell>
inline int64_t count_run(const typename Keys::Element* at, int64_t n,
                         const typename Keys::Bounds& bounds) {
  auto counts = Keys::zero();
  int64_t i = 0;
  for (; i + Keys::kStep <= n; i += Keys::kStep) {
    counts = Keys::template count<kTell>(counts, Keys::load(at + i), bounds);
  }
  if (i < n)
    counts = Keys::template count<kTell>(counts, load_tail<Keys, kTell>(at + i, n - i), bounds);
  typename Keys::Counter lanes[Keys::kStep];
  Keys::store_counts(lanes, counts);
  int64_t total = 0;
  for (int64_t lane = 0; lane < Keys::kStep; ++lane) total += static_cast<int64_t>(lanes[lane]);
  return total;
}

// Adds 1 to the counter of each of n columns whose element lies in a band.
template <class Keys, Tell kTell>
inline void count_columns(const typename Keys::Element* at, int64_t n,
                          const typename Keys::Bounds& bounds, typename Keys::Counter* counters) {
  int64_t i = 0;
  for (; i + Keys::kStep <= n; i += Keys::kStep) {
    const auto counts = Keys::load_counts(counters + i);
    Keys::store_counts(counters + i,
                       Keys::template count<kTell>(counts, Keys::load(at + i), bounds));
  }
  if (i == n) return;
  const auto counts = Keys::load_counts(counters + i);
  Keys::store_counts(counters + i, Keys::template count<kTell>(
                                       counts, load_tail<Keys, kTell>(at + i, n - i), bounds));
}

// Calls take(unit, offset, size) for the runs of one unit each that n elements from `begin` on
// consist of.
template <class Take>
inline void for_each_run(const UnitTask& task, int64_t begin, int64_t n, const Take& take) {
  int64_t unit = begin / task.run % task.units;
  int64_t left = task.run - begin % task.run;
  for (int64_t offset = 0; offset < n;) {
    const int64_t size = left < n - offset ? left : n - offset;
    take(unit, offset, size);
    offset += size;
    left = task.run;
    if (++unit == task.units) unit = 0;
  }
}

inline void add_counts(const UnitTask& task, const UnitPass& pass, int64_t unit, int64_t count) {
  for (int what = 0; what < kNumUnitCounts; ++what) {
    if (pass.sign[what] != 0) task.counts[what * task.units + unit] += pass.sign[what] * count;
  }
}

inline bool is_nan(float value, int64_t) { return value != value; }
inline bool is_nan(double value, int64_t) { return value != value; }
inline bool is_nan(uint16_t bits, int64_t infinity) { return (bits & 0x7fff) > infinity; }

// What is counted as the elements outside of a band is not meant to hold NaN.
template <class Element>
inline void take_off_nans(const UnitTask& task, int64_t begin, const Element* at, int64_t n) {
  for_each_run(task, begin, n, [&](int64_t unit, int64_t offset, int64_t size) {
    int64_t nans = 0;
    for (int64_t i = offset; i < offset + size; ++i) nans += is_nan(at[i], task.infinity);
    for (int what = 0; what < kNumUnitCounts; ++what) {
      if (task.is_outside[what]) task.counts[what * task.units + unit] -= nans;
    }
  });
}

// Adds the counters of n columns from `column` on to the units' counts.
template <class Counter>
inline void fold_columns(const UnitTask& task, const UnitPass& pass, int64_t column, int64_t n,
                         const Counter* counters) {
  for (int what = 0; what < kNumUnitCounts; ++what) {
    if (pass.sign[what] == 0) continue;
    int64_t* counts = task.counts + what * task.units;
    if (task.run == 1) {
      for (int64_t done = 0; done < n;) {
        const int64_t unit = (column + done) % task.units;
        const int64_t size = task.units - unit < n - done ? task.units - unit : n - done;
        for (int64_t i = 0; i < size; ++i) {
          const auto count = static_cast<int64_t>(counters[done + i]);
          counts[unit + i] += pass.sign[what] > 0 ? count : -count;
        }
        done += size;
      }
      continue;
    }
    for_each_run(task, column, n, [&](int64_t unit, int64_t offset, int64_t size) {
      int64_t sum = 0;
      for (int64_t i = offset; i < offset + size; ++i) sum += static_cast<int64_t>(counters[i]);
      counts[unit] += pass.sign[what] * sum;
    });
  }
}

inline Tell tell_of(const UnitTask& task, const Band& band) {
  return band.from > 0 && band.to == task.infinity ? Tell::kAbove
         : band.from == -1 - task.infinity         ? Tell::kBelow
                                                   : Tell::kWithin;
}

// Counts n elements from `begin` on.
template <class Keys, Tell kTell>
inline void count_row(const UnitTask& task, const UnitPass& pass, int64_t begin, int64_t n,
                      const typename Keys::Bounds& bounds, typename Keys::Counter* counters) {
  const auto* at = static_cast<const typename Keys::Element*>(task.data) + begin;
  if (!task.plan.by_runs) return count_columns<Keys, kTell>(at, n, bounds, counters);
  for_each_run(task, begin, n, [&](int64_t unit, int64_t offset, int64_t size) {
    add_counts(task, pass, unit, count_run<Keys, kTell>(at + offset, size, bounds));
  });
}

template <class Keys, class OfChunk>
void units_of(const UnitTask& task, const UnitChunk& chunk, Moments* result) {
  using Element = typename Keys::Element;
  const auto* data = static_cast<const Element*>(task.data);
  typename Keys::Bounds bounds[kMaxUnitPasses];
  alignas(64) typename Keys::Counter counters[kMaxUnitPasses][kUnitColumns + Keys::kStep];
  for (int i = 0; i < task.n_passes; ++i) {
    bounds[i] = Keys::bounds(task.pass[i]);
    if (!task.plan.by_runs) memset(counters[i], 0, sizeof counters[i]);
  }
  OfChunk moments;
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const int64_t begin = chunk.begin + row * task.plan.stride;
    const int64_t left = task.numel - begin;
    const int64_t n = chunk.columns < left ? chunk.columns : left;
    const int64_t nans = moments.add_block(data + begin, n, nullptr);
    if (nans > 0) take_off_nans(task, begin, data + begin, n);
    for (int i = 0; i < task.n_passes; ++i) {
      const Tell tell = nans > 0 ? Tell::kWithin : tell_of(task, task.pass[i].band);
      if (tell == Tell::kAbove) {
        count_row<Keys, Tell::kAbove>(task, task.pass[i], begin, n, bounds[i], counters[i]);
      } else if (tell == Tell::kBelow) {
        count_row<Keys, Tell::kBelow>(task, task.pass[i], begin, n, bounds[i], counters[i]);
      } else {
        count_row<Keys, Tell::kWithin>(task, task.pass[i], begin, n, bounds[i], counters[i]);
      }
    }
  }
  if (!task.plan.by_runs) {
    for (int i = 0; i < task.n_passes; ++i) {
      fold_columns(task, task.pass[i], chunk.column, chunk.columns, counters[i]);
    }
  }
  moments.add_to(result);
}

}  // namespace
}  // namespace gradstat::GRADSTAT_VARIANT
