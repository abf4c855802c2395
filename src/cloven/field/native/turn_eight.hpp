// Eight rows at a time through the stages of hadamard.cpp: entry i of all eight lies in one vector. A gather then reads whole vectors, and a
// transform has nothing to do within one. The same additions in the same order as row by row: the same bits. AVX-512 only.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define CLOVEN_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl")))

namespace cloven::eight {

constexpr std::int64_t kRows = 8;

// The transpose of an 8 × 8 square: pairs, then fours, then halves change places.
CLOVEN_AVX512 inline void transpose(__m512d v[8]) {
  __m512d t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_pd(v[i], v[i + 1]);
  }
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + j] = _mm512_permutex2var_pd(t[i + j], low, t[i + j + 2]);
      v[i + j + 2] = _mm512_permutex2var_pd(t[i + j], high, t[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f64x2(v[i], v[i + 4], 0x44);
    t[i + 4] = _mm512_shuffle_f64x2(v[i], v[i + 4], 0xee);
  }
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}

// Eight rows [8, n] into x [n][8].
CLOVEN_AVX512 inline void load(const double* from, std::int64_t n, double* x) {
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m512d v[8];
    for (int r = 0; r < 8; ++r) v[r] = _mm512_loadu_pd(from + r * n + i);
    transpose(v);
    for (int r = 0; r < 8; ++r) _mm512_storeu_pd(x + 8 * (i + r), v[r]);
  }
  for (; i < n; ++i)
    for (std::int64_t r = 0; r < kRows; ++r) x[8 * i + r] = from[r * n + i];
}

// Levels h, 2h, 4h … of `count` vectors that lie h apart.
template <int count>
CLOVEN_AVX512 inline void levels(double* x, std::int64_t h, __m512d scale, bool last) {
  __m512d v[count];
  for (int j = 0; j < count; ++j) v[j] = _mm512_loadu_pd(x + 8 * h * j);
  for (int g = 1; g < count; g *= 2)
    for (int j = 0; j < count; ++j)
      if ((j & g) == 0) {
        const __m512d a = v[j], b = v[j + g];
        v[j] = _mm512_add_pd(a, b);
        v[j + g] = _mm512_sub_pd(a, b);
      }
  for (int j = 0; j < count; ++j) _mm512_storeu_pd(x + 8 * h * j, last ? _mm512_mul_pd(v[j], scale) : v[j]);
}

template <int count>
CLOVEN_AVX512 inline void pass(double* x, std::int64_t block, std::int64_t h, __m512d scale) {
  const bool last = h * count == block;
  for (std::int64_t i = 0; i < block; i += h * count)
    for (std::int64_t j = i; j < i + h; ++j) levels<count>(x + 8 * j, h, scale, last);
}

// One block of vectors, in place.
CLOVEN_AVX512 inline void transform(double* x, std::int64_t block, double scale) {
  const __m512d times = _mm512_set1_pd(scale);
  if (block == 1)
    return _mm512_storeu_pd(x, _mm512_mul_pd(_mm512_loadu_pd(x), times));
  for (std::int64_t h = 1; h < block;)
    if (block / h >= 8) {
      pass<8>(x, block, h, times);
      h *= 8;
    } else if (block / h >= 4) {
      pass<4>(x, block, h, times);
      h *= 4;
    } else {
      pass<2>(x, block, h, times);
      h *= 2;
    }
}

// out[i] = from[gather[i]] · units[i]
CLOVEN_AVX512 inline void gathered(const double* from, const std::int32_t* gather, const float* units, std::int64_t n, double* out) {
  for (std::int64_t i = 0; i < n; ++i)
    _mm512_storeu_pd(out + 8 * i, _mm512_mul_pd(_mm512_loadu_pd(from + 8 * static_cast<std::int64_t>(gather[i])),
                                                _mm512_set1_pd(static_cast<double>(units[i]))));
}

CLOVEN_AVX512 inline __m128i bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __mmask8 nan = _mm256_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm256_cvtepi32_epi16(_mm256_mask_mov_epi32(rounded, nan, _mm256_set1_epi32(0x7fc0)));
}

// Eight entries of one row, as the last stage gives them: see hadamard.cpp. kind: 0 float64, 1 float32, 2 bfloat16.
CLOVEN_AVX512 inline void store(__m512d value, const float* total, void* out, std::int64_t at, int kind) {
  if (kind == 0) return _mm512_storeu_pd(static_cast<double*>(out) + at, value);
  const __m256 sum = _mm512_cvtpd_ps(_mm512_add_pd(value, _mm512_cvtps_pd(_mm256_loadu_ps(total + at))));
  if (kind == 1) return _mm256_storeu_ps(static_cast<float*>(out) + at, sum);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<std::uint16_t*>(out) + at), bfloat16(sum));
}

// The last stage of eight whole rows, from entry 0 to the last multiple of eight; how many entries that are.
CLOVEN_AVX512 inline std::int64_t last_stage(const double* from, const std::int32_t* gather, const float* units, std::int64_t n,
                                             const float* total, void* out, std::int64_t row, int kind) {
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m512d v[8];
    for (int j = 0; j < 8; ++j)
      v[j] = _mm512_mul_pd(_mm512_loadu_pd(from + 8 * static_cast<std::int64_t>(gather[i + j])),
                           _mm512_set1_pd(static_cast<double>(units[i + j])));
    transpose(v);
    for (int r = 0; r < 8; ++r) store(v[r], total, out, (row + r) * n + i, kind);
  }
  return i;
}

}  // namespace cloven::eight

#endif
