// Runs every path on awkward shapes under AddressSanitizer and UndefinedBehaviorSanitizer (make sanitize). Arrays are
// exactly as large as they must be and begin one element off, so that a byte too many read or written is seen. Results
// are compared with sums in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "parallel.h"

using namespace mesh_transformer;

namespace {

constexpr Kind kKinds[] = {Kind::kFloat32, Kind::kBFloat16, Kind::kFloat16, Kind::kInt8, Kind::kInt4};
constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int8", "int4"};

// An array whose first element lies one element behind the beginning of an allocation that ends where it ends.
template <class T>
struct Shifted {
  explicit Shifted(size_t n) : memory(static_cast<T*>(std::malloc((n + 1) * sizeof(T)))), data(memory.get() + 1) {
    if (n) std::memset(static_cast<void*>(data), 0, n * sizeof(T));
  }
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory;
  T* data;
};

uint32_t state = 1;
uint32_t random_bits() { return state = state * 1664525u + 1013904223u, state >> 8; }

float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

double from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double sign = h >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

struct Case {
  Kind kind;
  size_t rows, inner, columns, group;
  double special;  // 0, or a value that is put into x and, where the kind has it, into w
};

double weight(const Case& c, const unsigned char* w, const unsigned char* scale, size_t k, size_t n) {
  const size_t at = k * c.columns + n;
  uint16_t half = 0;
  float wide = 0;
  switch (c.kind) {
    case Kind::kFloat32: std::memcpy(&wide, w + 4 * at, 4); return wide;
    case Kind::kBFloat16: std::memcpy(&half, w + 2 * at, 2); return from_bits(uint32_t{half} << 16);
    case Kind::kFloat16: std::memcpy(&half, w + 2 * at, 2); return from_half(half);
    case Kind::kInt8: std::memcpy(&wide, scale + 4 * n, 4); return double{wide} * static_cast<signed char>(w[at]);
    case Kind::kInt4: break;
  }
  std::memcpy(&half, scale + 2 * (k / c.group * c.columns + n), 2);
  return ((w[k / 2 * c.columns + n] >> (k % 2 ? 4 : 0) & 15) - 8) * from_half(half);
}

template <class T>
void fill(const Case& c, T* values, size_t n, size_t special_at) {
  for (size_t i = 0; i < n; ++i) {
    const float f = static_cast<float>(random_bits() % 2001) / 1000 - 1;
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (c.kind == Kind::kFloat32) std::memcpy(values + i, &bits, sizeof(T));
    if (c.kind == Kind::kBFloat16) values[i] = static_cast<T>(bits >> 16);
    if (c.kind == Kind::kFloat16) values[i] = static_cast<T>(random_bits() & 0xbbff);  // subnormals too, below 1 in size
    if (c.kind == Kind::kInt8 || c.kind == Kind::kInt4) values[i] = static_cast<T>(random_bits());
  }
  if (c.special == 0 || !n) return;
  const float f = static_cast<float>(c.special);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (c.kind == Kind::kFloat32) std::memcpy(values + special_at % n, &bits, sizeof(T));
  if (c.kind == Kind::kBFloat16) values[special_at % n] = static_cast<T>(bits >> 16);
  if (c.kind == Kind::kFloat16) values[special_at % n] = static_cast<T>(std::isnan(c.special) ? 0x7e00 : 0x7c00);
}

template <class T>
int run(const Path& path, const Case& c) {
  const size_t stored = c.kind == Kind::kInt4 ? c.inner / 2 : c.inner, groups = c.group ? c.inner / c.group : 0;
  Shifted<float> x(c.rows * c.inner), out(c.rows * c.columns), scale8(c.kind == Kind::kInt8 ? c.columns : 0);
  Shifted<T> w(stored * c.columns);
  Shifted<uint16_t> scale4(c.kind == Kind::kInt4 ? groups * c.columns : 0);
  fill(c, w.data, stored * c.columns, 7);
  for (size_t i = 0; i < c.rows * c.inner; ++i) x.data[i] = static_cast<float>(random_bits() % 2001) / 1000 - 1;
  if (c.special != 0 && c.rows && c.inner) x.data[c.rows * c.inner / 2] = static_cast<float>(c.special);
  if (c.kind == Kind::kInt8)
    for (size_t n = 0; n < c.columns; ++n) scale8.data[n] = static_cast<float>(random_bits() % 100) / 100;
  if (c.kind == Kind::kInt4)
    for (size_t i = 0; i < groups * c.columns; ++i) scale4.data[i] = static_cast<uint16_t>(random_bits() & 0x3bff);
  const void* scale = c.kind == Kind::kInt8 ? static_cast<const void*>(scale8.data) : scale4.data;

  Problem p = {c.kind, c.rows, c.inner, c.columns, x.data, w.data, scale, c.group, out.data};
  std::vector<std::thread> threads;
  multiply(p, path, 3, [&](std::function<void()> task) { threads.emplace_back(std::move(task)); });
  for (auto& thread : threads) thread.join();

  int wrong = 0;
  for (size_t r = 0; r < c.rows; ++r)
    for (size_t n = 0; n < c.columns; ++n) {
      double sum = 0, size = 0;
      for (size_t k = 0; k < c.inner; ++k) {
        const double term = double{x.data[r * c.inner + k]} *
                            weight(c, reinterpret_cast<const unsigned char*>(w.data),
                                   static_cast<const unsigned char*>(scale), k, n);
        sum += term;
        size += std::fabs(term);
      }
      const double got = out.data[r * c.columns + n];
      const bool same = std::isnan(sum) ? std::isnan(got) : std::isinf(sum) ? got == sum : std::fabs(got - sum) <= 1e-5 * size;
      if (!same && !wrong++)
        std::fprintf(stderr, "%s %s rows %zu inner %zu columns %zu: (%zu, %zu) is %g, not %g\n", path.name,
                     kNames[static_cast<int>(c.kind)], c.rows, c.inner, c.columns, r, n, got, sum);
    }
  return wrong;
}

int run_case(const Path& path, const Case& c) {
  switch (c.kind) {
    case Kind::kFloat32: return run<float>(path, c);
    case Kind::kBFloat16:
    case Kind::kFloat16: return run<uint16_t>(path, c);
    default: return run<unsigned char>(path, c);
  }
}

}  // namespace

int main() {
  const double specials[] = {0, std::nan(""), std::numeric_limits<double>::infinity()};
  const size_t shapes[][3] = {{0, 8, 8},    {3, 0, 5},    {2, 6, 0},    {1, 2, 1},    {5, 34, 1},
                              {1, 96, 63},  {2, 130, 65}, {7, 38, 129}, {16, 64, 200}, {17, 66, 31},
                              {3, 256, 700}, {35, 18, 77}, {1, 128, 2111}};
  size_t count, ran = 0;
  int wrong = 0;
  const Path* all = paths(&count);
  for (size_t i = 0; i < count; ++i) {
    if (!all[i].runs_here()) {
      std::printf("%s: not on this processor\n", all[i].name);
      continue;
    }
    const size_t before = ran;
    for (Kind kind : kKinds)
      for (const auto& s : shapes)
        for (double special : specials)
          for (size_t odd = 0; odd < 2; ++odd) {
            if (kind == Kind::kInt4 && odd) continue;  // its inner axis is even
            const size_t group = s[1] % 128 == 0 && s[1] ? 128 : s[1] % 32 == 0 && s[1] ? 32 : 2;
            wrong += run_case(all[i], {kind, s[0], s[1] + odd, s[2], kind == Kind::kInt4 ? group : 0, special}) > 0;
            ++ran;
          }
    std::printf("%s: %zu products\n", all[i].name, ran - before);
  }
  if (wrong) std::fprintf(stderr, "%d products are wrong\n", wrong);
  return wrong > 0;
}
