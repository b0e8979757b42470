// Products of bf16 numbers by whole tiles, for processors that have such instructions (AMX): 16 numbers of keys and 16
// rows at once, with 32 products in each of their sums. No tile outlives the call that it was made in.
#pragma once

#include "packed.h"
#include "twins.h"

#if KVSPLICE_TWINS && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define KVSPLICE_TILES 1
#else
#define KVSPLICE_TILES 0
#endif

namespace kvsplice {

// Rows and columns of a tile, and how many pairs of bf16 numbers are in a line of one.
constexpr int kTile16 = 16;

}  // namespace kvsplice

#if KVSPLICE_TILES
namespace kvsplice {

// Linux has to be asked before a process may use them; it may say no, as may a virtual machine.
inline bool has_tiles() {
  constexpr int kRequestState = 0x1023, kTileData = 18;
  static const bool are_there = syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
  return are_there;
}

// Tiles 0 to 3 hold sums, 4 and 5 what is multiplied, 6 and 7 the same of the last units, where these are fewer.
class Tiles {
 public:
  explicit Tiles(int64_t units) : units_(units), rest_(units % kTile16) {
    Settings settings{};
    for (int tile = 0; tile < 8; ++tile) settings.bytes[tile] = 4 * kTile16, settings.rows[tile] = kTile16;
    settings.bytes[6] = 4 * rest_, settings.rows[7] = rest_;
    if (rest_ == 0) settings.rows[6] = settings.bytes[7] = 0;
    _tile_loadconfig(&settings);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;

  // sums[vector][number][row] of 16 numbers and the 64 rows of a strip.
  // weights: [16, stride] pairs; columns: [units, kStrip] pairs. Written out, because tiles are named by literals.
  void multiply(const uint32_t* weights, int64_t stride, const Bfloat16* columns, float* sums) const {
    constexpr int kVector = 2 * kTile16, kLine = 4 * kStrip;
    barrier();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    int64_t unit = 0;
    for (; unit + kTile16 <= units_; unit += kTile16, columns += kTile16 * 2 * kStrip) {
      _tile_loadd(4, weights + unit, 4 * stride);
      _tile_loadd(5, columns, kLine);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(5, columns + kVector, kLine);
      _tile_dpbf16ps(1, 4, 5);
      _tile_loadd(5, columns + 2 * kVector, kLine);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(5, columns + 3 * kVector, kLine);
      _tile_dpbf16ps(3, 4, 5);
    }
    if (rest_) {
      _tile_loadd(6, weights + unit, 4 * stride);
      _tile_loadd(7, columns, kLine);
      _tile_dpbf16ps(0, 6, 7);
      _tile_loadd(7, columns + kVector, kLine);
      _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(7, columns + 2 * kVector, kLine);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(7, columns + 3 * kVector, kLine);
      _tile_dpbf16ps(3, 6, 7);
    }
    _tile_stored(0, sums, 4 * kTile16);
    _tile_stored(1, sums + kTile16 * kTile16, 4 * kTile16);
    _tile_stored(2, sums + 2 * kTile16 * kTile16, 4 * kTile16);
    _tile_stored(3, sums + 3 * kTile16 * kTile16, 4 * kTile16);
    barrier();
  }

 private:
  struct alignas(64) Settings {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16];  // of a line
    uint8_t rows[16];
  };
  // Compilers do not know that these instructions read and write memory.
  static void barrier() { asm volatile("" ::: "memory"); }

  const int64_t units_;
  const int rest_;
};

static_assert(kStrip == 4 * kTile16 && kLanes == kTile16);

}  // namespace kvsplice
#endif
