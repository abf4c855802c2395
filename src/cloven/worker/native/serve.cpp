// Products served from a lane without Python: see worker/lane_products.py.
//
//     request   header kRaw    payload: group, rows (uint32 each), c int32 [rows, K]
//     answer    header kRaw    payload: z = c Wᵀ mod p, int32 [rows, N]
//
// c is copied out of the shared memory before it is looked at; z is written once and not read again. Anything else than a product of a
// matrix that is here is left to Python, unanswered.

#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../../wire/native/lane.hpp"

namespace {

using cloven::Side;
using i64 = std::int64_t;

extern "C" {

// cloven_product of the field's kernels.
using Product = int (*)(const std::int32_t* c, i64 m, i64 k, const std::int8_t* w, i64 n, i64 stride, std::int32_t* z, int threads, int kernel);

struct Matrix {
  const std::int8_t* w;  // [n, k], rows `stride` bytes apart; null: not here
  i64 n, k, stride;
};

struct Serving {
  const Matrix* matrices;
  i64 count;
  Product product;
  i64 kernel;
};

struct State {
  i64 answered, rows, bytes_in, bytes_out, nanoseconds;  // since it was made; only read by others, at any time
  std::uint32_t seen;                                    // number of the request taken last
  std::uint32_t due;                                     // an answer waits to be rung
};

}  // extern "C"

constexpr int kNotYet = 0, kSomethingElse = 2;
constexpr std::size_t kPrefix = 2 * sizeof(std::uint32_t);

// Another thread may look at a count while this one, alone, makes it grow.
void grow(i64* count, i64 by) { __atomic_store_n(count, *count + by, __ATOMIC_RELAXED); }

// Copies the request's rows; the matrix, or null where it is no request for a product.
const Matrix* taken(const Serving& serving, void* base, const Side& from, std::vector<std::int32_t>& c, std::uint32_t* rows) {
  const std::uint32_t header = from.header, payload = from.payload;
  if (header != cloven::kRaw || payload < kPrefix + 1 || payload > cloven::kCapacity + 1) return nullptr;
  const unsigned char* box = cloven::payload_of(base, 0);
  std::uint32_t asked[2];
  std::memcpy(asked, box, sizeof asked);
  if (asked[0] >= static_cast<std::uint64_t>(serving.count) || asked[1] == 0 || asked[1] > cloven::kCapacity) return nullptr;
  const Matrix& matrix = serving.matrices[asked[0]];
  const std::size_t entries = static_cast<std::size_t>(asked[1]) * static_cast<std::size_t>(matrix.k);
  const std::size_t answer = static_cast<std::size_t>(asked[1]) * static_cast<std::size_t>(matrix.n);
  if (matrix.w == nullptr || payload - 1 != kPrefix + entries * sizeof(std::int32_t) || answer * sizeof(std::int32_t) > cloven::kCapacity)
    return nullptr;
  try {
    c.resize(entries);
  } catch (...) {
    return nullptr;
  }
  std::memcpy(c.data(), box + kPrefix, entries * sizeof(std::int32_t));
  *rows = asked[1];
  return &matrix;
}

}  // namespace

CLOVEN_API int cloven_serve_interface() { return 2; }

// Answers requests until none came for so many nanoseconds (0), or something else came (2).
CLOVEN_API int cloven_serve(const Serving* serving, void* base, State* state, std::int64_t nanoseconds, int threads) {
  Side *own = cloven::side_of(base, 1), *other = cloven::side_of(base, 0);
  thread_local std::vector<std::int32_t> c;
  for (;;) {
    if (state->due != 0) cloven::ring(&own->number, state->seen);
    state->due = 0;
    if (!cloven::wait(&other->number, state->seen, nanoseconds)) return kNotYet;
    const auto started = std::chrono::steady_clock::now();
    const std::uint32_t number = other->number.load();
    std::uint32_t rows = 0;
    const Matrix* matrix = taken(*serving, base, *other, c, &rows);
    if (matrix == nullptr) return kSomethingElse;
    auto* z = reinterpret_cast<std::int32_t*>(cloven::payload_of(base, 1));
    const int kernel = static_cast<int>(serving->kernel);
    if (serving->product(c.data(), rows, matrix->k, matrix->w, matrix->n, matrix->stride, z, threads, kernel) != 0) return kSomethingElse;
    const std::size_t answer = rows * static_cast<std::size_t>(matrix->n) * sizeof(std::int32_t);
    own->header = cloven::kRaw;
    own->payload = static_cast<std::uint32_t>(answer) + 1;
    state->seen = number;
    state->due = 1;
    // before the bell: who has the answer finds it counted
    grow(&state->answered, 1);
    grow(&state->rows, rows);
    grow(&state->bytes_in, static_cast<i64>(kPrefix + c.size() * sizeof(std::int32_t)));
    grow(&state->bytes_out, static_cast<i64>(answer));
    grow(&state->nanoseconds, std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - started).count());
  }
}
