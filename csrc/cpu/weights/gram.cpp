// K x K dots of K weight lists around a base, whole tensors or row by row, and their backward.
//
//   G_kj = <w_k - b, w_j - b>                 d_k = w_k - b
//   dw_k = sum_j (dG_kj + dG_jk) d_j          db = -sum_k dw_k
//
// Bytes an element of s bytes: forward reads K (+1 with a base); backward reads the same and writes
// what is asked for. Flops an element: K (K + 1) forward, 2 K^2 backward. A tile of all streams
// (1024 elements) stays in the first cache while pairs of blocks of four streams pass over it,
// their 16 sums in registers. Sums: vector lanes over a tile, lanes of doubles over the tiles of a
// chunk, then double over the lanes and over the chunks, in order. What is not stored as
// accumulators is first widened into the tile.
#include "gram_kernels.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

constexpr int kBlock = 4;

// The deltas of one stream at j.
template <class A, bool kBase>
SOLERA_INLINE V<A> delta_at(const A* w, const A* base, int j) {
  V<A> x = load(w + j);
  if constexpr (kBase) x -= load(base + j);
  return x;
}

// Each lane into a double of its own.
SOLERA_INLINE void add_lanes(vd v, double* to) { store(to, load(to) + v); }
SOLERA_INLINE void add_lanes(vf v, double* to) {
  typedef float Half __attribute__((vector_size(SOLERA_VECTOR_BYTES / 2)));
  Half halves[2];
  memcpy(halves, &v, sizeof v);
  add_lanes(__builtin_convertvector(halves[0], vd), to);
  add_lanes(__builtin_convertvector(halves[1], vd), to + kWide<double>);
}

// Adds the dots of I streams with J others, or (J = 0) among themselves, lane by lane to `sums`:
// the vector of streams i >= j lies at i (i + 1) / 2 + j. n is a multiple of the vector's lanes.
// With kSum a block among themselves also adds its deltas to `total` (the first one begins it).
template <class A, int I, int J, bool kBase, bool kSum = false>
void add_block(const A* const* left, const A* const* right, const A* base, int n, int first,
               int second, double* sums, A* total = nullptr) {
  constexpr int kSums = J == 0 ? I * (I + 1) / 2 : I * J;
  int place[kSums];
  for (int i = 0; i < I; ++i)
    for (int k = 0; k < (J == 0 ? i + 1 : J); ++k)
      place[J == 0 ? i * (i + 1) / 2 + k : i * J + k] =
          J == 0 ? (first + i) * (first + i + 1) / 2 + first + k
                 : (second + k) * (second + k + 1) / 2 + first + i;
  V<A> sum[kSums];
#pragma GCC unroll 16
  for (int s = 0; s < kSums; ++s) sum[s] = V<A>{};
  for (int j = 0; j < n; j += kWide<A>) {
    V<A> x[I];
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) x[i] = delta_at<A, kBase>(left[i], base, j);
    if constexpr (J == 0) {
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) __builtin_prefetch(left[i] + j + kGramTile);
      if constexpr (kSum) {
        V<A> all = first == 0 ? x[0] : load((const A*)total + j) + x[0];
#pragma GCC unroll 4
        for (int i = 1; i < I; ++i) all += x[i];
        store(total + j, all);
      }
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
        for (int k = 0; k <= i; ++k) sum[i * (i + 1) / 2 + k] += x[i] * x[k];
    } else {
#pragma GCC unroll 4
      for (int k = 0; k < J; ++k) {
        const V<A> y = delta_at<A, kBase>(right[k], base, j);
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) sum[i * J + k] += x[i] * y;
      }
    }
  }
#pragma GCC unroll 16
  for (int s = 0; s < kSums; ++s) add_lanes(sum[s], sums + int64_t(place[s]) * kWide<A>);
}

template <class A, bool kBase, bool kSum = false>
void add_pairs(const A* const* w, const A* base, int count, int n, double* sums,
               A* total = nullptr) {
  for (int first = 0; first < count; first += kBlock) {
    const A* const* left = w + first;
    switch (count - first < kBlock ? count - first : kBlock) {
      case 1:
        add_block<A, 1, 0, kBase, kSum>(left, left, base, n, first, first, sums, total);
        break;
      case 2:
        add_block<A, 2, 0, kBase, kSum>(left, left, base, n, first, first, sums, total);
        break;
      case 3:
        add_block<A, 3, 0, kBase, kSum>(left, left, base, n, first, first, sums, total);
        break;
      default:
        add_block<A, 4, 0, kBase, kSum>(left, left, base, n, first, first, sums, total);
    }
    for (int second = first + kBlock; second < count; second += kBlock) {
      const A* const* right = w + second;
      switch (count - second < kBlock ? count - second : kBlock) {
        case 1:
          add_block<A, 4, 1, kBase>(left, right, base, n, first, second, sums);
          break;
        case 2:
          add_block<A, 4, 2, kBase>(left, right, base, n, first, second, sums);
          break;
        case 3:
          add_block<A, 4, 3, kBase>(left, right, base, n, first, second, sums);
          break;
        default:
          add_block<A, 4, 4, kBase>(left, right, base, n, first, second, sums);
      }
    }
  }
}

// Calls body(streams, base, start, n, m) for every tile: all K streams and the base as
// accumulators, n elements of them and zeros up to m, a multiple of the vector's lanes.
template <class A, class F>
SOLERA_INLINE void each_tile(const GramItem& item, int64_t offset, int64_t count, void* scratch,
                             const F& body) {
  A* tiles = (A*)scratch;
  const A** w = (const A**)((double*)scratch + int64_t(item.count + 1) * kGramTile);
  for (int64_t start = offset; start < offset + count; start += kGramTile) {
    const int64_t left = offset + count - start;
    const int n = int(left < kGramTile ? left : kGramTile);
    const int m = (n + kWide<A> - 1) / kWide<A> * kWide<A>;
    for (int k = 0; k <= item.count; ++k) {
      const WeightStream& stream = k < item.count ? item.streams[k] : item.base;
      A* tile = tiles + int64_t(k) * kGramTile;
      w[k] = as_accumulators(stream.data, stream.dtype, start, n, tile);
      if (n == m || w[k] == nullptr) continue;
      if (w[k] != tile) memcpy(tile, w[k], size_t(n) * sizeof(A));
      memset(tile + n, 0, size_t(m - n) * sizeof(A));
      w[k] = tile;
    }
    body(w, w[item.count], start, n, m);
  }
}

template <class A>
void gram_forward(const GramItem& item, int64_t offset, int64_t count, double* pairs, void* kept,
                  bool streaming, void* scratch) {
  constexpr int L = kWide<A>;
  alignas(64) A total[kGramTile];
  const int64_t all = int64_t(item.count) * (item.count + 1) / 2;
  double* sums = (double*)scratch + int64_t(item.count + 1) * (kGramTile + 1);
  memset(sums, 0, size_t(all * L) * sizeof(double));
  each_tile<A>(item, offset, count, scratch,
               [&](const A* const* w, const A* base, int64_t start, int n, int m) {
                 if (kept) {
                   add_pairs<A, true, true>(w, base, item.count, m, sums, total);
                   A* to = (A*)kept + (start - offset);
                   const bool past = streaming && can_stream(to);
                   tile_strips<L>(n, [&](int64_t j, int lanes) {
                     put_as<A>(to + j, load((const A*)total + j), lanes, past);
                   });
                 } else if (base) {
                   add_pairs<A, true>(w, base, item.count, m, sums);
                 } else {
                   add_pairs<A, false>(w, nullptr, item.count, m, sums);
                 }
               });
  for (int64_t i = 0; i < all; ++i) {
    pairs[i] = 0;
    for (int lane = 0; lane < L; ++lane) pairs[i] += sums[i * L + lane];
  }
  if (kept && streaming) stream_fence();
}

// The sum of the deltas in the order in which add_block takes it.
template <class A>
SOLERA_INLINE void sum_tile(const A* const* w, const A* base, int count, int m, A* total) {
  for (int j = 0; j < m; j += kWide<A>) {
    V<A> sum = delta_at<A, true>(w[0], base, j);
    for (int k = 1; k < count; ++k) sum += delta_at<A, true>(w[k], base, j);
    store(total + j, sum);
  }
}

template <class A>
void gram_move_base(const GramItem& item, double factor, const void* kept, const WeightOutput& out,
                    int64_t offset, int64_t count, bool streaming, void* scratch) {
  alignas(64) A tile[kGramTile];
  const auto move = [&](const A* base, const A* sums, int64_t start, int n) {
    store_tile<A>(out, start, n, streaming, [&](int64_t j, int lanes) {
      return get_as<A>(base + j, lanes) + splat(A(factor)) * get_as<A>(sums + j, lanes);
    });
  };
  if (kept == nullptr) {
    each_tile<A>(item, offset, count, scratch,
                 [&](const A* const* w, const A* base, int64_t start, int n, int m) {
                   sum_tile<A>(w, base, item.count, m, tile);
                   move(base, tile, start, n);
                 });
  } else {
    for (int64_t start = offset; start < offset + count; start += kGramTile) {
      const int64_t left = offset + count - start;
      const int n = int(left < kGramTile ? left : kGramTile);
      move(as_accumulators(item.base.data, item.base.dtype, start, n, tile),
           (const A*)kept + (start - offset), start, n);
    }
  }
  if (streaming) stream_fence();
}

template <class A, bool kBase>
SOLERA_INLINE void combine_tile(const A* const* w, const A* base, const double* factors, int count,
                                int m, A* total) {
  for (int j = 0; j < m; j += kWide<A>) {
    V<A> sum{};
    for (int k = 0; k < count; ++k) sum += delta_at<A, kBase>(w[k], base, j) * splat(A(factors[k]));
    store(total + j, sum);
  }
}

template <class A>
void gram_backward(const GramItem& item, const double* factors, const WeightOutput* outputs,
                   int64_t offset, int64_t count, bool streaming, void* scratch) {
  alignas(64) A total[kGramTile];
  each_tile<A>(item, offset, count, scratch,
               [&](const A* const* w, const A* base, int64_t start, int n, int m) {
                 for (int k = 0; k <= item.count; ++k) {
                   if (outputs[k].data == nullptr) continue;
                   const double* row = factors + int64_t(k) * item.count;
                   if (base)
                     combine_tile<A, true>(w, base, row, item.count, m, total);
                   else
                     combine_tile<A, false>(w, nullptr, row, item.count, m, total);
                   store_tile<A>(outputs[k], start, n, streaming, [&](int64_t j, int lanes) {
                     return get_as<A>((const A*)total + j, lanes);
                   });
                 }
               });
  if (streaming) stream_fence();
}

}  // namespace

const GramTable gram_table = {
    {gram_forward<float>, gram_forward<double>},
    {gram_backward<float>, gram_backward<double>},
    {gram_move_base<float>, gram_move_base<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "gram_lists.h"

namespace solera {

SOLERA_PICK(GramTable, gram_table)

namespace {

Tensor gram(const std::vector<Tensor>& tensors, const std::vector<Tensor>& base, int64_t models,
            bool by_row) {
  const GramLists lists(tensors, models, base, by_row);
  const int64_t K = models, total = K * (K + 1) / 2;
  Tensor out =
      empty_like(tensors[0], std::vector<int64_t>{lists.rows.total(), K, K}, ScalarType::Double);
  std::vector<char> wide;
  for (int64_t l = 0; l < lists.length; ++l) wide.push_back(lists.wide(l, kFloat32));
  const TensorChunks& chunks = lists.rows.chunks();
  std::vector<double> partial(size_t(chunks.total() * total));
  const auto& table = pick_gram_table();
  chunks.parallel(kListChunk * 4 * (K + 1), [&](size_t row, int64_t offset, int64_t count,
                                                int64_t chunk) {
    const auto at = lists.rows.find(int64_t(row));
    table.forward[int(wide[at.tensor])](lists.item(at.tensor), at.start + offset, count,
                                        &partial[chunk * total], nullptr, false, gram_scratch(K));
  });
  double* to = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t row = 0; row < lists.rows.total(); ++row)
    sum_chunks(partial.data(), chunks.first(row), chunks.first(row + 1), K, to + row * K * K);
  return out;
}

std::vector<Tensor> gram_backward(const Tensor& dgram, const std::vector<Tensor>& tensors,
                                  const std::vector<Tensor>& base, bool by_row,
                                  const std::vector<bool>& need_tensors) {
  const int64_t K = dgram.size(1);
  const GramLists lists(tensors, K, base, by_row);
  const int64_t L = lists.length, R = lists.rows.total();
  STD_TORCH_CHECK(int64_t(need_tensors.size()) == K * L + int64_t(base.size()),
                  "gram_backward: need_tensors has ", need_tensors.size(), " entries");
  STD_TORCH_CHECK(dgram.size(0) == R && dgram.scalar_type() == ScalarType::Double,
                  "gram_backward: expected ", R, " float64 matrices");
  const Tensor incoming = dense(dgram);
  const double* g = static_cast<const double*>(incoming.const_data_ptr());
  std::vector<double> factors(size_t(R * (K + 1) * K));
  for (int64_t row = 0; row < R; ++row, g += K * K) {
    double* f = &factors[row * (K + 1) * K];
    for (int64_t j = 0; j < K; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) {
        f[k * K + j] = g[k * K + j] + g[j * K + k];
        sum += f[k * K + j];
      }
      f[K * K + j] = -sum;
    }
  }
  std::vector<Tensor> gradients;
  std::vector<WeightOutput> outputs(size_t((K + 1) * L), WeightOutput{nullptr, 0});
  std::vector<char> wide;
  int64_t bytes = 0;
  for (int64_t l = 0; l < L; ++l) wide.push_back(lists.wide(l, kFloat32));
  for (size_t i = 0; i < need_tensors.size(); ++i) {
    if (!need_tensors[i]) continue;
    const int64_t k = int64_t(i) / L, l = int64_t(i) % L;
    const Tensor& like = k < K ? tensors[i] : base[l];
    gradients.push_back(empty_like(like, sizes_of(like)));
    bytes += like.numel() * int64_t(like.element_size());
    outputs[l * (K + 1) + k] = {gradients.back().mutable_data_ptr(), dtype_of(like)};
  }
  const auto& table = pick_gram_table();
  const bool streaming = bytes >= kStreamBytes;
  lists.rows.chunks().parallel(
      kListChunk * 8 * (K + 1), [&](size_t row, int64_t offset, int64_t count, int64_t) {
        const auto at = lists.rows.find(int64_t(row));
        table.backward[int(wide[at.tensor])](lists.item(at.tensor), &factors[row * (K + 1) * K],
                                             &outputs[at.tensor * (K + 1)], at.start + offset,
                                             count, streaming, gram_scratch(K));
      });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("gram_backward", TORCH_BOX(&gram_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
