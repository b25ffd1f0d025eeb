// The matrices stored column by column.
#include "bindings.hpp"
#include "threads.hpp"

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

} // namespace

Columns columns_of(Address values, i64 rows, i64 columns) {
  shape(rows, columns);
  return {at<const float>(values, "values"), rows, columns};
}

void bind_columns(nb::module_& m) { m.def("columns_linear", &columns_linear); }
