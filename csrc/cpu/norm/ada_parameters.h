// The parameters of ada_norm: rows of any form, read in place, and their gradients from what the
// rows summed.
#pragma once

#include "../strips.h"

namespace solera {

// A parameter's rows: the element of (sample, token, column) is data[i * sample_step + token *
// token_step + column] with i the sample or, in a table, what index says.
struct AdaRows {
  const void* data = nullptr;
  int64_t sample_step = 0, token_step = 0;
  const int64_t* index = nullptr;
  bool wide = false;  // of the accumulator's type, else of x's
  int dim = 0;        // 0 absent, 1 one row, 2 one a sample, 3 one a token
};
struct AdaParameters {
  AdaRows gate, scale, shift, weight, bias;
};
struct AdaFinish {
  const void *P, *Q, *E;
  AdaParameters parameter;
  int64_t samples, parts, columns;
  void *dgate, *dscale, *dshift, *dweight, *dbias;  // in A, null where not needed
  int gate_dim, scale_dim, shift_dim;
  double *weight_sets, *bias_sets;  // zeroed tables in place of dweight and dbias; or null
};
// Elements from one row of scratch memory to the next: whole cache lines.
constexpr int64_t ada_padded(int64_t columns) { return (columns + 31) / 32 * 32; }

namespace SOLERA_ISA {
namespace {

// One sample's (or token's) row of a parameter.
template <class T>
struct AdaRow {
  const A<T>* wide = nullptr;
  const T* narrow = nullptr;
  AdaRow(const AdaRows& rows, int64_t sample, int64_t token) {
    const int64_t at =
        (rows.index ? rows.index[sample] : sample) * rows.sample_step + token * rows.token_step;
    if (rows.data && rows.wide)
      wide = (const A<T>*)rows.data + at;
    else if (rows.data)
      narrow = (const T*)rows.data + at;
  }
  explicit operator bool() const { return wide || narrow; }
  SOLERA_INLINE AccVec<T> get(int64_t j, int n) const {
    return wide ? SOLERA_ISA::get(wide + j, n) : SOLERA_ISA::get(narrow + j, n);
  }
};

// W = weight (1 + scale) and C = bias (1 + scale) + shift of one row of parameters.
template <class T>
void ada_affine(const AdaParameters& p, int64_t sample, int64_t token, int64_t D, A<T>* W,
                A<T>* C) {
  const AdaRow<T> weight(p.weight, sample, token), bias(p.bias, sample, token);
  const AdaRow<T> scale(p.scale, sample, token), shift(p.shift, sample, token);
  strips<kLanes<T>>(D, [&](int64_t j, int n) {
    AccVec<T> w = splat(A<T>(1)), c{};
    if (weight) w = weight.get(j, n);
    if (bias) c = bias.get(j, n);
    if (scale) {
      const AccVec<T> s = scale.get(j, n) + A<T>(1);
      w *= s;
      c *= s;
    }
    if (shift) c += shift.get(j, n);
    put(W + j, w, n);
    if (C) put(C + j, c, n);
  });
}
template <class T>
void ada_copy(const AdaRow<T>& row, int64_t D, A<T> plus, A<T> absent, A<T>* out) {
  strips<kLanes<T>>(
      D, [&](int64_t j, int n) { put(out + j, row ? row.get(j, n) + plus : splat(absent), n); });
}

// The rows of A that backward keeps beside the data: W, the gate, and per token 1 + scale and the
// affine before it.
template <class T>
struct AdaScratch {
  A<T>*W, *G, *S, *w, *b;
  AdaScratch(void* scratch, int64_t padded)
      : W((A<T>*)scratch), G(W + padded), S(G + padded), w(S + padded), b(w + padded) {}
};

template <class T>
SOLERA_INLINE void ada_put_gradient(void* base, bool wide, int64_t j, AccVec<T> v, int n) {
  if (wide)
    put((A<T>*)base + j, v, n);
  else
    put((T*)base + j, v, n);
}

// The gradients of the parameters that are summed, for columns begin to end:
//   dshift = Q     dscale = weight P + bias Q     dgate = E
//   dweight = sum (1 + scale) P     dbias = sum (1 + scale) Q     (a scale per token is in P, Q)
template <class T>
void ada_norm_finish(const AdaFinish& p, int64_t begin, int64_t end) {
  constexpr int kBlock = 64;
  const int64_t D = p.columns;
  struct Sum {
    double v[kBlock];
  };
  const bool group_scale = p.parameter.scale.data && p.parameter.scale.dim < 3;
  for (int64_t j = begin; j < end; j += kBlock) {
    const int n = int(end - j < kBlock ? end - j : kBlock);
    Sum gate{}, scale{}, shift{}, weight{}, bias{};
    for (int64_t sample = 0; sample < p.samples; ++sample) {
      Sum P{}, Q{}, E{};
      const auto gather = [&](const void* from, Sum& sum) {
        for (int64_t part = 0; from && part < p.parts; ++part) {
          const A<T>* row = (const A<T>*)from + (sample * p.parts + part) * D + j;
          for (int i = 0; i < n; ++i) sum.v[i] += double(row[i]);
        }
      };
      const auto row_of = [&](const AdaRows& rows, double plus, double absent) {
        Sum out;
        const AdaRow<T> row(rows, sample, 0);
        A<T> buffer[kBlock];
        strips<kLanes<T>>(n, [&](int64_t i, int count) {
          put(buffer + i, row ? row.get(j + i, count) : splat(A<T>(absent)), count);
        });
        for (int i = 0; i < n; ++i) out.v[i] = double(buffer[i]) + (row ? plus : 0);
        return out;
      };
      // One row a sample is stored, one row for all is summed over them.
      const auto give = [&](void* out, int dim, Sum& all, const Sum& value) {
        if (!out) return;
        A<T>* row = (A<T>*)out + sample * D + j;
        if (dim == 2)
          for (int i = 0; i < n; ++i) row[i] = A<T>(value.v[i]);
        else
          for (int i = 0; i < n; ++i) all.v[i] += value.v[i];
      };
      gather(p.P, P);
      gather(p.Q, Q);
      gather(p.E, E);
      give(p.dgate, p.gate_dim, gate, E);
      give(p.dshift, p.shift_dim, shift, Q);
      if (p.dscale) {
        const Sum w = row_of(p.parameter.weight, 0, 1);
        Sum value;
        for (int i = 0; i < n; ++i) value.v[i] = w.v[i] * P.v[i];
        if (p.parameter.bias.data) {
          const Sum b = row_of(p.parameter.bias, 0, 0);
          for (int i = 0; i < n; ++i) value.v[i] += b.v[i] * Q.v[i];
        }
        give(p.dscale, p.scale_dim, scale, value);
      }
      if (!p.dweight && !p.dbias && !p.weight_sets && !p.bias_sets) continue;
      if (group_scale) {
        const Sum s = row_of(p.parameter.scale, 1, 1);
        for (int i = 0; i < n; ++i) P.v[i] *= s.v[i], Q.v[i] *= s.v[i];
      }
      const auto give_set = [&](double* sets, const AdaRows& rows, const Sum& value) {
        double* row = sets + (rows.index ? rows.index[sample] : 0) * D + j;
        for (int i = 0; i < n; ++i) row[i] += value.v[i];
      };
      if (p.weight_sets)
        give_set(p.weight_sets, p.parameter.weight, P);
      else
        give(p.dweight, 1, weight, P);
      if (p.bias_sets)
        give_set(p.bias_sets, p.parameter.bias, Q);
      else
        give(p.dbias, 1, bias, Q);
    }
    const auto store = [&](void* out, int dim, const Sum& all) {
      for (int i = 0; out && dim == 1 && i < n; ++i) ((A<T>*)out)[j + i] = A<T>(all.v[i]);
    };
    store(p.dgate, p.gate_dim, gate);
    store(p.dscale, p.scale_dim, scale);
    store(p.dshift, p.shift_dim, shift);
    if (!p.weight_sets) store(p.dweight, 1, weight);
    if (!p.bias_sets) store(p.dbias, 1, bias);
  }
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
