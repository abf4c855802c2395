// Products served from a lane without Python: see worker/lane_products.py, and private_lora/lane_answers.py for metered ones.
//
//     request   header kRaw    payload: group, rows (uint32 each), c int32 [rows, K]
//     answer    header kRaw    payload: z = c Wᵀ mod p, int32 [rows, N]
//     metered   the same; c must be residues, its rows are taken from the group's credit before anything is computed, and of z the highest
//               b of 31 bits leave: one byte each for b = 8, two otherwise
//
// c is copied out of the shared memory before it is looked at; an answer is written once and not read again. Anything else than a product of
// a matrix that is here is left to Python, unanswered.
//
// Between an answer and the next request a worker's memory has nothing to do, for a third of a token's time where the asking process shares
// the machine. So the codes that are asked for next, those of the groups that follow, are brought into the outer caches meanwhile, by one core,
// until somebody asks.

#include <unistd.h>

#include <atomic>
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
  i64* credit;  // rows that may still be answered, by group; null: not metered, and what follows is read ahead
  i64 bits;     // of an answer's entry, where it is metered
};

struct State {
  i64 answered, rows, bytes_in, bytes_out, nanoseconds;  // since it was made; only read by others, at any time
  std::uint32_t seen;                                    // number of the request taken last
  std::uint32_t due;                                     // an answer waits to be rung
  std::uint32_t group, asked;                            // of the last request
};

}  // extern "C"

constexpr int kNotYet = 0, kSomethingElse = 2, kNoCredit = 3;
constexpr std::int32_t kH = (1 << 30) - 1;
constexpr std::size_t kPrefix = 2 * sizeof(std::uint32_t);

constexpr i64 kLine = 64, kLook = 256 * kLine;  // bytes
constexpr i64 kMostAhead = 8 << 20;
constexpr i64 kPause = 20'000;         // nanoseconds, and what the kernel adds: whoever was woken may need this core
constexpr std::uint32_t kFewRows = 8;  // rows of a request that memory's speed bounds
std::atomic<int> at_work{0};           // lanes of this process that multiply

// Bytes that are read ahead: a quarter of the last cache at most, as its rest is the asking process's; 0 where its size is not known.
i64 bytes_ahead() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const i64 quarter = sysconf(_SC_LEVEL3_CACHE_SIZE) / 4;
  return quarter < kMostAhead ? quarter : kMostAhead;
#else
  return 0;
#endif
}

// Prefetches W of the groups after this one, until something comes over this lane, or another lane is served. A prefetch never faults: what is
// not in memory stays away.
void read_ahead(const Serving& serving, std::uint32_t group, const cloven::Word& word, std::uint32_t seen) {
  i64 left = bytes_ahead();
  for (i64 step = 1; step < serving.count && left > 0; ++step) {
    const Matrix& next = serving.matrices[(group + step) % serving.count];
    if (next.w == nullptr) continue;
    const auto first = reinterpret_cast<std::uintptr_t>(next.w);
    const i64 whole = next.n * next.stride, bytes = whole < left ? whole : left;
    for (i64 at = 0; at < bytes; at += kLine) {
      if (at % kLook == 0 && (at_work.load(std::memory_order_relaxed) != 0 || word.load(std::memory_order_relaxed) != seen)) return;
      __builtin_prefetch(reinterpret_cast<const void*>(first + static_cast<std::uintptr_t>(at)), 0, 1);
    }
    left -= bytes;
  }
}

// Another thread may look at a count while this one, alone, makes it grow.
void grow(i64* count, i64 by) { __atomic_store_n(count, *count + by, __ATOMIC_RELAXED); }

std::size_t bytes_of_entry(const Serving& serving) {
  if (serving.credit == nullptr) return sizeof(std::int32_t);
  return serving.bits == 8 ? sizeof(std::int8_t) : sizeof(std::int16_t);
}

bool residues(const std::vector<std::int32_t>& c) {
  bool all = true;
  for (const std::int32_t entry : c) all &= entry >= -kH && entry <= kH;
  return all;
}

// Takes rows from a group's credit, which others may take back or add to meanwhile.
bool paid(i64* credit, i64 rows) {
  i64 left = __atomic_load_n(credit, __ATOMIC_RELAXED);
  while (left >= rows)
    if (__atomic_compare_exchange_n(credit, &left, left - rows, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return true;
  return false;
}

template <class Number>
void round_into(const std::vector<std::int32_t>& z, i64 bits, void* out) {
  for (std::size_t i = 0; i < z.size(); ++i) static_cast<Number*>(out)[i] = static_cast<Number>(z[i] >> (31 - bits));
}

// Copies the request's rows; the matrix, or null where it is no request for a product.
const Matrix* taken(const Serving& serving, void* base, const Side& from, std::vector<std::int32_t>& c, std::uint32_t asked[2]) {
  const std::uint32_t header = from.header, payload = from.payload;
  if (header != cloven::kRaw || payload < kPrefix + 1 || payload > cloven::kCapacity + 1) return nullptr;
  const unsigned char* box = cloven::payload_of(base, 0);
  std::memcpy(asked, box, kPrefix);
  if (asked[0] >= static_cast<std::uint64_t>(serving.count) || asked[1] == 0 || asked[1] > cloven::kCapacity) return nullptr;
  const Matrix& matrix = serving.matrices[asked[0]];
  const std::size_t entries = static_cast<std::size_t>(asked[1]) * static_cast<std::size_t>(matrix.k);
  const std::size_t answer = static_cast<std::size_t>(asked[1]) * static_cast<std::size_t>(matrix.n);
  if (matrix.w == nullptr || payload - 1 != kPrefix + entries * sizeof(std::int32_t) || answer * bytes_of_entry(serving) > cloven::kCapacity)
    return nullptr;
  try {
    c.resize(entries);
  } catch (...) {
    return nullptr;
  }
  std::memcpy(c.data(), box + kPrefix, entries * sizeof(std::int32_t));
  return serving.credit == nullptr || residues(c) ? &matrix : nullptr;
}

// The product of rows c into `out`, as it leaves; whether there was memory for it.
bool answered(const Serving& serving, const Matrix& matrix, const std::vector<std::int32_t>& c, i64 rows, void* out, int threads) {
  thread_local std::vector<std::int32_t> z;
  auto* whole = static_cast<std::int32_t*>(out);
  if (serving.credit != nullptr) {
    try {
      z.resize(static_cast<std::size_t>(rows) * static_cast<std::size_t>(matrix.n));
    } catch (...) {
      return false;
    }
    whole = z.data();
  }
  const int kernel = static_cast<int>(serving.kernel);
  ++at_work;
  const int ended = serving.product(c.data(), rows, matrix.k, matrix.w, matrix.n, matrix.stride, whole, threads, kernel);
  --at_work;
  if (ended != 0) return false;
  if (serving.credit != nullptr) serving.bits == 8 ? round_into<std::int8_t>(z, 8, out) : round_into<std::int16_t>(z, serving.bits, out);
  return true;
}

}  // namespace

CLOVEN_API int cloven_serve_interface() { return 3; }

// Adds rows to a credit; takes all that is left of one.
CLOVEN_API void cloven_credit_add(i64* credit, i64 rows) { __atomic_fetch_add(credit, rows, __ATOMIC_ACQ_REL); }
CLOVEN_API i64 cloven_credit_take(i64* credit) { return __atomic_exchange_n(credit, 0, __ATOMIC_ACQ_REL); }

// Answers requests for so many nanoseconds, or until none came for as long (0: whoever serves may want to stop), something else came (2), or one
// for whose rows there is no credit (3): called again, it looks at that request again.
CLOVEN_API int cloven_serve(const Serving* serving, void* base, State* state, std::int64_t nanoseconds, int threads) {
  Side *own = cloven::side_of(base, 1), *other = cloven::side_of(base, 0);
  thread_local std::vector<std::int32_t> c;
  auto now = std::chrono::steady_clock::now();
  const auto until = now + std::chrono::nanoseconds(nanoseconds);
  for (;;) {
    if (state->due != 0) {
      state->due = 0;
      cloven::ring(&own->number, state->seen);
      const bool foreseen = serving->credit == nullptr && state->asked <= kFewRows && bytes_ahead() > 0;
      if (foreseen && !cloven::wait(&other->number, state->seen, kPause)) read_ahead(*serving, state->group, other->number, state->seen);
    }
    if (now > until) return kNotYet;
    if (!cloven::wait(&other->number, state->seen, nanoseconds)) return kNotYet;
    const auto started = std::chrono::steady_clock::now();
    const std::uint32_t number = other->number.load();
    std::uint32_t asked[2] = {0, 0};
    const Matrix* matrix = taken(*serving, base, *other, c, asked);
    if (matrix == nullptr) return kSomethingElse;
    const auto [group, rows] = asked;
    state->group = group;
    state->asked = rows;
    if (serving->credit != nullptr && !paid(serving->credit + group, rows)) return kNoCredit;
    if (!answered(*serving, *matrix, c, rows, cloven::payload_of(base, 1), threads)) return kSomethingElse;
    const std::size_t answer = rows * static_cast<std::size_t>(matrix->n) * bytes_of_entry(*serving);
    own->header = cloven::kRaw;
    own->payload = static_cast<std::uint32_t>(answer) + 1;
    state->seen = number;
    state->due = 1;
    // before the bell: who has the answer finds it counted
    grow(&state->answered, 1);
    grow(&state->rows, rows);
    grow(&state->bytes_in, static_cast<i64>(kPrefix + c.size() * sizeof(std::int32_t)));
    grow(&state->bytes_out, static_cast<i64>(answer));
    now = std::chrono::steady_clock::now();
    grow(&state->nanoseconds, std::chrono::duration_cast<std::chrono::nanoseconds>(now - started).count());
  }
}
