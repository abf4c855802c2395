// What the holder of a secret does before and after an exchange, in one call each: the passes of hadamard.cpp and rows.cpp, one after the
// other, on memory that stays. The same bits as these, called one by one.
//
//     ask     x ↦ turned ↦ round(α x) ↦ c = … + mask mod p
//     told    z, if S z + T c = 0: ↦ z − image mod p ↦ / α ↦ turned back ↦ + total

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#define CLOVEN_API extern "C" __attribute__((visibility("default")))

CLOVEN_API int cloven_turn(const double* x, std::int64_t m, std::int64_t n, std::int64_t block, double scale, std::int64_t stages,
                           const std::int32_t* gather, const float* units, int leading, const float* total, void* out, int kind, int threads);
CLOVEN_API int cloven_add(const std::int32_t* a, const std::int32_t* b, std::int64_t m, std::int64_t n, int sign, std::int32_t* out, int threads);
CLOVEN_API int cloven_encode(const double* x, std::int64_t m, std::int64_t n, double scale, std::int32_t* out, double* alpha,
                             std::int32_t* found, int threads);
CLOVEN_API int cloven_decode(const std::int32_t* y, std::int64_t m, std::int64_t n, double* alpha, double* out, int threads);
CLOVEN_API int cloven_check(std::int32_t* test, const std::int32_t* z, const std::int32_t* c, std::int64_t m, std::int64_t n, std::int64_t k,
                            std::int32_t* found, int threads);

namespace {

using i64 = std::int64_t;

extern "C" {

// Stages of one side, see cloven_turn.
struct Side {
  i64 n, block, stages;
  double scale;
  const std::int32_t* gather;
  const float* units;
};

struct Exchange {
  Side in, out;  // of x [m, in.n], and of the answer [m, out.n]
};

}  // extern "C"

constexpr int kRefused = 1, kNotFinite = 2, kWrong = 2;

struct Memory {
  std::vector<double> rows, turned;
  std::vector<std::int32_t> whole, found;
};

template <class T>
T* at_least(std::vector<T>& memory, i64 m, i64 n) {
  const std::size_t size = static_cast<std::size_t>(m) * static_cast<std::size_t>(n);
  if (memory.size() < size) memory.resize(size);
  return memory.data();
}

// x as float64: kind 1 float32, 2 bfloat16.
void widen(const void* x, int kind, i64 count, double* out) {
  if (kind == 1)
    for (i64 i = 0; i < count; ++i) out[i] = static_cast<const float*>(x)[i];
  else
    for (i64 i = 0; i < count; ++i) {
      const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(x)[i]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      out[i] = value;
    }
}

int ask(const Exchange& e, const void* x, int kind, i64 m, double bound, const std::int32_t* mask, std::int32_t* c, double* alpha, int threads) {
  thread_local Memory memory;
  const i64 k = e.in.n;
  double* rows = at_least(memory.rows, m, k);
  double* turned = at_least(memory.turned, m, k);
  std::int32_t *whole = at_least(memory.whole, m, k), *found = at_least(memory.found, m, 1);
  widen(x, kind, m * k, rows);
  if (cloven_turn(rows, m, k, e.in.block, e.in.scale, e.in.stages, e.in.gather, e.in.units, 0, nullptr, turned, 0, threads)) return kRefused;
  if (cloven_encode(turned, m, k, bound, whole, alpha, found, threads)) return kRefused;
  for (i64 i = 0; i < m; ++i)
    if (found[i]) return kNotFinite;
  return cloven_add(whole, mask, m, k, 1, c, threads);
}

int told(const Exchange& e, std::int32_t* test, const std::int32_t* z, const std::int32_t* c, const std::int32_t* image, i64 m, double* alpha,
         const float* total, void* out, int kind, int threads) {
  thread_local Memory memory;
  const i64 n = e.out.n;
  std::int32_t* found = at_least(memory.found, m, 1);
  if (cloven_check(test, z, c, m, n, e.in.n, found, threads)) return kRefused;
  int wrong = 0;
  for (i64 i = 0; i < m; ++i) wrong += found[i] != 0;
  if (wrong) return kWrong + wrong - 1;
  std::int32_t* whole = at_least(memory.whole, m, n);
  double* rows = at_least(memory.rows, m, n);
  if (cloven_add(z, image, m, n, -1, whole, threads) || cloven_decode(whole, m, n, alpha, rows, threads)) return kRefused;
  return cloven_turn(rows, m, n, e.out.block, e.out.scale, e.out.stages, e.out.gather, e.out.units, 0, total, out, kind, threads);
}

}  // namespace

// All arrays are dense.

// c [m, k] and alpha [m], bound / ‖x‖, from x [m, k] (kind 1: float32, 2: bfloat16) and mask [m, k]. Returns 0; 1 if the arguments are out of range or memory
// is short; 2 if a row is not finite.
CLOVEN_API int cloven_ask(const Exchange* exchange, const void* x, int kind, i64 m, double bound, const std::int32_t* mask, std::int32_t* c,
                          double* alpha, int threads) {
  if (m < 1 || kind < 1 || kind > 2) return kRefused;
  try {
    return ask(*exchange, x, kind, m, bound, mask, c, alpha, threads);
  } catch (...) {
    return kRefused;
  }
}

// out [m, n] (kind as above) from z [m, n], c [m, k], image [m, n], alpha [m] and total [m, n]; test [2, n + k]. Returns 0; 1 as above; one more
// than the number of wrong rows, and then out is left as it was.
CLOVEN_API int cloven_told(const Exchange* exchange, std::int32_t* test, const std::int32_t* z, const std::int32_t* c, const std::int32_t* image,
                           i64 m, double* alpha, const float* total, void* out, int kind, int threads) {
  if (m < 1 || kind < 1 || kind > 2) return kRefused;
  try {
    return told(*exchange, test, z, c, image, m, alpha, total, out, kind, threads);
  } catch (...) {
    return kRefused;
  }
}
