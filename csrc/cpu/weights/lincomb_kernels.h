// The table of lincomb's kernels, which row_lincomb calls on rows instead of whole tensors.
#pragma once

#include "tiles.h"

namespace solera {

// One tensor of the list: its K streams, and K coefficients in both accumulator types.
struct LincombItem {
  const WeightStream* streams;
  const float* coefficients;
  const double* coefficients_double;
  WeightStream base;  // data may be null
  int count;          // K
};
struct LincombGradient {
  const void* incoming;  // G
  int dtype;
  WeightOutput* tensors;  // K + 1 of them, the base last; data is null where no gradient is needed
  double* dots;           // K sums of this chunk, or null
};

struct LincombTable {
  // Indexed by accumulator: 0 float, 1 double.
  void (*forward[2])(const LincombItem&, const WeightOutput&, int64_t offset, int64_t count,
                     bool streaming);
  void (*backward[2])(const LincombItem&, const LincombGradient&, int64_t offset, int64_t count,
                      bool streaming);
};

namespace SOLERA_ISA {
extern const LincombTable lincomb_table;
}

}  // namespace solera
