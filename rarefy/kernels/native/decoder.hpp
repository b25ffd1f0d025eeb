// One step of a Llama-family decoder: embedded tokens in, logits out; any mixture of layouts per linear.
#pragma once
#include "kernels.hpp"
#include <variant>
#include <vector>

namespace rarefy {

using Linear = std::variant<Dense, Bitmask, Grouped>;

struct Layer {
  Linear q, k, v, o, gate, up, down;
  const float *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr;
  const float *input_norm, *post_norm; // [hidden]
};

struct Model {
  i64 hidden, inner, heads, kv_heads, head_dim, vocab, positions;
  float eps;
  const float* final_norm;  // [hidden]
  const float *cos, *sin;   // [positions, head_dim / 2]
  std::vector<Layer> layers;
  Linear head;              // [vocab, hidden]
};

// Keys and values of S sequences: [layers, S, kv_heads, capacity, head_dim] each.
struct Cache {
  float *key, *value;
  i64 sequences, capacity;
};

// N tokens at once: token n of sequence `sequence[n]`, embedded as x[n], stands at `position[n]`; those of one sequence ascend.
struct Tokens {
  const float* x; // [N, hidden]
  const i64 *sequence, *position;
  i64 count;
};

// logits [M, vocab] of the tokens `wanted` [M].
void step(const Kernels&, const Model&, const Cache&, const Tokens&, const i64* wanted, i64 many, float* logits, int threads);

} // namespace rarefy
