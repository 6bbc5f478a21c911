// The loops that write: `scale` and `clamp`, compiled per instruction set like moments_body.h,
// which must be included first (it says how each dtype is read and stored).

namespace gradstat::GRADSTAT_VARIANT {
namespace {

// Applies `change` to n elements in place, kLanes at a time.
template <class Type, class Change>
inline void change_32(void* data, int64_t n, const Change& change) {
  auto* at = static_cast<typename Type::Element*>(data);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Type::store(at + i, change(Type::load(at + i)));
  if (i < n) {
    const size_t tail_bytes = static_cast<size_t>(n - i) * sizeof *at;
    typename Type::Element tail[kLanes] = {};
    memcpy(tail, at + i, tail_bytes);
    Type::store(tail, change(Type::load(tail)));
    memcpy(at + i, tail, tail_bytes);
  }
}

template <class Change>
inline void change_64(void* data, int64_t n, const Change& change) {
  constexpr int64_t kStep = kLanes / 2;
  auto* at = static_cast<double*>(data);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) store_f64(at + i, change(load_f64(at + i)));
  if (i < n) {
    const size_t tail_bytes = static_cast<size_t>(n - i) * sizeof *at;
    double tail[kStep] = {};
    memcpy(tail, at + i, tail_bytes);
    store_f64(tail, change(load_f64(tail)));
    memcpy(at + i, tail, tail_bytes);
  }
}

// The product is taken in double: a coefficient below 2^-126 has few bits as an fp32.
template <class Type>
void scale_32(void* data, int64_t n, double coefficient) {
  const D factor = splat_f64(coefficient);
  change_32<Type>(data, n, [factor](U u) {
    return narrow_f64(mul_f64(low_f64(u), factor), mul_f64(high_f64(u), factor));
  });
}

void scale_f64(void* data, int64_t n, double coefficient) {
  const D factor = splat_f64(coefficient);
  change_64(data, n, [factor](D value) { return mul_f64(value, factor); });
}

// A limit rounded to the dtype first makes every clamped value exact in it.
template <class Type>
void clamp_32(void* data, int64_t n, double limit) {
  typename Type::Element rounded[kLanes];
  Type::store(rounded, narrow_f64(splat_f64(limit), splat_f64(limit)));
  const U high = Type::load(rounded);
  Type::store(rounded, narrow_f64(splat_f64(-limit), splat_f64(-limit)));
  const U low = Type::load(rounded);
  change_32<Type>(data, n, [low, high](U u) { return clamp_f32(u, low, high); });
}

void clamp_f64_all(void* data, int64_t n, double limit) {
  const D high = splat_f64(limit);
  const D low = splat_f64(-limit);
  change_64(data, n, [low, high](D value) { return clamp_f64(value, low, high); });
}

}  // namespace

// Indexed by DType.
const Kernels kKernels = {
    {moments_of<Moments32<F32>>, moments_of<Moments32<F16>>, moments_of<Moments32<BF16>>,
     moments_of<Moments64>},
    {units_of<Keys32, Moments32<F32>>, units_of<Keys16, Moments32<F16>>,
     units_of<Keys16, Moments32<BF16>>, units_of<Keys64, Moments64>},
    {scale_32<F32>, scale_32<F16>, scale_32<BF16>, scale_f64},
    {clamp_32<F32>, clamp_32<F16>, clamp_32<BF16>, clamp_f64_all},
};

}  // namespace gradstat::GRADSTAT_VARIANT
