// A mixture of experts on few rows: assignments sorted by expert, every expert's product with its own rows, the weighted sum of what comes out.
// Axes: N assignments, E experts, R rows of x. What lies behind the pointers has been checked.
#pragma once
#include "threads.hpp"
#include <algorithm>
#include <atomic>
#include <vector>

namespace rarefy {

struct Experts { // E matrices [O, I], one after the other
  const float* values;
  const float* bias; // [E, O]; null: none
  i64 experts, rows, columns;
};

// Of the assignments sorted by expert, those of e are end[e - 1] .. end[e]; the rows of x that they take are item[n], or n where it is null.
struct Sorted {
  const i64* item;
  const i64* end;
  i64 assigned(i64 experts) const { return experts ? end[experts - 1] : 0; }
};

// body(i) for every i below `count`, by whichever thread is free.
template <class Body> void shared(i64 count, int threads, i64 work, const Body& body) {
  std::atomic<i64> next{0};
  const auto run = [&](int, int) {
    for (i64 i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  };
  if (threads <= 1 || work <= kSerial || count <= 1 || inside_team()) return run(0, 1);
  team(threads, run);
}

constexpr i64 kPiece = 128 << 10; // bytes of weights that a thread takes at a time: long runs to read, short waits at the end

// y [N, O]: y_n = W_e x_n + b_e.
inline void multiply(const Kernels& kernels, const Experts& w, const float* x, const Sorted& rows, float* y, int threads) {
  struct Run {
    i64 expert, from, to;
  };
  std::vector<Run> live;
  for (i64 e = 0, from = 0; e < w.experts; from = rows.end[e++])
    if (rows.end[e] > from) live.push_back({e, from, rows.end[e]});
  const i64 assigned = rows.assigned(w.experts);
  std::vector<const float*> in(assigned);
  for (i64 n = 0; n < assigned; n++) in[n] = x + (rows.item ? rows.item[n] : n) * w.columns;
  const i64 high = std::max(kAlign, kPiece / i64(sizeof(float)) / w.columns / kAlign * kAlign), pieces = (w.rows + high - 1) / high;
  shared(i64(live.size()) * pieces, threads, assigned * w.rows * w.columns, [&](i64 i) {
    const Run& run = live[i / pieces];
    const i64 from = i % pieces * high;
    const Dense one{w.values + run.expert * w.rows * w.columns, w.rows, w.columns};
    kernels.scattered(one, in.data() + run.from, w.bias ? w.bias + run.expert * w.rows : nullptr, y + run.from * w.rows, run.to - run.from, from, std::min(from + high, w.rows));
  });
}

// out [R, O] = 0, then out_{item_n} += weight_n y_n in order of n; threads own columns.
inline void combine(const Kernels& kernels, const float* y, i64 assigned, i64 columns, const i64* item, const float* weight, float* out, i64 rows, int threads) {
  parallel(columns, threads, assigned * columns, [&](i64 from, i64 to) {
    for (i64 r = 0; r < rows; r++) std::fill(out + r * columns + from, out + r * columns + to, 0.0f);
    for (i64 n = 0; n < assigned; n++) kernels.add(out + item[n] * columns + from, y + n * columns + from, weight[n], to - from);
  });
}

} // namespace rarefy
