// Work shared by the threads of torch's OpenMP pool.
#pragma once
#include "kernels.hpp"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace rarefy {

constexpr i64 kSerial = 1 << 16; // multiply-adds below which one thread is faster than waking the others
constexpr i64 kAlign = 4;        // a thread's first row, so that the loops over four rows stay whole

// Rows that thread t of `all` computes: [first, second).
struct Share {
  i64 from, to;
  Share(i64 rows, int t, int all, i64 align = kAlign) : from(edge(rows, t, all, align)), to(edge(rows, t + 1, all, align)) {}
  static i64 edge(i64 rows, int t, int all, i64 align) { return t == all ? rows : rows * t / all / align * align; }
};

// body(from, to) over [0, rows), by `threads` threads where `work` is worth it.
template <class Body> void parallel(i64 rows, int threads, i64 work, const Body& body, i64 align = kAlign) {
#ifdef _OPENMP
  if (threads > 1 && work > kSerial && rows > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
      const Share mine(rows, omp_get_thread_num(), omp_get_num_threads(), align);
      body(mine.from, mine.to);
    }
    return;
  }
#else
  (void)threads, (void)work;
#endif
  body(i64(0), rows);
}

} // namespace rarefy
