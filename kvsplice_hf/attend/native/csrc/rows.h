// The kinds of stored rows: how each wants its queries, and how it is scored and mixed, a tile at a time.
//
// Legend: as in attend.h.
#pragma once

#include <cstring>
#include <utility>

#include "keys.h"
#include "lanes.h"
#include "packed.h"
#include "products.h"
#include "turned.h"

namespace kvsplice {

enum RowKind : int64_t { kFloat32 = 0, kBfloat16 = 1, kPacked = 2 };

// Strides count bytes for rows and numbers for anything else.
struct Problem {
  int64_t batch, queries, rows;
  int64_t dim;     // n, numbers of a query and of an unpacked row
  int64_t values;  // v
  int64_t kind;
  int64_t in_bf16;  // whether products may be taken of bf16 numbers, sums being float32
  const uint8_t* data;
  int64_t batch_stride, row_stride;
  // Of packed rows in pages, which are those of each sequence, [B, pages_stride], where `data` is the first of all
  // pages; or null. A page has `page_rows` rows side by side. And how many rows each sequence has, [B].
  const int64_t* pages;
  int64_t pages_stride, page_rows, page_stride;
  const int64_t* lengths;
  const float* query;    // [B, M, n], without the first `unscored` numbers
  int64_t query_stride;  // from one sequence to the next
  int64_t unscored;      // numbers of a row, from the first, that no query meets: none or all values
  double scaling;        // of the scores
  const float* bias;     // [B or 1, bias_queries, S], for query row m that of m % bias_queries; or null
  int64_t bias_queries, bias_batch_stride, bias_query_stride;
  int64_t columns;             // n, or how many columns queries score of packed rows
  int64_t mixed;               // the first so many columns hold all values
  const float* column_scales;  // of those, where they were prepared; or null
  Codec codec;                 // of packed rows
  Keys keys;                   // of packed rows whose keys were coded before their rotation
  int64_t splits, threads;
  const int64_t* hidden;  // further rows that nobody sees, [B, hidden_count]; those beyond S count for nothing
  int64_t hidden_count;
  float* output;  // [B, M, v]
  float* sizes;   // logarithms of sums of exponentiated scores, [B, M]
  float* room;    // as many numbers as `room_of` says

  // Whether latents are predicted from their keys, so that codes of keys are values as well.
  bool mixes_keys() const { return keys.dim > 0 && values > keys.start; }
  // The first column that a query meets. Turned keys are the last ones; other keys lie among the values.
  int64_t first_scored() const { return unscored && keys.dim ? columns - keys.dim : 0; }
  // Where keys were coded before their rotation, columns are those of latents with a gain, of the other latents (or all
  // of the codec), and of turned keys. Which column of the codec one of the first two kinds is.
  int64_t codec_column(int64_t column) const {
    return keys.dim == 0 || mixes_keys() || column < codec.gained ? column : codec.coded + column - codec.gained;
  }
};

// Sums of one part of the rows.
struct Partial {
  float *sums, *peak, *total;  // [M, width], [M], [M]
  int64_t width;
};

struct Tile {
  int64_t sequence, first, count;  // rows
};

inline const uint8_t* row_of(const Problem& problem, int64_t sequence, int64_t row) {
  if (problem.pages == nullptr) return problem.data + sequence * problem.batch_stride + row * problem.row_stride;
  const int64_t page = problem.pages[sequence * problem.pages_stride + row / problem.page_rows];
  return problem.data + page * problem.page_stride + row % problem.page_rows * problem.row_stride;
}

inline int64_t rows_of_sequence(const Problem& problem, int64_t sequence) {
  return problem.pages == nullptr ? problem.rows : problem.lengths[sequence];
}

constexpr int kMostQueries = 128;  // that pass over a tile together: their weights should stay in the cache

// Each kind of rows has
// - `kTile`, rows of a tile, and `kStride`, numbers from the weights of one query to those of the next;
// - `turned_size`, numbers of the queries of one sequence as it wants them, and `turn`, which puts one of them there;
// - `memory_size`, numbers of working memory for a tile, its weights included;
// - `read`, which prepares a tile, `score`, and `mix`, for `queries` queries from `start` on.

// Rows of numbers: as they lie in memory.
template <class In>
class NumberRows {
 public:
  using Kind = In;
  static constexpr int kTile = kStrip, kStride = kTile + kLanes;

  static int64_t turned_size(const Problem& problem) {
    return problem.queries * width_of(problem) * sizeof(Query) / sizeof(float);
  }

  static void turn(const Problem& problem, const float* from, int64_t query, float* turned) {
    Query* to = reinterpret_cast<Query*>(turned) + query * width_of(problem);
    for (int64_t number = 0; number < width_of(problem); ++number) {
      set(to[number], number < problem.dim ? from[number] : 0.0f);
    }
  }

  static int64_t memory_size(const Problem&) { return 2 * kMostQueries * kStride; }

  NumberRows(const Problem& problem, const Tile& tile, float* memory, const float* turned)
      : weights(memory),
        problem_(problem),
        tile_(tile),
        rounded_(reinterpret_cast<Query*>(memory + kMostQueries * kStride)),
        turned_(reinterpret_cast<const Query*>(turned)) {}

  void read() const {}

  void score(int64_t start, int64_t queries, Ahead& ahead) const {
    const int64_t width = width_of(problem_);
    const Query* query = turned_ + start * width;
    for (int64_t row = 0; row < tile_.count; row += kDotRows) {
      const Number* some[kDotRows];
      for (int index = 0; index < kDotRows; ++index) some[index] = at(smaller(row + index, tile_.count - 1));
      in_groups<kDotQueries>(queries, [&]<int heads>(int64_t head) {
        dot_rows<In, heads>(some, problem_.dim, query + head * width, width, weights + head * kStride + row, kStride,
                            ahead);
      });
    }
  }

  void mix(const Partial& partial, int64_t start, int64_t queries, Ahead& ahead) const {
    const int64_t stride = problem_.row_stride / sizeof(Number),
                  vectors_in_all = blocks_of(problem_.mixed, In::kNumbers);
    if constexpr (In::kInPairs) {
      for (int64_t number = 0; number < queries * kStride; number += kLanes) {
        put(rounded_ + number, floats(weights + number));
      }
    }
    in_groups<kMixedTogether>(queries, [&]<int heads>(int64_t head) {
      in_groups<In::kMixedVectors>(vectors_in_all, [&]<int vectors>(int64_t vector) {
        const int64_t column = vector * In::kNumbers;
        const int64_t behind = problem_.dim - column - (vectors - 1) * In::kNumbers;
        float* sums = partial.sums + (start + head) * partial.width + column;
        if constexpr (In::kInPairs) {
          mix_row_pairs<heads, vectors>(at(0) + column, stride, tile_.count, behind, rounded_ + head * kStride, kStride,
                                        sums, partial.width, ahead);
        } else {
          mix_rows<Number, heads, vectors>(at(0) + column, stride, tile_.count, behind, weights + head * kStride,
                                           kStride, sums, partial.width, ahead);
        }
      });
    });
  }

  float* const weights;  // [queries, kStride]

 private:
  using Number = typename In::Number;
  using Query = typename In::Query;

  // Filled up with 0 to whole vectors.
  static int64_t width_of(const Problem& problem) { return round_up(problem.dim, In::kNumbers); }
  const Number* at(int64_t row) const {
    return reinterpret_cast<const Number*>(row_of(problem_, tile_.sequence, tile_.first + row));
  }

  const Problem& problem_;
  const Tile& tile_;
  Query* rounded_;
  const Query* turned_;
};

// Packed rows: columns of levels, whose scales and centres the queries take over. Tiles are of several strips, so that
// summing over lanes weighs less.
template <class In>
class PackedRows {
 public:
  using Kind = In;
  static constexpr int kTile = 4 * In::kNumbers / kLanes * kStrip, kStride = kTile + kLanes;
  static_assert(kTile <= kMostStrips * kStrip);

  static int64_t turned_size(const Problem& problem) {
    return problem.queries * (In::kInPairs ? pairs_of(problem) : problem.columns);
  }

  static void turn(const Problem& problem, const float* from, int64_t query, float* turned) {
    const int64_t of_codec = problem.columns - problem.keys.dim;
    const auto number = [&](int64_t column) {
      if (column >= problem.columns) return 0.0f;
      if (column >= of_codec) {
        return from[problem.values - problem.unscored + problem.keys.number_of(column - of_codec)];
      }
      const int64_t as_read = problem.codec_column(column), met = problem.codec.index[as_read] - problem.unscored;
      return met < 0 ? 0.0f : from[met] * problem.codec.scale(as_read);
    };
    if constexpr (In::kInPairs) {
      Query* to = reinterpret_cast<Query*>(turned) + 2 * query;
      const int64_t gained = gained_of(problem), first_scored = problem.first_scored();
      const auto add = [&](int64_t first, int64_t last, int64_t from_column, int64_t to_column) {
        for (int64_t column = first; column < last; column += 2, to += 2 * problem.queries) {
          set(to[0], column >= from_column ? number(column) : 0.0f);
          set(to[1], column + 1 < to_column ? number(column + 1) : 0.0f);
        }
      };
      add(0, gained, 0, gained);
      add((first_scored + gained) / 2 * 2, problem.columns, first_scored + gained, problem.columns);
    } else {
      for (int64_t column = problem.first_scored(); column < problem.columns; ++column) {
        turned[column * problem.queries + query] = number(column);
      }
    }
  }

  static int64_t memory_size(const Problem& problem) {
    return 3 * kMostQueries * kStride + kTile + KeyReader<In>::memory_size(problem.keys, problem.codec) +
           (strip_of(problem) * (kTile / kStrip) * sizeof(Query) +
            round_up(problem.codec.row_bytes, kLinesAtOnce) * kStrip) /
               sizeof(float);
  }

  PackedRows(const Problem& problem, const Tile& tile, float* memory, const float* turned)
      : weights(memory), problem_(problem), tile_(tile), turned_(reinterpret_cast<const Query*>(turned)) {
    float* next = memory + kMostQueries * kStride;
    const auto take = [&](int64_t numbers) { return std::exchange(next, next + numbers); };
    plain_ = reinterpret_cast<Query*>(take(kMostQueries * kStride));
    gained_ = reinterpret_cast<Query*>(take(kMostQueries * kStride));
    gains_ = take(kTile);
    key_memory_ = take(KeyReader<In>::memory_size(problem.keys, problem.codec));
    columns_ = reinterpret_cast<Query*>(take(strip_of(problem) * (kTile / kStrip) * sizeof(Query) / sizeof(float)));
    lines_ = reinterpret_cast<uint8_t*>(next);
  }

  void read() const {
    const Codec& codec = problem_.codec;
    const bool has_keys = problem_.keys.dim > 0;
    const bool apart = has_keys && !problem_.mixes_keys();
    const int64_t coded = apart ? codec.gained : codec.coded, raw = apart ? codec.gained_raw : codec.raw;
    const KeyReader<In> keys(problem_.keys, codec, key_memory_);
    if (has_keys) keys.prepare(tile_.sequence, tile_.first, tile_.count);
    for (int64_t row = 0; row < tile_.count; row += kStrip) {
      Query* columns = columns_ + row / kStrip * strip_of(problem_);
      const auto start = [&](int64_t index) { return row_of(problem_, tile_.sequence, tile_.first + row + index); };
      bytes_to_lines<Query>(start, smaller(kStrip, tile_.count - row), codec.row_bytes, lines_);
      coded_columns<Query>(codec, lines_, 0, coded, [&](int64_t column) { return columns + column * kStrip; });
      raw_columns<Query>(codec, lines_, 0, raw, [&](int64_t column) { return columns + (coded + column) * kStrip; });
      if (has_keys) keys.read(lines_, row / kStrip, apart ? nullptr : columns, columns + (coded + raw) * kStrip);
      std::memset(columns + problem_.columns * kStrip, 0, kLanes * kStrip * sizeof(Query));
      for (int index = 0; index < kStrip; ++index) {
        gains_[row + row_at<Query>(index)] = codec.has_gain ? codec.gains[lines_[index]] : 1.0f;
      }
    }
  }

  void score(int64_t start, int64_t queries, Ahead& ahead) const {
    constexpr int together = In::kInPairs ? kStrip : kRowVectors * kLanes;
    const int64_t gained = gained_of(problem_), first = problem_.first_scored(), count = problem_.columns - first;
    for (int64_t row = 0; row < round_up(tile_.count, kStrip); row += together) {
      const Query* columns = columns_ + row / kStrip * strip_of(problem_) + row % kStrip;
      in_groups<kScoredTogether>(queries, [&]<int heads>(int64_t head) {
        float* scores = weights + head * kStride + row;
        if constexpr (In::kInPairs) {
          // Pairs begin at an even column; what is ahead of the first one that is met, a query has 0 for.
          score_column_pairs<heads>(columns + first / 2 * 2 * kStrip, gained, count + first % 2,
                                    turned_ + 2 * (start + head), problem_.queries, gains_ + row, scores, kStride,
                                    ahead);
        } else {
          score_columns<heads>(columns + first * kStrip, gained, count,
                               turned_ + first * problem_.queries + start + head, problem_.queries, gains_ + row,
                               scores, kStride, ahead);
        }
      });
    }
  }

  void mix(const Partial& partial, int64_t start, int64_t queries, Ahead&) const {
    const int64_t gained = smaller(problem_.codec.gained, problem_.mixed);
    for (int64_t head = 0; head < queries; ++head) {
      for (int64_t row = 0; row < round_up(tile_.count, kStrip); row += kLanes) {
        const int64_t at = head * kStride + row;
        const Floats weight = floats(weights + at);
        if (gained < problem_.mixed) put(plain_ + at, weight);
        if (gained > 0) put(gained_ + at, weight * floats(gains_ + row));
      }
    }
    in_groups<kSummedTogether>(queries, [&]<int heads>(int64_t head) {
      auto mix = [&](int64_t first, int64_t last, const Query* given) {
        for (int64_t column = first; column < last; column += kLanes / heads) {
          mix_columns<In, heads>(columns_ + column * kStrip, strip_of(problem_), blocks_of(tile_.count, kStrip),
                                 last - column, given + head * kStride, kStride,
                                 partial.sums + (start + head) * partial.width + column, partial.width);
        }
      };
      mix(0, gained, gained_);
      mix(gained, problem_.mixed, plain_);
    });
  }

  // The columns of a strip as they were read, the first row of which is `row` of the tile, and the gains of its rows.
  const auto* strip(int64_t row) const { return columns_ + row / kStrip * strip_of(problem_); }
  const float* gains(int64_t row) const { return gains_ + row; }

  float* const weights;  // [queries, kStride]

 private:
  using Query = typename In::Query;

  // `mix_columns` takes columns in blocks, the last of which may reach beyond them.
  static int64_t strip_of(const Problem& problem) { return (problem.columns + kLanes) * kStrip; }
  // Columns with a gain that a query meets.
  static int64_t gained_of(const Problem& problem) { return problem.first_scored() ? 0 : problem.codec.gained; }
  // Of columns with a gain, and of the others; see `score_column_pairs`.
  static int64_t pairs_of(const Problem& problem) {
    const int64_t gained = gained_of(problem), behind = problem.first_scored() + gained;
    return blocks_of(gained, 2) + blocks_of(problem.columns, 2) - behind / 2;
  }

  const Problem& problem_;
  const Tile& tile_;
  const Query* turned_;
  Query *plain_, *gained_, *columns_;  // weights, weights times gains
  float *gains_, *key_memory_;
  uint8_t* lines_;
};

// Calls `run<Rows>()` with the kind that serves a problem.
template <class Run>
auto with_rows(const Problem& problem, Run&& run) {
#if KVSPLICE_TWINS
  if (problem.in_bf16 && problem.kind == kPacked) return run.template operator()<PackedRows<InTwins>>();
  if (problem.in_bf16 && problem.kind == kBfloat16) return run.template operator()<NumberRows<InTwins>>();
#endif
  if (problem.kind == kPacked) return run.template operator()<PackedRows<InFloats<float>>>();
  if (problem.kind == kBfloat16) return run.template operator()<NumberRows<InFloats<Bfloat16>>>();
  return run.template operator()<NumberRows<InFloats<float>>>();
}

}  // namespace kvsplice
