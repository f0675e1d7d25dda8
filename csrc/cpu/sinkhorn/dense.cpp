// Sinkhorn iterations on a dense cost matrix, in the log domain, and the plan they define.
//
// In base 2: K = log2(e) / epsilon, F = K f, G = K g, and E_ij = 2^(F_i + G_j - K C_ij); the plan is
// a_i b_j E_ij. One iteration of the textbook makes two passes with an exponential each:
//   F_i -= log2 sum_j b_j E_ij            G_j -= log2 sum_i a_i E_ij
// Here the row pass keeps w_ij = 2^(F_i + G_j - K C_ij) of the *old* F in a buffer of a few rows. Its sum
// s_i = sum_j b_j w_ij gives the new F_i, and w_ij / s_i is already E_ij for the new F, so the same pass
// adds (a_i / s_i) w_ij to the column sums: one exponential and one read of C for a whole iteration.
// sum_i a_i |s_i - 1| is the marginal error of the state before the pass, at no cost.
//
// The old potential is the shift, so there is no pass for a maximum. Where it is a bad one (s_i or a
// column sum c_j leaves a range in which nothing that matters can have underflowed) that row or column
// alone is done again as an exact log-sum-exp. Terms below 2^-126 count as 2^-126: at most 1e-28 of a
// row, and a column sum is believed only from 1e-20 of the total mass on.
//
// An iteration on n x m: reads n m elements of C, n m exponentials, 10 vector operations each or so; the
// buffers stay in L1/L2. Row blocks depend on the shape alone and their column sums are added in order:
// same bits for any number of threads, and for any batch.
#include "../simd.h"

namespace solera {

// One problem. Element pointers are float or double. `stride` is m rounded up to whole vectors; g, b and
// log_b are padded to it with values that give no weight.
struct SinkhornProblem {
  const void *cost, *a, *b, *log_a, *log_b;
  const void* f_old;
  void *f_new, *g;
  void* partial;           // [blocks][stride] column sums of a row block
  double *error, *mass;    // [blocks] sum_i a_i |s_i - 1| and sum_i a_i s_i of the state (f_old, g)
  int64_t* dead;           // [blocks + column chunks] set where no finite potential exists
  int64_t n, m, stride, block_rows, blocks;
  double kappa, total_a;
};
constexpr int64_t kSinkhornColumns = 256;  // columns finished at a time
constexpr int kSinkhornRows = 4;           // rows in flight, each with a buffer of `stride`

struct SinkhornPlan {
  const void *cost, *a, *b, *f, *g;  // a (n), b (m), f (n), g (m)
  const void *x, *y;                 // out = E * (x b^T + a y^T); y may be null
  void* out;
  const void* grad;                  // backward only: the gradient of the plan
  void *row_sum, *partial;           // sum_j grad b E (n); sum_i grad a E, [blocks][m]
  int64_t n, m, block_rows;
  double kappa, epsilon;
};

struct SinkhornTable {
  void (*row_pass)(const SinkhornProblem&, void* buffer, int64_t first, int64_t last, bool evaluate);
  void (*column_pass)(const SinkhornProblem&, int64_t first, int64_t last);
  void (*plan)(const SinkhornPlan&, int64_t first_row, int64_t last_row);
  void (*plan_backward)(const SinkhornPlan&, int64_t first_block, int64_t last_block);
  int64_t lanes;
};

namespace SOLERA_ISA {
namespace {

template <class T>
using V = AccVec<T>;

template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr float row_low = 1e-10f, row_high = 1e10f, column_low = 1e-20f, column_high = 1e20f;
  static constexpr float smallest = -126.0f, largest = 128.0f, biggest = 3.4028234e38f;
};
template <>
struct Range<double> {
  static constexpr double row_low = 1e-100, row_high = 1e100, column_low = 1e-150, column_high = 1e150;
  static constexpr double smallest = -1022.0, largest = 1024.0, biggest = 1.7976931348623157e308;
};

// max(low, x) that hands a NaN in x on.
template <class W, class S>
SOLERA_INLINE W at_least(S low, W x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return (W)_mm512_max_ps((__m512)splat(low), (__m512)x);
  else return (W)_mm512_max_pd((__m512d)splat(low), (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return (W)_mm256_max_ps((__m256)splat(low), (__m256)x);
  else return (W)_mm256_max_pd((__m256d)splat(low), (__m256d)x);
#else
  return splat(low) > x ? splat(low) : x;
#endif
}
template <class W, class S>
SOLERA_INLINE W at_most(S high, W x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return (W)_mm512_min_ps((__m512)splat(high), (__m512)x);
  else return (W)_mm512_min_pd((__m512d)splat(high), (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return (W)_mm256_min_ps((__m256)splat(high), (__m256)x);
  else return (W)_mm256_min_pd((__m256d)splat(high), (__m256d)x);
#else
  return splat(high) < x ? splat(high) : x;
#endif
}

// Minimax polynomials of 2^t on [0, 1] (AVX-512) and on [-1/2, 1/2] (elsewhere), relative error
// 7.5e-8 for float and 3e-18 for double before rounding.
SOLERA_INLINE vf power(vf t) {
#if defined(__AVX512F__)
  vf p = splat(0.001877576766f);
  p = p * t + 0.008989339877f;
  p = p * t + 0.05582631823f;
  p = p * t + 0.240153617f;
  p = p * t + 0.6931530732f;
  p = p * t + 0.9999999251f;
#else
  vf p = splat(0.001327647263f);
  p = p * t + 0.009675541343f;
  p = p * t + 0.05550713272f;
  p = p * t + 0.2402211972f;
  p = p * t + 0.6931469671f;
  p = p * t + 1.000000072f;
#endif
  return p;
}
SOLERA_INLINE vd power(vd t) {
#if defined(__AVX512F__)
  vd p = splat(6.27243695713783512e-10);
  p = p * t + 6.5544557738570504e-9;
  p = p * t + 1.02544577142324723e-7;
  p = p * t + 1.320819344985004e-6;
  p = p * t + 0.0000152531902527511925;
  p = p * t + 0.000154035114462742881;
  p = p * t + 0.00133335586615834706;
  p = p * t + 0.00961812909879244896;
  p = p * t + 0.0555041086657111632;
  p = p * t + 0.240226506959054712;
  p = p * t + 0.693147180559946235;
  p = p * t + 0.999999999999999997;
#else
  vd p = splat(4.43528270695727715e-10);
  p = p * t + 7.0741056135081428e-9;
  p = p * t + 1.01781980216719308e-7;
  p = p * t + 1.32154330896763992e-6;
  p = p * t + 0.0000152527334899885256;
  p = p * t + 0.000154035304625144321;
  p = p * t + 0.00133335581467899217;
  p = p * t + 0.00961812910758833524;
  p = p * t + 0.0555041086648199216;
  p = p * t + 0.240226506959101562;
  p = p * t + 0.69314718055994533;
  p = p * t + 0.999999999999999997;
#endif
  return p;
}

// 2^x, never below the smallest normal number; inf from `largest` on; NaN stays NaN.
SOLERA_INLINE vf fast_exp2(vf x) {
  x = at_least(Range<float>::smallest, x);
#if defined(__AVX512F__)
  // scalef takes the floor of its second operand itself.
  vf t = (vf)_mm512_reduce_ps((__m512)x, 1);
  return (vf)_mm512_scalef_ps((__m512)power(t), (__m512)x);
#else
  x = at_most(Range<float>::largest, x);
  vf shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer part ends up in the low bits
  vf t = x - (shifted - 12582912.0f);
  return bits_as<vf>(bits_as<vi>(power(t)) + (bits_as<vi>(shifted) << 23));
#endif
}
SOLERA_INLINE vd fast_exp2(vd x) {
  x = at_least(Range<double>::smallest, x);
#if defined(__AVX512F__)
  vd t = (vd)_mm512_reduce_pd((__m512d)x, 1);
  return (vd)_mm512_scalef_pd((__m512d)power(t), (__m512d)x);
#else
  x = at_most(Range<double>::largest, x);
  vd shifted = x + 6755399441055744.0;  // 1.5 * 2^52
  vd t = x - (shifted - 6755399441055744.0);
  return bits_as<vd>(bits_as<vl>(power(t)) + (bits_as<vl>(shifted) << 52));
#endif
}

// log2 of positive normal numbers: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m-1)/(m+1)).
SOLERA_INLINE vf fast_log2(vf x) {
  vi bits = bits_as<vi>(x) - 0x3f3504f3;
  vf e = __builtin_convertvector(bits >> 23, vf);
  vf m = bits_as<vf>((bits & 0x7fffff) + 0x3f3504f3);
  vf s = (m - 1.0f) / (m + 1.0f), q = s * s;
  vf p = splat(2.0f / 9) * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  return e + p * s * 1.44269504088896341f;
}
SOLERA_INLINE vd fast_log2(vd x) {
  vl bits = bits_as<vl>(x) - 0x3fe6a09e667f3bcdll;
  vd e = __builtin_convertvector(bits >> 52, vd);
  vd m = bits_as<vd>((bits & 0xfffffffffffffll) + 0x3fe6a09e667f3bcdll);
  vd s = (m - 1.0) / (m + 1.0), q = s * s, p = splat(2.0 / 23);
  for (int k = 21; k >= 1; k -= 2) p = p * q + 2.0 / k;
  return e + p * s * 1.4426950408889634074;
}
SOLERA_INLINE float log2_of(float x) { return __builtin_log2f(x); }
SOLERA_INLINE double log2_of(double x) { return __builtin_log2(x); }
SOLERA_INLINE double exp2_of(double x) { return __builtin_exp2(x); }

template <class T>
SOLERA_INLINE V<T> load_tail(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (V<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  else return (V<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#else
  return load_n(p, n);
#endif
}
template <class T>
SOLERA_INLINE V<T> splat_infinity() { return splat(T(__builtin_inf())); }

// Calls body(offset, vector of C's row) over the columns; the last vector may be partly zeros.
template <class T, class F>
SOLERA_INLINE void over_row(const T* row, int64_t m, const F& body) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  for (; j + L <= m; j += L) body(j, load(row + j));
  if (j < m) body(j, load_tail(row + j, int(m - j)));
}

// One row as an exact log-sum-exp. Fills w with terms relative to the largest b_j 2^(..), returns their
// weighted sum and in `log_sum` the log2 of the true sum without F. A row without a term gives -inf.
template <class T>
__attribute__((noinline)) T exact_row(const SinkhornProblem& p, const T* row, T* w, T& log_sum) {
  const T *G = (const T*)p.g, *b = (const T*)p.b, *log_b = (const T*)p.log_b;
  const T kappa = T(p.kappa);
  V<T> top = -splat_infinity<T>();
  over_row(row, p.m, [&](int64_t j, V<T> c) {
    top = vmax(load(G + j) - kappa * c + load(log_b + j), top);
  });
  const T largest = lane_max(top);
  const T shift = largest == -T(__builtin_inf()) ? T(0) : largest;
  V<T> sum{};
  over_row(row, p.m, [&](int64_t j, V<T> c) {
    V<T> term = fast_exp2(load(G + j) - kappa * c - shift);
    store(w + j, term);
    V<T> finite = term > Range<T>::biggest ? splat(Range<T>::biggest) : term;
    sum += load(b + j) * finite;
  });
  const T s = lane_sum(sum);
  log_sum = largest == -T(__builtin_inf()) && s == s ? largest : shift + log2_of(s);
  return s;
}

template <class T, int R>
SOLERA_INLINE void few_rows(const SinkhornProblem& p, int64_t i, T* buffer, T* partial, double& error,
                            double& mass, int64_t& dead, bool evaluate) {
  constexpr int L = kLanes<T>;
  const T *G = (const T*)p.g, *a = (const T*)p.a, *b = (const T*)p.b, *F = (const T*)p.f_old;
  const T kappa = T(p.kappa);
  const T* row[R];
  T old[R], sum[R], scale[R];
  V<T> total[R];
  for (int r = 0; r < R; ++r) {
    row[r] = (const T*)p.cost + (i + r) * p.m;
    old[r] = F[i + r];
    total[r] = V<T>{};
  }
  const auto one = [&](int64_t j, const V<T>* c) {
    const V<T> g = load(G + j), weight = load(b + j);
    for (int r = 0; r < R; ++r) {
      V<T> w = fast_exp2((g - kappa * c[r]) + old[r]);
      total[r] += weight * w;
      store(buffer + r * p.stride + j, w);
    }
  };
  int64_t j = 0;
  for (; j + L <= p.m; j += L) {
    V<T> c[R];
    for (int r = 0; r < R; ++r) c[r] = load(row[r] + j);
    one(j, c);
  }
  if (j < p.m) {
    V<T> c[R];
    for (int r = 0; r < R; ++r) c[r] = load_tail(row[r] + j, int(p.m - j));
    one(j, c);
  }
  for (int r = 0; r < R; ++r) {
    sum[r] = lane_sum(total[r]);
    const T weight = a[i + r];
    T potential;
    double state;
    if (sum[r] > Range<T>::row_low && sum[r] < Range<T>::row_high) {
      potential = old[r] - log2_of(sum[r]);
      state = double(sum[r]);
      scale[r] = weight / sum[r];
    } else {
      T log_sum;
      T* w = buffer + r * p.stride;
      const T s = exact_row<T>(p, row[r], w, log_sum);
      scale[r] = weight / s;
      if (log_sum == -T(__builtin_inf()) && weight == 0) {
        // A padded row: no allowed pair and no mass. Its potential is 0 by convention.
        potential = 0;
        scale[r] = 0;
        state = 1;
      } else if (!(s > 0) || !(log_sum - log_sum == 0)) {
        dead = 1;
        potential = T(__builtin_nan(""));
        state = __builtin_nan("");
      } else {
        potential = -log_sum;
        double exponent = double(old[r]) + double(log_sum);
        state = exp2_of(exponent > 126 ? 126 : exponent);
      }
    }
    ((T*)p.f_new)[i + r] = potential;
    error += double(weight) * __builtin_fabs(state - 1);
    mass += double(weight) * state;
  }
  if (evaluate) return;
  for (int64_t j = 0; j < p.stride; j += L) {
    V<T> c = load(partial + j);
    for (int r = 0; r < R; ++r) c += scale[r] * load(buffer + r * p.stride + j);
    store(partial + j, c);
  }
}

template <class T>
void row_pass(const SinkhornProblem& p, void* buffer_, int64_t first, int64_t last, bool evaluate) {
  constexpr int R = kSinkhornRows;
  T* buffer = (T*)buffer_;
  for (int64_t block = first; block < last; ++block) {
    int64_t i = block * p.block_rows;
    const int64_t end = i + p.block_rows < p.n ? i + p.block_rows : p.n;
    T* partial = (T*)p.partial + block * p.stride;
    double error = 0, mass = 0;
    int64_t dead = 0;
    memset((void*)partial, 0, size_t(p.stride) * sizeof(T));
    for (; i + R <= end; i += R) few_rows<T, R>(p, i, buffer, partial, error, mass, dead, evaluate);
    for (; i < end; ++i) few_rows<T, 1>(p, i, buffer, partial, error, mass, dead, evaluate);
    p.error[block] = error;
    p.mass[block] = mass;
    p.dead[block] = dead;
  }
}

// `count` columns (at most a vector) as exact log-sum-exps over the rows with mass.
template <class T>
__attribute__((noinline)) int64_t exact_columns(const SinkhornProblem& p, const int64_t* column,
                                                int count) {
  constexpr int L = kLanes<T>;
  const T *F = (const T*)p.f_new, *a = (const T*)p.a, *log_a = (const T*)p.log_a;
  const T *b = (const T*)p.b, *cost = (const T*)p.cost;
  const T kappa = T(p.kappa), infinity = T(__builtin_inf());
  T* G = (T*)p.g;
  const auto term = [&](int64_t i) {
    T picked[L] = {};
    for (int k = 0; k < count; ++k) picked[k] = cost[i * p.m + column[k]];
    return (log_a[i] + F[i]) - kappa * load(picked);
  };
  V<T> top = -splat_infinity<T>();
  for (int64_t i = 0; i < p.n; ++i)
    if (a[i] > 0) top = vmax(term(i), top);
  const V<T> shift = top == -infinity ? V<T>{} : top;
  V<T> sum{};
  for (int64_t i = 0; i < p.n; ++i)
    if (a[i] > 0) sum += fast_exp2(term(i) - shift);
  int64_t dead = 0;
  for (int k = 0; k < count; ++k) {
    const int64_t j = column[k];
    const T value = -(shift[k] + log2_of(T(sum[k])));
    if (top[k] == -infinity && sum[k] == sum[k]) {
      G[j] = 0;
      dead |= b[j] != 0;
    } else {
      G[j] = value;
      dead |= !(value - value == 0);
    }
  }
  return dead;
}

template <class T>
void column_pass(const SinkhornProblem& p, int64_t first, int64_t last) {
  constexpr int L = kLanes<T>;
  const T low = T(Range<T>::column_low * p.total_a), high = Range<T>::column_high;
  T* G = (T*)p.g;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    int64_t redo[kSinkhornColumns];
    int count = 0;
    const int64_t begin = chunk * kSinkhornColumns;
    const int64_t end = begin + kSinkhornColumns < p.m ? begin + kSinkhornColumns : p.m;
    for (int64_t j = begin; j < end; j += L) {
      V<T> sum{};
      for (int64_t k = 0; k < p.blocks; ++k) sum += load((const T*)p.partial + k * p.stride + j);
      const V<T> g = load(G + j), next = g - fast_log2(sum);
      const int lanes = int(end - j < L ? end - j : L);
      const auto good = (sum > low) & (sum < high);
      int bad = 0;
      for (int k = 0; k < lanes; ++k) {
        redo[count] = j + k;
        const int b = !good[k];
        count += b;
        bad += b;
      }
      store(G + j, lanes == L && !bad ? next : (good ? next : g));
    }
    int64_t dead = 0;
    for (int k = 0; k < count; k += L)
      dead |= exact_columns<T>(p, redo + k, count - k < L ? count - k : L);
    p.dead[p.blocks + chunk] = dead;
  }
}

// E, with what is below the normal numbers as 0, and no infinity (a zero weight times it is 0).
template <class T>
SOLERA_INLINE V<T> kernel_of(V<T> exponent) {
  const V<T> value = fast_exp2(at_most(T(Range<T>::largest - 1), exponent));
  return exponent < Range<T>::smallest ? V<T>{} : value;
}

template <class T>
void plan(const SinkhornPlan& p, int64_t first, int64_t last) {
  constexpr int L = kLanes<T>;
  const T *f = (const T*)p.f, *g = (const T*)p.g, *a = (const T*)p.a, *b = (const T*)p.b;
  const T *x = (const T*)p.x, *y = (const T*)p.y;
  const T kappa = T(p.kappa);
  for (int64_t i = first; i < last; ++i) {
    const T* row = (const T*)p.cost + i * p.m;
    T* out = (T*)p.out + i * p.m;
    const auto value = [&](V<T> c, V<T> gj, V<T> bj, V<T> yj) {
      return kernel_of<T>(kappa * ((f[i] - c) + gj)) * (x[i] * bj + a[i] * yj);
    };
    int64_t j = 0;
    for (; j + L <= p.m; j += L)
      store(out + j, value(load(row + j), load(g + j), load(b + j), y ? load(y + j) : V<T>{}));
    if (j < p.m) {
      const int k = int(p.m - j);
      store_n(out + j, value(load_tail(row + j, k), load_tail(g + j, k), load_tail(b + j, k),
                             y ? load_tail(y + j, k) : V<T>{}), k);
    }
  }
}

template <class T>
void plan_backward(const SinkhornPlan& p, int64_t first, int64_t last) {
  constexpr int L = kLanes<T>;
  const T *f = (const T*)p.f, *g = (const T*)p.g, *a = (const T*)p.a, *b = (const T*)p.b;
  const T kappa = T(p.kappa), slope = T(-1 / p.epsilon);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * p.block_rows;
    const int64_t end = begin + p.block_rows < p.n ? begin + p.block_rows : p.n;
    T* partial = (T*)p.partial + block * p.m;
    memset((void*)partial, 0, size_t(p.m) * sizeof(T));
    for (int64_t i = begin; i < end; ++i) {
      const T *row = (const T*)p.cost + i * p.m, *grad = (const T*)p.grad + i * p.m;
      T* out = (T*)p.out + i * p.m;
      V<T> sum{};
      const auto value = [&](V<T> c, V<T> gj, V<T> bj, V<T> d, V<T>& column) {
        V<T> e = kernel_of<T>(kappa * ((f[i] - c) + gj));
        V<T> be = bj * e, ae = a[i] * e;
        sum += d * be;
        column += d * ae;
        return slope * (d * (a[i] * be));
      };
      int64_t j = 0;
      for (; j + L <= p.m; j += L) {
        V<T> column = load(partial + j);
        store(out + j, value(load(row + j), load(g + j), load(b + j), load(grad + j), column));
        store(partial + j, column);
      }
      if (j < p.m) {
        const int k = int(p.m - j);
        V<T> column = load_tail(partial + j, k);
        store_n(out + j, value(load_tail(row + j, k), load_tail(g + j, k), load_tail(b + j, k),
                               load_tail(grad + j, k), column), k);
        store_n(partial + j, column, k);
      }
      ((T*)p.row_sum)[i] = lane_sum(sum);
    }
  }
}

}  // namespace

extern const SinkhornTable sinkhorn_table[2];
const SinkhornTable sinkhorn_table[2] = {
    {row_pass<float>, column_pass<float>, plan<float>, plan_backward<float>, kLanes<float>},
    {row_pass<double>, column_pass<double>, plan<double>, plan_backward<double>, kLanes<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera
