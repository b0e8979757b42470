// Keys that were coded before their rotation: what is prepared of them once for all rows. See `kvsplice_hf.code.keys`
// for the rotation, and turned.h for what is done to each strip of rows.
//
// Legend: P numbers of a key, p of its code, F = P / 2 pairs that are turned.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.h"
#include "packed.h"
#include "products.h"
#include "tiles.h"
#include "weights.h"

namespace kvsplice {

// A key is R(slot) (expand key_code + mean), where R turns the two numbers of each pair.
struct Keys {
  int64_t dim, rank;     // P and p; 0 where rows hold rotated keys
  int64_t start;         // where in a row the code of its key begins
  Numbers expand, mean;  // [P, p] and [P]
  const int64_t* pairs;  // which numbers are turned together, [2, F]
  const uint8_t* table;  // the angles of each slot, in steps: [F, slots]
  int64_t table_stride, table_slots;
  const int32_t* slots;  // of each row, [B, S]
  int64_t slots_stride;  // from one sequence to the next
  float* room;           // as many numbers as `folded_size` says
  float* turns;          // cosines and sines of the tile that is read, which others have taken; or null

  // Turned keys come pair by pair: which number of a key is at `place`.
  int64_t number_of(int64_t place) const { return clamped(pairs[place % 2 * (dim / 2) + place / 2], dim); }
};

// An angle counts in so many steps of a circle.
constexpr int kSteps = 64;

// Cosines and sines of all angles.
template <class Number>
struct Circle {
  alignas(64) Number cosines[kSteps], sines[kSteps];

  static const Circle& instance() {
    static const Circle circle;
    return circle;
  }

 private:
  Circle() {
    for (int step = 0; step < kSteps; ++step) {
      const double angle = 2 * 3.14159265358979323846 * step / kSteps;
      set(cosines[step], static_cast<float>(std::cos(angle)));
      set(sines[step], static_cast<float>(std::sin(angle)));
    }
  }
};

// Pairs that are decoded together: their sums stay in registers, and zeros of `expand` are skipped in blocks of as
// many.
constexpr int kTurnedTogether = 2, kDecodedTogether = 2 * kTurnedTogether;

// Columns of keys are multiplied alone, or where products are of bf16 numbers two by two: in units. Of the units, those
// with the gain of keys come first. For each group of pairs there is a list of the units that are not 0 for it.
struct FoldedKeys {
  int64_t columns, gained, groups, units_in_all;  // columns of keys, and how many of them have their gain
  float* means;                                   // [groups, kDecodedTogether]
  uint32_t* weights;                              // [groups, units, kDecodedTogether]: a number or two of bf16
  uint32_t* masks;                                // which groups a column is not 0 for, [columns]
  int32_t* places;                                // where a column is put, [columns]
  int32_t* sources;                               // which column of the codec is there, or -1; [2 units]
  int32_t* units;                                 // [groups, units]
  int32_t* listed;                                // where in that list a unit is, [groups, units]
  int32_t* counts;                                // of units with and without a gain, [groups, 2]
  int64_t tile_line;                              // units, filled up to whole tiles
  uint32_t* tiles;                                // the weights of each number side by side, [P, tile_line]
  float* rest;

  FoldedKeys(const Keys& keys, const Codec& codec) {
    columns = codec.coded - codec.gained + codec.raw - codec.gained_raw;
    gained = codec.key_gained;
    groups = blocks_of(keys.dim / 2, kTurnedTogether);
    // As many as there are whatever is a unit: one may be half empty at the end of either kind.
    units_in_all = columns + 2;
    means = keys.room;
    weights = reinterpret_cast<uint32_t*>(means + groups * kDecodedTogether);
    masks = weights + groups * units_in_all * kDecodedTogether;
    places = reinterpret_cast<int32_t*>(masks + columns);
    sources = places + columns;
    units = sources + 2 * units_in_all;
    listed = units + groups * units_in_all;
    counts = listed + groups * units_in_all;
    tile_line = KVSPLICE_TILES ? round_up(units_in_all, kTile16) : 0;
    tiles = reinterpret_cast<uint32_t*>(counts + 2 * groups);
    rest = reinterpret_cast<float*>(tiles + groups * kDecodedTogether * tile_line);
  }

  // Whether all numbers are of all units, which all have the gain of keys, or none: then tiles may multiply them.
  bool is_whole(const Keys& keys) const {
    bool whole = tile_line && keys.dim % kTile16 == 0 && counts[0] + counts[1] > 0;
    for (int64_t group = 0; group < groups && whole; ++group) {
      const int32_t *of_group = counts + 2 * group, listed_there = of_group[0] + of_group[1];
      whole = listed_there == counts[0] + counts[1] && (of_group[0] == 0 || of_group[1] == 0) &&
              units[group * units_in_all + listed_there - 1] == listed_there - 1;
    }
    return whole;
  }

  // Which column of the codec is that of a key.
  static int64_t codec_column(const Codec& codec, int64_t column) {
    const int64_t coded = codec.coded - codec.gained;
    return column < coded ? codec.gained + column : codec.coded + codec.gained_raw + column - coded;
  }
};

inline int64_t folded_size(const Keys& keys, const Codec& codec) {
  return keys.dim ? FoldedKeys(keys, codec).rest - keys.room : 0;
}

// What a column adds to the number of a key that comes at `place`.
inline float weight_of(const Keys& keys, const Codec& codec, int64_t rank, int64_t column, int64_t place) {
  const int64_t as_read = FoldedKeys::codec_column(codec, column);
  const int64_t number = clamped(codec.index[as_read] - rank, keys.rank);
  return number_at(keys.expand, keys.number_of(place) * keys.rank + number) * codec.scale(as_read);
}

inline void mark_column(const Keys& keys, const Codec& codec, int64_t rank, const FoldedKeys& folded, int64_t column) {
  uint32_t mask = 0;
  for (int64_t place = 0; place < keys.dim; ++place) {
    const bool counts = weight_of(keys, codec, rank, column, place) != 0.0f;
    // The last bit stands for all groups behind as well.
    mask |= uint32_t{counts} << smaller(place / kDecodedTogether, 31);
  }
  folded.masks[column] = mask;
}

// Columns that are 0 for the same groups side by side.
template <class In>
void place_columns(const Codec& codec, const FoldedKeys& folded) {
  constexpr int together = In::kInPairs ? 2 : 1;
  int32_t* order = folded.listed;  // which is not written yet
  for (int32_t column = 0; column < folded.columns; ++column) order[column] = column;
  const auto by_mask = [&](int32_t one, int32_t other) { return folded.masks[one] < folded.masks[other]; };
  std::stable_sort(order, order + folded.gained, by_mask);
  std::stable_sort(order + folded.gained, order + folded.columns, by_mask);
  const int64_t gap = round_up(folded.gained, together) - folded.gained;
  std::fill_n(folded.sources, 2 * folded.units_in_all, -1);
  for (int32_t index = 0; index < folded.columns; ++index) {
    const auto place = static_cast<int32_t>(index + (index < folded.gained ? 0 : gap));
    folded.places[order[index]] = place;
    folded.sources[place] = static_cast<int32_t>(FoldedKeys::codec_column(codec, order[index]));
  }
}

// Lists the units of one group of pairs. Where each is in that list is left in `listed`, and -1 for those that are not.
template <class In>
void list_units(const FoldedKeys& folded, int64_t group, int32_t* listed) {
  constexpr int together = In::kInPairs ? 2 : 1;
  int32_t *units = folded.units + group * folded.units_in_all, *counts = folded.counts + 2 * group;
  const int64_t gained = blocks_of(folded.gained, together);
  const int64_t in_all = gained + blocks_of(folded.columns - folded.gained, together);
  std::fill_n(listed, in_all, -1);
  for (int64_t column = 0; column < folded.columns; ++column) {
    if (folded.masks[column] >> smaller(group, 31) & 1) listed[folded.places[column] / together] = 0;
  }
  counts[0] = counts[1] = 0;
  for (int64_t unit = 0; unit < in_all; ++unit) {
    if (listed[unit] < 0) continue;
    listed[unit] = counts[0] + counts[1];
    ++counts[unit >= gained];
    units[listed[unit]] = static_cast<int32_t>(unit);
  }
}

// The units, weights and means of one group of pairs.
template <class In>
void fold_group(const Keys& keys, const Codec& codec, int64_t rank, const FoldedKeys& folded, int64_t group) {
  constexpr int together = In::kInPairs ? 2 : 1;
  int32_t* listed = folded.listed + group * folded.units_in_all;
  list_units<In>(folded, group, listed);
  uint32_t* weights = folded.weights + group * folded.units_in_all * kDecodedTogether;
  std::memset(weights, 0, folded.units_in_all * kDecodedTogether * sizeof(uint32_t));
  const int64_t first = group * kDecodedTogether, present = smaller(kDecodedTogether, keys.dim - first);
  for (int64_t column = 0; column < folded.columns; ++column) {
    const int64_t place = folded.places[column], unit = listed[place / together];
    for (int64_t index = 0; index < present && unit >= 0; ++index) {
      auto* of_unit = reinterpret_cast<typename In::Query*>(weights + unit * kDecodedTogether + index);
      set(of_unit[place % together], weight_of(keys, codec, rank, column, first + index));
    }
  }
  for (int64_t index = 0; index < kDecodedTogether; ++index) {
    uint32_t* line = folded.tiles + (first + index) * folded.tile_line;
    for (int64_t unit = 0; unit < folded.tile_line; ++unit) {
      line[unit] = unit < folded.units_in_all ? weights[unit * kDecodedTogether + index] : 0;
    }
  }
  for (int64_t index = 0; index < present; ++index) {
    const int64_t number = keys.number_of(first + index);
    float mean = number_at(keys.mean, number);
    for (int64_t code = 0; code < keys.rank; ++code) {
      mean += number_at(keys.expand, number * keys.rank + code) * codec.base(rank + code);
    }
    folded.means[first + index] = mean;
  }
}

// Called by all threads of a parallel region; `rank` numbers of a row are of its latent.
template <class In>
void fold_keys(const Keys& keys, const Codec& codec, int64_t rank) {
  const FoldedKeys folded(keys, codec);
#pragma omp for schedule(static)
  for (int64_t column = 0; column < folded.columns; ++column) mark_column(keys, codec, rank, folded, column);
#pragma omp single
  place_columns<In>(codec, folded);
#pragma omp for schedule(static)
  for (int64_t group = 0; group < folded.groups; ++group) fold_group<In>(keys, codec, rank, folded, group);
}

}  // namespace kvsplice
