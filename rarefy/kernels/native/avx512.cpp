// AVX-512 (F, BW, VL, DQ, VNNI): 16 lanes, and an instruction that expands packed values under a mask.
#include "strips.hpp"
#include "table.hpp"
#include "turn8.hpp"
#include <immintrin.h>

namespace rarefy {
namespace {
struct Avx512 : Strips {
  static constexpr int width = 16;
  using reg = __m512;
  static reg zero() { return _mm512_setzero_ps(); }
  static reg set(float f) { return _mm512_set1_ps(f); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
  static reg load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_part(float* p, reg r, int n) { _mm512_mask_storeu_ps(p, first(n), r); }
  static constexpr int registers = 32;
  static void store(float* p, reg r) { _mm512_storeu_ps(p, r); }
  static __m512i wide(const std::uint16_t* i) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(i))); }
  static reg gather(const float* x, const std::uint16_t* index) { return _mm512_i32gather_ps(wide(index), x, 4); }
  static reg gather_part(const float* x, const std::uint16_t* index, int n) { return _mm512_mask_i32gather_ps(zero(), first(n), wide(index), x, 4); }
  static reg spread(const float* x, const std::uint16_t* i) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(lane, _mm512_castps128_ps512(_mm_setr_ps(x[i[0]], x[i[1]], x[i[2]], x[i[3]])));
  }
  static void turn8(const float* from, i64 stride, float* to, i64 to_stride) { turn8_avx2(from, stride, to, to_stride); }
  using index = __m512i;
  template <int Bits> static index positions(const std::uint8_t* p) {
    std::uint32_t low = 0, high = 0;
    std::memcpy(&low, p, Bits), std::memcpy(&high, p + Bits, Bits);
    const __m512i shift = _mm512_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits, 0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits,
                                            6 * Bits, 7 * Bits);
    const __m512i all = _mm512_mask_set1_epi32(_mm512_set1_epi32(int(low)), 0xff00, int(high));
    return _mm512_and_si512(_mm512_srlv_epi32(all, shift), _mm512_set1_epi32((1 << Bits) - 1));
  }
  template <int N> static reg pick(const float* x, index at) {
    // A permutation reaches two registers of x, that is 8 groups.
    if (N == 2) {
      const __m512i lane = _mm512_add_epi32(at, _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28));
      return _mm512_permutex2var_ps(load(x), lane, load(x + 16));
    }
    const __m512i lane = _mm512_add_epi32(at, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
    return _mm512_mask_blend_ps(0xff00, _mm512_permutex2var_ps(load(x), lane, load(x + 16)), _mm512_permutex2var_ps(load(x + 32), lane, load(x + 48)));
  }
  static reg pick_any(const float* x, const std::int32_t* base, index at) {
    return _mm512_i32gather_ps(_mm512_add_epi32(at, _mm512_loadu_si512(base)), x, 4);
  }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(reg v) { return _mm512_reduce_add_ps(v); }
  static reg halves(reg a, reg b) { return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); }
  static void sum4(const reg (&v)[4], float* p) {
    const reg a = halves(v[0], v[1]), b = halves(v[2], v[3]);
    reg four = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); // a quarter of the register to each
    four = add(four, _mm512_permute_ps(four, 0x4e));
    four = add(four, _mm512_permute_ps(four, 0xb1));
    _mm_storeu_ps(p, _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12), four)));
  }
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
