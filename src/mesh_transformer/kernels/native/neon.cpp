// NEON, which every aarch64 processor has.
#include <arm_neon.h>

#include "kernel.h"

namespace {

struct Neon {
  using Vector = float32x4_t;
  static constexpr size_t kLanes = 4;
  static constexpr int vectors(int rows) { return rows == 8 ? 2 : 4; }
  static Vector zero() { return vdupq_n_f32(0); }
  static Vector set1(float f) { return vdupq_n_f32(f); }
  static Vector load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Vector v) { vst1q_f32(p, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector mul(Vector a, Vector b) { return vmulq_f32(a, b); }
  static uint16x4_t load8(const void* p) {
    uint16x4_t v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static uint32_t load4(const void* p) {
    uint32_t v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static Vector from_bf16(const void* p) { return vreinterpretq_f32_u32(vshll_n_u16(load8(p), 16)); }
  static Vector from_f16(const void* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load8(p))); }
  static Vector widened(int8x8_t v) { return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(v)))); }
  static Vector from_i8(const void* p) { return widened(vreinterpret_s8_u32(vdup_n_u32(load4(p)))); }
  static void from_u4(const void* p, Vector& low, Vector& high) {
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(load4(p)));
    const int8x8_t eight = vdup_n_s8(8);
    low = widened(vsub_s8(vreinterpret_s8_u8(vand_u8(bytes, vdup_n_u8(15))), eight));
    high = widened(vsub_s8(vreinterpret_s8_u8(vshr_n_u8(bytes, 4)), eight));
  }
};

}  // namespace

namespace mesh_transformer {
void neon_columns(const Problem& p, size_t begin, size_t end) { columns<Neon>(p, begin, end); }
}  // namespace mesh_transformer
