// What stands behind the two products of a self-tuning network's layer, forward and backward; a, u,
// y and dy are (N, O, P), s (N, 2 O) or, without b, (N, O):
//
//   y = a + s_w u + s_b b     du = s_w dy    ds_w = sum_p dy u    ds_b = b sum_p dy
//   db = sum_np s_b dy
//
// Forward reads a, u, s and writes y: 3 N O P + 2 N O elements. Backward reads dy, u, s and writes
// du, ds: 3 N O P + 4 N O. db is summed over chunks of rows fixed by N.
#include "../simd.h"
#include "../strips.h"

namespace solera {

struct HyperShape {
  int64_t outputs, places;
  bool biased;
};
struct HyperTable {
  void (*forward)(const void* a, const void* u, const void* s, const void* b, void* y,
                  const HyperShape&, int64_t begin, int64_t end);
  void (*backward)(const void* dy, const void* u, const void* s, const void* b, void* du, void* ds,
                   void* db, const HyperShape&, int64_t begin, int64_t end);
  void (*sum)(const void* parts, void* out, int64_t chunks, int64_t columns);
};
struct HyperTables {
  HyperTable of[4];
};

namespace SOLERA_ISA {
namespace {

template <class T>
struct Hyper {
  typedef A<T> Real;
  typedef AccVec<T> V;
  static Real scalar(const T* p) { return get(p, 1)[0]; }

  static void forward(const void* a, const void* u, const void* s, const void* b, void* y,
                      const HyperShape& n, int64_t begin, int64_t end) {
    const int64_t O = n.outputs, P = n.places;
    const Real* bias = (const Real*)b;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * O * P;
      const T *pa = (const T*)a + at, *pu = (const T*)u + at;
      const T* ps = (const T*)s + row * (n.biased ? 2 * O : O);
      T* py = (T*)y + at;
      if (P == 1) {
        strips<kLanes<T>>(O, [&](int64_t o, int c) {
          V v = get(pa + o, c) + get(ps + o, c) * get(pu + o, c);
          if (bias) v += get(ps + O + o, c) * get(bias + o, c);
          put(py + o, v, c);
        });
        continue;
      }
      for (int64_t o = 0; o < O; ++o) {
        const Real w = scalar(ps + o), shift = bias ? scalar(ps + O + o) * bias[o] : Real(0);
        strips<kLanes<T>>(P, [&](int64_t p, int c) {
          put(py + o * P + p, get(pa + o * P + p, c) + (w * get(pu + o * P + p, c) + shift), c);
        });
      }
    }
  }

  // db is this chunk's own sum.
  static void backward(const void* dy, const void* u, const void* s, const void* b, void* du,
                       void* ds, void* db, const HyperShape& n, int64_t begin, int64_t end) {
    const int64_t O = n.outputs, P = n.places, step = n.biased ? 2 * O : O;
    const Real* bias = (const Real*)b;
    Real* sum = (Real*)db;
    if (sum) memset((void*)sum, 0, size_t(O) * sizeof(Real));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * O * P;
      const T *pg = (const T*)dy + at, *pu = (const T*)u + at, *ps = (const T*)s + row * step;
      T *pdu = (T*)du + at, *pds = (T*)ds + row * step;
      if (P == 1) {
        strips<kLanes<T>>(O, [&](int64_t o, int c) {
          const V g = get(pg + o, c);
          put(pdu + o, g * get(ps + o, c), c);
          put(pds + o, g * get(pu + o, c), c);
          if (!bias) return;
          put(pds + O + o, g * get(bias + o, c), c);
          put(sum + o, get(sum + o, c) + g * get(ps + O + o, c), c);
        });
        continue;
      }
      for (int64_t o = 0; o < O; ++o) {
        const Real w = scalar(ps + o);
        const Real dw = row_sum<T>(P, [&](int64_t p, int c) {
          const V g = get(pg + o * P + p, c);
          put(pdu + o * P + p, g * w, c);
          return g * get(pu + o * P + p, c);
        });
        put(pds + o, V{} + dw, 1);
        if (!bias) continue;
        const Real total = row_sum<T>(P, [&](int64_t p, int c) { return get(pg + o * P + p, c); });
        put(pds + O + o, V{} + total * bias[o], 1);
        sum[o] += scalar(ps + O + o) * total;
      }
    }
  }
  static void sum(const void* parts, void* out, int64_t chunks, int64_t columns) {
    sum_chunks<Real>(parts, out, chunks, columns, 0, columns);
  }
  static constexpr HyperTable table() { return {forward, backward, sum}; }
};

}  // namespace

extern const HyperTables hyper_tables;
const HyperTables hyper_tables = {{
    Hyper<float>::table(),
    Hyper<double>::table(),
    Hyper<bf16>::table(),
    Hyper<f16>::table(),
}};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(HyperTables, hyper_tables)

namespace {

constexpr int64_t kHyperChunks = 64;

Tensor hyper_gate(const Tensor& a_in, const Tensor& u_in, const Tensor& s_in, OptTensor bias_in) {
  const Tensor a = dense(a_in), u = dense(u_in), s = dense(s_in);
  Tensor y = empty_like(a, a.sizes());
  const HyperShape n{a.size(1), a.size(2), bias_in.has_value()};
  Tensor bias;
  if (n.biased) bias = dense(torch::stable::to(*bias_in, accumulate_type(a)));
  const void* b = n.biased ? bias.const_data_ptr() : nullptr;
  const HyperTable& run = pick_hyper_tables().of[dtype_of(a)];
  parallel_for(0, a.size(0), grain_for(3 * n.outputs * n.places * a.element_size()),
               [&](int64_t begin, int64_t end) {
                 run.forward(a.const_data_ptr(), u.const_data_ptr(), s.const_data_ptr(), b,
                             y.mutable_data_ptr(), n, begin, end);
               });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> hyper_gate_backward(const Tensor& dy_in, const Tensor& u_in,
                                                       const Tensor& s_in, OptTensor bias_in) {
  const Tensor dy = dense(dy_in), u = dense(u_in), s = dense(s_in);
  const HyperShape n{dy.size(1), dy.size(2), bias_in.has_value()};
  const int64_t rows = dy.size(0);
  const ScalarType real = accumulate_type(dy);
  Tensor du = empty_like(dy, dy.sizes()), ds = empty_like(s, s.sizes());
  Tensor db = empty_like(dy, {n.biased ? n.outputs : 0}, real);
  Tensor bias;
  if (n.biased) bias = dense(torch::stable::to(*bias_in, real));
  const void* b = n.biased ? bias.const_data_ptr() : nullptr;
  const int64_t chunks = rows < kHyperChunks ? rows : kHyperChunks;
  Tensor parts = empty_like(dy, {n.biased ? chunks * n.outputs : 0}, real);
  const int64_t real_size = parts.element_size();
  const HyperTable& run = pick_hyper_tables().of[dtype_of(dy)];
  const int64_t chunk_bytes =
      chunks > 0 ? 3 * n.outputs * n.places * dy.element_size() * rows / chunks : 0;
  parallel_for(0, chunks, grain_for(chunk_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      void* sum = n.biased
                      ? static_cast<char*>(parts.mutable_data_ptr()) + c * n.outputs * real_size
                      : nullptr;
      run.backward(dy.const_data_ptr(), u.const_data_ptr(), s.const_data_ptr(), b,
                   du.mutable_data_ptr(), ds.mutable_data_ptr(), sum, n, c * rows / chunks,
                   (c + 1) * rows / chunks);
    }
  });
  if (n.biased) run.sum(parts.const_data_ptr(), db.mutable_data_ptr(), chunks, n.outputs);
  return {du, ds, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("hyper_gate", TORCH_BOX(&hyper_gate));
  m.impl("hyper_gate_backward", TORCH_BOX(&hyper_gate_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
