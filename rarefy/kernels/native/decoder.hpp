// One step of a Llama-family decoder: embedded tokens in, logits out; any mixture of layouts per linear.
#pragma once
#include "kernels.hpp"
#include <variant>
#include <vector>

namespace rarefy {

using Linear = std::variant<Dense, Columns, Bitmask, NofM, Blocks, Grouped, GroupedColumns>;

// Which entries of a row stay; the others become zero. NaN stays. Neither thresholds nor a block: all of them.
struct Gate {
  const float* threshold = nullptr; // [channels]: those with not |x| < threshold
  i64 channels = 0;                 // 1: the same for all
  i64 block = 0, keep = 0;          // of every `block` entries the `keep` largest in magnitude, of equal ones the first
  bool open() const { return !threshold && !block; }
  bool same(const Gate& other) const { // with certainty, and at no cost
    return block == other.block && keep == other.keep && channels == other.channels &&
           (threshold == other.threshold || (channels == 1 && other.threshold && *threshold == *other.threshold));
  }
};

struct Projection {
  Linear weight;
  const float* bias = nullptr;
  Gate gate; // of what it reads
};

struct Layer {
  Projection q, k, v, o, gate, up, down;
  Gate units;                          // of silu(gate x), before up x multiplies it
  const float *input_norm = nullptr, *post_norm = nullptr; // [hidden]
};

struct Model {
  i64 hidden, inner, heads, kv_heads, head_dim, vocab, positions;
  i64 align = 4; // a thread's first row: a multiple of the strips and blocks of rows that matrices are stored in
  float eps;
  const float* final_norm = nullptr;               // [hidden]
  const float *cos = nullptr, *sin = nullptr;      // [positions, head_dim / 2]
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
