// From packed rows to columns of levels, `kStrip` rows at a time. The layout is that of `kvsplice_hf.codec.RowCodec`.
#pragma once

#include <initializer_list>

#include "lanes.h"

namespace kvsplice {

// Rows that are unpacked together: bytes at the same place of 64 rows fill a vector of AVX-512.
constexpr int kStrip = 64;
constexpr int kMostFields = 4;

// Where a field of a code is: in which byte of the row, from which bit of it; how many bits; and from which bit of the
// code.
struct Field {
  int32_t byte, shift, bits, place;
};

// The rows of one codec. A column is `sinh(slope * code + start)`, times the gain of the row for the first `gained`
// ones, and times that of its key for the next `key_gained`; behind them come `raw` columns of bf16 numbers, the first
// `gained_raw` of which are of numbers that the gain is taken from. Number `index[i]` of a row is its base and
// `scale(i)` times column i.
struct Codec {
  int64_t coded, raw, gained, key_gained, gained_raw, has_gain, has_key_gain, row_bytes;
  const Field* fields;                     // [coded, kMostFields]; 0 bits where a code has fewer
  const float *slopes, *starts, *reaches;  // [coded]; the reach is the sinh at the largest level
  const float* gains;                      // of each byte, [256]
  const int64_t* index;                    // [coded + raw]
  const float *scales, *centres;           // [n]
  const uint8_t* widths;                   // [n]

  float scale(int64_t column) const { return column < coded ? scales[index[column]] / reaches[column] : 1.0f; }
  int64_t gain_bytes() const { return has_gain + has_key_gain; }
  float base(int64_t number) const { return widths[number] == 16 ? 0.0f : centres[number]; }
};

typedef uint8_t Line __attribute__((vector_size(kStrip)));
typedef uint16_t Pairs __attribute__((vector_size(kStrip)));
typedef uint64_t Words __attribute__((vector_size(kStrip)));

// The bytes of up to `kStrip` rows as one line per byte of a row, [bytes up to a multiple of kLinesAtOnce, kStrip].
// Lines of missing rows repeat the last one.
constexpr int kLinesAtOnce = 16;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline void bytes_to_lines(const uint8_t* rows, int64_t stride, int64_t count, int64_t row_bytes, uint8_t* lines) {
  for (int64_t byte = 0; byte < row_bytes; byte += kLinesAtOnce) {
    // The last row may end where the memory does.
    const __mmask16 present = (1u << smaller(kLinesAtOnce, row_bytes - byte)) - 1;
    const auto at = [&](int64_t row) {
      return _mm_maskz_loadu_epi8(present, rows + smaller(row, count - 1) * stride + byte);
    };
    // Blocks of sixteen by sixteen bytes, four side by side.
    __m512i block[16];
    for (int row = 0; row < 16; ++row) {
      const __m256i front = _mm256_inserti32x4(_mm256_castsi128_si256(at(row)), at(row + 16), 1);
      const __m256i behind = _mm256_inserti32x4(_mm256_castsi128_si256(at(row + 32)), at(row + 48), 1);
      block[row] = _mm512_inserti64x4(_mm512_castsi256_si512(front), behind, 1);
    }
    // Of a byte's place in its block, eight bits for row and column, each round turns the first into the last.
    for (int round = 0; round < 4; ++round) {
      __m512i next[16];
      for (int row = 0; row < 8; ++row) {
        next[2 * row] = _mm512_unpacklo_epi8(block[row], block[row + 8]);
        next[2 * row + 1] = _mm512_unpackhi_epi8(block[row], block[row + 8]);
      }
      std::memcpy(block, next, sizeof block);
    }
    for (int index = 0; index < 16; ++index) store(lines + (byte + index) * kStrip, block[index]);
  }
}
#else
// Swap, in all lanes, the bits of `low` under `mask << shift` with those of `high` under `mask`.
inline void exchange(Words& low, Words& high, int shift, uint64_t mask) {
  const Words differing = ((low >> shift) ^ high) & mask;
  high ^= differing;
  low ^= differing << shift;
}

inline void bytes_to_lines(const uint8_t* rows, int64_t stride, int64_t count, int64_t row_bytes, uint8_t* lines) {
  alignas(64) uint64_t words[8][8];
  for (int64_t byte = 0; byte < row_bytes; byte += 8) {
    const int64_t present = smaller(8, row_bytes - byte);
    for (int64_t row = 0; row < kStrip; ++row) {
      // Blocks of eight by eight bytes: lane `row / 8` of vector `row % 8`.
      uint64_t word = 0;
      const uint8_t* from = rows + smaller(row, count - 1) * stride + byte;
      if (present == 8) {
        std::memcpy(&word, from, 8);
      } else {
        std::memcpy(&word, from, present);  // the last row may end where the memory does
      }
      words[row % 8][row / 8] = word;
    }
    Words block[8];
    for (int index = 0; index < 8; ++index) block[index] = load<Words>(words[index]);
    for (int index = 0; index < 4; ++index) exchange(block[index], block[index + 4], 32, 0x00000000FFFFFFFF);
    for (int index : {0, 1, 4, 5}) exchange(block[index], block[index + 2], 16, 0x0000FFFF0000FFFF);
    for (int index : {0, 2, 4, 6}) exchange(block[index], block[index + 1], 8, 0x00FF00FF00FF00FF);
    for (int index = 0; index < 8; ++index) store(lines + (byte + index) * kStrip, block[index]);
  }
}
#endif

// The codes of one column.
inline Line codes_of(const Field* fields, const uint8_t* lines) {
  Pairs codes = {};
  for (int index = 0; index < kMostFields && fields[index].bits; ++index) {
    const Field& field = fields[index];
    // Two bytes are shifted as one number; what that moves from one into the other is masked.
    const uint16_t mask = ((1 << field.bits) - 1) * 0x0101;
    codes |= ((load<Pairs>(lines + field.byte * kStrip) >> field.shift) & mask) << field.place;
  }
  return (Line)codes;
}

// sinh(x) / x as a polynomial in x^2, for |x| up to the largest bend: see `kvsplice_hf.codec`.
inline Floats sinh_of(Floats x) {
  const Floats square = x * x;
  Floats sum = square * 3.1881204272216436e-06f + 0.00019595608535080897f;
  sum = sum * square + 0.00833884425232733f;
  sum = sum * square + 0.16666250581334213f;
  return x * (sum * square + 1.0000004732391539f);
}

// The levels of one width. Columns of the same width lie side by side and share them.
class Levels {
 public:
  void prepare(float slope, float start, int width) {
    if (slope == slope_ && start == start_) return;
    slope_ = slope, start_ = start;
    vectors_ = 1 << width > kMostLookedUp ? 0 : blocks_of(1 << width, kLanes);
    for (int index = 0; index < vectors_; ++index) {
      Ints codes;
      for (int lane = 0; lane < kLanes; ++lane) codes[lane] = index * kLanes + lane;
      table_[index] = computed(codes);
    }
  }

  // The levels of kStrip codes.
  template <class Number>
  void write(const uint8_t* codes, Number* to) const {
    switch (vectors_) {
      case 1:
        return looked_up<1>(codes, to);
      case 2:
        return looked_up<2>(codes, to);
      case 4:
        return looked_up<4>(codes, to);
    }
    for (int row = 0; row < kStrip; row += kLanes) put(to + row, computed(from_bytes(load<Bytes>(codes + row))));
  }

 private:
  template <int vectors, class Number>
  void looked_up(const uint8_t* codes, Number* to) const {
    for (int row = 0; row < kStrip; row += kLanes) {
      put(to + row, look_up<vectors>(table_, from_bytes(load<Bytes>(codes + row))));
    }
  }
  Floats computed(Ints codes) const { return sinh_of(__builtin_convertvector(codes, Floats) * slope_ + start_); }

  float slope_ = 0, start_ = 0;  // no slope is 0
  int vectors_ = 0;
  Floats table_[4];
};

// Columns of levels from `first` up to `last`, each [kStrip] at `at(column)`.
template <class At>
void coded_columns(const Codec& codec, const uint8_t* lines, int64_t first, int64_t last, At&& at) {
  Levels levels;
  for (int64_t column = first; column < last; ++column) {
    alignas(64) uint8_t codes[kStrip];
    store(codes, codes_of(codec.fields + column * kMostFields, lines));
    levels.prepare(codec.slopes[column], codec.starts[column], codec.widths[codec.index[column]]);
    levels.write(codes, at(column));
  }
}

// The same of bf16 numbers, counted from the first of them.
template <class At>
void raw_columns(const Codec& codec, const uint8_t* lines, int64_t first, int64_t last, At&& at) {
  for (int64_t column = first; column < last; ++column) {
    const uint8_t* line = lines + (codec.gain_bytes() + 2 * column) * kStrip;
    for (int row = 0; row < kStrip; row += kLanes) {
      const Ints low = from_bytes(load<Bytes>(line + row));
      const Ints high = from_bytes(load<Bytes>(line + kStrip + row));
      put(at(column) + row, (Floats)((low << 16) | (high << 24)));
    }
  }
}

}  // namespace kvsplice
