// Y [rows, width] = X [rows, n] M [n, width] in float32, for small M that stays in the cache.
//
// Rows of X, M and Y are x_stride, m_stride and y_stride floats apart. Where the CPU has AVX-512 or AVX2, tiles of four rows are
// summed in registers; what is left over, and other CPUs, take one row at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define CLOVEN_X86 1
#endif

#if CLOVEN_X86 && !defined(__clang__) && !defined(__SANITIZE_THREAD__)  // whose start the choice would precede
#define CLOVEN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLOVEN_CLONES
#endif

namespace cloven {

using i64 = std::int64_t;
constexpr i64 kTileRows = 4;

CLOVEN_CLONES inline void row_product(const float* x, i64 n, const float* m, i64 m_stride, float* y, i64 width) {
  for (i64 j = 0; j < width; ++j) y[j] = 0;
  for (i64 i = 0; i < n; ++i)
    for (i64 j = 0; j < width; ++j) y[j] += x[i] * m[i * m_stride + j];
}

// y [4, V vectors] = x [4, n] m [n, V vectors], sums in registers
using Tile = void (*)(const float* x, i64 x_stride, i64 n, const float* m, i64 m_stride, float* y, i64 y_stride);

// How a CPU does it: `tile[v − 1]` is for v vectors of `lanes` floats.
struct Tiles {
  i64 lanes, most;
  const Tile* tile;
};

#if CLOVEN_X86

#define CLOVEN_TILE(isa, name, Vector, lanes, zero, load, broadcast, multiply_add, store)                                                     \
  template <int V>                                                                                                                            \
  __attribute__((target(isa))) void name(const float* x, i64 x_stride, i64 n, const float* m, i64 m_stride, float* y, i64 y_stride) {         \
    Vector sums[kTileRows][V];                                                                                                                \
    for (auto& row : sums)                                                                                                                    \
      for (auto& sum : row) sum = zero();                                                                                                     \
    for (i64 i = 0; i < n; ++i) {                                                                                                             \
      Vector columns[V];                                                                                                                      \
      for (int v = 0; v < V; ++v) columns[v] = load(m + i * m_stride + v * lanes);                                                            \
      for (i64 r = 0; r < kTileRows; ++r) {                                                                                                   \
        const Vector each = broadcast(x[r * x_stride + i]);                                                                                   \
        for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(each, columns[v], sums[r][v]);                                                  \
      }                                                                                                                                       \
    }                                                                                                                                         \
    for (i64 r = 0; r < kTileRows; ++r)                                                                                                       \
      for (int v = 0; v < V; ++v) store(y + r * y_stride + v * lanes, sums[r][v]);                                                            \
  }

CLOVEN_TILE("avx512f", tile_avx512, __m512, 16, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_storeu_ps)
CLOVEN_TILE("avx2,fma", tile_avx2, __m256, 8, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_storeu_ps)

// As many vectors as leave registers for a column and a broadcast: 32 of AVX-512, 16 of AVX2.
constexpr Tile kAvx512[] = {tile_avx512<1>, tile_avx512<2>, tile_avx512<3>, tile_avx512<4>, tile_avx512<5>};
constexpr Tile kAvx2[] = {tile_avx2<1>, tile_avx2<2>, tile_avx2<3>};

#endif

inline Tiles best_tiles() {
#if CLOVEN_X86
  if (__builtin_cpu_supports("avx512f")) return {16, 5, kAvx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {8, 3, kAvx2};
#endif
  return {1, 0, nullptr};
}

inline void product(const float* x, i64 x_stride, i64 rows, i64 n, const float* m, i64 m_stride, float* y, i64 y_stride, i64 width) {
  static const Tiles tiles = best_tiles();
  const i64 tiled_rows = tiles.tile == nullptr ? 0 : rows - rows % kTileRows, tiled = width - width % tiles.lanes;
  for (i64 row = 0; row < tiled_rows; row += kTileRows)
    for (i64 j = 0; j < tiled;) {
      const i64 vectors = std::min(tiles.most, (tiled - j) / tiles.lanes);
      tiles.tile[vectors - 1](x + row * x_stride, x_stride, n, m + j, m_stride, y + row * y_stride + j, y_stride);
      j += vectors * tiles.lanes;
    }
  for (i64 row = 0; row < rows; ++row) {
    const i64 done = row < tiled_rows ? tiled : 0;
    if (done < width) row_product(x + row * x_stride, n, m + done, m_stride, y + row * y_stride + done, width - done);
  }
}

}  // namespace cloven
