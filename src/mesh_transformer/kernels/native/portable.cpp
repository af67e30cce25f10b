// Plain C++ on GCC's and Clang's generic vectors: any processor, little-endian.
#include "kernel.h"

namespace {

struct Portable {
  typedef float Vector __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  static constexpr size_t kLanes = 4;
  static constexpr int vectors(int rows) { return rows == 8 ? 1 : rows == 4 ? 2 : 4; }
  static Vector zero() { return Vector{}; }
  static Vector set1(float f) { return Vector{f, f, f, f}; }
  static Vector load(const float* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Vector v) { __builtin_memcpy(p, &v, sizeof v); }
  // Two roundings, everywhere: -ffp-contract=off keeps the compiler from fusing them where it could.
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector mul(Vector a, Vector b) { return a * b; }
  static Bits halves(const unsigned char* p) {
    uint16_t h[4];
    __builtin_memcpy(h, p, sizeof h);
    return Bits{h[0], h[1], h[2], h[3]};
  }
  static Vector as_float(Bits bits) {
    Vector v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
  }
  static Vector from_bf16(const unsigned char* p) { return as_float(halves(p) << 16); }
  // Normal numbers: the exponent moves from a bias of 15 to one of 127. Subnormal ones are whole multiples of 2^-24, and
  // are made as such: XLA's threads take a float32 that is subnormal for zero, so a product cannot mend their exponent.
  // Infinity and NaN keep the highest exponent.
  static Vector from_f16(const unsigned char* p) {
    const Bits h = halves(p);
    const Bits magnitude = h & 0x7fffu;
    const Bits normal = (magnitude << 13) + (112u << 23);
    const Bits special = magnitude << 13 | 0x7f800000u;
    const Vector small = __builtin_convertvector(magnitude, Vector) * set1(0x1p-24f);
    Bits bits;
    __builtin_memcpy(&bits, &small, sizeof bits);
    bits = chosen(magnitude >= 0x0400u, normal, bits);
    bits = chosen(magnitude >= 0x7c00u, special, bits);
    return as_float(bits | (h & 0x8000u) << 16);
  }
  template <class Mask>
  static Bits chosen(Mask mask, Bits yes, Bits no) {
    return (Bits(mask) & yes) | (~Bits(mask) & no);
  }
  static Vector from_i8(const unsigned char* p) {
    const auto* s = reinterpret_cast<const signed char*>(p);
    return Vector{float(s[0]), float(s[1]), float(s[2]), float(s[3])};
  }
  static void from_u4(const unsigned char* p, Vector& low, Vector& high) {
    low = Vector{float((p[0] & 15) - 8), float((p[1] & 15) - 8), float((p[2] & 15) - 8), float((p[3] & 15) - 8)};
    high = Vector{float((p[0] >> 4) - 8), float((p[1] >> 4) - 8), float((p[2] >> 4) - 8), float((p[3] >> 4) - 8)};
  }
};

}  // namespace

namespace mesh_transformer {
void portable_columns(const Problem& p, size_t begin, size_t end) { columns<Portable>(p, begin, end); }
}  // namespace mesh_transformer
