// The table of one instruction set.
#pragma once
#include "blocks.hpp"
#include "columns.hpp"
#include "experts.hpp"
#include "n_of_m.hpp"

namespace rarefy {

template <class V> constexpr Kernels kernels(const char* name) {
  return {name, bitmask<V>, dense<V>, dense_some<V>, columns<V>, grouped<V>, grouped_some<V>, grouped_columns<V>, round<V>, blocks<V>, blocks_tile<V>, n_of_m<V>, turn<V>, scattered<V>, bitmask_unpack<V>, dot<V>, add<V>};
}

} // namespace rarefy
