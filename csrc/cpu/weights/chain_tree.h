// The tree of a row that chain.cpp describes: its levels and slots, and the two ways through it.
#pragma once

#include "../strips.h"
#include "pairs.h"

namespace solera {

constexpr int kGivensPad = 16;  // the slots of a level are a multiple of the widest vector's lanes
constexpr int kGivensLevels = 48;

struct GivensPlan {
  int64_t columns, slots;            // d; the slots of all levels
  int64_t first[kGivensLevels + 1];  // the slots before level l
  int levels;
  bool blocks;               // four numbers a pair instead of a cosine and a sine
  const void* coefficients;  // in A: 2 or 4 rows of `slots`; the identity where there is no pair
  const void* scale;         // in A, may be null
  bool reversed;
  int64_t low_at(int level) const { return 2 * first[level]; }
  int64_t low_size() const { return 2 * slots + kGivensPad; }
};
namespace SOLERA_ISA {
namespace {

template <class T>
struct Pair {
  AccVec<T> first, second;
};

// The blocks of the slots [slot, slot + lanes) on a pair, or their transposes.
template <class T, bool kBlocks, bool kTransposed>
SOLERA_INLINE Pair<T> turned(const GivensPlan& p, int64_t slot, Pair<T> v) {
  const A<T>* c = (const A<T>*)p.coefficients + slot;
  if (kBlocks) {
    const AccVec<T> b00 = load(c), b01 = load(c + p.slots), b10 = load(c + 2 * p.slots),
                    b11 = load(c + 3 * p.slots);
    if (kTransposed) return {b00 * v.first + b10 * v.second, b01 * v.first + b11 * v.second};
    return {b00 * v.first + b01 * v.second, b10 * v.first + b11 * v.second};
  }
  const AccVec<T> cosine = load(c), sine = load(c + p.slots);
  if (kTransposed) return {cosine * v.first + sine * v.second, cosine * v.second - sine * v.first};
  return {cosine * v.first - sine * v.second, sine * v.first + cosine * v.second};
}

// Elements [j, j + lanes) of a row of d, zero past its end.
template <class T>
SOLERA_INLINE AccVec<T> fetch(const T* row, int64_t j, int64_t d) {
  if (j + kLanes<T> <= d) return load(row + j);
  return j < d ? load_n(row + j, int(d - j)) : AccVec<T>{};
}
template <class T>
SOLERA_INLINE void place(T* row, int64_t j, int64_t d, AccVec<T> v, bool streaming) {
  if (j + kLanes<T> <= d)
    put(row + j, v, kLanes<T>, streaming);
  else if (j < d)
    store_n(row + j, v, int(d - j));
}

// Down the tree: body(slot, below, pair) gives what goes to the next level, at low + below.
template <class T, class Read, class Body>
SOLERA_INLINE void down(const GivensPlan& p, A<T>* low, const Read& read, const Body& body) {
  constexpr int L = kLanes<T>;
  if (p.levels == 0) return store(low, read(0));
  const auto level = [&](int l, const auto& from) {
    const int64_t at = p.first[l], to = p.low_at(l + 1), count = p.first[l + 1] - at;
    for (int64_t k = 0; k < count; k += L) {
      const AccVec<T> a = from(2 * k), b = from(2 * k + L);
      store(low + to + k, body(at + k, to + k, Pair<T>{evens(a, b), odds(a, b)}));
    }
  };
  level(0, read);
  for (int l = 1; l < p.levels; ++l) {
    const A<T>* row = low + p.low_at(l);
    level(l, [&](int64_t j) { return load(row + j); });
  }
}

// Up the tree, from the root: body(slot, element) gives the pair whose first element went down.
// Level 0 goes to write(j, vector), every other one to `low`.
template <class T, class Write, class Body>
SOLERA_INLINE void up(const GivensPlan& p, const A<T>* root, A<T>* low, const Write& write,
                      const Body& body) {
  constexpr int L = kLanes<T>;
  if (p.levels == 0) return write(0, load(root));
  for (int i = 0; i < kGivensPad; i += L) store(low + p.low_at(p.levels) + i, load(root + i));
  const auto level = [&](int l, const auto& to) {
    const int64_t at = p.first[l], from = p.low_at(l + 1), count = p.first[l + 1] - at;
    for (int64_t k = 0; k < count; k += L) {
      const Pair<T> v = body(at + k, load(low + from + k));
      to(2 * k, joined_low(v.first, v.second));
      to(2 * k + L, joined_high(v.first, v.second));
    }
  };
  for (int l = p.levels - 1; l > 0; --l) {
    A<T>* row = low + p.low_at(l);
    level(l, [&](int64_t j, AccVec<T> v) { store(row + j, v); });
  }
  level(0, write);
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
