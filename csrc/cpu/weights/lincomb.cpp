// Linear combination of K weight lists, forward and backward.
//
//   out = sum_k c_k w_k        or, around a base,        out = base + sum_k c_k (w_k - base)
//
// Backward, with G the gradient of out:
//   dc_k = <G, w_k - base>        dw_k = c_k G        dbase = (1 - sum_k c_k) G
//
// Bytes an element of s bytes: forward reads K (+1 with a base) and writes 1; backward reads G, the
// base and, for dc, the K tensors, and writes what is asked for. Flops: 2K (3K with a base), far
// below the memory's rate. Up to eight streams are combined in registers; the result of a tile
// (2048 elements, in L1) is then stored in one go, past the caches when the output is large. More
// than eight streams pass over the tile in groups of eight, so memory is read once for any K. Dots
// are summed over a tile in vector lanes, over the tiles of a chunk in double, and over the chunks
// in order in double.
#include "lincomb_kernels.h"
#include "tiles.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

constexpr int kTile = 2048;
constexpr int kGroup = 8;

// Calls body(streams, g, base, j) for every whole vector of n elements, then once more for the
// rest, copied into zero-padded vectors; j is the place in the tile. One copy of the body serves
// both.
template <class A, class T, int K, class F>
SOLERA_INLINE void each_vector(const T* const* w, const A* g, const A* base, int n, const F& body) {
  constexpr int L = kWide<A>;
  T padded[K][L];
  A padded_g[L], padded_base[L];
  const T* p[K];
  for (int k = 0; k < K; ++k) p[k] = w[k];
  int j = 0;
  for (int end = n - n % L;;) {
    for (; j < end; j += L) body(p, g, base, j);
    if (j >= n) return;
    const int rest = n - j;
    for (int k = 0; k < K; ++k) {
      memset((void*)padded[k], 0, sizeof padded[k]);
      memcpy((void*)padded[k], p[k] + j, size_t(rest) * sizeof(T));
      p[k] = padded[k] - j;
    }
    const auto pad = [&](const A*& from, A* to) {
      if (from == nullptr) return;
      memset(to, 0, sizeof padded_g);
      memcpy(to, from + j, size_t(rest) * sizeof(A));
      from = to - j;
    };
    pad(g, padded_g);
    pad(base, padded_base);
    end = n;
  }
}

// Adds K streams to a tile: total = (first ? base or 0 : total) + sum_k c_k (w_k - base).
template <class A, class T, int K, bool kBase, bool kFirst>
void add_streams(const T* const* w, const A* c, const A* base, A* total, int n) {
  V<A> scale[K];
  for (int k = 0; k < K; ++k) scale[k] = splat(c[k]);
  each_vector<A, T, K>(w, nullptr, base, n, [&](const T* const* p, const A*, const A* b_at, int j) {
    V<A> b{}, sum{};
    if constexpr (kBase) b = load(b_at + j);
    if constexpr (!kFirst) sum = load((const A*)total + j);
    if constexpr (kFirst && kBase) sum = b;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      V<A> x = get_as<A>(p[k] + j, kWide<A>);
      if constexpr (kBase) x -= b;
      sum = kFirst && !kBase && k == 0 ? scale[0] * x : sum + scale[k] * x;
    }
    store(total + j, sum);
  });
}

// dots[k] += <g, w_k - base> over a tile.
template <class A, class T, int K, bool kBase>
void dot_streams(const T* const* w, const A* g, const A* base, double* dots, int n) {
  V<A> sum[K];
  for (int k = 0; k < K; ++k) sum[k] = V<A>{};
  each_vector<A, T, K>(w, g, base, n, [&](const T* const* p, const A* g_at, const A* b_at, int j) {
    V<A> b{}, grad = load(g_at + j);
    if constexpr (kBase) b = load(b_at + j);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      V<A> x = get_as<A>(p[k] + j, kWide<A>);
      if constexpr (kBase) x -= b;
      sum[k] += grad * x;
    }
  });
  for (int k = 0; k < K; ++k) dots[k] += double(lane_sum(sum[k]));
}

// How many of the streams from k on go together: neighbours of one dtype, 8, 4, 3, 2 or 1 of them.
// What has to be widened to double goes one at a time.
template <class A>
SOLERA_INLINE int group_at(const LincombItem& item, int k) {
  if (sizeof(A) == 8 && item.streams[k].dtype != kFloat64) return 1;
  int size = 1;
  while (size < kGroup && k + size < item.count &&
         item.streams[k + size].dtype == item.streams[k].dtype)
    ++size;
  return size == kGroup || size <= 4 ? size : 4;
}

template <class Stored, int Count>
struct Streams {
  typedef Stored type;
  static constexpr int count = Count;
};
// Calls body(pointers at `offset`, Streams<type, size>) for the streams [k, k + size). A float64
// stream always comes with the accumulator double.
template <class A, class F>
SOLERA_INLINE void with_group(const LincombItem& item, int k, int size, int64_t offset,
                              const F& body) {
  with_type(item.streams[k].dtype, [&](auto storage) {
    typedef typename decltype(storage)::type T;
    if constexpr (sizeof(typename Acc<T>::type) <= sizeof(A)) {
      const T* w[kGroup];
      for (int i = 0; i < size; ++i) w[i] = (const T*)item.streams[k + i].data + offset;
      if constexpr (sizeof(typename Acc<T>::type) == sizeof(A)) switch (size) {
          case 8:
            return body(w, Streams<T, 8>{});
          case 4:
            return body(w, Streams<T, 4>{});
          case 3:
            return body(w, Streams<T, 3>{});
          case 2:
            return body(w, Streams<T, 2>{});
        }
      body(w, Streams<T, 1>{});
    }
  });
}

SOLERA_INLINE const float* coefficients_of(const LincombItem& item, float) {
  return item.coefficients;
}
SOLERA_INLINE const double* coefficients_of(const LincombItem& item, double) {
  return item.coefficients_double;
}

template <class A, class T, class G>
SOLERA_INLINE void add_group(const T* const* w, G, const A* c, const A* base, A* total, int n,
                             bool first) {
  if (base && first)
    add_streams<A, T, G::count, true, true>(w, c, base, total, n);
  else if (base)
    add_streams<A, T, G::count, true, false>(w, c, base, total, n);
  else if (first)
    add_streams<A, T, G::count, false, true>(w, c, nullptr, total, n);
  else
    add_streams<A, T, G::count, false, false>(w, c, nullptr, total, n);
}

template <class A>
void lincomb_forward(const LincombItem& item, const WeightOutput& out, int64_t offset,
                     int64_t count, bool streaming) {
  alignas(64) A total[kTile];
  alignas(64) A base_tile[kTile];
  const A* c = coefficients_of(item, A{});
  for (int64_t start = offset; start < offset + count; start += kTile) {
    const int n = int(offset + count - start < kTile ? offset + count - start : kTile);
    const A* base = as_accumulators(item.base.data, item.base.dtype, start, n, base_tile);
    for (int k = 0; k < item.count;) {
      const int size = group_at<A>(item, k);
      with_group<A>(item, k, size, start, [&](const auto* const* w, auto group) {
        add_group<A>(w, group, c + k, base, total, n, k == 0);
      });
      k += size;
    }
    store_tile<A>(out, start, n, streaming,
                  [&](int64_t j, int m) { return get_as<A>((const A*)total + j, m); });
  }
  if (streaming) stream_fence();
}

template <class A>
void lincomb_backward(const LincombItem& item, const LincombGradient& grad, int64_t offset,
                      int64_t count, bool streaming) {
  alignas(64) A incoming_tile[kTile];
  alignas(64) A base_tile[kTile];
  const A* c = coefficients_of(item, A{});
  double rest = 1;
  for (int k = 0; k < item.count; ++k) {
    rest -= item.coefficients_double[k];
    if (grad.dots) grad.dots[k] = 0;
  }
  for (int64_t start = offset; start < offset + count; start += kTile) {
    const int n = int(offset + count - start < kTile ? offset + count - start : kTile);
    const A* g = as_accumulators(grad.incoming, grad.dtype, start, n, incoming_tile);
    if (grad.dots) {
      const A* base = as_accumulators(item.base.data, item.base.dtype, start, n, base_tile);
      for (int k = 0; k < item.count;) {
        const int size = group_at<A>(item, k);
        with_group<A>(item, k, size, start, [&](const auto* const* w, auto group) {
          typedef decltype(group) G;
          if (base)
            dot_streams<A, typename G::type, G::count, true>(w, g, base, grad.dots + k, n);
          else
            dot_streams<A, typename G::type, G::count, false>(w, g, nullptr, grad.dots + k, n);
        });
        k += size;
      }
    }
    for (int k = 0; k <= item.count; ++k) {
      if (grad.tensors[k].data == nullptr) continue;
      const A factor = k < item.count ? c[k] : A(rest);
      store_tile<A>(grad.tensors[k], start, n, streaming,
                    [&](int64_t j, int m) { return get_as<A>(g + j, m) * factor; });
    }
  }
  if (streaming) stream_fence();
}

}  // namespace

const LincombTable lincomb_table = {
    {lincomb_forward<float>, lincomb_forward<double>},
    {lincomb_backward<float>, lincomb_backward<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "lincomb_lists.h"
#include "tensor_lists.h"

namespace solera {

SOLERA_PICK(LincombTable, lincomb_table)

namespace {

struct LincombTarget {
  WeightOutput output;
  bool wide;
};

void run_lincomb(const LincombLists& lists, const std::vector<Tensor>& out) {
  TensorChunks chunks(out.size());
  std::vector<LincombTarget> targets;
  targets.reserve(out.size());
  int64_t bytes = 0;
  for (int64_t l = 0; l < lists.length; ++l) {
    const int dtype = dtype_of(out[l]);
    const int64_t elements = out[l].numel();
    targets.push_back({{out[l].mutable_data_ptr(), dtype}, lists.wide(l, dtype)});
    chunks.add(elements);
    bytes += elements * (dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2);
  }
  const auto& table = pick_lincomb_table();
  const bool streaming = bytes >= kStreamBytes;
  chunks.parallel(
      kListChunk * 4 * (lists.models + 1), [&](size_t l, int64_t offset, int64_t count, int64_t) {
        const LincombTarget& target = targets[l];
        table.forward[int(target.wide)](lists.item(l, l), target.output, offset, count, streaming);
      });
}

std::vector<Tensor> lincomb(const std::vector<Tensor>& tensors, const Tensor& coefficients,
                            const std::vector<Tensor>& base, std::optional<ScalarType> out_dtype) {
  const int64_t length = int64_t(tensors.size()) / coefficients.size(0);
  const std::vector<Tensor> first(tensors.begin(), tensors.begin() + length);
  const LincombLists lists("lincomb", tensors, coefficients, base, length, length);
  lists.same_shapes(tensors, first);
  lists.same_shapes(base, first);
  std::vector<Tensor> out;
  out.reserve(length);
  for (int64_t l = 0; l < length; ++l)
    out.push_back(
        empty_like(tensors[l], sizes_of(tensors[l]),
                   out_dtype.has_value() ? *out_dtype : scalar_type_of(lists.promoted(l))));
  run_lincomb(lists, out);
  return out;
}

void lincomb_out(const std::vector<Tensor>& tensors, const Tensor& coefficients,
                 const std::vector<Tensor>& base, const std::vector<Tensor>& out) {
  const LincombLists lists("lincomb", tensors, coefficients, base, int64_t(out.size()),
                           int64_t(out.size()));
  lists.same_shapes(tensors, out);
  lists.same_shapes(base, out);
  std::vector<Tensor> dense_out;
  dense_out.reserve(out.size());
  for (const Tensor& t : out)
    dense_out.push_back(t.is_contiguous() ? t : empty_like(t, sizes_of(t)));
  run_lincomb(lists, dense_out);
  for (size_t l = 0; l < out.size(); ++l)
    if (out[l].get() != dense_out[l].get())
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(out[l].get(), dense_out[l].get(), 0));
}

std::tuple<Tensor, std::vector<Tensor>> lincomb_backward(const std::vector<Tensor>& grads,
                                                         const std::vector<Tensor>& tensors,
                                                         const Tensor& coefficients,
                                                         const std::vector<Tensor>& base,
                                                         bool need_coefficients,
                                                         const std::vector<bool>& need_tensors) {
  const LincombLists lists("lincomb", tensors, coefficients, base, int64_t(grads.size()),
                           int64_t(grads.size()));
  if (need_coefficients) {
    lists.same_shapes(tensors, grads);
    lists.same_shapes(base, grads);
  }
  const int64_t K = lists.models, L = lists.length;
  STD_TORCH_CHECK(int64_t(need_tensors.size()) == K * L + (base.empty() ? 0 : L),
                  "lincomb_backward: need_tensors has ", need_tensors.size(), " entries");
  Tensor dots = empty_like(coefficients,
                           need_coefficients ? std::vector<int64_t>{K, L} : std::vector<int64_t>{0},
                           ScalarType::Double);
  std::vector<Tensor> gradients, incoming;
  std::vector<WeightOutput> outputs(size_t((K + 1) * L), WeightOutput{nullptr, 0});
  std::vector<int> grad_dtypes;
  std::vector<char> wide;
  TensorChunks chunks(grads.size());
  int64_t bytes = 0;
  for (int64_t l = 0; l < L; ++l) {
    incoming.push_back(dense(grads[l]));
    grad_dtypes.push_back(dtype_of(grads[l]));
    wide.push_back(lists.wide(l, grad_dtypes.back()));
    chunks.add(grads[l].numel());
  }
  for (size_t i = 0; i < need_tensors.size(); ++i) {
    if (!need_tensors[i]) continue;
    const int64_t k = int64_t(i) / L, l = int64_t(i) % L;
    const Tensor& like = k < K ? tensors[i] : base[l];
    gradients.push_back(empty_like(like, sizes_of(grads[l]), like.scalar_type()));
    bytes += grads[l].numel() * int64_t(like.element_size());
    outputs[l * (K + 1) + k] = {gradients.back().mutable_data_ptr(), dtype_of(like)};
  }
  std::vector<double> partial(need_coefficients ? size_t(chunks.total() * K) : 0);
  const auto& table = pick_lincomb_table();
  const bool streaming = bytes >= kStreamBytes;
  chunks.parallel(kListChunk * 4 * (K + 1), [&](size_t l, int64_t offset, int64_t count,
                                                int64_t chunk) {
    const LincombGradient grad{incoming[l].const_data_ptr(), grad_dtypes[l], &outputs[l * (K + 1)],
                               need_coefficients ? &partial[chunk * K] : nullptr};
    table.backward[int(wide[l])](lists.item(l, l), grad, offset, count, streaming);
  });
  if (need_coefficients) {
    double* total = static_cast<double*>(dots.mutable_data_ptr());
    for (int64_t k = 0; k < K; ++k)
      for (int64_t l = 0; l < L; ++l) {
        double sum = 0;
        for (int64_t i = chunks.first(l); i < chunks.first(l + 1); ++i) sum += partial[i * K + k];
        total[k * L + l] = sum;
      }
  }
  return {dots, gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("lincomb", TORCH_BOX(&lincomb));
  m.impl("lincomb_out", TORCH_BOX(&lincomb_out));
  m.impl("lincomb_backward", TORCH_BOX(&lincomb_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
