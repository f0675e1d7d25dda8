// Exponential moving averages of single rows of a bank, in place; rows named more than once take
// their values in the order of the batch.
//
//   bank[index_i] <- decay bank[index_i] + (1 - decay) value_i,   i = 0, 1, ...
//
// Elements of traffic: a value is read once, a row of the bank read and written once however often
// it is named: (B + 2 U) D for U distinct rows. The batch is sorted by row (stable radix sort of B
// numbers), a row's values are then applied one after another in registers and rounded once. The
// product and the sum are rounded separately, so that every backend gives the same bits.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "dtype_pairs.h"

namespace solera {

struct IndexedEmaRow {
  void* row;
  const void* values;
  const int64_t* order;  // the batch positions of this row's values, `times` of them
  int64_t times, width;
  double decay;
};

struct IndexedEmaTable {
  // Indexed by the dtypes of bank and values.
  void (*update[4][4])(const IndexedEmaRow&, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

SOLERA_INLINE float indexed_scalar(const float* p) { return *p; }
SOLERA_INLINE double indexed_scalar(const double* p) { return *p; }
template <class H>
SOLERA_INLINE float indexed_scalar(const H* p) {
  return widen_one(*p);
}

template <class T, class P>
void update_row(const IndexedEmaRow& item, int64_t begin, int64_t end) {
  typedef typename Acc<T>::type A;
  constexpr int L = kLanes<T>;
  T* row = (T*)item.row;
  const P* values = (const P*)item.values;
  const A decay = A(item.decay), weight = A(1 - item.decay);
  for (int64_t j = begin; j < end; j += L) {
    const int n = int(end - j < L ? end - j : L);
    AccVec<T> t = n == L ? load(row + j) : load_n(row + j, n);
    for (int64_t i = 0; i < item.times; ++i) {
      const P* p = values + item.order[i] * item.width + j;
      AccVec<T> v{};
      if constexpr (sizeof(typename Acc<P>::type) == sizeof(A)) {
        v = n == L ? load(p) : load_n(p, n);
      } else {
        for (int k = 0; k < n; ++k) v[k] = A(indexed_scalar(p + k));
      }
      t = item.decay == 0 ? v : decay * t + weight * v;
    }
    n == L ? store(row + j, t) : store_n(row + j, t, n);
  }
}

}  // namespace

extern const IndexedEmaTable indexed_ema_table;
const IndexedEmaTable indexed_ema_table = {SOLERA_DTYPE_PAIRS(update_row)};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(IndexedEmaTable, indexed_ema_table)

namespace {

struct IndexedEntry {
  int64_t row, at;
};

// Sorted by row, entries of one row in the order they came: as many stable passes over 11 bits as
// the largest row has.
std::vector<IndexedEntry> sorted_by_row(const int64_t* index, int64_t count, int64_t rows) {
  std::vector<IndexedEntry> entries, other;
  entries.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(index[i] < rows, "indexed_ema_: index ", index[i], " of a bank of ", rows,
                    " rows");
    if (index[i] >= 0) entries.push_back({index[i], i});
  }
  other.resize(entries.size());
  constexpr int kBits = 11, kBuckets = 1 << kBits;
  for (int shift = 0; shift < 63 && (rows - 1) >> shift > 0; shift += kBits) {
    size_t first[kBuckets + 1] = {};
    for (const IndexedEntry& e : entries) ++first[((e.row >> shift) & (kBuckets - 1)) + 1];
    for (int b = 0; b < kBuckets; ++b) first[b + 1] += first[b];
    for (const IndexedEntry& e : entries) other[first[(e.row >> shift) & (kBuckets - 1)]++] = e;
    entries.swap(other);
  }
  return entries;
}

// bank (N, D), index (B,) int64, values (B, D).
void indexed_ema_(const Tensor& bank, const Tensor& index_in, const Tensor& values_in,
                  double decay) {
  STD_TORCH_CHECK(bank.dim() == 2 && values_in.dim() == 2 && index_in.dim() == 1 &&
                      values_in.size(1) == bank.size(1) && values_in.size(0) == index_in.size(0),
                  "indexed_ema_: expected bank (N, D), index (B,) and values (B, D)");
  const Tensor target = dense(bank), values = dense(values_in), index = dense(index_in);
  const int64_t width = bank.size(1);
  const auto entries = sorted_by_row(static_cast<const int64_t*>(index.const_data_ptr()),
                                     index.numel(), bank.size(0));
  std::vector<int64_t> order, first;
  order.reserve(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    if (i == 0 || entries[i].row != entries[i - 1].row) first.push_back(int64_t(i));
    order.push_back(entries[i].at);
  }
  const int64_t groups = int64_t(first.size());
  first.push_back(int64_t(entries.size()));
  if (groups == 0 || width == 0) return;
  // A task is a row and a run of its columns; long rows are split so that few rows use all threads.
  constexpr int64_t kColumns = 1024;
  const int64_t runs = (width + kColumns - 1) / kColumns;
  const auto kernel = pick_indexed_ema_table().update[dtype_of(bank)][dtype_of(values)];
  char* rows = static_cast<char*>(target.mutable_data_ptr());
  const int64_t stride = width * int64_t(bank.element_size());
  const int64_t run = width < kColumns ? width : kColumns;
  const int64_t mean = run * 4 * (2 + int64_t(entries.size()) / groups);
  parallel_for(0, groups * runs, grain_for(mean), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / runs, from = task % runs * kColumns;
      const int64_t to = from + kColumns < width ? from + kColumns : width;
      kernel({rows + entries[size_t(first[g])].row * stride, values.const_data_ptr(),
              order.data() + first[g], first[g + 1] - first[g], width, decay},
             from, to);
    }
  });
  if (!bank.is_contiguous())
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(bank.get(), target.get(), 0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) { m.impl("indexed_ema_", TORCH_BOX(&indexed_ema_)); }

}  // namespace solera
#endif  // SOLERA_FRONT
