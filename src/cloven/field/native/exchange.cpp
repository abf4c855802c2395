// What the holder of a secret does before and after an exchange, in one call each: the passes of hadamard.cpp and rows.cpp, one after the
// other, on memory that stays. The same bits as these, called one by one.
//
//     ask     x ↦ turned ↦ round(α x) ↦ c = … + mask mod p
//     told    z, if S z + T c = 0: ↦ z − image mod p ↦ / α ↦ turned back ↦ + total

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "passes.hpp"
#include "shared_pool.hpp"

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
constexpr i64 kTogether = 16;  // rows that go through all passes before the next ones: they stay in a core's caches

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

// x as float64.
void widen(const void* x, int kind, i64 count, double* out) {
  for (i64 i = 0; i < count; ++i) out[i] = cloven::real(x, kind, i);
}

struct Asked {
  const Exchange& e;
  const void* x;
  int kind;
  i64 m;
  double bound;
  const std::int32_t* mask;
  std::int32_t* c;
  double* alpha;
};

struct Told {
  const Exchange& e;
  const std::int32_t *z, *image;
  i64 m;
  double* alpha;
  const float* total;
  void* out;
  int kind;
};

i64 bytes_of(int kind) { return kind == 1 ? sizeof(float) : sizeof(std::uint16_t); }

// Rows first … first + m − 1.
int ask_rows(const Asked& job, i64 first, i64 m, int threads) {
  thread_local Memory memory;
  const Side& in = job.e.in;
  const i64 k = in.n;
  double* rows = at_least(memory.rows, m, k);
  double* turned = at_least(memory.turned, m, k);
  std::int32_t *whole = at_least(memory.whole, m, k), *found = at_least(memory.found, m, 1);
  widen(static_cast<const char*>(job.x) + first * k * bytes_of(job.kind), job.kind, m * k, rows);
  if (cloven_turn(rows, m, k, in.block, in.scale, in.stages, in.gather, in.units, 0, nullptr, turned, 0, threads)) return kRefused;
  if (cloven_encode(turned, m, k, job.bound, whole, job.alpha + first, found, threads)) return kRefused;
  for (i64 i = 0; i < m; ++i)
    if (found[i]) return kNotFinite;
  return cloven_add(whole, job.mask + first * k, m, k, 1, job.c + first * k, threads);
}

int told_rows(const Told& job, i64 first, i64 m, int threads) {
  thread_local Memory memory;
  const Side& out = job.e.out;
  const i64 n = out.n, at = first * n;
  std::int32_t* whole = at_least(memory.whole, m, n);
  double* rows = at_least(memory.rows, m, n);
  if (cloven_add(job.z + at, job.image + at, m, n, -1, whole, threads)) return kRefused;
  if (cloven_decode(whole, m, n, job.alpha + first, rows, threads)) return kRefused;
  return cloven_turn(rows, m, n, out.block, out.scale, out.stages, out.gather, out.units, 0, job.total + at,
                     static_cast<char*>(job.out) + at * bytes_of(job.kind), job.kind, threads);
}

template <class Job>
struct Shared {
  const Job& job;
  int (*rows)(const Job&, i64 first, i64 m, int threads);
  std::atomic<int>& worst;
};

template <class Job>
void some_rows(const void* what, i64 index) {
  const auto& shared = *static_cast<const Shared<Job>*>(what);
  const i64 first = index * kTogether, left = shared.job.m - first;
  int ended = kRefused;
  try {
    ended = shared.rows(shared.job, first, left < kTogether ? left : kTogether, 1);
  } catch (...) {
  }
  int known = shared.worst.load();
  while (ended > known && !shared.worst.compare_exchange_weak(known, ended)) {
  }
}

template <class Job>
int all_rows(const Job& job, int (*rows)(const Job&, i64, i64, int), int threads) {
  if (job.m <= kTogether) return rows(job, 0, job.m, threads);
  std::atomic<int> worst{0};
  const Shared<Job> shared{job, rows, worst};
  cloven::shared_pool().run(some_rows<Job>, &shared, (job.m + kTogether - 1) / kTogether, threads);
  return worst;
}

int checked(const Exchange& e, std::int32_t* test, const std::int32_t* z, const std::int32_t* c, i64 m, int threads) {
  thread_local std::vector<std::int32_t> memory;
  std::int32_t* found = at_least(memory, m, 1);
  if (cloven_check(test, z, c, m, e.out.n, e.in.n, found, threads)) return kRefused;
  int wrong = 0;
  for (i64 i = 0; i < m; ++i) wrong += found[i] != 0;
  return wrong ? kWrong + wrong - 1 : 0;
}

}  // namespace

// All arrays are dense.

// c [m, k] and alpha [m], bound / ‖x‖, from x [m, k] (kind 1: float32, 2: bfloat16) and mask [m, k]. Returns 0; 1 if the arguments are out of range or memory
// is short; 2 if a row is not finite.
CLOVEN_API int cloven_ask(const Exchange* exchange, const void* x, int kind, i64 m, double bound, const std::int32_t* mask, std::int32_t* c,
                          double* alpha, int threads) {
  if (m < 1 || kind < 1 || kind > 2) return kRefused;
  try {
    return all_rows(Asked{*exchange, x, kind, m, bound, mask, c, alpha}, ask_rows, threads);
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
    const int wrong = checked(*exchange, test, z, c, m, threads);
    return wrong ? wrong : all_rows(Told{*exchange, z, image, m, alpha, total, out, kind}, told_rows, threads);
  } catch (...) {
    return kRefused;
  }
}
