// Where things are in a lane's memory (see lane.py), and how two processes wake each other there (Linux's futex).
#pragma once

#if !defined(__linux__)
#error "shared-memory lanes need Linux's futex"
#endif

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cloven {

constexpr std::size_t kHeaderBytes = 2048;       // wire.limits.MAX_HEADER_BYTES
constexpr std::size_t kCapacity = 4u << 20;      // lane.CAPACITY
constexpr std::size_t kFirst = 256;              // offset of the first box
constexpr std::uint32_t kRaw = 0xFFFFFFFF;       // in place of a header's length: a call of a step, which has no header
constexpr std::int64_t kSecond = 1'000'000'000;

using Word = std::atomic<std::uint32_t>;
static_assert(sizeof(Word) == sizeof(std::uint32_t) && Word::is_always_lock_free, "a futex is four bytes");

// One side's number, and the lengths of the header and (plus one; 0: none) of the payload that it wrote last.
struct Side {
  Word number;
  std::uint32_t header, payload;
};

inline Side* side_of(void* base, int side) { return reinterpret_cast<Side*>(static_cast<char*>(base) + 64 * (side + 1)); }

inline unsigned char* payload_of(void* base, int side) {
  return static_cast<unsigned char*>(base) + kFirst + side * (kHeaderBytes + kCapacity) + kHeaderBytes;
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

inline void ring(Word* word, std::uint32_t number) {
  word->store(number, std::memory_order_seq_cst);
  syscall(SYS_futex, word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

// Whether *word differs from `seen`, and what was written before it was rung can be read: at once, or within so many nanoseconds. A signal ends
// the wait early, so that Python can handle it.
inline bool wait(Word* word, std::uint32_t seen, std::int64_t nanoseconds) {
  if (word->load(std::memory_order_acquire) != seen) return true;
  const timespec timeout{static_cast<time_t>(nanoseconds / kSecond), static_cast<long>(nanoseconds % kSecond)};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &timeout, nullptr, 0);
  return word->load(std::memory_order_acquire) != seen;
}

// The same, awake: for at most so many nanoseconds.
inline bool look(const Word* word, std::uint32_t seen, std::int64_t nanoseconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(nanoseconds);
  do {
    for (int i = 0; i < 64; ++i) {
      if (word->load(std::memory_order_acquire) != seen) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

}  // namespace cloven

#define CLOVEN_API extern "C" __attribute__((visibility("default")))
