// The loops of `units`, compiled per instruction set like moments_body.h, which must be included
// first. The counts follow the moments step by step or group by group: memory that the loop of the
// moments asked for arrives while a few registers are counted. With the counts behind the moments
// of a whole block it stood idle meanwhile, and sigmoid took 1.5 to 1.7 times the time to read rows
// of 4096. A band costs one or two instructions a register and a few to pack the hits into counters
// of bytes.

namespace gradstat::GRADSTAT_VARIANT {
namespace {

static_assert(kUnitColumns <= kBlock, "a row is a block");

// A band of fp32 or of 16 bits: its first value and how many it has, as integers of their width.
struct Bounds {
  U first;
  U size;
};

// A band's first value as an integer of so many bits (the bits of negative values grow with their
// magnitude), or the one before where the others are told by being above it.
inline int64_t first_bits(const UnitPass& pass, int bits) {
  if (pass.kind == BandKind::kAbove) return pass.band.from - 1;
  return pass.band.to < 0 ? (int64_t{1} << (bits - 1)) - 1 - pass.band.to : pass.band.from;
}

struct Keys32 {
  using Element = float;
  using Bounds = GRADSTAT_VARIANT::Bounds;
  static float nan() { return -NAN; }
  static bool is_above(float nan) { return !__builtin_signbit(nan); }

  static Bounds bounds(const UnitPass& pass) {
    const int64_t first = first_bits(pass, 32);
    return {splat_u32(static_cast<uint32_t>(first)),
            splat_u32(static_cast<uint32_t>(pass.band.to - pass.band.from + 1))};
  }
  template <BandKind kKind>
  static Hits32 hits(const float* at, const Bounds& bounds) {
    if (kKind == BandKind::kAbove) return is_less_i32(bounds.first, load_f32(at));
    const U key = kKind == BandKind::kBothSigns ? order_u32(load_f32(at)) : load_f32(at);
    return is_less_u32(sub_u32(key, bounds.first), bounds.size);
  }
  template <BandKind kKind>
  static Hits8 step_hits(const float* at, const Bounds& bounds) {
    const auto half = [&](const float* from) {
      return join32(hits<kKind>(from, bounds), hits<kKind>(from + kLanes, bounds));
    };
    return join16(half(at), half(at + 2 * kLanes));
  }
};

struct Keys16 {
  using Element = uint16_t;
  using Bounds = GRADSTAT_VARIANT::Bounds;
  static uint16_t nan() { return 0xffff; }
  static bool is_above(uint16_t nan) { return nan >> 15 == 0; }

  static Bounds bounds(const UnitPass& pass) {
    const int64_t first = first_bits(pass, 16);
    return {splat_u16(static_cast<uint16_t>(first)),
            splat_u16(static_cast<uint16_t>(pass.band.to - pass.band.from + 1))};
  }
  template <BandKind kKind>
  static Hits16 hits(const uint16_t* at, const Bounds& bounds) {
    if (kKind == BandKind::kAbove) return is_less_i16(bounds.first, load_u16(at));
    const U key = kKind == BandKind::kBothSigns ? order_u16(load_u16(at)) : load_u16(at);
    return is_less_u16(sub_u16(key, bounds.first), bounds.size);
  }
  template <BandKind kKind>
  static Hits8 step_hits(const uint16_t* at, const Bounds& bounds) {
    return join16(hits<kKind>(at, bounds), hits<kKind>(at + 2 * kLanes, bounds));
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
  static bool is_above(double) { return false; }

  static Bounds bounds(const UnitPass& pass) {
    return {splat_f64(pass.from_value), splat_f64(pass.to_value)};
  }
  template <BandKind>
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

// Adds 1 to the counter of each of n elements that lies in a band, for kBands bands of one kind:
// the counter of its column, or of its place in the step. The counters of a band lie `pitch` bytes
// behind those of the one before.
template <class Keys, bool kByColumns, BandKind kKind, int kBands>
GRADSTAT_INLINE void count_bands(const typename Keys::Element* at, int64_t n,
                                 const typename Keys::Bounds* bounds, uint8_t* counters,
                                 int64_t pitch) {
  typename Keys::Bounds band[kBands];
  U counts[kBands];
  for (int i = 0; i < kBands; ++i) {
    band[i] = bounds[i];
    if (!kByColumns) counts[i] = load_bytes(counters + i * pitch);
  }
  const auto add = [&](const typename Keys::Element* from) {
    Hits8 hits[kBands];  // all of them before a store, after which the elements were loaded again
    for (int i = 0; i < kBands; ++i) hits[i] = Keys::template step_hits<kKind>(from, band[i]);
    for (int i = 0; i < kBands; ++i) {
      if (kByColumns) counts[i] = load_bytes(counters + i * pitch);
      counts[i] = add_hits(counts[i], hits[i]);
      if (kByColumns) store_bytes(counters + i * pitch, counts[i]);
    }
    if (kByColumns) counters += kStep;
  };
  for (; n >= kStep; n -= kStep, at += kStep) add(at);
  if (n > 0) {
    typename Keys::Element tail[kStep];
    for (int64_t i = 0; i < kStep; ++i) tail[i] = Keys::nan();  // in no band
    memcpy(tail, at, static_cast<size_t>(n) * sizeof *at);
    add(tail);
  }
  for (int i = 0; i < kBands && !kByColumns; ++i) store_bytes(counters + i * pitch, counts[i]);
}

// The same for all of a task's bands, one by one.
template <class Keys, bool kByColumns>
inline void count(const typename Keys::Element* at, int64_t n, const UnitTask& task,
                  const typename Keys::Bounds* bounds, uint8_t* counters, int64_t pitch) {
  for (int i = 0; i < task.n_passes; ++i, ++bounds, counters += pitch) {
    switch (task.pass[i].kind) {
      case BandKind::kAbove:
        count_bands<Keys, kByColumns, BandKind::kAbove, 1>(at, n, bounds, counters, pitch);
        break;
      case BandKind::kOneSign:
        count_bands<Keys, kByColumns, BandKind::kOneSign, 1>(at, n, bounds, counters, pitch);
        break;
      case BandKind::kBothSigns:
        count_bands<Keys, kByColumns, BandKind::kBothSigns, 1>(at, n, bounds, counters, pitch);
        break;
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

// NaN is meant to be neither in a band nor outside of one.
template <class Keys>
inline void take_off_nans(const UnitTask& task, int64_t begin, const typename Keys::Element* at,
                          int64_t n) {
  for_each_run(task, begin, n, [&](int64_t unit, int64_t offset, int64_t size) {
    int64_t nans = 0;
    int64_t above = 0;  // in the bands that reach up to infinity
    for (int64_t i = offset; i < offset + size; ++i) {
      if (!is_nan(at[i], task.infinity)) continue;
      ++nans;
      above += Keys::is_above(at[i]);
    }
    for (int what = 0; what < kNumUnitCounts; ++what) {
      if (task.is_outside[what]) task.counts[what * task.units + unit] -= nans;
    }
    for (int i = 0; i < task.n_passes; ++i) {
      if (task.pass[i].kind == BandKind::kAbove) add_counts(task, task.pass[i], unit, -above);
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

// What goes on beside the moments of a row: the counts of its runs, or of its columns.
template <class Keys>
struct BesideRuns {
  using Element = typename Keys::Element;
  static constexpr bool kAsksAhead = false;
  RunCounts<Keys>* runs;

  void step(const Element*, int64_t) const {}
  void group(const Element* at, int64_t n) const { runs->add(at, n); }
  void rest(const Element* at, int64_t n) const { runs->add(at, n); }
};

// Columns ask ahead, for lines in the L2 cache: the L1 cache is crowded with counters and elements
// (asking into it takes half as much again), and rows that do not follow each other are not
// foreseen by the processor. 8 to 32 KB differ little.
template <class Element>
constexpr int64_t kAhead = 8192 / sizeof(Element);

template <class Keys>
struct BesideColumns {
  using Element = typename Keys::Element;
  static constexpr bool kAsksAhead = true;
  const UnitTask& task;
  const typename Keys::Bounds* bounds;
  const Element* row;
  uint8_t* counters;  // of the row's first element
  int64_t ahead;      // elements from one to the one to ask for

  GRADSTAT_INLINE void step(const Element* at, int64_t) const { prefetch<2>(at + ahead); }
  void group(const Element* at, int64_t n) const { rest(at, n); }
  void rest(const Element* at, int64_t n) const {
    count<Keys, true>(at, n, task, bounds, counters + (at - row), task.pitch);
  }
};

// The same for kBands bands that are all kAbove, where rows follow each other: finer, since the
// bounds stay in registers. `ahead` as a variable would take them away, 6 % of the time in fp32.
template <class Keys, int kBands>
struct BesideColumnsAbove {
  using Element = typename Keys::Element;
  static constexpr bool kAsksAhead = true;
  const Element* row;
  uint8_t* counters;
  int64_t pitch;
  typename Keys::Bounds bounds[kBands];

  GRADSTAT_INLINE void step(const Element* at, int64_t index) const {
    prefetch<2>(at + kAhead<Element>);
    count_bands<Keys, true, BandKind::kAbove, kBands>(at, kStep, bounds, counters + index, pitch);
  }
  void group(const Element*, int64_t) const {}
  void rest(const Element* at, int64_t n) const {
    count_bands<Keys, true, BandKind::kAbove, kBands>(at, n, bounds, counters + (at - row), pitch);
  }
};

template <class Keys, class OfChunk>
inline void read_chunk(const UnitTask& task, const UnitChunk& chunk,
                       const typename Keys::Bounds* bounds, Moments* result) {
  const bool above = task.pass[0].kind == BandKind::kAbove &&
                     (task.n_passes == 1 || task.pass[1].kind == BandKind::kAbove);
  const bool tiled = task.plan.tiles > 1;
  const int bands_above = above && !tiled ? task.n_passes : 0;
  const int64_t ahead = tiled ? task.plan.stride : kAhead<typename Keys::Element>;
  OfChunk moments;
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const int64_t begin = chunk.begin + row * task.plan.stride;
    const int64_t left = task.numel - begin;
    const int64_t n = chunk.columns < left ? chunk.columns : left;
    const auto* at = static_cast<const typename Keys::Element*>(task.data) + begin;
    uint8_t* counters = task.counters + chunk.column;
    int64_t nans = 0;
    if (task.plan.by_runs) {
      RunCounts<Keys> runs(task, bounds, begin);
      nans = moments.add_block(at, n, nullptr, BesideRuns<Keys>{&runs});
      runs.flush();
    } else if (bands_above == 1) {
      nans = moments.add_block(at, n, nullptr,
                               BesideColumnsAbove<Keys, 1>{at, counters, task.pitch, {bounds[0]}});
    } else if (bands_above == 2) {
      nans = moments.add_block(
          at, n, nullptr,
          BesideColumnsAbove<Keys, 2>{at, counters, task.pitch, {bounds[0], bounds[1]}});
    } else {
      nans =
          moments.add_block(at, n, nullptr, BesideColumns<Keys>{task, bounds, at, counters, ahead});
    }
    if (nans > 0) take_off_nans<Keys>(task, begin, at, n);
  }
  moments.add_to(result);
}

template <class Keys, class OfChunk>
void units_of(const UnitTask& task, int64_t begin, int64_t end, Moments* results) {
  typename Keys::Bounds bounds[kMaxUnitPasses];
  for (int i = 0; i < task.n_passes; ++i) bounds[i] = Keys::bounds(task.pass[i]);
  const int64_t fold_after = chunks_a_fold(task.plan);
  for (int64_t i = begin; i < end; ++i) {
    results[i] = empty_moments();
    read_chunk<Keys, OfChunk>(task, unit_chunk_at(task.plan, i), bounds, &results[i]);
    const bool fold = i + 1 == end || (i + 1 - begin) % fold_after == 0;
    if (fold && !task.plan.by_runs) fold_columns(task);
  }
}

}  // namespace
}  // namespace gradstat::GRADSTAT_VARIANT
