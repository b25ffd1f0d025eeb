// The matrices that store only what is not zero: blocks (1 x 1 among them) and n of m. Their indices come from files: `starts` and `check`
// have read every one before a product is computed.
#include "bindings.hpp"
#include "multiply.hpp"

namespace nb = nanobind;
using namespace rarefy;
using Address = std::uintptr_t;

namespace {

constexpr i64 kMost = 256; // rows or columns of a block

void block_shape(i64 rows, i64 columns, i64 height, i64 width) {
  shape(rows, columns);
  need(height > 0 && width > 0 && height <= kMost && width <= kMost, "a block has 1 to 256 rows and columns");
  need((columns + width - 1) / width <= (i64(1) << 16), "there are more than 65536 blocks beside each other");
}

// starts [high * parts + 1] from how many blocks each row of blocks holds; every index is read and must ascend within its row.
void blocks_starts(Address counts, Address index, i64 stored, Address starts, i64 rows, i64 columns, i64 height, i64 width) {
  block_shape(rows, columns, height, width);
  const Blocks w{at<const std::uint16_t>(index, "index"), nullptr, nullptr, rows, columns, height, width};
  const auto* count = at<const std::int32_t>(counts, "counts");
  i64* start = at<i64>(starts, "starts");
  i64 k = 0, to = 0;
  for (i64 row = 0; row < w.high(); row++) {
    need(count[row] >= 0 && count[row] <= stored - to, "the rows ask for more blocks than are stored");
    to += count[row];
    i64 last = -1, part = 0;
    start[row * w.parts()] = k;
    for (; k < to; last = w.index[k++]) {
      need(w.index[k] > last && w.index[k] < w.wide(), "the indices of a row do not ascend, or one is past the last column");
      while (part < w.index[k] / w.part()) start[row * w.parts() + ++part] = k;
    }
    while (++part < w.parts()) start[row * w.parts() + part] = k;
  }
  need(to == stored, "the rows ask for fewer blocks than are stored");
  start[w.high() * w.parts()] = to;
}

void blocks_linear(Address index, Address starts, Address values, i64 stored, i64 rows, i64 columns, i64 height, i64 width, Address x, Address bias, Address y, i64 batch,
                   int threads) {
  const Blocks w = blocks_of(index, starts, values, stored, rows, columns, height, width);
  product(x, bias, y, batch, [&](const float* in, const float* add, float* out) {
    multiply(*in_use(), w, in, add, out, batch, threads);
  });
}

void blocks_unpack(Address index, Address starts, Address values, i64 stored, i64 rows, i64 columns, i64 height, i64 width, Address dense, int threads) {
  const Blocks w = blocks_of(index, starts, values, stored, rows, columns, height, width);
  float* out = at<float>(dense, "dense");
  nb::gil_scoped_release release;
  parallel(w.high(), threads, rows * columns, [&](i64 from, i64 to) {
    std::fill(out + from * height * columns, out + std::min(to * height, rows) * columns, 0.0f);
    for (i64 row = from; row < to; row++)
      for (i64 k = w.start[row * w.parts()]; k < w.start[(row + 1) * w.parts()]; k++)
        for (i64 c = 0, column = w.index[k] * width; c < width && column < columns; c++, column++)
          for (i64 r = 0, at = row * height; r < height && at < rows; r++, at++) out[at * columns + column] = w.values[(k * width + c) * height + r];
  });
}

NofM places(Address positions, i64 rows, i64 columns, int n, int m) {
  shape(rows, columns);
  need(m >= 2 && m <= 8 && n >= 1 && n <= m, "n of m asks for 1 <= n <= m and m in 2 .. 8");
  const int bits = m <= 2 ? 1 : m <= 4 ? 2 : 3;
  return {nullptr, at<const std::uint8_t>(positions, "positions"), rows, columns, n, m, bits};
}

void n_of_m_check(Address positions, i64 size, i64 rows, i64 columns, int n, int m) {
  const NofM w = places(positions, rows, columns, n, m);
  need(size == rows * w.bytes(), "the positions are not as many as the shape asks for");
  for (i64 row = 0; row < rows; row++)
    for (i64 slot = 0; slot < w.slots(); slot++) {
      const int position = w.position(w.positions + row * w.bytes(), slot);
      need(position < m && slot / n * m + position < columns, "a position is outside its group, or past the last column");
    }
}

void n_of_m_linear(Address values, Address positions, i64 rows, i64 columns, int n, int m, Address x, Address bias, Address y, i64 batch, int threads) {
  const NofM w = n_of_m_of(values, positions, rows, columns, n, m);
  product(x, bias, y, batch, [&](const float* in, const float* add, float* out) {
    parallel(rows, threads, rows * w.slots(), [&](i64 from, i64 to) { in_use()->n_of_m(w, in, add, out, batch, from, to); });
  });
}

void n_of_m_unpack(Address values, Address positions, i64 rows, i64 columns, int n, int m, Address dense, int threads) {
  const NofM w = n_of_m_of(values, positions, rows, columns, n, m);
  float* out = at<float>(dense, "dense");
  nb::gil_scoped_release release;
  parallel(rows, threads, rows * columns, [&](i64 from, i64 to) {
    std::fill(out + from * columns, out + to * columns, 0.0f);
    const i64 slots = w.slots();
    for (i64 row = from; row < to; row++) {
      float* group = out + row * columns;
      std::uint32_t eight = 0;
      for (i64 slot = 0, filled = 0; slot < slots; slot++, eight >>= w.bits, filled++) {
        if (slot % 8 == 0) eight = w.eight(w.positions + row * w.bytes(), slot);
        if (filled == n) filled = 0, group += m;
        group[eight & ((1u << w.bits) - 1)] += w.values[row * slots + slot];
      }
    }
  });
}

} // namespace

Blocks blocks_of(Address index, Address starts, Address values, i64 stored, i64 rows, i64 columns, i64 height, i64 width) {
  block_shape(rows, columns, height, width);
  const Blocks w{at<const std::uint16_t>(index, "index"), at<const float>(values, "values"), at<const i64>(starts, "starts"), rows, columns, height, width};
  need(w.start[0] == 0 && w.start[w.high() * w.parts()] == stored, "the rows do not account for the blocks");
  return w;
}

NofM n_of_m_of(Address values, Address positions, i64 rows, i64 columns, int n, int m) {
  NofM w = places(positions, rows, columns, n, m);
  w.values = at<const float>(values, "values");
  return w;
}

void bind_sparse(nb::module_& m) {
  m.def("blocks_starts", &blocks_starts);
  m.def("blocks_linear", &blocks_linear);
  m.def("blocks_unpack", &blocks_unpack);
  m.def("n_of_m_check", &n_of_m_check);
  m.def("n_of_m_linear", &n_of_m_linear);
  m.def("n_of_m_unpack", &n_of_m_unpack);
}
