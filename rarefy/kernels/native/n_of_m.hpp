// n of every m columns: a vector of slots picks its numbers of x by the positions.
//   V::index, V::positions<Bits>(p): lane j is the position of slot j, from V::width / 8 * Bits bytes
//   V::pick<N>(x, positions): for N of 4, lane j is x[4 * (j / N) + position], reading 4 * V::width / N numbers of x
//   V::pick_any(x, base, positions): lane j is x[base[j] + position]
#pragma once
#include "loops.hpp"

namespace rarefy {

// The first columns of the groups that V::width * n slots belong to; the next as many slots begin V::width * m columns later.
template <class V> struct Bases {
  std::int32_t column[8 * V::width];
  explicit Bases(const NofM& w) {
    for (int s = 0; s < w.n * V::width; s++) column[s] = s / w.n * w.m;
  }
};

// N of 4, or with N = 0 any n of m.
template <class V, int N, int Bits, int B> void n_of_m_row(const NofM& w, const Bases<V>& base, i64 row, const float* x, const float* bias, float* y) {
  using reg = typename V::reg;
  constexpr int chains = B <= 2 ? 4 : B <= 4 ? 2 : 1;
  const i64 slots = w.slots();
  const float* values = w.values + row * slots;
  const std::uint8_t* positions = w.positions + row * w.bytes();
  reg sum[chains][B];
#pragma GCC unroll 16
  for (int u = 0; u < chains; u++)
#pragma GCC unroll 16
    for (int b = 0; b < B; b++) sum[u][b] = V::zero();
  int phase = 0;
  i64 column = 0; // of the slots in `base`
  const auto step = [&](int u, i64 s) {
    const typename V::index at = V::template positions<Bits>(positions + s / 8 * Bits);
    const reg weight = V::load(values + s);
    prefetch(values + s);
#pragma GCC unroll 16
    for (int b = 0; b < B; b++) {
      const float* in = x + b * w.columns;
      if constexpr (N > 0)
        sum[u][b] = V::fma(weight, V::template pick<N>(in + s / N * 4, at), sum[u][b]);
      else
        sum[u][b] = V::fma(weight, V::pick_any(in + column, base.column + phase, at), sum[u][b]);
    }
    if (N == 0 && (phase += V::width) == w.n * V::width) phase = 0, column += V::width * w.m;
  };
  const i64 safe = N > 0 ? w.columns / 4 * N : slots; // pick reads all four columns of a group, and the last group may have fewer
  i64 s = 0;
  for (; s + chains * V::width <= safe; s += chains * V::width) {
    prefetch(positions + s / 8 * Bits);
#pragma GCC unroll 4
    for (int u = 0; u < chains; u++) step(u, s + u * V::width);
  }
  for (; s + V::width <= safe; s += V::width) step(0, s);
  float rest[B] = {};
  for (; s < slots; s++) {
    const i64 from = s / w.n * w.m + w.position(positions, s);
    for (int b = 0; b < B; b++) rest[b] += values[s] * x[b * w.columns + from];
  }
#pragma GCC unroll 16
  for (int b = 0; b < B; b++) {
    reg all = sum[0][b];
    for (int u = 1; u < chains; u++) all = V::add(all, sum[u][b]);
    y[b * w.rows + row] = V::sum(all) + rest[b] + (bias ? bias[row] : 0.0f);
  }
}

template <class V, int B> void n_of_m_rows(const NofM& w, const float* x, const float* bias, float* y, i64 from, i64 to) {
  const auto one = w.m == 4 && w.n == 1   ? n_of_m_row<V, 1, 2, B>
                   : w.m == 4 && w.n == 2 ? n_of_m_row<V, 2, 2, B>
                   : w.bits == 1          ? n_of_m_row<V, 0, 1, B>
                   : w.bits == 2          ? n_of_m_row<V, 0, 2, B>
                                          : n_of_m_row<V, 0, 3, B>;
  const Bases<V> base(w);
  for (i64 row = from; row < to; row++) one(w, base, row, x, bias, y);
}

template <class V> void n_of_m(const NofM& w, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to) {
  static constexpr RowsOf<NofM> tile[kTile] = {n_of_m_rows<V, 1>, n_of_m_rows<V, 2>, n_of_m_rows<V, 3>, n_of_m_rows<V, 4>,
                                               n_of_m_rows<V, 5>, n_of_m_rows<V, 6>, n_of_m_rows<V, 7>, n_of_m_rows<V, 8>};
  over_batch(tile, w, x, bias, y, batch, from, to);
}

} // namespace rarefy
