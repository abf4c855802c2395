// Two processes that share memory ring each other: a number in that memory grows, and whoever sleeps on it wakes.
//
//  ring    *word = number, after everything that was written before; wake the one that waits
//  wait    until *word differs from `seen`, for at most so many nanoseconds
//  call    ring and wait, with nothing in between: a thread that is still busy when the other one wakes keeps its core from it
//  raw     a client's call without a header: `in` goes, an answer of exactly `out_bytes` comes
//  ask     the first half of such a call, with eight bytes before `in`

#include "lane.hpp"

using cloven::Side;
using cloven::Word;

CLOVEN_API int cloven_bell_interface() { return 3; }

CLOVEN_API void cloven_bell_ring(Word* word, std::uint32_t number) { cloven::ring(word, number); }

CLOVEN_API int cloven_bell_wait(Word* word, std::uint32_t seen, std::int64_t nanoseconds) { return cloven::wait(word, seen, nanoseconds); }

CLOVEN_API int cloven_bell_call(Word* own, std::uint32_t number, Word* other, std::uint32_t seen, std::int64_t nanoseconds) {
  cloven::ring(own, number);
  return cloven::wait(other, seen, nanoseconds);
}

// Sends request `number`: `prefix`, then `in`. Returns 0, or -1 if it does not fit.
CLOVEN_API int cloven_bell_ask(void* base, std::uint32_t number, std::uint64_t prefix, const void* in, std::uint32_t in_bytes) {
  Side* own = cloven::side_of(base, 0);
  if (in_bytes > cloven::kCapacity - sizeof prefix) return -1;
  std::memcpy(cloven::payload_of(base, 0), &prefix, sizeof prefix);
  std::memcpy(cloven::payload_of(base, 0) + sizeof prefix, in, in_bytes);
  own->header = cloven::kRaw;
  own->payload = static_cast<std::uint32_t>(sizeof prefix) + in_bytes + 1;
  cloven::ring(&own->number, number);
  return 0;
}

// Request `number` from `in` (null: it was sent by an earlier call that returned 0), whose answer is looked for so many nanoseconds awake before
// this thread sleeps. 1: `out` is the answer. 0: not yet. -1: no such answer.
CLOVEN_API int cloven_bell_raw(void* base, std::uint32_t number, const void* in, std::uint32_t in_bytes, void* out, std::uint32_t out_bytes,
                               std::int64_t nanoseconds, std::int64_t awake) {
  Side *own = cloven::side_of(base, 0), *other = cloven::side_of(base, 1);
  if (in_bytes > cloven::kCapacity || out_bytes > cloven::kCapacity) return -1;
  if (in != nullptr) {
    std::memcpy(cloven::payload_of(base, 0), in, in_bytes);
    own->header = cloven::kRaw;
    own->payload = in_bytes + 1;
    cloven::ring(&own->number, number);
  }
  if (awake > 0) cloven::look(&other->number, number - 1, awake < nanoseconds ? awake : nanoseconds);
  if (!cloven::wait(&other->number, number - 1, nanoseconds)) return 0;
  if (other->number.load() != number || other->header != cloven::kRaw || other->payload != out_bytes + 1) return -1;
  std::memcpy(out, cloven::payload_of(base, 1), out_bytes);
  std::memset(cloven::payload_of(base, 1), 0, out_bytes);
  return 1;
}
