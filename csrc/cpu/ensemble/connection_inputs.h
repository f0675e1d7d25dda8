// What the torch-facing half of core `connections` hands to its kernels: tensors checked, made
// dense and kept alive, their sizes, and the room that a thread needs.
#pragma once

#include <algorithm>

#include "../parallel.h"
#include "connection_pieces.h"

namespace solera {
namespace {

constexpr int64_t kMostLanes = 16;  // floats in the widest vector
// Outputs past this size do not fit the caches beside their inputs, and are stored past them.
constexpr int64_t kConnectionStreamBytes = int64_t(16) << 20;

// A tensor in the wanted dtype without gaps.
Tensor connection_input(const Tensor& t, ScalarType dtype) {
  return dense(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

struct ConnectionInputs {
  std::vector<Tensor> kept;
  ConnectionPass p{};
  ScalarType own, acc;
  int64_t numbers;
  std::vector<int64_t> streams, tokens, betas;
  ConnectionInputs(const Tensor& h, const OptTensor& out, const OptTensor& out_beta) {
    STD_TORCH_CHECK(h.dim() == 4, "solera: the streams must be (outer, n, inner, D)");
    streams = sizes_of(h);
    const int64_t n = streams[1];
    STD_TORCH_CHECK(n >= 1 && n <= 16, "solera: expected 1 to 16 streams");
    own = h.scalar_type();
    acc = accumulate_type(h);
    tokens = {streams[0], streams[2], streams[3]};
    betas = {streams[0], streams[2], n};
    numbers = n * (n + 2);
    p.tokens = streams[0] * streams[2];
    p.inner = std::max<int64_t>(streams[2], 1);
    p.streams = n;
    p.columns = streams[3];
    p.streaming = h.numel() * int64_t(h.element_size()) >= kConnectionStreamBytes;
    p.h = add(h, own, h.numel());
    if (out.has_value()) {
      STD_TORCH_CHECK(out_beta.has_value(), "solera: out without its weights");
      p.out = add(*out, own, p.tokens * p.columns);
      p.out_beta = add(*out_beta, acc, p.tokens * n);
    }
  }
  const void* add(const Tensor& t, ScalarType dtype, int64_t numel) {
    STD_TORCH_CHECK(t.numel() == numel, "solera: a tensor does not fit the streams");
    kept.push_back(connection_input(t, dtype));
    return kept.back().const_data_ptr();
  }
  const void* add(const OptTensor& t, ScalarType dtype, int64_t numel) {
    return t.has_value() ? add(*t, dtype, numel) : nullptr;
  }
  void parameters(const OptTensor& projection, const OptTensor& constant, const Tensor& fixed,
                  const OptTensor& scale, int64_t kind) {
    const int64_t n = p.streams, D = p.columns;
    p.kind = int(kind);
    p.fixed = add(fixed, acc, numbers);
    if (kind == kFixedConnection) return;
    STD_TORCH_CHECK(projection.has_value() && scale.has_value(), "solera: no projection");
    p.projection =
        add(*projection, acc, kind == kManifoldConnection ? numbers * n * D : (n + 2) * D);
    p.constant = add(constant, acc, numbers);
    p.scale = add(*scale, acc, numbers);
  }
  // Room for the buffers of one thread, in the accumulator's elements.
  int64_t scratch(bool backward) const {
    const int64_t n = p.streams, D = p.columns, lanes = kMostLanes;
    const int64_t block = p.kind == kManifoldConnection ? lanes : 1;
    const int64_t rows = backward ? (3 * n + 1) * block + 1 : n * block;
    return rows * D + block * 5 * numbers + lanes * (numbers + 2 * n * n + 2 * n * p.iterations) +
           64;
  }
};

inline Sizes sizes(const std::vector<int64_t>& v) { return Sizes(v.data(), v.size()); }

}  // namespace
}  // namespace solera
