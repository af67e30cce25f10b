// AVX2, FMA and F16C; compiled with those flags, called only where the processor has them.
#include <immintrin.h>

#include "kernel.h"

namespace {

struct Avx2 {
  using Vector = __m256;
  static constexpr size_t kLanes = 8;
  static constexpr int vectors(int rows) { return rows == 8 ? 1 : rows == 4 ? 2 : 4; }
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector set1(float f) { return _mm256_set1_ps(f); }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static Vector from_bf16(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
  }
  static Vector from_f16(const void* p) { return _mm256_cvtph_ps(load16(p)); }
  static Vector from_i8(const void* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8(p))); }
  static void from_u4(const void* p, Vector& low, Vector& high) {
    const __m128i values = _mm_setr_epi8(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i mask = _mm_set1_epi8(15), bytes = load8(p);
    low = widened(_mm_shuffle_epi8(values, _mm_and_si128(bytes, mask)));
    high = widened(_mm_shuffle_epi8(values, _mm_and_si128(_mm_srli_epi16(bytes, 4), mask)));
  }
  static Vector widened(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }
};

}  // namespace

namespace mesh_transformer {
void avx2_columns(const Problem& p, size_t begin, size_t end) { columns<Avx2>(p, begin, end); }
}  // namespace mesh_transformer
