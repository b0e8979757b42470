// From packed rows to columns of levels, `kStrip` rows at a time. The layout is that of `kvsplice_hf.codec.RowCodec`.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "lanes.h"

namespace kvsplice {

// Rows that are unpacked together: bytes at the same place of 64 rows fill a vector of AVX-512.
constexpr int kStrip = 64;
constexpr int kMostFields = 4;
constexpr int kLargestTrellisWidth = 7;

// Where a field of a code is: in which byte of the row, from which bit of it; how many bits; and from which bit of the
// code.
struct Field {
  int32_t byte, shift, bits, place;
};

// The rows of one codec. A column is `sinh(slope * number + start)`, where the number of a level is its code, or
// follows from it and from the codes before it (`kvsplice_hf.code.trellis`); times the gain of the row for the first
// `gained` ones, and times that of its key for the next `key_gained`; behind them come `raw` columns of bf16 numbers,
// the first `gained_raw` of which are of numbers that the gain is taken from. Number `index[i]` of a row is its base
// and `scale(i)` times column i.
struct Codec {
  int64_t coded, raw, gained, key_gained, gained_raw, has_gain, has_key_gain, row_bytes;
  int64_t trellis;                         // whether the levels of narrow columns depend on the columns before them
  const Field* fields;                     // [coded, kMostFields]; 0 bits where a code has fewer
  const float *slopes, *starts, *reaches;  // [coded]; the reach is the sinh at the largest level
  const float* gains;                      // of each byte, [256]
  const int64_t* index;                    // [coded + raw]
  const float *scales, *centres;           // [n]
  const uint8_t* widths;                   // [n]

  float scale(int64_t column) const { return column < coded ? scales[index[column]] / reaches[column] : 1.0f; }
  int64_t gain_bytes() const { return has_gain + has_key_gain; }
  int width(int64_t column) const { return widths[index[column]]; }
  bool in_trellis(int64_t column) const { return trellis && width(column) <= kLargestTrellisWidth; }
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
// Lines of missing rows repeat the last one. `start(row)` is where a row begins.
constexpr int kLinesAtOnce = 16;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <class Number, class Start>
void bytes_to_lines(Start&& start, int64_t count, int64_t row_bytes, uint8_t* lines) {
  const uint8_t* starts[kStrip];
  for (int place = 0; place < kStrip; ++place) starts[place] = start(smaller(row_at<Number>(place), count - 1));
  const auto transpose = [&](int64_t byte, auto read) {
    const auto at = [&](int place) { return read(starts[place] + byte); };
    // Blocks of sixteen by sixteen bytes, four side by side.
    __m512i block[16];
    for (int place = 0; place < 16; ++place) {
      const __m256i front = _mm256_inserti32x4(_mm256_castsi128_si256(at(place)), at(place + 16), 1);
      const __m256i behind = _mm256_inserti32x4(_mm256_castsi128_si256(at(place + 32)), at(place + 48), 1);
      block[place] = _mm512_inserti64x4(_mm512_castsi256_si512(front), behind, 1);
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
  };
  int64_t byte = 0;
  for (; byte + kLinesAtOnce <= row_bytes; byte += kLinesAtOnce) {
    transpose(byte, [](const uint8_t* from) { return load<__m128i>(from); });
  }
  // The last row may end where the memory does.
  const __mmask16 present = (1u << (row_bytes - byte)) - 1;
  if (present) transpose(byte, [&](const uint8_t* from) { return _mm_maskz_loadu_epi8(present, from); });
}
#else
// Swap, in all lanes, the bits of `low` under `mask << shift` with those of `high` under `mask`.
inline void exchange(Words& low, Words& high, int shift, uint64_t mask) {
  const Words differing = ((low >> shift) ^ high) & mask;
  high ^= differing;
  low ^= differing << shift;
}

template <class Number, class Start>
void bytes_to_lines(Start&& start, int64_t count, int64_t row_bytes, uint8_t* lines) {
  alignas(64) uint64_t words[8][8];
  const uint8_t* starts[kStrip];
  for (int64_t row = 0; row < kStrip; ++row) starts[row] = start(smaller(row, count - 1));
  for (int64_t byte = 0; byte < row_bytes; byte += 8) {
    const int64_t present = smaller(8, row_bytes - byte);
    for (int64_t row = 0; row < kStrip; ++row) {
      // Blocks of eight by eight bytes: lane `row / 8` of vector `row % 8`.
      uint64_t word = 0;
      const uint8_t* from = starts[row] + byte;
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

// The codes of columns of one width, whose `fields` fields have the same places in a code.
#if defined(__GFNI__) && defined(__AVX512BW__)
// A field is moved by the product of its byte with a matrix of bits: the rows of that are the bits of the code, from
// the last byte on. By bits of a field (1, 2, 4, 8), its place in the code, and its shift in the byte.
struct Matrices {
  uint64_t of[4][8][8] = {};

  constexpr Matrices() {
    for (int size = 0; size < 4; ++size) {
      for (int place = 0; place + (1 << size) <= 8; ++place) {
        for (int shift = 0; shift + (1 << size) <= 8; ++shift) {
          for (int bit = 0; bit < 1 << size; ++bit) {
            of[size][place][shift] |= uint64_t{1} << (8 * (7 - place - bit) + shift + bit);
          }
        }
      }
    }
  }
};
inline constexpr Matrices kMatrices;

template <int fields>
class CodeReader {
 public:
  CodeReader(const Field* of_one, const uint8_t* lines) : lines_(lines) {
    for (int index = 0; index < fields; ++index) {
      matrices_[index] = kMatrices.of[__builtin_ctz(of_one[index].bits)][of_one[index].place];
    }
  }
  Line codes(const Field* of_column) const {
    Line codes = {};
    for (int index = 0; index < fields; ++index) {
      const __m512i matrix = _mm512_set1_epi64(matrices_[index][of_column[index].shift]);
      const __m512i line = load<__m512i>(lines_ + of_column[index].byte * kStrip);
      codes |= (Line)_mm512_gf2p8affine_epi64_epi8(line, matrix, 0);
    }
    return codes;
  }

 private:
  const uint8_t* lines_;
  const uint64_t* matrices_[fields];
};
#else
template <int fields>
class CodeReader {
 public:
  CodeReader(const Field*, const uint8_t* lines) : lines_(lines) {}
  Line codes(const Field* of_column) const {
    Pairs codes = {};
    for (int index = 0; index < fields; ++index) {
      const Field& field = of_column[index];
      // Two bytes are shifted as one number; what that moves from one into the other is masked.
      const uint16_t mask = ((1 << field.bits) - 1) * 0x0101;
      codes |= ((load<Pairs>(lines_ + field.byte * kStrip) >> field.shift) & mask) << field.place;
    }
    return (Line)codes;
  }

 private:
  const uint8_t* lines_;
};
#endif

// sinh(x) / x as a polynomial in x^2, for |x| up to the largest bend: see `kvsplice_hf.codec`.
inline Floats sinh_of(Floats x) {
  const Floats square = x * x;
  Floats sum = square * 3.1881204272216436e-06f + 0.00019595608535080897f;
  sum = sum * square + 0.00833884425232733f;
  sum = sum * square + 0.16666250581334213f;
  return x * (sum * square + 1.0000004732391539f);
}

// The 2^bits levels of one width. Columns of the same width lie side by side and share them.
class Levels {
 public:
  void prepare(float slope, float start, int bits) {
    slope_ = slope, start_ = start;
    vectors_ = 1 << bits > kMostLookedUp ? 0 : blocks_of(1 << bits, kLanes);
    for (int index = 0; index < vectors_; ++index) {
      Ints codes;
      for (int lane = 0; lane < kLanes; ++lane) codes[lane] = index * kLanes + lane;
      table_.of[index] = computed(codes);
    }
  }

  // Columns of levels, each of kStrip codes.
  template <class Number, class Codes, class At>
  void write(int64_t first, int64_t last, Codes&& codes, At&& at) const {
    switch (vectors_) {
      case 1:
        return write_each<Number>(first, last, codes, at,
                                  [table = table_](Ints index) { return look_up<1>(table.of, index); });
      case 2:
        return write_each<Number>(first, last, codes, at,
                                  [table = table_](Ints index) { return look_up<2>(table.of, index); });
      case 4:
        return write_each<Number>(first, last, codes, at,
                                  [table = table_](Ints index) { return look_up<4>(table.of, index); });
    }
    write_each<Number>(first, last, codes, at, [this](Ints index) { return computed(index); });
  }

 private:
  template <class Number, class Codes, class At, class Level>
  static void write_each(int64_t first, int64_t last, Codes&& codes, At&& at, Level&& level) {
    for (int64_t column = first; column < last; ++column) {
      alignas(64) uint8_t bytes[kStrip];
      store(bytes, codes(column));
      Number* to = at(column);
      for (int row = 0; row < kStrip; row += kLanes) put(to + row, level(from_bytes(load<Bytes>(bytes + row))));
    }
  }
  Floats computed(Ints codes) const { return sinh_of(__builtin_convertvector(codes, Floats) * slope_ + start_); }

  float slope_ = 0, start_ = 0;
  int vectors_ = 0;
  struct Table {
    Floats of[4];
  } table_;
};

#if KVSPLICE_BYTE_TABLES
// The same as bf16, for codes that are spread.
class SpreadLevels {
 public:
  void prepare(float slope, float start, int bits) {
    Levels every_level;
    every_level.prepare(slope, start, bits);
    tables_ = bits <= 6 ? 1 : 1 << (bits - 6);
    for (int table = 0; table < tables_; ++table) {
      Line every;
      alignas(64) Bfloat16 levels[kStrip];
      for (int code = 0; code < kStrip; ++code) every[code] = (table * kStrip + code) & ((1 << bits) - 1);
      every_level.write<Bfloat16>(0, 1, [&](int64_t) { return every; }, [&](int64_t) { return levels; });
      const __m512i front = load<__m512i>(levels), behind = load<__m512i>(levels + kStrip / 2);
      const auto bytes = [](__m512i one, __m512i other) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(one)), _mm512_cvtepi16_epi8(other), 1);
      };
      low_[table] = bytes(front, behind);
      high_[table] = bytes(_mm512_srli_epi16(front, 8), _mm512_srli_epi16(behind, 8));
    }
  }

  template <class Number, class Codes, class At>
  void write(int64_t first, int64_t last, Codes&& codes, At&& at) const {
    const auto look_up = [&](auto of_code) {
      for (int64_t column = first; column < last; ++column) of_code((__m512i)codes(column), at(column));
    };
    const SpreadLevels table = *this;  // in registers
    if (tables_ == 1) {
      look_up([&](__m512i code, Bfloat16* to) {
        put_together(_mm512_permutexvar_epi8(code, table.low_[0]), _mm512_permutexvar_epi8(code, table.high_[0]), to);
      });
    } else if (tables_ == 2) {
      look_up(
          [&](__m512i code, Bfloat16* to) { put_together(of_two(table.low_, code), of_two(table.high_, code), to); });
    } else {
      look_up(
          [&](__m512i code, Bfloat16* to) { put_together(of_four(table.low_, code), of_four(table.high_, code), to); });
    }
  }

  // Numbers of their spread bytes.
  static void put_together(__m512i low, __m512i high, Bfloat16* to) {
    store(to, _mm512_unpacklo_epi8(low, high));
    store(to + kStrip / 2, _mm512_unpackhi_epi8(low, high));
  }

 private:
  static __m512i of_two(const __m512i* tables, __m512i code) {
    return _mm512_permutex2var_epi8(tables[0], code, tables[1]);
  }
  static __m512i of_four(const __m512i* tables, __m512i code) {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), of_two(tables, code), of_two(tables + 2, code));
  }

  int tables_ = 0;
  __m512i low_[4] = {}, high_[4] = {};
};
#endif

// The lowest bits of the columns of a trellis ahead of the one that is read next, the last one first. A trellis begins
// anew behind the columns that share the gain.
class Trail {
 public:
  Trail(const Codec& codec, const uint8_t* lines, int64_t first) {
    if (!codec.trellis) return;
    int known = 0;
    const int64_t start = first < codec.gained ? 0 : codec.gained;
    for (int64_t column = first - 1; column >= start && known < kLength; --column) {
      if (!codec.in_trellis(column)) continue;
      const Field& lowest = codec.fields[column * kMostFields];
      bits_[known++] = (Line)(load<Pairs>(lines + lowest.byte * kStrip) >> lowest.shift) & 1;
    }
  }
  // Numbers of levels, of the codes of the next column.
  Line numbers(Line codes) {
    const Line lowest = codes & 1, others = codes & 0xFE;
    const Line opposite = lowest ^ bits_[0] ^ bits_[5], beside = bits_[1] ^ bits_[3];
    for (int index = kLength - 1; index > 0; --index) bits_[index] = bits_[index - 1];
    bits_[0] = lowest;
    return (others + others) | (opposite + opposite) | beside;
  }

 private:
  static constexpr int kLength = 6;
  Line bits_[kLength] = {};
};

// Columns of levels from `first` up to `last`, each [kStrip] at `at(column)`. Those of one width lie side by side.
template <class Number, class At>
void coded_columns(const Codec& codec, const uint8_t* lines, int64_t first, int64_t last, At&& at) {
  if (first < codec.gained && codec.gained < last) {
    coded_columns<Number>(codec, lines, first, codec.gained, at);
    return coded_columns<Number>(codec, lines, codec.gained, last, at);
  }
#if KVSPLICE_BYTE_TABLES
  std::conditional_t<kSpread<Number>, SpreadLevels, Levels> levels;
#else
  Levels levels;
#endif
  Trail trail(codec, lines, first);
  for (int64_t column = first, end; column < last; column = end) {
    const int width = codec.width(column);
    for (end = column + 1; end < last && codec.width(end) == width;) ++end;
    const bool in_trellis = codec.in_trellis(column);
    levels.prepare(codec.slopes[column], codec.starts[column], width + in_trellis);
    const auto write = [&]<int count>() {
      const Field* fields = codec.fields + column * kMostFields;
      const CodeReader<count> reader(fields, lines);
      const auto codes = [&](int64_t index) { return reader.codes(fields + index * kMostFields); };
      const auto to = [&](int64_t index) { return at(column + index); };
      if (in_trellis) {
        levels.template write<Number>(0, end - column, [&](int64_t index) { return trail.numbers(codes(index)); }, to);
      } else {
        levels.template write<Number>(0, end - column, codes, to);
      }
    };
    switch (__builtin_popcount(width)) {
      case 1:
        write.template operator()<1>();
        break;
      case 2:
        write.template operator()<2>();
        break;
      case 3:
        write.template operator()<3>();
        break;
    }
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
