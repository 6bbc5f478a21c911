// Reads a chunk in 16-byte vectors wherever in memory it starts.
#pragma once

#include "elements.h"
#include "reduce.h"

namespace gradstat::cuda {

// Vector v holds the elements from v * kPerVector on, whatever the alignment: which elements are
// summed together, and so every bit of a result, depends on their position in the chunk alone.
template <class Type>
class ChunkReader {
 public:
  using Element = typename Type::Element;

  __device__ ChunkReader(const void* data, int64_t n)
      : data_(static_cast<const Element*>(data)),
        n_(static_cast<int>(n)),
        shift_(static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16)),
        straddling_((n_ * static_cast<int>(sizeof(Element)) + shift_) / 16 - 1) {}

  __device__ __forceinline__ int size() const { return n_; }
  __device__ __forceinline__ int vectors() const { return n_ / kPerVector<Type>; }
  __device__ __forceinline__ Element element(int i) const { return __ldg(data_ + i); }

  // Reads the vectors v, v + kThreads, ... (kCount of them), all loads before the first use.
  template <int kCount>
  __device__ __forceinline__ void read(int v, Vector (&vectors)[kCount]) const {
    const auto* at =
        reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(data_) - shift_) + v;
    if (shift_ == 0) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) vectors[j] = as_vector(__ldg(at + j * kThreads));
    } else if (v + (kCount - 1) * kThreads < straddling_) {
      Vector high[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        vectors[j] = as_vector(__ldg(at + j * kThreads));
        high[j] = as_vector(__ldg(at + j * kThreads + 1));
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) vectors[j] = realign(vectors[j], high[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) vectors[j] = gather(v + j * kThreads);
    }
  }

 private:
  // The 16 bytes that begin shift_ bytes into `low`.
  __device__ __forceinline__ Vector realign(const Vector& low, const Vector& high) const {
    uint32_t word[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = low.word[i];
      word[i + 4] = high.word[i];
    }
#pragma unroll
    for (int i = 0; i < 6; ++i) word[i] = shift_ & 8 ? word[i + 2] : word[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) word[i] = shift_ & 4 ? word[i + 1] : word[i];
    Vector result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      result.word[i] = shift_ & 2 ? word[i] >> 16 | word[i + 1] << 16 : word[i];
    }
    return result;
  }

  // A vector in pieces of 2 bytes, for the end of a chunk, where the 16 bytes that hold its last
  // element may reach beyond the tensor's memory.
  __device__ __forceinline__ Vector gather(int v) const {
    const auto* at = reinterpret_cast<const uint16_t*>(data_ + v * kPerVector<Type>);
    Vector result = {};
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const uint32_t piece = __ldg(at + i);
      result.word[0] = result.word[0] >> 16 | result.word[1] << 16;
      result.word[1] = result.word[1] >> 16 | result.word[2] << 16;
      result.word[2] = result.word[2] >> 16 | result.word[3] << 16;
      result.word[3] = result.word[3] >> 16 | piece << 16;
    }
    return result;
  }

  const Element* data_;
  int n_;
  int shift_;       // bytes from the last 16-byte boundary to the chunk
  int straddling_;  // if shifted: vectors whose two aligned halves do not reach beyond the chunk
};

}  // namespace gradstat::cuda
