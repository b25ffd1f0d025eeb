// Checks that stand between Python and a pointer.
#pragma once
#include "kernels.hpp"
#include <nanobind/nanobind.h>
#include <stdexcept>
#include <string>

template <class T> T* at(std::uintptr_t address, const char* what) {
  if (!address) throw std::invalid_argument(std::string(what) + " is a null pointer");
  if (address % alignof(T)) throw std::invalid_argument(std::string(what) + " is not aligned to its type");
  return reinterpret_cast<T*>(address);
}

template <class T> T* at_or_null(std::uintptr_t address, const char* what) { return address ? at<T>(address, what) : nullptr; }

inline void need(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}

inline void shape(rarefy::i64 rows, rarefy::i64 columns) {
  need(rows > 0 && columns > 0 && rows < (rarefy::i64(1) << 31) && columns < (rarefy::i64(1) << 31), "rows and columns must be in [1, 2^31)");
}

// What every product is given beside its matrix: compute(x [batch, columns], bias [rows] or null, y [batch, rows]), without the interpreter's lock.
template <class Compute> void product(std::uintptr_t x, std::uintptr_t bias, std::uintptr_t y, rarefy::i64 batch, const Compute& compute) {
  need(batch >= 0, "a batch is not negative");
  if (batch == 0) return;
  const float* in = at<const float>(x, "x");
  float* out = at<float>(y, "y");
  const float* add = at_or_null<const float>(bias, "bias");
  nanobind::gil_scoped_release release;
  compute(in, add, out);
}

const rarefy::Kernels* in_use();
rarefy::Bitmask bitmask_of(std::uintptr_t bits, std::uintptr_t starts, std::uintptr_t values, rarefy::i64 count, rarefy::i64 rows, rarefy::i64 columns);
rarefy::Grouped grouped_of(std::uintptr_t codes, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t present, std::uintptr_t starts, rarefy::i64 stored, rarefy::i64 rows,
                           rarefy::i64 columns, int bits);
rarefy::Blocks blocks_of(std::uintptr_t index, std::uintptr_t starts, std::uintptr_t values, rarefy::i64 stored, rarefy::i64 rows, rarefy::i64 columns,
                         rarefy::i64 height, rarefy::i64 width);
rarefy::NofM n_of_m_of(std::uintptr_t values, std::uintptr_t positions, rarefy::i64 rows, rarefy::i64 columns, int n, int m);
rarefy::Columns columns_of(std::uintptr_t values, rarefy::i64 rows, rarefy::i64 columns);
rarefy::GroupedColumns grouped_columns_of(std::uintptr_t codes, rarefy::i64 bytes, std::uintptr_t scale, std::uintptr_t zero, rarefy::i64 scales, rarefy::i64 rows,
                                         rarefy::i64 columns, int bits);
void bind_sparse(nanobind::module_& m);
void bind_columns(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);
void bind_experts(nanobind::module_& m);
