// Products for many rows, by squares: the same numbers as the kernels for few rows.
//
//     planes   [M/16][K/64][4 digits][16 rows][64 bytes]   tiles of unsigned bytes: the left operands
//     strips   [K/64][16 quads of k][16 rows of W][4 bytes] tiles of W, packed once for all rows: the right operands
//     y_d [16 rows, 16 rows of W] += plane_d · strip        one tile of int32 per digit and strip, over all of K; z = Σ_d 256^d·y_d mod p
//
// A part of two strips stays in a core's first cache while a few blocks of rows meet it, whose planes stay in the second. Who multiplies is
// the CPU's matrix unit (amx.hpp), or its byte product (vnni.hpp). Tiles lie on lines of the cache.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && (__GNUC__ >= 11 || defined(__clang__))
#include <immintrin.h>
#define CLOVEN_TILES 1
#endif

#if CLOVEN_TILES

namespace cloven {

constexpr std::int64_t kTile = 16, kQuad = 64;  // rows of a tile, bytes of one of its rows
constexpr std::int64_t kStrips = 4;             // of 16 rows of W, packed together
constexpr std::int64_t kBlocks = 8;             // of 16 rows: 512 KiB of planes of 16 quads, in the second cache
constexpr std::size_t kTileBytes = 1024;

inline bool tiles_allowed() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// Memory that begins on a line of the cache, and is kept for the next call.
class Lines {
 public:
  std::uint8_t* at_least(std::size_t size) {
    memory_.resize(size + 64);
    return memory_.data() + (64 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 64) % 64;
  }

 private:
  std::vector<std::uint8_t> memory_;
};

using Sums = std::int32_t[2][4][16][16];  // [strip][digit][row of c][row of W]

struct TileJob {
  const std::int32_t* c;
  std::int64_t m, k, quads, blocks;  // quads: ⌈K/64⌉; blocks: ⌈M/16⌉
  std::uint8_t* planes;
  const std::int8_t* w;
  std::int64_t n, stride;
  std::int32_t* z;
  std::atomic<bool>* failed;  // a thread had no memory
  // Some quads of k for a block of so many rows and two strips, `next` bytes apart, on top of what y holds (nothing, if these are the first).
  void (*two_strips)(const std::uint8_t* planes, const std::uint8_t* strip, std::size_t next, std::int64_t rows, std::int64_t quads, bool first,
                     Sums& y);
  std::int64_t quads_at_once;  // of two strips, in the first cache
};

inline std::int64_t rows_of(const TileJob& job, std::int64_t block) {
  return job.m - block * kTile < kTile ? job.m - block * kTile : kTile;
}

// One block of 16 rows of c as tiles of its four digit planes.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) inline void pack_planes(const void* what, std::int64_t block) {
  const TileJob& job = *static_cast<const TileJob*>(what);
  const __m512i p = _mm512_set1_epi32(0x7fffffff);
  for (std::int64_t row = 0; row < kTile; ++row) {
    const std::int64_t m = block * kTile + row;
    for (std::int64_t i = 0; i < job.quads * kQuad; i += 16) {
      __m512i value = _mm512_setzero_si512();
      if (m < job.m && i < job.k) {
        const std::int64_t left = job.k - i;
        const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        value = _mm512_maskz_loadu_epi32(mask, job.c + m * job.k + i);
        value = _mm512_mask_add_epi32(value, _mm512_movepi32_mask(value), value, p);  // negative: + p
      }
      std::uint8_t* tiles = job.planes + ((block * job.quads + i / kQuad) * 4) * kTileBytes + row * kQuad + i % kQuad;
      for (int d = 0; d < 4; ++d)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(tiles + d * kTileBytes), _mm512_cvtepi32_epi8(_mm512_srli_epi32(value, 8 * d)));
    }
  }
}

// 16 rows of W as tiles: quad q of row r goes to line q, place r. Rows and columns that are not there are zeros.
__attribute__((target("avx512f,avx512bw,avx512vl"))) inline void pack_strip(const TileJob& job, std::int64_t first, std::uint8_t* strip) {
  alignas(64) std::int32_t lines[16][16];
  const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
  for (std::int64_t quad = 0; quad < job.quads; ++quad) {
    const std::int64_t left = job.k - quad * kQuad;
    const __mmask64 mask = left >= kQuad ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    for (std::int64_t row = 0; row < kTile; ++row) {
      const __m512i codes = first + row < job.n ? _mm512_maskz_loadu_epi8(mask, job.w + (first + row) * job.stride + quad * kQuad)
                                                : _mm512_setzero_si512();
      _mm512_store_si512(lines[row], codes);
    }
    for (int line = 0; line < 16; ++line)
      _mm512_storeu_si512(strip + quad * kTileBytes + line * kQuad, _mm512_i32gather_epi32(places, &lines[0][line], 4));
  }
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) inline __m512i tile_reduced(const std::int32_t (*y)[16][16], int row) {
  const __m512i p = _mm512_set1_epi64(0x7fffffff), h = _mm512_set1_epi64(0x3fffffff);
  __m256i halves[2];
  for (int half = 0; half < 2; ++half) {
    __m512i total = _mm512_setzero_si512();
    for (int d = 3; d >= 0; --d) {
      const __m256i part = _mm256_load_si256(reinterpret_cast<const __m256i*>(&y[d][row][8 * half]));
      total = _mm512_add_epi64(_mm512_slli_epi64(total, 8), _mm512_cvtepi32_epi64(part));
    }
    __m512i folded = _mm512_add_epi64(_mm512_and_si512(total, p), _mm512_srai_epi64(total, 31));
    folded = _mm512_mask_sub_epi64(folded, _mm512_cmpgt_epi64_mask(folded, h), folded, p);
    halves[half] = _mm512_cvtepi64_epi32(folded);
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
}

// z of a block of rows and two strips, from whole sums.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) inline void store_two(const TileJob& job, std::int64_t block, std::int64_t n,
                                                                                    const Sums& y) {
  const std::int64_t rows = rows_of(job, block);
  for (std::int64_t part = 0; part < 2; ++part, n += kTile) {
    const std::int64_t left = job.n - n;
    if (left <= 0) return;
    const __mmask16 mask = left >= kTile ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    for (int row = 0; row < rows; ++row)
      _mm512_mask_storeu_epi32(job.z + (block * kTile + row) * job.n + n, mask, tile_reduced(y[part], row));
  }
}

// Some strips of W against all rows.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) inline void tiles_chunk(const void* what, std::int64_t index) {
  const TileJob& job = *static_cast<const TileJob*>(what);
  thread_local Lines lines;
  alignas(64) Sums y[kStrips / 2][kBlocks];
  const std::int64_t first = index * kStrips * kTile;
  const std::size_t size = static_cast<std::size_t>(job.quads) * kTileBytes;
  std::uint8_t* strips = nullptr;
  try {
    strips = lines.at_least(static_cast<std::size_t>(kStrips) * size);
  } catch (...) {
    *job.failed = true;
    return;
  }
  for (std::int64_t s = 0; s < kStrips; ++s) pack_strip(job, first + s * kTile, strips + static_cast<std::size_t>(s) * size);
  for (std::int64_t from = 0; from < job.blocks; from += kBlocks) {
    const std::int64_t to = from + kBlocks < job.blocks ? from + kBlocks : job.blocks;
    for (std::int64_t quad = 0; quad < job.quads; quad += job.quads_at_once)
      for (std::int64_t s = 0; s < kStrips && first + s * kTile < job.n; s += 2)
        for (std::int64_t block = from; block < to; ++block) {
          const std::uint8_t* planes = job.planes + static_cast<std::size_t>(block * job.quads + quad) * 4 * kTileBytes;
          const std::uint8_t* strip = strips + static_cast<std::size_t>(s) * size + static_cast<std::size_t>(quad) * kTileBytes;
          const std::int64_t quads = job.quads - quad < job.quads_at_once ? job.quads - quad : job.quads_at_once;
          job.two_strips(planes, strip, size, rows_of(job, block), quads, quad == 0, y[s / 2][block - from]);
        }
    for (std::int64_t s = 0; s < kStrips && first + s * kTile < job.n; s += 2)
      for (std::int64_t block = from; block < to; ++block) store_two(job, block, first + s * kTile, y[s / 2][block - from]);
  }
}

}  // namespace cloven

#endif
