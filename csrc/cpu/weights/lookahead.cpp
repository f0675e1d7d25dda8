// The step of slow weights towards fast ones, and the result written to both, in one pass.
//
//   slow <- slow + alpha (fast - slow);  fast <- slow           in float32 (float64 for float64
//   slow)
//
// Elements of traffic: reads 2, writes 2. As two operations (a lerp, a copy) it would be 5. The
// product and the sum are rounded separately, so that every backend and instruction set gives the
// same bits.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "dtype_pairs.h"

namespace solera {

struct LookaheadItem {
  void *slow, *fast;
};

struct LookaheadTable {
  // Indexed by the dtypes of slow and fast.
  void (*update[4][4])(const LookaheadItem&, double alpha, int64_t offset, int64_t count);
};

namespace SOLERA_ISA {
namespace {

SOLERA_INLINE float lookahead_scalar(const float* p) { return *p; }
SOLERA_INLINE double lookahead_scalar(const double* p) { return *p; }
template <class H>
SOLERA_INLINE float lookahead_scalar(const H* p) {
  return widen_one(*p);
}
SOLERA_INLINE void set_lookahead(float* p, double v) { *p = float(v); }
SOLERA_INLINE void set_lookahead(double* p, double v) { *p = v; }
template <class H>
SOLERA_INLINE void set_lookahead(H* p, double v) {
  *p = narrow_one(float(v), H{});
}

template <class S, class F>
void look_ahead(const LookaheadItem& item, double alpha_in, int64_t offset, int64_t count) {
  typedef typename Acc<S>::type A;
  constexpr int L = kLanes<S>;
  const A alpha = A(alpha_in);
  S* slow = (S*)item.slow + offset;
  F* fast = (F*)item.fast + offset;
  const auto step = [&](AccVec<S> s, AccVec<S> f) {
    return alpha_in == 0 ? s : alpha_in == 1 ? f : s + alpha * (f - s);
  };
  for (int64_t j = 0; j < count; j += L) {
    const int n = int(count - j < L ? count - j : L);
    const bool whole = n == L;
    AccVec<S> s = whole ? load(slow + j) : load_n(slow + j, n);
    AccVec<S> f{};
    if constexpr (sizeof(typename Acc<F>::type) == sizeof(A)) {
      f = whole ? load(fast + j) : load_n(fast + j, n);
    } else {
      for (int i = 0; i < n; ++i) f[i] = A(lookahead_scalar(fast + j + i));
    }
    const AccVec<S> value = step(s, f);
    whole ? store(slow + j, value) : store_n(slow + j, value, n);
    s = whole ? load(slow + j) : load_n(slow + j, n);  // as stored
    if constexpr (sizeof(typename Acc<F>::type) == sizeof(A)) {
      whole ? store(fast + j, s) : store_n(fast + j, s, n);
    } else {
      for (int i = 0; i < n; ++i) set_lookahead(fast + j + i, double(s[i]));
    }
  }
}

}  // namespace

extern const LookaheadTable lookahead_table;
const LookaheadTable lookahead_table = {SOLERA_DTYPE_PAIRS(look_ahead)};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "tensor_lists.h"

namespace solera {

SOLERA_PICK(LookaheadTable, lookahead_table)

namespace {

void lookahead_(const std::vector<Tensor>& slow, const std::vector<Tensor>& fast, double alpha) {
  STD_TORCH_CHECK(slow.size() == fast.size(), "lookahead_: expected as many fast as slow tensors (",
                  slow.size(), "), got ", fast.size());
  const auto& table = pick_lookahead_table();
  TensorChunks chunks(slow.size());
  std::vector<LookaheadItem> items;
  std::vector<decltype(&table.update[0][0])> kernels;
  std::vector<std::pair<Tensor, Tensor>> strided;
  const auto place = [&](const Tensor& t) {
    if (t.is_contiguous()) return t.mutable_data_ptr();
    strided.emplace_back(t, torch::stable::contiguous(t));
    return strided.back().second.mutable_data_ptr();
  };
  for (size_t l = 0; l < slow.size(); ++l) {
    const auto a = slow[l].sizes(), b = fast[l].sizes();
    bool same = a.size() == b.size();
    for (size_t i = 0; same && i < a.size(); ++i) same = a[i] == b[i];
    STD_TORCH_CHECK(same, "lookahead_: fast tensor ", l, " differs in shape from its slow one");
    items.push_back({place(slow[l]), place(fast[l])});
    kernels.push_back(&table.update[dtype_of(slow[l])][dtype_of(fast[l])]);
    chunks.add(slow[l].numel());
  }
  chunks.parallel(kListChunk * 8, [&](size_t l, int64_t offset, int64_t count, int64_t) {
    (*kernels[l])(items[l], alpha, offset, count);
  });
  for (const auto& [t, computed] : strided)
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(t.get(), computed.get(), 0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) { m.impl("lookahead_", TORCH_BOX(&lookahead_)); }

}  // namespace solera
#endif  // SOLERA_FRONT
