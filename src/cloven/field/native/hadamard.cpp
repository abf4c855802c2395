// Walsh–Hadamard transforms of blocks of rows, in place, in double precision.
//
//     every block of 2^k entries x of a row becomes s H x,   H_{2h} = [[H_h, H_h], [H_h, −H_h]]
//
// Blocks lie side by side; where they do not fill a row, one more lies at its end, over what was transformed already. Additions and
// subtractions happen in the order of `cloven.field.hadamard`, whose results are therefore the same bits.

#include <cstdint>

namespace {

#define CLOVEN_HADAMARD                                                            \
  for (std::int64_t i = 0; i + 8 <= block; i += 8) {                               \
    double a[8];                                                                   \
    for (int j = 0; j < 8; ++j) a[j] = x[i + j];                                   \
    for (int h = 1; h < 8; h *= 2) {                                               \
      double b[8];                                                                 \
      for (int j = 0; j < 8; ++j) b[j] = (j & h) ? a[j - h] - a[j] : a[j] + a[j + h]; \
      for (int j = 0; j < 8; ++j) a[j] = b[j];                                     \
    }                                                                              \
    for (int j = 0; j < 8; ++j) x[i + j] = a[j];                                   \
  }                                                                                \
  for (std::int64_t h = block < 8 ? 1 : 8; h < block; h *= 2)                      \
    for (std::int64_t i = 0; i < block; i += 2 * h)                                \
      for (std::int64_t j = i; j < i + h; ++j) {                                   \
        const double a = x[j], b = x[j + h];                                       \
        x[j] = a + b;                                                              \
        x[j + h] = a - b;                                                          \
      }                                                                            \
  for (std::int64_t i = 0; i < block; ++i) x[i] *= scale;

using Transform = void (*)(double* x, std::int64_t block, double scale);

void portable(double* x, std::int64_t block, double scale) { CLOVEN_HADAMARD }

#if defined(__x86_64__)
__attribute__((target("avx2"))) void avx2(double* x, std::int64_t block, double scale) { CLOVEN_HADAMARD }
__attribute__((target("avx512f,avx512dq"))) void avx512(double* x, std::int64_t block, double scale) { CLOVEN_HADAMARD }
#endif

Transform best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return avx512;
  if (__builtin_cpu_supports("avx2")) return avx2;
#endif
  return portable;
}

}  // namespace

// rows [m, n], dense; block a power of two ≤ n. `transposed` undoes it where blocks overlap, too. Returns 0, or 1 if the arguments are out
// of range.
extern "C" __attribute__((visibility("default"))) int cloven_hadamard(double* rows, std::int64_t m, std::int64_t n, std::int64_t block,
                                                                       double scale, int transposed) {
  static const Transform transform = best();
  if (m < 0 || n < 1 || block < 1 || block > n || (block & (block - 1)) != 0) return 1;
  const bool rest = n % block != 0;
  for (std::int64_t row = 0; row < m; ++row) {
    double* x = rows + row * n;
    if (rest && transposed) transform(x + n - block, block, scale);
    for (std::int64_t i = 0; i + block <= n; i += block) transform(x + i, block, scale);
    if (rest && !transposed) transform(x + n - block, block, scale);
  }
  return 0;
}
