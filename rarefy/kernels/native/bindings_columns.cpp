// The matrices stored column by column.
#include "bindings.hpp"
#include "threads.hpp"
#include <vector>

namespace nb = nanobind;
using namespace rarefy;
using Address = std::uintptr_t;

namespace {

void columns_linear(Address values, i64 rows, i64 columns, Address x, Address bias, Address y, i64 batch, int threads) {
  const Columns w = columns_of(values, rows, columns);
  need(batch >= 0, "a batch is not negative");
  if (batch == 0) return;
  const float* in = at<const float>(x, "x");
  float* out = at<float>(y, "y");
  const float* add = bias ? at<const float>(bias, "bias") : nullptr;
  nb::gil_scoped_release release;
  parallel(rows, threads, rows * columns, [&](i64 from, i64 to) { in_use()->columns(w, in, add, out, batch, from, to); });
}

void grouped_columns_linear(Address codes, i64 bytes, Address scale, Address zero, i64 scales, i64 rows, i64 columns, int bits, Address x, Address bias, Address y, i64 batch,
                            int threads) {
  const GroupedColumns w = grouped_columns_of(codes, bytes, scale, zero, scales, rows, columns, bits);
  need(batch >= 0, "a batch is not negative");
  if (batch == 0) return;
  const float* in = at<const float>(x, "x");
  float* out = at<float>(y, "y");
  const float* add = bias ? at<const float>(bias, "bias") : nullptr;
  nb::gil_scoped_release release;
  std::vector<std::int8_t> code(batch * w.groups() * kGroup);
  std::vector<float> figures(2 * batch * w.groups());
  const Rounded rounded{w.groups(), code.data(), figures.data(), figures.data() + batch * w.groups()};
  in_use()->round(in, batch, columns, rounded);
  parallel(w.strips(), threads, rows * columns, [&](i64 from, i64 to) { in_use()->grouped_columns(w, rounded, add, out, batch, from, to); }, 1);
}

} // namespace

Columns columns_of(Address values, i64 rows, i64 columns) {
  shape(rows, columns);
  return {at<const float>(values, "values"), rows, columns};
}

GroupedColumns grouped_columns_of(Address codes, i64 bytes, Address scale, Address zero, i64 scales, i64 rows, i64 columns, int bits) {
  shape(rows, columns);
  need(bits == 4 || bits == 8, "codes have 4 or 8 bits");
  const GroupedColumns w{at<const std::uint8_t>(codes, "codes"), at<const std::uint16_t>(scale, "scale"), zero ? at<const std::uint16_t>(zero, "zero") : nullptr, rows, columns, bits};
  need(bytes == w.groups() * w.group_bytes() && scales == w.groups() * w.strips() * w.height(), "the codes or scales are not those of rows and columns");
  return w;
}

void bind_columns(nb::module_& m) {
  m.def("columns_linear", &columns_linear);
  m.def("grouped_columns_linear", &grouped_columns_linear);
}
