// Rows of ordinary attention read back, on the CPU: keys and values of all key heads of a layer, for a prompt that
// attends to them with the stock attention function.
//
// Legend: as in heads.h.
#pragma once

#include "heads.h"

namespace kvsplice {

// A tensor of float32 or bf16 numbers that is written.
struct Written {
  void* data;
  int64_t is_bfloat16;

  template <class Write>
  void with_type(Write&& write) const {
    is_bfloat16 ? write(static_cast<Bfloat16*>(data)) : write(static_cast<float*>(data));
  }
};

struct HeadsReading {
  HeadsDecoding stored;  // the rows: what belongs to queries and exact tokens is not looked at, and G is 0
  Written keys, values;  // [B, K, S, d] and [B, K, S, v]
  float* room;           // as many numbers as `room_of` says
};

// What values are of columns, times their gains: `W` [v, mixed], and what they are without.
struct ValueWeights {
  float *weights, *constants, *rest;

  ValueWeights(const HeadsReading& given, const Problem& problem, float* room) {
    weights = room;
    constants = weights + given.stored.value * problem.mixed;
    rest = constants + given.stored.value;
  }
};

inline int64_t room_of_values(const HeadsReading& given) {
  int64_t most = 0;
  for (int64_t index = 0; index < given.stored.count; ++index) {
    const int64_t room = ValueWeights(given, head_problem(given.stored, index), given.room).rest - given.room;
    most = most < room ? room : most;
  }
  return most;
}

inline int64_t room_of(const HeadsReading& given) { return given.stored.count * room_of_values(given); }

inline ValueWeights weights_of(const HeadsReading& given, const Problem& problem, int64_t index) {
  return ValueWeights(given, problem, given.room + index * room_of_values(given));
}

inline void fold_values(const HeadsReading& given, int64_t index) {
  const Problem problem = head_problem(given.stored, index);
  const ValueWeights folded = weights_of(given, problem, index);
  const Transform transform = ready_transform(given.stored.heads[index]);
  const Numbers& expand = given.stored.heads[index].coding.expand;
  for (int64_t number = 0; number < given.stored.value; ++number) {
    float divisor, offset;
    invert(transform, number, divisor, offset);
    const auto weight = [&](int64_t code) { return number_at(expand, number * problem.values + code) / divisor; };
    for (int64_t code = 0; code < problem.values; ++code) offset += weight(code) * problem.codec.base(code);
    folded.constants[number] = offset;
    for (int64_t column = 0; column < problem.mixed; ++column) {
      const int64_t code = problem.codec.index[problem.codec_column(column)];
      const bool counts = code < problem.values;
      folded.weights[number * problem.mixed + column] = counts ? weight(code) * problem.column_scales[column] : 0.0f;
    }
  }
}

constexpr int kReadTogether = 4;  // numbers of a value, whose sums stay in registers

// Some numbers of the values of one strip, from its columns: [kReadTogether, kStrip].
inline void read_values(const Problem& problem, const float* columns, const float* gains, const float* const* weights,
                        const float* constants, float* to) {
  constexpr int vectors = kStrip / kLanes;
  Floats sums[kReadTogether][vectors] = {};
  const auto add = [&](int64_t first, int64_t last) {
    for (int64_t column = first; column < last; ++column) {
      for (int vector = 0; vector < vectors; ++vector) {
        const Floats numbers = floats(columns + column * kStrip + vector * kLanes);
        for (int number = 0; number < kReadTogether; ++number)
          sums[number][vector] += numbers * weights[number][column];
      }
    }
  };
  const int64_t gained = smaller(problem.codec.gained, problem.mixed);
  add(0, gained);
  for (int vector = 0; vector < vectors; ++vector) {
    const Floats gain = floats(gains + vector * kLanes);
    for (auto& of_number : sums) of_number[vector] *= gain;
  }
  add(gained, problem.mixed);
  for (int number = 0; number < kReadTogether; ++number) {
    for (int vector = 0; vector < vectors; ++vector) {
      store(to + number * kStrip + vector * kLanes, sums[number][vector] + constants[number]);
    }
  }
}

// From columns of numbers, each [kStrip], to `count` rows of `width` numbers side by side.
template <class Number>
void write_rows(const float* const* columns, int64_t width, int64_t count, Number* to) {
  for (int64_t row = 0; row < count; ++row, to += width) {
    for (int64_t number = 0; number < width; ++number) set(to[number], columns[number][row]);
  }
}

using ReadRows = PackedRows<InFloats<float>>;

// Room for the numbers of a strip as columns, [kStrip] each, and where those are that are to be written.
struct StripRoom {
  float *values, *keys;
  const float** at;
  float* rest;

  StripRoom(const HeadsDecoding& stored, float* room) {
    values = room;
    keys = values + round_up(stored.value, kReadTogether) * kStrip;
    at = reinterpret_cast<const float**>(keys + stored.key * kStrip);
    rest = reinterpret_cast<float*>(at + std::max(stored.value, stored.key));
  }
};

inline int64_t room_of_strip(const HeadsDecoding& stored) {
  const StripRoom sizes(stored, nullptr);
  return sizes.rest - sizes.values;
}

// Where the numbers of the keys of a strip are: turned already, or else each with a column of its own.
inline void find_keys(const Problem& problem, const float* columns, const float* gains, const StripRoom& strip) {
  const Codec& codec = problem.codec;
  for (int64_t place = 0; place < problem.keys.dim; ++place) {
    strip.at[problem.keys.number_of(place)] = columns + (problem.columns - problem.keys.dim + place) * kStrip;
  }
  if (problem.keys.dim) return;
  for (int64_t number = problem.values; number < problem.dim; ++number) {
    float* to = strip.keys + (number - problem.values) * kStrip;
    std::fill_n(to, kStrip, codec.base(number));
    strip.at[number - problem.values] = to;
  }
  for (int64_t column = 0; column < problem.columns; ++column) {
    const int64_t number = codec.index[column] - problem.values;
    const float *from = columns + column * kStrip, scale = codec.scale(column);
    float* to = strip.keys + number * kStrip;
    for (int row = 0; row < kStrip && number >= 0; ++row) {
      to[row] += scale * from[row] * (column < codec.gained ? gains[row] : 1.0f);
    }
  }
}

// The keys and values of one tile of one head.
inline void read_tile(const HeadsReading& given, const Problem& problem, int64_t index, const Tile& tile, float* memory,
                      const StripRoom& strip) {
  const HeadsDecoding& stored = given.stored;
  const ValueWeights folded = weights_of(given, problem, index);
  const ReadRows rows(problem, tile, memory, nullptr);
  rows.read();
  for (int64_t row = 0; row < tile.count; row += kStrip) {
    const int64_t count = smaller(kStrip, tile.count - row);
    const int64_t place = (tile.sequence * stored.count + index) * stored.rows + tile.first + row;
    for (int64_t number = 0; number < stored.value; number += kReadTogether) {
      const float *weights[kReadTogether], *constants = folded.constants + number;
      float last[kReadTogether] = {};
      for (int64_t one = 0; one < kReadTogether; ++one) {
        const int64_t present = smaller(number + one, stored.value - 1);
        weights[one] = folded.weights + present * problem.mixed, last[one] = folded.constants[present];
      }
      if (number + kReadTogether > stored.value) constants = last;
      read_values(problem, rows.strip(row), rows.gains(row), weights, constants, strip.values + number * kStrip);
    }
    for (int64_t number = 0; number < stored.value; ++number) strip.at[number] = strip.values + number * kStrip;
    given.values.with_type([&](auto* to) { write_rows(strip.at, stored.value, count, to + place * stored.value); });
    find_keys(problem, rows.strip(row), rows.gains(row), strip);
    given.keys.with_type([&](auto* to) { write_rows(strip.at, stored.key, count, to + place * stored.key); });
  }
}

// The same of all heads. Whether there was the memory for it.
inline bool read_tile(const HeadsReading& given, const Tile& tile) {
  using Reader = KeyReader<ReadRows::Kind>;
  thread_local Workspace workspace;
  const HeadsDecoding& stored = given.stored;
  int64_t most = 0, turns_size = 0;
  for (int64_t index = 0; index < stored.count; ++index) {
    const Problem problem = head_problem(stored, index);
    most = std::max(most, ReadRows::memory_size(problem));
    turns_size = std::max(turns_size, Reader::turns_size(problem.keys));
  }
  float* memory = workspace.take(turns_size + most + room_of_strip(stored));
  if (memory == nullptr) return false;
  const StripRoom strip(stored, memory);
  float* turns = strip.rest;
  bool are_taken = false;
  for (int64_t index = 0; index < stored.count; ++index) {
    Problem problem = head_problem(stored, index);
    if (problem.keys.dim) {
      if (!are_taken) take_turns(problem.keys, tile.sequence, tile.first, tile.count, Reader::as_turns(turns));
      are_taken = true;
      problem.keys.turns = turns;
    }
    read_tile(given, problem, index, tile, turns + turns_size, strip);
  }
  return true;
}

// Called by all threads of a parallel region. False in the one that had no memory.
inline bool read_heads(const HeadsReading& given) {
  bool done = true;
#pragma omp for schedule(static)
  for (int64_t index = 0; index < given.stored.count; ++index) fold_values(given, index);
  const int64_t tiles = blocks_of(given.stored.rows, ReadRows::kTile);
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < given.stored.batch * tiles; ++task) {
    const int64_t first = task % tiles * ReadRows::kTile;
    done &= read_tile(given, {task / tiles, first, smaller(ReadRows::kTile, given.stored.rows - first)});
  }
  return done;
}

}  // namespace kvsplice
