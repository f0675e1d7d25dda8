// Steps of sharpness-aware minimisation over lists of parameters, and noise in proportion to norms.
//
//   perturb_norms  ||(|w| + eta) g|| of each tensor: reads w and g
//   perturb_       w <- w + f T^2 g, T = 1 or |w| + eta; the old values are kept if asked for
//                  reads w, g, writes w (12 bytes an element in float32), and writes the kept
//                  values
//   noise_         w <- w + f z, z normal, a function of (seed, tensor, element): reads and writes
//   w;
//                  Philox and the inverse of the normal distribution are about 60 instructions for
//                  a vector of elements, and hide behind the memory
//
// Sums over tiles of 1024 in vector lanes, over tiles and pieces in double, in order. No fused
// multiply-adds, so that every backend and instruction set gives the noise the same bits.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "../norm/grad_tiles.h"
#include "mask.h"

namespace solera {

struct PerturbItem {
  void *w, *kept, *out;  // of w's dtype; kept may be null, out is w in place
  const void* g;
  int w_dtype, g_dtype;
  double factor, eta;
  bool adaptive, streaming;
};
struct NoiseItem {
  void* w;
  int dtype;
  double factor;
  uint64_t seed;
  uint32_t tensor;
};

struct PerturbTable {
  // Indexed by accumulator: 0 float, 1 double.
  double (*norm[2])(const PerturbItem&, int64_t begin, int64_t end);
  void (*step_mixed[2])(const PerturbItem&, int64_t begin, int64_t end);
  void (*noise[2])(const NoiseItem&, int64_t begin, int64_t end);   // begin a multiple of 1024
  void (*step[4])(const PerturbItem&, int64_t begin, int64_t end);  // by dtype
};

namespace SOLERA_ISA {
namespace {

template <class V>
SOLERA_INLINE V size_of(V x) {
  return x < 0 ? -x : x;
}

// Past the caches where asked for: what is kept is not read again before a whole forward and
// backward.
SOLERA_INLINE void keep_bytes(const void* from, void* to, int64_t bytes, bool streaming) {
  if (!streaming || bytes % 4 != 0) {
    memcpy(to, from, size_t(bytes));
    return;
  }
  float* out = (float*)to;
  const bool stream = can_stream(out);
  strips<kLanes<float>>(bytes / 4, [&](int64_t j, int m) {
    put(out + j, get((const float*)from + j, m), m, stream);
  });
}

template <class T>
double norm(const PerturbItem& p, int64_t begin, int64_t end) {
  T w_tile[kGradTile], g_tile[kGradTile];
  const T eta = T(p.eta);
  double total = 0;
  grad_tiles(begin, end, [&](int64_t at, int n) {
    const T* w = read_tile<T>(p.w, p.w_dtype, at, n, w_tile);
    const T* g = read_tile<T>(p.g, p.g_dtype, at, n, g_tile);
    total += double(row_sum<T>(n, [&](int64_t j, int m) {
      const AccVec<T> x = (size_of(get(w + j, m)) + eta) * get(g + j, m);
      return x * x;
    }));
  });
  return total;
}

template <class V, class T>
SOLERA_INLINE V moved(V old, V g, T factor, T eta, bool adaptive) {
  if (!adaptive) return old + factor * g;
  const V t = size_of(old) + eta;
  return old + factor * (t * t * g);
}

// Parameter and gradient of one dtype.
template <class S>
void step(const PerturbItem& p, int64_t begin, int64_t end) {
  const A<S> factor = A<S>(p.factor), eta = A<S>(p.eta);
  S* result = (S*)p.out;
  const bool stream = p.streaming && p.out != p.w && can_stream(result + begin);
  with_flag(p.adaptive, [&](auto adaptive) {
    grad_tiles(begin, end, [&](int64_t at, int n) {
      const S *w = (const S*)p.w + at, *g = (const S*)p.g + at;
      if (p.kept != nullptr) keep_bytes(w, (S*)p.kept + at, n * int64_t(sizeof(S)), p.streaming);
      strips<kLanes<S>>(n, [&](int64_t j, int m) {
        put(result + at + j,
            moved(get(w + j, m), get(g + j, m), factor, eta, decltype(adaptive)::value), m, stream);
      });
    });
  });
  if (p.streaming) stream_fence();
}

// Of two dtypes, by tiles of accumulators.
template <class T>
void step_mixed(const PerturbItem& p, int64_t begin, int64_t end) {
  T w_tile[kGradTile], g_tile[kGradTile];
  const T factor = T(p.factor), eta = T(p.eta);
  const int64_t bytes = p.w_dtype == kFloat64 ? 8 : p.w_dtype == kFloat32 ? 4 : 2;
  grad_tiles(begin, end, [&](int64_t at, int n) {
    if (p.kept != nullptr)
      keep_bytes((const char*)p.w + at * bytes, (char*)p.kept + at * bytes, n * bytes, p.streaming);
    const T* w = read_tile<T>(p.w, p.w_dtype, at, n, w_tile);
    const T* g = read_tile<T>(p.g, p.g_dtype, at, n, g_tile);
    T* out = open_tile<T>(p.out, p.w_dtype, at, w_tile);
    strips<kLanes<T>>(n, [&](int64_t j, int m) {
      put(out + j, moved(get(w + j, m), get(g + j, m), factor, eta, p.adaptive), m);
    });
    close_tile<T>(p.out, p.w_dtype, at, n, w_tile);
  });
  if (p.streaming) stream_fence();
}

// Normal from 32 random bits: the inverse of the distribution at the middle of one of 2^24 equal
// parts, by Giles' polynomials; log as Cephes has it. Written out step by step: the other backends
// take the same steps.
SOLERA_INLINE vf normal_of(vu word) {
  const vi part = __builtin_convertvector(word >> 8, vi);
  const vf x = __builtin_convertvector(part * 2 - 16777215, vf) * 0x1p-24f;
  const vu bits = bits_as<vu>((1.0f - x) * (1.0f + x));
  const vf m = bits_as<vf>((bits & 0x7fffffu) | 0x3f000000u);
  const vf low = m < 0.70710678f ? splat(1.0f) : splat(0.0f);
  const vf e = __builtin_convertvector((vi)(bits >> 23) - 126, vf) - low;
  const vf t = (m + low * m) - 1.0f;
  const vf s = t * t;
  vf p = t * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * t + 1.1676998740e-1f;
  p = p * t + -1.2420140846e-1f;
  p = p * t + 1.4249322787e-1f;
  p = p * t + -1.6668057665e-1f;
  p = p * t + 2.0000714765e-1f;
  p = p * t + -2.4999993993e-1f;
  p = p * t + 3.3333331174e-1f;
  const vf rest = (p * t * s + e * -2.12194440e-4f) + s * -0.5f;
  const vf y = -((t + rest) + e * 0.693359375f);
  const vf v = y - 2.5f;
  vf a = v * 2.81022636e-08f + 3.43273939e-07f;
  a = a * v + -3.5233877e-06f;
  a = a * v + -4.39150654e-06f;
  a = a * v + 0.00021858087f;
  a = a * v + -0.00125372503f;
  a = a * v + -0.00417768164f;
  a = a * v + 0.246640727f;
  a = a * v + 1.50140941f;
  const vf u = vector_root(y < 0 ? splat(0.0f) : y) - 3.0f;
  vf b = u * -0.000200214257f + 0.000100950558f;
  b = b * u + 0.00134934322f;
  b = b * u + -0.00367342844f;
  b = b * u + 0.00573950773f;
  b = b * u + -0.0076224613f;
  b = b * u + 0.00943887047f;
  b = b * u + 1.00167406f;
  b = b * u + 2.83297682f;
  return (y < 5.0f ? a : b) * x * 1.41421354f;
}

template <class T>
void noise(const NoiseItem& p, int64_t begin, int64_t end) {
  T tile[kGradTile], z[kGradTile];
  uint32_t words[kGradTile];
  const T factor = T(p.factor);
  grad_tiles(begin, end, [&](int64_t at, int n) {
    for (int k = 0; k < n; k += int(kMaskChunk))
      mask_chunk((at + k) / kMaskChunk, p.tensor, 0, p.seed, words + k);
    for (int k = 0; k < n; k += kLanes<float>) {
      vu word;
      memcpy(&word, words + k, sizeof word);
      const vf value = normal_of(word);
      for (int i = 0; i < kLanes<float>; ++i) z[k + i] = T(value[i]);
    }
    const T* w = read_tile<T>(p.w, p.dtype, at, n, tile);
    T* out = open_tile<T>(p.w, p.dtype, at, tile);
    strips<kLanes<T>>(
        n, [&](int64_t j, int m) { put(out + j, get(w + j, m) + factor * get(z + j, m), m); });
    close_tile<T>(p.w, p.dtype, at, n, tile);
  });
}

}  // namespace

extern const PerturbTable perturb_table;
const PerturbTable perturb_table = {
    {norm<float>, norm<double>},
    {step_mixed<float>, step_mixed<double>},
    {noise<float>, noise<double>},
    {step<float>, step<double>, step<bf16>, step<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <cmath>

#include "../norm/grad_lists.h"

namespace solera {

SOLERA_PICK(PerturbTable, perturb_table)

namespace {

// Kept values past this size are written past the caches.
constexpr int64_t kPerturbStreamBytes = int64_t(16) << 20;

bool perturb_wide(const PerturbItem& p) { return p.w_dtype == kFloat64 || p.g_dtype == kFloat64; }

Tensor perturb_norms(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
                     double eta) {
  const size_t count = parameters.size();
  STD_TORCH_CHECK(count > 0 && grads.size() == count,
                  "perturb_norms: expected two lists of one length, not empty");
  const auto& table = pick_perturb_table();
  std::vector<GradMemory> memory;
  std::vector<PerturbItem> items;
  memory.reserve(2 * count);
  items.reserve(count);
  GradPieces pieces;
  for (size_t l = 0; l < count; ++l) {
    STD_TORCH_CHECK(same_sizes(parameters[l], grads[l]), "perturb_norms: gradient ", l,
                    " differs in shape from its parameter");
    memory.emplace_back(parameters[l], parameters[l].is_contiguous(), false);
    memory.emplace_back(grads[l], grads[l].is_contiguous(), false);
    const GradMemory &w = memory[2 * l], &g = memory[2 * l + 1];
    items.push_back({w.data, nullptr, w.data, g.data, w.dtype, g.dtype, 0, eta, true, false});
    pieces.add(l, parameters[l].numel(), 1);
  }
  std::vector<double> partial(pieces.all().size()), found(count);
  pieces.parallel(8, [&](const GradPiece& p, size_t i) {
    const PerturbItem& item = items[p.item];
    partial[i] = table.norm[perturb_wide(item)](item, p.begin, p.end);
  });
  for (size_t i = 0; i < partial.size(); ++i) found[pieces.all()[i].item] += partial[i];
  for (double& value : found) value = std::sqrt(value);
  return grad_result(found, parameters[0], any_double(parameters) || any_double(grads));
}

// Into `out`, which may be the parameters themselves; their old values into `kept`, if it is not
// empty.
void run_perturb(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
                 const Tensor& factors_in, std::optional<double> eta,
                 const std::vector<Tensor>& kept, const std::vector<Tensor>& out) {
  const size_t count = parameters.size();
  STD_TORCH_CHECK(
      grads.size() == count && out.size() == count && (kept.empty() || kept.size() == count),
      "perturb_: expected as many gradients and other tensors as parameters");
  const auto& table = pick_perturb_table();
  const bool shared = factors_in.dim() == 0, in_place = &out == &parameters;
  const std::vector<double> factors = grad_numbers(factors_in, shared ? 1 : int64_t(count));
  std::vector<GradMemory> memory;
  std::vector<PerturbItem> items;
  memory.reserve(3 * count);
  items.reserve(count);
  GradPieces pieces;
  int64_t bytes = 0;
  const std::vector<Tensor>& fresh = in_place ? kept : out;
  for (const Tensor& t : fresh) bytes += t.numel() * int64_t(t.element_size());
  for (size_t l = 0; l < count; ++l) {
    const Tensor &w = parameters[l], &g = grads[l], &f = fresh.empty() ? w : fresh[l];
    STD_TORCH_CHECK(same_sizes(w, g), "perturb_: gradient ", l,
                    " differs in shape from its parameter");
    STD_TORCH_CHECK(same_sizes(w, f) && dtype_of(w) == dtype_of(f), "perturb_: tensor ", l,
                    " to be written differs in shape or dtype from its parameter");
    memory.emplace_back(w, w.is_contiguous(), in_place);
    memory.emplace_back(g, g.is_contiguous(), false);
    memory.emplace_back(f, f.is_contiguous(), !fresh.empty());
    const GradMemory &x = memory[3 * l], &y = memory[3 * l + 1], &z = memory[3 * l + 2];
    items.push_back({x.data, in_place && !kept.empty() ? z.data : nullptr,
                     in_place ? x.data : z.data, y.data, x.dtype, y.dtype, factors[shared ? 0 : l],
                     eta.value_or(0), eta.has_value(), bytes >= kPerturbStreamBytes});
    pieces.add(l, w.numel(), 1);
  }
  pieces.parallel(fresh.empty() ? 12 : 16, [&](const GradPiece& p, size_t) {
    const PerturbItem& item = items[p.item];
    const auto kernel = item.w_dtype == item.g_dtype ? table.step[item.w_dtype]
                                                     : table.step_mixed[perturb_wide(item)];
    kernel(item, p.begin, p.end);
  });
  for (size_t l = 0; l < count; ++l) {
    if (in_place) memory[3 * l].put_back(parameters[l]);
    if (!fresh.empty()) memory[3 * l + 2].put_back(fresh[l]);
  }
}

void perturb_(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
              const Tensor& factors, std::optional<double> eta, const std::vector<Tensor>& kept) {
  run_perturb(parameters, grads, factors, eta, kept, parameters);
}

void perturb_out(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
                 const Tensor& factors, std::optional<double> eta, const std::vector<Tensor>& out) {
  run_perturb(parameters, grads, factors, eta, {}, out);
}

void noise_(const std::vector<Tensor>& parameters, const Tensor& norms_in,
            const std::vector<double>& scales, int64_t seed, const std::vector<int64_t>& keys) {
  const size_t count = parameters.size();
  STD_TORCH_CHECK(scales.size() == count && keys.size() == count,
                  "noise_: expected as many scales and keys as parameters");
  const auto& table = pick_perturb_table();
  const bool shared = norms_in.dim() == 0;
  const std::vector<double> norms = grad_numbers(norms_in, shared ? 1 : int64_t(count));
  std::vector<GradMemory> memory;
  std::vector<NoiseItem> items;
  memory.reserve(count);
  items.reserve(count);
  GradPieces pieces;
  for (size_t l = 0; l < count; ++l) {
    memory.emplace_back(parameters[l], parameters[l].is_contiguous(), true);
    items.push_back({memory[l].data, memory[l].dtype, norms[shared ? 0 : l] * scales[l],
                     uint64_t(seed), uint32_t(keys[l])});
    pieces.add(l, parameters[l].numel(), 1);
  }
  pieces.parallel(8, [&](const GradPiece& p, size_t) {
    const NoiseItem& item = items[p.item];
    table.noise[item.dtype == kFloat64](item, p.begin, p.end);
  });
  for (size_t l = 0; l < count; ++l) memory[l].put_back(parameters[l]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("perturb_norms", TORCH_BOX(&perturb_norms));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("perturb_out", TORCH_BOX(&perturb_out));
  m.impl("noise_", TORCH_BOX(&noise_));
}

}  // namespace solera
#endif  // SOLERA_FRONT
