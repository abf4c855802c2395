// The secret part of a group's linears for one row x, while somebody else multiplies by the rest: y = B (A x) + b of each, one after the other.
//
//     A [k, K] float32      B [N, k] float32      b [N] float32 or bfloat16, or none      x [K]      y [N] float32
//
// In float32, and on the calling thread: the other cores are busy, and memory is the bound. Both factors are read once, from their beginning to
// their end.

#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "passes.hpp"

namespace {

using i64 = std::int64_t;

extern "C" {

struct Factors {
  const float *a, *b;
  const void* bias;  // kind as of x, or 0: none
  i64 rows, rank, bias_kind;
};

}  // extern "C"

constexpr i64 kLanes = 16;
constexpr std::uintptr_t kAhead = 2048;  // bytes
constexpr i64 kFarEntries = 1 << 15;     // of a factor that is not kept in the caches, see product.cpp

#if defined(__x86_64__)
#define CLOVEN_WIDE __attribute__((target("avx512f")))

// y [n] = W x, W [n, k] dense: kRows rows of W at a time, or one in kSums pieces.
template <int kRows, int kSums, int kLocality>
CLOVEN_WIDE void product(const float* w, i64 n, i64 k, const float* x, float* y) {
  const i64 step = kSums * kLanes, whole = k / step * step;
  i64 row = 0;
  for (; row + kRows <= n; row += kRows) {
    const float* at = w + row * k;
    __m512 sum[kRows][kSums];
    for (auto& one : sum)
      for (auto& lanes : one) lanes = _mm512_setzero_ps();
    i64 i = 0;
    for (; i < whole; i += step)
      for (int s = 0; s < kSums; ++s) {
        const __m512 entries = _mm512_loadu_ps(x + i + s * kLanes);
        for (int r = 0; r < kRows; ++r) {
          const float* next = at + r * k + i + s * kLanes;
          __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(next) + kAhead), 0, kLocality);
          sum[r][s] = _mm512_fmadd_ps(_mm512_loadu_ps(next), entries, sum[r][s]);
        }
      }
    for (; i < k; i += kLanes) {
      const __mmask16 mask = k - i >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (k - i)) - 1);
      const __m512 entries = _mm512_maskz_loadu_ps(mask, x + i);
      for (int r = 0; r < kRows; ++r) sum[r][0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, at + r * k + i), entries, sum[r][0]);
    }
    for (int r = 0; r < kRows; ++r) {
      __m512 whole_sum = sum[r][0];
      for (int s = 1; s < kSums; ++s) whole_sum = _mm512_add_ps(whole_sum, sum[r][s]);
      y[row + r] = _mm512_reduce_add_ps(whole_sum);
    }
  }
  if constexpr (kRows > 1) product<1, kSums, kLocality>(w + row * k, n - row, k, x, y + row);
}

template <int kRows, int kSums>
void product(const float* w, i64 n, i64 k, const float* x, float* y) {
  n * k < kFarEntries ? product<kRows, kSums, 3>(w, n, k, x, y) : product<kRows, kSums, 0>(w, n, k, x, y);
}
#endif

}  // namespace

// out [sum of all rows] float32 from x [k] (kind 1: float32, 2: bfloat16). Returns 0; 1 if the arguments are out of range, memory is short, or
// this CPU has no AVX-512.
CLOVEN_API int cloven_low_rank(const Factors* members, i64 count, const void* x, int kind, i64 k, float* out) {
#if defined(__x86_64__)
  thread_local std::vector<float> input, image;
  if (count < 0 || k < 0 || kind < 1 || kind > 2 || !__builtin_cpu_supports("avx512f")) return 1;
  try {
    input.resize(static_cast<std::size_t>(k));
    for (i64 i = 0; i < k; ++i) input[static_cast<std::size_t>(i)] = cloven::real(x, kind, i);
    for (const Factors* one = members; one < members + count; out += one++->rows) {
      image.resize(static_cast<std::size_t>(one->rank));
      product<1, 8>(one->a, one->rank, k, input.data(), image.data());
      product<4, 1>(one->b, one->rows, one->rank, image.data(), out);
      if (one->bias_kind != 0)
        for (i64 i = 0; i < one->rows; ++i) out[i] += cloven::real(one->bias, one->bias_kind, i);
    }
  } catch (...) {
    return 1;
  }
  return 0;
#else
  (void)members, (void)count, (void)x, (void)kind, (void)k, (void)out;
  return 1;
#endif
}
