// The worker's loop against a client in another thread: right requests, and every kind of wrong one.

#include "serve.cpp"

#include <cstdio>
#include <cstdlib>
#include <thread>

namespace {

constexpr int kK = 5, kN = 3;
std::int8_t weights[kN * kK];

int product(const std::int32_t* c, i64 m, i64 k, const std::int8_t* w, i64 n, i64 stride, std::int32_t* z, int, int) {
  for (i64 i = 0; i < m; ++i)
    for (i64 j = 0; j < n; ++j) {
      std::int32_t sum = 0;
      for (i64 l = 0; l < k; ++l) sum += c[i * k + l] * w[j * stride + l];
      z[i * n + j] = sum;
    }
  return 0;
}

void* memory() {
  const std::size_t size = cloven::kFirst + 2 * (cloven::kHeaderBytes + cloven::kCapacity);
  void* base = std::aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  std::memset(base, 0, size);
  return base;
}

void request(void* base, std::uint32_t number, std::uint32_t group, std::uint32_t rows, const std::int32_t* c, std::uint32_t bytes,
             std::uint32_t header = cloven::kRaw) {
  Side* own = cloven::side_of(base, 0);
  const std::uint32_t asked[2] = {group, rows};
  std::memcpy(cloven::payload_of(base, 0), asked, sizeof asked);
  std::memcpy(cloven::payload_of(base, 0) + sizeof asked, c, bytes);
  own->header = header;
  own->payload = bytes + sizeof asked + 1;
  cloven::ring(&own->number, number);
}

void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

}  // namespace

int main() {
  for (int i = 0; i < kN * kK; ++i) weights[i] = static_cast<std::int8_t>(i - 7);
  const Matrix matrices[2] = {{weights, kN, kK, kK}, {nullptr, 0, 0, 0}};
  const Serving serving{matrices, 2, product, 0, nullptr, 0};
  int checked = 0;
  {  // many right ones, then silence
    void* base = memory();
    State state{};
    int ended = -1;
    std::thread server([&] { ended = cloven_serve(&serving, base, &state, 300'000'000, 1); });
    for (std::uint32_t number = 1; number <= 200; ++number) {
      std::int32_t c[2 * kK], z[2 * kN];
      const std::uint32_t rows = 1 + number % 2;
      for (int i = 0; i < 2 * kK; ++i) c[i] = static_cast<std::int32_t>(number) * (i + 1) - 40;
      request(base, number, 0, rows, c, rows * kK * 4);
      Side* other = cloven::side_of(base, 1);
      while (!cloven::wait(&other->number, number - 1, 1'000'000'000)) {
      }
      expect(other->payload == rows * kN * 4 + 1, "an answer of another size");
      product(c, rows, kK, weights, kN, kK, z, 1, 0);
      expect(std::memcmp(z, cloven::payload_of(base, 1), rows * kN * 4) == 0, "a wrong answer");
      ++checked;
    }
    server.join();
    expect(ended == kNotYet && state.answered == 200 && state.rows == 300, "it did not end by silence");
    expect(state.bytes_in == 200 * 8 + 300 * kK * 4 && state.bytes_out == 300 * kN * 4 && state.nanoseconds > 0, "it counted wrongly");
    std::free(base);
  }
  const std::int32_t c[2 * kK] = {};
  const struct { std::uint32_t group, rows, bytes, header; } wrong[] = {
      {1, 1, kK * 4, cloven::kRaw},  {2, 1, kK * 4, cloven::kRaw},      {0xffffffff, 1, kK * 4, cloven::kRaw}, {0, 0, 0, cloven::kRaw},
      {0, 2, kK * 4, cloven::kRaw},  {0, 1, kK * 4 - 1, cloven::kRaw},  {0, 0xffffffff, kK * 4, cloven::kRaw}, {0, 1, kK * 4, 60},
      {0, 1u << 22, 4, cloven::kRaw}, {0, 1, 2 * kK * 4, cloven::kRaw},
  };
  for (const auto& one : wrong) {
    void* base = memory();
    State state{};
    request(base, 1, one.group, one.rows, c, one.bytes, one.header);
    expect(cloven_serve(&serving, base, &state, 1'000'000, 1) == kSomethingElse, "something else was answered");
    expect(state.answered == 0 && state.bytes_in == 0 && state.nanoseconds == 0 && state.seen == 0, "something else was counted");
    ++checked;
    std::free(base);
  }
  {  // lengths beyond the box
    void* base = memory();
    State state{};
    request(base, 1, 0, 1, c, kK * 4);
    for (const std::uint32_t payload : {0u, 1u, 8u, 0xffffffffu, static_cast<std::uint32_t>(cloven::kCapacity) + 2}) {
      cloven::side_of(base, 0)->payload = payload;
      expect(cloven_serve(&serving, base, &state, 1'000'000, 1) == kSomethingElse, "an impossible length");
      ++checked;
    }
    std::free(base);
  }
  for (const int bits : {8, 11, 16}) {  // metered: no more rows than there is credit for, which another thread adds and takes back
    void* base = memory();
    State state{};
    i64 credit[2] = {0, 0};
    const Serving metered{matrices, 2, product, 0, credit, bits};
    std::atomic<bool> over{false};
    i64 granted = 0, taken_back = 0;
    std::thread meddler([&] {
      while (!over.load()) {
        cloven_credit_add(credit, 3);
        granted += 3;
        std::this_thread::yield();
        taken_back += cloven_credit_take(credit);
      }
    });
    std::thread server([&] {
      while (!over.load())
        if (cloven_serve(&metered, base, &state, 1'000'000, 1) == kNoCredit) expect(state.group == 0 && state.asked == 2, "another request");
    });
    for (std::uint32_t number = 1; number <= 100; ++number) {
      std::int32_t rows[2 * kK], z[2 * kN];
      for (int i = 0; i < 2 * kK; ++i) rows[i] = static_cast<std::int32_t>(number << 20) * (i % 3 - 1);
      request(base, number, 0, 2, rows, sizeof rows);
      Side* other = cloven::side_of(base, 1);
      while (!cloven::wait(&other->number, number - 1, 1'000'000'000)) {
      }
      expect(other->payload == 2 * kN * (bits == 8 ? 1 : 2) + 1, "a metered answer of another size");
      product(rows, 2, kK, weights, kN, kK, z, 1, 0);
      for (int i = 0; i < 2 * kN; ++i) {
        std::int16_t number16 = 0;
        std::memcpy(&number16, cloven::payload_of(base, 1) + 2 * i, bits == 8 ? 0 : 2);
        const int found = bits == 8 ? static_cast<std::int8_t>(cloven::payload_of(base, 1)[i]) : number16;
        expect(found == static_cast<int>(bits == 8 ? static_cast<std::int8_t>(z[i] >> 23) : static_cast<std::int16_t>(z[i] >> (31 - bits))),
               "a metered answer is wrong");
      }
      ++checked;
    }
    over = true;
    server.join();
    meddler.join();
    expect(granted - taken_back - credit[0] == state.rows && state.rows == 200, "rows were answered that nobody granted");
    std::free(base);
  }
  {  // without credit, and what is no residue: nothing is answered, and nothing is taken
    void* base = memory();
    State state{};
    i64 credit[2] = {1, 0};
    const Serving metered{matrices, 2, product, 0, credit, 16};
    request(base, 1, 0, 2, c, sizeof c);
    expect(cloven_serve(&metered, base, &state, 1'000'000, 1) == kNoCredit && credit[0] == 1 && state.answered == 0, "answered for nothing");
    for (const std::int32_t entry : {kH + 1, -kH - 1}) {
      std::int32_t wrong_entry[kK] = {0, 0, 0, 0, entry};
      request(base, 1, 0, 1, wrong_entry, sizeof wrong_entry);
      expect(cloven_serve(&metered, base, &state, 1'000'000, 1) == kSomethingElse && credit[0] == 1, "no residue was taken");
      ++checked;
    }
    std::free(base);
  }
  std::printf("ok, %d requests\n", checked);
  return 0;
}
