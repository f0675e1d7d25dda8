// The table of gram's kernels, which model_stock calls too.
#pragma once

#include "tiles.h"

namespace solera {

struct GramItem {
  const WeightStream* streams;  // K of them
  WeightStream base;            // data may be null
  int count;                    // K
};

constexpr int kGramTile = 1024;

struct GramTable {
  // Indexed by accumulator: 0 float, 1 double. scratch holds (K + 1) tiles of doubles, as many
  // pointers, and a vector of doubles for each of the K (K + 1) / 2 pairs.
  // sums: null, or where the sum of the count deltas goes, as accumulators.
  void (*forward[2])(const GramItem&, int64_t offset, int64_t count, double* pairs, void* sums,
                     bool streaming, void* scratch);
  // factors is (K + 1, K); outputs has K + 1, the base's last, data null where none is wanted.
  void (*backward[2])(const GramItem&, const double* factors, const WeightOutput* outputs,
                      int64_t offset, int64_t count, bool streaming, void* scratch);
  // out = base + factor * sums; without sums (null) they are formed again.
  void (*move_base[2])(const GramItem&, double factor, const void* sums, const WeightOutput& out,
                       int64_t offset, int64_t count, bool streaming, void* scratch);
};

namespace SOLERA_ISA {
extern const GramTable gram_table;
}

}  // namespace solera
