// What the holder of a secret does to rows around a product, in one pass each: the same bits as `cloven.field.residues`, `codec` and
// `freivalds`, which say what is computed and why.
//
//     residues   whether all entries are in [−H, H]
//     add        a ± b mod p, centred residues
//     encode     x ↦ round(α x), α = scale / ‖x‖; ‖x‖² is summed in eight lanes, in order, and these pairwise
//     decode     y ↦ y / α
//     check      rows of (z, c) with S z + T c ≠ 0 mod p

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "shared_pool.hpp"

namespace {

constexpr std::int64_t kP = (std::int64_t{1} << 31) - 1;
constexpr std::int32_t kH = (1 << 30) - 1;
constexpr std::int64_t kEntries = 1 << 15;  // of a chunk, about

struct Rows {
  const void* a;
  const void* b;
  void* out;
  double* alpha;
  std::int64_t m, n, k, per_chunk;
  double scale;
  int sign;
  std::int32_t* found;  // by row
};

using Work = void (*)(const Rows&, std::int64_t first, std::int64_t last);

#define CLOVEN_ADD                                                                       \
  const std::int32_t* a = static_cast<const std::int32_t*>(job.a);                       \
  const std::int32_t* b = static_cast<const std::int32_t*>(job.b);                       \
  std::int32_t* out = static_cast<std::int32_t*>(job.out);                               \
  const std::int32_t p = static_cast<std::int32_t>(kP);                                  \
  for (std::int64_t i = first * job.n; i < last * job.n; ++i) {                          \
    const std::int32_t s = job.sign > 0 ? a[i] + b[i] : a[i] - b[i];                     \
    out[i] = s - (s > kH ? p : 0) + (s < -kH ? p : 0);                                   \
  }

#define CLOVEN_ENCODE                                                                    \
  for (std::int64_t row = first; row < last; ++row) {                                    \
    const double* x = static_cast<const double*>(job.a) + row * job.n;                   \
    std::int32_t* out = static_cast<std::int32_t*>(job.out) + row * job.n;               \
    double lanes[8] = {};                                                                \
    std::int64_t i = 0;                                                                  \
    for (; i + 8 <= job.n; i += 8)                                                       \
      for (int j = 0; j < 8; ++j) lanes[j] += x[i + j] * x[i + j];                       \
    for (int j = 0; i + j < job.n; ++j) lanes[j] += x[i + j] * x[i + j];                 \
    const double sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7])); \
    const double norm = std::sqrt(sum);                                                  \
    job.found[row] = std::isfinite(norm) ? 0 : 1;                                        \
    if (job.found[row]) continue;                                                        \
    const double alpha = norm < 0x1p-100 ? 1.0 : job.scale / norm;                       \
    job.alpha[row] = alpha;                                                              \
    for (i = 0; i < job.n; ++i) out[i] = static_cast<std::int32_t>(__builtin_rint(x[i] * alpha)); \
  }

#define CLOVEN_DECODE                                                                    \
  for (std::int64_t row = first; row < last; ++row) {                                    \
    const std::int32_t* y = static_cast<const std::int32_t*>(job.a) + row * job.n;       \
    double* out = static_cast<double*>(job.out) + row * job.n;                           \
    for (std::int64_t i = 0; i < job.n; ++i) out[i] = static_cast<double>(y[i]) / job.alpha[row]; \
  }

// |product| ≤ 2^61 whatever z and c are, and of two 2^62; folded once by 2^31 ≡ 1 that is below 2^33 in size, so that 2^30 of them fit.
#define CLOVEN_FOLD(value) (((value) >> 31) + ((value) & kP))
#define CLOVEN_PRODUCT(test, values, i) (static_cast<std::int64_t>((test)[i]) * (values)[i])
#define CLOVEN_SUM(test, values, count)                                                  \
  {                                                                                      \
    const std::int64_t half = (count) / 2;                                               \
    for (std::int64_t i = 0; i < half; ++i) {                                            \
      const std::int64_t two = CLOVEN_PRODUCT(test, values, i) + CLOVEN_PRODUCT(test, values, i + half); \
      sum += CLOVEN_FOLD(two);                                                           \
    }                                                                                    \
    if ((count) % 2 != 0) {                                                              \
      const std::int64_t last = CLOVEN_PRODUCT(test, values, (count) - 1);               \
      sum += CLOVEN_FOLD(last);                                                          \
    }                                                                                    \
  }

#define CLOVEN_CHECK                                                                     \
  const std::int32_t* s = static_cast<const std::int32_t*>(job.out);                     \
  for (std::int64_t row = first; row < last; ++row) {                                    \
    const std::int32_t* z = static_cast<const std::int32_t*>(job.a) + row * job.n;       \
    const std::int32_t* c = static_cast<const std::int32_t*>(job.b) + row * job.k;       \
    bool wrong = false;                                                                  \
    for (int t = 0; t < 2; ++t) {                                                        \
      const std::int32_t* test = s + t * (job.n + job.k);                                \
      std::int64_t sum = 0;                                                              \
      CLOVEN_SUM(test, z, job.n)                                                         \
      CLOVEN_SUM(test + job.n, c, job.k)                                                 \
      wrong |= sum % kP != 0;                                                            \
    }                                                                                    \
    job.found[row] = wrong ? 1 : 0;                                                      \
  }

#define CLOVEN_PORTABLE(name, body) \
  void name##_portable(const Rows& job, std::int64_t first, std::int64_t last) { body }
#if defined(__x86_64__)
#define CLOVEN_VERSIONS(name, body)                                                                                      \
  CLOVEN_PORTABLE(name, body)                                                                                            \
  __attribute__((target("avx2"))) void name##_avx2(const Rows& job, std::int64_t first, std::int64_t last) { body }      \
  __attribute__((target("avx512f,avx512dq,avx512vl"))) void name##_avx512(const Rows& job, std::int64_t first, std::int64_t last) { body } \
  const Work name = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? name##_avx512                \
                    : __builtin_cpu_supports("avx2")                                         ? name##_avx2                  \
                                                                                             : name##_portable;
#else
#define CLOVEN_VERSIONS(name, body) \
  CLOVEN_PORTABLE(name, body)       \
  const Work name = name##_portable;
#endif

CLOVEN_VERSIONS(add, CLOVEN_ADD)
CLOVEN_VERSIONS(encode, CLOVEN_ENCODE)
CLOVEN_VERSIONS(decode, CLOVEN_DECODE)
CLOVEN_VERSIONS(check, CLOVEN_CHECK)

// Without a branch for every entry.
bool outside(const std::int32_t* x, std::int64_t count) {
  std::uint32_t any = 0;
  for (std::int64_t i = 0; i < count; ++i) any |= static_cast<std::uint32_t>(x[i] > kH) | static_cast<std::uint32_t>(x[i] < -kH);
  return any != 0;
}

struct Shared {
  const Rows* job;
  Work work;
};

void some_rows(const void* what, std::int64_t index) {
  const Shared& shared = *static_cast<const Shared*>(what);
  const Rows& job = *shared.job;
  const std::int64_t first = index * job.per_chunk;
  shared.work(job, first, first + job.per_chunk < job.m ? first + job.per_chunk : job.m);
}

int run(Work work, Rows& job, int threads) {
  if (job.m < 0 || job.n < 0 || job.k < 0) return 1;
  const std::int64_t width = job.n + job.k > 1 ? job.n + job.k : 1;
  job.per_chunk = kEntries / width > 1 ? kEntries / width : 1;
  const Shared shared{&job, work};
  cloven::shared_pool().run(some_rows, &shared, (job.m + job.per_chunk - 1) / job.per_chunk, threads);
  return 0;
}

}  // namespace

#define CLOVEN_API extern "C" __attribute__((visibility("default")))

// All arrays are dense. Functions return 0, or 1 if a size is negative.

// Whether all entries of x are in [−H, H].
CLOVEN_API int cloven_residues(const std::int32_t* x, std::int64_t count) {
  const std::int64_t whole = count - count % 4096;
  for (std::int64_t i = 0; i < whole; i += 4096)
    if (outside(x + i, 4096)) return 0;
  return outside(x + whole, count - whole) ? 0 : 1;
}

// out [m, n] = a ± b.
CLOVEN_API int cloven_add(const std::int32_t* a, const std::int32_t* b, std::int64_t m, std::int64_t n, int sign, std::int32_t* out,
                          int threads) {
  Rows job{a, b, out, nullptr, m, n, 0, 1, 0.0, sign, nullptr};
  return run(add, job, threads);
}

// out [m, n] and alpha [m] from x [m, n]; found[row] is 1 where x is not finite, and then nothing is written for the row.
CLOVEN_API int cloven_encode(const double* x, std::int64_t m, std::int64_t n, double scale, std::int32_t* out, double* alpha,
                             std::int32_t* found, int threads) {
  Rows job{x, nullptr, out, alpha, m, n, 0, 1, scale, 0, found};
  return run(encode, job, threads);
}

// out [m, n] = y [m, n] / alpha [m].
CLOVEN_API int cloven_decode(const std::int32_t* y, std::int64_t m, std::int64_t n, double* alpha, double* out, int threads) {
  Rows job{y, nullptr, out, alpha, m, n, 0, 1, 0.0, 0, nullptr};
  return run(decode, job, threads);
}

// found[row] is 1 where some of both lines of test [2, n + k] gives test · (z ‖ c) ≠ 0 mod p, for z [m, n] and c [m, k].
CLOVEN_API int cloven_check(std::int32_t* test, const std::int32_t* z, const std::int32_t* c, std::int64_t m, std::int64_t n,
                            std::int64_t k, std::int32_t* found, int threads) {
  Rows job{z, c, test, nullptr, m, n, k, 1, 0.0, 0, found};
  return run(check, job, threads);
}
