// AVX-512 (F, BW, VL, DQ, VNNI): 16 lanes, and an instruction that expands packed values under a mask.
#include "loops.hpp"
#include <immintrin.h>

namespace rarefy {
namespace {
struct Avx512 {
  static constexpr int width = 16;
  using reg = __m512;
  static reg zero() { return _mm512_setzero_ps(); }
  static reg set(float f) { return _mm512_set1_ps(f); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
  static reg load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_part(float* p, reg r, int n) { _mm512_mask_storeu_ps(p, first(n), r); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(reg v) { return _mm512_reduce_add_ps(v); }
  static reg expand(const float* values, std::uint32_t bits) { return _mm512_maskz_expand_ps(__mmask16(bits), _mm512_loadu_ps(values)); }
  static reg expand_part(const float* values, std::uint32_t bits) { return _mm512_maskz_expandloadu_ps(__mmask16(bits), values); }
  static constexpr int groups = 2;
  static constexpr float offset8 = 0;
  static reg half(const std::uint16_t* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static reg compress(reg v, std::uint32_t bits) { return _mm512_maskz_compress_ps(__mmask16(bits), v); }
  template <int Bits> static __m512i codes(const std::uint8_t* p, int n) {
    if (Bits == 8) return _mm512_maskz_loadu_epi32(n == 2 ? 0xffff : 0xff, p);
    const __m256i both = _mm256_maskz_loadu_epi32(n == 2 ? 0xff : 0xf, p);
    const __m512i twice = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), _mm512_castsi256_si512(both));
    const __m512i shifted = _mm512_mask_srli_epi16(twice, 0xff00ff00, twice, 4); // the upper half of each group
    return _mm512_and_si512(shifted, _mm512_set1_epi8(15));
  }
  static reg dot(reg sum, __m512i q, const std::int8_t* a, const std::int8_t* b, float fa, float fb, bool) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)), high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    const __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    const __m512 scale = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_set1_ps(fa)), _mm256_set1_ps(fb), 1);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), q, x)), scale, sum);
  }
};
} // namespace

const Kernels& avx512() {
  static constexpr Kernels table = kernels<Avx512>("avx512");
  return table;
}
} // namespace rarefy
