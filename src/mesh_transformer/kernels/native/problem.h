// What is multiplied, and the ways to do it. No other header of this project is needed to call a kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mesh_transformer {

enum class Kind { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

// One product: out [rows, columns] = x [rows, inner] * w [inner, columns], all in C order.
struct Problem {
  Kind kind;
  size_t rows, inner, columns;
  const float* x;
  // Elements of `kind`; for int4 bytes [inner / 2, columns], row 2j of w in the low halves of row j, 2j + 1 in the high.
  const void* w;
  // int8: float [columns]. int4: float16 bits [inner / group, columns]. Otherwise null.
  const void* scale;
  size_t group;  // rows of w that share a scale: int4 only, even, a divisor of `inner`
  float* out;
};

// Writes the columns begin..end of the result. `begin` is a multiple of kColumnStep.
using Columns = void (*)(const Problem&, size_t begin, size_t end);

constexpr size_t kColumnStep = 64;
// Rows for which the weights are read once.
constexpr size_t kRowsAtOnce = 16;
// Sums that a thread holds: 32 KB, which stay in the first cache beside the lines of w that are under way.
constexpr size_t kSums = 8192;

struct Path {
  const char* name;
  bool (*runs_here)();
  Columns columns;
};

// In the order of preference; the last runs everywhere.
const Path* paths(size_t* count);

// The path of this name; the first that runs here for null; null if there is no such path or it does not run here.
const Path* choose(const char* name);

// Columns that one thread should take at a time.
size_t chunk_columns(const Problem& problem, size_t threads);

}  // namespace mesh_transformer
