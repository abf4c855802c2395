// The kernels against slow products and single steps, for the sanitizers: every kernel, sizes around the vector widths, several threads, extremes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "exchange.cpp"

extern "C" int cloven_kernel();
extern "C" int cloven_runs(int);
extern "C" int cloven_product(const std::int32_t*, std::int64_t, std::int64_t, const std::int8_t*, std::int64_t, std::int64_t,
                              std::int32_t*, int, int);
extern "C" int cloven_hadamard(double*, std::int64_t, std::int64_t, std::int64_t, double, int);
extern "C" int cloven_turn(const double*, std::int64_t, std::int64_t, std::int64_t, double, std::int64_t, const std::int32_t*,
                           const float*, int, const float*, void*, int, int);
extern "C" int cloven_add(const std::int32_t*, const std::int32_t*, std::int64_t, std::int64_t, int, std::int32_t*, int);
extern "C" int cloven_encode(const double*, std::int64_t, std::int64_t, double, std::int32_t*, double*, std::int32_t*, int);
extern "C" int cloven_decode(const std::int32_t*, std::int64_t, std::int64_t, double*, double*, int);
extern "C" int cloven_check(std::int32_t*, const std::int32_t*, const std::int32_t*, std::int64_t, std::int64_t, std::int64_t,
                            std::int32_t*, int);

extern "C" int cloven_query(const double*, std::int64_t, std::int64_t, std::int64_t, double, const std::int32_t*, std::int32_t*, double*, int);
extern "C" int cloven_answer(const void*, int, const std::int32_t*, std::int64_t, std::int64_t, double*, double*, int);

struct Factors {
  const float *a, *b;
  const void* bias;
  std::int64_t rows, rank, bias_kind;
};
extern "C" int cloven_low_rank(const Factors*, std::int64_t, const void*, int, std::int64_t, float*);

namespace {

constexpr std::int64_t kP = (std::int64_t{1} << 31) - 1, kH = (kP - 1) / 2;

int wrong(std::int64_t m, std::int64_t k, std::int64_t n, int threads, int kernel, unsigned seed) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<std::int64_t> residue(-kH, kH), code(-128, 127);
  std::vector<std::int32_t> c(m * k), z(m * n);
  std::vector<std::int8_t> w(n * k);  // exactly as large as it must be: a byte too far is an error
  for (auto& x : c) x = static_cast<std::int32_t>(seed % 3 == 0 ? (seed % 2 ? kH : -1) : residue(random));
  for (auto& x : w) x = static_cast<std::int8_t>(seed % 3 == 0 ? (seed % 2 ? 127 : -128) : code(random));
  if (cloven_product(c.data(), m, k, w.data(), n, k, z.data(), threads, kernel)) return 1;
  int bad = 0;
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      std::int64_t sum = 0;
      for (std::int64_t l = 0; l < k; ++l) sum = (sum + std::int64_t{c[i * k + l]} * w[j * k + l]) % kP;
      sum = sum > kH ? sum - kP : sum < -kH ? sum + kP : sum;
      bad += sum != z[i * n + j];
    }
  return bad;
}

// Stages against single transforms, and transforms against themselves undone.
int wrong_turn(std::int64_t m, std::int64_t n, std::int64_t stages, bool leading, unsigned seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> x(m * n), out(m * n), row(n), next(n);
  std::vector<std::int32_t> gather(stages * n);
  std::vector<float> units(stages * n);
  for (auto& value : x) value = normal(random);
  for (auto& value : units) value = static_cast<float>(normal(random));
  for (auto& place : gather) place = static_cast<std::int32_t>(random() % n);
  std::int64_t block = 1;
  while (2 * block <= n && block < 256) block *= 2;
  const double scale = 1 / std::sqrt(static_cast<double>(block));
  if (cloven_turn(x.data(), m, n, block, scale, stages, gather.data(), units.data(), leading, nullptr, out.data(), 0, 2)) return 1;
  int bad = 0;
  for (std::int64_t i = 0; i < m; ++i) {
    row.assign(x.begin() + i * n, x.begin() + (i + 1) * n);
    for (std::int64_t stage = 0; stage < stages; ++stage) {
      if (stage > 0 || leading) bad += cloven_hadamard(row.data(), 1, n, block, scale, 0);
      for (std::int64_t j = 0; j < n; ++j) next[j] = row[gather[stage * n + j]] * static_cast<double>(units[stage * n + j]);
      row = next;
    }
    for (std::int64_t j = 0; j < n; ++j) bad += row[j] != out[i * n + j];
  }
  std::vector<float> total(m * n), sum(m * n);
  for (auto& value : total) value = static_cast<float>(normal(random));
  bad += cloven_turn(x.data(), m, n, block, scale, stages, gather.data(), units.data(), leading, total.data(), sum.data(), 1, 2);
  for (std::int64_t i = 0; i < m * n; ++i) bad += sum[i] != static_cast<float>(out[i] + static_cast<double>(total[i]));
  out = x;
  bad += cloven_hadamard(out.data(), m, n, block, scale, 0) + cloven_hadamard(out.data(), m, n, block, scale, 1);
  for (std::int64_t i = 0; i < m * n; ++i) bad += std::abs(out[i] - x[i]) > 1e-12 * (1 + std::abs(x[i]));
  gather[0] = static_cast<std::int32_t>(n);
  bad += cloven_turn(x.data(), m, n, block, scale, stages, gather.data(), units.data(), leading, nullptr, out.data(), 0, 2) != 1;
  return bad;
}

// Rows on their way out and back: sums against 64 bits, codes within a half, the check against slow sums.
int wrong_rows(std::int64_t m, std::int64_t n, std::int64_t k, unsigned seed) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<std::int64_t> residue(-kH, kH);
  std::normal_distribution<double> normal;
  std::vector<std::int32_t> z(m * n), c(m * k), sum(m * n), code(m * n), test(2 * (n + k)), found(m), over(m);
  std::vector<double> x(m * n), alpha(m), back(m * n);
  for (auto* values : {&z, &c, &test})
    for (auto& value : *values) value = static_cast<std::int32_t>(seed % 3 ? residue(random) : seed % 2 ? kH : -kH);
  for (auto& value : x) value = normal(random);
  int bad = cloven_add(z.data(), z.data(), m, n, 1, sum.data(), 2) + cloven_add(sum.data(), z.data(), m, n, -1, sum.data(), 2);
  for (std::int64_t i = 0; i < m * n; ++i) bad += sum[i] != z[i];
  bad += cloven_encode(x.data(), m, n, 1e8, code.data(), alpha.data(), over.data(), 2);
  bad += cloven_decode(code.data(), m, n, alpha.data(), back.data(), 2);
  for (std::int64_t i = 0; i < m * n; ++i) bad += over[i / n] || std::abs(back[i] - x[i]) * alpha[i / n] > 0.500001;
  bad += cloven_check(test.data(), z.data(), c.data(), m, n, k, found.data(), 2);
  for (std::int64_t row = 0; row < m; ++row) {
    bool expected = false;
    for (int t = 0; t < 2; ++t) {
      const std::int32_t* line = test.data() + t * (n + k);
      std::int64_t total = 0;
      for (std::int64_t i = 0; i < n; ++i) total = (total + std::int64_t{line[i]} * z[row * n + i] % kP) % kP;
      for (std::int64_t i = 0; i < k; ++i) total = (total + std::int64_t{line[n + i]} * c[row * k + i] % kP) % kP;
      expected |= total != 0;
    }
    bad += found[row] != expected;
  }
  return bad;
}

}  // namespace

// The two fused calls on stages that change nothing, with a test that everything passes, and one that nothing does.
int wrong_exchange(std::int64_t m, std::int64_t k, std::int64_t n, int kind, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> columns(k), rows(n), mask(m * k), c(m * k), z(m * n), image(m * n), test(2 * (n + k), 0);
  for (std::int64_t i = 0; i < k; ++i) columns[i] = static_cast<std::int32_t>(i);
  for (std::int64_t i = 0; i < n; ++i) rows[i] = static_cast<std::int32_t>(i);
  for (auto& value : mask) value = static_cast<std::int32_t>(random() % 1000) - 500;
  for (auto& value : image) value = static_cast<std::int32_t>(random() % 1000) - 500;
  const std::vector<float> ones(k > n ? k : n, 1.0f), total(m * n, 0.5f);
  std::vector<double> alpha(m);
  const Exchange exchange{{k, 1, 1, 1.0, columns.data(), ones.data()}, {n, 1, 1, 1.0, rows.data(), ones.data()}};
  std::vector<float> x(m * k, 1.0f), out(m * n, 7.0f);
  std::vector<std::uint16_t> half(m * k, 0x3f80);
  const void* from = kind == 1 ? static_cast<const void*>(x.data()) : half.data();
  if (cloven_ask(&exchange, from, kind, m, 1e6, mask.data(), c.data(), alpha.data(), 2) != 0) return 1;
  int bad = 0;
  for (std::int64_t i = 0; i < m * k; ++i) bad += c[i] != mask[i] + static_cast<std::int32_t>(std::rint(alpha[i / k]));
  for (std::int64_t i = 0; i < m * n; ++i) z[i] = image[i] + static_cast<std::int32_t>(i % 100);
  const auto told = [&] {
    return cloven_told(&exchange, test.data(), z.data(), c.data(), image.data(), m, alpha.data(), total.data(), out.data(), 1, 2);
  };
  if (told() != 0) return bad + 1;
  for (std::int64_t i = 0; i < m * n; ++i) bad += out[i] != static_cast<float>((i % 100) / alpha[i / n] + 0.5);
  test[n] = 1;  // c[0] of a row is not zero
  for (std::int64_t row = 0; row < m; ++row) c[row * k] = 1;
  std::fill(out.begin(), out.end(), 7.0f);
  bad += told() != m + 1;
  for (const float value : out) bad += value != 7.0f;
  x[0] = INFINITY;
  bad += cloven_ask(&exchange, x.data(), 1, m, 1e6, mask.data(), c.data(), alpha.data(), 2) != 2;
  columns[0] = static_cast<std::int32_t>(k);  // no such place
  bad += cloven_ask(&exchange, x.data(), 1, m, 1e6, mask.data(), c.data(), alpha.data(), 2) != 1;
  return bad;
}

// A query of ones, whose last row is zero; and an answer whose middles are known.
int wrong_query(std::int64_t m, std::int64_t k, std::int64_t pad, int bits) {
  std::vector<double> x(m * k, 1.0), alpha(m), y(m * k);
  std::fill(x.begin() + (m - 1) * k, x.end(), 0.0);
  std::vector<std::int32_t> mask(m * (pad + k), static_cast<std::int32_t>(kH)), c(m * (pad + k)), image(m * k, 1);
  if (cloven_query(x.data(), m, k, pad, 1e6, mask.data(), c.data(), alpha.data(), 2) != 0) return 1;
  int bad = !std::isinf(alpha[m - 1]);
  for (std::int64_t i = 0; i < m * (pad + k); ++i) {
    const bool zero = i % (pad + k) < pad || i / (pad + k) == m - 1;
    const std::int64_t sum = kH + (zero ? 0 : std::lrint(alpha[i / (pad + k)]));
    bad += c[i] != (sum > kH ? sum - kP : sum);
  }
  const std::int32_t half = 1 << (bits - 1), number = half - 1;
  std::vector<std::int8_t> small(m * k, static_cast<std::int8_t>(number));
  std::vector<std::int16_t> large(m * k, static_cast<std::int16_t>(number));
  const void* q = bits == 8 ? static_cast<const void*>(small.data()) : large.data();
  std::fill(alpha.begin(), alpha.end(), 2.0);
  if (cloven_answer(q, bits, image.data(), m, k, alpha.data(), y.data(), 2) != 0) return bad + 1;
  const std::int64_t middle = std::int64_t{number} * (1 << (31 - bits)) + (1 << (30 - bits));
  for (const double value : y) bad += value != static_cast<double>((middle > kH ? kH : middle) - 1) / 2;
  if (bits > 8 && bits < 16) {
    large.back() = static_cast<std::int16_t>(half);
    bad += cloven_answer(large.data(), bits, image.data(), m, k, alpha.data(), y.data(), 2) != 2;
  }
  x[0] = NAN;
  bad += cloven_query(x.data(), m, k, pad, 1e6, mask.data(), c.data(), alpha.data(), 2) != 2;
  return bad + (cloven_query(x.data(), 0, k, pad, 1e6, nullptr, nullptr, nullptr, 2) != 1) +
         (cloven_answer(q, 17, image.data(), m, k, alpha.data(), y.data(), 2) != 1);
}

// Two linears, one with a bias: A and B of ones on a row of ones.
int wrong_low_rank(std::int64_t n, std::int64_t k, std::int64_t rank) {
  std::vector<float> x(k, 1.0f), a(rank * k, 1.0f), b(n * rank, 1.0f), bias(n, 0.5f), y(2 * n);
  const Factors members[] = {{a.data(), b.data(), nullptr, n, rank, 0}, {a.data(), b.data(), bias.data(), n, rank, 1}};
  if (cloven_low_rank(members, 2, x.data(), 1, k, y.data()) != 0) return 1;
  int bad = 0;
  for (std::int64_t i = 0; i < 2 * n; ++i) bad += y[i] != static_cast<float>(rank * k) + (i < n ? 0.0f : 0.5f);
  return bad + (cloven_low_rank(members, 2, x.data(), 3, k, y.data()) != 1);
}

int main() {
  int bad = 0, done = 0;
  if (cloven_low_rank(nullptr, 0, nullptr, 1, 0, nullptr) == 0)
    for (std::int64_t n : {1, 3, 4, 9})
      for (std::int64_t k : {1, 15, 16, 127, 128, 300})
        for (std::int64_t rank : {0, 1, 16, 17}) bad += wrong_low_rank(n, k, rank), ++done;
  for (std::int64_t k : {1, 7, 64, 700})
    for (std::int64_t m : {1, 2, 90})
      for (int bits : {8, 9, 15, 16}) bad += wrong_query(m, k, k % 5, bits), ++done;
  for (std::int64_t k : {1, 7, 64, 700})
    for (std::int64_t n : {1, 9, 300})
      for (std::int64_t m : {1, 5, 90})
        for (int kind : {1, 2}) bad += wrong_exchange(m, k, n, kind, static_cast<unsigned>(k + n + m)), ++done;
  unsigned seed = 0;
  for (int kernel = 0; kernel <= cloven_kernel(); ++kernel) {
    if (!cloven_runs(kernel)) continue;
    for (std::int64_t k : {1, 2, 63, 64, 65, 200})
      for (std::int64_t n : {1, 3, 4, 5, 9})
        for (std::int64_t m : {1, 2, 16}) bad += wrong(m, k, n, 2, kernel, ++seed), ++done;
    bad += wrong(37, 200, 70, 2, kernel, ++seed) + wrong(140, 1100, 33, 2, kernel, ++seed), done += 2;
    bad += wrong(1, 4096, 200, 3, kernel, ++seed), ++done;  // several chunks
    bad += wrong(1, 65536, 5, 2, kernel, seed += 3 - seed % 3), ++done;
  }
  for (std::int64_t n : {1, 2, 3, 7, 8, 9, 255, 256, 257, 700})
    for (std::int64_t m : {0, 1, 3, 40})
      for (bool leading : {false, true}) bad += wrong_turn(m, n, 1 + (n + m) % 3, leading, ++seed), ++done;
  for (std::int64_t n : {1, 7, 8, 9, 33, 1000})
    for (std::int64_t m : {1, 3, 90}) bad += wrong_rows(m, n, 5 + n / 2, ++seed), ++done;
  std::vector<int> results(4);
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([i, &results] {
      for (unsigned round = 0; round < 10; ++round) results[i] += wrong(1, 512, 600, 3, cloven_kernel(), 100 + 10 * i + round);
    });
  for (auto& caller : callers) caller.join();
  for (int result : results) bad += result, ++done;
  if (bad) return std::fprintf(stderr, "%d wrong entries\n", bad), 1;
  std::printf("ok, %d products\n", done);
  std::fflush(stdout);
  std::_Exit(0);  // the pool's threads never end
}
