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

// The columns of a group whose code of x is not zero, in fours, and the sum of those codes.
struct Group {
  Four four[kGroup / 4];
  int live, fours, total;
};

inline void find(const std::int8_t* code, Group& out) {
  int column[kGroup + 4];
  std::int8_t x[kGroup + 4];
  int n = 0;
  out.total = 0;
  for (int i = 0; i < kGroup; i++) {
    column[n] = i;
    x[n] = code[i];
    out.total += code[i];
    n += code[i] != 0;
  }
  out.live = n;
  out.fours = (n + 3) / 4;
  for (int i = n; i < out.fours * 4; i++) column[i] = column[n - 1], x[i] = 0;
  for (int f = 0; f < out.fours; f++) {
    std::copy(column + 4 * f, column + 4 * f + 4, out.four[f].column);
    std::memcpy(&out.four[f].x, x + 4 * f, 4);
  }
}

// Asks for the live columns of a group, run after run of bytes, some lines at a time.
class Ahead {
public:
  Ahead(const Group& group, const std::uint8_t* codes, i64 stride, i64 bytes) : group(group), codes(codes), stride(stride), bytes(bytes) {}
  void lines(int count) {
    for (; count > 0 && column < group.live; count--) {
      __builtin_prefetch(codes + group.four[column / 4].column[column % 4] * stride + at, 0, 3);
      at += 64;
      if (at >= bytes) at = 0, column++;
    }
  }

private:
  const Group& group;
  const std::uint8_t* codes;
  const i64 stride, bytes;
  i64 at = 0;
  int column = 0;
};

// y += one group of columns times x, for a strip: integer products of the columns that are live, then the scales.
//   V::strip<Bits>(codes, stride, fours, n, scale, zero, t, middle, u, y): y_r += scale_r t (sum_c code_rc x_c - middle) + zero_r u;
//   column c lies at codes + c * stride
template <class V, int Bits> void grouped_columns_row(const GroupedColumns& w, const Rounded& x, i64 b, const float* bias, float* y, i64 from, i64 to) {
  constexpr i64 height = Bits == 4 ? 64 : 32, middle = Bits == 4 ? 8 : 128, bytes = GroupedColumns::kBytes;
  const i64 first = from * height, last = std::min(to * height, w.rows), strips = w.strips();
  for (i64 row = first; row < last; row++) y[row] = bias ? bias[row] : 0.0f;
  float spill[height]; // of a last strip that is not full
  const bool full = last == to * height;
  if (!full) std::fill(std::copy(y + (to - 1) * height, y + last, spill), spill + height, 0.0f);
  Group groups[2];
  find(x.code + b * x.groups * kGroup, groups[0]);
  for (i64 g = 0; g < x.groups; g++) {
    const i64 at = b * x.groups + g;
    const Group& group = groups[g % 2];
    Group& next = groups[(g + 1) % 2];
    next.live = 0;
    if (g + 1 < x.groups) find(x.code + (at + 1) * kGroup, next);
    if (!group.fours) continue;
    const std::uint8_t* codes = w.codes + g * w.group_bytes();
    const std::uint16_t* scale = w.scale + g * strips * height;
    const std::uint16_t* zero = w.zero ? w.zero + g * strips * height : nullptr;
    for (i64 panel = from / GroupedColumns::kPanel * GroupedColumns::kPanel; panel < to; panel += GroupedColumns::kPanel) {
      const i64 begin = std::max(panel, from), end = std::min(panel + GroupedColumns::kPanel, to);
      const i64 stride = std::min(strips - panel, GroupedColumns::kPanel) * bytes;
      const std::uint8_t* here = codes + panel * kGroup * bytes + (begin - panel) * bytes;
      Ahead ahead(next, here + w.group_bytes(), stride, (end - begin) * bytes);
      for (i64 s = begin; s < end; s++, here += bytes) {
        ahead.lines(next.live / 2 + 1);
        V::template strip<Bits>(here, stride, group.four, group.fours, scale + s * height, zero ? zero + s * height : nullptr, x.scale[at],
                                zero ? 0 : int(middle) * group.total, x.sum[at], full || s + 1 < to ? y + s * height : spill);
      }
    }
  }
  if (!full) std::copy(spill, spill + (last - (to - 1) * height), y + (to - 1) * height);
}

template <class V> void grouped_columns(const GroupedColumns& w, const Rounded& x, const float* bias, float* y, i64 batch, i64 from, i64 to) {
  if (from == to) return;
  for (i64 b = 0; b < batch; b++) (w.bits == 4 ? grouped_columns_row<V, 4> : grouped_columns_row<V, 8>)(w, x, b, bias, y + b * w.rows, from, to);
}

} // namespace rarefy
