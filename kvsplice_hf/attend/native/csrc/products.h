// The products that attention is made of, over blocks of numbers that fit into the registers of a processor.
#pragma once

#include "lanes.h"
#include "packed.h"
#include "twins.h"

namespace kvsplice {

#if KVSPLICE_LANES == 8  // sixteen registers instead of thirty-two
constexpr int kRowVectors = 2, kScoredTogether = 6, kMixedTogether = 3;
#else
constexpr int kRowVectors = 4, kScoredTogether = 6, kMixedTogether = 6;
#endif
constexpr int kSummedTogether = 4;
constexpr int kStretch = kLanes == 8 ? 8 : 16;  // vectors that one query takes of a row
static_assert(kRowVectors * kLanes <= kStrip && kSummedTogether <= kLanes);

// Memory that is wanted next, asked for a line at a time between products: asked for at once, it would have to be
// waited for; and tiles are read in an order that a processor does not foresee.
struct Ahead {
  static constexpr int kLine = 64;
  const uint8_t *next = nullptr, *end = nullptr;

  void ask() {
    if (next < end) {
      __builtin_prefetch(next, 0, 2);
      next += kLine;
    }
  }
};

// Calls `run<count>(first)` for groups of at most `most` of `total` things, of nearly the same size.
template <int most, class Run>
inline void in_groups(int64_t total, Run&& run) {
  for (int64_t first = 0, count; first < total; first += count) {
    const int64_t left = total - first;
    count = blocks_of(left, blocks_of(left, most));
    switch (count) {
      case 1:
        run.template operator()<1>(first);
        break;
      case 2:
        if constexpr (most >= 2) run.template operator()<2>(first);
        break;
      case 3:
        if constexpr (most >= 3) run.template operator()<3>(first);
        break;
      case 4:
        if constexpr (most >= 4) run.template operator()<4>(first);
        break;
      case 5:
        if constexpr (most >= 5) run.template operator()<5>(first);
        break;
      case 6:
        if constexpr (most >= 6) run.template operator()<6>(first);
        break;
    }
  }
}

// What products are taken of: numbers of rows and of queries, vectors of them, and their products added to sums.
template <class Row>
struct InFloats {
  using Number = Row;
  using Query = float;
  using Vector = Floats;
  static constexpr int kNumbers = kLanes;  // of a vector
  static constexpr bool kInPairs = false;
  static constexpr int kMixedVectors = 4;  // of a row, that are mixed together

  static Vector of(const float* from) { return floats(from); }
  static Vector of(const Bfloat16* from) { return floats(from); }
  // What a vector has in each place, from four bytes.
  static Vector all_of(const void* from) { return all(load<float>(from)); }
  template <class Any>
  static Vector first_of(const Any* from, int64_t count) {
    return first_floats(from, count);
  }
  static Floats add(Floats sums, Vector one, Vector other) { return sums + one * other; }
};

#if KVSPLICE_TWINS
struct InTwins {
  using Number = Bfloat16;
  using Query = Bfloat16;
  using Vector = Twins;
  static constexpr int kNumbers = kTwins;
  static constexpr bool kInPairs = true;
  static constexpr int kMixedVectors = 2;

  static Vector of(const Bfloat16* from) { return twins(from); }
  static Vector all_of(const void* from) { return (Twins)_mm512_set1_epi32(load<int32_t>(from)); }
  static Vector first_of(const Bfloat16* from, int64_t count) { return first_twins(from, count); }
  static Floats add(Floats sums, Vector one, Vector other) { return add_products(sums, one, other); }
};
#endif

// ---- Columns: [column][row], in strips of kStrip rows

// Scores of kRowVectors vectors of rows: sums over columns, those with the gain of their row first.
template <int heads>
void score_columns(const float* columns, int64_t gained, int64_t count, const float* query, int64_t query_stride,
                   const float* gains, float* scores, int64_t scores_stride, Ahead& ahead) {
  Floats products[heads][kRowVectors] = {};
  auto add = [&](int64_t first, int64_t last) {
    for (int64_t column = first; column < last; ++column) {
      ahead.ask();
      for (int head = 0; head < heads; ++head) {
        const Floats of_query = all(query[column * query_stride + head]);
        for (int index = 0; index < kRowVectors; ++index) {
          products[head][index] += of_query * floats(columns + column * kStrip + index * kLanes);
        }
      }
    }
  };
  add(0, gained);
  for (int head = 0; head < heads; ++head) {
    for (int index = 0; index < kRowVectors; ++index) products[head][index] *= floats(gains + index * kLanes);
  }
  add(gained, count);
  for (int head = 0; head < heads; ++head) {
    for (int index = 0; index < kRowVectors; ++index) {
      store(scores + head * scores_stride + index * kLanes, products[head][index]);
    }
  }
}

#if KVSPLICE_TWINS
// The same for kStrip rows of bf16 numbers, columns in pairs: [pair][query_stride] pairs of the query, those of the
// columns with a gain first. The pair that only the first column of has a gain comes twice, with a 0 in place of the
// other.
template <int heads>
void score_column_pairs(const Bfloat16* columns, int64_t gained, int64_t count, const Bfloat16* query,
                        int64_t query_stride, const float* gains, float* scores, int64_t scores_stride, Ahead& ahead) {
  static_assert(kStrip == 2 * kTwins);
  Floats products[heads][4] = {};
  auto add = [&](int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; ++pair, query += 2 * query_stride) {
      ahead.ask();
      const Bfloat16 *one = columns + 2 * pair * kStrip, *other = one + kStrip;
      const Twins front = twins(one), behind = twins(one + kTwins);
      const Twins pairs[4] = {kept(low_pairs(front, twins(other))), kept(high_pairs(front, twins(other))),
                              kept(low_pairs(behind, twins(other + kTwins))),
                              kept(high_pairs(behind, twins(other + kTwins)))};
      for (int head = 0; head < heads; ++head) {
        const Twins of_query = all_twins(query + 2 * head);
        for (int index = 0; index < 4; ++index) {
          products[head][index] = add_products(products[head][index], of_query, pairs[index]);
        }
      }
    }
  };
  add(0, blocks_of(gained, 2));
  for (int index = 0; index < 4; index += 2) {
    const Floats first = floats(gains + index * kLanes), second = floats(gains + (index + 1) * kLanes);
    for (int head = 0; head < heads; ++head) {
      products[head][index] *= low_of(first, second);
      products[head][index + 1] *= high_of(first, second);
    }
  }
  add(gained / 2, blocks_of(count, 2));
  for (int head = 0; head < heads; ++head) {
    for (int index = 0; index < 4; index += 2) {
      const Floats low = products[head][index], high = products[head][index + 1];
      store(scores + head * scores_stride + index * kLanes, first_of(low, high));
      store(scores + head * scores_stride + (index + 1) * kLanes, second_of(low, high));
    }
  }
}
#endif

// Adds weighted columns to sums: as many columns of `heads` query rows as give kLanes sums, `present` of which count.
template <class In, int heads>
void mix_columns(const typename In::Query* columns, int64_t strip_stride, int64_t strips, int64_t present,
                 const typename In::Query* weights, int64_t weights_stride, float* sums, int64_t sums_stride) {
  constexpr int together = kLanes / heads;
  Floats products[kLanes] = {};
  for (int64_t strip = 0; strip < strips; ++strip, columns += strip_stride, weights += kStrip) {
    for (int row = 0; row < kStrip; row += In::kNumbers) {
      typename In::Vector weight[heads];
      for (int head = 0; head < heads; ++head) weight[head] = kept(In::of(weights + head * weights_stride + row));
      for (int column = 0; column < together; ++column) {
        const auto numbers = kept(In::of(columns + column * kStrip + row));
        for (int head = 0; head < heads; ++head) {
          Floats& sum = products[head * together + column];
          sum = In::add(sum, weight[head], numbers);
        }
      }
    }
  }
  alignas(64) float found[kLanes];
  store(found, lane_sums(products));
  for (int head = 0; head < heads; ++head) {
    for (int64_t column = 0; column < smaller(together, present); ++column) {
      sums[head * sums_stride + column] += found[head * together + column];
    }
  }
}

// ---- Rows: [row][column]

// Adds weighted rows to sums, `vectors` vectors of columns at a time: no lanes to be summed. Of the last vector, the
// rows have `last` numbers.
template <class Number, int heads, int vectors>
void mix_rows(const Number* rows, int64_t stride, int64_t count, int64_t last, const float* weights,
              int64_t weights_stride, float* sums, int64_t sums_stride, Ahead& ahead) {
  Floats mixed[heads][vectors] = {};
  const auto add = [&](auto read_last) {
    for (int64_t row = 0; row < count; ++row, rows += stride) {
      ahead.ask();
      Floats numbers[vectors];
      for (int index = 0; index + 1 < vectors; ++index) numbers[index] = kept(floats(rows + index * kLanes));
      numbers[vectors - 1] = kept(read_last(rows + (vectors - 1) * kLanes));
      for (int head = 0; head < heads; ++head) {
        const Floats weight = all(weights[head * weights_stride + row]);
        for (int index = 0; index < vectors; ++index) mixed[head][index] += weight * numbers[index];
      }
    }
  };
  if (last >= kLanes) {
    add([](const Number* from) { return floats(from); });
  } else {
    add([&](const Number* from) { return first_floats(from, last); });
  }
  for (int head = 0; head < heads; ++head) {
    for (int index = 0; index < vectors; ++index) {
      float* to = sums + head * sums_stride + index * kLanes;
      store(to, floats(to) + mixed[head][index]);
    }
  }
}

#if KVSPLICE_TWINS
// The same for bf16 numbers, two rows at a time. Behind an odd number of weights comes a 0; sums are written in pairs
// of vectors.
template <int heads, int vectors>
void mix_row_pairs(const Bfloat16* rows, int64_t stride, int64_t count, int64_t last, const Bfloat16* weights,
                   int64_t weights_stride, float* sums, int64_t sums_stride, Ahead& ahead) {
  Floats low[heads][vectors] = {}, high[heads][vectors] = {};
  const auto add = [&](auto read_last) {
    for (int64_t row = 0; row < count; row += 2, rows += 2 * stride) {
      ahead.ask();
      const Bfloat16* other = row + 1 < count ? rows + stride : rows;
      Twins lows[vectors], highs[vectors];
      for (int index = 0; index < vectors; ++index) {
        const bool is_last = index == vectors - 1;
        const Twins one_row = is_last ? read_last(rows + index * kTwins) : twins(rows + index * kTwins);
        const Twins other_row = is_last ? read_last(other + index * kTwins) : twins(other + index * kTwins);
        lows[index] = kept(low_pairs(one_row, other_row)), highs[index] = kept(high_pairs(one_row, other_row));
      }
      for (int head = 0; head < heads; ++head) {
        const Twins weight = all_twins(weights + head * weights_stride + row);
        for (int index = 0; index < vectors; ++index) {
          low[head][index] = add_products(low[head][index], weight, lows[index]);
          high[head][index] = add_products(high[head][index], weight, highs[index]);
        }
      }
    }
  };
  if (last >= kTwins) {
    add([](const Bfloat16* from) { return twins(from); });
  } else {
    add([&](const Bfloat16* from) { return first_twins(from, last); });
  }
  for (int head = 0; head < heads; ++head) {
    for (int index = 0; index < vectors; ++index) {
      float* to = sums + head * sums_stride + index * kTwins;
      store(to, floats(to) + first_of(low[head][index], high[head][index]));
      store(to + kLanes, floats(to + kLanes) + second_of(low[head][index], high[head][index]));
    }
  }
}
#endif

// Products of `width` numbers of kDotRows rows with queries, which are filled up with 0 to whole vectors.
constexpr int kDotRows = 4, kDotQueries = kLanes / kDotRows;
template <class In, int queries>
void dot_rows(const typename In::Number* const rows[kDotRows], int64_t width, const typename In::Query* query,
              int64_t query_stride, float* products, int64_t products_stride, Ahead& ahead) {
  Floats sums[kLanes] = {};
  const auto add = [&](int64_t column, auto read) {
    ahead.ask();
    typename In::Vector numbers[kDotRows];
    for (int row = 0; row < kDotRows; ++row) numbers[row] = kept(read(rows[row] + column));
    for (int index = 0; index < queries; ++index) {
      const auto of_query = kept(In::of(query + index * query_stride + column));
      for (int row = 0; row < kDotRows; ++row) {
        Floats& sum = sums[index * kDotRows + row];
        sum = In::add(sum, of_query, numbers[row]);
      }
    }
  };
  int64_t column = 0;
  for (; column + In::kNumbers <= width; column += In::kNumbers)
    add(column, [](const auto* from) { return In::of(from); });
  if (column < width) add(column, [&](const auto* from) { return In::first_of(from, width - column); });
  alignas(64) float found[kLanes];
  store(found, lane_sums(sums));
  for (int index = 0; index < queries; ++index) {
    std::memcpy(products + index * products_stride, found + index * kDotRows, kDotRows * sizeof(float));
  }
}

// The same two for one query, which leaves nothing to do but to read the rows: one after the other, in whole stretches.

template <class Number>
void mix_rows_once(const Number* rows, int64_t stride, int64_t count, const float* weights, float* sums) {
  Floats mixed[kStretch] = {};
  for (int64_t row = 0; row < count; ++row, rows += stride) {
    const Floats weight = all(weights[row]);
    for (int index = 0; index < kStretch; ++index) mixed[index] += weight * floats(rows + index * kLanes);
  }
  for (int index = 0; index < kStretch; ++index) {
    store(sums + index * kLanes, floats(sums + index * kLanes) + mixed[index]);
  }
}

// Products of kLanes rows.
template <class Number>
Floats dot_rows_once(const Number* const rows[kLanes], int64_t width, const float* query) {
  Floats sums[kLanes];
  for (int row = 0; row < kLanes; ++row) {
    Floats even = {}, odd = {};
    int64_t column = 0;
    for (; column + 2 * kLanes <= width; column += 2 * kLanes) {
      even += floats(query + column) * floats(rows[row] + column);
      odd += floats(query + column + kLanes) * floats(rows[row] + column + kLanes);
    }
    for (; column < width; column += kLanes) {
      even += floats(query + column) * first_floats(rows[row] + column, width - column);
    }
    sums[row] = even + odd;
  }
  return lane_sums(sums);
}

}  // namespace kvsplice
