// Blocks times rows of x, by several threads: what each of them may write to.
#pragma once
#include "scratch.hpp"
#include "threads.hpp"
#include <memory>

namespace rarefy {

constexpr i64 kLoop = 4; // rows of x below which they are multiplied one after the other

inline void few(const Kernels& kernels, const Blocks& w, const float* x, const float* bias, float* y, i64 batch, int threads, i64 work) {
  std::vector<float> room;
  const float* whole = filled(w, x, batch, room);
  parallel(w.high(), threads, work, [&](i64 from, i64 to) { kernels.blocks(w, whole, bias, y, batch, from, to); });
}

inline int lanes_of(i64 left) { return left <= 16 ? 16 : left <= 32 ? 32 : int(kColumns); }

// x is turned once, tile by tile; every thread then owns rows of blocks, with a tile of y for them.
inline void many(const Kernels& kernels, const Blocks& w, const float* x, const float* bias, float* y, i64 batch, int threads, i64 work) {
  const i64 columns = w.wide() * w.width, high = w.high() * w.height;
  const i64 lanes = batch / kColumns * kColumns + (batch % kColumns ? lanes_of(batch % kColumns) : 0);
  const std::unique_ptr<float[]> in(new float[columns * lanes]), out(new float[high * kColumns]);
  parallel((w.columns + 7) / 8, threads, batch * columns, [&](i64 from, i64 to) {
    for (i64 b = 0; b < batch; b += kColumns) {
      const i64 left = std::min(batch - b, kColumns), first = from * 8, last = std::min(to * 8, w.columns);
      const int wide = lanes_of(left);
      kernels.turn(x + b * w.columns + first, w.columns, left, last - first, in.get() + b * columns + first * wide, wide, wide);
    }
  });
  for (i64 b = 0; b < batch; b += kColumns) { // a block may reach past the last column
    const int wide = lanes_of(batch - b);
    std::fill(in.get() + b * columns + w.columns * wide, in.get() + b * columns + columns * wide, 0.0f);
  }
  parallel(w.high(), threads, work, [&](i64 from, i64 to) {
    const i64 first = from * w.height, last = std::min(to * w.height, w.rows);
    for (i64 b = 0; b < batch; b += kColumns) {
      const i64 left = std::min(batch - b, kColumns);
      const int wide = lanes_of(left);
      float* mine = out.get() + first * kColumns; // other threads may be at a tile of another width
      kernels.blocks_tile(w, in.get() + b * columns, bias, mine - first * wide, wide, from, to);
      kernels.turn(mine, wide, last - first, left, y + b * w.rows + first, w.rows, last - first);
    }
  });
}

inline void multiply(const Kernels& kernels, const Blocks& w, const float* x, const float* bias, float* y, i64 batch, int threads) {
  const i64 stored = w.start[w.high() * w.parts()];
  (batch < kLoop ? few : many)(kernels, w, x, bias, y, batch, threads, batch * stored * w.height * w.width);
}

} // namespace rarefy
