// Plain C++: any processor.
#include "table.hpp"

namespace rarefy {
namespace {
struct Plain {
  static constexpr int width = 8;
  struct reg {
    float lane[width];
  };
  static reg zero() { return {}; }
  static reg set(float f) {
    reg r;
    for (float& v : r.lane) v = f;
    return r;
  }
  static reg mul(reg a, const reg& b) {
    for (int i = 0; i < width; i++) a.lane[i] *= b.lane[i];
    return a;
  }
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
  static constexpr int registers = 16;
  static void store(float* p, const reg& r) { std::memcpy(p, r.lane, sizeof r.lane); }
  static reg gather(const float* x, const std::uint16_t* index) { return gather_part(x, index, width); }
  static reg gather_part(const float* x, const std::uint16_t* index, int n) {
    reg r{};
    for (int i = 0; i < n; i++) r.lane[i] = x[index[i]];
    return r;
  }
  static reg spread(const float* x, const std::uint16_t* index) {
    reg r;
    for (int i = 0; i < width; i++) r.lane[i] = x[index[i / 4]];
    return r;
  }
  static void turn8(const float* from, i64 stride, float* to, i64 to_stride) {
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < 8; j++) to[j * to_stride + i] = from[i * stride + j];
  }
  struct index {
    int lane[width];
  };
  template <int Bits> static index positions(const std::uint8_t* p) {
    std::uint32_t all = 0;
    std::memcpy(&all, p, Bits);
    index at;
    for (int i = 0; i < width; i++) at.lane[i] = all >> i * Bits & ((1 << Bits) - 1);
    return at;
  }
  template <int N> static reg pick(const float* x, const index& at) {
    reg r;
    for (int i = 0; i < width; i++) r.lane[i] = x[i / N * 4 + at.lane[i]];
    return r;
  }
  static reg pick_any(const float* x, const std::int32_t* base, const index& at) {
    reg r;
    for (int i = 0; i < width; i++) r.lane[i] = x[base[i] + at.lane[i]];
    return r;
  }
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
  static void sum4(const reg (&v)[4], float* p) {
    for (int i = 0; i < 4; i++) p[i] = sum(v[i]);
  }
  static reg expand(const float* values, std::uint32_t bits) { return expand_part(values, bits); }
  static reg expand_part(const float* values, std::uint32_t bits) {
    reg r{};
    for (int i = 0; i < width; i++)
      if (bits >> i & 1) r.lane[i] = *values++;
    return r;
  }
  static constexpr int groups = 1;
  static constexpr float offset8 = 0;
  struct qreg {
    std::uint8_t lane[kGroup];
  };
  static float half(std::uint16_t h) {
    const std::uint32_t sign = std::uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(float(fraction), -24);
    const std::uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
  static reg half(const std::uint16_t* p, int n) {
    reg r{};
    for (int i = 0; i < n; i++) r.lane[i] = half(p[i]);
    return r;
  }
  static reg compress(const reg& v, std::uint32_t bits) {
    reg r{};
    for (int i = 0, next = 0; i < width; i++)
      if (bits >> i & 1) r.lane[next++] = v.lane[i];
    return r;
  }
  template <int Bits> static qreg codes(const std::uint8_t* p, int) {
    qreg q;
    for (int i = 0; i < kGroup; i++) q.lane[i] = Bits == 8 ? p[i] : i < 16 ? p[i] & 15 : p[i - 16] >> 4;
    return q;
  }
  static reg dot(reg sum, const qreg& q, const std::int8_t* a, const std::int8_t*, float fa, float, bool) {
    int total = 0;
    for (int i = 0; i < kGroup; i++) total += q.lane[i] * a[i];
    sum.lane[0] += fa * float(total);
    return sum;
  }
  template <int Bits>
  static void strip(const std::uint8_t* codes, i64 stride, const Four* four, int n, const std::uint16_t* scale, const std::uint16_t* zero, float t, int middle, float u, float* y) {
    int sum[Bits == 4 ? 64 : 32] = {};
    for (int f = 0; f < n; f++) {
      std::int8_t x[4];
      std::memcpy(x, &four[f].x, sizeof x);
      for (int c = 0; c < 4; c++)
        for (int row = 0; row < 32; row++) {
          const std::uint8_t code = codes[stride * four[f].column[c] + row / 4 % 2 * 16 + row / 8 * 4 + row % 4];
          sum[row] += (Bits == 4 ? code & 15 : code) * x[c];
          if (Bits == 4) sum[32 + row] += (code >> 4) * x[c];
        }
    }
    for (int row = 0; row < (Bits == 4 ? 64 : 32); row++) y[row] += half(scale[row]) * t * float(sum[row] - middle) + (zero ? half(zero[row]) * u : 0.0f);
  }
};
} // namespace

const Kernels& generic() {
  static constexpr Kernels table = kernels<Plain>("generic");
  return table;
}
} // namespace rarefy
