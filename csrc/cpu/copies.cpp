#include "copies.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "dispatch.h"

namespace gradstat::cpu {
namespace {

constexpr size_t kAlignment = 64;

size_t element_bytes(const TensorRef& tensor) { return tensor.dtype == DType::kF64 ? 8 : 4; }

size_t bytes_of(const TensorRef& tensor) {
  return static_cast<size_t>(tensor.numel) * element_bytes(tensor);
}

size_t padded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool is_alike(const TensorRef& one, const TensorRef& other) {
  return one.numel == other.numel && one.rows == other.rows && one.run == other.run &&
         one.dtype == other.dtype;
}

template <typename T>
void subtract(const TensorRef& from, const TensorRef& what, const TensorRef& into) {
  const T* a = static_cast<const T*>(from.data);
  const T* b = static_cast<const T*>(what.data);
  T* result = static_cast<T*>(into.data);
  for (int64_t i = 0; i < into.numel; ++i) result[i] = a[i] - b[i];
}

}  // namespace

bool Copies::can_hold(const std::vector<TensorRef>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const TensorRef& tensor) {
    return tensor.numel != kMissing && (tensor.dtype == DType::kF32 || tensor.dtype == DType::kF64);
  });
}

Copies::Copies(const std::vector<TensorRef>& tensors) : refs_(tensors) {
  refs_.insert(refs_.end(), tensors.begin(), tensors.end());
  size_t total = 0;
  for (const TensorRef& tensor : refs_) total += padded(bytes_of(tensor));
  memory_.reset(new char[total]);
  char* at = memory_.get();
  for (TensorRef& tensor : refs_) {
    tensor.data = at;
    at += padded(bytes_of(tensor));
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel > 0) std::memcpy(refs_[i].data, tensors[i].data, bytes_of(tensors[i]));
  }
}

bool Copies::changes(const std::vector<TensorRef>& now, double* table, int threads) {
  const size_t count = now.size();
  if (2 * count != refs_.size() || !std::equal(now.begin(), now.end(), refs_.begin(), is_alike)) {
    return false;
  }
  for (size_t i = 0; i < count; ++i) {
    if (now[i].dtype == DType::kF64) {
      subtract<double>(now[i], refs_[i], refs_[count + i]);
    } else {
      subtract<float>(now[i], refs_[i], refs_[count + i]);
    }
  }
  moments(refs_.data(), static_cast<int64_t>(refs_.size()), table, nullptr, ClipRequest{}, threads);
  return true;
}

}  // namespace gradstat::cpu
