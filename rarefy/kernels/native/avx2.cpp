// AVX2 and FMA: 8 lanes.
#include "strips.hpp"
#include "table.hpp"
#include "turn8.hpp"
#include <immintrin.h>

namespace rarefy {
namespace {
// lanes[m][j]: which of the next values lane j takes where bit j of m is set; the top bit marks a lane without one.
struct Lanes {
  alignas(64) std::int32_t lane[256][8];
  constexpr Lanes() : lane() {
    for (int m = 0; m < 256; m++)
      for (int j = 0, next = 0; j < 8; j++) lane[m][j] = m >> j & 1 ? next++ : std::int32_t(0x80000000u);
  }
};
constexpr Lanes lanes;

// fronts[m][j]: the j-th lane whose bit is set in m; the lanes after the last one repeat lane 0.
struct Fronts {
  alignas(64) std::int32_t lane[256][8];
  constexpr Fronts() : lane() {
    for (int m = 0; m < 256; m++)
      for (int j = 0, next = 0; j < 8; j++)
        if (m >> j & 1) lane[m][next++] = j;
  }
};
constexpr Fronts fronts;

struct Avx2 : Strips {
  static constexpr int width = 8;
  using reg = __m256;
  static reg zero() { return _mm256_setzero_ps(); }
  static reg set(float f) { return _mm256_set1_ps(f); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static reg load_part(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_part(float* p, reg r, int n) {
    if (n == width)
      _mm256_storeu_ps(p, r);
    else
      _mm256_maskstore_ps(p, first(n), r);
  }
  static constexpr int registers = 16;
  static void store(float* p, reg r) { _mm256_storeu_ps(p, r); }
  // Eight loads and inserts: no slower than the gather instruction, and much faster where that is microcode.
  static reg gather(const float* x, const std::uint16_t* i) {
    return _mm256_setr_ps(x[i[0]], x[i[1]], x[i[2]], x[i[3]], x[i[4]], x[i[5]], x[i[6]], x[i[7]]);
  }
  static reg gather_part(const float* x, const std::uint16_t* index, int n) { return _mm256_and_ps(gather(x, index), _mm256_castsi256_ps(first(n))); }
  static reg spread(const float* x, const std::uint16_t* index) { return _mm256_set_m128(_mm_set1_ps(x[index[1]]), _mm_set1_ps(x[index[0]])); }
  static void turn8(const float* from, i64 stride, float* to, i64 to_stride) { turn8_avx2(from, stride, to, to_stride); }
  using index = __m256i;
  template <int Bits> static index positions(const std::uint8_t* p) {
    std::uint32_t all = 0;
    std::memcpy(&all, p, Bits);
    const __m256i shift = _mm256_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits);
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(int(all)), shift), _mm256_set1_epi32((1 << Bits) - 1));
  }
  template <int N> static reg pick(const float* x, index at) {
    // Each register of x holds two groups: lane j of the result lies in its upper or lower half.
    constexpr int h = 4;
    if (N == 2) {
      const __m256i lane = _mm256_add_epi32(at, _mm256_setr_epi32(0, 0, h, h, 0, 0, h, h));
      return _mm256_blend_ps(_mm256_permutevar8x32_ps(load(x), lane), _mm256_permutevar8x32_ps(load(x + 8), lane), 0xf0);
    }
    const __m256i lane = _mm256_add_epi32(at, _mm256_setr_epi32(0, h, 0, h, 0, h, 0, h));
    const reg low = _mm256_blend_ps(_mm256_permutevar8x32_ps(load(x), lane), _mm256_permutevar8x32_ps(load(x + 8), lane), 0x0c);
    const reg high = _mm256_blend_ps(_mm256_permutevar8x32_ps(load(x + 16), lane), _mm256_permutevar8x32_ps(load(x + 24), lane), 0xc0);
    return _mm256_blend_ps(low, high, 0xf0);
  }
  static reg pick_any(const float* x, const std::int32_t* base, index at) {
    return _mm256_i32gather_ps(x, _mm256_add_epi32(at, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(base))), 4);
  }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(reg v) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
  }
  static void sum4(const reg (&v)[4], float* p) {
    const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
  }
  static reg place(reg packed, std::uint32_t bits) {
    const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes.lane[bits]));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(packed, lane), _mm256_setzero_ps(), _mm256_castsi256_ps(lane));
  }
  static reg expand(const float* values, std::uint32_t bits) { return place(_mm256_loadu_ps(values), bits); }
  static reg expand_part(const float* values, std::uint32_t bits) { return place(load_part(values, __builtin_popcount(bits)), bits); }
  static constexpr int groups = 1;
  static constexpr float offset8 = 128; // maddubs would saturate on large unsigned codes: take them as signed
  static reg half(const std::uint16_t* p, int n) {
    std::uint16_t part[width] = {};
    if (n < width) std::memcpy(part, p, n * sizeof(part[0])), p = part;
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static reg compress(reg v, std::uint32_t bits) { return _mm256_permutevar8x32_ps(v, _mm256_load_si256(reinterpret_cast<const __m256i*>(fronts.lane[bits]))); }
  template <int Bits> static __m256i codes(const std::uint8_t* p, int) {
    if (Bits == 8) return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi8(char(0x80)));
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1), _mm256_set1_epi8(15));
  }
  static reg dot(reg sum, __m256i q, const std::int8_t* a, const std::int8_t*, float fa, float, bool wide) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    if (wide) x = _mm256_sign_epi8(x, q), q = _mm256_abs_epi8(q);
    const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(q, x), _mm256_set1_epi16(1));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(pairs), _mm256_set1_ps(fa), sum);
  }
};
} // namespace

const Kernels& avx2() {
  static constexpr Kernels table = kernels<Avx2>("avx2");
  return table;
}
} // namespace rarefy
