// step.cpp under sanitizers: every kind of layer, both types, sizes that are no multiple of anything, over a lane between two threads; then the
// same calls shared by several threads.

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "step.cpp"

using cloven::BFloat16;
using cloven::Float32;

namespace {

std::mt19937 engine(1);

std::vector<float> floats(std::size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

std::vector<std::int32_t> below(std::size_t count, int limit) {
  std::vector<std::int32_t> values(count);
  for (auto& value : values) value = static_cast<std::int32_t>(engine() % limit);
  return values;
}

void require(bool held, const char* what) {
  if (!held) {
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
  }
}

void check(bool bfloat16, i64 noise, i64 batch, i64 rows, i64 heads, i64 kv_heads, i64 d) {
  const i64 size = d + noise, width = (heads + kv_heads) * d, period = noise ? d : width, frequencies = d / 2;
  const auto partner = below(period, static_cast<int>(period)), cosine = below(period, static_cast<int>(frequencies) + 1);
  const auto sine = below(period, 2 * static_cast<int>(frequencies) + 1), restore = below(heads * d, static_cast<int>(heads * d));
  const auto norms = floats(width), kv = floats(batch * 2 * kv_heads * size * size), inverse = floats(kv.size());
  const auto random = floats(batch * 2 * kv_heads * rows * noise);
  const auto cos = floats(batch * rows * (frequencies + 1)), sin = floats(batch * rows * (2 * frequencies + 1));
  std::vector<Layer> layers;
  for (int kind = 0; kind < 3; ++kind) {
    Layer layer{heads, kv_heads, d, noise, kind != 2 || noise, kind == 2 ? 0 : period, partner.data(), cosine.data(), sine.data(),
                kind == 1 ? norms.data() : nullptr, 1e-6, noise ? nullptr : restore.data(), noise ? kv.data() : nullptr,
                noise ? inverse.data() : nullptr, noise ? random.data() : nullptr};
    layers.push_back(layer);
  }
  Step step{bfloat16, batch, rows, 3, cos.data(), sin.data(), frequencies + 1, 2 * frequencies + 1, layers.data()};
  const std::size_t bytes = cloven::kFirst + 2 * (cloven::kHeaderBytes + cloven::kCapacity);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  require(base != MAP_FAILED, "mmap");
  State state{};
  std::thread server([&] {
    int result = kNotYet;
    while (result == kNotYet) result = cloven_step_serve(&step, base, &state, cloven::kSecond, 3);
    require(result == kDone, "the pass ends");
  });
  const std::size_t each = (bfloat16 ? 2 : 4) * batch * rows;
  std::uint32_t number = 0;
  for (const Layer& layer : layers)
    for (const bool key : {true, false}) {
      if (key && !layer.keyed) continue;
      const Rows<Float32> sizes(step, layer, key);
      std::vector<unsigned char> in(each * sizes.width_in()), out(each * sizes.width_out()), again(out.size());
      const auto values = floats(in.size() / (bfloat16 ? 2 : 4));
      for (std::size_t i = 0; i < values.size(); ++i) {
        if (bfloat16) {
          const auto stored = BFloat16::store(values[i]);
          std::memcpy(in.data() + 2 * i, &stored, 2);
        } else {
          std::memcpy(in.data() + 4 * i, &values[i], 4);
        }
      }
      Side *own = cloven::side_of(base, 0), *other = cloven::side_of(base, 1);
      std::memcpy(cloven::payload_of(base, 0), in.data(), in.size());
      own->header = cloven::kRaw;
      own->payload = static_cast<std::uint32_t>(in.size()) + 1;
      cloven::ring(&own->number, ++number);
      while (!cloven::wait(&other->number, number - 1, cloven::kSecond)) {
      }
      require(other->payload == out.size() + 1, "the size of an answer");
      std::memcpy(out.data(), cloven::payload_of(base, 1), out.size());
      cloven_step_compute(&step, &layer - layers.data(), key, in.data(), again.data(), 3);
      require(out == again, "the answer is what the call computes");
    }
  server.join();
  munmap(base, bytes);
}

}  // namespace

int main() {
  int checks = 0;
  for (const bool bfloat16 : {false, true})
    for (const i64 noise : {0, 3, 16})
      for (const i64 rows : {1, 3, 45}) {
        check(bfloat16, noise, 2, rows, 4, 2, 12);
        check(bfloat16, noise, 1, rows, 3, 1, 18);
        checks += 2;
      }
  std::printf("ok, %d passes\n", checks);
}
