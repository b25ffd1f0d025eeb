// Blocks that are not all zero, times few rows of x (batch 1: one vector of weights at a time) or a tile of many (one weight, many rows of x).
//   V::gather(x, index): lane j is x[index[j]]; V::gather_part: for the first n lanes, zeros behind; both read V::width indices
//   V::spread(x, index): lane j is x[index[j / 4]]
//   V::turn8(from, stride, to, to_stride): an 8 x 8 block, transposed
#pragma once
#include "loops.hpp"

namespace rarefy {

constexpr int kChains = 4; // sums that do not wait for each other

template <class V> float total(const typename V::reg (&sum)[kChains]) { return V::sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3]))); }

// 1 x 1 blocks, one row of x: gather what the row's indices name.
template <class V> float gathered_row(const Blocks& w, i64 from, i64 to, const float* x) {
  typename V::reg sum[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()};
  const i64 stored = w.start[w.high() * w.parts()];
  i64 k = from;
  for (; k + kChains * V::width <= to; k += kChains * V::width) {
    for (int i = 0; i < kChains * V::width; i += 16) prefetch(w.values + k + i);
    for (int i = 0; i < kChains * V::width; i += 32) prefetch(w.index + k + i);
#pragma GCC unroll 4
    for (int u = 0; u < kChains; u++) sum[u] = V::fma(V::gather(x, w.index + k + u * V::width), V::load(w.values + k + u * V::width), sum[u]);
  }
  for (int u = 0; k < to; k += V::width, u = (u + 1) % kChains) {
    const int left = int(std::min<i64>(V::width, to - k));
    std::uint16_t last[V::width] = {};
    const std::uint16_t* index = w.index + k;
    if (k + V::width > stored) index = static_cast<const std::uint16_t*>(std::memcpy(last, index, left * sizeof(last[0])));
    sum[u] = V::fma(V::gather_part(x, index, left), V::load_part(w.values + k, left), sum[u]);
  }
  return total<V>(sum);
}

// 1 x C blocks, one row of x: a piece of x against a block.
template <class V> float dotted_row(const Blocks& w, i64 from, i64 to, const float* x) {
  typename V::reg sum[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int u = 0;
  for (i64 k = from; k < to; k++) {
    const float *values = w.values + k * w.width, *in = x + w.index[k] * w.width;
    i64 c = 0;
    for (; c + V::width <= w.width; c += V::width, u = (u + 1) % kChains) {
      prefetch(values + c);
      sum[u] = V::fma(V::load(values + c), V::load(in + c), sum[u]);
    }
    if (c < w.width) sum[u] = V::fma(V::load_part(values + c, int(w.width - c)), V::load_part(in + c, int(w.width - c)), sum[u]);
  }
  return total<V>(sum);
}

// R x C blocks, one row of x: `Wide` vectors of rows at a time, each column of a block times one number of x.
template <class V, int Wide> void spread_rows(const Blocks& w, i64 from, i64 to, const float* x, i64 row, int left, float* y) {
  typename V::reg sum[kChains][Wide];
#pragma GCC unroll 16
  for (int u = 0; u < kChains; u++)
    for (int i = 0; i < Wide; i++) sum[u][i] = V::zero();
  const float* values = w.values + from * w.width * w.height + row;
  const bool whole = left == Wide * V::width;
  int u = 0;
  if (whole && w.width == 1) {
    i64 k = from;
    for (; k + kChains <= to; k += kChains, values += kChains * w.height)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; c++) {
        prefetch(values + c * w.height);
        const typename V::reg in = V::set(x[w.index[k + c]]);
#pragma GCC unroll 2
        for (int i = 0; i < Wide; i++) sum[c][i] = V::fma(in, V::load(values + c * w.height + i * V::width), sum[c][i]);
      }
    from = k;
  }
  for (i64 k = from; k < to; k++)
    for (i64 c = 0; c < w.width; c++, values += w.height, u = (u + 1) % kChains) {
      const typename V::reg in = V::set(x[w.index[k] * w.width + c]);
      for (int i = 0; i < Wide; i++) sum[u][i] = V::fma(in, whole ? V::load(values + i * V::width) : V::load_part(values, left), sum[u][i]);
    }
  for (int i = 0; i < Wide; i++) V::store_part(y + i * V::width, V::add(V::add(sum[0][i], sum[1][i]), V::add(sum[2][i], sum[3][i])), whole ? V::width : left);
}

// 4 x 1 blocks, one row of x: a vector holds V::width / 4 blocks.
template <class V> void fours(const Blocks& w, i64 from, i64 to, const float* x, float* y) {
  constexpr int some = V::width / 4;
  typename V::reg sum[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()};
  i64 k = from;
  for (; k + kChains * some <= to; k += kChains * some)
#pragma GCC unroll 4
    for (int u = 0; u < kChains; u++) {
      const i64 at = k + u * some;
      prefetch(w.values + at * 4);
      sum[u] = V::fma(V::spread(x, w.index + at), V::load(w.values + at * 4), sum[u]);
    }
  float lanes[V::width];
  V::store(lanes, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
  for (int r = 0; r < 4; r++) {
    y[r] = 0;
    for (int s = 0; s < some; s++) y[r] += lanes[4 * s + r];
  }
  for (; k < to; k++)
    for (int r = 0; r < 4; r++) y[r] += w.values[4 * k + r] * x[w.index[k]];
}

template <class V> void blocks_row(const Blocks& w, i64 row, const float* x, float* y) {
  const i64 from = w.start[row * w.parts()], to = w.start[(row + 1) * w.parts()];
  constexpr int sixteen = 16 / V::width;
  if (w.height == 1) {
    *y = (w.width == 1 ? gathered_row<V> : dotted_row<V>)(w, from, to, x);
  } else if (w.height == 4 && w.width == 1) {
    fours<V>(w, from, to, x, y);
  } else {
    i64 r = 0;
    for (; r + 16 <= w.height; r += 16) spread_rows<V, sixteen>(w, from, to, x, r, 16, y + r);
    for (; r < w.height; r += V::width) spread_rows<V, 1>(w, from, to, x, r, int(std::min<i64>(V::width, w.height - r)), y + r);
  }
}

template <class V> void blocks(const Blocks& w, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to) {
  constexpr i64 most = 256; // blocks are at most this high (module.cpp)
  float out[most];
  for (i64 row = from; row < to; row++)
    for (i64 b = 0; b < batch; b++) {
      blocks_row<V>(w, row, x + b * w.wide() * w.width, out);
      for (i64 r = 0, at = row * w.height; r < w.height && at < w.rows; r++, at++) y[b * w.rows + at] = out[r] + (bias ? bias[at] : 0.0f);
    }
}

// R rows of a row of blocks against N vectors of a tile `lanes` wide; `Chains` sums that do not wait for each other.
template <class V, int R, int N, int Chains, bool One, int lanes> void tile_rows(const Blocks& w, i64 from, i64 to, i64 row, const float* x, float* y) {
  using reg = typename V::reg;
  reg sum[Chains][R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) {
      sum[0][r][i] = V::load(y + r * lanes + i * V::width);
#pragma GCC unroll 16
      for (int u = 1; u < Chains; u++) sum[u][r][i] = V::zero();
    }
  const i64 height = One ? R : w.height, width = One ? 1 : w.width;
  const auto step = [&](int u, const float* in, const float* values) {
    reg part[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) part[i] = V::load(in + i * V::width);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const reg weight = V::set(values[r]);
#pragma GCC unroll 16
      for (int i = 0; i < N; i++) sum[u][r][i] = V::fma(weight, part[i], sum[u][r][i]);
    }
  };
  i64 k = from;
  if (One)
    for (; k + Chains <= to; k += Chains)
#pragma GCC unroll 16
      for (int u = 0; u < Chains; u++) step(u, x + w.index[k + u] * lanes, w.values + (k + u) * R);
  for (; k < to; k++) {
    const float *in = x + w.index[k] * width * lanes, *values = w.values + k * width * height + row;
    i64 c = 0;
    for (; c + Chains <= width; c += Chains)
#pragma GCC unroll 16
      for (int u = 0; u < Chains; u++) step(u, in + (c + u) * lanes, values + (c + u) * height);
    for (; c < width; c++) step(0, in + c * lanes, values + c * height);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) {
      reg all = sum[0][r][i];
#pragma GCC unroll 16
      for (int u = 1; u < Chains; u++) all = V::add(all, sum[u][r][i]);
      V::store(y + r * lanes + i * V::width, all);
    }
}

constexpr i64 kRows = 256; // rows of blocks whose parts are visited in turn: their weights lie on pages that are still mapped at the next part

// A narrow tile has room for more parts in the first cache; where rows hold little, fewer and longer visits to each are cheaper.
inline i64 parts_together(const Blocks& w, int lanes) {
  const i64 stored = w.start[w.high() * w.parts()], room = kColumns / lanes;
  return std::max<i64>(room, std::min<i64>(room * 8, 16 * w.high() * w.parts() / std::max<i64>(stored, 1)));
}

template <class V, int Lanes> void tile(const Blocks& w, const float* x, const float* bias, float* y, i64 from, i64 to) {
  constexpr int all = Lanes / V::width, room = V::registers / 2;
  constexpr int one = std::min(all, room), four = std::min(all, room / 4);
  constexpr int chains = std::max(1, std::min({4, room / one, 8 / one})), chains4 = std::max(1, room / 4 / four / 2);
  const bool plain = w.width == 1;
  const i64 parts = w.parts();
  for (i64 at = from * w.height; at < to * w.height; at++)
    for (int i = 0; i < Lanes; i++) y[at * Lanes + i] = bias && at < w.rows ? bias[at] : 0.0f;
  const i64 together = parts_together(w, Lanes);
  const auto visit = [&](i64 part, i64 row) {
    const i64 k = w.start[row * parts + part], end = w.start[row * parts + std::min(part + together, parts)];
    const i64 ahead = w.start[std::min(row + 8, to - 1) * parts + part];
    __builtin_prefetch(w.index + ahead);
    for (i64 i = 0; i < (end - k) * w.width * w.height; i += 16) __builtin_prefetch(w.values + ahead * w.width * w.height + i);
    if (k == end) return;
    float* out = y + row * w.height * Lanes;
    i64 r = 0;
    for (; r + 4 <= w.height; r += 4)
      for (int i = 0; i < Lanes; i += four * V::width)
        (plain && w.height == 4 ? tile_rows<V, 4, four, chains4, true, Lanes> : tile_rows<V, 4, four, chains4, false, Lanes>)(w, k, end, r, x + i, out + r * Lanes + i);
    for (; r < w.height; r++)
      for (int i = 0; i < Lanes; i += one * V::width)
        (plain && w.height == 1 ? tile_rows<V, 1, one, chains, true, Lanes> : tile_rows<V, 1, one, chains, false, Lanes>)(w, k, end, r, x + i, out + r * Lanes + i);
  };
  for (i64 top = from; top < to; top += kRows)
    for (i64 part = 0; part < parts; part += together)
      for (i64 row = top; row < std::min(top + kRows, to); row++) visit(part, row);
}

template <class V> void blocks_tile(const Blocks& w, const float* x, const float* bias, float* y, int lanes, i64 from, i64 to) {
  (lanes == 16 ? tile<V, 16> : lanes == 32 ? tile<V, 32> : tile<V, 64>)(w, x, bias, y, from, to);
}

template <class V> void turn(const float* from, i64 from_stride, i64 rows, i64 columns, float* to, i64 to_stride, i64 lanes) {
  for (i64 c = 0; c < columns; c += 8)
    for (i64 r = 0; r < lanes; r += 8)
      if (c + 8 <= columns && r + 8 <= rows)
        V::turn8(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
      else
        for (i64 i = c; i < std::min(c + 8, columns); i++)
          for (i64 j = r; j < std::min(r + 8, lanes); j++) to[i * to_stride + j] = j < rows ? from[j * from_stride + i] : 0.0f;
}

} // namespace rarefy
