// The product of a few rows with a matrix, as a template over an instruction set. Included once by each file that
// defines one; everything is in an unnamed namespace, so that code compiled for one instruction set is never linked into
// another's.
//
// An instruction set `I` gives: Vector; kLanes; zero(), set1(f), load(p), store(p, v), fma(a, b, c) = a * b + c,
// add, mul; from_bf16(p), from_f16(p), from_i8(p), each kLanes elements widened exactly; from_u4(p, low, high), kLanes
// bytes to the values of their halves, less 8.
//
// Order of summation, the same for every element whatever the number of rows, the chunk of columns and the number of
// threads: the inner axis is cut into blocks of kBlock (int4: into groups, and these into pieces of at most
// kGroupBlock); within a block, one after the other from zero, by I::fma; the sums of blocks are added one after the
// other (int4: times the group's scale, by I::fma).
#pragma once

#include "problem.h"

namespace {

using mesh_transformer::Kind;
using mesh_transformer::Problem;

using mesh_transformer::kRowsAtOnce;
using mesh_transformer::kSums;

// Stored rows of w are read side by side, block by block. No more than eight: where the number of columns is a power of
// two, lines of one column lie in one set of the first cache, which has eight or twelve places. The bytes of int4 are so
// much arithmetic each that fewer additions to the sums weigh more.
constexpr size_t kBlock = 8;
constexpr size_t kGroupBlock = 32;
constexpr size_t kRowsInRegisters = 8;
// How far ahead of its use a line of w is fetched, in bytes of each stored row.
constexpr size_t kAhead = 512;

template <Kind kind>
constexpr size_t bytes_of() {
  return kind == Kind::kFloat32 ? 4 : kind == Kind::kBFloat16 || kind == Kind::kFloat16 ? 2 : 1;
}

// A block of the inner axis, for up to eight rows.
struct Block {
  const float* x;              // [inner of the block, R]
  const unsigned char* w;      // the block's first stored row, at the first column
  const unsigned char* scale;  // int4: the group's float16, at the first column
  size_t stored_rows;          // of w: for int4 half of the block's
  size_t stride;               // bytes from a stored row to the next
  size_t columns;              // how many
  float* sums;                 // [R, sums_stride], whole vectors
  size_t sums_stride;
};

template <class I, Kind kind>
inline typename I::Vector widen(const unsigned char* p) {
  if constexpr (kind == Kind::kFloat32) return I::load(reinterpret_cast<const float*>(p));
  if constexpr (kind == Kind::kBFloat16) return I::from_bf16(p);
  if constexpr (kind == Kind::kFloat16) return I::from_f16(p);
  if constexpr (kind == Kind::kInt8) return I::from_i8(p);
}

// R rows and V vectors of columns from column n on.
template <class I, Kind kind, int R, int V>
inline __attribute__((always_inline)) void tile(const Block& b, size_t n) {
  using Vector = typename I::Vector;
  constexpr size_t kBytes = bytes_of<kind>() * I::kLanes;
  Vector sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[r][v] = I::zero();
  const unsigned char* w = b.w + n * bytes_of<kind>();
  const float* x = b.x;
  // Near the end of the columns: the beginning of the next block's.
  size_t ahead = kAhead;
  const size_t left = (b.columns - n) * bytes_of<kind>();
  if (left <= kAhead) ahead = b.stored_rows * b.stride - n * bytes_of<kind>() + kAhead - left;
  for (size_t j = 0; j < b.stored_rows; ++j, w += b.stride) {
#pragma GCC unroll 16
    for (size_t line = 0; line < kBytes * V; line += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(w) + ahead + line));
    Vector low[V], high[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      if constexpr (kind == Kind::kInt4)
        I::from_u4(w + v * kBytes, low[v], high[v]);
      else
        low[v] = widen<I, kind>(w + v * kBytes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector factor = I::set1(x[r]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = I::fma(factor, low[v], sum[r][v]);
    }
    x += R;
    if constexpr (kind == Kind::kInt4) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vector factor = I::set1(x[r]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[r][v] = I::fma(factor, high[v], sum[r][v]);
      }
      x += R;
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const size_t column = n + v * I::kLanes;
    Vector scale = I::zero();
    if constexpr (kind == Kind::kInt4) scale = I::from_f16(b.scale + column * 2);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* sums = b.sums + r * b.sums_stride + column;
      if constexpr (kind == Kind::kInt4)
        I::store(sums, I::fma(scale, sum[r][v], I::load(sums)));
      else
        I::store(sums, I::add(I::load(sums), sum[r][v]));
    }
  }
}

// The last columns, which do not fill a vector: copied to where they do.
template <class I, Kind kind, int R>
void remainder(const Block& b, size_t n) {
  constexpr size_t kStored = kBlock > kGroupBlock / 2 ? kBlock : kGroupBlock / 2;
  alignas(64) unsigned char w[kStored][I::kLanes * bytes_of<kind>()] = {};
  alignas(64) unsigned char scale[I::kLanes * 2] = {};
  const size_t count = b.columns - n;
  for (size_t j = 0; j < b.stored_rows; ++j)
    __builtin_memcpy(w[j], b.w + j * b.stride + n * bytes_of<kind>(), count * bytes_of<kind>());
  if (kind == Kind::kInt4) __builtin_memcpy(scale, b.scale + n * 2, count * 2);
  Block last = b;
  last.w = w[0];
  last.stride = sizeof w[0];
  last.scale = scale;
  last.sums = b.sums + n;
  last.columns = count;
  tile<I, kind, R, 1>(last, 0);
}

template <class I, Kind kind, int R>
void rows_in_registers(const Block& b) {
  constexpr int V = I::vectors(R);
  size_t n = 0;
  for (; n + V * I::kLanes <= b.columns; n += V * I::kLanes) tile<I, kind, R, V>(b, n);
  for (; n + I::kLanes <= b.columns; n += I::kLanes) tile<I, kind, R, 1>(b, n);
  if (n < b.columns) remainder<I, kind, R>(b, n);
}

// One block of the inner axis, k to k + size, for all rows: eight at a time, then four, two, one.
template <class I, Kind kind>
void rows_of_block(const Problem& p, Block b, size_t row, size_t rows, size_t k, size_t size) {
  float x[(kBlock > kGroupBlock ? kBlock : kGroupBlock) * kRowsInRegisters];
  b.x = x;
  for (size_t R; rows; row += R, rows -= R, b.sums += R * b.sums_stride) {
    R = rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    for (size_t r = 0; r < R; ++r)
      for (size_t i = 0; i < size; ++i) x[i * R + r] = p.x[(row + r) * p.inner + k + i];
    if (R == 8) rows_in_registers<I, kind, 8>(b);
    if (R == 4) rows_in_registers<I, kind, 4>(b);
    if (R == 2) rows_in_registers<I, kind, 2>(b);
    if (R == 1) rows_in_registers<I, kind, 1>(b);
  }
}

// At most kRowsAtOnce rows, and as many columns as there is room for their sums.
template <class I, Kind kind>
void sums_of(const Problem& p, size_t row, size_t rows, size_t begin, size_t end, float* sums) {
  constexpr size_t kPerStored = kind == Kind::kInt4 ? 2 : 1;
  const auto* w = static_cast<const unsigned char*>(p.w) + begin * bytes_of<kind>();
  const auto* scale = static_cast<const unsigned char*>(p.scale);
  Block b = {};
  b.stride = p.columns * bytes_of<kind>();
  b.columns = end - begin;
  b.sums = sums;
  b.sums_stride = kSums / rows / I::kLanes * I::kLanes;
  __builtin_memset(sums, 0, kSums * sizeof(float));
  for (size_t k = 0, size; k < p.inner; k += size) {
    size = p.inner - k < kBlock ? p.inner - k : kBlock;
    if constexpr (kind == Kind::kInt4) {
      const size_t left = p.group - k % p.group;
      size = left < kGroupBlock ? left : kGroupBlock;
      b.scale = scale + (k / p.group * p.columns + begin) * 2;
    }
    b.w = w + k / kPerStored * b.stride;
    b.stored_rows = size / kPerStored;
    rows_of_block<I, kind>(p, b, row, rows, k, size);
  }
  for (size_t r = 0; r < rows; ++r) {
    float* out = p.out + (row + r) * p.columns + begin;
    const float* total = sums + r * b.sums_stride;
    if constexpr (kind == Kind::kInt8) {
      const float* factor = static_cast<const float*>(p.scale) + begin;
      for (size_t n = 0; n < b.columns; ++n) out[n] = total[n] * factor[n];
    } else {
      __builtin_memcpy(out, total, b.columns * sizeof(float));
    }
  }
}

template <class I, Kind kind>
void columns_of_kind(const Problem& p, size_t begin, size_t end) {
  alignas(64) float sums[kSums];
  for (size_t row = 0; row < p.rows; row += kRowsAtOnce) {
    const size_t rows = p.rows - row < kRowsAtOnce ? p.rows - row : kRowsAtOnce;
    const size_t most = kSums / rows / mesh_transformer::kColumnStep * mesh_transformer::kColumnStep;
    for (size_t n = begin; n < end; n += most)
      sums_of<I, kind>(p, row, rows, n, end - n < most ? end : n + most, sums);
  }
}

template <class I>
void columns(const Problem& p, size_t begin, size_t end) {
  switch (p.kind) {
    case Kind::kFloat32: return columns_of_kind<I, Kind::kFloat32>(p, begin, end);
    case Kind::kBFloat16: return columns_of_kind<I, Kind::kBFloat16>(p, begin, end);
    case Kind::kFloat16: return columns_of_kind<I, Kind::kFloat16>(p, begin, end);
    case Kind::kInt8: return columns_of_kind<I, Kind::kInt8>(p, begin, end);
    case Kind::kInt4: return columns_of_kind<I, Kind::kInt4>(p, begin, end);
  }
}

}  // namespace
