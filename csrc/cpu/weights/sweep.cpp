// All interpolations of two weight lists, forward and backward, from one read of both.
//
//   out_a = (1 - alpha_a) base + alpha_a tuned,  a < A
//
// Backward, with G_a the gradient of out_a:
//   dalpha_a = <G_a, tuned - base>    dbase = sum_a (1 - alpha_a) G_a    dtuned = sum_a alpha_a G_a
//
// Elements of traffic: forward reads 2 and writes A; backward reads A (and 2 for dalpha) and writes
// what is asked for. A tile of both inputs (2048 elements) stays in L1 while its A results are
// stored one after another, past the caches where the outputs are large: A store streams at once
// would be more than the processor combines. The first product is rounded on its own: left to the
// compiler, two loops over the same formula were contracted in two ways. Dots are summed over a
// tile in vector lanes, over tiles and chunks in double, in order.
#include "../simd.h"

namespace solera {

struct SweepItem {
  const void *base, *tuned;
  const double *near, *far;  // 1 - alpha and alpha, A of each
  int64_t count;             // A
  int64_t elements;          // from one interpolation to the next
};
struct SweepGradient {
  const void* incoming;  // (A, elements)
  void *base, *tuned;    // or null
  double* dots;          // A sums of this chunk, or null
};

struct SweepTable {
  void (*forward[4])(const SweepItem&, void* out, int64_t offset, int64_t count, bool streaming);
  void (*backward[4])(const SweepItem&, const SweepGradient&, int64_t offset, int64_t count);
};

namespace SOLERA_ISA {
namespace {

constexpr int kSweepTile = 2048;

// n elements as accumulators: where they lie, or widened into `tile`.
SOLERA_INLINE const float* widened(const float* p, int, float*) { return p; }
SOLERA_INLINE const double* widened(const double* p, int, double*) { return p; }
template <class H>
SOLERA_INLINE const float* widened(const H* p, int n, float* tile) {
  constexpr int L = kLanes<H>;
  int j = 0;
  for (; j + L <= n; j += L) store(tile + j, load(p + j));
  if (j < n) store_n(tile + j, load_n(p + j, n - j), n - j);
  return tile;
}

// out[j] = value(j, lanes) for n elements. Streaming stores want whole vectors at aligned places:
// what comes before the first of them, and what is left, is stored in the usual way.
template <class T, class F>
SOLERA_INLINE void store_run(T* out, int n, bool streaming, const F& value) {
  constexpr int L = kLanes<T>;
  int j = 0;
  if (streaming) {
    const int misaligned = int(uintptr_t(out) % (L * sizeof(T)) / sizeof(T));
    if (misaligned != 0) {
      j = L - misaligned < n ? L - misaligned : n;
      store_n(out, value(0, j), j);
    }
    for (; j + L <= n; j += L) stream(out + j, value(j, L));
  } else {
    for (; j + L <= n; j += L) store(out + j, value(j, L));
  }
  if (j < n) store_n(out + j, value(j, n - j), n - j);
}

template <class A>
SOLERA_INLINE typename Vec<A>::type get(const A* p, int n) {
  return n == Vec<A>::lanes ? load(p) : load_n(p, n);
}

template <class T>
void sweep_forward(const SweepItem& item, void* out_data, int64_t offset, int64_t count,
                   bool streaming) {
  typedef typename Acc<T>::type A;
  alignas(64) A base_tile[kSweepTile], tuned_tile[kSweepTile];
  for (int64_t start = offset; start < offset + count; start += kSweepTile) {
    const int n = int(offset + count - start < kSweepTile ? offset + count - start : kSweepTile);
    const A* base = widened((const T*)item.base + start, n, base_tile);
    const A* tuned = widened((const T*)item.tuned + start, n, tuned_tile);
    for (int64_t a = 0; a < item.count; ++a) {
      const A near = A(item.near[a]), far = A(item.far[a]);
      store_run((T*)out_data + a * item.elements + start, n, streaming, [&](int j, int m) {
        return rounded(get(base + j, m) * near) + get(tuned + j, m) * far;
      });
    }
  }
  if (streaming) stream_fence();
}

template <class T>
void sweep_backward(const SweepItem& item, const SweepGradient& grad, int64_t offset,
                    int64_t count) {
  typedef typename Acc<T>::type A;
  constexpr int L = kLanes<T>;
  alignas(64) A base_tile[kSweepTile], tuned_tile[kSweepTile], g_tile[kSweepTile];
  alignas(64) A dbase[kSweepTile], dtuned[kSweepTile];
  if (grad.dots)
    for (int64_t a = 0; a < item.count; ++a) grad.dots[a] = 0;
  for (int64_t start = offset; start < offset + count; start += kSweepTile) {
    const int n = int(offset + count - start < kSweepTile ? offset + count - start : kSweepTile);
    const A *base = nullptr, *tuned = nullptr;
    if (grad.dots) {
      base = widened((const T*)item.base + start, n, base_tile);
      tuned = widened((const T*)item.tuned + start, n, tuned_tile);
    }
    if (grad.base) memset(dbase, 0, size_t(n) * sizeof(A));
    if (grad.tuned) memset(dtuned, 0, size_t(n) * sizeof(A));
    for (int64_t a = 0; a < item.count; ++a) {
      const A* g = widened((const T*)grad.incoming + a * item.elements + start, n, g_tile);
      if (grad.dots) {
        AccVec<T> sum{};
        int j = 0;
        for (; j + L <= n; j += L) sum += load(g + j) * (load(tuned + j) - load(base + j));
        if (j < n)
          sum += load_n(g + j, n - j) * (load_n(tuned + j, n - j) - load_n(base + j, n - j));
        grad.dots[a] += double(lane_sum(sum));
      }
      const auto add = [&](A* total, A factor) {
        store_run(total, n, false, [&](int j, int m) {
          return get((const A*)total + j, m) + get(g + j, m) * factor;
        });
      };
      if (grad.base) add(dbase, A(item.near[a]));
      if (grad.tuned) add(dtuned, A(item.far[a]));
    }
    const auto put = [&](void* to, const A* from) {
      if (to == nullptr) return;
      store_run((T*)to + start, n, false, [&](int j, int m) { return get(from + j, m); });
    };
    put(grad.base, dbase);
    put(grad.tuned, dtuned);
  }
}

}  // namespace

extern const SweepTable sweep_table;
const SweepTable sweep_table = {
    {sweep_forward<float>, sweep_forward<double>, sweep_forward<bf16>, sweep_forward<f16>},
    {sweep_backward<float>, sweep_backward<double>, sweep_backward<bf16>, sweep_backward<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "tensor_lists.h"

namespace solera {

SOLERA_PICK(SweepTable, sweep_table)

namespace {

constexpr int64_t kSweepStreamBytes = int64_t(16) << 20;

// alpha (A,) or (A, L) and 1 - alpha in double, by item.
struct SweepFactors {
  int64_t count, length;
  bool shared;
  std::vector<double> near, far;

  SweepFactors(const Tensor& alpha, int64_t length)
      : count(alpha.size(0)), length(length), shared(alpha.dim() == 1) {
    STD_TORCH_CHECK(shared || alpha.size(1) == length, "lerp_sweep: expected ", length,
                    " columns of alpha, got ", alpha.size(1));
    const Tensor dense_alpha = dense(alpha);
    const void* data = dense_alpha.const_data_ptr();
    const bool wide = dtype_of(alpha) == kFloat64;
    const int64_t columns = shared ? 1 : length;
    near.resize(size_t(count * columns));
    far.resize(near.size());
    for (int64_t a = 0; a < count; ++a)
      for (int64_t l = 0; l < columns; ++l) {
        const int64_t from = a * columns + l;
        const double value = wide ? static_cast<const double*>(data)[from]
                                  : double(static_cast<const float*>(data)[from]);
        far[l * count + a] = value;
        near[l * count + a] = 1 - value;
      }
  }
  SweepItem item(int64_t l, const void* base, const void* tuned, int64_t elements) const {
    const int64_t at = shared ? 0 : l * count;
    return {base, tuned, near.data() + at, far.data() + at, count, elements};
  }
};

void check_alike(const Tensor& a, const Tensor& b, size_t skip, const char* what) {
  const auto x = a.sizes(), y = b.sizes();
  bool same = x.size() == y.size() + skip && a.scalar_type() == b.scalar_type();
  for (size_t i = 0; same && i < y.size(); ++i) same = x[i + skip] == y[i];
  STD_TORCH_CHECK(same, "lerp_sweep: ", what, " differs in shape or dtype from what it goes with");
}

std::vector<Tensor> lerp_sweep(const std::vector<Tensor>& base, const std::vector<Tensor>& tuned,
                               const Tensor& alpha) {
  STD_TORCH_CHECK(base.size() == tuned.size(), "lerp_sweep: expected ", base.size(),
                  " tuned tensors, got ", tuned.size());
  const SweepFactors factors(alpha, int64_t(base.size()));
  TensorChunks chunks(base.size());
  std::vector<Tensor> owners, out;
  std::vector<SweepItem> items;
  std::vector<decltype(&pick_sweep_table().forward[0])> kernels;
  int64_t bytes = 0;
  for (size_t l = 0; l < base.size(); ++l) {
    check_alike(tuned[l], base[l], 0, "a tuned tensor");
    owners.push_back(dense(base[l]));
    owners.push_back(dense(tuned[l]));
    const int64_t n = base[l].numel();
    items.push_back(factors.item(int64_t(l), owners[2 * l].const_data_ptr(),
                                 owners[2 * l + 1].const_data_ptr(), n));
    std::vector<int64_t> sizes = sizes_of(base[l]);
    sizes.insert(sizes.begin(), factors.count);
    out.push_back(empty_like(base[l], sizes));
    kernels.push_back(&pick_sweep_table().forward[dtype_of(base[l])]);
    chunks.add(factors.count == 0 ? 0 : n);
    bytes += factors.count * n * int64_t(base[l].element_size());
  }
  const bool streaming = bytes >= kSweepStreamBytes;
  chunks.parallel(kListChunk * 4 * (factors.count + 2),
                  [&](size_t l, int64_t offset, int64_t count, int64_t) {
                    (*kernels[l])(items[l], out[l].mutable_data_ptr(), offset, count, streaming);
                  });
  return out;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lerp_sweep_backward(
    const std::vector<Tensor>& grads, const std::vector<Tensor>& base,
    const std::vector<Tensor>& tuned, const Tensor& alpha, bool need_alpha, bool need_base,
    bool need_tuned) {
  const int64_t length = int64_t(grads.size());
  STD_TORCH_CHECK(!need_alpha || (base.size() == grads.size() && tuned.size() == grads.size()),
                  "lerp_sweep_backward: the gradient of alpha reads base and tuned");
  const SweepFactors factors(alpha, length);
  Tensor dots = empty_like(
      alpha, need_alpha ? std::vector<int64_t>{factors.count, length} : std::vector<int64_t>{0},
      ScalarType::Double);
  TensorChunks chunks(grads.size());
  std::vector<Tensor> owners, dbase, dtuned;
  std::vector<SweepItem> items;
  std::vector<SweepGradient> gradients;
  const auto hold = [&](const Tensor& t) {
    owners.push_back(dense(t));
    return owners.back().const_data_ptr();
  };
  for (int64_t l = 0; l < length; ++l) {
    std::vector<int64_t> sizes = sizes_of(grads[l]);
    STD_TORCH_CHECK(!sizes.empty() && sizes[0] == factors.count,
                    "lerp_sweep_backward: expected a gradient for each of ", factors.count,
                    " interpolations");
    sizes.erase(sizes.begin());
    SweepGradient gradient{hold(grads[l]), nullptr, nullptr, nullptr};
    int64_t n = 1;
    for (const int64_t size : sizes) n *= size;
    const auto fresh = [&](std::vector<Tensor>& list) {
      list.push_back(empty_like(grads[l], sizes));
      return list.back().mutable_data_ptr();
    };
    if (need_base) gradient.base = fresh(dbase);
    if (need_tuned) gradient.tuned = fresh(dtuned);
    const void *from = nullptr, *to = nullptr;
    if (need_alpha) {
      check_alike(grads[l], base[l], 1, "a gradient");
      check_alike(tuned[l], base[l], 0, "a tuned tensor");
      from = hold(base[l]);
      to = hold(tuned[l]);
    }
    gradients.push_back(gradient);
    items.push_back(factors.item(l, from, to, n));
    chunks.add(n);
  }
  std::vector<double> partial(need_alpha ? size_t(chunks.total() * factors.count) : 0);
  const auto& table = pick_sweep_table();
  chunks.parallel(kListChunk * 4 * (factors.count + 2),
                  [&](size_t l, int64_t offset, int64_t count, int64_t chunk) {
                    SweepGradient gradient = gradients[l];
                    if (need_alpha) gradient.dots = partial.data() + chunk * factors.count;
                    table.backward[dtype_of(grads[l])](items[l], gradient, offset, count);
                  });
  if (need_alpha) {
    double* total = static_cast<double*>(dots.mutable_data_ptr());
    for (int64_t a = 0; a < factors.count; ++a)
      for (int64_t l = 0; l < length; ++l) {
        double sum = 0;
        for (int64_t i = chunks.first(size_t(l)); i < chunks.first(size_t(l) + 1); ++i)
          sum += partial[i * factors.count + a];
        total[a * length + l] = sum;
      }
  }
  return {dots, dbase, dtuned};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("lerp_sweep", TORCH_BOX(&lerp_sweep));
  m.impl("lerp_sweep_backward", TORCH_BOX(&lerp_sweep_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
