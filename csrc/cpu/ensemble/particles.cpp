// One step of weighted particles and their systematic resampling; formulas in
// python/solera/ensemble/particles.py.
//
// Bytes a particle of d elements: fkc_step reads x, m scores and the noise (and the drift, if it is
// a tensor) and writes x': m + 3 (4) rows; afdps_step reads x, b, the gradient and the noise and
// writes x': 5 rows. smc_resample reads and writes each row once, 2 d elements, and streams the log
// weights three times, 12 to 20 bytes more: at d 64 in float32 the gather is 512 of 530 bytes.
#include "../exponential.h"
#include "../strips.h"

namespace solera {

struct ParticleStep {
  const void *x, *drift, *noise;    // drift is b for afdps; null for a drift of drift_rate * x
  const void *scores, *divergence;  // scores is the gradient for afdps; divergence its Laplacian
  const double* betas;
  void *y, *dlogw;  // dlogw in A
  int64_t models, rows, columns;
  double drift_rate, sigma, dt, root, level;  // root: sigma * sqrt(|dt|)
};
struct Resample {
  const void* logw;
  void *weights, *after;  // in A
  int64_t* indices;
  int64_t count;
  double mean, clip, top, total, u;
  bool taken, usable;
};
struct ResampleChunk {
  double sum, square, top;  // of the first pass: square counts the weights of 0
};
constexpr int64_t kResampleChunk = 4096, kStepBlock = 2048;

struct ParticlesTable {
  void (*fkc[4])(const ParticleStep&, int64_t begin, int64_t end);
  void (*afdps[4])(const ParticleStep&, int64_t begin, int64_t end);
  ResampleChunk (*read[4])(const Resample&, int64_t begin, int64_t end);
  ResampleChunk (*weigh[4])(const Resample&, int64_t begin, int64_t end);
  void (*count[4])(const Resample&, int64_t begin, int64_t end, double before, double after);
  void (*gather)(const char* x, char* y, const int64_t* indices, int64_t row_bytes, int64_t begin,
                 int64_t end);
};

namespace SOLERA_ISA {
namespace {

// Rows of any width as one stretch of elements: `step(offset, n)` moves a vector of elements and
// returns their terms, `finish(row, sum)` receives each row's sum of terms. Narrow rows share
// vectors; a row's sum does not depend on its neighbours.
template <class T, class Step, class Finish>
SOLERA_INLINE void particle_rows(int64_t D, int64_t begin, int64_t end, const Step& step,
                                 const Finish& finish) {
  A<T> terms[kStepBlock];
  const int64_t block = D > 0 && D < kStepBlock ? kStepBlock / D : 1;
  for (int64_t row = begin; row < end; row += block) {
    const int64_t rows = end - row < block ? end - row : block;
    A<T> sum = 0;
    for (int64_t at = 0; at < rows * D; at += kStepBlock) {
      const int64_t n = rows * D - at < kStepBlock ? rows * D - at : kStepBlock;
      strips<kLanes<T>>(
          n, [&](int64_t j, int k) { put(terms + j, step(row * D + at + j, k), k, false); });
      if (block == 1) sum += row_sum<A<T>>(n, [&](int64_t j, int k) { return get(terms + j, k); });
    }
    if (block == 1) {
      finish(row, sum);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const A<T>* mine = terms + r * D;
      A<T> total = 0;
      if (D >= kLanes<T>)
        total = row_sum<A<T>>(D, [&](int64_t j, int k) { return get(mine + j, k); });
      else
        for (int64_t j = 0; j < D; ++j) total += mine[j];
      finish(row + r, total);
    }
  }
}

template <class T>
void fkc(const ParticleStep& p, int64_t begin, int64_t end) {
  typedef A<T> S;
  typedef AccVec<T> V;
  const int64_t step = p.rows * p.columns;
  double all = 0;
  for (int64_t i = 0; i < p.models; ++i) all += p.betas[i];
  const S excess = S(all - 1), whole = excess + 1;
  const S inverse = p.level > 0 ? S(1 / (p.level * p.level)) : S(1);
  const S variance = S(p.sigma * p.sigma), dt = S(p.dt), root = S(p.root), rate = S(p.drift_rate);
  const bool denoised = p.level > 0;
  const auto* x = (const T*)p.x;
  particle_rows<T>(
      p.columns, begin, end,
      [&](int64_t at, int n) {
        const V v = get(x + at, n);
        const T* s = (const T*)p.scores + at;
        V first = get(s, n);
        if (denoised) first = (first - v) * inverse;
        V lead{}, squares{};
        for (int64_t i = 1; i < p.models; ++i) {
          V other = get(s + i * step, n);
          if (denoised) other = (other - v) * inverse;
          const V d = other - first, weighted = d * S(p.betas[i]);
          lead += weighted;
          squares += weighted * d;
        }
        const V total = first * whole + lead;
        const V f = p.drift ? get((const T*)p.drift + at, n) : v * rate;
        const V noise = get((const T*)p.noise + at, n);
        put((T*)p.y + at, v + (total * variance - f) * dt + noise * root, n);
        return first * excess * (total + lead) + lead * lead - squares;
      },
      [&](int64_t row, S sum) {
        S change = S(0.5) * variance * sum;
        if (p.divergence) change += excess * ((const S*)p.divergence)[row];
        ((S*)p.dlogw)[row] = change * dt;
      });
}

template <class T>
void afdps(const ParticleStep& p, int64_t begin, int64_t end) {
  typedef A<T> S;
  typedef AccVec<T> V;
  const S variance = S(p.sigma * p.sigma), half = S(0.5) * variance;
  const S dt = S(p.dt), root = S(p.root);
  particle_rows<T>(
      p.columns, begin, end,
      [&](int64_t at, int n) {
        const V v = get((const T*)p.x + at, n), b = get((const T*)p.drift + at, n);
        const V g = get((const T*)p.scores + at, n), noise = get((const T*)p.noise + at, n);
        put((T*)p.y + at, v + (b - g * variance) * dt + noise * root, n);
        return g * (g * half - b);
      },
      [&](int64_t row, S sum) {
        if (p.divergence) sum -= half * ((const S*)p.divergence)[row];
        ((S*)p.dlogw)[row] = sum * dt;
      });
}

// ---- resampling: three streams over the log weights, in chunks of a fixed size ----

template <class T>
SOLERA_INLINE double one_value(const T* p) {
  return double(load_n(p, 1)[0]);
}
template <class T>
SOLERA_INLINE double centred_value(const Resample& p, int64_t i) {
  const double a = one_value((const T*)p.logw + i) - p.mean;
  if (!(p.clip > 0)) return a;
  return a > p.clip ? p.clip : (a < -p.clip ? -p.clip : a);
}

// The sum (for the mean) of the particles that count, the maximum, and how many do not (-inf).
template <class T>
ResampleChunk read(const Resample& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const T* logw = (const T*)p.logw + begin;
  const AccVec<T> none = splat(A<T>(-__builtin_inf())), zero{}, one = splat(A<T>(1));
  AccVec<T> top = none, sum{}, gone{};
  strips<L>(end - begin, [&](int64_t j, int n) {
    AccVec<T> v = get(logw + j, n);
    sum += v == none ? zero : v;
    gone += v == none ? one : zero;
    if (n != L)
      for (int i = n; i < L; ++i) v[i] = top[i];
    top = vmax(v, top);
  });
  return {double(lane_sum(sum)), double(lane_sum(gone)), double(lane_max(top))};
}

// weights[i] = exp(a_i - max a); their sum and the sum of their squares.
template <class T>
ResampleChunk weigh(const Resample& p, int64_t begin, int64_t end) {
  typedef A<T> S;
  constexpr int L = kLanes<T>;
  const T* logw = (const T*)p.logw + begin;
  S* weights = (S*)p.weights + begin;
  const S mean = S(p.mean), clip = S(p.clip), top = S(p.top);
  strips<L>(end - begin, [&](int64_t j, int n) {
    AccVec<T> a = get(logw + j, n) - mean;
    if (p.clip > 0) {
      a = a > clip ? splat(clip) : a;
      a = a < -clip ? splat(-clip) : a;
    }
    put(weights + j, expv(a - top), n);
  });
  double sum[8] = {}, square[8] = {};
  const int64_t n = end - begin;
  int64_t j = 0;
  for (; j + 8 <= n; j += 8)
    for (int i = 0; i < 8; ++i) {
      const double w = double(weights[j + i]);
      sum[i] += w;
      square[i] += w * w;
    }
  for (int i = 0; j < n; ++j, ++i) {
    const double w = double(weights[j]);
    sum[i] += w;
    square[i] += w * w;
  }
  for (int i = 1; i < 8; ++i) {
    sum[0] += sum[i];
    square[0] += square[i];
  }
  return {sum[0], square[0], 0};
}

// Normalises the weights of a chunk and gives each of its particles its offspring: those before
// it end where the ones of the chunk begin, whatever the rounding of the sum inside.
template <class T>
void count(const Resample& p, int64_t begin, int64_t end, double before, double behind) {
  typedef A<T> S;
  constexpr int64_t kBlock = 256, kSlots = 4;
  S* weights = (S*)p.weights;
  S* after = (S*)p.after;
  const S inverse = S(1 / p.total);
  if (!p.taken) {
    for (int64_t i = begin; i < end; ++i) {
      weights[i] = p.usable ? weights[i] * inverse : S(__builtin_nan(""));
      after[i] = S(centred_value<T>(p, i));
      p.indices[i] = i;
    }
    return;
  }
  const double scale = double(p.count) / p.total;
  const auto ends = [&](double sum) {
    const double n = __builtin_ceil(sum * scale - p.u);
    return n < 0 ? 0.0 : (n > double(p.count) ? double(p.count) : n);
  };
  int64_t k = begin == 0 ? 0 : int64_t(ends(before));
  const int64_t last = end == p.count ? p.count : int64_t(ends(behind));
  double sum = before, stops[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    S* w = weights + first;
    for (int64_t i = 0; i < n; ++i) stops[i] = sum += double(w[i]);
    for (int64_t i = 0; i < n; ++i) stops[i] = ends(stops[i]);
    for (int64_t i = 0; i < n; ++i) {
      w[i] *= inverse;
      after[first + i] = 0;
    }
    if (first + n == end) stops[n - 1] = double(last);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t bounded = int64_t(stops[i]) < last ? int64_t(stops[i]) : last;
      // Most have at most kSlots: written without asking how many, and overwritten by those after.
      if (k + kSlots <= last)
        for (int64_t j = 0; j < kSlots; ++j) p.indices[k + j] = first + i;
      else
        for (int64_t j = k; j < bounded; ++j) p.indices[j] = first + i;
      for (int64_t j = k + kSlots; j < bounded; ++j) p.indices[j] = first + i;
      k = bounded;
    }
  }
}

// Copies row `from` to `times` rows at `to`, which are one after another.
template <bool kStream>
SOLERA_INLINE void copy_row(const char* from, char* to, int64_t row_bytes, int64_t times) {
  constexpr int64_t kBytes = SOLERA_VECTOR_BYTES, kPiece = 256;
  if (!kStream) {
    for (; times > 0; --times, to += row_bytes) memcpy(to, from, size_t(row_bytes));
    return;
  }
  int64_t at = 0;
  for (; at + kPiece <= row_bytes; at += kPiece) {
    vf piece[kPiece / kBytes];
    for (int64_t j = 0; j < kPiece / kBytes; ++j)
      piece[j] = load((const float*)(from + at + j * kBytes));
    char* there = to + at;
    for (int64_t c = 0; c < times; ++c, there += row_bytes)
      for (int64_t j = 0; j < kPiece / kBytes; ++j) stream((float*)(there + j * kBytes), piece[j]);
  }
  for (; at < row_bytes; at += kBytes) {
    const vf piece = load((const float*)(from + at));
    for (int64_t c = 0; c < times; ++c) stream((float*)(to + c * row_bytes + at), piece);
  }
}

// Indices ascend, so x is read in order with gaps. The gaps keep the processor from seeing a
// stream; short ones are therefore prefetched with the rows around them.
template <bool kStream>
void gather_rows(const char* x, char* y, const int64_t* indices, int64_t row_bytes, int64_t begin,
                 int64_t end) {
  constexpr int64_t kAhead = 16, kGap = 4, kMost = 1024;
  const int64_t near = row_bytes < kMost ? row_bytes : kMost;
  int64_t seen = begin, next = indices[begin];
  for (int64_t k = begin; k < end;) {
    for (; seen < k + kAhead && seen < end; ++seen) {
      const int64_t row = indices[seen];
      if (row - next > kGap) next = row;
      for (; next <= row; ++next)
        for (int64_t j = 0; j < near; j += 64) __builtin_prefetch(x + next * row_bytes + j);
    }
    const int64_t row = indices[k];
    int64_t stop = k + 1;
    while (stop < end && indices[stop] == row) ++stop;
    copy_row<kStream>(x + row * row_bytes, y + k * row_bytes, row_bytes, stop - k);
    k = stop;
  }
  if (kStream) stream_fence();
}

void gather(const char* x, char* y, const int64_t* indices, int64_t row_bytes, int64_t begin,
            int64_t end) {
  constexpr int64_t kBytes = SOLERA_VECTOR_BYTES;
  if (begin == end || row_bytes == 0) return;
  if (row_bytes % kBytes == 0 && uintptr_t(y) % kBytes == 0)
    gather_rows<true>(x, y, indices, row_bytes, begin, end);
  else
    gather_rows<false>(x, y, indices, row_bytes, begin, end);
}

}  // namespace

extern const ParticlesTable particles_table;
const ParticlesTable particles_table = {
    {fkc<float>, fkc<double>, fkc<bf16>, fkc<f16>},
    {afdps<float>, afdps<double>, afdps<bf16>, afdps<f16>},
    {read<float>, read<double>, read<bf16>, read<f16>},
    {weigh<float>, weigh<double>, weigh<bf16>, weigh<f16>},
    {count<float>, count<double>, count<bf16>, count<f16>},
    gather,
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>
#include <cmath>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(ParticlesTable, particles_table)

namespace {

// A number a particle, in the accumulator's type.
OptTensor per_particle(const OptTensor& t, const Tensor& x) {
  if (!t.has_value()) return std::nullopt;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(0), "solera: expected one number a row");
  const ScalarType acc = accumulate_type(x);
  return dense(t->scalar_type() == acc ? *t : torch::stable::to(*t, acc));
}
Tensor particle_rows_of(const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(1),
                  "solera: expected x's shape");
  return dense(t.scalar_type() == x.scalar_type() ? t : torch::stable::to(t, x.scalar_type()));
}

std::tuple<Tensor, Tensor> particle_step(const Tensor& x_in, const Tensor& scores_in,
                                         const OptTensor& betas, const OptTensor& drift_in,
                                         const OptTensor& divergence_in, const Tensor& noise_in,
                                         double drift_rate, double sigma, double dt, double level) {
  STD_TORCH_CHECK(x_in.dim() == 2, "solera: x must have two dimensions");
  const Tensor x = dense(x_in), noise = particle_rows_of(noise_in, x);
  const bool fkc = betas.has_value();
  Tensor scores = scores_in;
  if (scores.scalar_type() != x.scalar_type()) scores = torch::stable::to(scores, x.scalar_type());
  scores = dense(scores);
  const int64_t models = fkc ? betas->numel() : 1;
  STD_TORCH_CHECK(models > 0 && scores.numel() == models * x.numel(),
                  "solera: scores do not fit x and betas");
  std::vector<double> b(models, 1.0);
  if (fkc) {
    const Tensor held = dense(*betas);
    STD_TORCH_CHECK(dtype_of(held) == kFloat64, "solera: betas must be float64");
    std::copy_n(static_cast<const double*>(held.const_data_ptr()), models, b.begin());
  }
  const OptTensor divergence = per_particle(divergence_in, x);
  OptTensor drift;
  if (drift_in.has_value()) drift = particle_rows_of(*drift_in, x);
  const int64_t rows[] = {x.size(0)};
  Tensor y = empty_like(x, x.sizes());
  Tensor dlogw = empty_like(x, Sizes(rows, 1), accumulate_type(x));
  ParticleStep p{};
  p.x = x.const_data_ptr();
  p.drift = data_or_null(drift);
  p.noise = noise.const_data_ptr();
  p.scores = scores.const_data_ptr();
  p.divergence = data_or_null(divergence);
  p.betas = b.data();
  p.y = y.mutable_data_ptr();
  p.dlogw = dlogw.mutable_data_ptr();
  p.models = models;
  p.rows = x.size(0);
  p.columns = x.size(1);
  p.drift_rate = drift_rate;
  p.sigma = sigma;
  p.dt = dt;
  p.root = sigma * std::sqrt(std::fabs(dt));
  p.level = level;
  const auto& table = pick_particles_table();
  const auto kernel = fkc ? table.fkc[dtype_of(x)] : table.afdps[dtype_of(x)];
  parallel_for(0, p.rows, grain_for(p.columns * int64_t(x.element_size()) * (models + 3)),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {y, dlogw};
}

std::tuple<Tensor, Tensor> fkc_step(const Tensor& x, const Tensor& scores, const Tensor& betas,
                                    OptTensor drift, OptTensor divergence, const Tensor& noise,
                                    double drift_rate, double sigma, double dt, double level) {
  return particle_step(x, scores, betas, drift, divergence, noise, drift_rate, sigma, dt, level);
}

std::tuple<Tensor, Tensor> afdps_step(const Tensor& x, const Tensor& b, const Tensor& grad_mu,
                                      OptTensor lap_mu, const Tensor& noise, double sigma,
                                      double dt) {
  return particle_step(x, grad_mu, std::nullopt, b, lap_mu, noise, 0, sigma, dt, 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> smc_resample(const Tensor& logw_in,
                                                                        OptTensor x_in,
                                                                        const Tensor& u,
                                                                        double ess_threshold,
                                                                        bool center, double clip) {
  STD_TORCH_CHECK(logw_in.dim() == 1, "solera: logw must have one dimension");
  STD_TORCH_CHECK(u.numel() == 1 && dtype_of(u) == kFloat64, "solera: u must be one float64");
  const Tensor logw = dense(logw_in);
  const int64_t count = logw.size(0), chunks = (count + kResampleChunk - 1) / kResampleChunk;
  const ScalarType acc = accumulate_type(logw);
  const int64_t none[] = {0};
  Tensor x, y = empty_like(logw, Sizes(none, 1));
  if (x_in.has_value()) {
    STD_TORCH_CHECK(x_in->dim() == 2 && x_in->size(0) == count, "solera: x does not fit logw");
    x = dense(*x_in);
    y = empty_like(x, x.sizes());
  }
  Tensor indices = empty_like(logw, logw.sizes(), ScalarType::Long);
  Tensor weights = empty_like(logw, logw.sizes(), acc);
  Tensor after = empty_like(logw, logw.sizes(), acc);
  Resample p{};
  p.logw = logw.const_data_ptr();
  p.weights = weights.mutable_data_ptr();
  p.after = after.mutable_data_ptr();
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  p.count = count;
  p.clip = clip;
  p.u = *static_cast<const double*>(u.const_data_ptr());
  const auto& table = pick_particles_table();
  const Dtype dtype = dtype_of(logw);
  std::vector<ResampleChunk> parts(chunks);
  const auto each = [&](auto&& work) {
    parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        work(c, c * kResampleChunk, std::min(count, (c + 1) * kResampleChunk));
    });
  };
  each([&](int64_t c, int64_t b, int64_t e) { parts[c] = table.read[dtype](p, b, e); });
  double sum = 0, top = -INFINITY, square = 0, held = double(count);
  for (const auto& part : parts) {
    sum += part.sum;
    held -= part.square;
    top = std::max(top, part.top);
  }
  p.mean = center && held > 0 ? sum / held : 0;
  p.top = top - p.mean;
  if (clip > 0) p.top = std::min(std::max(p.top, -clip), clip);
  each([&](int64_t c, int64_t b, int64_t e) { parts[c] = table.weigh[dtype](p, b, e); });
  std::vector<double> offsets(chunks + 1, 0.0);
  for (int64_t c = 0; c < chunks; ++c) {
    offsets[c + 1] = offsets[c] + parts[c].sum;
    square += parts[c].square;
  }
  p.total = offsets[chunks];
  p.usable = p.total > 0 && p.total < INFINITY;
  const double ess = p.usable ? p.total * p.total / square : NAN;
  const double log_z =
      p.usable ? std::log(p.total) + p.top + p.mean - std::log(double(count)) : NAN;
  p.taken = p.usable && ess < ess_threshold * double(count);
  each([&](int64_t c, int64_t b, int64_t e) {
    table.count[dtype](p, b, e, offsets[c], offsets[c + 1]);
  });
  if (x_in.has_value()) {
    const int64_t row_bytes = x.size(1) * int64_t(x.element_size());
    parallel_for(0, count, grain_for(2 * row_bytes), [&](int64_t begin, int64_t end) {
      table.gather(static_cast<const char*>(x.const_data_ptr()),
                   static_cast<char*>(y.mutable_data_ptr()), p.indices, row_bytes, begin, end);
    });
  }
  const auto scalar = [&](double value) {
    Tensor t = empty_like(logw, Sizes(none, size_t(0)), acc);
    torch::stable::fill_(t, value);
    return t;
  };
  return {indices, y, weights, after, scalar(log_z), scalar(ess)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("fkc_step", TORCH_BOX(&fkc_step));
  m.impl("afdps_step", TORCH_BOX(&afdps_step));
  m.impl("smc_resample", TORCH_BOX(&smc_resample));
}

}  // namespace solera
#endif  // SOLERA_FRONT
