// One pass of a model, served from a lane without Python: per layer a call that keys and a call that restores.
//
// Python has authorised the whole pass before (kv_shield/enclave_step.py): whose session it is, that every place is keyed once, the positions.
// The calls come in the order of the layers, each once, with sizes that follow from the shapes; anything else ends the pass and is left to
// Python. Every number of a call is read once out of the shared memory, and overwritten there, before anything is computed
// from its block.

#include <chrono>

#include "../../wire/native/lane.hpp"
#include "rows.hpp"

namespace {

using cloven::i64;
using cloven::Layer;
using cloven::Rows;
using cloven::Side;
using cloven::Step;

extern "C" {

struct State {
  i64 call;            // how many calls were answered
  i64 nanoseconds;     // that they took; both are only read by others, at any time
  std::uint32_t seen;  // number of the request taken last
  std::uint32_t due;   // an answer waits to be rung
  std::uint32_t cancelled;  // set by another thread: no call is answered any more
};

}  // extern "C"

cloven::Pool* pool = new cloven::Pool;  // never destroyed: its threads sleep in it until the process ends

// A forked child has none of the threads: it starts with a pool of its own. The old one is left as it was at the fork.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new cloven::Pool; });

// The layer and the kind of a call's number; false behind the last one.
bool call_at(const Step& step, i64 number, const Layer** at, bool* key) {
  for (i64 layer = 0; layer < step.layers; ++layer) {
    const i64 calls = step.layer[layer].keyed ? 2 : 1;
    if (number < calls) {
      *at = step.layer + layer;
      *key = calls == 2 && number == 0;
      return true;
    }
    number -= calls;
  }
  return false;
}

constexpr int kNotYet = 0, kDone = 1, kSomethingElse = 2;

template <class T>
int serve(const Step& step, void* base, State* state, i64 nanoseconds, int threads) {
  Side *own = cloven::side_of(base, 1), *other = cloven::side_of(base, 0);
  const Layer* at = nullptr;
  bool key = false;
  while (call_at(step, state->call, &at, &key)) {
    if (state->due != 0) cloven::ring(&own->number, state->seen);
    state->due = 0;
    if (!cloven::wait(&other->number, state->seen, nanoseconds)) return kNotYet;
    const auto started = std::chrono::steady_clock::now();
    const std::uint32_t number = other->number.load(), header = other->header, payload = other->payload;
    const std::size_t size = sizeof(typename T::Stored) * step.batch * step.rows;
    const Rows<T> call(step, *at, key);
    const std::size_t bytes = size * call.width_in(), answer = size * call.width_out();
    if (__atomic_load_n(&state->cancelled, __ATOMIC_ACQUIRE) != 0) return kSomethingElse;
    if (header != cloven::kRaw || payload != bytes + 1 || bytes > cloven::kCapacity || answer > cloven::kCapacity) return kSomethingElse;
    call.run_and_wipe(cloven::payload_of(base, 0), cloven::payload_of(base, 1), pool, threads);
    own->header = cloven::kRaw;
    own->payload = static_cast<std::uint32_t>(answer) + 1;
    state->seen = number;
    state->due = 1;
    const auto took = std::chrono::steady_clock::now() - started;
    __atomic_store_n(&state->nanoseconds, state->nanoseconds + std::chrono::nanoseconds(took).count(), __ATOMIC_RELAXED);
    __atomic_store_n(&state->call, state->call + 1, __ATOMIC_RELAXED);
  }
  if (state->due != 0) cloven::ring(&own->number, state->seen);
  state->due = 0;
  return kDone;
}

}  // namespace

CLOVEN_API int cloven_step_interface() { return 5; }

CLOVEN_API int cloven_step_serve(const Step* step, void* base, State* state, std::int64_t nanoseconds, int threads) {
  return step->bfloat16 ? serve<cloven::BFloat16>(*step, base, state, nanoseconds, threads) : serve<cloven::Float32>(*step, base, state, nanoseconds, threads);
}

// One call by itself, of any number of rows.
CLOVEN_API void cloven_step_compute(const Step* step, std::int64_t layer, int key, const void* in, void* out, int threads) {
  if (step->bfloat16)
    Rows<cloven::BFloat16>(*step, step->layer[layer], key != 0).run(in, out, pool, threads);
  else
    Rows<cloven::Float32>(*step, step->layer[layer], key != 0).run(in, out, pool, threads);
}
