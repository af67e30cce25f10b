// AVX-512 F, BW, DQ and VL; compiled with those flags, called only where the processor has them.
#include <immintrin.h>

#include "kernel.h"

namespace {

struct Avx512 {
  using Vector = __m512;
  static constexpr size_t kLanes = 16;
  static constexpr int vectors(int rows) { return rows == 8 ? 2 : rows == 1 ? 8 : 4; }
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector set1(float f) { return _mm512_set1_ps(f); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Vector from_bf16(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(p)), 16));
  }
  static Vector from_f16(const void* p) { return _mm512_cvtph_ps(load32(p)); }
  static Vector from_i8(const void* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(p))); }
  // A look-up reads the lowest four bits of each lane: it masks, converts and subtracts in one instruction.
  static void from_u4(const void* p, Vector& low, Vector& high) {
    const Vector values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i bytes = _mm512_cvtepu8_epi32(load16(p));
    low = _mm512_permutexvar_ps(bytes, values);
    high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values);
  }
};

}  // namespace

namespace mesh_transformer {
void avx512_columns(const Problem& p, size_t begin, size_t end) { columns<Avx512>(p, begin, end); }
}  // namespace mesh_transformer
