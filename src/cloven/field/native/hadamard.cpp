// Walsh–Hadamard transforms of blocks of rows, in place, in double precision.
//
//     every block of 2^k entries x of a row becomes s H x,   H_{2h} = [[H_h, H_h], [H_h, −H_h]]
//
// Blocks lie side by side; where they do not fill a row, one more takes what is left, and entries from all over the row that were
// transformed already. Additions and subtractions happen in the order of `cloven.field.hadamard`, whose results are the same bits.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "shared_pool.hpp"
#include "turn_eight.hpp"

namespace {

// Eight entries at a time. Within them, three levels: lane j with bit h gets its partner less itself, the other one their sum.
using Eight = double __attribute__((vector_size(64)));
using Lanes = long long __attribute__((vector_size(64)));
constexpr long long kSign = INT64_MIN;  // of a double

#if defined(__clang__)
#define CLOVEN_SHUFFLED(a, ...) __builtin_shufflevector(a, a, __VA_ARGS__)
#else
#define CLOVEN_SHUFFLED(a, ...) __builtin_shuffle(a, Lanes{__VA_ARGS__})
#endif

#define CLOVEN_WITHIN(a, h, p0, p1, p2, p3, p4, p5, p6, p7)                        \
  {                                                                                \
    const Lanes upper = (Lanes{0, 1, 2, 3, 4, 5, 6, 7} & (h)) != 0; /* all bits set */ \
    const Eight own = reinterpret_cast<Eight>(reinterpret_cast<Lanes>(a) ^ (upper & kSign)); \
    a = CLOVEN_SHUFFLED(a, p0, p1, p2, p3, p4, p5, p6, p7) + own;                  \
  }
#define CLOVEN_WITHIN_EIGHT(a)                   \
  CLOVEN_WITHIN(a, 1, 1, 0, 3, 2, 5, 4, 7, 6)    \
  CLOVEN_WITHIN(a, 2, 2, 3, 0, 1, 6, 7, 4, 5)    \
  CLOVEN_WITHIN(a, 4, 4, 5, 6, 7, 0, 1, 2, 3)

// Levels between whole vectors: all of `count`, in registers.
#define CLOVEN_BETWEEN(v, count)                            \
  for (int h = 1; h < (count); h *= 2)                      \
    for (int i = 0; i < (count); ++i)                       \
      if ((i & h) == 0) {                                   \
        const Eight a = v[i], b = v[i + h];                 \
        v[i] = a + b;                                       \
        v[i + h] = a - b;                                   \
      }

// 256 entries in two passes: levels 1 to 16 of 32 entries side by side, then levels 32 to 128 of eight vectors that lie 32 entries apart.
#define CLOVEN_HADAMARD_256                                                  \
  for (std::int64_t i = 0; i < 256; i += 32) {                               \
    Eight v[4];                                                              \
    std::memcpy(v, x + i, sizeof v);                                         \
    for (int j = 0; j < 4; ++j) {                                            \
      CLOVEN_WITHIN_EIGHT(v[j])                                              \
    }                                                                        \
    CLOVEN_BETWEEN(v, 4)                                                     \
    std::memcpy(x + i, v, sizeof v);                                         \
  }                                                                          \
  for (std::int64_t i = 0; i < 32; i += 8) {                                 \
    Eight v[8];                                                              \
    for (int j = 0; j < 8; ++j) std::memcpy(&v[j], x + i + 32 * j, sizeof v[j]); \
    CLOVEN_BETWEEN(v, 8)                                                     \
    for (int j = 0; j < 8; ++j) {                                            \
      v[j] *= scale;                                                         \
      std::memcpy(x + i + 32 * j, &v[j], sizeof v[j]);                       \
    }                                                                        \
  }

#define CLOVEN_HADAMARD                                                            \
  if (block == 256) {                                                              \
    CLOVEN_HADAMARD_256                                                            \
    return;                                                                        \
  }                                                                                \
  for (std::int64_t h = 1; h < block; h *= 2)                                      \
    for (std::int64_t i = 0; i < block; i += 2 * h)                                \
      for (std::int64_t j = i; j < i + h; ++j) {                                   \
        const double a = x[j], b = x[j + h];                                       \
        x[j] = a + b;                                                              \
        x[j + h] = a - b;                                                          \
      }                                                                            \
  for (std::int64_t i = 0; i < block; ++i) x[i] *= scale;

using Transform = void (*)(double* x, std::int64_t block, double scale);
using Outside = bool (*)(const std::int32_t* places, std::int64_t count, std::int64_t n);

// Whether a place is not one of n.
#define CLOVEN_OUTSIDE                                                             \
  const std::uint32_t most = n < INT32_MAX ? static_cast<std::uint32_t>(n) : INT32_MAX; \
  std::uint32_t any = 0;                                                           \
  for (std::int64_t i = 0; i < count; ++i) any |= static_cast<std::uint32_t>(places[i]) >= most; \
  return any != 0;

void portable(double* x, std::int64_t block, double scale) { CLOVEN_HADAMARD }
bool outside_portable(const std::int32_t* places, std::int64_t count, std::int64_t n) { CLOVEN_OUTSIDE }

#if defined(__x86_64__)
__attribute__((target("avx2"))) void avx2(double* x, std::int64_t block, double scale) { CLOVEN_HADAMARD }
__attribute__((target("avx512f,avx512dq"))) void avx512(double* x, std::int64_t block, double scale) { CLOVEN_HADAMARD }
__attribute__((target("avx2"))) bool outside_avx2(const std::int32_t* places, std::int64_t count, std::int64_t n) { CLOVEN_OUTSIDE }
#endif

Transform best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return avx512;
  if (__builtin_cpu_supports("avx2")) return avx2;
#endif
  return portable;
}

Outside best_outside() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return outside_avx2;
#endif
  return outside_portable;
}

constexpr std::int64_t kMost = 256;

// The block that takes the n % block entries at the end, and block − n % block entries spread evenly over the others.
void last_block(Transform transform, double* x, std::int64_t n, std::int64_t block, double scale) {
  const std::int64_t whole = n / block * block, spread = block - (n - whole);
  double part[kMost];
  const auto place = [&](std::int64_t i) { return i < spread ? i * whole / spread : whole + i - spread; };
  for (std::int64_t i = 0; i < block; ++i) part[i] = x[place(i)];
  transform(part, block, scale);
  for (std::int64_t i = 0; i < block; ++i) x[place(i)] = part[i];
}

void blocks(double* x, std::int64_t n, std::int64_t block, double scale, bool transposed) {
  static const Transform transform = best();
  const bool rest = n % block != 0;
  if (rest && transposed) last_block(transform, x, n, block, scale);
  for (std::int64_t i = 0; i + block <= n; i += block) transform(x + i, block, scale);
  if (rest && !transposed) last_block(transform, x, n, block, scale);
}

struct Turn {
  const double* x;
  std::int64_t m, n, block, stages, rows_per_chunk;
  double scale;
  const std::int32_t* gather;
  const float* units;
  bool leading;
  const float* total;  // added to the last stage's entries; null: nothing is
  void* out;
  int kind;  // of out: 0 float64, 1 float32, 2 bfloat16
  std::atomic<bool>* failed;  // a thread had no memory
};

std::uint16_t bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // not a number
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One entry of the last stage, into the caller's memory.
void store(const Turn& job, std::int64_t at, double value) {
  const auto sum = [&] { return static_cast<float>(value + static_cast<double>(job.total[at])); };
  if (job.kind == 0) static_cast<double*>(job.out)[at] = value;
  if (job.kind == 1) static_cast<float*>(job.out)[at] = sum();
  if (job.kind == 2) static_cast<std::uint16_t*>(job.out)[at] = bfloat16(sum());
}

void last_stage(const Turn& job, std::int64_t row, const double* from, const std::int32_t* gather, const float* units) {
  for (std::int64_t i = 0; i < job.n; ++i) store(job, row * job.n + i, from[gather[i]] * static_cast<double>(units[i]));
}

void turn_row(const Turn& job, std::int64_t row, double* a, double* b) {
  const double* from = job.x + row * job.n;
  if (job.leading) {
    std::memcpy(a, from, static_cast<std::size_t>(job.n) * sizeof(double));
    from = a;
  }
  for (std::int64_t stage = 0; stage < job.stages; ++stage) {
    if (stage > 0 || job.leading) blocks(a, job.n, job.block, job.scale, false);
    const std::int32_t* gather = job.gather + stage * job.n;
    const float* units = job.units + stage * job.n;
    if (stage + 1 == job.stages) return last_stage(job, row, from, gather, units);
    for (std::int64_t i = 0; i < job.n; ++i) b[i] = from[gather[i]] * static_cast<double>(units[i]);
    std::swap(a, b);
    from = a;
  }
}

#if defined(__x86_64__)

bool eight_at_once() {
  static const bool there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return there;
}

// The block that takes the n % block entries at the end, and others: see last_block.
void last_block_of_eight(double* x, std::int64_t n, std::int64_t block, double scale) {
  constexpr std::int64_t kEight = cloven::eight::kRows;
  const std::int64_t whole = n / block * block, spread = block - (n - whole);
  double part[kMost * kEight];
  const auto place = [&](std::int64_t i) { return i < spread ? i * whole / spread : whole + i - spread; };
  for (std::int64_t i = 0; i < block; ++i) std::memcpy(part + kEight * i, x + kEight * place(i), kEight * sizeof(double));
  cloven::eight::transform(part, block, scale);
  for (std::int64_t i = 0; i < block; ++i) std::memcpy(x + kEight * place(i), part + kEight * i, kEight * sizeof(double));
}

// Rows row … row + 7; a and b hold 8n entries each.
void turn_eight(const Turn& job, std::int64_t row, double* a, double* b) {
  namespace eight = cloven::eight;
  const std::int64_t n = job.n;
  eight::load(job.x + row * n, n, a);
  for (std::int64_t stage = 0; stage < job.stages; ++stage) {
    if (stage > 0 || job.leading) {
      for (std::int64_t i = 0; i + job.block <= n; i += job.block) eight::transform(a + eight::kRows * i, job.block, job.scale);
      if (n % job.block != 0) last_block_of_eight(a, n, job.block, job.scale);
    }
    const std::int32_t* gather = job.gather + stage * n;
    const float* units = job.units + stage * n;
    if (stage + 1 == job.stages) {
      for (std::int64_t i = eight::last_stage(a, gather, units, n, job.total, job.out, row, job.kind); i < n; ++i)
        for (std::int64_t r = 0; r < eight::kRows; ++r)
          store(job, (row + r) * n + i, a[eight::kRows * gather[i] + r] * static_cast<double>(units[i]));
      return;
    }
    eight::gathered(a, gather, units, n, b);
    std::swap(a, b);
  }
}

#else

bool eight_at_once() { return false; }
void turn_eight(const Turn&, std::int64_t, double*, double*) {}

#endif

void turn_chunk(const void* what, std::int64_t index) {
  const Turn& job = *static_cast<const Turn*>(what);
  thread_local std::vector<double> memory;
  std::int64_t row = index * job.rows_per_chunk;
  const std::int64_t end = row + job.rows_per_chunk < job.m ? row + job.rows_per_chunk : job.m;
  const std::int64_t at_once = end - row >= 8 && eight_at_once() ? 8 : 1;
  try {
    memory.resize(static_cast<std::size_t>(2 * at_once * job.n));
  } catch (...) {
    *job.failed = true;
    return;
  }
  double *a = memory.data(), *b = memory.data() + at_once * job.n;
  for (; at_once == 8 && row + 8 <= end; row += 8) turn_eight(job, row, a, b);
  for (; row < end; ++row) turn_row(job, row, a, b);
}

bool sound(std::int64_t m, std::int64_t n, std::int64_t block) {
  return m >= 0 && n >= 1 && block >= 1 && block <= n && block <= kMost && (block & (block - 1)) == 0;
}

}  // namespace

#define CLOVEN_API extern "C" __attribute__((visibility("default")))

// rows [m, n], dense; block a power of two ≤ n and 256. `transposed` undoes it where blocks overlap, too. Returns 0, or 1 if the arguments
// are out of range.
CLOVEN_API int cloven_hadamard(double* rows, std::int64_t m, std::int64_t n, std::int64_t block, double scale, int transposed) {
  if (!sound(m, n, block)) return 1;
  for (std::int64_t row = 0; row < m; ++row) blocks(rows + row * n, n, block, scale, transposed != 0);
  return 0;
}

// out = x turned, both [m, n], dense: stages of out[j] = in[gather[j]]·units[j], with a transform between any two of them, and before the
// first if `leading`. gather, units [stages, n]. kind 0: out is float64; 1, 2: out is float32 or bfloat16, of the sum with total [m, n].
// Returns 0, or 1 if the arguments are out of range or memory is short.
CLOVEN_API int cloven_turn(const double* x, std::int64_t m, std::int64_t n, std::int64_t block, double scale, std::int64_t stages,
                           const std::int32_t* gather, const float* units, int leading, const float* total, void* out, int kind,
                           int threads) {
  if (!sound(m, n, block) || stages < 1 || kind < 0 || kind > 2) return 1;
  if (m > 0 && (kind != 0) != (total != nullptr)) return 1;
  static const Outside outside = best_outside();
  if (outside(gather, stages * n, n)) return 1;
  std::atomic<bool> failed{false};
  Turn job{x, m, n, block, stages, 1, scale, gather, units, leading != 0, total, out, kind, &failed};
  const std::int64_t entries = 1 << 14, eight = m >= 8 && eight_at_once() ? 8 : 1;
  job.rows_per_chunk = entries / n > eight ? (entries / n) / eight * eight : eight;
  cloven::shared_pool().run(turn_chunk, &job, (m + job.rows_per_chunk - 1) / job.rows_per_chunk, threads);
  return failed ? 1 : 0;
}
