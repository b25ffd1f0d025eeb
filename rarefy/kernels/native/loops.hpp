// The loops of every kernel, written once over a vector type V; each instruction set instantiates them.
//   V::width, V::reg, zero(), set(f), load(p), load_part(p, n) (then zeros), store_part(p, v, n), add, mul, fma(a, b, c), sum(v), sum4(four v, p): four sums
//   V::expand(values, bits): lane j is the next value where bit j is set, else 0; reads V::width values
//   V::expand_part: the same, and reads no value past the last one set
#pragma once
#include "kernels.hpp"
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace rarefy {

constexpr int kTile = 8; // rows of x that share one pass over a row of weights

// Weights are read once and in order, but the hardware stops at page borders and gives up on short, shifting loads:
// ask for what comes next ourselves, far ahead into the second cache and just ahead into the first.
inline void prefetch(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + (24 << 10), 0, 2);
  __builtin_prefetch(static_cast<const char*>(p) + 512, 0, 3);
}

template <class V> std::uint32_t bits_at(const std::uint8_t* bits, i64 column, i64 bytes) {
  // The bits of columns column .. column + V::width, for a column that is a multiple of 8.
  if (V::width == 8 || (column >> 3) + 1 >= bytes) return bits[column >> 3];
  std::uint16_t two;
  std::memcpy(&two, bits + (column >> 3), 2);
  return two;
}

// The last rows must not read past the values; all others may, which saves masking every load.
template <class V> i64 rows_that_may_overread(const Bitmask& w, i64 from, i64 to) {
  while (to > from && w.start[to] + V::width > w.start[w.rows]) to--;
  return to;
}

// R rows of weights against B rows of x, C vectors of columns at a time. Weights are expanded once and used B times.
template <class V, int R, int C, int B, bool Overread> void bitmask_tile(const Bitmask& w, i64 row, const float* x, const float* bias, float* y) {
  using reg = typename V::reg;
  const i64 bytes = (w.columns + 7) / 8;
  const std::uint8_t* bits[R];
  const float* values[R];
  reg sum[R][C][B];
  for (int r = 0; r < R; r++) {
    bits[r] = w.bits + (row + r) * bytes;
    values[r] = w.values + w.start[row + r];
    for (int c = 0; c < C; c++)
      for (int b = 0; b < B; b++) sum[r][c][b] = V::zero();
  }
  i64 column = 0;
  for (; column + C * V::width <= w.columns; column += C * V::width)
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) {
        const i64 at = column + c * V::width;
        const std::uint32_t m = bits_at<V>(bits[r], at, bytes);
        const reg weight = Overread ? V::expand(values[r], m) : V::expand_part(values[r], m);
        if (Overread) prefetch(values[r]);
        values[r] += __builtin_popcount(m);
        for (int b = 0; b < B; b++) sum[r][c][b] = V::fma(weight, V::load(x + b * w.columns + at), sum[r][c][b]);
      }
  for (; column < w.columns; column += V::width) {
    const int left = int(std::min<i64>(V::width, w.columns - column));
    for (int r = 0; r < R; r++) {
      const std::uint32_t m = bits_at<V>(bits[r], column, bytes);
      const reg weight = V::expand_part(values[r], m);
      values[r] += __builtin_popcount(m);
      for (int b = 0; b < B; b++) sum[r][0][b] = V::fma(weight, V::load_part(x + b * w.columns + column, left), sum[r][0][b]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int b = 0; b < B; b++) {
      reg total = sum[r][0][b];
      for (int c = 1; c < C; c++) total = V::add(total, sum[r][c][b]);
      y[b * w.rows + row + r] = V::sum(total) + (bias ? bias[row + r] : 0.0f);
    }
}

template <class V, int B> void bitmask_rows(const Bitmask& w, const float* x, const float* bias, float* y, i64 from, i64 to) {
  constexpr int R = B > 4 ? 2 : 1, C = B == 1 ? 4 : B <= 4 ? 2 : 1;
  const i64 safe = rows_that_may_overread<V>(w, from, to);
  i64 row = from;
  for (; row + R <= safe; row += R) bitmask_tile<V, R, C, B, true>(w, row, x, bias, y);
  for (; row < to; row++) bitmask_tile<V, 1, 1, B, false>(w, row, x, bias, y);
}

// Four rows of weights against B rows of x: the rows from .. to, or those of a list.
template <class V, int B> void dense_rows_of(const Dense& w, const float* x, const float* bias, float* y, i64 from, i64 to, const i64* list) {
  using reg = typename V::reg;
  constexpr int R = B > 4 ? 2 : 4;
  i64 row = from;
  for (; row < to; row += R) {
    const int live = int(std::min<i64>(R, to - row));
    i64 number[R];
    const float *at[R], *ahead[R]; // ahead: of a list, the rows that come next
    for (int r = 0; r < R; r++) {
      ahead[r] = list ? w.values + list[std::min<i64>(row + R + r, to - 1)] * w.columns : nullptr;
      number[r] = list ? list[row + std::min(r, live - 1)] : row + std::min(r, live - 1);
      at[r] = w.values + number[r] * w.columns;
    }
    reg sum[R][B];
    for (int r = 0; r < R; r++)
      for (int b = 0; b < B; b++) sum[r][b] = V::zero();
    i64 column = 0;
    for (; column + V::width <= w.columns; column += V::width) {
      reg weight[R];
      for (int r = 0; r < R; r++) {
        weight[r] = V::load(at[r] + column);
        if (list)
          __builtin_prefetch(ahead[r] + column, 0, 3);
        else
          prefetch(at[r] + column);
      }
      for (int b = 0; b < B; b++) {
        const reg in = V::load(x + b * w.columns + column);
        for (int r = 0; r < R; r++) sum[r][b] = V::fma(weight[r], in, sum[r][b]);
      }
    }
    if (column < w.columns) {
      const int left = int(w.columns - column);
      reg weight[R];
      for (int r = 0; r < R; r++) weight[r] = V::load_part(at[r] + column, left);
      for (int b = 0; b < B; b++) {
        const reg in = V::load_part(x + b * w.columns + column, left);
        for (int r = 0; r < R; r++) sum[r][b] = V::fma(weight[r], in, sum[r][b]);
      }
    }
    for (int r = 0; r < live; r++)
      for (int b = 0; b < B; b++) y[b * w.rows + number[r]] = V::sum(sum[r][b]) + (bias ? bias[number[r]] : 0.0f);
  }
}

template <class V, int B> void dense_rows(const Dense& w, const float* x, const float* bias, float* y, i64 from, i64 to) {
  dense_rows_of<V, B>(w, x, bias, y, from, to, nullptr);
}

template <class V> void dense_some(const Dense& w, const float* x, float* y, const i64* rows, i64 count) { dense_rows_of<V, 1>(w, x, nullptr, y, 0, count, rows); }

template <class Matrix> using RowsOf = void (*)(const Matrix&, const float*, const float*, float*, i64, i64);

template <class Matrix> void over_batch(const RowsOf<Matrix> (&tile)[kTile], const Matrix& w, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to) {
  for (i64 b = 0; b < batch; b += kTile) tile[std::min<i64>(kTile, batch - b) - 1](w, x + b * w.columns, bias, y + b * w.rows, from, to);
}

template <class V> void bitmask(const Bitmask& w, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to) {
  static constexpr RowsOf<Bitmask> tile[kTile] = {bitmask_rows<V, 1>, bitmask_rows<V, 2>, bitmask_rows<V, 3>, bitmask_rows<V, 4>,
                                                  bitmask_rows<V, 5>, bitmask_rows<V, 6>, bitmask_rows<V, 7>, bitmask_rows<V, 8>};
  over_batch(tile, w, x, bias, y, batch, from, to);
}

template <class V> void dense(const Dense& w, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to) {
  static constexpr RowsOf<Dense> tile[kTile] = {dense_rows<V, 1>, dense_rows<V, 2>, dense_rows<V, 3>, dense_rows<V, 4>,
                                                dense_rows<V, 5>, dense_rows<V, 6>, dense_rows<V, 7>, dense_rows<V, 8>};
  over_batch(tile, w, x, bias, y, batch, from, to);
}

constexpr float kTiny = 0x1p-120f; // 127 / x is beyond float32 for smaller ones

// max |x|; NaN where there is one. Magnitudes compare as their bits do, and comparing integers needs no order.
inline float largest(const float (&x)[kGroup]) {
  std::uint32_t bits[kGroup], most = 0;
  std::memcpy(bits, x, sizeof bits);
  for (std::uint32_t b : bits) most = std::max(most, b & 0x7fffffffu);
  float out;
  std::memcpy(&out, &most, sizeof out);
  return out;
}

template <class V> void round(const float* x, i64 batch, i64 columns, const Rounded& out) {
  for (i64 b = 0; b < batch; b++)
    for (i64 g = 0; g < out.groups; g++) {
      const i64 at = b * out.groups + g;
      float in[kGroup] = {};
      std::memcpy(in, x + b * columns + g * kGroup, std::min<i64>(kGroup, columns - g * kGroup) * sizeof(float));
      const float most = largest(in);
      std::int8_t* code = out.code + at * kGroup;
      if (!(most <= std::numeric_limits<float>::max())) { // a NaN or an infinity: so are all products with this group, and no code of it is a zero to be skipped
        std::fill(code, code + kGroup, std::int8_t(1));
        out.scale[at] = out.sum[at] = NAN;
        continue;
      }
      const float inverse = most < kTiny ? 0 : 127 / most;
      int total = 0;
      for (int i = 0; i < kGroup; i++) {
        const int q = int(std::nearbyint(in[i] * inverse));
        code[i] = std::int8_t(q);
        total += q;
      }
      out.scale[at] = most < kTiny ? 0 : most / 127;
      out.sum[at] = out.scale[at] * float(total);
    }
}

// One row of grouped weights against B rows of x. V::groups stored groups are decoded together and used B times; the scales of
// V::width groups are converted and multiplied together before their codes are used.
//   V::half(p, n): n float16 values, then zeros; V::compress(v, bits): the lanes whose bit is set, moved to the front
//   V::codes<Bits>(p, n): n groups of codes in a register; V::dot(sum, codes, a, b, fa, fb): sum += fa * (codes . a), and fb, b for a second group
//   V::offset8: what V::dot has taken off 8-bit codes already, so that they are signed
//   Listed: the rows that follow in memory are not the next ones, so that nothing is asked for ahead
template <class V, int Bits, int B, bool Skip, bool Listed = false> void grouped_row(const Grouped& w, i64 row, const Rounded& x, i64 first, float* y, float bias) {
  using reg = typename V::reg;
  constexpr i64 bytes = kGroup * Bits / 8;
  constexpr float middle = Bits == 4 ? 8.0f : 128.0f - V::offset8;
  reg sum[B], rest[B];
  const std::int8_t* code[B];
  const float *scale[B], *total[B];
  for (int b = 0; b < B; b++) {
    const i64 at = (first + b) * x.groups;
    code[b] = x.code + at * kGroup, scale[b] = x.scale + at, total[b] = x.sum + at;
    sum[b] = rest[b] = V::zero();
  }
  const std::uint8_t* present = Skip ? w.present + row * ((x.groups + 7) / 8) : nullptr;
  i64 k = w.start[row]; // the next stored group
  for (i64 g = 0; g < x.groups; g += V::width) {
    const int left = int(std::min<i64>(V::width, x.groups - g));
    std::uint32_t live = Skip ? bits_at<V>(present, g, (x.groups + 7) / 8) : (1u << left) - 1;
    const int n = __builtin_popcount(live);
    if (Skip && n == 0) continue;
    const reg ws = V::half(w.scale + k, n);
    reg wz;
    if (w.zero)
      wz = Bits == 8 && V::offset8 != 0 ? V::fma(V::set(V::offset8), ws, V::half(w.zero + k, n)) : V::half(w.zero + k, n);
    else
      wz = V::mul(V::set(-middle), ws);
    alignas(64) float f[B][V::width];
    for (int b = 0; b < B; b++) {
      reg xs = V::load_part(scale[b] + g, left), xz = V::load_part(total[b] + g, left);
      if (Skip) xs = V::compress(xs, live), xz = V::compress(xz, live);
      V::store_part(f[b], V::mul(ws, xs), V::width);
      rest[b] = V::fma(wz, xz, rest[b]);
    }
    const std::uint8_t* at = w.codes + k * bytes;
    for (i64 line = 0; !Listed && line < n * bytes; line += 64) prefetch(at + line);
    k += n;
    for (int u = 0; u < n; u += V::groups) {
      const bool two = V::groups == 2 && u + 1 < n;
      const i64 a = (g + (Skip ? __builtin_ctz(live) : u)) * kGroup;
      if (Skip) live &= live - 1;
      const i64 c = two ? (g + (Skip ? __builtin_ctz(live) : u + 1)) * kGroup : a;
      if (Skip && two) live &= live - 1;
      const auto q = V::template codes<Bits>(at + u * bytes, two ? 2 : 1);
      for (int b = 0; b < B; b++) sum[b] = V::dot(sum[b], q, code[b] + a, code[b] + c, f[b][u], two ? f[b][u + 1] : 0.0f, Bits == 8);
    }
  }
  for (int b = 0; b < B; b++) y[(first + b) * w.rows + row] = V::sum(sum[b]) + V::sum(rest[b]) + bias;
}

template <class V, int Bits, bool Skip> void grouped_rows(const Grouped& w, const Rounded& x, const float* bias, float* y, i64 batch, i64 from, i64 to) {
  for (i64 row = from; row < to; row++) {
    const float add = bias ? bias[row] : 0.0f;
    i64 b = 0;
    for (; b + 4 <= batch; b += 4) grouped_row<V, Bits, 4, Skip>(w, row, x, b, y, add);
    for (; b < batch; b++) grouped_row<V, Bits, 1, Skip>(w, row, x, b, y, add);
  }
}

template <class V> void grouped(const Grouped& w, const Rounded& x, const float* bias, float* y, i64 batch, i64 from, i64 to) {
  if (w.bits == 4)
    (w.present ? grouped_rows<V, 4, true> : grouped_rows<V, 4, false>)(w, x, bias, y, batch, from, to);
  else
    (w.present ? grouped_rows<V, 8, true> : grouped_rows<V, 8, false>)(w, x, bias, y, batch, from, to);
}

template <class V, int Bits, bool Skip> void grouped_listed(const Grouped& w, const Rounded& x, float* y, const i64* rows, i64 count) {
  constexpr i64 bytes = kGroup * Bits / 8, ahead = 4;
  for (i64 i = 0; i < count; i++) {
    const i64 next = rows[std::min(i + ahead, count - 1)];
    for (i64 k = w.start[next]; k < w.start[next + 1]; k += 64 / bytes) __builtin_prefetch(w.codes + k * bytes, 0, 3);
    __builtin_prefetch(w.scale + w.start[next], 0, 3);
    grouped_row<V, Bits, 1, Skip, true>(w, rows[i], x, 0, y, 0.0f);
  }
}

template <class V> void grouped_some(const Grouped& w, const Rounded& x, float* y, const i64* rows, i64 count) {
  if (w.bits == 4)
    (w.present ? grouped_listed<V, 4, true> : grouped_listed<V, 4, false>)(w, x, y, rows, count);
  else
    (w.present ? grouped_listed<V, 8, true> : grouped_listed<V, 8, false>)(w, x, y, rows, count);
}

template <class V> void bitmask_unpack(const Bitmask& w, float* dense, i64 from, i64 to) {
  const i64 bytes = (w.columns + 7) / 8;
  for (i64 row = from; row < to; row++) {
    const std::uint8_t* bits = w.bits + row * bytes;
    const float* values = w.values + w.start[row];
    float* out = dense + row * w.columns;
    for (i64 column = 0; column < w.columns; column += V::width) {
      const int left = int(std::min<i64>(V::width, w.columns - column));
      const std::uint32_t m = bits_at<V>(bits, column, bytes);
      V::store_part(out + column, V::expand_part(values, m), left);
      values += __builtin_popcount(m);
    }
  }
}

template <class V> float dot(const float* a, const float* b, i64 n) {
  typename V::reg sum = V::zero();
  i64 i = 0;
  for (; i + V::width <= n; i += V::width) sum = V::fma(V::load(a + i), V::load(b + i), sum);
  if (i < n) sum = V::fma(V::load_part(a + i, int(n - i)), V::load_part(b + i, int(n - i)), sum);
  return V::sum(sum);
}

template <class V> void add(float* y, const float* x, float scale, i64 n) {
  for (i64 i = 0; i < n; i++) y[i] += scale * x[i];
}

} // namespace rarefy
