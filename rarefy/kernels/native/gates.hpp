// Gates of the decoder: entries of a row that become zero.
#pragma once
#include "decoder.hpp"
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace rarefy {

// x holds the entries from .. to of a row.
inline void below(const Gate& g, float* x, i64 from, i64 to) {
  const i64 n = to - from;
  if (g.channels == 1) {
    const float t = *g.threshold;
    for (i64 i = 0; i < n; i++) x[i] = std::fabs(x[i]) < t ? 0.0f : x[i];
  } else {
    const float* t = g.threshold + from;
    for (i64 i = 0; i < n; i++) x[i] = std::fabs(x[i]) < t[i] ? 0.0f : x[i];
  }
}

// Magnitudes of floats compare as their bits do, and NaN, which is beyond them all, as one value.
inline std::uint32_t magnitude(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::min(bits & 0x7fffffffu, 0x7f800001u);
}

inline void all_but_largest(const Gate& g, float* x, std::vector<std::uint32_t>& sorted) {
  if (g.keep == g.block) return;
  if (g.keep == 0) {
    std::fill(x, x + g.block, 0.0f);
    return;
  }
  sorted.resize(g.block);
  std::transform(x, x + g.block, sorted.begin(), magnitude);
  std::nth_element(sorted.begin(), sorted.begin() + g.keep - 1, sorted.end(), std::greater<std::uint32_t>());
  const std::uint32_t last = sorted[g.keep - 1];
  i64 ties = g.keep; // of those as large as the last, the first ones are kept
  for (i64 i = 0; i < g.block; i++) ties -= magnitude(x[i]) > last;
  for (i64 i = 0; i < g.block; i++) {
    const std::uint32_t m = magnitude(x[i]);
    if (m < last || (m == last && ties-- <= 0)) x[i] = 0.0f;
  }
}

// x [rows, columns] in place.
inline void close(const Gate& g, float* x, i64 rows, i64 columns, std::vector<std::uint32_t>& scratch) {
  for (i64 r = 0; r < rows; r++) {
    if (g.threshold) below(g, x + r * columns, 0, columns);
    for (i64 i = 0; g.block && i < columns; i += g.block) all_but_largest(g, x + r * columns + i, scratch);
  }
}

} // namespace rarefy
