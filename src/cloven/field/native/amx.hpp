// The product of tiles in the CPU's matrix unit (AMX): see tiles.hpp.
//
// Two digits meet two strips at a time: four loads for four products, and no register is loaded while a product still reads it.
#pragma once

#include "tiles.hpp"

#if CLOVEN_TILES

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace cloven {

constexpr std::int64_t kAmxQuads = 16;  // 32 KiB of two strips

// Whether the CPU has the unit, and the kernel lets this process use it: asked once.
inline bool amx_allowed() {
  static const bool allowed = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d >> 24 & 3) != 3) return false;  // AMX-TILE and AMX-INT8
    if (!tiles_allowed()) return false;
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return allowed;
}

struct alignas(64) TileShape {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Some quads of k for a block of rows and two strips, on top of what y holds (nothing, if these are the first).
__attribute__((target("avx512f,amx-tile,amx-int8"))) inline void amx_two_strips(const std::uint8_t* planes, const std::uint8_t* strip,
                                                                            std::size_t next, std::int64_t /*rows*/, std::int64_t quads, bool first,
                                                                            Sums& y) {
  for (int pair = 0; pair < 4; pair += 2) {
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, y[0][pair], 64);
      _tile_loadd(1, y[1][pair], 64);
      _tile_loadd(2, y[0][pair + 1], 64);
      _tile_loadd(3, y[1][pair + 1], 64);
    }
    const std::uint8_t* a = planes + static_cast<std::size_t>(pair) * kTileBytes;
    const std::uint8_t* b = strip;
    for (std::int64_t quad = 0; quad < quads; ++quad, a += 4 * kTileBytes, b += kTileBytes) {
      _tile_loadd(4, a, 64);
      _tile_loadd(5, a + kTileBytes, 64);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + next, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, y[0][pair], 64);
    _tile_stored(1, y[1][pair], 64);
    _tile_stored(2, y[0][pair + 1], 64);
    _tile_stored(3, y[1][pair + 1], 64);
  }
}

__attribute__((target("amx-tile"))) inline void amx_chunk(const void* what, std::int64_t index) {
  const TileShape shape;
  _tile_loadconfig(&shape);
  tiles_chunk(what, index);
  _tile_release();
}

}  // namespace cloven

#endif
