// Matrices stored column by column: the columns that zeros of x multiply are never read. Every thread owns rows, so that nothing is reduced.
#pragma once
#include "loops.hpp"

namespace rarefy {

constexpr i64 kScan = 256; // entries of x that are looked through before their columns are added

// y [B, O] += the K columns `at`, times x, for the rows from .. to.
template <class V, int K, int B> void add_columns(const Columns& w, const i64* at, const float* x, float* y, i64 from, i64 to) {
  using reg = typename V::reg;
  const float* column[K];
  reg in[K][B];
  for (int k = 0; k < K; k++) {
    column[k] = w.values + at[k] * w.rows;
    for (int b = 0; b < B; b++) in[k][b] = V::set(x[b * w.columns + at[k]]);
  }
  i64 row = from;
  for (; row + V::width <= to; row += V::width) {
    reg sum[B];
    for (int b = 0; b < B; b++) sum[b] = V::load(y + b * w.rows + row);
    for (int k = 0; k < K; k++) {
      const reg weight = V::load(column[k] + row);
      for (int b = 0; b < B; b++) sum[b] = V::fma(weight, in[k][b], sum[b]);
    }
    for (int b = 0; b < B; b++) V::store(y + b * w.rows + row, sum[b]);
  }
  if (row == to) return;
  const int left = int(to - row);
  for (int b = 0; b < B; b++) {
    reg sum = V::load_part(y + b * w.rows + row, left);
    for (int k = 0; k < K; k++) sum = V::fma(V::load_part(column[k] + row, left), in[k][b], sum);
    V::store_part(y + b * w.rows + row, sum, left);
  }
}

// B rows of x at once: a column is read once for all of them, and not at all where it is zero in each.
template <class V, int B> void columns_rows(const Columns& w, const float* x, const float* bias, float* y, i64 from, i64 to) {
  constexpr int K = V::registers / (B < 2 ? 2 : B) / 2; // columns whose entries of x stay in registers
  for (int b = 0; b < B; b++)
    for (i64 row = from; row < to; row++) y[b * w.rows + row] = bias ? bias[row] : 0.0f;
  i64 live[kScan + K];
  int n = 0;
  for (i64 next = 0; next < w.columns;) {
    for (const i64 end = std::min(next + kScan, w.columns); next < end; next++) {
      bool any = false;
      for (int b = 0; b < B; b++) any |= x[b * w.columns + next] != 0;
      live[n] = next;
      n += any;
    }
    int k = 0;
    for (; k + K <= n; k += K) add_columns<V, K, B>(w, live + k, x, y, from, to);
    std::copy(live + k, live + n, live);
    n -= k;
  }
  for (int k = 0; k < n; k++) add_columns<V, 1, B>(w, live + k, x, y, from, to);
}

template <class V> void columns(const Columns& w, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to) {
  if (from == to) return;
  i64 b = 0;
  for (; b + 4 <= batch; b += 4) columns_rows<V, 4>(w, x + b * w.columns, bias, y + b * w.rows, from, to);
  for (; b + 2 <= batch; b += 2) columns_rows<V, 2>(w, x + b * w.columns, bias, y + b * w.rows, from, to);
  if (b < batch) columns_rows<V, 1>(w, x + b * w.columns, bias, y + b * w.rows, from, to);
}

} // namespace rarefy
