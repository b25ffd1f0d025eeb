// AVX-512 (F, BW, VL, DQ, VNNI): 16 lanes, and an instruction that expands packed values under a mask.
#include "loops.hpp"
#include <immintrin.h>

namespace rarefy {
namespace {
struct Avx512 {
  static constexpr int width = 16;
  using reg = __m512;
  static reg zero() { return _mm512_setzero_ps(); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
  static reg load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_part(float* p, reg r, int n) { _mm512_mask_storeu_ps(p, first(n), r); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(reg v) { return _mm512_reduce_add_ps(v); }
  static reg expand(const float* values, std::uint32_t bits) { return _mm512_maskz_expand_ps(__mmask16(bits), _mm512_loadu_ps(values)); }
  static reg expand_part(const float* values, std::uint32_t bits) { return _mm512_maskz_expandloadu_ps(__mmask16(bits), values); }
};
} // namespace

const Kernels& avx512() {
  static constexpr Kernels table = kernels<Avx512>("avx512");
  return table;
}
} // namespace rarefy
