// Codes chosen along a trellis, on the CPU: the C++ twin of `kvsplice_hf.code.trellis`, which says what the code is.
#pragma once

#include <omp.h>

#include <cmath>
#include <limits>
#include <utility>

#include "packed.h"

namespace kvsplice {

constexpr int kStates = 64;

// The columns of a trellis. Tables are filled up to a multiple of `kColumnsRead`.
struct Trellis {
  int64_t columns;  // 0 where rows have none
  const float *reaches, *slopes, *starts;
  const float* weights;  // of squared errors
  const uint8_t* widths;
};
constexpr int64_t kColumnsRead = 64;
constexpr float kFarthest = 1e6f;  // as in Python

// Working memory of a search.
struct SearchRoom {
  static constexpr int64_t kNumbersPerColumn = 1 + 4 + 1 + kStates / 4 + 1;

  float* units;        // the numbers of a row over their scales, [columns]
  float* errors;       // [4, columns], by subset
  uint8_t* numbers;    // [columns, 4]: the nearest level of each subset
  uint8_t* from_high;  // [columns, kStates], by lowest bit and the others
  uint8_t* codes;      // [columns]
  int64_t padded;

  static int64_t size(int64_t columns) { return kNumbersPerColumn * round_up(columns, kColumnsRead); }
  SearchRoom(float* memory, int64_t columns) : padded(round_up(columns, kColumnsRead)) {
    const auto take = [&](int64_t per_column) { return std::exchange(memory, memory + per_column * padded); };
    units = take(1);
    errors = take(4);
    numbers = reinterpret_cast<uint8_t*>(take(1));
    from_high = reinterpret_cast<uint8_t*>(take(kStates / 4));
    codes = reinterpret_cast<uint8_t*>(take(1));
  }
};

// Half of the states, as many to a vector as there are lanes. What a step costs a state depends on four of its bits.
constexpr int kHalf = kStates / 2 / kLanes;
constexpr int kPatterns = 16 / kLanes;

// Of state q, one bit says whether a lowest bit of 0 leads to the upper two subsets, and one which of the two it is.
constexpr bool is_upper(int state) { return state & 1; }
constexpr bool is_beside(int state) { return (state >> 1 ^ state >> 3) & 1; }
// The subset that a state and a lowest bit choose: see `_subsets` in Python.
constexpr int subset_of(int state, int bit) {
  return 2 * ((bit ^ state ^ state >> 5) & 1) + ((state >> 1 ^ state >> 3) & 1);
}

template <bool (*of_state)(int)>
inline Ints mask_of(int pattern) {
  Ints mask;
  for (int lane = 0; lane < kLanes; ++lane) mask[lane] = of_state(pattern * kLanes + lane) ? -1 : 0;
  return mask;
}

// One number of each of two vectors in turns: of their first halves, or of their second ones.
template <int first, size_t... lane>
inline Floats interleaved(Floats one, Floats other, std::index_sequence<lane...>) {
  return __builtin_shufflevector(one, other, (first + int{lane / 2} + (lane % 2 ? kLanes : 0))...);
}

// log(x) of x >= 1, to 1e-4: what is looked for with it is compared exactly.
inline Floats rough_log(Floats x) {
  const Ints bits = (Ints)x;
  const Floats power = __builtin_convertvector((bits >> 23) - 127, Floats);
  const Floats rest = (Floats)((bits & 0x007FFFFF) | 0x3F800000) - 1.0f;
  Floats sum = rest * -0.0821343928f + 0.3241003877f;
  sum = sum * rest - 0.6707374452f;
  sum = sum * rest + 1.4287714499f;
  return (power + sum * rest) * 0.69314718f;
}

inline Floats whole_below(Floats x) {
  const Floats cut = __builtin_convertvector(__builtin_convertvector(x, Ints), Floats);
  return cut - (cut > x ? all(1.0f) : Floats{});
}

inline Floats rough_root(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)x);
#else
  Floats root;
  for (int lane = 0; lane < kLanes; ++lane) root[lane] = std::sqrt(x[lane]);
  return root;
#endif
}

// Of each of the four subsets the nearest level to each number, and what it errs.
inline void find_nearest(const Trellis& trellis, const SearchRoom& room) {
  for (int64_t column = 0; column < trellis.columns; column += kLanes) {
    const auto of = [&](const float* numbers) { return floats(numbers + column); };
    const Floats unit = of(room.units), reach = of(trellis.reaches), slope = of(trellis.slopes);
    const Floats start = of(trellis.starts), weight = of(trellis.weights);
    const Floats stretched = unit * reach, size = stretched < 0.0f ? -stretched : stretched;
    const Floats log = rough_log(size + rough_root(size * size + 1.0f));
    // Which number of a level, if there were some between.
    const Floats place = ((stretched < 0.0f ? -log : log) - start) / slope;
    Floats last;
    for (int lane = 0; lane < kLanes; ++lane) last[lane] = (1 << (trellis.widths[column + lane] - 1)) - 1;
    for (int subset = 0; subset < 4; ++subset) {
      const Floats below = whole_below((place - static_cast<float>(subset)) * 0.25f);
      const auto bounded = [&](Floats upper) {
        upper = upper < 0.0f ? Floats{} : upper;
        return (upper > last ? last : upper) * 4.0f + static_cast<float>(subset);
      };
      const auto error_of = [&](Floats number) {
        const Floats apart = unit - sinh_of(number * slope + start) / reach;
        return apart * apart * weight;
      };
      const Floats one = bounded(below), other = bounded(below + 1.0f);
      const Floats error = error_of(one), other_error = error_of(other);
      store(room.errors + subset * room.padded + column, other_error < error ? other_error : error);
      const Ints nearest = __builtin_convertvector(other_error < error ? other : one, Ints);
      for (int lane = 0; lane < kLanes; ++lane) room.numbers[(column + lane) * 4 + subset] = nearest[lane];
    }
  }
}

// The path of least error: forward over the columns (Viterbi), and back.
inline void find_path(const Trellis& trellis, const SearchRoom& room, uint8_t* codes) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  Ints upper[kPatterns], beside[kPatterns];
  for (int pattern = 0; pattern < kPatterns; ++pattern) {
    upper[pattern] = mask_of<is_upper>(pattern), beside[pattern] = mask_of<is_beside>(pattern);
  }
  Floats costs[2 * kHalf];
  for (Floats& of_states : costs) of_states = all(std::numeric_limits<float>::infinity());
  costs[0][0] = 0;
  for (int64_t column = 0; column < trellis.columns; ++column) {
    Floats errors[4], same[kPatterns], opposite[kPatterns], next[2 * kHalf];
    for (int subset = 0; subset < 4; ++subset) errors[subset] = all(room.errors[subset * room.padded + column]);
    for (int pattern = 0; pattern < kPatterns; ++pattern) {
      const Floats low = beside[pattern] ? errors[1] : errors[0], high = beside[pattern] ? errors[3] : errors[2];
      same[pattern] = upper[pattern] ? high : low, opposite[pattern] = upper[pattern] ? low : high;
    }
    uint8_t* from_high = room.from_high + column * kStates;
    for (int vector = 0; vector < kHalf; ++vector) {
      // State q and its twin in the other half lead to the same two states, by subsets that are opposite.
      const Floats low = costs[vector], high = costs[kHalf + vector];
      const Floats with = same[vector % kPatterns], against = opposite[vector % kPatterns];
      const Floats zero_low = low + with, zero_high = high + against;
      const Floats one_low = low + against, one_high = high + with;
      const Floats zero = zero_high < zero_low ? zero_high : zero_low, one = one_high < one_low ? one_high : one_low;
      store(from_high + vector * kLanes, __builtin_convertvector(zero_high < zero_low, Bytes));
      store(from_high + kStates / 2 + vector * kLanes, __builtin_convertvector(one_high < one_low, Bytes));
      next[2 * vector] = interleaved<0>(zero, one, lanes);
      next[2 * vector + 1] = interleaved<kLanes / 2>(zero, one, lanes);
    }
    std::memcpy(costs, next, sizeof costs);
  }
  float ends[kStates];
  std::memcpy(ends, costs, sizeof ends);
  int state = 0;
  for (int other = 1; other < kStates; ++other) state = ends[other] < ends[state] ? other : state;
  for (int64_t column = trellis.columns - 1; column >= 0; --column) {
    const int bit = state & 1, high = room.from_high[column * kStates + bit * (kStates / 2) + state / 2] & 1;
    state = state / 2 + high * (kStates / 2);
    const int number = room.numbers[column * 4 + subset_of(state, bit)];
    codes[column] = (number >> 2) << 1 | bit;
  }
}

// The codes of a row, `unit_of(column)` of which are its numbers over their scales.
template <class Unit>
void search_row(const Trellis& trellis, const SearchRoom& room, Unit&& unit_of, uint8_t* codes) {
  for (int64_t column = 0; column < trellis.columns; ++column) {
    const float unit = unit_of(column);
    room.units[column] = unit == unit ? std::fmin(std::fmax(unit, -kFarthest), kFarthest) : -1.0f;
  }
  for (int64_t column = trellis.columns; column < room.padded; ++column) room.units[column] = 0;
  find_nearest(trellis, room);
  find_path(trellis, room, codes);
}

struct Search {
  int64_t count;
  const float* units;  // [count, columns]
  Trellis trellis;
  uint8_t* codes;  // [count, columns]
  int64_t threads;
  float* room;  // as many numbers as `room_of` says
};

inline int64_t room_of(const Search& given) { return given.threads * SearchRoom::size(given.trellis.columns); }

// Which part of a room for all threads is that of this one.
inline SearchRoom own_room(float* rooms, const Trellis& trellis) {
  return SearchRoom(rooms + omp_get_thread_num() * SearchRoom::size(trellis.columns), trellis.columns);
}

// Called by all threads of a parallel region.
inline void search(const Search& given) {
  const int64_t columns = given.trellis.columns;
  const SearchRoom room = own_room(given.room, given.trellis);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < given.count; ++row) {
    const float* units = given.units + row * columns;
    search_row(given.trellis, room, [&](int64_t column) { return units[column]; }, given.codes + row * columns);
  }
}

}  // namespace kvsplice
