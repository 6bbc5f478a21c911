// The loops of `units`, compiled per instruction set like moments_body.h, which must be included
// first. The counts follow the moments group by group: memory that the loop of the moments asked
// for arrives while a few registers are counted. With the counts behind the moments of a whole
// block it stood idle meanwhile, and sigmoid took 1.5 to 1.7 times the time to read rows of 4096,
// now 1.0 to 1.25. A band costs two instructions a register and a few to pack the hits into
// counters of bytes.

namespace gradstat::GRADSTAT_VARIANT {
namespace {

static_assert(kUnitColumns <= kBlock, "a row is a block");

// Elements met at once: one register of bytes, a counter each.
constexpr int64_t kStep = 4 * kLanes;

// A band of fp32 or of 16 bits: its first value and how many it has, as integers of their width.
struct Bounds {
  U first;
  U size;
};

// The bits of a band's first value: those of negative values grow with their magnitude.
inline int64_t first_bits(const Band& band, int bits) {
  return band.to < 0 ? (int64_t{1} << (bits - 1)) - 1 - band.to : band.from;
}

struct Keys32 {
  using Element = float;
  using Bounds = GRADSTAT_VARIANT::Bounds;
  static float nan() { return NAN; }

  static Bounds bounds(const UnitPass& pass) {
    const int64_t first = pass.both_signs ? pass.band.from : first_bits(pass.band, 32);
    return {splat_u32(static_cast<uint32_t>(first)),
            splat_u32(static_cast<uint32_t>(pass.band.to - pass.band.from + 1))};
  }
  template <bool kBothSigns>
  static Hits32 hits(const float* at, const Bounds& bounds) {
    const U key = kBothSigns ? order_u32(load_f32(at)) : load_f32(at);
    return is_less_u32(sub_u32(key, bounds.first), bounds.size);
  }
  template <bool kBothSigns>
  static Hits8 step_hits(const float* at, const Bounds& bounds) {
    const auto half = [&](const float* from) {
      return join32(hits<kBothSigns>(from, bounds), hits<kBothSigns>(from + kLanes, bounds));
    };
    return join16(half(at), half(at + 2 * kLanes));
  }
};

struct Keys16 {
  using Element = uint16_t;
  using Bounds = GRADSTAT_VARIANT::Bounds;
  static uint16_t nan() { return 0x7fff; }

  static Bounds bounds(const UnitPass& pass) {
    const int64_t first = pass.both_signs ? pass.band.from : first_bits(pass.band, 16);
    return {splat_u16(static_cast<uint16_t>(first)),
            splat_u16(static_cast<uint16_t>(pass.band.to - pass.band.from + 1))};
  }
  template <bool kBothSigns>
  static Hits16 hits(const uint16_t* at, const Bounds& bounds) {
    const U key = kBothSigns ? order_u16(load_u16(at)) : load_u16(at);
    return is_less_u16(sub_u16(key, bounds.first), bounds.size);
  }
  template <bool kBothSigns>
  static Hits8 step_hits(const uint16_t* at, const Bounds& bounds) {
    return join16(hits<kBothSigns>(at, bounds), hits<kBothSigns>(at + 2 * kLanes, bounds));
  }
};

// fp64 is compared as it is.
struct Keys64 {
  using Element = double;
  struct Bounds {
    D from;
    D to;
  };
  static double nan() { return NAN; }

  static Bounds bounds(const UnitPass& pass) {
    return {splat_f64(pass.from_value), splat_f64(pass.to_value)};
  }
  template <bool>
  static Hits8 step_hits(const double* at, const Bounds& bounds) {
    const auto hits = [&](const double* from) {
      return is_within_f64(load_f64(from), bounds.from, bounds.to);
    };
    const auto quarter = [&](const double* from) {
      return join64(hits(from), hits(from + kLanes / 2));
    };
    const auto half = [&](const double* from) {
      return join32(quarter(from), quarter(from + kLanes));
    };
    return join16(half(at), half(at + 2 * kLanes));
  }
};

// Adds 1 to the counter of each of n elements that lies in a band: of its column, or of its place
// in the step.
template <class Keys, bool kByColumns, bool kBothSigns>
inline void count_band(const typename Keys::Element* at, int64_t n,
                       const typename Keys::Bounds& bounds, uint8_t* counters) {
  U counts = load_bytes(counters);
  const auto add = [&](const typename Keys::Element* from) {
    if (kByColumns) counts = load_bytes(counters);
    counts = add_hits(counts, Keys::template step_hits<kBothSigns>(from, bounds));
    if (!kByColumns) return;
    store_bytes(counters, counts);
    counters += kStep;
  };
  for (; n >= kStep; n -= kStep, at += kStep) add(at);
  if (n > 0) {
    typename Keys::Element tail[kStep];
    for (int64_t i = 0; i < kStep; ++i) tail[i] = Keys::nan();  // in no band
    memcpy(tail, at, static_cast<size_t>(n) * sizeof *at);
    add(tail);
  }
  if (!kByColumns) store_bytes(counters, counts);
}

// The same for each of a task's bands, whose counters lie `pitch` bytes apart.
template <class Keys, bool kByColumns>
inline void count(const typename Keys::Element* at, int64_t n, const UnitTask& task,
                  const typename Keys::Bounds* bounds, uint8_t* counters, int64_t pitch) {
  for (int i = 0; i < task.n_passes; ++i) {
    const typename Keys::Bounds band = bounds[i];
    if (task.pass[i].both_signs) {
      count_band<Keys, kByColumns, true>(at, n, band, counters + i * pitch);
    } else {
      count_band<Keys, kByColumns, false>(at, n, band, counters + i * pitch);
    }
  }
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

inline int64_t sum_bytes(const uint8_t* from, int64_t n) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += from[i];
  return sum;
}

// Adds the counters of all columns to the units' counts and sets them to zero.
inline void fold_columns(const UnitTask& task) {
  const int64_t n = task.plan.stride < task.numel ? task.plan.stride : task.numel;
  for (int i = 0; i < task.n_passes; ++i) {
    const UnitPass& pass = task.pass[i];
    uint8_t* counters = task.counters + i * task.pitch;
    if (task.run > 1) {
      for_each_run(task, 0, n, [&](int64_t unit, int64_t offset, int64_t size) {
        add_counts(task, pass, unit, sum_bytes(counters + offset, size));
      });
    } else {
      for (int what = 0; what < kNumUnitCounts; ++what) {
        const int64_t sign = pass.sign[what];
        if (sign == 0) continue;
        int64_t* counts = task.counts + what * task.units;
        for (int64_t begin = 0; begin < n; begin += task.units) {
          const int64_t size = task.units < n - begin ? task.units : n - begin;
          for (int64_t unit = 0; unit < size; ++unit) counts[unit] += sign * counters[begin + unit];
        }
      }
    }
    memset(counters, 0, static_cast<size_t>(n));
  }
}

// Counts the runs of a row, piece by piece, into one register of bytes a pass.
template <class Keys>
class RunCounts {
 public:
  RunCounts(const UnitTask& task, const typename Keys::Bounds* bounds, int64_t begin)
      : task_(task),
        bounds_(bounds),
        unit_(begin / task.run % task.units),
        left_(task.run - begin % task.run) {}

  // Takes the next n elements of the row, at most kGroup.
  void add(const typename Keys::Element* at, int64_t n) {
    while (n > 0) {
      const int64_t size = left_ < n ? left_ : n;
      const int64_t adds = (size + kStep - 1) / kStep;
      if (adds_ + adds > UINT8_MAX) flush();
      adds_ += adds;
      count<Keys, false>(at, size, task_, bounds_, counters_, kStep);
      at += size;
      n -= size;
      left_ -= size;
      if (left_ == 0) {
        flush();
        left_ = task_.run;
        if (++unit_ == task_.units) unit_ = 0;
      }
    }
  }

  // Adds what is counted so far to the unit.
  void flush() {
    for (int i = 0; i < task_.n_passes; ++i) {
      add_counts(task_, task_.pass[i], unit_, sum_bytes(counters_ + i * kStep, kStep));
    }
    memset(counters_, 0, sizeof counters_);
    adds_ = 0;
  }

 private:
  const UnitTask& task_;
  const typename Keys::Bounds* bounds_;
  int64_t unit_;
  int64_t left_;  // of the unit's run
  int64_t adds_ = 0;
  alignas(64) uint8_t counters_[kMaxUnitPasses * kStep] = {};
};

template <class Keys, class OfChunk>
inline void read_chunk(const UnitTask& task, const UnitChunk& chunk,
                       const typename Keys::Bounds* bounds, Moments* result) {
  OfChunk moments;
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const int64_t begin = chunk.begin + row * task.plan.stride;
    const int64_t left = task.numel - begin;
    const int64_t n = chunk.columns < left ? chunk.columns : left;
    const auto* at = static_cast<const typename Keys::Element*>(task.data) + begin;
    int64_t nans = 0;
    if (task.plan.by_runs) {
      RunCounts<Keys> runs(task, bounds, begin);
      nans = moments.add_block(at, n, nullptr,
                               [&](int64_t offset, int64_t size) { runs.add(at + offset, size); });
      runs.flush();
    } else {
      uint8_t* counters = task.counters + chunk.column;
      nans = moments.add_block(at, n, nullptr, [&](int64_t offset, int64_t size) {
        count<Keys, true>(at + offset, size, task, bounds, counters + offset, task.pitch);
      });
    }
    if (nans > 0) take_off_nans(task, begin, at, n);
  }
  moments.add_to(result);
}

template <class Keys, class OfChunk>
void units_of(const UnitTask& task, int64_t begin, int64_t end, Moments* results) {
  typename Keys::Bounds bounds[kMaxUnitPasses];
  for (int i = 0; i < task.n_passes; ++i) bounds[i] = Keys::bounds(task.pass[i]);
  // Chunks that meet no column in more rows than its counter holds.
  const int64_t chunks_a_fold = task.plan.tiles * (UINT8_MAX / task.plan.rows_per_chunk);
  for (int64_t i = begin; i < end; ++i) {
    results[i] = empty_moments();
    read_chunk<Keys, OfChunk>(task, unit_chunk_at(task.plan, i), bounds, &results[i]);
    const bool fold = i + 1 == end || (i + 1 - begin) % chunks_a_fold == 0;
    if (fold && !task.plan.by_runs) fold_columns(task);
  }
}

}  // namespace
}  // namespace gradstat::GRADSTAT_VARIANT
