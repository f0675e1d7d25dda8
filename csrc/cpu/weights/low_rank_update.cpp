// Rows of a list of matrices moved by a product of low rank, in place or into another tensor.
//
//   out_o = w_o + (b_o - K w_o) A        b_o (r), K (r, I) or none, A (r, I)
//
// Without K it merges an adapter, with it each row is first measured along the keys: edits of rank
// r, projections and products of reflections. Bytes a row of I elements: read and written once; the
// four rows of a block stay in L1/L2 between the dots and the sum. 2 r (4 r with K) flops an
// element: below memory's time up to r = 32 or so. Sums over I run in vector lanes (float32, or
// double for double), those over r in order; a row's result does not depend on its block or on the
// thread count.
#include "../strips.h"

namespace solera {

// One matrix; a, b and keys dense, in A. keys and b may be null.
struct LowRankItem {
  const void* w;
  void* out;
  const void *a, *b, *keys;
  int64_t rows, columns, rank, w_step, out_step;
};
constexpr int64_t kLowRankBlock = 4;

struct LowRankTable {
  void (*update[4])(const LowRankItem&, int64_t begin, int64_t end, void* work);
};

namespace SOLERA_ISA {
namespace {

// dots[row][k] = <w_row, keys_k> for kRows rows, kKeys keys.
template <class T, int kRows, int kKeys>
SOLERA_INLINE void dots_of(const T* const* w, const A<T>* keys, int64_t n, A<T>* dots,
                           int64_t rank) {
  AccVec<T> sum[kRows][kKeys] = {};
  strips<kLanes<T>>(n, [&](int64_t j, int count) {
    AccVec<T> key[kKeys];
    for (int k = 0; k < kKeys; ++k) key[k] = get(keys + k * n + j, count);
    for (int r = 0; r < kRows; ++r) {
      const AccVec<T> v = get(w[r] + j, count);
      for (int k = 0; k < kKeys; ++k) sum[r][k] += v * key[k];
    }
  });
  for (int r = 0; r < kRows; ++r)
    for (int k = 0; k < kKeys; ++k) dots[r * rank + k] = lane_sum(sum[r][k]);
}

template <class T, int kRows>
SOLERA_INLINE void block_of_rows(const LowRankItem& p, int64_t row, A<T>* by) {
  constexpr int L = kLanes<T>;
  const int64_t n = p.columns, rank = p.rank;
  const T* w[kRows];
  T* out[kRows];
  for (int r = 0; r < kRows; ++r) {
    w[r] = (const T*)p.w + (row + r) * p.w_step;
    out[r] = (T*)p.out + (row + r) * p.out_step;
  }
  const A<T>* b = (const A<T>*)p.b;
  if (p.keys) {
    const A<T>* keys = (const A<T>*)p.keys;
    int64_t k = 0;
    for (; k + 4 <= rank; k += 4) dots_of<T, kRows, 4>(w, keys + k * n, n, by + k, rank);
    for (; k < rank; ++k) dots_of<T, kRows, 1>(w, keys + k * n, n, by + k, rank);
    for (int64_t i = 0; i < kRows * rank; ++i) by[i] = (b ? b[row * rank + i] : A<T>(0)) - by[i];
  } else {
    for (int64_t i = 0; i < kRows * rank; ++i) by[i] = b[row * rank + i];
  }
  const A<T>* a = (const A<T>*)p.a;
  strips<2 * L>(n, [&](int64_t j, int count) {
    const int first = count < L ? count : L, second = count - first;
    AccVec<T> low[kRows], high[kRows];
    for (int r = 0; r < kRows; ++r) {
      low[r] = AccVec<T>{};
      high[r] = AccVec<T>{};
    }
    for (int64_t k = 0; k < rank; ++k) {
      const A<T>* line = a + k * n + j;
      const AccVec<T> v0 = get(line, first), v1 = second > 0 ? get(line + L, second) : AccVec<T>{};
      for (int r = 0; r < kRows; ++r) {
        const A<T> factor = by[r * rank + k];
        low[r] += factor * v0;
        high[r] += factor * v1;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      put(out[r] + j, get(w[r] + j, first) + low[r], first);
      if (second > 0) put(out[r] + j + L, get(w[r] + j + L, second) + high[r], second);
    }
  });
}

template <class T>
void update(const LowRankItem& p, int64_t begin, int64_t end, void* work) {
  A<T>* by = (A<T>*)work;
  int64_t row = begin;
  for (; row + kLowRankBlock <= end; row += kLowRankBlock)
    block_of_rows<T, kLowRankBlock>(p, row, by);
  for (; row < end; ++row) block_of_rows<T, 1>(p, row, by);
}

}  // namespace

extern const LowRankTable low_rank_table;
const LowRankTable low_rank_table = {{update<float>, update<double>, update<bf16>, update<f16>}};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(LowRankTable, low_rank_table)

namespace {

constexpr int64_t kTaskBytes = int64_t(256) << 10;

// The matrices as the kernels want them; what was not dense is copied, and written back at the end.
class LowRankLists {
 public:
  LowRankLists(const std::vector<Tensor>& w, const std::vector<Tensor>& a,
               const std::vector<Tensor>& b, const std::vector<Tensor>& keys) {
    const size_t count = w.size();
    STD_TORCH_CHECK(a.size() == count && (b.size() == count || b.empty()) &&
                        (keys.size() == count || keys.empty()) && !(b.empty() && keys.empty()),
                    "low_rank_update: the lists differ in length");
    for (size_t l = 0; l < count; ++l) {
      STD_TORCH_CHECK(w[l].dim() == 2, "low_rank_update: expected matrices");
      LowRankItem p{};
      p.rows = w[l].size(0);
      p.columns = w[l].size(1);
      p.rank = a[l].dim() == 2 ? a[l].size(0) : -1;
      const ScalarType acc = accumulate_type(w[l]);
      p.a = operand(a[l], p.rank, p.columns, acc);
      p.b = b.empty() ? nullptr : operand(b[l], p.rows, p.rank, acc);
      p.keys = keys.empty() ? nullptr : operand(keys[l], p.rank, p.columns, acc);
      items.push_back(p);
      dtypes.push_back(dtype_of(w[l]));
      const int64_t row_bytes = std::max<int64_t>(1, p.columns * int64_t(w[l].element_size()));
      const int64_t blocks = std::max<int64_t>(1, kTaskBytes / (row_bytes * kLowRankBlock));
      task_rows.push_back(blocks * kLowRankBlock);
      const int64_t tasks = (p.rows + task_rows.back() - 1) / task_rows.back();
      first.push_back(first.back() + (p.columns > 0 ? tasks : 0));
      most = std::max(most, p.rank);
    }
  }
  // Rows that lie in order, each without gaps: where they are; else a dense copy.
  static bool has_rows(const Tensor& t) {
    return t.size(1) <= 1 || (t.stride(1) == 1 && (t.size(0) <= 1 || t.stride(0) >= t.size(1)));
  }
  const Tensor& keep(Tensor t) {
    owners.push_back(std::move(t));
    return owners.back();
  }

  void run() const {
    const auto& table = pick_low_rank_table();
    parallel_for(0, first.back(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> work(size_t(kLowRankBlock * std::max<int64_t>(1, most)));
      size_t l = size_t(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
      for (; begin < end; ++begin) {
        while (begin >= first[l + 1]) ++l;
        const int64_t row = (begin - first[l]) * task_rows[l];
        table.update[dtypes[l]](items[l], row, std::min(items[l].rows, row + task_rows[l]),
                                work.data());
      }
    });
  }

  std::vector<LowRankItem> items;

 private:
  const void* operand(const Tensor& t, int64_t rows, int64_t columns, ScalarType acc) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns,
                    "low_rank_update: a factor does not fit its matrix");
    return keep(dense(t.scalar_type() == acc ? t : torch::stable::to(t, acc))).const_data_ptr();
  }
  std::vector<Tensor> owners;
  std::vector<Dtype> dtypes;
  std::vector<int64_t> first{0}, task_rows;
  int64_t most = 0;
};

void low_rank_update_(const std::vector<Tensor>& w, const std::vector<Tensor>& a,
                      const std::vector<Tensor>& b, const std::vector<Tensor>& keys) {
  LowRankLists lists(w, a, b, keys);
  std::vector<std::pair<size_t, Tensor>> copies;
  for (size_t l = 0; l < w.size(); ++l) {
    LowRankItem& p = lists.items[l];
    const bool rows = LowRankLists::has_rows(w[l]);
    if (!rows) copies.emplace_back(l, torch::stable::contiguous(w[l]));
    const Tensor& t = rows ? w[l] : copies.back().second;
    p.w = p.out = t.mutable_data_ptr();
    p.w_step = p.out_step = rows && w[l].size(0) > 1 ? w[l].stride(0) : p.columns;
  }
  lists.run();
  for (const auto& [l, computed] : copies)
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(w[l].get(), computed.get(), 0));
}

Tensor low_rank_update(const Tensor& w_in, const Tensor& a, OptTensor b, OptTensor keys) {
  const Tensor w = dense(w_in);
  std::vector<Tensor> bs, ks;
  if (b.has_value()) bs.push_back(*b);
  if (keys.has_value()) ks.push_back(*keys);
  LowRankLists lists({w}, {a}, bs, ks);
  Tensor out = empty_like(w, w.sizes());
  LowRankItem& p = lists.items[0];
  p.w = w.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.w_step = p.out_step = p.columns;
  lists.run();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("low_rank_update_", TORCH_BOX(&low_rank_update_));
  m.impl("low_rank_update", TORCH_BOX(&low_rank_update));
}

}  // namespace solera
#endif  // SOLERA_FRONT
