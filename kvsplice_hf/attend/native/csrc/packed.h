// From packed rows to columns of levels, `kStrip` rows at a time. The layout is that of `kvsplice_hf.codec.RowCodec`.
#pragma once

#include <initializer_list>
#include <type_traits>

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

// Where a processor looks up bytes, both halves of bf16 levels are looked up for a whole line at once. Rows are spread
// over a line so that they come to lie in their order when the halves are put together.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)
#define KVSPLICE_BYTE_TABLES 1
#else
#define KVSPLICE_BYTE_TABLES 0
#endif
template <class Number>
constexpr bool kSpread = KVSPLICE_BYTE_TABLES && std::is_same_v<Number, Bfloat16>;

// Which row is at a place of a line, for columns of this kind of numbers.
template <class Number>
constexpr int row_at(int place) {
  return kSpread<Number> ? place / 16 * 8 + place % 8 + (place % 16 < 8 ? 0 : kStrip / 2) : place;
}

// The bytes of up to `kStrip` rows as one line per byte of a row, [bytes up to a multiple of kLinesAtOnce, kStrip].
// Lines of missing rows repeat the last one.
constexpr int kLinesAtOnce = 16;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <class Number>
void bytes_to_lines(const uint8_t* rows, int64_t stride, int64_t count, int64_t row_bytes, uint8_t* lines) {
  for (int64_t byte = 0; byte < row_bytes; byte += kLinesAtOnce) {
    // The last row may end where the memory does.
    const __mmask16 present = (1u << smaller(kLinesAtOnce, row_bytes - byte)) - 1;
    const auto at = [&](int place) {
      return _mm_maskz_loadu_epi8(present, rows + smaller(row_at<Number>(place), count - 1) * stride + byte);
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

template <class Number>
void bytes_to_lines(const uint8_t* rows, int64_t stride, int64_t count, int64_t row_bytes, uint8_t* lines) {
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
#if defined(__GFNI__) && defined(__AVX512BW__)
// A field is moved by a product of its byte with a matrix of bits, whose rows are the bits of the code.
inline Line codes_of(const Field* fields, const uint8_t* lines) {
  constexpr uint64_t kFirstRows[9] = {
      0, uint64_t{0x01} << 56, uint64_t{0x0102} << 48, 0, uint64_t{0x01020408} << 32, 0, 0, 0, 0x0102040810204080};
  Line codes = {};
  for (int index = 0; index < kMostFields && fields[index].bits; ++index) {
    const Field& field = fields[index];
    const __m512i matrix = _mm512_set1_epi64(kFirstRows[field.bits] << field.shift >> 8 * field.place);
    const __m512i line = load<__m512i>(lines + field.byte * kStrip);
    codes |= (Line)_mm512_gf2p8affine_epi64_epi8(line, matrix, 0);
  }
  return codes;
}
#else
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
#endif

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
  void write(Line codes, Number* to) const {
    alignas(64) uint8_t bytes[kStrip];
    store(bytes, codes);
    write(bytes, to);
  }
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

#if KVSPLICE_BYTE_TABLES
// The same as bf16, for codes that are spread.
class SpreadLevels {
 public:
  void prepare(float slope, float start, int width) {
    if (slope == slope_ && start == start_) return;
    slope_ = slope, start_ = start;
    levels_.prepare(slope, start, width);
    is_table_ = 1 << width <= kStrip;
    if (!is_table_) return;
    alignas(64) uint8_t every[kStrip];
    alignas(64) Bfloat16 levels[kStrip];
    for (int code = 0; code < kStrip; ++code) every[code] = code & ((1 << width) - 1);
    levels_.write(every, levels);
    const __m512i front = load<__m512i>(levels), behind = load<__m512i>(levels + kStrip / 2);
    const auto bytes = [](__m512i one, __m512i other) {
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(one)), _mm512_cvtepi16_epi8(other), 1);
    };
    low_ = bytes(front, behind);
    high_ = bytes(_mm512_srli_epi16(front, 8), _mm512_srli_epi16(behind, 8));
  }

  void write(Line codes, Bfloat16* to) const {
    if (is_table_) {
      return put_together(_mm512_permutexvar_epi8((__m512i)codes, low_), _mm512_permutexvar_epi8((__m512i)codes, high_),
                          to);
    }
    alignas(64) uint8_t in_order[kStrip];
    for (int place = 0; place < kStrip; ++place) in_order[row_at<Bfloat16>(place)] = codes[place];
    levels_.write(in_order, to);
  }

  // Numbers of their spread bytes.
  static void put_together(__m512i low, __m512i high, Bfloat16* to) {
    store(to, _mm512_unpacklo_epi8(low, high));
    store(to + kStrip / 2, _mm512_unpackhi_epi8(low, high));
  }

 private:
  Levels levels_;
  float slope_ = 0, start_ = 0;
  bool is_table_ = false;
  __m512i low_, high_;
};
#endif

// Columns of levels from `first` up to `last`, each [kStrip] at `at(column)`.
template <class Number, class At>
void coded_columns(const Codec& codec, const uint8_t* lines, int64_t first, int64_t last, At&& at) {
#if KVSPLICE_BYTE_TABLES
  std::conditional_t<kSpread<Number>, SpreadLevels, Levels> levels;
#else
  Levels levels;
#endif
  for (int64_t column = first; column < last; ++column) {
    levels.prepare(codec.slopes[column], codec.starts[column], codec.widths[codec.index[column]]);
    levels.write(codes_of(codec.fields + column * kMostFields, lines), at(column));
  }
}

// The same of bf16 numbers, counted from the first of them.
template <class Number, class At>
void raw_columns(const Codec& codec, const uint8_t* lines, int64_t first, int64_t last, At&& at) {
  for (int64_t column = first; column < last; ++column) {
    const uint8_t* line = lines + (codec.gain_bytes() + 2 * column) * kStrip;
#if KVSPLICE_BYTE_TABLES
    if constexpr (kSpread<Number>) {
      SpreadLevels::put_together(load<__m512i>(line), load<__m512i>(line + kStrip), at(column));
      continue;
    }
#endif
    for (int row = 0; row < kStrip; row += kLanes) {
      const Ints low = from_bytes(load<Bytes>(line + row));
      const Ints high = from_bytes(load<Bytes>(line + kStrip + row));
      put(at(column) + row, (Floats)((low << 16) | (high << 24)));
    }
  }
}

}  // namespace kvsplice
