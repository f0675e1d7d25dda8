// Task vectors d_k = w_k - base trimmed or dropped, merged by a vote on the sign.
//
//   kept_k = low_k <= |d_k| <= high_k, or a random word below keep_k
//   u_k = election_k d_k        v_k = value_k d_k        agree_k = kept_k and u_k of the elected
//   sign out = base + scale (sum_k agree_k v_k) / D,   D = sum_k agree_k divisor_k or 1
//
// The elected sign is that of the larger sum of |u_k| (or count) over the kept; a tie elects +.
// Without an election all that is kept agrees. Backward holds masks, thresholds and signs constant:
// with G the gradient of out and H = scale G / D
//   dv_k = agree_k H d_k        dw_k = agree_k H value_k        dbase = G - sum_k dw_k
//   ddivisor_k = -agree_k H (sum_j agree_j v_j) / D             (0 where |D| < 1e-8 was replaced by
//   1)
//
// Bytes an element of s bytes: forward reads K (+1 with a base) and writes 1. Sums of both signs
// are kept in registers while the K streams of a vector go by, so nothing is stacked or read twice.
// Random words: one Philox block gives four. Nothing is contracted to fused multiply-adds, so that
// the bits are those of the reference.
#include "delta_tiles.h"
#include "lane_masks.h"
#include "mask.h"

namespace solera {

// kOwnMass: the masses are the sums of what is merged, their divisors apart: election and value are
// one.
enum Vote : int { kLinear = 0, kMass = 1, kCount = 2, kOwnMass = 3 };
constexpr int kVotes = 4;
// One position of the lists.
struct ConsensusItem {
  const WeightStream* streams;  // K
  WeightStream base;
  int count;  // K
  // K each, in both accumulator types: [0] float, [1] double.
  const void *low[2], *high[2], *election[2], *value[2], *divisor[2];
  const int64_t* keep;  // K bounds of random words, or null: the thresholds decide
  uint32_t key;
  uint64_t seed;
  int64_t begin;  // where this part begins in the tensor its words are drawn for
  double scale;
  bool divide;
  bool bounded;  // there are highs
};
struct ConsensusGradient {
  WeightStream incoming;  // G
  void* const* tensors;   // K + 1, the base last; null where no gradient is needed
  const int* dtypes;      // K + 1
  double* dots;           // 2 K sums of this chunk, dv_k . d_k and ddivisor_k, or null
};

struct ConsensusTable {
  // [accumulator][vote]. scratch: bytes(K) of it, aligned to 64.
  int64_t (*bytes)(int count);
  void (*forward[2][kVotes])(const ConsensusItem&, void* out, int out_dtype, int64_t offset,
                             int64_t count, bool streaming, void* scratch);
  void (*backward[2][kVotes])(const ConsensusItem&, const ConsensusGradient&, int64_t offset,
                              int64_t count, bool streaming, void* scratch);
  void (*norms[2])(const ConsensusItem&, int64_t offset, int64_t count, double* sums,
                   void* scratch);
};

namespace SOLERA_ISA {
namespace {

constexpr int kTile = kDeltaTile;
static_assert(kTile == kMaskChunk, "the words of a chunk serve a tile");

// Streams and words of a tile.
template <class A>
struct ConsensusTile {
  const ConsensusItem& item;
  const A *low, *high, *election, *value, *divisor;
  A* converted;     // K + 1 tiles for what is stored in another dtype
  uint32_t* words;  // K tiles
  const A** w;
  const A* base = nullptr;
  A* rest;  // kRest further tiles

  static constexpr int kRest = 4;
  static int64_t bytes(int count) {
    return int64_t(count) * (kTile * int64_t(sizeof(A) + sizeof(uint32_t)) + 64) +
           kTile * int64_t(sizeof(A)) * (kRest + 1) + 64;
  }
  ConsensusTile(const ConsensusItem& of, void* scratch) : item(of) {
    constexpr int i = sizeof(A) / 8;
    low = (const A*)of.low[i];
    high = (const A*)of.high[i];
    election = (const A*)of.election[i];
    value = (const A*)of.value[i];
    divisor = (const A*)of.divisor[i];
    converted = (A*)scratch;
    rest = converted + int64_t(of.count + 1) * kTile;
    words = (uint32_t*)(rest + kRest * kTile);
    w = (const A**)(words + int64_t(of.count) * kTile);
  }
  void fetch(int64_t start, int n) {
    base = tile_of<A>(item.base, start, n, converted + int64_t(item.count) * kTile);
    for (int k = 0; k < item.count; ++k) {
      w[k] = tile_of<A>(item.streams[k], start, n, converted + int64_t(k) * kTile);
      if (item.keep)
        mask_chunk((item.begin + start) / kMaskChunk, item.key, uint32_t(k), item.seed,
                   words + int64_t(k) * kTile);
    }
  }
  SOLERA_INLINE V<A> delta(int k, int j, int here) const {
    V<A> d = get(w[k] + j, here);
    if (base) d -= get(base + j, here);
    return d;
  }
  // Lanes that are kept. Comparisons are such that a NaN is never dropped by a threshold.
  SOLERA_INLINE M<A> kept(int k, int j, V<A> d) const {
    if (item.keep) return drawn(k, j);
    const V<A> size = magnitude<A>(d);
    M<A> dropped = M<A>(below(size, splat(low[k])));
    if (item.bounded) dropped |= M<A>(below(splat(high[k]), size));
    return M<A>(~dropped);
  }
  SOLERA_INLINE M<A> drawn(int k, int j) const {
    if (item.keep[k] == 0) return M<A>{};
    const uint32_t last = uint32_t(item.keep[k] - 1);  // the largest word that keeps
    const uint32_t* word = words + int64_t(k) * kTile + j;
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      return _mm512_cmple_epu32_mask(_mm512_loadu_si512(word), _mm512_set1_epi32(int(last)));
    } else {
      const __m256i all = _mm256_loadu_si256((const __m256i*)word);
      return _mm256_cmple_epu32_mask(all, _mm256_set1_epi32(int(last)));
    }
#else
    if constexpr (sizeof(A) == 4) {
      vu all;
      memcpy(&all, word, sizeof all);
      return (M<A>)(all <= last);
    } else {
      M<A> out;
      for (int i = 0; i < kWide<A>; ++i) out[i] = -int64_t(word[i] <= last);
      return out;
    }
#endif
  }
};

// Sums of one vector's streams.
template <class A>
struct Ballot {
  V<A> plus{}, minus{}, plus_divisor{}, minus_divisor{}, plus_mass{}, minus_mass{};
};
template <class A>
struct Verdict {
  V<A> sum, divisor;  // of those that agree
  M<A> negative;      // the elected sign is -
  M<A> replaced;      // the divisor was next to nothing: 1 in its place
};

template <class A, int kVote>
SOLERA_INLINE Verdict<A> verdict_at(const ConsensusTile<A>& tile, int j, int here) {
  Ballot<A> b;
  const V<A> zero{};
  for (int k = 0; k < tile.item.count; ++k) {
    const V<A> d = tile.delta(k, j, here);
    const M<A> kept = tile.kept(k, j, d);
    const V<A> v = rounded(d * tile.value[k]);
    if constexpr (kVote == kLinear) {
      add_where(kept, b.plus, v);
    } else {
      const V<A> u = kVote == kOwnMass ? v : rounded(d * tile.election[k]);
      const V<A> g = splat(tile.divisor[k]), one = splat(A(1));
      const M<A> minus = M<A>(kept & M<A>(below(u, zero)));
      const M<A> plus = M<A>(kept & M<A>(~M<A>(up_to(u, zero))));
      add_where(plus, b.plus, v);
      add_where(minus, b.minus, v);
      add_where(plus, b.plus_divisor, g);
      add_where(minus, b.minus_divisor, g);
      if constexpr (kVote != kOwnMass) {
        add_where(plus, b.plus_mass, kVote == kMass ? u : one);
        add_where(minus, b.minus_mass, kVote == kMass ? -u : one);
      }
    }
  }
  if constexpr (kVote == kOwnMass) {
    b.plus_mass = b.plus;
    b.minus_mass = -b.minus;
  }
  Verdict<A> out;
  out.negative = M<A>(below(b.plus_mass, b.minus_mass));
  out.sum = where(out.negative, b.minus, b.plus);
  out.divisor = where(out.negative, b.minus_divisor, b.plus_divisor);
  out.replaced = M<A>(below(magnitude<A>(out.divisor), splat(A(1e-8))));
  if (!tile.item.divide) out.replaced = M<A>(~M<A>{});
  out.divisor = where(out.replaced, splat(A(1)), out.divisor);
  return out;
}

template <class A, int kVote>
void consensus_forward(const ConsensusItem& item, void* out, int out_dtype, int64_t offset,
                       int64_t count, bool streaming, void* scratch) {
  ConsensusTile<A> tile(item, scratch);
  A* total = tile.rest;
  const A scale = A(item.scale);
  for (int64_t start = offset; start < offset + count; start += kTile) {
    const int n = int(offset + count - start < kTile ? offset + count - start : kTile);
    tile.fetch(start, n);
    for (int j = 0; j < n; j += kWide<A>) {
      const int here = n - j < kWide<A> ? n - j : kWide<A>;
      const Verdict<A> found = verdict_at<A, kVote>(tile, j, here);
      V<A> merged = rounded(found.sum * scale);
      if (kVote != kLinear) merged = merged / found.divisor;
      if (tile.base) merged += get(tile.base + j, here);
      store(total + j, merged);
    }
    store_tile<A>(total, out, out_dtype, start, n, streaming);
  }
  if (streaming) stream_fence();
}

template <class A, int kVote>
void consensus_backward(const ConsensusItem& item, const ConsensusGradient& grad, int64_t offset,
                        int64_t count, bool streaming, void* scratch) {
  ConsensusTile<A> tile(item, scratch);
  alignas(64) A incoming_tile[kTile];
  A *share = tile.rest, *mean = share + kTile, *sign = mean + kTile, *rest = sign + kTile;
  alignas(64) A made[kTile];
  const A scale = A(item.scale);
  if (grad.dots)
    for (int i = 0; i < 2 * item.count; ++i) grad.dots[i] = 0;
  for (int64_t start = offset; start < offset + count; start += kTile) {
    const int n = int(offset + count - start < kTile ? offset + count - start : kTile);
    tile.fetch(start, n);
    const A* g = tile_of<A>(grad.incoming, start, n, incoming_tile);
    for (int j = 0; j < n; j += kWide<A>) {
      const int here = n - j < kWide<A> ? n - j : kWide<A>;
      const V<A> incoming = get(g + j, here);
      V<A> h = incoming * scale, m{};
      M<A> negative{};
      if constexpr (kVote != kLinear) {
        const Verdict<A> found = verdict_at<A, kVote>(tile, j, here);
        h = h / found.divisor;
        m = where(M<A>(~found.replaced), found.sum / found.divisor);
        negative = found.negative;
      }
      store(share + j, h);
      store(mean + j, m);
      store(sign + j, where(negative, splat(A(-1)), splat(A(1))));
      store(rest + j, incoming);
    }
    for (int k = 0; k < item.count; ++k) {
      V<A> values{}, divisors{};
      for (int j = 0; j < n; j += kWide<A>) {
        const int here = n - j < kWide<A> ? n - j : kWide<A>;
        const V<A> d = tile.delta(k, j, here);
        M<A> agree = tile.kept(k, j, d);
        if constexpr (kVote != kLinear) {
          const V<A> u = d * tile.election[k] * load(sign + j);
          const M<A> negative = M<A>(below(load(sign + j), V<A>{}));
          const M<A> plus = M<A>(below(V<A>{}, u)), any = M<A>(~M<A>(up_to(u, V<A>{})));
          agree &= M<A>((negative & plus) | (~negative & any));
        }
        const V<A> h = where(agree, load(share + j));
        values += where(agree, h * d);
        divisors -= h * load(mean + j);
        const V<A> dw = h * tile.value[k];
        store(made + j, dw);
        store(rest + j, load(rest + j) - dw);
      }
      if (grad.dots) {
        grad.dots[2 * k] += double(lane_sum(values));
        grad.dots[2 * k + 1] += double(lane_sum(divisors));
      }
      if (grad.tensors[k])
        store_tile<A>(made, grad.tensors[k], grad.dtypes[k], start, n, streaming);
    }
    if (grad.tensors[item.count])
      store_tile<A>(rest, grad.tensors[item.count], grad.dtypes[item.count], start, n, streaming);
  }
  if (streaming) stream_fence();
}

// The lanes of a vector added to lanes of doubles.
SOLERA_INLINE void add_wide(vd* sums, vd v) { sums[0] += v; }
SOLERA_INLINE void add_wide(vd* sums, vf v) {
  typedef float Half __attribute__((vector_size(SOLERA_VECTOR_BYTES / 2)));
  Half half[2];
  memcpy(half, &v, sizeof v);
  sums[0] += __builtin_convertvector(half[0], vd);
  sums[1] += __builtin_convertvector(half[1], vd);
}

// sums[2 k], sums[2 k + 1] = sum |d_k| over all and over what is kept, in double: their ratio
// rounds to the same factor however many lanes there are.
template <class A>
void consensus_norms(const ConsensusItem& item, int64_t offset, int64_t count, double* sums,
                     void* scratch) {
  ConsensusTile<A> tile(item, scratch);
  for (int i = 0; i < 2 * item.count; ++i) sums[i] = 0;
  for (int64_t start = offset; start < offset + count; start += kTile) {
    const int n = int(offset + count - start < kTile ? offset + count - start : kTile);
    tile.fetch(start, n);
    for (int k = 0; k < item.count; ++k) {
      vd all[2] = {}, kept[2] = {};
      for (int j = 0; j < n; j += kWide<A>) {
        const V<A> d = tile.delta(k, j, n - j < kWide<A> ? n - j : kWide<A>);
        add_wide(all, magnitude<A>(d));
        add_wide(kept, where(tile.kept(k, j, d), magnitude<A>(d)));
      }
      sums[2 * k] += lane_sum(all[0] + all[1]);
      sums[2 * k + 1] += lane_sum(kept[0] + kept[1]);
    }
  }
}

int64_t consensus_bytes(int count) { return ConsensusTile<double>::bytes(count); }

}  // namespace

extern const ConsensusTable consensus_table;
const ConsensusTable consensus_table = {
    consensus_bytes,
    {{consensus_forward<float, kLinear>, consensus_forward<float, kMass>,
      consensus_forward<float, kCount>, consensus_forward<float, kOwnMass>},
     {consensus_forward<double, kLinear>, consensus_forward<double, kMass>,
      consensus_forward<double, kCount>, consensus_forward<double, kOwnMass>}},
    {{consensus_backward<float, kLinear>, consensus_backward<float, kMass>,
      consensus_backward<float, kCount>, consensus_backward<float, kOwnMass>},
     {consensus_backward<double, kLinear>, consensus_backward<double, kMass>,
      consensus_backward<double, kCount>, consensus_backward<double, kOwnMass>}},
    {consensus_norms<float>, consensus_norms<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "consensus_lists.h"
#include "tensor_lists.h"

namespace solera {

SOLERA_PICK(ConsensusTable, consensus_table)

namespace {

// Outputs past this size do not fit the caches beside their inputs, and are stored past them.
constexpr int64_t kConsensusStreamBytes = int64_t(16) << 20;

void* consensus_scratch(int models) {
  thread_local std::vector<char> memory;
  const size_t bytes = size_t(pick_consensus_table().bytes(models)) + 64;
  if (memory.size() < bytes) memory.resize(bytes);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

std::vector<Tensor> consensus(const std::vector<Tensor>& tensors, const std::vector<Tensor>& base,
                              const Tensor& weights, const OptTensor& factors, const OptTensor& low,
                              const OptTensor& high, const OptTensor& seed,
                              const std::vector<int64_t>& keys, const std::vector<int64_t>& keep,
                              int64_t vote, bool before, int64_t divide, double scale,
                              const std::vector<int64_t>& begins) {
  const ConsensusLists lists(tensors, base, weights, factors, low, high, seed, keys, keep, vote,
                             before, divide, scale, begins);
  std::vector<Tensor> out;
  std::vector<void*> data;
  std::vector<int> dtypes;
  TensorChunks chunks{size_t(lists.length)};
  int64_t bytes = 0;
  for (int64_t l = 0; l < lists.length; ++l) {
    const int dtype = lists.promoted(l);
    out.push_back(empty_like(tensors[l], sizes_of(tensors[l]), scalar_type_of(dtype)));
    data.push_back(out.back().mutable_data_ptr());
    dtypes.push_back(dtype);
    chunks.add(lists.elements[l]);
    bytes += lists.elements[l] * int64_t(out.back().element_size());
  }
  const auto& table = pick_consensus_table();
  const bool streaming = bytes >= kConsensusStreamBytes;
  chunks.parallel(
      kListChunk * 4 * (lists.models + 1), [&](size_t l, int64_t offset, int64_t count, int64_t) {
        table.forward[int(dtypes[l] == kFloat64)][lists.vote](lists.item(l), data[l], dtypes[l],
                                                              offset, count, streaming,
                                                              consensus_scratch(int(lists.models)));
      });
  return out;
}

std::tuple<Tensor, std::vector<Tensor>> consensus_backward(
    const std::vector<Tensor>& grads, const std::vector<Tensor>& tensors,
    const std::vector<Tensor>& base, const Tensor& weights, const OptTensor& factors,
    const OptTensor& low, const OptTensor& high, const OptTensor& seed,
    const std::vector<int64_t>& keys, const std::vector<int64_t>& keep, int64_t vote, bool before,
    int64_t divide, double scale, bool need_weights, const std::vector<bool>& need_tensors) {
  const ConsensusLists lists(tensors, base, weights, factors, low, high, seed, keys, keep, vote,
                             before, divide, scale, {});
  const int64_t K = lists.models, L = lists.length;
  STD_TORCH_CHECK(int64_t(grads.size()) == L, "consensus_backward: expected ", L,
                  " gradients, got ", grads.size());
  STD_TORCH_CHECK(need_tensors.size() == tensors.size() + base.size(),
                  "consensus_backward: need_tensors has ", need_tensors.size(), " entries");
  lists.same_shapes(grads, tensors);
  Tensor dweights =
      empty_like(weights, need_weights ? std::vector<int64_t>{K, L} : std::vector<int64_t>{0},
                 ScalarType::Double);
  std::vector<Tensor> found, incoming;
  std::vector<void*> data(size_t((K + 1) * L), nullptr);
  std::vector<int> dtypes(data.size(), kFloat32);
  int64_t bytes = 0;
  for (size_t i = 0; i < need_tensors.size(); ++i) {
    if (!need_tensors[i]) continue;
    const int64_t k = int64_t(i) / L, l = int64_t(i) % L;
    const Tensor& like = k < K ? tensors[i] : base[l];
    found.push_back(empty_like(like, sizes_of(like)));
    data[l * (K + 1) + k] = found.back().mutable_data_ptr();
    dtypes[l * (K + 1) + k] = dtype_of(like);
    bytes += lists.elements[l] * int64_t(like.element_size());
  }
  TensorChunks chunks{size_t(L)};
  for (int64_t l = 0; l < L; ++l) {
    incoming.push_back(dense(grads[l]));
    chunks.add(lists.elements[l]);
  }
  std::vector<double> partial(need_weights ? size_t(chunks.total() * 2 * K) : 0);
  const auto& table = pick_consensus_table();
  const bool streaming = bytes >= kConsensusStreamBytes;
  chunks.parallel(
      kListChunk * 4 * (K + 1), [&](size_t l, int64_t offset, int64_t count, int64_t chunk) {
        const ConsensusGradient grad{{incoming[l].const_data_ptr(), dtype_of(incoming[l])},
                                     &data[l * (K + 1)],
                                     &dtypes[l * (K + 1)],
                                     need_weights ? &partial[chunk * 2 * K] : nullptr};
        table.backward[int(lists.wide(l))][lists.vote](lists.item(l), grad, offset, count,
                                                       streaming, consensus_scratch(int(K)));
      });
  if (need_weights) {
    std::vector<double> dots(size_t(2 * K * L));
    lists.sum_in_order(chunks, partial, dots.data());
    lists.weight_gradient(dots, static_cast<double*>(dweights.mutable_data_ptr()));
  }
  return {dweights, found};
}

// (2, K, L) float64: sum |w_k - base| over all elements and over those kept.
Tensor consensus_norms(const std::vector<Tensor>& tensors, const std::vector<Tensor>& base,
                       const Tensor& seed, const std::vector<int64_t>& keys,
                       const std::vector<int64_t>& keep, const std::vector<int64_t>& begins) {
  const int64_t K = int64_t(keep.size());
  STD_TORCH_CHECK(K > 0 && !tensors.empty(), "consensus_norms: no models");
  const Tensor ones = torch::stable::fill_(
      empty_like(tensors[0], std::vector<int64_t>{K, int64_t(tensors.size()) / K},
                 ScalarType::Double),
      1.0);
  const ConsensusLists lists(tensors, base, ones, std::nullopt, std::nullopt, std::nullopt, seed,
                             keys, keep, kLinear, true, 0, 1.0, begins);
  Tensor sums = empty_like(ones, std::vector<int64_t>{2, K, lists.length});
  TensorChunks chunks{size_t(lists.length)};
  for (int64_t l = 0; l < lists.length; ++l) chunks.add(lists.elements[l]);
  std::vector<double> partial(size_t(chunks.total() * 2 * K));
  const auto& table = pick_consensus_table();
  chunks.parallel(
      kListChunk * 4 * (K + 1), [&](size_t l, int64_t offset, int64_t count, int64_t chunk) {
        table.norms[int(lists.wide(l))](lists.item(l), offset, count, &partial[chunk * 2 * K],
                                        consensus_scratch(int(K)));
      });
  lists.sum_in_order(chunks, partial, static_cast<double*>(sums.mutable_data_ptr()));
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("consensus", TORCH_BOX(&consensus));
  m.impl("consensus_backward", TORCH_BOX(&consensus_backward));
  m.impl("consensus_norms", TORCH_BOX(&consensus_norms));
}

}  // namespace solera
#endif  // SOLERA_FRONT
