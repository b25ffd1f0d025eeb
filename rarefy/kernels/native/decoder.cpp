// Every thread runs the whole step and computes its share of the rows; a barrier stands where one needs what others wrote.
// What is cheap (norms, rounding to 8 bits) each thread does for itself, which saves barriers.
#include "gates.hpp"
#include "scratch.hpp"
#include "threads.hpp"
#include <algorithm>
#include <cmath>
#include <cstring>

namespace rarefy {
namespace {

struct Scratch { // of one thread
  std::vector<float> in, gated, filled, units, score;
  Rounding rounding;
  std::vector<std::uint32_t> sorted;
  std::vector<i64> rows;
  Rounded rounded{};
  const float *rounded_of = nullptr, *gated_of = nullptr;
  const Gate* gate = nullptr;
};

struct Shared { // [N, .] of all threads
  std::vector<float> x, q, k, v, mixed, gate, up;
};

class Worker {
public:
  Worker(const Kernels& kernels, const Model& model, const Cache& cache, const Tokens& tokens, Shared& shared, int thread, int threads)
      : run(kernels), m(model), cache(cache), tokens(tokens), n(tokens.count), s(shared), t(thread), all(threads) {
    mine.in.resize(n * std::max(m.hidden, std::max(m.inner, m.heads * m.head_dim)));
  }

  void forward(const i64* wanted, i64 many, float* logits) {
    if (t == 0)
      std::memcpy(s.x.data(), tokens.x, n * m.hidden * sizeof(float));
    wait();
    for (std::size_t l = 0; l < m.layers.size(); l++) layer(m.layers[l], i64(l));
    for (i64 r = 0; r < many; r++) norm(&s.x[wanted[r] * m.hidden], m.final_norm, &mine.in[r * m.hidden]);
    fresh();
    product(m.head, mine.in.data(), nullptr, logits, many);
  }

private:
  void layer(const Layer& w, i64 l) {
    for (i64 r = 0; r < n; r++) norm(&s.x[r * m.hidden], w.input_norm, &mine.in[r * m.hidden]);
    fresh();
    linear(w.q, mine.in.data(), m.hidden, s.q.data());
    linear(w.k, mine.in.data(), m.hidden, s.k.data());
    linear(w.v, mine.in.data(), m.hidden, s.v.data());
    wait();
    remember(l);
    wait();
    attend(l);
    wait();
    add_linear(w.o, s.mixed.data(), m.heads * m.head_dim);
    wait();
    for (i64 r = 0; r < n; r++) norm(&s.x[r * m.hidden], w.post_norm, &mine.in[r * m.hidden]);
    fresh();
    mlp(w);
    wait();
    add_linear(w.down, s.up.data(), m.inner);
    wait();
  }

  // up [N, inner] = silu(gate x), gated, times up x.
  void mlp(const Layer& w) {
    linear(w.gate, mine.in.data(), m.hidden, s.gate.data());
    const Share rows = share(m.inner); // what this thread has just written
    for (i64 r = 0; r < n; r++)
      for (i64 i = rows.from; i < rows.to; i++) {
        float& g = s.gate[r * m.inner + i];
        g = g / (1 + std::exp(-g));
      }
    const float* units = gated_units(w.units, rows);
    if (n == 1 && !w.units.open())
      some(w.up, units, rows);
    else
      linear(w.up, mine.in.data(), m.hidden, s.up.data());
    const bool spared = !w.units.open(); // where a unit is zero, up x may not have been computed
    for (i64 r = 0; r < n; r++)
      for (i64 i = r * m.inner + rows.from; i < r * m.inner + rows.to; i++) s.up[i] = spared && units[i] == 0 ? 0.0f : units[i] * s.up[i];
  }

  // [N, inner], of which this thread's rows are right. The largest of a row are known when all threads have written it.
  const float* gated_units(const Gate& g, const Share& rows) {
    if (g.threshold)
      for (i64 r = 0; r < n; r++) below(g, &s.gate[r * m.inner + rows.from], rows.from, rows.to);
    if (!g.block) return s.gate.data();
    wait();
    mine.units.assign(s.gate.begin(), s.gate.end());
    close(g, mine.units.data(), n, m.inner, mine.sorted);
    return mine.units.data();
  }

  // The rows of up whose unit is not zero, for one token; all of them where rows are not stored one by one.
  void some(const Projection& up, const float* units, const Share& share) {
    const Dense* dense = std::get_if<Dense>(&up.weight);
    const Bitmask* bitmask = std::get_if<Bitmask>(&up.weight);
    const Grouped* grouped = std::get_if<Grouped>(&up.weight);
    if (!dense && !bitmask && !grouped) return linear(up, mine.in.data(), m.hidden, s.up.data());
    const float* x = gated(up.gate, mine.in.data(), 1, m.hidden);
    mine.rows.clear();
    for (i64 i = share.from; i < share.to; i++)
      if (units[i] != 0) mine.rows.push_back(i);
    if (dense) run.dense_some(*dense, x, s.up.data(), mine.rows.data(), i64(mine.rows.size()));
    if (grouped) run.grouped_some(*grouped, rounded(x, 1, grouped->columns), s.up.data(), mine.rows.data(), i64(mine.rows.size()));
    if (bitmask)
      for (i64 row : mine.rows) run.bitmask(*bitmask, x, nullptr, s.up.data(), 1, row, row + 1);
  }

  void norm(const float* x, const float* gain, float* out) const {
    const float mean = run.dot(x, x, m.hidden) / float(m.hidden);
    const float scale = 1 / std::sqrt(mean + m.eps);
    for (i64 i = 0; i < m.hidden; i++) out[i] = x[i] * scale * gain[i];
  }

  // y [N, O] = gated(x) W^T + bias, this thread's rows.
  void linear(const Projection& w, const float* x, i64 columns, float* y) { product(w.weight, gated(w.gate, x, n, columns), w.bias, y, n); }

  const float* gated(const Gate& g, const float* x, i64 rows, i64 columns) {
    if (g.open()) return x;
    if (mine.gated_of == x && mine.gate && mine.gate->same(g)) return mine.gated.data(); // q, k and v, and gate and up, read the same
    mine.gated.assign(x, x + rows * columns);
    close(g, mine.gated.data(), rows, columns, mine.sorted);
    fresh();
    mine.gated_of = x, mine.gate = &g;
    return mine.gated.data();
  }

  void product(const Linear& w, const float* x, const float* bias, float* y, i64 batch) {
    std::visit([&](const auto& matrix) { compute(matrix, share(matrix.rows), x, bias, y, batch); }, w);
  }

  void compute(const Dense& w, Share rows, const float* x, const float* bias, float* y, i64 batch) { run.dense(w, x, bias, y, batch, rows.from, rows.to); }
  void compute(const Columns& w, Share rows, const float* x, const float* bias, float* y, i64 batch) { run.columns(w, x, bias, y, batch, rows.from, rows.to); }
  void compute(const Bitmask& w, Share rows, const float* x, const float* bias, float* y, i64 batch) { run.bitmask(w, x, bias, y, batch, rows.from, rows.to); }
  void compute(const NofM& w, Share rows, const float* x, const float* bias, float* y, i64 batch) { run.n_of_m(w, x, bias, y, batch, rows.from, rows.to); }
  void compute(const Blocks& w, Share rows, const float* x, const float* bias, float* y, i64 batch) {
    run.blocks(w, filled(w, x, batch, mine.filled), bias, y, batch, rows.from / w.height, (rows.to + w.height - 1) / w.height);
  }
  void compute(const Grouped& w, Share rows, const float* x, const float* bias, float* y, i64 batch) {
    run.grouped(w, rounded(x, batch, w.columns), bias, y, batch, rows.from, rows.to);
  }
  void compute(const GroupedColumns& w, Share rows, const float* x, const float* bias, float* y, i64 batch) {
    run.grouped_columns(w, rounded(x, batch, w.columns), bias, y, batch, rows.from / w.height(), (rows.to + w.height() - 1) / w.height());
  }

  Share share(i64 rows) const { return {rows, t, all, m.align}; }

  // x [N, hidden] += in W^T, this thread's rows.
  void add_linear(const Projection& w, const float* in, i64 columns) {
    fresh();
    std::vector<float>& y = mine.score;
    y.resize(n * m.hidden);
    linear(w, in, columns, y.data());
    const Share rows = share(m.hidden);
    for (i64 r = 0; r < n; r++) run.add(&s.x[r * m.hidden + rows.from], &y[r * m.hidden + rows.from], 1.0f, rows.to - rows.from);
  }

  void fresh() { mine.rounded_of = mine.gated_of = nullptr; }

  const Rounded& rounded(const float* x, i64 batch, i64 columns) {
    if (mine.rounded_of != x) {
      mine.rounded = mine.rounding.room(batch, columns);
      run.round(x, batch, columns, mine.rounded);
      mine.rounded_of = x;
    }
    return mine.rounded;
  }

  float* key(i64 l, i64 sequence, i64 head, i64 position) const { return cache.key + place(l, sequence, head, position); }
  float* value(i64 l, i64 sequence, i64 head, i64 position) const { return cache.value + place(l, sequence, head, position); }
  i64 place(i64 l, i64 sequence, i64 head, i64 position) const {
    return (((l * cache.sequences + sequence) * m.kv_heads + head) * cache.capacity + position) * m.head_dim;
  }

  void rotate(float* x, i64 position) const {
    const i64 half = m.head_dim / 2;
    const float *cos = m.cos + position * half, *sin = m.sin + position * half;
    for (i64 i = 0; i < half; i++) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
  }

  // Rotate this thread's share of queries and keys, and write keys and values to the cache.
  void remember(i64 l) {
    for (i64 job = t; job < n * m.kv_heads; job += all) {
      const i64 r = job / m.kv_heads, head = job % m.kv_heads, group = m.heads / m.kv_heads;
      for (i64 h = head * group; h < (head + 1) * group; h++) rotate(&s.q[(r * m.heads + h) * m.head_dim], tokens.position[r]);
      float* k = &s.k[(r * m.kv_heads + head) * m.head_dim];
      rotate(k, tokens.position[r]);
      std::memcpy(key(l, tokens.sequence[r], head, tokens.position[r]), k, m.head_dim * sizeof(float));
      std::memcpy(value(l, tokens.sequence[r], head, tokens.position[r]), &s.v[(r * m.kv_heads + head) * m.head_dim], m.head_dim * sizeof(float));
    }
  }

  void attend(i64 l) {
    const i64 group = m.heads / m.kv_heads;
    const float scale = 1 / std::sqrt(float(m.head_dim));
    for (i64 job = t; job < n * m.heads; job += all) {
      const i64 r = job / m.heads, h = job % m.heads, length = tokens.position[r] + 1;
      const float* q = &s.q[(r * m.heads + h) * m.head_dim];
      const float* keys = key(l, tokens.sequence[r], h / group, 0);
      const float* values = value(l, tokens.sequence[r], h / group, 0);
      mine.score.resize(std::max<std::size_t>(mine.score.size(), length));
      float most = -INFINITY, total = 0;
      for (i64 p = 0; p < length; p++) most = std::max(most, mine.score[p] = scale * run.dot(q, keys + p * m.head_dim, m.head_dim));
      float* out = &s.mixed[(r * m.heads + h) * m.head_dim];
      std::fill(out, out + m.head_dim, 0.0f);
      for (i64 p = 0; p < length; p++) {
        const float e = std::exp(mine.score[p] - most);
        total += e;
        run.add(out, values + p * m.head_dim, e, m.head_dim);
      }
      for (i64 i = 0; i < m.head_dim; i++) out[i] /= total;
    }
  }

  static void wait() { barrier(); }

  const Kernels& run;
  const Model& m;
  const Cache& cache;
  const Tokens& tokens;
  const i64 n;
  Shared& s;
  const int t, all;
  Scratch mine;
};

} // namespace

void step(const Kernels& kernels, const Model& m, const Cache& cache, const Tokens& tokens, const i64* wanted, i64 many, float* logits, int threads) {
  const i64 n = tokens.count;
  Shared shared{std::vector<float>(n * m.hidden),           std::vector<float>(n * m.heads * m.head_dim), std::vector<float>(n * m.kv_heads * m.head_dim),
                std::vector<float>(n * m.kv_heads * m.head_dim), std::vector<float>(n * m.heads * m.head_dim), std::vector<float>(n * m.inner),
                std::vector<float>(n * m.inner)};
  team(threads, [&](int thread, int all) { Worker(kernels, m, cache, tokens, shared, thread, all).forward(wanted, many, logits); });
}

} // namespace rarefy
