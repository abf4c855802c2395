// The passes over rows of rows.cpp and hadamard.cpp, for those that call several of them in one go: what they do is said there.
#pragma once

#include <cstdint>
#include <cstring>

namespace cloven {

// An entry of values of a kind: 1 float32, 2 bfloat16.
inline float real(const void* values, std::int64_t kind, std::int64_t i) {
  if (kind == 1) return static_cast<const float*>(values)[i];
  const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(values)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cloven

#define CLOVEN_API extern "C" __attribute__((visibility("default")))

CLOVEN_API int cloven_turn(const double* x, std::int64_t m, std::int64_t n, std::int64_t block, double scale, std::int64_t stages,
                           const std::int32_t* gather, const float* units, int leading, const float* total, void* out, int kind, int threads);
CLOVEN_API int cloven_add(const std::int32_t* a, const std::int32_t* b, std::int64_t m, std::int64_t n, int sign, std::int32_t* out, int threads);
CLOVEN_API int cloven_encode(const double* x, std::int64_t m, std::int64_t n, double scale, std::int32_t* out, double* alpha,
                             std::int32_t* found, int threads);
CLOVEN_API int cloven_decode(const std::int32_t* y, std::int64_t m, std::int64_t n, double* alpha, double* out, int threads);
CLOVEN_API int cloven_check(std::int32_t* test, const std::int32_t* z, const std::int32_t* c, std::int64_t m, std::int64_t n, std::int64_t k,
                            std::int32_t* found, int threads);
