// Plain C++: any processor.
#include "loops.hpp"

namespace rarefy {
namespace {
struct Plain {
  static constexpr int width = 8;
  struct reg {
    float lane[width];
  };
  static reg zero() { return {}; }
  static reg load(const float* p) {
    reg r;
    std::memcpy(r.lane, p, sizeof r.lane);
    return r;
  }
  static reg load_part(const float* p, int n) {
    reg r{};
    std::memcpy(r.lane, p, n * sizeof(float));
    return r;
  }
  static void store_part(float* p, reg r, int n) { std::memcpy(p, r.lane, n * sizeof(float)); }
  static reg add(reg a, const reg& b) {
    for (int i = 0; i < width; i++) a.lane[i] += b.lane[i];
    return a;
  }
  static reg fma(const reg& a, const reg& b, reg c) {
    for (int i = 0; i < width; i++) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static float sum(const reg& r) {
    float s = 0;
    for (float v : r.lane) s += v;
    return s;
  }
  static reg expand(const float* values, std::uint32_t bits) { return expand_part(values, bits); }
  static reg expand_part(const float* values, std::uint32_t bits) {
    reg r{};
    for (int i = 0; i < width; i++)
      if (bits >> i & 1) r.lane[i] = *values++;
    return r;
  }
};
} // namespace

const Kernels& generic() {
  static constexpr Kernels table = kernels<Plain>("generic");
  return table;
}
} // namespace rarefy
