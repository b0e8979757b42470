// Keys that were coded before their rotation: decoded, turned and written as columns, a strip of rows at a time.
//
// Legend: as in keys.h.
#pragma once

#include <cstring>

#include "keys.h"
#include "lanes.h"
#include "packed.h"
#include "products.h"

namespace kvsplice {

// Vectors of rows in the order in which products leave them, and back.
template <class In>
struct InOrder {
  static constexpr int kVectors = kRowVectors, kRows = kVectors * kLanes;
  static void read(const auto* from, Floats* to) {
    for (int index = 0; index < kVectors; ++index) to[index] = floats(from + index * kLanes);
  }
  static void write(const Floats* from, float* to) {
    for (int index = 0; index < kVectors; ++index) store(to + index * kLanes, from[index]);
  }
};

#if KVSPLICE_TWINS
template <>
struct InOrder<InTwins> {
  static constexpr int kVectors = 4, kRows = kVectors * kLanes;
  static void read(const float* from, Floats* to) {
    for (int index = 0; index < kVectors; index += 2) {
      const Floats first = floats(from + index * kLanes), second = floats(from + (index + 1) * kLanes);
      to[index] = low_of(first, second), to[index + 1] = high_of(first, second);
    }
  }
  static void read(const Bfloat16* from, Floats* to) {
    for (int index = 0; index < kVectors; index += 2) {
      const Twins numbers = twins(from + index * kLanes);
      to[index] = low_floats(numbers), to[index + 1] = high_floats(numbers);
    }
  }
  static void write(const Floats* from, Bfloat16* to) {
    for (int index = 0; index < kVectors; index += 2) store(to + index * kLanes, joined(from[index], from[index + 1]));
  }
};

// Columns two by two as pairs of their numbers, in place.
inline void pair_columns(Bfloat16* columns, int64_t count) {
  for (Bfloat16* one = columns; one < columns + count * kStrip; one += 2 * kStrip) {
    const Twins front = twins(one), behind = twins(one + kTwins);
    const Twins other_front = twins(one + kStrip), other_behind = twins(one + kStrip + kTwins);
    store(one, low_pairs(front, other_front));
    store(one + kTwins, high_pairs(front, other_front));
    store(one + 2 * kTwins, low_pairs(behind, other_behind));
    store(one + 3 * kTwins, high_pairs(behind, other_behind));
  }
}

// The same from columns somewhere else, by which is to be at each place; -1 for one that is 0.
inline void pair_columns(const Bfloat16* from, const int32_t* sources, Bfloat16* to, int64_t count) {
  for (int64_t place = 0; place < count; place += 2, to += 2 * kStrip) {
    const auto half = [&](int64_t index, int first) {
      return sources[index] < 0 ? Twins{} : twins(from + sources[index] * kStrip + first);
    };
    for (int first = 0; first < kStrip; first += kTwins) {
      const Twins one = half(place, first), other = half(place + 1, first);
      store(to + 2 * first, low_pairs(one, other));
      store(to + 2 * first + kTwins, high_pairs(one, other));
    }
  }
}
#endif

// What the angles of a strip are in a table of the circle.
template <class Number>
inline void look_up(const Number* table, const uint8_t* steps, Number* to) {
  for (int index = 0; index < kStrip; ++index) to[index] = table[steps[index] % kSteps];
}

#if defined(__AVX512BW__)
template <>
inline void look_up(const Bfloat16* table, const uint8_t* steps, Bfloat16* to) {
  const __m512i low = load<__m512i>(table), high = load<__m512i>(table + kSteps / 2);
  for (int index = 0; index < kStrip; index += 2 * kLanes) {
    const __m512i at = _mm512_cvtepu8_epi16(load<__m256i>(steps + index));
    store(to + index, _mm512_permutex2var_epi16(low, at, high));
  }
}

template <>
inline void look_up(const float* table, const uint8_t* steps, float* to) {
  const Floats whole[4] = {floats(table), floats(table + kLanes), floats(table + 2 * kLanes),
                           floats(table + 3 * kLanes)};
  for (int index = 0; index < kStrip; index += kLanes) {
    store(to + index, look_up<4>(whole, from_bytes(load<Bytes>(steps + index))));
  }
}
#endif

// Cosines and sines of the rows of a tile, strip by strip: [strips, 2 F, kStrip]. The lines of the table are far apart,
// so that each is read from one end to the other.
constexpr int kMostStrips = 8;  // of a tile
template <class Number>
inline void take_turns(const Keys& keys, int64_t sequence, int64_t row, int64_t count, Number* to) {
  const int32_t* slots = keys.slots + sequence * keys.slots_stride + row;
  int64_t found[kMostStrips * kStrip];
  bool in_order[kMostStrips];
  const int64_t strips = blocks_of(count, kStrip);
  for (int64_t strip = 0; strip < strips; ++strip) {
    int64_t* of_strip = found + strip * kStrip;
    for (int64_t index = 0; index < kStrip; ++index) {
      of_strip[index] = clamped(slots[smaller(strip * kStrip + index, count - 1)], keys.table_slots);
    }
    int64_t differing = 0;
    for (int64_t index = 0; index < kStrip; ++index) differing |= of_strip[index] ^ (of_strip[0] + index);
    in_order[strip] = differing == 0;
  }
  const auto& circle = Circle<Number>::instance();
  const int64_t pairs = keys.dim / 2;
  for (int64_t line = 0; line < pairs; ++line) {
    const uint8_t* from = keys.table + line * keys.table_stride;
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t* of_strip = found + strip * kStrip;
      alignas(64) uint8_t steps[kStrip];
      if (in_order[strip]) {
        std::memcpy(steps, from + of_strip[0], kStrip);
      } else {
        for (int index = 0; index < kStrip; ++index) steps[index] = from[of_strip[index]];
      }
      Number* turns = to + (strip * keys.dim + line) * kStrip;
      look_up<Number>(circle.cosines, steps, turns);
      look_up<Number>(circle.sines, steps, turns + pairs * kStrip);
    }
  }
}

// Reads the keys of a tile, a strip at a time.
template <class In>
class KeyReader {
  using Query = typename In::Query;
  using Vector = typename In::Vector;
  static constexpr int kTogether = In::kInPairs ? 2 : 1, kSpare = 2;  // one at the end of either kind of columns

 public:
  // In numbers.
  static int64_t memory_size(const Keys& keys, const Codec& codec) {
    if (keys.dim == 0) return 0;
    const int64_t columns = FoldedKeys(keys, codec).columns + kSpare;
    return kStrip + columns * kStrip * sizeof(Query) / sizeof(float) + (keys.turns ? 0 : turns_size(keys));
  }

  KeyReader(const Keys& keys, const Codec& codec, float* memory)
      : keys_(keys), codec_(codec), folded_(keys, codec), gains_(memory) {
    columns_ = reinterpret_cast<Query*>(memory + kStrip);
    turns_ = keys.turns ? reinterpret_cast<Query*>(keys.turns) : columns_ + (folded_.columns + kSpare) * kStrip;
#if KVSPLICE_TILES
    by_tiles_ = In::kInPairs && folded_.is_whole(keys) && has_tiles();
#endif
  }

  static Query* as_turns(float* memory) { return reinterpret_cast<Query*>(memory); }
  // In numbers: turns of a tile.
  static int64_t turns_size(const Keys& keys) {
    return kMostStrips * keys.dim * kStrip * sizeof(Query) / sizeof(float);
  }

  // To be called before a tile is read: `count` rows from `row` on.
  void prepare(int64_t sequence, int64_t row, int64_t count) const {
    if (keys_.turns == nullptr) take_turns(keys_, sequence, row, count, turns_);
  }

  // Turned keys as columns, [P, kStrip], of the lines of one strip of the tile. `read_already`: all columns of the
  // codec, or null.
  void read(const uint8_t* lines, int64_t strip, const Query* read_already, Query* to) const {
    const int64_t coded = codec_.coded - codec_.gained, gained = folded_.gained;
    const auto at = [&](int64_t column) { return columns_ + folded_.places[column] * kStrip; };
    if (!read_already) {
      clear_gaps();
      coded_columns<Query>(codec_, lines, codec_.gained, codec_.coded,
                           [&](int64_t column) { return at(column - codec_.gained); });
      raw_columns<Query>(codec_, lines, codec_.gained_raw, codec_.raw,
                         [&](int64_t column) { return at(coded + column - codec_.gained_raw); });
    }
    for (int index = 0; index < kStrip && folded_.gained; ++index) {
      gains_[row_at<Query>(index)] = codec_.gains[lines[codec_.has_gain * kStrip + index]];
    }
    if constexpr (In::kInPairs) {
      const int64_t count = round_up(gained, 2) + round_up(folded_.columns - gained, 2);
      read_already ? pair_columns(read_already, folded_.sources, columns_, count) : pair_columns(columns_, count);
    }
    const Query* turns = turns_ + strip * keys_.dim * kStrip;
#if KVSPLICE_TILES
    if constexpr (In::kInPairs) {
      if (by_tiles_) return read_by_tiles(turns, to);
    }
#endif
    const bool direct = read_already && !In::kInPairs;
    for (int64_t group = 0; group < folded_.groups; ++group) {
      for (int first = 0; first < kStrip; first += InOrder<In>::kRows) {
        if (direct) {
          read_group(
              turns, group, first, [&](int32_t unit) { return read_already + folded_.sources[unit] * kStrip; }, to);
        } else {
          read_group(turns, group, first, [&](int32_t unit) { return columns_ + unit * (kTogether * kStrip); }, to);
        }
      }
    }
  }

 private:
  // A column that has no other beside it is multiplied with another that is 0.
  void clear_gaps() const {
    const int64_t gained = folded_.gained, others = folded_.columns - gained, start = round_up(gained, kTogether);
    if (gained < start) std::memset(columns_ + gained * kStrip, 0, kStrip * sizeof(Query));
    if (others % kTogether) std::memset(columns_ + (start + others) * kStrip, 0, kStrip * sizeof(Query));
  }

  // The numbers of a group of pairs, of the rows from `first` on.
  template <class At>
  void read_group(const Query* turns, int64_t group, int first, At&& at, Query* to) const {
    using Order = InOrder<In>;
    constexpr int vectors = Order::kVectors;
    Floats sums[kDecodedTogether][vectors] = {};
    const int32_t *units = folded_.units + group * folded_.units_in_all, *counts = folded_.counts + 2 * group;
    const uint32_t* weights = folded_.weights + group * folded_.units_in_all * kDecodedTogether;
    const auto add = [&](int64_t count) {
      for (int64_t index = 0; index < count; ++index, ++units, weights += kDecodedTogether) {
        const Query* column = at(*units) + first * kTogether;
        for (int vector = 0; vector < vectors; ++vector) {
          const Vector numbers = kept(In::of(column + vector * In::kNumbers));
          for (int number = 0; number < kDecodedTogether; ++number) {
            sums[number][vector] = In::add(sums[number][vector], In::all_of(weights + number), numbers);
          }
        }
      }
    };
    add(counts[0]);
    if (counts[0]) {
      Floats gains[vectors];
      Order::read(gains_ + first, gains);
      for (auto& of_number : sums) {
        for (int vector = 0; vector < vectors; ++vector) of_number[vector] *= gains[vector];
      }
    }
    add(counts[1]);
    const int64_t pair = group * kTurnedTogether;
    for (int index = 0; index < kTurnedTogether && pair + index < keys_.dim / 2; ++index) {
      const float* means = folded_.means + 2 * (pair + index);
      turn(turns + (pair + index) * kStrip + first, keys_.dim / 2 * kStrip, means, sums[2 * index], sums[2 * index + 1],
           to + 2 * (pair + index) * kStrip + first);
    }
  }

#if KVSPLICE_TILES
  // All numbers of all rows of a strip, 16 by 16.
  void read_by_tiles(const Query* turns, Query* to) const {
    using Order = InOrder<In>;
    constexpr int vectors = Order::kVectors;
    const bool gained = folded_.counts[0] > 0;
    Floats gains[vectors];
    if (gained) Order::read(gains_, gains);
    const Tiles tiles(folded_.counts[0] + folded_.counts[1]);
    alignas(64) float sums[vectors * kTile16 * kTile16];
    for (int64_t block = 0; block < keys_.dim; block += kTile16) {
      tiles.multiply(folded_.tiles + block * folded_.tile_line, folded_.tile_line, columns_, sums);
      for (int64_t number = 0; number < kTile16; number += 2) {
        Floats one[vectors], other[vectors];
        for (int vector = 0; vector < vectors; ++vector) {
          const float* of_pair = sums + (vector * kTile16 + number) * kTile16;
          one[vector] = floats(of_pair), other[vector] = floats(of_pair + kTile16);
          if (gained) one[vector] *= gains[vector], other[vector] *= gains[vector];
        }
        const int64_t at = block + number;
        turn(turns + at / 2 * kStrip, keys_.dim / 2 * kStrip, folded_.means + at, one, other, to + at * kStrip);
      }
    }
  }
#endif

  // One pair: its two numbers without their means, to its two columns.
  static void turn(const Query* cosines, int64_t sines, const float* means, const Floats* one, const Floats* other,
                   Query* to) {
    using Order = InOrder<In>;
    constexpr int vectors = Order::kVectors;
    Floats cosine[vectors], sine[vectors], first[vectors], second[vectors];
    Order::read(cosines, cosine);
    Order::read(cosines + sines, sine);
    for (int vector = 0; vector < vectors; ++vector) {
      const Floats a = one[vector] + means[0], b = other[vector] + means[1];
      first[vector] = a * cosine[vector] - b * sine[vector];
      second[vector] = a * sine[vector] + b * cosine[vector];
    }
    Order::write(first, to);
    Order::write(second, to + kStrip);
  }

  const Keys& keys_;
  const Codec& codec_;
  const FoldedKeys folded_;
  float* gains_;    // of the keys of a strip
  Query* columns_;  // of their codes
  Query* turns_;    // see `take_turns`
#if KVSPLICE_TILES
  bool by_tiles_;
#endif
};

}  // namespace kvsplice
