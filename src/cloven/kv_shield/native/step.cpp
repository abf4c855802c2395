// One pass of a model over a few rows, served from a lane without Python: per layer a call that keys and a call that restores.
//
//  key      x = q ‖ k (‖ v) [B·S, W]: RMS norms of the heads of q and k, rotation; in session mode q' = [q, 0] F⁻ᵀ, k' = [k, ν] F, v' = [v, ν] F_v
//  restore  a' [B·S, H·(d + ρ)]: the inverse permutation, or (a' F_v⁻¹)[: d] per head
//
// Python has authorised the whole pass before (kv_shield/step.py): whose session it is, that every place is keyed once, the positions. The
// calls come in the order of the layers, each once, with sizes that follow from the shapes; anything else ends the pass and is left to Python.
// A call is copied out of the shared memory before it is looked at, and what was copied is overwritten.
// Arithmetic is PyTorch's, operation by operation, in the vectors' type, but for the order of sums.

#include "../../wire/native/lane.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)  // whose start the choice would precede
#define CLOVEN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLOVEN_CLONES
#endif

namespace {

using cloven::Side;
using i64 = std::int64_t;

extern "C" {

struct Layer {
  i64 heads, kv_heads, head_dim, noise;  // H, G, d, ρ
  i64 keyed;                             // whether the layer has a keying call
  i64 period;                            // columns of q ‖ k after which the indices below repeat; 0: no rotation
  const std::int32_t *partner, *cosine, *sine;
  const float* norms;  // [H + G, d], rounded to the vectors' type; null: none
  double epsilon;
  const std::int32_t* restore;   // [H·d]; null in session mode
  const float *kv, *inverse;     // [B, 2, G, D, D]; null in permute mode
  const float* random;           // [B, 2, G, S, ρ]
};

struct Step {
  i64 bfloat16;  // else float32
  i64 batch, rows, layers;
  const float *cos, *sin;  // [B·S, cos_width], [B·S, sin_width], rounded to the vectors' type
  i64 cos_width, sin_width;
  const Layer* layer;
};

struct State {
  i64 call;            // how many calls were answered
  std::uint32_t seen;  // number of the request taken last
  std::uint32_t due;   // an answer waits to be rung
  std::uint32_t cancelled;  // set by another thread: no call is answered any more
};

}  // extern "C"

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// To the nearest bfloat16, ties to even, without a branch: loops over this use the CPU's vectors.
inline std::uint32_t bfloat16_bits(float x) {
  const std::uint32_t bits = bits_of(x), nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : nearest;
}

struct Float32 {
  using Stored = float;
  static float load(Stored x) { return x; }
  static Stored store(float x) { return x; }
  static float rounded(float x) { return x; }
};

struct BFloat16 {
  using Stored = std::uint16_t;
  static float load(Stored x) { return float_of(std::uint32_t{x} << 16); }
  static Stored store(float x) { return static_cast<Stored>(bfloat16_bits(x) >> 16); }
  static float rounded(float x) { return float_of(bfloat16_bits(x)); }
};

// y_j = x_j·cos_j + x_partner(j)·sin_j for `period` columns, every operation rounded
#define CLOVEN_ROTATED(T)                                                                                                                     \
  for (i64 j = 0; j < period; ++j) y[j] = T::rounded(T::rounded(x[j] * cos[j]) + T::rounded(x[partner[j]] * sin[j]));

CLOVEN_CLONES void rotated(Float32, const float* x, const std::int32_t* partner, const float* cos, const float* sin, float* y, i64 period) {
  CLOVEN_ROTATED(Float32)
}

CLOVEN_CLONES void rotated(BFloat16, const float* x, const std::int32_t* partner, const float* cos, const float* sin, float* y, i64 period) {
  CLOVEN_ROTATED(BFloat16)
}

CLOVEN_CLONES void loaded(const std::uint16_t* x, float* y, i64 n) {
  for (i64 j = 0; j < n; ++j) y[j] = BFloat16::load(x[j]);
}

CLOVEN_CLONES void stored(const float* x, std::uint16_t* y, i64 n) {
  for (i64 j = 0; j < n; ++j) y[j] = BFloat16::store(x[j]);
}

void loaded(const float* x, float* y, i64 n) { std::memcpy(y, x, sizeof(float) * n); }
void stored(const float* x, float* y, i64 n) { std::memcpy(y, x, sizeof(float) * n); }

CLOVEN_CLONES void gathered(const float* x, const std::int32_t* index, float* y, i64 n) {
  for (i64 j = 0; j < n; ++j) y[j] = x[index[j]];
}

// y [width] = x [n] M, with M's rows `stride` apart
CLOVEN_CLONES void times(const float* x, i64 n, const float* m, i64 stride, float* y, i64 width) {
  for (i64 j = 0; j < width; ++j) y[j] = 0;
  for (i64 i = 0; i < n; ++i)
    for (i64 j = 0; j < width; ++j) y[j] += x[i] * m[i * stride + j];
}

// y [width] = M x [n], with M's rows `stride` apart
CLOVEN_CLONES void times_transposed(const float* x, i64 n, const float* m, i64 stride, float* y, i64 width) {
  constexpr i64 kLanes = 16;
  for (i64 j = 0; j < width; ++j) {
    const float* row = m + j * stride;
    float sums[kLanes] = {};
    i64 i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (i64 lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane] * row[i + lane];
    float sum = 0;
    for (; i < n; ++i) sum += x[i] * row[i];
    for (const float part : sums) sum += part;
    y[j] = sum;
  }
}

template <class T>
class Pass {
 public:
  explicit Pass(const Step& step) : step_(step) {}

  i64 width_in(const Layer& at, bool key) const {
    const i64 q = at.heads, kv = at.kv_heads, size = at.head_dim + at.noise;
    return key ? (q + kv + (at.noise ? kv : 0)) * at.head_dim : q * size;
  }

  i64 width_out(const Layer& at, bool key) const {
    const i64 q = at.heads, kv = at.kv_heads, size = at.head_dim + at.noise;
    return key ? (q + kv + (at.noise ? kv : 0)) * size : q * at.head_dim;
  }

  void run(const Layer& at, bool key, const void* in, void* out) {
    const auto* x = static_cast<const Stored*>(in);
    auto* y = static_cast<Stored*>(out);
    const i64 from = width_in(at, key), to = width_out(at, key);
    for (i64 row = 0; row < step_.batch * step_.rows; ++row) {
      x_.resize(from);
      loaded(x + row * from, x_.data(), from);
      y_.resize(to);
      if (key)
        keyed(at, row);
      else
        restored(at, row);
      stored(y_.data(), y + row * to, to);
    }
  }

 private:
  using Stored = typename T::Stored;

  void keyed(const Layer& at, i64 row) {
    const i64 d = at.head_dim, heads = at.heads + at.kv_heads, width = heads * d;
    if (at.norms != nullptr)
      for (i64 h = 0; h < heads; ++h) {
        float* x = x_.data() + h * d;
        float sum = 0;
        for (i64 j = 0; j < d; ++j) sum += x[j] * x[j];
        const float scale = 1 / std::sqrt(sum / static_cast<float>(d) + static_cast<float>(at.epsilon));
        for (i64 j = 0; j < d; ++j) x[j] = T::rounded(at.norms[h * d + j] * T::rounded(x[j] * scale));
      }
    if (at.period != 0) {
      const float *cos = step_.cos + row * step_.cos_width, *sin = step_.sin + row * step_.sin_width;
      for (auto* part : {&rotated_, &cos_, &sin_}) part->resize(width);
      gathered(cos, at.cosine, cos_.data(), at.period);
      gathered(sin, at.sine, sin_.data(), at.period);
      for (i64 base = 0; base < width; base += at.period)
        rotated(T{}, x_.data() + base, at.partner, cos_.data(), sin_.data(), rotated_.data() + base, at.period);
      std::copy(rotated_.begin(), rotated_.begin() + width, x_.begin());
    }
    if (at.noise == 0) {
      std::copy(x_.begin(), x_.begin() + width, y_.begin());
      return;
    }
    const i64 size = d + at.noise, g = at.kv_heads, per = at.heads / g, sequence = row / step_.rows, place = row % step_.rows;
    const float* kv = at.kv + sequence * 2 * g * size * size;
    const float* inverse = at.inverse + sequence * 2 * g * size * size;
    float* out = y_.data();
    for (i64 h = 0; h < at.heads; ++h, out += size) times_transposed(x_.data() + h * d, d, inverse + (h / per) * size * size, size, out, size);
    with_noise_.resize(size);
    for (i64 part = 0; part < 2; ++part)
      for (i64 head = 0; head < g; ++head, out += size) {
        const float* x = x_.data() + (at.heads + part * g + head) * d;
        float sum = 0;
        for (i64 j = 0; j < d; ++j) sum += x[j] * x[j];
        const float level = std::sqrt(sum / static_cast<float>(d));
        const float* random = at.random + (((sequence * 2 + part) * g + head) * step_.rows + place) * at.noise;
        for (i64 j = 0; j < d; ++j) with_noise_[j] = x[j];
        for (i64 j = 0; j < at.noise; ++j) with_noise_[d + j] = random[j] * level;
        times(with_noise_.data(), size, kv + (part * g + head) * size * size, size, out, size);
      }
  }

  void restored(const Layer& at, i64 row) {
    const i64 d = at.head_dim, size = d + at.noise, g = at.kv_heads, per = at.heads / g;
    if (at.restore != nullptr) {
      gathered(x_.data(), at.restore, y_.data(), at.heads * d);
      return;
    }
    const float* inverse = at.inverse + ((row / step_.rows) * 2 + 1) * g * size * size;
    for (i64 h = 0; h < at.heads; ++h) times(x_.data() + h * size, size, inverse + (h / per) * size * size, size, y_.data() + h * d, d);
  }

  const Step& step_;
  std::vector<float> x_, y_, rotated_, cos_, sin_, with_noise_;
};

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
int serve(const Step& step, void* base, State* state, i64 nanoseconds) {
  Pass<T> pass(step);
  Side *own = cloven::side_of(base, 1), *other = cloven::side_of(base, 0);
  std::vector<unsigned char> in;
  const Layer* at = nullptr;
  bool key = false;
  while (call_at(step, state->call, &at, &key)) {
    if (state->due != 0) cloven::ring(&own->number, state->seen);
    state->due = 0;
    if (!cloven::wait(&other->number, state->seen, nanoseconds)) return kNotYet;
    const std::uint32_t number = other->number.load(), header = other->header, payload = other->payload;
    const std::size_t size = sizeof(typename T::Stored) * step.batch * step.rows;
    const std::size_t bytes = size * pass.width_in(*at, key), answer = size * pass.width_out(*at, key);
    if (__atomic_load_n(&state->cancelled, __ATOMIC_ACQUIRE) != 0) return kSomethingElse;
    if (header != cloven::kRaw || payload != bytes + 1 || bytes > cloven::kCapacity || answer > cloven::kCapacity) return kSomethingElse;
    unsigned char* box = cloven::payload_of(base, 0);
    in.assign(box, box + bytes);
    std::memset(box, 0, bytes);
    pass.run(*at, key, in.data(), cloven::payload_of(base, 1));
    own->header = cloven::kRaw;
    own->payload = static_cast<std::uint32_t>(answer) + 1;
    state->seen = number;
    state->due = 1;
    ++state->call;
  }
  if (state->due != 0) cloven::ring(&own->number, state->seen);
  state->due = 0;
  return kDone;
}

}  // namespace

CLOVEN_API int cloven_step_interface() { return 2; }

CLOVEN_API int cloven_step_serve(const Step* step, void* base, State* state, std::int64_t nanoseconds) {
  return step->bfloat16 ? serve<BFloat16>(*step, base, state, nanoseconds) : serve<Float32>(*step, base, state, nanoseconds);
}

// One call by itself, for tests: layer `layer` of the step.
CLOVEN_API void cloven_step_compute(const Step* step, std::int64_t layer, int key, const void* in, void* out) {
  if (step->bfloat16)
    Pass<BFloat16>(*step).run(step->layer[layer], key != 0, in, out);
  else
    Pass<Float32>(*step).run(step->layer[layer], key != 0, in, out);
}
