// The operations that every instruction set provides. Pointers are raw; module.cpp has checked what lies behind them.
// Axes: O output rows, I input columns, B rows of x. All matrices are row-major and contiguous.
#pragma once
#include <cstddef>
#include <cstdint>

namespace rarefy {

using i64 = std::int64_t;

struct Bitmask {            // a matrix [O, I]: one bit a weight, low bit first, each row padded to a byte; then the kept values
  const std::uint8_t* bits; // [O, ceil(I / 8)]
  const i64* start;         // [O + 1]: where the values of each row begin
  const float* values;      // [start[O]]
  i64 rows, columns;
};

struct Dense {
  const float* values; // [O, I]
  i64 rows, columns;
};

// Groups of 32 input columns share a scale (and, where `zeros` is set, an offset): w = scale * q + zero.
// int8: 32 signed bytes a group. int4: 16 bytes a group, column c in the low half of byte c, column c + 16 in the high half; q = nibble.
// `group` names the input group of each stored one, `per_row` of them a row, ascending; null where every group is stored.
struct Grouped {
  const std::uint8_t* codes;
  const float* scales; // [O, per_row]
  const float* zeros;  // [O, per_row] or null (then int4 codes count from -8)
  const std::uint16_t* group;
  i64 rows, columns, per_row;
  int bits; // 4 or 8
};

struct Kernels {
  const char* name;
  // y [B, O] = x [B, I] W^T (+ bias [O])
  void (*bitmask)(const Bitmask&, const float* x, const float* bias, float* y, i64 batch, int threads);
  void (*bitmask_unpack)(const Bitmask&, float* dense, int threads);
  void (*dense)(const Dense&, const float* x, const float* bias, float* y, i64 batch, int threads);
};

const Kernels& generic();
#ifdef RAREFY_X86
const Kernels& avx2();
const Kernels& avx512();
#endif

} // namespace rarefy
