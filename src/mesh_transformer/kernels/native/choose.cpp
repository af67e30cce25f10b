// Which path runs on this processor.
#include <cstring>

#include "problem.h"

namespace mesh_transformer {

void avx512_columns(const Problem&, size_t, size_t);
void avx2_columns(const Problem&, size_t, size_t);
void neon_columns(const Problem&, size_t, size_t);
void portable_columns(const Problem&, size_t, size_t);

namespace {

#if defined(__x86_64__)
// F16C came before AVX2 and is in every processor that has it; Clang 14 does not know how to ask for it.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
bool always() { return true; }

constexpr Path kPaths[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512, avx512_columns},
    {"avx2", has_avx2, avx2_columns},
#elif defined(__aarch64__)
    {"neon", always, neon_columns},
#endif
    {"portable", always, portable_columns},
};
constexpr size_t kCount = sizeof kPaths / sizeof kPaths[0];

}  // namespace

const Path* paths(size_t* count) {
  *count = kCount;
  return kPaths;
}

const Path* choose(const char* name) {
  for (const Path& path : kPaths)
    if ((!name || !std::strcmp(name, path.name)) && path.runs_here()) return &path;
  return nullptr;
}

size_t chunk_columns(const Problem& p, size_t threads) {
  const size_t bytes = p.kind == Kind::kFloat32 ? 4 : p.kind == Kind::kInt8 || p.kind == Kind::kInt4 ? 1 : 2;
  const size_t rows = p.rows < kRowsAtOnce ? p.rows : kRowsAtOnce;
  // Two kilobytes of each stored row. Shorter pieces of a row are read more slowly, so that a matrix of few columns
  // rather gives every thread one chunk than several.
  size_t chunk = 2048 / bytes;
  if (chunk > kSums / rows) chunk = kSums / rows / kColumnStep * kColumnStep;
  while (chunk > kColumnStep && p.columns < threads * chunk) chunk = chunk / 2 / kColumnStep * kColumnStep;
  return chunk < kColumnStep ? kColumnStep : chunk;
}

}  // namespace mesh_transformer
