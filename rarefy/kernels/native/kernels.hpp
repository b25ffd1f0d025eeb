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

// Blocks of `height` rows and `width` columns of a matrix [O, I] that are not all zero; 1 x 1 is compressed sparse rows.
// Rows of blocks are cut into parts of kPart columns, so that a tile of x for one part stays in the first cache.
struct Blocks {
  const std::uint16_t* index; // [stored]: which block of columns, ascending in a row of blocks
  const float* values;        // [stored, width, height]: columns one after the other; zeros past the matrix
  const i64* start;           // [ceil(O / height) * parts + 1]: where the blocks of each part of each row of blocks begin
  i64 rows, columns;
  i64 height, width;
  i64 high() const { return (rows + height - 1) / height; } // rows of blocks
  i64 wide() const { return (columns + width - 1) / width; }
  i64 part() const { return part_of(width); } // blocks of a part
  i64 parts() const { return (wide() + part() - 1) / part(); }
  static constexpr i64 kPart = 128;
  static i64 part_of(i64 width) { return width < kPart ? kPart / width : 1; }
};

// Of every m columns n are stored, with their positions inside the group. Slots that are not needed hold a zero at position 0.
struct NofM {
  const float* values;           // [O, groups * n]
  const std::uint8_t* positions; // [O, ceil(groups * n / 8) * bits]: slot s has bits s % 8 * bits .. of the bits bytes s / 8
  i64 rows, columns;
  int n, m, bits;
  i64 slots() const { return (columns + m - 1) / m * n; }
  i64 bytes() const { return (slots() + 7) / 8 * bits; }
  std::uint32_t eight(const std::uint8_t* row, i64 slot) const { // the positions of slot and of the other seven that share its bytes
    std::uint32_t all = 0;
    for (int i = 0; i < bits; i++) all |= std::uint32_t(row[slot / 8 * bits + i]) << 8 * i;
    return all;
  }
  int position(const std::uint8_t* row, i64 slot) const { return int(eight(row, slot) >> slot % 8 * bits & ((1u << bits) - 1)); }
};

// A matrix [O, I] stored column by column: what a zero of x multiplies is not read.
struct Columns {
  const float* values; // [I, O]
  i64 rows, columns;
};

constexpr i64 kGroup = 32;

// The weights of `Grouped`, column by column: every group is stored, in float16 scales (and zeros) of one group of columns after the other.
// Rows are cut into strips, the last one filled up: 64 rows of 4 bits or 32 of 8 bits, which are 32 bytes a column. Byte 16 l + 4 k + i
// (l < 2, k < 4, i < 4) has row 8 k + 4 l + i of the strip; of 4 bits that is the low half, and the high one has the row 32 further on.
// Up to 32 strips are a panel, and a group of columns lies panel by panel: a column is a run of at most 1024 bytes, its neighbours are beside it.
struct GroupedColumns {
  const std::uint8_t* codes;  // [G, panels, 32 columns, strips of the panel, 32]
  const std::uint16_t* scale; // [G, strips * height]
  const std::uint16_t* zero;  // as in Grouped
  i64 rows, columns;
  int bits; // 4 or 8
  i64 height() const { return bits == 4 ? 64 : 32; }
  i64 strips() const { return (rows + height() - 1) / height(); }
  i64 groups() const { return (columns + kGroup - 1) / kGroup; }
  i64 group_bytes() const { return strips() * kGroup * kBytes; }
  static constexpr i64 kBytes = 32, kPanel = 32;
};

// Four columns of a group, by their number in it, and what multiplies them: four signed bytes, zero where there are fewer columns.
struct Four {
  int column[4];
  std::int32_t x;
};
constexpr i64 kColumns = 64; // rows of x that a tile [I, rows of x] holds at most

// x [B, I] in 8 bits: code = rint(x * 127 / max|x|) over each group of 32. NaN is the scale of a group that holds one or an infinity.
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
  void (*dense_some)(const Dense&, const float* x, float* y, const i64* rows, i64 count); // only these rows of y, for one row of x
  void (*columns)(const Columns&, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to);
  void (*grouped)(const Grouped&, const Rounded& x, const float* bias, float* y, i64 batch, i64 from, i64 to);
  void (*grouped_some)(const Grouped&, const Rounded& x, float* y, const i64* rows, i64 count);
  void (*grouped_columns)(const GroupedColumns&, const Rounded& x, const float* bias, float* y, i64 batch, i64 from, i64 to); // from .. to are strips
  void (*round)(const float* x, i64 batch, i64 columns, const Rounded& out);
  // For few rows of x: x is [B, wide * width], padded by zeros. from .. to are rows of blocks.
  void (*blocks)(const Blocks&, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to);
  // y [high * height, lanes] = W x + bias for x [wide * width, lanes]: rows of x lie beside each other, `lanes` is 16, 32 or 64.
  void (*blocks_tile)(const Blocks&, const float* x, const float* bias, float* y, int lanes, i64 from, i64 to);
  void (*n_of_m)(const NofM&, const float* x, const float* bias, float* y, i64 batch, i64 from, i64 to);
  // to [columns, to_stride] = from [rows, from_stride] turned, with zeros where rows are missing up to `lanes`; and without them, back.
  void (*turn)(const float* from, i64 from_stride, i64 rows, i64 columns, float* to, i64 to_stride, i64 lanes);
  // y [B, O] = x W^T (+ bias [O]) for rows of x at these addresses, and the output rows from .. to
  void (*scattered)(const Dense&, const float* const* x, const float* bias, float* y, i64 batch, i64 from, i64 to);
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
