// A group of columns times x for a strip of rows, in 256-bit registers: AVX2, and AVX-512 with its byte products.
#pragma once
#include "kernels.hpp"
#include <immintrin.h>

namespace rarefy {
namespace {

inline __m256i column(const std::uint8_t* codes, i64 at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at)); }

// y_r += scale_r t (sum_r - middle) + zero_r u for eight rows to a register.
template <int N> void add_scaled(const __m256i (&sum)[N], const std::uint16_t* scale, const std::uint16_t* zero, float t, int middle, float u, float* y) {
  const __m256 by = _mm256_set1_ps(t), plus = _mm256_set1_ps(u);
  const __m256i less = _mm256_set1_epi32(middle);
#pragma GCC unroll 8
  for (int k = 0; k < N; k++) {
    const __m256 s = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale + 8 * k))), by);
    __m256 out = _mm256_fmadd_ps(s, _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[k], less)), _mm256_loadu_ps(y + 8 * k));
    if (zero) out = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero + 8 * k))), plus, out);
    _mm256_storeu_ps(y + 8 * k, out);
  }
}

#ifdef __AVX512VNNI__
// Four columns are turned, so that the four codes of a row lie in 32 bits, and multiplied by four codes of x at once.
template <int Bits> void products(const std::uint8_t* codes, i64 stride, const Four* four, int n, __m256i (&sum)[Bits == 4 ? 8 : 4]) {
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (int f = 0; f < n; f++) {
    const __m256i a = column(codes, stride * four[f].column[0]), b = column(codes, stride * four[f].column[1]), c = column(codes, stride * four[f].column[2]), d = column(codes, stride * four[f].column[3]);
    const __m256i x = _mm256_set1_epi32(four[f].x);
    const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b), cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
    const __m256i rows[4] = {_mm256_unpacklo_epi16(ab0, cd0), _mm256_unpackhi_epi16(ab0, cd0), _mm256_unpacklo_epi16(ab1, cd1), _mm256_unpackhi_epi16(ab1, cd1)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      if (Bits == 8) {
        sum[k] = _mm256_dpbusd_epi32(sum[k], rows[k], x);
      } else { // high halves stay where they are: sixteen times their codes
        sum[k] = _mm256_dpbusd_epi32(sum[k], _mm256_and_si256(rows[k], _mm256_set1_epi8(15)), x);
        sum[4 + k] = _mm256_dpbusd_epi32(sum[4 + k], _mm256_and_si256(rows[k], _mm256_set1_epi8(char(0xf0))), x);
      }
    }
  }
  if (Bits == 4)
    for (int k = 4; k < 8; k++) sum[k] = _mm256_srai_epi32(sum[k], 4);
}
#else
inline void widen(__m256i sixteen, __m256i& first, __m256i& second) {
  first = _mm256_add_epi32(first, _mm256_srai_epi32(_mm256_unpacklo_epi16(sixteen, sixteen), 16));
  second = _mm256_add_epi32(second, _mm256_srai_epi32(_mm256_unpackhi_epi16(sixteen, sixteen), 16));
}

inline __m256i pair(std::int32_t x, int half) { return _mm256_set1_epi16(std::int16_t(x >> 16 * half)); }

// Two columns beside each other: products of 4 bits with 8 are added in 16 bits, which hold those of 16 columns (16 * 15 * 127 < 2^15).
inline void products4(const std::uint8_t* codes, i64 stride, const Four* four, int n, __m256i (&sum)[8]) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int f = 0; f < n;) {
    __m256i part[4] = {};
    for (const int end = f + 4 < n ? f + 4 : n; f < end; f++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m256i a = column(codes, stride * four[f].column[2 * half]), b = column(codes, stride * four[f].column[2 * half + 1]), x = pair(four[f].x, half);
        const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
        part[0] = _mm256_add_epi16(part[0], _mm256_maddubs_epi16(_mm256_and_si256(ab0, low), x));
        part[1] = _mm256_add_epi16(part[1], _mm256_maddubs_epi16(_mm256_and_si256(ab1, low), x));
        part[2] = _mm256_add_epi16(part[2], _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(ab0, 4), low), x));
        part[3] = _mm256_add_epi16(part[3], _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(ab1, 4), low), x));
      }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) widen(part[k], sum[2 * k], sum[2 * k + 1]);
  }
}

inline void products8(const std::uint8_t* codes, i64 stride, const Four* four, int n, __m256i (&sum)[4]) {
  const __m256i none = _mm256_setzero_si256();
  for (int f = 0; f < n; f++)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const __m256i a = column(codes, stride * four[f].column[2 * half]), b = column(codes, stride * four[f].column[2 * half + 1]);
      const __m256i x = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(pair(four[f].x, half)));
      const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
      sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(ab0, none), x));
      sum[1] = _mm256_add_epi32(sum[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(ab0, none), x));
      sum[2] = _mm256_add_epi32(sum[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(ab1, none), x));
      sum[3] = _mm256_add_epi32(sum[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(ab1, none), x));
    }
}

template <int Bits> void products(const std::uint8_t* codes, i64 stride, const Four* four, int n, __m256i (&sum)[Bits == 4 ? 8 : 4]) {
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  if constexpr (Bits == 4)
    products4(codes, stride, four, n, sum);
  else
    products8(codes, stride, four, n, sum);
}
#endif

struct Strips {
  template <int Bits>
  static void strip(const std::uint8_t* codes, i64 stride, const Four* four, int n, const std::uint16_t* scale, const std::uint16_t* zero, float t, int middle, float u, float* y) {
    __m256i sum[Bits == 4 ? 8 : 4];
    products<Bits>(codes, stride, four, n, sum);
    add_scaled(sum, scale, zero, t, middle, u, y);
  }
};

} // namespace
} // namespace rarefy
