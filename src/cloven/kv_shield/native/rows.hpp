// The enclave's arithmetic on the rows of one call, a block of rows at a time.
//
//  key      x = q ‖ k (‖ v) [B·S, W]: RMS norms of the heads of q and k, rotation; in session mode q' = [q, 0] F⁻ᵀ, k' = [k, ν] F, v' = [v, ν] F_v
//  restore  a' [B·S, H·(d + ρ)]: the inverse permutation, or (a' F_v⁻¹)[: d] per head
//
// Arithmetic is PyTorch's, operation by operation, in the vectors' type, but for the order of sums.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../../field/native/pool.hpp"
#include "products.hpp"

namespace cloven {

extern "C" {

struct Layer {
  i64 heads, kv_heads, head_dim, noise;  // H, G, d, ρ
  i64 keyed;                             // whether the layer has a keying call
  i64 period;                            // columns of q ‖ k after which the indices below repeat; 0: no rotation
  const std::int32_t *partner, *cosine, *sine;
  const float* norms;  // [H + G, d], rounded to the vectors' type; null: none
  double epsilon;
  const std::int32_t* restore;   // [H·d]; null in session mode
  const float *kv, *inverse;     // F and F_v, F⁻ᵀ and F_v⁻¹ [B, 2, G, D, D]; null in permute mode
  const float* random;           // [B, 2, G, S, ρ]
};

struct Step {
  i64 bfloat16;  // else float32
  i64 batch, rows, layers;
  const float *cos, *sin;  // [B·S, cos_width], [B·S, sin_width], rounded to the vectors' type
  i64 cos_width, sin_width;
  const Layer* layer;
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

CLOVEN_CLONES void rotated(Float32, const float* x, const std::int32_t* partner, const float* cos, const float* sin, float* __restrict y,
                           i64 period) {
  CLOVEN_ROTATED(Float32)
}

CLOVEN_CLONES void rotated(BFloat16, const float* x, const std::int32_t* partner, const float* cos, const float* sin, float* __restrict y,
                           i64 period) {
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


constexpr i64 kBlock = 16;   // rows that pass through the caches together
constexpr i64 kSpread = 16;  // floats between rows, so that they do not share a cache set

struct Scratch {
  std::vector<float> x, y, rotated, cos, sin, with_noise;
};

// One call: `run` writes the answer to all of its rows. `run_and_wipe` also overwrites them with zeros, each when it has been read: once.
template <class T>
class Rows {
 public:
  Rows(const Step& step, const Layer& at, bool key) : step_(step), at_(at), key_(key) {}

  i64 width_in() const { return key_ ? (at_.heads + at_.kv_heads + (at_.noise ? at_.kv_heads : 0)) * at_.head_dim : at_.heads * size(); }

  i64 width_out() const { return key_ ? (at_.heads + at_.kv_heads + (at_.noise ? at_.kv_heads : 0)) * size() : at_.heads * at_.head_dim; }

  void run(const void* in, void* out, Pool* pool, int threads) const {
    run(Job{this, static_cast<const Stored*>(in), nullptr, static_cast<Stored*>(out)}, pool, threads);
  }

  void run_and_wipe(void* in, void* out, Pool* pool, int threads) const {
    run(Job{this, static_cast<const Stored*>(in), static_cast<Stored*>(in), static_cast<Stored*>(out)}, pool, threads);
  }

 private:
  using Stored = typename T::Stored;

  struct Job {
    const Rows* rows;
    const Stored* in;
    Stored* wiped;  // null: nothing is
    Stored* out;
  };

  void run(const Job& job, Pool* pool, int threads) const {
    const auto work = [](const void* given, i64 block) {
      const Job& job = *static_cast<const Job*>(given);
      job.rows->run_block(block, job);
    };
    pool->run(work, &job, step_.batch * blocks(), threads);
  }

  i64 size() const { return at_.head_dim + at_.noise; }
  i64 blocks() const { return (step_.rows + kBlock - 1) / kBlock; }  // of one sequence

  void run_block(i64 block, const Job& job) const {
    thread_local Scratch scratch;
    const i64 sequence = block / blocks(), first = block % blocks() * kBlock, rows = std::min(kBlock, step_.rows - first);
    const i64 from = width_in(), to = width_out(), row = sequence * step_.rows + first;
    scratch.x.resize(rows * (from + kSpread));
    scratch.y.resize(rows * (to + kSpread));
    for (i64 r = 0; r < rows; ++r) loaded(job.in + (row + r) * from, scratch.x.data() + r * (from + kSpread), from);
    if (job.wiped != nullptr) std::memset(job.wiped + row * from, 0, sizeof(Stored) * rows * from);
    if (key_)
      keyed(sequence, first, rows, scratch);
    else
      restored(sequence, rows, scratch);
    for (i64 r = 0; r < rows; ++r) stored(scratch.y.data() + r * (to + kSpread), job.out + (row + r) * to, to);
  }

  void keyed(i64 sequence, i64 first, i64 rows, Scratch& scratch) const {
    const i64 d = at_.head_dim, per = at_.heads / at_.kv_heads, from = width_in() + kSpread, to = width_out() + kSpread;
    const i64 qk = (at_.heads + at_.kv_heads) * d;
    for (i64 r = 0; r < rows; ++r) {
      float* x = scratch.x.data() + r * from;
      if (at_.norms != nullptr) normed(x);
      if (at_.period != 0) rotated_row(x, sequence * step_.rows + first + r, qk, scratch);
      if (at_.noise == 0) std::copy(x, x + qk, scratch.y.data() + r * to);
    }
    if (at_.noise == 0) return;
    const i64 square = size() * size();
    const float* kv = at_.kv + sequence * 2 * at_.kv_heads * square;
    const float* inverse = at_.inverse + sequence * 2 * at_.kv_heads * square;
    const float* x = scratch.x.data();
    float* y = scratch.y.data();
    for (i64 h = 0; h < at_.heads; ++h, x += d, y += size())  // [q, 0] F⁻ᵀ needs the first d rows
      product(x, from, rows, d, inverse + h / per * square, size(), y, to, size());
    scratch.with_noise.resize(rows * size());
    for (i64 part = 0; part < 2; ++part)
      for (i64 head = 0; head < at_.kv_heads; ++head, x += d, y += size()) {
        const i64 of = part * at_.kv_heads + head;
        const float* random = at_.random + ((sequence * 2 * at_.kv_heads + of) * step_.rows + first) * at_.noise;
        for (i64 r = 0; r < rows; ++r) noisy(x + r * from, random + r * at_.noise, scratch.with_noise.data() + r * size());
        product(scratch.with_noise.data(), size(), rows, size(), kv + of * square, size(), y, to, size());
      }
  }

  void normed(float* x) const {
    const i64 d = at_.head_dim;
    for (i64 h = 0; h < at_.heads + at_.kv_heads; ++h, x += d) {
      float sum = 0;
      for (i64 j = 0; j < d; ++j) sum += x[j] * x[j];
      const float scale = 1 / std::sqrt(sum / static_cast<float>(d) + static_cast<float>(at_.epsilon));
      for (i64 j = 0; j < d; ++j) x[j] = T::rounded(at_.norms[h * d + j] * T::rounded(x[j] * scale));
    }
  }

  void rotated_row(float* x, i64 row, i64 width, Scratch& scratch) const {
    for (auto* part : {&scratch.rotated, &scratch.cos, &scratch.sin}) part->resize(at_.period);
    gathered(step_.cos + row * step_.cos_width, at_.cosine, scratch.cos.data(), at_.period);
    gathered(step_.sin + row * step_.sin_width, at_.sine, scratch.sin.data(), at_.period);
    for (float* head = x; head < x + width; head += at_.period) {
      rotated(T{}, head, at_.partner, scratch.cos.data(), scratch.sin.data(), scratch.rotated.data(), at_.period);
      std::copy(scratch.rotated.begin(), scratch.rotated.begin() + at_.period, head);
    }
  }

  // [x, ν], ν of the level of x
  void noisy(const float* x, const float* random, float* out) const {
    const i64 d = at_.head_dim;
    float sum = 0;
    for (i64 j = 0; j < d; ++j) sum += x[j] * x[j];
    const float level = std::sqrt(sum / static_cast<float>(d));
    std::copy(x, x + d, out);
    for (i64 j = 0; j < at_.noise; ++j) out[d + j] = random[j] * level;
  }

  void restored(i64 sequence, i64 rows, Scratch& scratch) const {
    const i64 d = at_.head_dim, per = at_.heads / at_.kv_heads, from = width_in() + kSpread, to = width_out() + kSpread;
    const float* x = scratch.x.data();
    float* y = scratch.y.data();
    if (at_.restore != nullptr) {
      for (i64 r = 0; r < rows; ++r) gathered(x + r * from, at_.restore, y + r * to, at_.heads * d);
      return;
    }
    const float* inverse = at_.inverse + (sequence * 2 + 1) * at_.kv_heads * size() * size();
    for (i64 h = 0; h < at_.heads; ++h) product(x + h * size(), from, rows, size(), inverse + h / per * size() * size(), size(), y + h * d, to, d);
  }

  const Step& step_;
  const Layer& at_;
  const bool key_;
};

}  // namespace cloven
