// A matrix times rows of x that lie anywhere: what an expert does to the rows it is given. Each row of weights is read once.
#pragma once
#include "loops.hpp"

namespace rarefy {

constexpr int kHigh = 4; // rows of weights that share the loads of x

// kHigh rows of weights, of which `live` are there, against B rows of x. y [B, rows].
template <class V, int B, bool First> void scattered_tile(const float* const (&w)[kHigh], i64 columns, const float* const* x, const float* bias, float* y, i64 rows, int live) {
  using reg = typename V::reg;
  reg sum[B][kHigh];
  for (int b = 0; b < B; b++)
    for (int r = 0; r < kHigh; r++) sum[b][r] = V::zero();
  i64 column = 0;
  for (; column + V::width <= columns; column += V::width) {
    reg in[B];
    for (int b = 0; b < B; b++) in[b] = V::load(x[b] + column);
    for (int r = 0; r < kHigh; r++) {
      const reg weight = V::load(w[r] + column);
      if (First) prefetch(w[r] + column);
      for (int b = 0; b < B; b++) sum[b][r] = V::fma(weight, in[b], sum[b][r]);
    }
  }
  if (column < columns) {
    const int left = int(columns - column);
    for (int r = 0; r < kHigh; r++) {
      const reg weight = V::load_part(w[r] + column, left);
      for (int b = 0; b < B; b++) sum[b][r] = V::fma(weight, V::load_part(x[b] + column, left), sum[b][r]);
    }
  }
  for (int b = 0; b < B; b++) {
    float four[kHigh];
    V::sum4(sum[b], four);
    for (int r = 0; r < live; r++) y[b * rows + r] = four[r] + (bias ? bias[r] : 0.0f);
  }
}

template <class V> using ScatteredTile = void (*)(const float* const (&)[kHigh], i64, const float* const*, const float*, float*, i64, int);

// As many rows of x at once as leave registers for the weights, in tiles of almost equal size: kHigh rows of weights stay in the first cache meanwhile.
template <class V> void scattered(const Dense& w, const float* const* x, const float* bias, float* y, i64 batch, i64 from, i64 to) {
  constexpr int most = V::registers >= 32 ? 6 : 3;
  static constexpr ScatteredTile<V> first[] = {scattered_tile<V, 1, true>, scattered_tile<V, 2, true>, scattered_tile<V, 3, true>,
                                               scattered_tile<V, 4, true>, scattered_tile<V, 5, true>, scattered_tile<V, 6, true>};
  static constexpr ScatteredTile<V> more[] = {scattered_tile<V, 1, false>, scattered_tile<V, 2, false>, scattered_tile<V, 3, false>,
                                              scattered_tile<V, 4, false>, scattered_tile<V, 5, false>, scattered_tile<V, 6, false>};
  for (i64 row = from; row < to; row += kHigh) {
    const int live = int(std::min<i64>(kHigh, to - row));
    const float* at[kHigh];
    for (int r = 0; r < kHigh; r++) at[r] = w.values + (row + std::min(r, live - 1)) * w.columns;
    i64 b = 0;
    for (i64 tiles = (batch + most - 1) / most; tiles > 0; tiles--) {
      const i64 size = (batch - b + tiles - 1) / tiles;
      (b == 0 ? first : more)[size - 1](at, w.columns, x + b, bias ? bias + row : nullptr, y + b * w.rows + row, w.rows, live);
      b += size;
    }
  }
}

} // namespace rarefy
