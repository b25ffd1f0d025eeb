// What Python sees. Every call checks sizes and bounds before a pointer is used: a crafted file reaches these lines.
#include "bindings.hpp"
#include "scratch.hpp"
#include "threads.hpp"
#include <nanobind/stl/string.h>

namespace nb = nanobind;
using namespace rarefy;

namespace {

const Kernels* by_name(const std::string& name) {
#ifdef RAREFY_X86
  __builtin_cpu_init();
  const bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool five = two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (five && (name == "avx512" || name.empty())) return &avx512();
  if (two && (name == "avx2" || name.empty())) return &avx2();
#endif
  if (name == "generic" || name.empty()) return &generic();
  return nullptr;
}

const Kernels* current = by_name("");

void use(const std::string& name) {
  const Kernels* found = by_name(name);
  if (!found) throw std::invalid_argument("instruction set '" + name + "' is not in this build or not on this machine");
  current = found;
}

// starts [rows + 1] from the bits; returns the number of values they ask for.
i64 bitmask_starts(std::uintptr_t bits, i64 bits_size, std::uintptr_t starts, i64 rows, i64 columns) {
  shape(rows, columns);
  const i64 bytes = (columns + 7) / 8;
  need(bits_size >= rows * bytes, "the bit mask is shorter than rows * ceil(columns / 8)");
  const std::uint8_t* from = at<const std::uint8_t>(bits, "bits");
  i64* to = at<i64>(starts, "starts");
  i64 total = 0;
  for (i64 row = 0; row < rows; row++) {
    to[row] = total;
    for (i64 byte = 0; byte < bytes; byte++) total += __builtin_popcount(from[row * bytes + byte]);
    need(columns % 8 == 0 || from[row * bytes + bytes - 1] >> (columns % 8) == 0, "a bit is set past the last column");
  }
  to[rows] = total;
  return total;
}

void bitmask_linear(std::uintptr_t bits, std::uintptr_t starts, std::uintptr_t values, i64 count, i64 rows, i64 columns, std::uintptr_t x, std::uintptr_t bias,
                    std::uintptr_t y, i64 batch, int threads) {
  const Bitmask w = bitmask_of(bits, starts, values, count, rows, columns);
  product(x, bias, y, batch, [&](const float* in, const float* add, float* out) {
    parallel(rows, threads, rows * columns, [&](i64 from, i64 to) { current->bitmask(w, in, add, out, batch, from, to); });
  });
}

void bitmask_unpack(std::uintptr_t bits, std::uintptr_t starts, std::uintptr_t values, i64 count, i64 rows, i64 columns, std::uintptr_t dense, int threads) {
  const Bitmask w = bitmask_of(bits, starts, values, count, rows, columns);
  float* out = at<float>(dense, "dense");
  nb::gil_scoped_release release;
  parallel(rows, threads, rows * columns, [&](i64 from, i64 to) { current->bitmask_unpack(w, out, from, to); });
}

void grouped_linear(std::uintptr_t codes, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t present, std::uintptr_t starts, i64 stored, i64 rows, i64 columns,
                    int bits, std::uintptr_t x, std::uintptr_t bias, std::uintptr_t y, i64 batch, int threads) {
  const Grouped w = grouped_of(codes, scale, zero, present, starts, stored, rows, columns, bits);
  product(x, bias, y, batch, [&](const float* in, const float* add, float* out) {
    Rounding rounding;
    const Rounded rounded = rounding.room(batch, columns);
    current->round(in, batch, columns, rounded);
    parallel(rows, threads, rows * columns, [&](i64 from, i64 to) { current->grouped(w, rounded, add, out, batch, from, to); });
  });
}

void dense_linear(std::uintptr_t weight, i64 rows, i64 columns, std::uintptr_t x, std::uintptr_t bias, std::uintptr_t y, i64 batch, int threads) {
  shape(rows, columns);
  const Dense w{at<const float>(weight, "weight"), rows, columns};
  product(x, bias, y, batch, [&](const float* in, const float* add, float* out) {
    parallel(rows, threads, rows * columns, [&](i64 from, i64 to) { current->dense(w, in, add, out, batch, from, to); });
  });
}

} // namespace

const Kernels* in_use() { return current; }

Bitmask bitmask_of(std::uintptr_t bits, std::uintptr_t starts, std::uintptr_t values, i64 count, i64 rows, i64 columns) {
  shape(rows, columns);
  const i64* start = at<const i64>(starts, "starts");
  need(start[0] == 0 && start[rows] == count, "the bit mask does not account for the values");
  return {at<const std::uint8_t>(bits, "bits"), start, at<const float>(values, "values"), rows, columns};
}

Grouped grouped_of(std::uintptr_t codes, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t present, std::uintptr_t starts, i64 stored, i64 rows, i64 columns,
                   int bits) {
  shape(rows, columns);
  need(bits == 4 || bits == 8, "codes have 4 or 8 bits");
  const i64* start = at<const i64>(starts, "starts");
  need(start[0] == 0 && start[rows] == stored, "the groups do not account for the codes");
  return {at<const std::uint8_t>(codes, "codes"),
          at<const std::uint16_t>(scale, "scale"),
          at_or_null<const std::uint16_t>(zero, "zero"),
          at_or_null<const std::uint8_t>(present, "present"),
          start,
          rows,
          columns,
          bits};
}

NB_MODULE(_native, m) {
  m.def("isa", [] { return std::string(current->name); });
  m.def("use", &use);
  m.def("openmp", [] {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
  });
  m.def("bitmask_starts", &bitmask_starts);
  m.def("bitmask_linear", &bitmask_linear);
  m.def("bitmask_unpack", &bitmask_unpack);
  m.def("grouped_linear", &grouped_linear);
  m.def("dense_linear", &dense_linear);
  bind_sparse(m);
  bind_columns(m);
  bind_decoder(m);
  bind_experts(m);
}
