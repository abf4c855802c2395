// Exact products of residues and int8 matrices: z = c Wᵀ mod p, p = 2^31 − 1.
//
//     c [M, K] int32, centred residues      W [N, K] int8, any value      z [M, N] int32, centred residues
//
//  1  c mod p ∈ [0, p) is written as four unsigned bytes: planes d = 0 … 3 of every row.
//  2  y_d = Σ_k plane_d[k]·W[n, k] in int32, exact for K ≤ 65,536: 255·128·65,536 < 2^31.
//  3  z = Σ_d 256^d·y_d mod p, in int64.
//
// W is read once, whatever M is: a block of its rows meets all planes before the next one is touched. For many rows see tiles.hpp.

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "amx.hpp"
#include "shared_pool.hpp"
#include "vnni.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#define CLOVEN_X86 1
#if (defined(__clang__) && __clang_major__ >= 16) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12)
#define CLOVEN_AVX_VNNI 1
#endif
#endif

namespace {

constexpr std::int64_t kP = (std::int64_t{1} << 31) - 1;
constexpr std::int64_t kH = (kP - 1) / 2;
constexpr std::int64_t kMaxInner = 65536;
constexpr std::int64_t kStep = 64;       // planes are padded with zeros to a multiple of this
constexpr int kRows = 4;                 // rows of W that share a pass over the planes
constexpr std::int64_t kChunkBytes = 1 << 18;
constexpr std::int64_t kFarBytes = 1 << 19;  // of a matrix that is not kept in the caches
constexpr std::int64_t kFewestAmx = 5;   // rows from which on the matrix unit is faster
constexpr std::int64_t kFewestTiles = 7; // … and squares with the byte product
constexpr std::int64_t kPiece = 512;     // rows whose planes are in memory at once

using Plane = std::int16_t;  // wide enough for the 16-bit multiply-add; the byte kernel has planes of its own

struct Job {
  const std::uint8_t* bytes;  // [M, 4, padded]
  const Plane* words;         // the same in 16 bits, for CPUs without a byte product
  std::int64_t m, k, padded;
  const std::int8_t* w;
  std::int64_t n, stride, rows_per_chunk;
  std::int32_t* z;
  void (*dot)(const Job&, const std::int8_t* const* w, std::int64_t m, std::int32_t (*y)[4]);
  void (*one)(const Job&, std::int64_t first, std::int64_t last);  // some rows of W against a single row of c; null: by `dot`
};

std::int32_t reduced(const std::int32_t (&y)[4]) {
  // |total| < 2^31·(1 + 2^8 + 2^16 + 2^24) < 2^56; one fold by 2^31 ≡ 1, then one p where it sticks out
  const std::int64_t total = y[0] + y[1] * (std::int64_t{1} << 8) + y[2] * (std::int64_t{1} << 16) + y[3] * (std::int64_t{1} << 24);
  const std::int64_t folded = (total & kP) + (total >> 31);
  return static_cast<std::int32_t>(folded > kH ? folded - kP : folded);
}

// y[r][d] for kRows rows of W and the planes of row m.
#define CLOVEN_DOT_WORDS                                                                    \
  for (int r = 0; r < kRows; ++r)                                                           \
    for (int d = 0; d < 4; ++d) {                                                           \
      const Plane* plane = job.words + (m * 4 + d) * job.padded;                            \
      std::int32_t sum = 0;                                                                 \
      for (std::int64_t i = 0; i < job.k; ++i) sum += plane[i] * static_cast<Plane>(w[r][i]); \
      y[r][d] = sum;                                                                        \
    }

void dot_portable(const Job& job, const std::int8_t* const* w, std::int64_t m, std::int32_t (*y)[4]) { CLOVEN_DOT_WORDS }

#if CLOVEN_X86
__attribute__((target("avx2"))) void dot_avx2(const Job& job, const std::int8_t* const* w, std::int64_t m, std::int32_t (*y)[4]) {
  CLOVEN_DOT_WORDS
}

#if CLOVEN_AVX_VNNI
// The byte product of CPUs without AVX-512: two rows of W at a time, whose eight sums, four planes and codes fill the 16 registers.
__attribute__((target("avx2,avxvnni"))) void dot_avx2_vnni(const Job& job, const std::int8_t* const* w, std::int64_t m, std::int32_t (*y)[4]) {
  constexpr std::int64_t kWide = 32;
  const std::uint8_t* planes = job.bytes + m * 4 * job.padded;
  const std::int64_t ahead = kRows * job.stride, whole = job.k / kWide * kWide;
  for (int first = 0; first < kRows; first += 2) {
    __m256i sum[2][4];
    for (auto& row : sum)
      for (auto& one : row) one = _mm256_setzero_si256();
    std::int64_t i = 0;
    const auto step = [&](const std::int8_t* const* codes) __attribute__((target("avx2,avxvnni"), always_inline)) {
      for (int r = 0; r < 2; ++r) {
        const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes[r]));
        for (int d = 0; d < 4; ++d) {
          const __m256i plane = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes + d * job.padded + i));
          sum[r][d] = _mm256_dpbusd_avx_epi32(sum[r][d], plane, row);
        }
      }
    };
    for (; i < whole; i += kWide) {
      const std::int8_t* codes[2];
      for (int r = 0; r < 2; ++r) {
        codes[r] = w[first + r] + i;
        _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(codes[r]) + ahead), _MM_HINT_T0);
      }
      step(codes);
    }
    if (whole < job.k) {  // planes are padded with zeros, W is not
      std::int8_t rest[2][kWide] = {};
      for (int r = 0; r < 2; ++r) std::memcpy(rest[r], w[first + r] + whole, static_cast<std::size_t>(job.k - whole));
      const std::int8_t* codes[2] = {rest[0], rest[1]};
      step(codes);
    }
    for (int r = 0; r < 2; ++r)
      for (int d = 0; d < 4; ++d) {
        alignas(kWide) std::int32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum[r][d]);
        std::int32_t total = 0;
        for (const std::int32_t lane : lanes) total += lane;
        y[first + r][d] = total;
      }
  }
}
#endif

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void dot_avx512_vnni(
    const Job& job, const std::int8_t* const* w, std::int64_t m, std::int32_t (*y)[4]) {
  const std::uint8_t* planes = job.bytes + m * 4 * job.padded;
  __m512i sum[kRows][4];
  for (auto& row : sum)
    for (auto& one : row) one = _mm512_setzero_si512();
  const std::int64_t ahead = kRows * job.stride;  // the next rows: four streams of one row each are too short for the CPU to foresee
  const std::int64_t whole = job.k / kStep * kStep;
  for (std::int64_t i = 0; i < whole; i += kStep) {
    __m512i plane[4];
    for (int d = 0; d < 4; ++d) plane[d] = _mm512_loadu_si512(planes + d * job.padded + i);
    for (int r = 0; r < kRows; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(w[r]) + i + ahead), _MM_HINT_T0);
      const __m512i codes = _mm512_loadu_si512(w[r] + i);
      for (int d = 0; d < 4; ++d) sum[r][d] = _mm512_dpbusd_epi32(sum[r][d], plane[d], codes);
    }
  }
  if (whole < job.k) {
    const __mmask64 mask = (__mmask64{1} << (job.k - whole)) - 1;
    for (int r = 0; r < kRows; ++r) {
      const __m512i codes = _mm512_maskz_loadu_epi8(mask, w[r] + whole);
      for (int d = 0; d < 4; ++d) sum[r][d] = _mm512_dpbusd_epi32(sum[r][d], _mm512_loadu_si512(planes + d * job.padded + whole), codes);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int d = 0; d < 4; ++d) y[r][d] = _mm512_reduce_add_epi32(sum[r][d]);
}
#endif

#if CLOVEN_X86
// One row of c: rows of W one after the other are a single stream, which the CPU foresees; four at a time read memory at two thirds of its
// speed. (For more rows of c that is no slower.) Eight sums, so that no product waits for the one before it. A large W passes by the caches: it
// would drive out what the asking process, on the same cores, needs next, and be gone itself when its turn comes again.
template <int kLocality>  // of __builtin_prefetch: 3 keeps, 0 does not
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void one_row(const Job& job, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kAhead = 2048;
  const std::int64_t whole = job.k / (2 * kStep) * (2 * kStep);
  for (std::int64_t n = first; n < last; ++n) {
    const std::int8_t* w = job.w + n * job.stride;
    __m512i sum[2][4];
    for (auto& half : sum)
      for (auto& one : half) one = _mm512_setzero_si512();
    std::int64_t i = 0;
    for (; i < whole; i += 2 * kStep)
      for (int half = 0; half < 2; ++half) {
        const std::int64_t at = i + half * kStep;
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(w) + static_cast<std::uintptr_t>(at + kAhead)), 0, kLocality);
        const __m512i codes = _mm512_loadu_si512(w + at);
        for (int d = 0; d < 4; ++d)
          sum[half][d] = _mm512_dpbusd_epi32(sum[half][d], _mm512_loadu_si512(job.bytes + d * job.padded + at), codes);
      }
    for (; i < job.k; i += kStep) {
      const __mmask64 mask = job.k - i >= kStep ? ~__mmask64{0} : (__mmask64{1} << (job.k - i)) - 1;
      const __m512i codes = _mm512_maskz_loadu_epi8(mask, w + i);
      for (int d = 0; d < 4; ++d) sum[0][d] = _mm512_dpbusd_epi32(sum[0][d], _mm512_loadu_si512(job.bytes + d * job.padded + i), codes);
    }
    std::int32_t y[4];
    for (int d = 0; d < 4; ++d) y[d] = _mm512_reduce_add_epi32(_mm512_add_epi32(sum[0][d], sum[1][d]));
    job.z[n] = reduced(y);
  }
}

// The four planes of a row, [4, padded]: zeros behind its k entries.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void planes_of_row(const std::int32_t* c, std::int64_t k, std::int64_t padded,
                                                                                   std::uint8_t* planes) {
  const __m512i p = _mm512_set1_epi32(static_cast<int>(kP));
  for (std::int64_t i = 0; i < k; i += 16) {
    const std::int64_t left = k - i;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    __m512i value = _mm512_maskz_loadu_epi32(mask, c + i);
    value = _mm512_mask_add_epi32(value, _mm512_cmplt_epi32_mask(value, _mm512_setzero_si512()), value, p);  // negative: + p
    for (int d = 0; d < 4; ++d)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + d * padded + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(value, static_cast<unsigned>(8 * d))));
  }
}
#endif

void chunk(const void* what, std::int64_t index) {
  const Job& job = *static_cast<const Job*>(what);
  const std::int64_t first = index * job.rows_per_chunk;
  const std::int64_t last = first + job.rows_per_chunk < job.n ? first + job.rows_per_chunk : job.n;
  if (job.m == 1 && job.one != nullptr) return job.one(job, first, last);
  for (std::int64_t n = first; n < last; n += kRows) {
    const std::int8_t* w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = job.w + (n + r < last ? n + r : last - 1) * job.stride;  // the last row again, unused
    for (std::int64_t m = 0; m < job.m; ++m) {
      std::int32_t y[kRows][4];
      job.dot(job, w, m, y);
      for (int r = 0; r < kRows && n + r < last; ++r) job.z[m * job.n + n + r] = reduced(y[r]);
    }
  }
}

cloven::Pool* pool = new cloven::Pool;  // never destroyed: its threads sleep in it until the process ends

// A forked child has none of the threads: it starts with a pool of its own. The old one is left as it was at the fork.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new cloven::Pool; });

enum Kernel : int { kPortable, kAvx2, kAvx2Vnni, kAvx512Vnni, kAmx };

// Whether this CPU runs it.
bool runs(int kernel) {
#if CLOVEN_X86
  switch (kernel) {
    case kPortable: return true;
    case kAvx2: return __builtin_cpu_supports("avx2");
#if CLOVEN_AVX_VNNI
    case kAvx2Vnni: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni");
#endif
    case kAvx512Vnni:
      return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#if CLOVEN_TILES
    case kAmx: return cloven::amx_allowed();
#endif
    default: return false;
  }
#else
  return kernel == kPortable;
#endif
}

int best_kernel() {
  for (int kernel = kAmx; kernel > kPortable; --kernel)
    if (runs(kernel)) return kernel;
  return kPortable;
}

}  // namespace

cloven::Pool& cloven::shared_pool() { return *pool; }

#if CLOVEN_TILES
namespace {

int tiled_product(const std::int32_t* c, std::int64_t m, std::int64_t k, const std::int8_t* w, std::int64_t n, std::int64_t stride,
                  std::int32_t* z, int threads, bool amx) {
  thread_local cloven::Lines planes;
  std::atomic<bool> failed{false};
  cloven::TileJob job{c, m, k, (k + cloven::kQuad - 1) / cloven::kQuad, 0, nullptr, w, n, stride, z, &failed,
                      amx ? cloven::amx_two_strips : cloven::vnni_two_strips, amx ? cloven::kAmxQuads : cloven::kVnniQuads};
  const std::int64_t wide = cloven::kStrips * cloven::kTile;
  for (std::int64_t first = 0; first < m && !failed; first += kPiece, job.c += kPiece * k, job.z += kPiece * n) {
    job.m = m - first < kPiece ? m - first : kPiece;
    job.blocks = (job.m + cloven::kTile - 1) / cloven::kTile;
    try {
      job.planes = planes.at_least(static_cast<std::size_t>(job.blocks * job.quads) * 4 * cloven::kTileBytes);
    } catch (...) {
      return 1;
    }
    pool->run(cloven::pack_planes, &job, job.blocks, threads);
    pool->run(amx ? cloven::amx_chunk : cloven::tiles_chunk, &job, (n + wide - 1) / wide, threads);
  }
  return failed ? 1 : 0;
}

}  // namespace
#endif

#define CLOVEN_API extern "C" __attribute__((visibility("default")))

// The fastest kernel that this CPU runs: 0 portable, 1 AVX2, 2 AVX2 with VNNI, 3 AVX-512 VNNI, 4 AMX (and 3 for the fewest rows).
CLOVEN_API int cloven_kernel() { return best_kernel(); }

// Whether this CPU runs a kernel: 1 or 0.
CLOVEN_API int cloven_runs(int kernel) { return runs(kernel); }

// Whether it is fast for any number of rows: 1 or 0.
CLOVEN_API int cloven_many_rows() {
#if CLOVEN_TILES
  return best_kernel() >= kAvx512Vnni && cloven::tiles_allowed();
#else
  return 0;
#endif
}

// The version of this interface.
CLOVEN_API int cloven_interface() { return 10; }

// z = c Wᵀ mod p. Strides in bytes of W only; c and z are dense. Returns 0, or 1 if the arguments are out of range or memory is short.
CLOVEN_API int cloven_product(const std::int32_t* c, std::int64_t m, std::int64_t k, const std::int8_t* w, std::int64_t n,
                              std::int64_t stride, std::int32_t* z, int threads, int kernel) {
  if (m < 0 || n < 0 || k < 1 || k > kMaxInner || !runs(kernel)) return 1;
  if (m == 0 || n == 0) return 0;
#if CLOVEN_TILES
  if (kernel == kAmx && m >= kFewestAmx) return tiled_product(c, m, k, w, n, stride, z, threads, true);
  if (kernel == kAmx) kernel = kAvx512Vnni;
  if (kernel == kAvx512Vnni && m >= kFewestTiles && cloven::tiles_allowed()) return tiled_product(c, m, k, w, n, stride, z, threads, false);
#endif
  const std::int64_t padded = (k + kStep - 1) / kStep * kStep;
  const std::size_t size = static_cast<std::size_t>(m * 4 * padded);
  thread_local std::vector<std::uint8_t> bytes;
  thread_local std::vector<Plane> words;
  const bool wide = kernel < kAvx2Vnni;
  try {
    if (wide) words.assign(size, 0);
    else bytes.assign(size, 0);
  } catch (...) {
    return 1;
  }
  std::int64_t row = 0;
#if CLOVEN_X86
  if (kernel == kAvx512Vnni)
    for (; row < m; ++row) planes_of_row(c + row * k, k, padded, bytes.data() + row * 4 * padded);
#endif
  for (; row < m; ++row)
    for (std::int64_t i = 0; i < k; ++i) {
      const std::int64_t signed_value = c[row * k + i];
      const std::uint32_t value = static_cast<std::uint32_t>(signed_value < 0 ? signed_value + kP : signed_value);
      for (int d = 0; d < 4; ++d) {
        const std::size_t at = static_cast<std::size_t>((row * 4 + d) * padded + i);
        const std::uint8_t digit = static_cast<std::uint8_t>(value >> (8 * d));
        if (wide) words[at] = digit;
        else bytes[at] = digit;
      }
    }
  Job job{bytes.data(), words.data(), m, k, padded, w, n, stride, 0, z, dot_portable, nullptr};
#if CLOVEN_X86
  if (kernel == kAvx2) job.dot = dot_avx2;
#if CLOVEN_AVX_VNNI
  if (kernel == kAvx2Vnni) job.dot = dot_avx2_vnni;
#endif
  if (kernel == kAvx512Vnni) {
    job.dot = dot_avx512_vnni;
    job.one = n * stride < kFarBytes ? one_row<3> : one_row<0>;
  }
#endif
  job.rows_per_chunk = (kChunkBytes / k + kRows - 1) / kRows * kRows;
  pool->run(chunk, &job, (n + job.rows_per_chunk - 1) / job.rows_per_chunk, threads);
  return 0;
}
