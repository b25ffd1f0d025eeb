// What a product makes of x before it is computed. Memory is kept by whoever computes again and again.
#pragma once
#include "kernels.hpp"
#include <algorithm>
#include <vector>

namespace rarefy {

// The codes and figures of a `Rounded`.
struct Rounding {
  std::vector<std::int8_t> code;
  std::vector<float> figures;
  Rounded room(i64 batch, i64 columns) {
    const i64 groups = (columns + kGroup - 1) / kGroup;
    code.resize(batch * groups * kGroup);
    figures.resize(2 * batch * groups);
    return {groups, code.data(), figures.data(), figures.data() + batch * groups};
  }
};

// x [batch, columns] with zeros up to whole blocks: itself where they are whole, else a copy in `room`.
inline const float* filled(const Blocks& w, const float* x, i64 batch, std::vector<float>& room) {
  const i64 wide = w.wide() * w.width;
  if (wide == w.columns) return x;
  room.assign(batch * wide, 0.0f);
  for (i64 b = 0; b < batch; b++) std::copy(x + b * w.columns, x + (b + 1) * w.columns, &room[b * wide]);
  return room.data();
}

} // namespace rarefy
