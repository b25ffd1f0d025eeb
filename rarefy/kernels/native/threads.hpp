// Work shared by the threads of torch's OpenMP pool. The thread sanitizer does not see the barriers of libgomp: with RAREFY_STD_THREADS
// threads and barriers are those of the system, which it does (tests/native).
#pragma once
#include "kernels.hpp"
#if defined(RAREFY_STD_THREADS)
#include <pthread.h>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
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

// body(thread, all of them) on each of up to `threads` threads; barrier() inside it waits for the others.
#if defined(RAREFY_STD_THREADS)
inline thread_local pthread_barrier_t* of_team = nullptr;
inline bool inside_team() { return of_team != nullptr; }
inline void barrier() {
  if (of_team) pthread_barrier_wait(of_team);
}
template <class Body> void team(int threads, const Body& body) {
  if (threads <= 1) return body(0, 1);
  pthread_barrier_t gate;
  pthread_barrier_init(&gate, nullptr, unsigned(threads));
  std::vector<std::thread> others;
  for (int t = 0; t < threads; t++) others.emplace_back([&, t] { of_team = &gate, body(t, threads); });
  for (std::thread& one : others) one.join();
  pthread_barrier_destroy(&gate);
}
#elif defined(_OPENMP)
inline bool inside_team() { return omp_in_parallel(); }
inline void barrier() {
#pragma omp barrier
}
template <class Body> void team(int threads, const Body& body) {
  if (threads <= 1) return body(0, 1);
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
}
#else
inline bool inside_team() { return false; }
inline void barrier() {}
template <class Body> void team(int, const Body& body) { body(0, 1); }
#endif

// body(from, to) over [0, rows), by `threads` threads where `work` is worth it.
template <class Body> void parallel(i64 rows, int threads, i64 work, const Body& body, i64 align = kAlign) {
  if (threads <= 1 || work <= kSerial || rows <= 1 || inside_team()) return body(i64(0), rows);
  team(threads, [&](int t, int all) {
    const Share mine(rows, t, all, align);
    body(mine.from, mine.to);
  });
}

} // namespace rarefy
