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

// Groups of 32 input columns share a scale and a zero: w = scale * code + zero, in float16; codes are unsigned.
// 8 bits: 32 bytes a group. 4 bits: 16 bytes, column c in the low half of byte c, column c + 16 in the high half.
// Columns past the last one have x = 0. Groups that are all zero need not be stored.
struct Grouped {
  const std::uint8_t* codes;
  const std::uint16_t* scale; // [stored]
  const std::uint16_t* zero;  // [stored]; null: minus half the range of the codes, times the scale
  const std::uint8_t* present; // [O, ceil(G / 8)]: a bit for each input group, low bit first; null: every group is stored
  const i64* start;           // [O + 1]: where the groups of each row begin
  i64 rows, columns;
  int bits; // 4 or 8
};

constexpr i64 kGroup = 32;

// x [B, I] in 8 bits: code = rint(x * 127 / max|x|) over each group of 32.
struct Rounded {
  i64 groups;
  std::int8_t* code;  // [B, groups, 32]
  float *scale, *sum; // [B, groups]: max|x| / 127, and the scale times the sum of the codes, which zeros multiply
};

struct Kernels {
  const char* name;
  // y [B, O] = x [B, I] W^T (+ bias [O]) for the output rows from .. to
  void (*bitmask)(const Bitmask&, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to);
  void (*dense)(const Dense&, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to);
  void (*grouped)(const Grouped&, const Rounded& x, const float* bias, float* y, i64 batch, i64 from, i64 to);
  void (*round)(const float* x, i64 batch, i64 columns, const Rounded& out);
  void (*bitmask_unpack)(const Bitmask&, float* dense, i64 from, i64 to);
  float (*dot)(const float* a, const float* b, i64 n);
  void (*add)(float* y, const float* x, float scale, i64 n); // y += scale * x
};

const Kernels& generic();
#ifdef RAREFY_X86
const Kernels& avx2();
const Kernels& avx512();
#endif

} // namespace rarefy
