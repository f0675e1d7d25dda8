// What `solera info` asks the library itself: the instruction set that the kernels were picked
// from.
#ifdef SOLERA_FRONT
#include "../parallel.h"

extern "C" __attribute__((visibility("default"))) const char* solera_cpu_isa() {
  switch (solera::isa()) {
    case solera::Isa::avx512:
      return "avx512";
    case solera::Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}
#endif  // SOLERA_FRONT
