// What happens to a tile of one member's rows between the products of its perceptron, forward and
// backward, and on the way in and out. Used by ensemble_mlp.cpp.
#pragma once
#include "tiles.h"

#include "../activation.h"
#include "../strips.h"
#include "lanes.h"

namespace solera {

struct MlpTable {
  // h = act(tile + bias) in place, rows that lie `step` apart moved together; z (gelu, silu) or h
  // also as `saved`. bias, saved may be null.
  void (*finish)(void* tile, int64_t step, const void* bias, void* saved, int64_t rows,
                 int64_t width, int activation);
  // tile *= act'(saved) in place; db += its column sums. saved, db may be null.
  void (*delta)(void* tile, const void* saved, void* db, int64_t rows, int64_t width,
                int activation);
  void (*revive)(const void* saved, void* tile, int64_t n, int activation);
  // Rows `step` apart as a dense tile, times `scale`; rows up to `padded` are zero.
  void (*gather)(const void* from, int64_t step, void* tile, int64_t rows, int64_t padded,
                 int64_t width, double scale);
  void (*scatter)(const void* tile, void* to, int64_t step, int64_t rows, int64_t width);
  // sum (+)= scale * tile
  void (*blend)(const void* tile, void* sum, int64_t n, double scale, bool first);
  // W (out, in), or (in, out), as (in, step) with columns of zeros.
  void (*widen)(const void* w, void* copy, int64_t in, int64_t out, int64_t step, bool out_first);
};
// By Dtype, and last bfloat16 with bfloat16 tiles.
struct MlpTables {
  MlpTable of[5];
};

namespace SOLERA_ISA {
namespace {

template <class T, class C>
struct Mlp {
  typedef A<T> Real;
  typedef AccVec<T> V;

  template <int kActivation>
  static void finish_as(C* tile, int64_t step, const Real* bias, T* saved, int64_t rows,
                        int64_t width) {
    const C* from = tile;
    for (int64_t j = 0; j < rows; ++j, from += step, tile += width) {
      strips<kLanes<T>>(width, [&](int64_t i, int c) {
        V z = lanes_of(from + i, c);
        if (bias) z += lanes_of(bias + i, c);
        V h = activate(z, kActivation);
        set_lanes(tile + i, h, c);
        if (saved) set_lanes(saved + j * width + i, kActivation >= kGelu ? z : h, c);
      });
    }
  }
  static void finish(void* tile, int64_t step, const void* bias, void* saved, int64_t rows,
                     int64_t width, int activation) {
    C* t = (C*)tile;
    const Real* b = (const Real*)bias;
    T* s = (T*)saved;
    if (activation == kRelu) return finish_as<kRelu>(t, step, b, s, rows, width);
    if (activation == kGelu) return finish_as<kGelu>(t, step, b, s, rows, width);
    if (activation == kSilu) return finish_as<kSilu>(t, step, b, s, rows, width);
    if (b || s || step != width) finish_as<kNone>(t, step, b, s, rows, width);
  }

  template <int kActivation>
  static void delta_as(C* tile, const T* saved, Real* db, int64_t rows, int64_t width) {
    constexpr int64_t kRows = 32;  // summed in registers before they join db
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t last = first + kRows < rows ? first + kRows : rows;
      strips<kLanes<T>>(width, [&](int64_t i, int c) {
        V sum{};
        for (int64_t j = first; j < last; ++j) {
          V g = lanes_of(tile + j * width + i, c);
          if (kActivation != kNone) {
            g = slope(g, lanes_of(saved + j * width + i, c), kActivation);
            set_lanes(tile + j * width + i, g, c);
          }
          sum += g;
        }
        if (db) set_lanes(db + i, lanes_of(db + i, c) + sum, c);
      });
    }
  }
  static void delta(void* tile, const void* saved, void* db, int64_t rows, int64_t width,
                    int activation) {
    C* t = (C*)tile;
    const T* s = (const T*)saved;
    Real* d = (Real*)db;
    if (activation == kRelu) return delta_as<kRelu>(t, s, d, rows, width);
    if (activation == kGelu) return delta_as<kGelu>(t, s, d, rows, width);
    if (activation == kSilu) return delta_as<kSilu>(t, s, d, rows, width);
    if (d) delta_as<kNone>(t, s, d, rows, width);
  }

  // Rows of members lie far apart: the processor foresees them only within a row.
  static constexpr int64_t kAhead = 8;
  static SOLERA_INLINE void prefetch_row(const T* row, int64_t width) {
    for (int64_t j = 0; j < width && j < 256; j += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(row + j);
    if (width > 0) __builtin_prefetch(row + width - 1);
  }

  static void revive(const void* saved, void* tile, int64_t n, int activation) {
    strips<kLanes<T>>(n, [&](int64_t i, int c) {
      V v = lanes_of((const T*)saved + i, c);
      set_lanes((C*)tile + i, activation >= kGelu ? activate(v, activation) : v, c);
    });
  }
  static void gather(const void* from, int64_t step, void* tile, int64_t rows, int64_t padded,
                     int64_t width, double scale) {
    C* to = (C*)tile;
    for (int64_t j = 0; j < rows; ++j, to += width) {
      const T* row = (const T*)from + j * step;
      if (j + kAhead < rows) prefetch_row(row + kAhead * step, width);
      strips<kLanes<T>>(width, [&](int64_t i, int c) {
        set_lanes(to + i, lanes_of(row + i, c) * Real(scale), c);
      });
    }
    memset((void*)to, 0, size_t((padded - rows) * width) * sizeof(C));
  }
  static void scatter(const void* tile, void* to, int64_t step, int64_t rows, int64_t width) {
    const C* from = (const C*)tile;
    for (int64_t j = 0; j < rows; ++j, from += width) {
      T* row = (T*)to + j * step;
      if (j + kAhead < rows) prefetch_row(row + kAhead * step, width);
      strips<kLanes<T>>(width,
                        [&](int64_t i, int c) { set_lanes(row + i, lanes_of(from + i, c), c); });
    }
  }
  static void blend(const void* tile, void* sum, int64_t n, double scale, bool first) {
    Real* to = (Real*)sum;
    strips<kLanes<T>>(n, [&](int64_t i, int c) {
      V v = lanes_of((const C*)tile + i, c) * Real(scale);
      set_lanes(to + i, first ? v : lanes_of(to + i, c) + v, c);
    });
  }

  static void widen(const void* from, void* to, int64_t in, int64_t out, int64_t step,
                    bool out_first) {
    const C* w = (const C*)from;
    C* copy = (C*)to;
    memset(to, 0, size_t(in * step) * sizeof(C));
    for (int64_t i = 0; i < in; ++i)
      for (int64_t o = 0; o < out; ++o)
        copy[i * step + o] = out_first ? w[o * in + i] : w[i * out + o];
  }

  static constexpr MlpTable table() {
    return {finish, delta, revive, gather, scatter, blend, widen};
  }
};

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
