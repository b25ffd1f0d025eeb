// The matrices stored column by column.
#include "bindings.hpp"
#include "scratch.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace rarefy;
using Address = std::uintptr_t;

namespace {

void columns_linear(Address values, i64 rows, i64 columns, Address x, Address bias, Address y, i64 batch, int threads) {
  const Columns w = columns_of(values, rows, columns);
  product(x, bias, y, batch, [&](const float* in, const float* add, float* out) {
    parallel(rows, threads, rows * columns, [&](i64 from, i64 to) { in_use()->columns(w, in, add, out, batch, from, to); });
  });
}

void grouped_columns_linear(Address codes, i64 bytes, Address scale, Address zero, i64 scales, i64 rows, i64 columns, int bits, Address x, Address bias, Address y, i64 batch,
                            int threads) {
  const GroupedColumns w = grouped_columns_of(codes, bytes, scale, zero, scales, rows, columns, bits);
  product(x, bias, y, batch, [&](const float* in, const float* add, float* out) {
    Rounding rounding;
    const Rounded rounded = rounding.room(batch, columns);
    in_use()->round(in, batch, columns, rounded);
    parallel(w.strips(), threads, rows * columns, [&](i64 from, i64 to) { in_use()->grouped_columns(w, rounded, add, out, batch, from, to); }, 1);
  });
}

} // namespace

Columns columns_of(Address values, i64 rows, i64 columns) {
  shape(rows, columns);
  return {at<const float>(values, "values"), rows, columns};
}

GroupedColumns grouped_columns_of(Address codes, i64 bytes, Address scale, Address zero, i64 scales, i64 rows, i64 columns, int bits) {
  shape(rows, columns);
  need(bits == 4 || bits == 8, "codes have 4 or 8 bits");
  const GroupedColumns w{at<const std::uint8_t>(codes, "codes"), at<const std::uint16_t>(scale, "scale"), at_or_null<const std::uint16_t>(zero, "zero"), rows, columns, bits};
  need(bytes == w.groups() * w.group_bytes() && scales == w.groups() * w.strips() * w.height(), "the codes or scales are not those of rows and columns");
  return w;
}

void bind_columns(nb::module_& m) {
  m.def("columns_linear", &columns_linear);
  m.def("grouped_columns_linear", &grouped_columns_linear);
}
