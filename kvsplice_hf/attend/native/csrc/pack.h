// Packing rows into bytes, on the CPU: the C++ twin of `kvsplice_hf.codec.RowCodec.pack`.

#pragma once

#include <algorithm>
#include <cmath>

#include "packed.h"
#include "trellis.h"

namespace kvsplice {

// A codec, and what only packing needs of it.
struct Packer {
  Codec codec;
  int64_t sized;            // how many numbers the gain of a row is taken from
  const float* sigmas;      // [sized]
  int64_t key_sized;        // how many behind them that of its key is taken from
  const float* key_sigmas;  // [key_sized]
  const float* bends;       // [n]; 0 where levels are equally far apart
  int64_t numbers;          // n
  Trellis chains[2];        // of the columns that share the gain, and of those behind

  // Of the longer one, which working memory is for.
  const Trellis& longest() const { return chains[0].columns > chains[1].columns ? chains[0] : chains[1]; }
};

struct Packing {
  int64_t count, dim;  // rows, and numbers of each
  const float* rows;   // [count, dim]
  uint8_t* packed;     // [count, row_bytes]
  Packer packer;
  int64_t threads;
  float* room;  // as many numbers as `room_of` says
};

inline int64_t room_of(const Packing& given) {
  return given.threads * SearchRoom::size(given.packer.longest().columns);
}

constexpr float kGainSteps = 16.0f, kGainOne = 128.0f;

// Of `count` numbers from `first` on.
inline uint8_t gain_of(const Codec& codec, const float* row, int64_t first, int64_t count, const float* sigmas) {
  float sum = 0;
  for (int64_t index = 0; index < count; ++index) {
    const float relative = (row[first + index] - codec.centres[first + index]) / sigmas[index];
    sum += relative * relative;
  }
  const float size = std::fmax(std::sqrt(sum / count), 1e-30f);
  return std::fmin(std::fmax(std::nearbyint(kGainSteps * std::log2(size) + kGainOne), 0.0f), 255.0f);
}

// A number over its scale.
inline float unit_of(const Codec& codec, const float* row, int64_t column, float gain) {
  const int64_t number = codec.index[column];
  return (row[number] - codec.centres[number]) / (codec.scales[number] * gain);
}

inline uint8_t code_of(const Packer& packer, const float* row, int64_t column, float gain) {
  const float bend = packer.bends[packer.codec.index[column]];
  float unit = unit_of(packer.codec, row, column, gain);
  if (bend > 0) unit = std::asinh(unit * packer.codec.reaches[column]) / bend;
  const float levels = 1 << packer.codec.width(column);
  // Written so that what is not a number gets the lowest code.
  return std::fmin(std::fmax(std::floor((unit + 1) * (levels / 2)), 0.0f), levels - 1);
}

inline void write_code(const Codec& codec, int64_t column, uint8_t code, uint8_t* packed) {
  const Field* fields = codec.fields + column * kMostFields;
  for (int index = 0; index < kMostFields && fields[index].bits; ++index) {
    const Field& field = fields[index];
    packed[field.byte] |= (code >> field.place & ((1 << field.bits) - 1)) << field.shift;
  }
}

// Codes that a search along a trellis has found, or will.
struct Found {
  uint8_t* codes;  // of the columns of one chain
  bool is_known;
};

// Calls `each(column, code)` for the columns of one of the chains, and those beside them that are rounded.
// `gain_of_column(column)` multiplies their scales.
template <class Gain, class Each>
void each_code(const Packer& packer, const float* row, int chain, Gain&& gain_of_column, const SearchRoom& room,
               const Found& found, Each&& each) {
  const Codec& codec = packer.codec;
  const int64_t first = chain ? codec.gained : 0, last = chain ? codec.coded : codec.gained;
  int64_t next = first, searched = 0;
  const auto unit = [&](int64_t) {
    while (!codec.in_trellis(next)) ++next;
    const int64_t column = next++;
    return unit_of(codec, row, column, gain_of_column(column));
  };
  if (packer.chains[chain].columns && !found.is_known) search_row(packer.chains[chain], room, unit, found.codes);
  for (int64_t column = first; column < last; ++column) {
    each(column,
         codec.in_trellis(column) ? found.codes[searched++] : code_of(packer, row, column, gain_of_column(column)));
  }
}

// `known`: the codes of the second chain, where they were found already; or null.
inline void pack_row(const Packer& packer, const float* row, uint8_t* packed, const SearchRoom& room,
                     uint8_t* known = nullptr) {
  const Codec& codec = packer.codec;
  std::fill_n(packed, codec.row_bytes, uint8_t{0});
  float gain = 1.0f, key_gain = 1.0f;
  if (codec.has_gain) {
    packed[0] = gain_of(codec, row, 0, packer.sized, packer.sigmas);
    gain = codec.gains[packed[0]];
  }
  if (codec.has_key_gain) {
    uint8_t& byte = packed[codec.has_gain];
    byte = gain_of(codec, row, packer.sized, packer.key_sized, packer.key_sigmas);
    key_gain = codec.gains[byte];
  }
  for (int64_t index = 0; index < codec.raw; ++index) {
    const Bfloat16 half = to_bfloat16(row[codec.index[codec.coded + index]]);
    std::memcpy(packed + codec.gain_bytes() + 2 * index, &half, sizeof half);
  }
  const auto gain_of_column = [&](int64_t column) {
    const int64_t behind = column - codec.gained;
    return behind < 0 ? gain : behind < codec.key_gained ? key_gain : 1.0f;
  };
  for (int chain = 0; chain < 2; ++chain) {
    const Found found = chain && known ? Found{known, true} : Found{room.codes, false};
    each_code(packer, row, chain, gain_of_column, room, found,
              [&](int64_t column, uint8_t code) { write_code(codec, column, code, packed); });
  }
}

// What packing leaves of the numbers of a row from `start` on, which do not share the gain: see `RowCodec.behind`.
// What is found along the trellis is left in `codes`.
inline void read_back(const Packer& packer, const float* row, int64_t start, float* kept, const SearchRoom& room,
                      uint8_t* codes) {
  const Codec& codec = packer.codec;
  float key_gain = 1.0f;
  if (codec.has_key_gain)
    key_gain = codec.gains[gain_of(codec, row, packer.sized, packer.key_sized, packer.key_sigmas)];
  const auto gain_of_column = [&](int64_t column) {
    return column < codec.gained + codec.key_gained ? key_gain : 1.0f;
  };
  const int64_t numbers = packer.numbers - start;
  for (int64_t number = 0; number < numbers; ++number) kept[number] = codec.base(start + number);
  for (int64_t index = codec.gained_raw; index < codec.raw; ++index) {
    const int64_t number = codec.index[codec.coded + index];
    kept[number - start] = number_of(to_bfloat16(row[number]));
  }
  uint32_t lowest = 0;  // bits of the columns before, the last one first
  each_code(packer, row, 1, gain_of_column, room, {codes, false}, [&](int64_t column, int code) {
    int level = code;
    if (codec.in_trellis(column)) {
      lowest = lowest << 1 | (code & 1);
      level = (code >> 1) << 2 | ((lowest ^ lowest >> 1 ^ lowest >> 6) & 1) << 1 | ((lowest >> 2 ^ lowest >> 4) & 1);
    }
    const float bent = sinh_of(all(codec.slopes[column] * level + codec.starts[column]))[0];
    kept[codec.index[column] - start] += gain_of_column(column) * codec.scale(column) * bent;
  });
}

// Called by all threads of a parallel region.
inline void pack(const Packing& packing) {
  const SearchRoom room = own_room(packing.room, packing.packer.longest());
#pragma omp for schedule(static)
  for (int64_t row = 0; row < packing.count; ++row) {
    pack_row(packing.packer, packing.rows + row * packing.dim, packing.packed + row * packing.packer.codec.row_bytes,
             room);
  }
}

}  // namespace kvsplice
