// The product of tiles by the byte product of AVX-512 VNNI: see tiles.hpp.
//
// Two rows with their four digits meet two strips at a time: sixteen sums in registers, and ten loads for sixteen products. Four bytes of a
// digit are spread over a register; a line of a strip has the same four columns of 16 rows of W.
#pragma once

#include "tiles.hpp"

#if CLOVEN_TILES

namespace cloven {

constexpr std::int64_t kVnniQuads = 8;  // 16 KiB of two strips

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) inline void vnni_two_strips(const std::uint8_t* planes, const std::uint8_t* strip,
                                                                                            std::size_t next, std::int64_t rows,
                                                                                            std::int64_t quads, bool first, Sums& y) {
  for (std::int64_t row = 0; row < rows; row += 2) {
    __m512i sum[2][4][2];  // [strip][digit][row]
    for (int s = 0; s < 2; ++s)
      for (int d = 0; d < 4; ++d)
        for (int r = 0; r < 2; ++r) sum[s][d][r] = first ? _mm512_setzero_si512() : _mm512_load_si512(y[s][d][row + r]);
    const std::uint8_t *a = planes + row * kQuad, *b = strip;
    for (std::int64_t quad = 0; quad < quads; ++quad, a += 4 * kTileBytes, b += kTileBytes)
      for (std::int64_t at = 0; at < kQuad; at += 4) {
        const __m512i w0 = _mm512_load_si512(b + kTile * at), w1 = _mm512_load_si512(b + next + kTile * at);
        for (int d = 0; d < 4; ++d)
          for (int r = 0; r < 2; ++r) {
            std::int32_t four;
            std::memcpy(&four, a + static_cast<std::size_t>(d) * kTileBytes + r * kQuad + at, sizeof four);
            const __m512i digit = _mm512_set1_epi32(four);
            sum[0][d][r] = _mm512_dpbusd_epi32(sum[0][d][r], digit, w0);
            sum[1][d][r] = _mm512_dpbusd_epi32(sum[1][d][r], digit, w1);
          }
      }
    for (int s = 0; s < 2; ++s)
      for (int d = 0; d < 4; ++d)
        for (int r = 0; r < 2; ++r) _mm512_store_si512(y[s][d][row + r], sum[s][d][r]);
  }
}

}  // namespace cloven

#endif
