// What a client of private LoRA does to rows before and after a query, in one call each: the same bits as `codec.encode`, `residues.add`,
// `private_lora.messages.unrounded`, `residues.subtract` and `codec.decode`, one after the other.
//
//     query     x ↦ round(α x), behind zeros on the pad columns ↦ c = … + mask mod p; a row of zeros has α = ∞
//     answer    q ↦ the middles of the intervals that it names ↦ − image mod p ↦ / α

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "passes.hpp"

namespace {

using i64 = std::int64_t;

constexpr int kRefused = 1, kNotAllowed = 2;
constexpr std::int32_t kH = (1 << 30) - 1;

// m · n entries, in memory that is kept for the next call.
std::int32_t* whole(std::vector<std::int32_t>& memory, i64 m, i64 n) {
  memory.resize(static_cast<std::size_t>(m) * static_cast<std::size_t>(n));
  return memory.data();
}

int query(const double* x, i64 m, i64 k, i64 pad, double bound, const std::int32_t* mask, std::int32_t* c, double* alpha, int threads) {
  thread_local std::vector<std::int32_t> encoded, found;
  std::int32_t *rows = whole(encoded, m, k), *wrong = whole(found, m, 1);
  if (cloven_encode(x, m, k, bound, rows, alpha, wrong, threads) != 0) return kRefused;
  for (i64 i = 0; i < m; ++i)
    if (wrong[i] != 0) return kNotAllowed;
  for (i64 i = 0; i < m; ++i) {
    const std::int32_t *row = rows + i * k, *masks = mask + i * (pad + k);
    std::int32_t any = 0, *out = c + i * (pad + k);
    for (i64 j = 0; j < k; ++j) any |= row[j];
    if (any == 0) alpha[i] = std::numeric_limits<double>::infinity();
    if (pad != 0) std::memcpy(out, masks, static_cast<std::size_t>(pad) * sizeof *out);
    if (cloven_add(row, masks + pad, 1, k, 1, out + pad, 1) != 0) return kRefused;
  }
  return 0;
}

template <class Number>
int answer(const Number* q, int bits, const std::int32_t* image, i64 m, i64 n, double* alpha, double* out, int threads) {
  thread_local std::vector<std::int32_t> memory;
  std::int32_t* z = whole(memory, m, n);
  const std::int32_t half = 1 << (bits - 1), width = 1 << (31 - bits), middle = 1 << (30 - bits);
  bool allowed = true;
  for (i64 i = 0; i < m * n; ++i) {
    const std::int32_t number = q[i];
    const bool inside = number >= -half && number < half;
    allowed &= inside;
    const std::int32_t value = inside ? number * width + middle : 0;
    z[i] = value > kH ? kH : value < -kH ? -kH : value;
  }
  if (!allowed) return kNotAllowed;
  if (cloven_add(z, image, m, n, -1, z, threads) != 0) return kRefused;
  return cloven_decode(z, m, n, alpha, out, threads);
}

}  // namespace

// All arrays are dense. Functions return 0; 1 if the arguments are out of range or memory is short.

// c [m, pad + k] and alpha [m] from x [m, k] and mask [m, pad + k]; 2 if a row is not finite.
CLOVEN_API int cloven_query(const double* x, i64 m, i64 k, i64 pad, double bound, const std::int32_t* mask, std::int32_t* c, double* alpha,
                            int threads) {
  if (m < 1 || k < 0 || pad < 0) return kRefused;
  try {
    return query(x, m, k, pad, bound, mask, c, alpha, threads);
  } catch (...) {
    return kRefused;
  }
}

// out [m, n] from numbers q [m, n] of so many bits, in one byte each for 8 bits and in two otherwise, image [m, n] and alpha [m]; 2 if a number
// has more bits.
CLOVEN_API int cloven_answer(const void* q, int bits, const std::int32_t* image, i64 m, i64 n, double* alpha, double* out, int threads) {
  if (m < 1 || n < 0 || bits < 2 || bits > 16) return kRefused;
  try {
    return bits == 8 ? answer(static_cast<const std::int8_t*>(q), bits, image, m, n, alpha, out, threads)
                     : answer(static_cast<const std::int16_t*>(q), bits, image, m, n, alpha, out, threads);
  } catch (...) {
    return kRefused;
  }
}
