// Exponential moving average of weight lists, in place, with unbiased rounding for half averages.
//
//   avg <- avg + (1 - decay) (param - avg)          in float32 (float64 for float64 averages)
//
// Bytes an element: reads the average and the parameter, writes the average (6 for bfloat16 pairs,
// 12 for float32). Stochastic rounding adds about one vector instruction an element: one
// Philox4x32-10 block gives eight elements their 16 random bits, and the blocks of a vector of
// counters give eight vectors. The product and the sum are rounded separately (no fused
// multiply-add), so that every backend and instruction set gives the same bits.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "../philox.h"
#include "dtype_pairs.h"

namespace solera {

enum EmaMode : int { kEmaNearest = 0, kEmaStochastic = 1 };

struct EmaItem {
  void* average;
  const void* parameter;
  double weight;  // 1 - decay
  bool copy;      // decay is 0: the parameter itself, also where a + (p - a) would not be it
  int mode;
  uint64_t seed;
  uint32_t tensor, step;
};

struct EmaTable {
  // Indexed by the dtypes of average and parameter. offset is a multiple of 1024.
  void (*update[4][4])(const EmaItem&, int64_t offset, int64_t count);
};

namespace SOLERA_ISA {
namespace {

constexpr int kWords = SOLERA_VECTOR_BYTES / 4;

// float32 to a half by adding random bits below its last place and truncating: the expected value
// is the input. r holds 16 bits a lane. Infinities and NaN are kept; what passes the largest number
// is infinite.
SOLERA_INLINE vh round_random(vf x, vu r, bf16) {
  const vu u = bits_as<vu>(x);
  const vu quiet = (u >> 16) | 0x40;
  return __builtin_convertvector(x == x ? (u + r) >> 16 : quiet, vh);
}
SOLERA_INLINE vh round_random(vf x, vu r, f16) {
  const vu u = bits_as<vu>(x), sign = u & 0x80000000u, size = u & 0x7fffffffu;
  const vu normal = (size + (r >> 3)) & 0xffffe000u;
  // Below 2^-14 the places are 2^-24 apart: floor(|x| 2^24 + r / 2^16), compared without rounding.
  const vf scaled = bits_as<vf>(size < 0x38800000u ? size : vu{}) * 0x1p24f;
  const vi whole = __builtin_convertvector(scaled, vi);
  const vf floor = __builtin_convertvector(whole, vf);
  const vf threshold = 1.0f - __builtin_convertvector((vi)r, vf) * 0x1p-16f;
  const vf up = scaled - floor >= threshold ? splat(1.0f) : splat(0.0f);
  const vu tiny = bits_as<vu>((floor + up) * 0x1p-24f);
  vu rounded = size < 0x38800000u ? tiny : normal;
  rounded = size >= 0x7f800000u ? size : rounded;
  return narrow(bits_as<vf>(rounded | sign), f16{});
}

SOLERA_INLINE float ema_scalar(const float* p) { return *p; }
SOLERA_INLINE double ema_scalar(const double* p) { return *p; }
template <class H>
SOLERA_INLINE float ema_scalar(const H* p) {
  return widen_one(*p);
}
// n accumulators A from a parameter of any dtype.
template <class A, class P>
SOLERA_INLINE typename Vec<A>::type parameter_as(const P* p, int n) {
  if constexpr (sizeof(typename Acc<P>::type) == sizeof(A)) {
    return n == Vec<A>::lanes ? load(p) : load_n(p, n);
  } else {
    A lane[Vec<A>::lanes] = {};
    for (int i = 0; i < n; ++i) lane[i] = A(ema_scalar(p + i));
    return load(lane);
  }
}

template <class T, class P>
SOLERA_INLINE AccVec<T> averaged(const T* average, const P* parameter, typename Acc<T>::type weight,
                                 bool copy, int n) {
  const AccVec<T> p = parameter_as<typename Acc<T>::type>(parameter, n);
  if (copy) return p;
  const AccVec<T> a = n == kLanes<T> ? load(average) : load_n(average, n);
  return a + weight * (p - a);
}

template <class T, class P>
void update_nearest(T* average, const P* parameter, typename Acc<T>::type weight, bool copy,
                    int64_t n) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  for (; j + L <= n; j += L)
    store(average + j, averaged(average + j, parameter + j, weight, copy, L));
  if (j == n) return;
  const int rest = int(n - j);
  store_n(average + j, averaged(average + j, parameter + j, weight, copy, rest), rest);
}

// Chunks of 1024: the blocks of 128 lanes serve eight slots of 128 elements.
template <class T, class P>
void update_stochastic(const EmaItem& item, T* average, const P* parameter, float weight,
                       int64_t offset, int64_t count) {
  const vu lane = lane_numbers();
  for (int64_t begin = offset; begin < offset + count; begin += 1024) {
    const uint64_t block = uint64_t(begin / 1024) * 128;
    const int64_t left = offset + count - begin;
    for (int64_t first = 0; first < 128 && first < left; first += kWords) {
      const PhiloxWords random = philox(lane + (uint32_t(block) + uint32_t(first)),
                                        uint32_t(block >> 32), item.tensor, item.step, item.seed);
      for (int slot = 0; slot < 8; ++slot) {
        const int64_t inside = slot * 128 + first;
        const int n = int(left - inside < kWords ? left - inside : kWords);
        if (n <= 0) break;
        const vu word = random.word[slot / 2];
        const vu r = slot % 2 == 0 ? word & 0xffffu : word >> 16;
        T* a = average + begin + inside;
        const vh half =
            round_random(averaged(a, parameter + begin + inside, weight, item.copy, n), r, T{});
        if (n == kWords)
          memcpy((void*)a, &half, sizeof half);
        else
          memcpy((void*)a, &half, size_t(n) * sizeof(T));
      }
    }
  }
}

template <class T, class P>
void update(const EmaItem& item, int64_t offset, int64_t count) {
  typedef typename Acc<T>::type A;
  T* average = (T*)item.average;
  const P* parameter = (const P*)item.parameter;
  if constexpr (sizeof(T) == 2) {
    if (item.mode == kEmaStochastic)
      return update_stochastic(item, average, parameter, A(item.weight), offset, count);
  }
  update_nearest(average + offset, parameter + offset, A(item.weight), item.copy, count);
}

}  // namespace

extern const EmaTable ema_table;
const EmaTable ema_table = {SOLERA_DTYPE_PAIRS(update)};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>

#include "tensor_lists.h"

namespace solera {

SOLERA_PICK(EmaTable, ema_table)

namespace {

struct EmaSpan {
  uintptr_t begin, end;
  size_t index;  // averages first, then parameters
};

// Averages are written while others are read: no two may share memory, but for a parameter that is
// exactly its own average. (Strided tensors are copied first and not looked at here.)
void refuse_shared_memory(std::vector<EmaSpan>& spans, size_t count) {
  std::sort(spans.begin(), spans.end(), [](const EmaSpan& a, const EmaSpan& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.index < b.index;
  });
  const EmaSpan *far = nullptr, *far_average = nullptr;  // of those before, which reach furthest
  for (const EmaSpan& span : spans) {
    for (const EmaSpan* other : {far, far_average}) {
      if (other == nullptr || span.begin >= other->end) continue;
      const bool reads_only = span.index >= count && other->index >= count;
      const bool itself = span.begin == other->begin && span.end == other->end &&
                          span.index % count == other->index % count;
      STD_TORCH_CHECK(reads_only || itself,
                      "ema_: averages share memory with each other or with parameters");
    }
    if (far == nullptr || span.end > far->end) far = &span;
    if (span.index < count && (far_average == nullptr || span.end > far_average->end))
      far_average = &span;
  }
}

void ema_(const std::vector<Tensor>& averages, const std::vector<Tensor>& parameters, double decay,
          OptTensor seed) {
  STD_TORCH_CHECK(averages.size() == parameters.size(),
                  "ema_: expected as many parameters as averages (", averages.size(), "), got ",
                  parameters.size());
  EmaItem common{nullptr, nullptr, 1 - decay, decay == 0, kEmaNearest, 0, 0, 0};
  if (seed.has_value()) {
    const int64_t* state = static_cast<const int64_t*>(seed->const_data_ptr());
    common.mode = kEmaStochastic;
    common.seed = uint64_t(state[0]);
    common.step = uint32_t(state[1]);
  }
  const auto& table = pick_ema_table();
  TensorChunks chunks(averages.size());
  std::vector<EmaItem> items;
  std::vector<decltype(&table.update[0][0])> kernels;
  items.reserve(averages.size());
  kernels.reserve(averages.size());
  std::vector<EmaSpan> spans;
  spans.reserve(2 * averages.size());
  const auto note = [&](const void* data, const Tensor& t, size_t index) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const auto bytes = uintptr_t(t.numel()) * t.element_size();
    if (bytes > 0) spans.push_back({begin, begin + bytes, index});
  };
  std::vector<Tensor> owners;
  std::vector<std::pair<size_t, Tensor>> strided;
  for (size_t l = 0; l < averages.size(); ++l) {
    const Tensor& a = averages[l];
    EmaItem item = common;
    item.tensor = uint32_t(l);
    if (a.is_contiguous()) {
      item.average = a.mutable_data_ptr();
      note(item.average, a, l);
    } else {
      strided.emplace_back(l, torch::stable::contiguous(a));
      item.average = strided.back().second.mutable_data_ptr();
    }
    const Tensor& p = parameters[l];
    const auto shape = a.sizes(), given = p.sizes();
    bool same = shape.size() == given.size();
    for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] == given[i];
    STD_TORCH_CHECK(same, "ema_: parameter ", l, " differs in shape from its average");
    if (p.is_contiguous()) {
      item.parameter = p.const_data_ptr();
      note(item.parameter, p, averages.size() + l);
    } else {
      owners.push_back(torch::stable::contiguous(p));
      item.parameter = owners.back().const_data_ptr();
    }
    kernels.push_back(&table.update[dtype_of(a)][dtype_of(p)]);
    items.push_back(item);
    chunks.add(a.numel());
  }
  refuse_shared_memory(spans, averages.size());
  chunks.parallel(kListChunk * 8, [&](size_t l, int64_t offset, int64_t count, int64_t) {
    (*kernels[l])(items[l], offset, count);
  });
  for (const auto& [l, computed] : strided)
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(averages[l].get(), computed.get(), 0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) { m.impl("ema_", TORCH_BOX(&ema_)); }

}  // namespace solera
#endif  // SOLERA_FRONT
