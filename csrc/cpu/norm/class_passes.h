// What a block of classes takes: its cosines into the rows' statistics, the gradient of kept
// cosines, and the projection of a finished gradient. See class_softmax.cpp.
#pragma once

#include "../natural.h"

namespace solera {

constexpr float kCosineSteps = 32767;          // of int16 in a cosine of 1; -32768 stands for NaN
constexpr float kLongestInverse = 1 / 1e-12f;  // of a vector whose length counts as EPS
constexpr int64_t kClassGroup = 256;           // classes whose statistics are summed on their own
constexpr int64_t kClassBlock = 64;            // classes of a product on tiles

// Everything a row has one of is padded with zeros (labels with -1) to `lanes`.
struct ClassHead {
  const void* weight;
  const float *row_inverse, *scale, *class_inverse;
  const int32_t* target;
  const float *others, *share, *label;  // of the gradient
  int64_t lanes, width, classes;
};

namespace SOLERA_ISA {
namespace {

constexpr int L = kLanes<float>;

SOLERA_INLINE vi load_labels(const int32_t* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
void widen_block(const void* from, float* to, int64_t n) {
  strips<L>(n, [&](int64_t j, int count) { put(to + j, get((const T*)from + j, count), count); });
}

SOLERA_INLINE void store_cosine(int16_t* p, vf v) {
  const vf steps = v * kCosineSteps;
  const vf near = steps < 0 ? steps - 0.5f : steps + 0.5f;
  vf cut = near > kCosineSteps ? splat(kCosineSteps) : near;
  cut = cut < -kCosineSteps ? splat(-kCosineSteps) : cut;
  cut = v == v ? cut : splat(-32768.0f);
  const vh h = truncate(vu(__builtin_convertvector(cut, vi)) & 0xffff);
  memcpy(p, &h, sizeof h);
}
SOLERA_INLINE vf load_cosine(const int16_t* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  const vf v = __builtin_convertvector(vi(extend(h) << 16) >> 16, vf);
  return v == -32768.0f ? splat(__builtin_nanf("")) : v * (1 / kCosineSteps);
}

void clear(float* statistics, int64_t lanes) {
  for (int64_t j = 0; j < lanes; ++j) statistics[j] = lowest_of(float());
  memset(statistics + lanes, 0, size_t(2 * lanes) * sizeof(float));
}

// Maximum, sum of e^(z - maximum) and that sum weighted by the cosine, z = scale cos, of all
// classes but the label. Sixteen classes share one look at the maximum.
void gather(const ClassHead& p, const float* products, int64_t first, int64_t n, float* statistics,
            int16_t* cosines) {
  constexpr int64_t kRun = 16;
  float *tops = statistics, *sums = tops + p.lanes, *means = sums + p.lanes;
  const vf nothing = splat(-__builtin_inff());
  for (int64_t j = 0; j < p.lanes; j += L) {
    const vf inverse = load(p.row_inverse + j), r = load(p.scale + j);
    const vi y = load_labels(p.target + j);
    vf top = load(tops + j), sum = load(sums + j), mean = load(means + j);
    for (int64_t run = 0; run < n; run += kRun) {
      const int64_t end = run + kRun < n ? run + kRun : n;
      vf v[kRun], highest = top;
      for (int64_t k = run; k < end; ++k) {
        const vf cosine = load(products + k * p.lanes + j) * (inverse * p.class_inverse[first + k]);
        if (cosines) store_cosine(cosines + k * p.lanes + j, cosine);
        v[k - run] = cosine;
        const vf z = y == int32_t(first + k) ? nothing : cosine * r;
        highest = z > highest ? z : highest;
      }
      const vf factor = natural_exp(top - highest);
      sum *= factor;
      mean *= factor;
      top = highest;
      for (int64_t k = run; k < end; ++k) {
        const vf z = y == int32_t(first + k) ? nothing : v[k - run] * r;
        const vf e = natural_exp(z - top);
        sum += e;
        mean += e * v[k - run];
      }
    }
    store(tops + j, top);
    store(sums + j, sum);
    store(means + j, mean);
  }
}

void merge(const float* statistics, int64_t groups, int64_t lanes, float* others, float* mean) {
  for (int64_t j = 0; j < lanes; j += L) {
    vf top = splat(lowest_of(float())), sum{}, weighted{};
    for (int64_t g = 0; g < groups; ++g) top = vmax(load(statistics + g * 3 * lanes + j), top);
    for (int64_t g = 0; g < groups; ++g) {
      const float* s = statistics + g * 3 * lanes + j;
      const vf factor = natural_exp(load(s) - top);
      sum += load(s + lanes) * factor;
      weighted += load(s + 2 * lanes) * factor;
    }
    const vf none = splat(-__builtin_inff());
    store(others + j, sum == 0 ? none : top + natural_log(sum));
    store(mean + j, sum == 0 ? splat(0.0f) : weighted / sum);
  }
}

// The gradient to x_b . w_k, for lanes from j on.
struct RowLanes {
  vf inverse, scale, others, share, label;
  vi y;
  RowLanes(const ClassHead& p, int64_t j)
      : inverse(load(p.row_inverse + j)),
        scale(load(p.scale + j)),
        others(load(p.others + j)),
        share(load(p.share + j)),
        label(load(p.label + j)),
        y(load_labels(p.target + j)) {}
  SOLERA_INLINE vf operator()(const ClassHead& p, const int16_t* cosine, int64_t k) const {
    const vf z = load_cosine(cosine) * scale - others;
    const vf e = natural_exp(z > 80.0f ? splat(80.0f) : z) * (share * scale);
    const vf g = y == int32_t(k) ? label : (share == 0 ? splat(0.0f) : e);
    return g * (inverse * p.class_inverse[k]);
  }
};

void gradient(const ClassHead& p, const int16_t* cosines, int64_t first, int64_t n, float* out) {
  for (int64_t j = 0; j < p.lanes; j += L) {
    const RowLanes row(p, j);
    for (int64_t k = 0; k < n; ++k)
      store(out + k * p.lanes + j, row(p, cosines + k * p.lanes + j, first + k));
  }
}

template <class T>
void project(const float* e, int64_t step, const void* vectors, const float* inverse, int64_t n,
             int64_t width, void* to) {
  for (int64_t k = 0; k < n; ++k) {
    const float* row = e + k * step;
    const T* v = (const T*)vectors + k * width;
    T* out = (T*)to + k * width;
    const float dot = row_sum<float>(
        width, [&](int64_t j, int count) { return get(row + j, count) * get(v + j, count); });
    const float along = inverse[k] < kLongestInverse ? dot * inverse[k] * inverse[k] : 0.0f;
    strips<L>(width, [&](int64_t j, int count) {
      put(out + j, get(row + j, count) - along * get(v + j, count), count);
    });
  }
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
