// Rows of member logits as the kernels take them (python/solera/ensemble/_logits.py has the same on
// its floor).
#pragma once

#include "../natural.h"
#include "../strips.h"

namespace solera {

// Row n of member k begins n * stride[k] elements after at[k].
struct MemberRows {
  const void* const* at;
  const int64_t* stride;
  int64_t members, width;
};

namespace SOLERA_ISA {
namespace {

template <class T>
SOLERA_INLINE const T* member_row(const MemberRows& rows, int64_t n, int64_t k) {
  return (const T*)rows.at[k] + n * rows.stride[k];
}

constexpr int64_t kMemberBlock = 1024;  // columns that stay in L1 between a block's two passes

// 0, 1, 2, ... in a vector of integers as wide as A.
SOLERA_INLINE vi lane_numbers(float) {
  static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return bits_as<vi>(load((const float*)numbers));
}
SOLERA_INLINE vl lane_numbers(double) {
  static const int64_t numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  return bits_as<vl>(load((const double*)numbers));
}

// Lanes at or past count set to `other`.
template <class T>
SOLERA_INLINE AccVec<T> keep_or(AccVec<T> v, int count, A<T> other) {
  if (count == kLanes<T>) return v;
  return lane_numbers(A<T>()) < count ? v : splat(other);
}

// As get and put, with one masked access for a row's last lanes where the machine has it.
template <class T>
SOLERA_INLINE AccVec<T> fetch(const T* p, int count) {
#if defined(__AVX512F__)
  if (count != kLanes<T>) {
    if constexpr (sizeof(T) == 2)
      return widen((vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p), T{});
    else
      return load_tail(p, count);
  }
#endif
  return get(p, count);
}
template <class T>
SOLERA_INLINE void deposit(T* p, AccVec<T> v, int count) {
#if defined(__AVX512F__)
  if (count != kLanes<T>) {
    if constexpr (sizeof(T) == 2)
      _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)narrow(v, T{}));
    else if constexpr (sizeof(T) == 4)
      _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
    else
      _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
    return;
  }
#endif
  put(p, v, count);
}

// lane_max without leaving the registers where there is such an instruction.
template <class V>
SOLERA_INLINE auto lane_top(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4)
    return _mm512_reduce_max_ps((__m512)v);
  else
    return _mm512_reduce_max_pd((__m512d)v);
#else
  return lane_max(v);
#endif
}

// The largest of value(offset, count) over a row of n, never below `lowest`; NaN is passed over.
template <class T, class F>
SOLERA_INLINE A<T> row_max(int64_t n, A<T> lowest, const F& value) {
  constexpr int L = kLanes<T>;
  AccVec<T> m0 = splat(lowest), m1 = m0, m2 = m0, m3 = m0;
  int64_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L) {
    m0 = vmax(m0, value(j, L));
    m1 = vmax(m1, value(j + L, L));
    m2 = vmax(m2, value(j + 2 * L, L));
    m3 = vmax(m3, value(j + 3 * L, L));
  }
  for (; j + L <= n; j += L) m0 = vmax(m0, value(j, L));
  if (j < n) m1 = vmax(m1, keep_or<T>(value(j, int(n - j)), int(n - j), lowest));
  return lane_top(vmax(vmax(m0, m1), vmax(m2, m3)));
}

// top and total with log sum e^value = top + log total over a row, block by block; a row of -inf
// gives a total of 0.
template <class T, class F>
SOLERA_INLINE void log_sum_row(int64_t width, const F& value, A<T>& top, A<T>& total) {
  top = lowest_of(A<T>());
  total = 0;
  for (int64_t first = 0; first < width; first += kMemberBlock) {
    const int64_t n = width - first < kMemberBlock ? width - first : kMemberBlock;
    const A<T> here =
        row_max<T>(n, top, [&](int64_t j, int count) { return value(first + j, count); });
    if (here > top) {
      total *= natural_exp_one(top - here);
      top = here;
    }
    total += row_sum<T>(n, [&](int64_t j, int count) {
      return keep_or<T>(natural_exp(value(first + j, count) - top), count, 0);
    });
  }
}

// Writes value(offset, count) over a row, past the caches if asked, whatever the row's alignment.
template <class T, class F>
SOLERA_INLINE void write_row(T* out, int64_t width, bool streaming, const F& value) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  if (streaming) {
    constexpr uintptr_t bytes = L * sizeof(T);
    const int64_t head = int64_t((bytes - uintptr_t(out) % bytes) % bytes / sizeof(T));
    if (head > 0 && head <= width) {
      deposit(out, value(0, int(head)), int(head));
      j = head;
    }
    for (; j + L <= width; j += L) stream(out + j, value(j, L));
  } else {
    for (; j + L <= width; j += L) store(out + j, value(j, L));
  }
  if (j < width) deposit(out + j, value(j, int(width - j)), int(width - j));
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {
namespace {

// The op's list of logits, one (N, K, C) or K times (N, C), as MemberRows: a tensor whose last
// stride is not 1 is copied.
class MemberTensors {
 public:
  int64_t rows, members, width;
  bool list;  // K times (N, C)

  explicit MemberTensors(const std::vector<Tensor>& logits) {
    STD_TORCH_CHECK(!logits.empty(), "solera: expected member logits, got none");
    list = logits[0].dim() != 3;
    STD_TORCH_CHECK(list || logits.size() == 1,
                    "solera: member logits are one (N, K, C) or K times (N, C)");
    const Tensor& x = logits[0];
    STD_TORCH_CHECK(x.dim() == (list ? 2 : 3),
                    "solera: member logits are one (N, K, C) or K times (N, C)");
    rows = x.size(0);
    members = list ? int64_t(logits.size()) : x.size(1);
    width = x.size(list ? 1 : 2);
    kept_.reserve(logits.size());
    for (const Tensor& t : logits) {
      STD_TORCH_CHECK(t.dim() == x.dim() && t.size(0) == rows && t.size(x.dim() - 1) == width &&
                          t.scalar_type() == x.scalar_type(),
                      "solera: member logits must share their shape and dtype");
      kept_.push_back(t.stride(t.dim() - 1) == 1 || width <= 1 ? t : torch::stable::contiguous(t));
    }
    at_.resize(size_t(members));
    stride_.resize(size_t(members));
    for (int64_t k = 0; k < members; ++k) {
      const Tensor& t = kept_[list ? size_t(k) : 0];
      const char* base = static_cast<const char*>(t.const_data_ptr());
      at_[size_t(k)] = list ? base : base + k * t.stride(1) * t.element_size();
      stride_[size_t(k)] = t.stride(0);
    }
  }
  const Tensor& first() const { return kept_[0]; }
  MemberRows view() const { return {at_.data(), stride_.data(), members, width}; }
  int64_t bytes() const { return rows * members * width * first().element_size(); }

  // A new tensor of the logits' size: (N, K, C), or (K, N, C) to a list.
  Tensor like() const {
    const int64_t sizes[] = {list ? members : rows, list ? rows : members, width};
    return empty_like(first(), Sizes(sizes, 3));
  }
  // Elements from one row and from one member of such a tensor to the next.
  int64_t row_step() const { return list ? width : members * width; }
  int64_t member_step() const { return list ? rows * width : width; }

 private:
  std::vector<Tensor> kept_;
  std::vector<const void*> at_;
  std::vector<int64_t> stride_;
};

}  // namespace
}  // namespace solera
#endif  // SOLERA_FRONT
