// Contrastive losses with a temperature for every pair; the formulas are in
// python/solera/ensemble/pair_losses.py.
//
// Bytes a row of M candidates: of the two matrices the 1 + k chosen entries are read; their
// gradients, mostly zero, are written whole for the products that follow.
#include "../natural.h"
#include "../strips.h"

namespace solera {

struct PairRows {
  const void *s, *g;
  const int64_t *negative, *positive;
  void *losses, *ds, *dg;  // ds and dg may be null
  int64_t columns, k;
  double tau_min, tau_max, beta, width;
};

struct PairTable {
  void (*losses[4])(const PairRows&, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class T>
SOLERA_INLINE A<T> pair_at(const T* x, int64_t j) {
  return get(x + j, 1)[0];
}
template <class T>
SOLERA_INLINE void set_pair(T* x, int64_t j, A<T> value) {
  AccVec<T> v{};
  v[0] = value;
  put(x + j, v, 1);
}

template <class T>
void pair_losses(const PairRows& p, int64_t begin, int64_t end) {
  typedef A<T> Real;
  const Real low = Real(p.tau_min), spread = Real(p.tau_max - p.tau_min), beta = Real(p.beta);
  for (int64_t row = begin; row < end; ++row) {
    const T *s = (const T*)p.s + row * p.columns, *g = (const T*)p.g + row * p.columns;
    T *ds = p.ds ? (T*)p.ds + row * p.columns : nullptr,
      *dg = p.ds ? (T*)p.dg + row * p.columns : nullptr;
    if (ds) {
      memset((void*)ds, 0, size_t(p.columns) * sizeof(T));
      memset((void*)dg, 0, size_t(p.columns) * sizeof(T));
    }
    double total = 0;
    // The positive has share -1 and weight beta d / 2, a negative 1 / k and -beta.
    const auto pair = [&](int64_t j, Real share, Real sign, Real half) {
      const Real r = pair_at(g, j), a = pair_at(s, j);
      const Real e = natural_exp_one(r < 0 ? r : -r);  // sigmoid without overflow
      const Real with = 1 / (1 + e), less = e / (1 + e);
      const Real against = r < 0 ? with : less, in_favour = r < 0 ? less : with;
      const Real tau = low + spread * against, inverse = 1 / tau;
      total +=
          double(share * a * inverse) +
          double(sign * beta) * (double(half) * double(natural_log_one(tau)) + double(inverse));
      if (!ds) return;
      const Real dtau =
          -share * a * inverse * inverse + sign * beta * (half * inverse - inverse * inverse);
      set_pair(ds, j, share * inverse);
      set_pair(dg, j, -dtau * spread * against * in_favour);
    };
    pair(p.positive[row], Real(-1), Real(1), Real(0.5 * p.width));
    for (int64_t n = 0; n < p.k; ++n)
      pair(p.negative[row * p.k + n], Real(1) / Real(p.k), Real(-1), Real(1));
    ((Real*)p.losses)[row] = Real(total);
  }
}

}  // namespace

extern const PairTable pair_table;
const PairTable pair_table = {
    {pair_losses<float>, pair_losses<double>, pair_losses<bf16>, pair_losses<f16>}};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(PairTable, pair_table)

namespace {

std::tuple<Tensor, Tensor, Tensor> pair_losses(const Tensor& s_in, const Tensor& g_in,
                                               const Tensor& negative_in, const Tensor& positive_in,
                                               double tau_min, double tau_max, double beta,
                                               double width, bool need_grad) {
  const Tensor s = dense(s_in), g = dense(g_in);
  const Tensor negative = dense(negative_in), positive = dense(positive_in);
  STD_TORCH_CHECK(s.dim() == 2 && g.dim() == 2 && g.size(0) == s.size(0) &&
                      g.size(1) == s.size(1) && g.scalar_type() == s.scalar_type(),
                  "solera: s and g must be (R, M) of one dtype");
  const int64_t rows = s.size(0), columns = s.size(1);
  STD_TORCH_CHECK(negative.dim() == 2 && negative.size(0) == rows && positive.numel() == rows &&
                      negative.size(1) > 0 && negative.scalar_type() == ScalarType::Long &&
                      positive.scalar_type() == ScalarType::Long,
                  "solera: negative must be (R, k) and positive (R,), int64");
  const int64_t k = negative.size(1);
  const int64_t* far = static_cast<const int64_t*>(negative.const_data_ptr());
  const int64_t* near = static_cast<const int64_t*>(positive.const_data_ptr());
  bool inside = true;
  for (int64_t j = 0; j < rows * k; ++j) inside = inside && far[j] >= 0 && far[j] < columns;
  for (int64_t j = 0; j < rows; ++j) inside = inside && near[j] >= 0 && near[j] < columns;
  STD_TORCH_CHECK(inside, "solera: negative and positive must be columns of s");
  const int64_t none[] = {0};
  Tensor losses = empty_like(s, {rows}, accumulate_type(s));
  Tensor ds = empty_like(s, need_grad ? s.sizes() : Sizes(none, 1));
  Tensor dg = empty_like(s, need_grad ? s.sizes() : Sizes(none, 1));
  const PairRows p{s.const_data_ptr(),
                   g.const_data_ptr(),
                   far,
                   near,
                   losses.mutable_data_ptr(),
                   need_grad ? ds.mutable_data_ptr() : nullptr,
                   need_grad ? dg.mutable_data_ptr() : nullptr,
                   columns,
                   k,
                   tau_min,
                   tau_max,
                   beta,
                   width};
  const auto kernel = pick_pair_table().losses[dtype_of(s)];
  parallel_for(0, rows, grain_for(16 * k + 2 * columns * s.element_size()),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {losses, ds, dg};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) { m.impl("pair_losses", TORCH_BOX(&pair_losses)); }

}  // namespace solera
#endif  // SOLERA_FRONT
