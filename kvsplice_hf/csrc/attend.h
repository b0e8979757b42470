// Attention over stored rows, on the CPU: the C++ twin of `kvsplice_hf.streaming`, without gradients.
//
// Rows are read once, a tile at a time, which is unpacked into memory that the processor's caches hold, scored, and
// mixed into the running sums of an online softmax (Milakov and Gimelshein, arXiv 1805.02867). The rows of a sequence
// are split between the threads, and what the parts found is put together at the end, as in flash decoding.
//
// Legend: B batch, M query rows, S stored rows, n numbers of a row, v of which (the first) are its value.

#pragma once

#include <cfloat>
#include <cmath>

#include "lanes.h"
#include "packed.h"
#include "products.h"
#include "workspace.h"

namespace kvsplice {

enum RowKind : int64_t { kFloat32 = 0, kBfloat16 = 1, kPacked = 2 };

// Strides count bytes for rows and numbers for anything else.
struct Problem {
  int64_t batch, queries, rows;
  int64_t dim;     // n, numbers of a query and of an unpacked row
  int64_t values;  // v
  int64_t kind;
  const uint8_t* data;
  int64_t batch_stride, row_stride;
  const float* query;  // [B, M, n]
  double scaling;      // of the scores
  const float* bias;   // [B or 1, bias_queries, S], for query row m that of m % bias_queries; or null
  int64_t bias_queries, bias_batch_stride, bias_query_stride;
  int64_t columns;  // n, or how many columns packed rows have
  int64_t mixed;    // the first so many columns hold all values
  Codec codec;      // of packed rows
  int64_t splits, threads;
  const int64_t* hidden;  // further rows that nobody sees, [B, hidden_count]; those beyond S count for nothing
  int64_t hidden_count;
  float* room;    // as many numbers as `room_of` says
  float* output;  // [B, M, v]
  float* sizes;   // logarithms of sums of exponentiated scores, [B, M]
};

// Rows of a tile. Packed rows take several strips at once, so that summing over lanes weighs less; rows of numbers need
// none of it.
constexpr int kPackedTile = 4 * kStrip, kNumbersTile = kStrip;
constexpr int kMostRows = kPackedTile;
constexpr int kMostQueries = 128;  // that pass over a tile together: their weights should stay in the cache
constexpr float kLowest = -FLT_MAX;

// Numbers of the queries of one sequence, as rows want them: by query, filled up with 0 to whole vectors; or for packed
// rows by column, [columns, M], with the scales folded in.
inline int64_t turned_size(const Problem& problem) {
  return problem.queries * (problem.kind == kPacked ? problem.columns : round_up(problem.dim, kLanes));
}

// The parts of the working memory: queries as rows want them, for each sequence; what they score on the centres, [B,
// M]; and the sums of each part of the rows, see `Partial`.
inline float* turned_of(const Problem& problem, int64_t sequence) {
  return problem.room + sequence * turned_size(problem);
}
inline float* constants_of(const Problem& problem) { return turned_of(problem, problem.batch); }
inline float* partials_of(const Problem& problem) { return constants_of(problem) + problem.batch * problem.queries; }

inline int64_t room_of(const Problem& problem) {
  const int64_t partial = problem.splits * (round_up(problem.mixed, kLanes) + 2);
  return problem.batch * (turned_size(problem) + problem.queries * (1 + partial));
}

// Sums of one part of the rows.
struct Partial {
  float *sums, *peak, *total;  // [M, width], [M], [M]
  int64_t width;
};

inline Partial partial_of(const Problem& problem, int64_t sequence, int64_t split) {
  const int64_t width = round_up(problem.mixed, kLanes), queries = problem.queries;
  float* start = partials_of(problem) + (sequence * problem.splits + split) * queries * (width + 2);
  return {start, start + queries * width, start + queries * (width + 1), width};
}

// ---- One part of the rows

inline const float* bias_of(const Problem& problem, int64_t sequence, int64_t query) {
  return problem.bias + sequence * problem.bias_batch_stride + query % problem.bias_queries * problem.bias_query_stride;
}

// Whether no query sees any of these rows: padding, and what is not filled yet of a static cache.
inline bool is_hidden(const Problem& problem, int64_t sequence, int64_t first, int64_t count) {
  if (problem.bias == nullptr) return false;
  for (int64_t query = 0; query < problem.bias_queries; ++query) {
    const float* bias = bias_of(problem, sequence, query) + first;
    for (int64_t row = 0; row < count; ++row) {
      if (bias[row] > kLowest / 2) return false;
    }
  }
  return true;
}

// From scores to weights, in place; sums of before fade where a larger score has come up.
inline void soften(const Partial& partial, int64_t query, float* scores, const float* bias, int64_t count,
                   int64_t padded) {
  for (int64_t row = count; row < padded; ++row) scores[row] = -INFINITY;
  if (bias != nullptr) {
    for (int64_t row = 0; row < count; ++row) scores[row] += bias[row];
  }
  Floats largest = all(partial.peak[query]);
  for (int64_t row = 0; row < padded; row += kLanes) largest = larger(floats(scores + row), largest);
  float peak = partial.peak[query];
  for (int lane = 0; lane < kLanes; ++lane) peak = largest[lane] > peak ? largest[lane] : peak;
  Floats total = {};
  for (int64_t row = 0; row < padded; row += kLanes) {
    const Floats weights = exp_of_negative(floats(scores + row) - peak);
    store(scores + row, weights);
    total += weights;
  }
  const float before = partial.peak[query];
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
  if (peak > before) {
    const float faded = std::exp(before - peak);
    float* sums = partial.sums + query * partial.width;
    for (int64_t column = 0; column < partial.width; column += kLanes)
      store(sums + column, floats(sums + column) * faded);
    sum += partial.total[query] * faded;
    partial.peak[query] = peak;
    partial.total[query] = sum;
  } else {
    partial.total[query] += sum;
  }
}

struct Tile {
  int64_t sequence, first, count;  // rows
};

inline const uint8_t* rows_of(const Problem& problem, const Tile& tile) {
  return problem.data + tile.sequence * problem.batch_stride + tile.first * problem.row_stride;
}

// Working memory of a tile: weights, and of packed rows weights with gains, gains, columns and spare ones, and lines of
// bytes.
struct Room {
  float *weights, *gained, *gains, *columns;
  uint8_t* lines;
  int64_t strip_stride;

  static int64_t numbers(const Problem& problem) {
    if (problem.kind != kPacked) return kMostQueries * kMostRows;
    return 2 * kMostQueries * kMostRows + kMostRows + strip(problem) * (kMostRows / kStrip) +
           round_up(problem.codec.row_bytes, 8) * kStrip / sizeof(float);
  }

  Room(const Problem& problem, float* memory) : weights(memory), strip_stride(strip(problem)) {
    gained = weights + kMostQueries * kMostRows;
    gains = gained + kMostQueries * kMostRows;
    columns = gains + kMostRows;
    lines = reinterpret_cast<uint8_t*>(columns + strip_stride * (kMostRows / kStrip));
  }

 private:
  // `mix_columns` takes columns in blocks, the last of which may reach beyond them.
  static int64_t strip(const Problem& problem) { return (problem.columns + kLanes) * kStrip; }
};

// Rows, what queries score on them, and what they mix of them. The queries are those from `start` on, as many as
// `queries`; of a tile's weights, those of each query are `kMostRows` apart.

struct PackedRows {
  const Problem& problem;
  const Tile& tile;
  const Room& room;

  void read() const {
    const Codec& codec = problem.codec;
    const uint8_t* rows = rows_of(problem, tile);
    for (int64_t row = 0; row < tile.count; row += kStrip) {
      float* columns = room.columns + row / kStrip * room.strip_stride;
      bytes_to_lines(rows + row * problem.row_stride, problem.row_stride, smaller(kStrip, tile.count - row),
                     codec.row_bytes, room.lines);
      lines_to_columns(codec, room.lines, columns);
      std::memset(columns + problem.columns * kStrip, 0, kLanes * kStrip * sizeof(float));
      for (int index = 0; index < kStrip; ++index) {
        room.gains[row + index] = codec.has_gain ? codec.gains[room.lines[index]] : 1.0f;
      }
    }
  }

  void score(int64_t start, int64_t queries, Ahead& ahead) const {
    const float* query = turned_of(problem, tile.sequence) + start;
    for (int64_t row = 0; row < round_up(tile.count, kStrip); row += kRowVectors * kLanes) {
      const float* columns = room.columns + row / kStrip * room.strip_stride + row % kStrip;
      in_groups<kScoredTogether>(queries, [&]<int heads>(int64_t head) {
        score_columns<heads>(columns, problem.codec.gained, problem.columns, query + head, problem.queries,
                             room.gains + row, room.weights + head * kMostRows + row, kMostRows, ahead);
      });
    }
  }

  void mix(const Partial& partial, int64_t start, int64_t queries, Ahead&) const {
    const int64_t gained = smaller(problem.codec.gained, problem.mixed);
    for (int64_t head = 0; gained > 0 && head < queries; ++head) {
      for (int64_t row = head * kMostRows; row < head * kMostRows + round_up(tile.count, kStrip); row += kLanes) {
        store(room.gained + row, floats(room.weights + row) * floats(room.gains + row - head * kMostRows));
      }
    }
    in_groups<kSummedTogether>(queries, [&]<int heads>(int64_t head) {
      auto mix = [&](int64_t first, int64_t last, const float* weights) {
        for (int64_t column = first; column < last; column += kLanes / heads) {
          mix_columns<heads>(room.columns + column * kStrip, room.strip_stride, blocks_of(tile.count, kStrip),
                             last - column, weights + head * kMostRows, kMostRows,
                             partial.sums + (start + head) * partial.width + column, partial.width);
        }
      };
      mix(0, gained, room.gained);
      mix(gained, problem.mixed, room.weights);
    });
  }
};

template <class Number>
struct NumberRows {
  const Problem& problem;
  const Tile& tile;
  const Room& room;

  const Number* at(int64_t row) const {
    return reinterpret_cast<const Number*>(rows_of(problem, tile) + smaller(row, tile.count - 1) * problem.row_stride);
  }

  void read() const {}

  void score(int64_t start, int64_t queries, Ahead& ahead) const {
    const int64_t width = round_up(problem.dim, kLanes);
    const float* query = turned_of(problem, tile.sequence) + start * width;
    for (int64_t row = 0; row < tile.count; row += kDotRows) {
      const Number* some[kDotRows];
      for (int index = 0; index < kDotRows; ++index) some[index] = at(row + index);
      in_groups<kDotQueries>(queries, [&]<int heads>(int64_t head) {
        dot_rows<Number, heads>(some, problem.dim, query + head * width, width, room.weights + head * kMostRows + row,
                                kMostRows, ahead);
      });
    }
  }

  void mix(const Partial& partial, int64_t start, int64_t queries, Ahead& ahead) const {
    const int64_t stride = problem.row_stride / sizeof(Number);
    in_groups<kMixedTogether>(queries, [&]<int heads>(int64_t head) {
      in_groups<4>(blocks_of(problem.mixed, kLanes), [&]<int vectors>(int64_t vector) {
        const int64_t column = vector * kLanes, behind = problem.dim - column - (vectors - 1) * kLanes;
        mix_rows<Number, heads, vectors>(at(0) + column, stride, tile.count, behind, room.weights + head * kMostRows,
                                         kMostRows, partial.sums + (start + head) * partial.width + column,
                                         partial.width, ahead);
      });
    });
  }
};

inline void hide(const Problem& problem, const Tile& tile, float* scores) {
  const int64_t* hidden = problem.hidden + tile.sequence * problem.hidden_count;
  for (int64_t index = 0; index < problem.hidden_count; ++index) {
    const int64_t row = hidden[index] - tile.first;
    if (row >= 0 && row < tile.count) scores[row] = -INFINITY;
  }
}

template <class Rows>
void attend_tile(const Problem& problem, const Tile& tile, const Partial& partial, const Room& room) {
  Ahead ahead;
  ahead.next = rows_of(problem, tile) + tile.count * problem.row_stride;
  ahead.end = rows_of(problem, tile) + smaller(2 * tile.count, problem.rows - tile.first) * problem.row_stride;
  const Rows rows = {problem, tile, room};
  rows.read();
  for (int64_t start = 0; start < problem.queries; start += kMostQueries) {
    const int64_t queries = smaller(kMostQueries, problem.queries - start);
    rows.score(start, queries, ahead);
    for (int64_t head = 0; head < queries; ++head) {
      float* weights = room.weights + head * kMostRows;
      const float* bias = problem.bias ? bias_of(problem, tile.sequence, start + head) + tile.first : nullptr;
      hide(problem, tile, weights);
      soften(partial, start + head, weights, bias, tile.count, round_up(tile.count, kStrip));
    }
    rows.mix(partial, start, queries, ahead);
  }
}

// Whether there was the memory for it.
inline bool attend_part(const Problem& problem, int64_t sequence, int64_t split) {
  thread_local Workspace workspace;
  const Partial partial = partial_of(problem, sequence, split);
  std::memset(partial.sums, 0, problem.queries * partial.width * sizeof(float));
  for (int64_t query = 0; query < problem.queries; ++query) {
    partial.peak[query] = kLowest;
    partial.total[query] = 0;
  }
  float* memory = workspace.take(Room::numbers(problem));
  if (memory == nullptr) return false;
  const Room room(problem, memory);
  const int64_t each = round_up(blocks_of(problem.rows, problem.splits), kStrip);
  const int64_t last = smaller((split + 1) * each, problem.rows);
  const int64_t most = problem.kind == kPacked ? kPackedTile : kNumbersTile;
  for (int64_t first = split * each; first < last; first += most) {
    const Tile tile = {sequence, first, smaller(most, last - first)};
    if (is_hidden(problem, sequence, tile.first, tile.count)) continue;
    if (problem.kind == kPacked) attend_tile<PackedRows>(problem, tile, partial, room);
    if (problem.kind == kFloat32) attend_tile<NumberRows<float>>(problem, tile, partial, room);
    if (problem.kind == kBfloat16) attend_tile<NumberRows<Bfloat16>>(problem, tile, partial, room);
  }
  return true;
}

// One query row as rows want it: packed ones are levels, whose scales and centres it takes over.
inline void turn_query(const Problem& problem, int64_t sequence, int64_t query) {
  const float* from = problem.query + (sequence * problem.queries + query) * problem.dim;
  const float scaling = problem.scaling;
  float constant = 0;
  if (problem.kind == kPacked) {
    float* to = turned_of(problem, sequence) + query;
    for (int64_t column = 0; column < problem.columns; ++column) {
      to[column * problem.queries] = from[problem.codec.index[column]] * problem.codec.scale(column) * scaling;
    }
    for (int64_t number = 0; number < problem.dim; ++number) constant += from[number] * problem.codec.base(number);
  } else {
    const int64_t width = round_up(problem.dim, kLanes);
    float* to = turned_of(problem, sequence) + query * width;
    for (int64_t number = 0; number < width; ++number)
      to[number] = number < problem.dim ? from[number] * scaling : 0.0f;
  }
  constants_of(problem)[sequence * problem.queries + query] = constant * scaling;
}

// The parts of one query row as one.
inline void merge(const Problem& problem, int64_t sequence, int64_t query) {
  const int64_t flat = sequence * problem.queries + query;
  float peak = kLowest, total = 0;
  for (int64_t split = 0; split < problem.splits; ++split) {
    peak = std::fmax(peak, partial_of(problem, sequence, split).peak[query]);
  }
  // In the first part, which is not read again.
  float* sums = partial_of(problem, sequence, 0).sums + query * partial_of(problem, sequence, 0).width;
  for (int64_t split = 0; split < problem.splits; ++split) {
    const Partial partial = partial_of(problem, sequence, split);
    const float share = std::exp(partial.peak[query] - peak), *more = partial.sums + query * partial.width;
    total += share * partial.total[query];
    for (int64_t column = 0; column < problem.mixed; ++column) {
      sums[column] = (split ? sums[column] : 0.0f) + share * more[column];
    }
  }
  total = std::fmax(total, FLT_MIN);
  problem.sizes[flat] = peak + std::log(total) + constants_of(problem)[flat];
  float* output = problem.output + flat * problem.values;
  if (problem.kind != kPacked) {
    for (int64_t column = 0; column < problem.values; ++column) output[column] = sums[column] / total;
    return;
  }
  for (int64_t number = 0; number < problem.values; ++number) output[number] = problem.codec.base(number);
  for (int64_t column = 0; column < problem.mixed; ++column) {
    const int64_t number = problem.codec.index[column];
    if (number < problem.values) output[number] += sums[column] / total * problem.codec.scale(column);
  }
}

// The steps of all of it. Called by all threads of a parallel region. False in the one that had no memory.
inline bool attend(const Problem& problem) {
  bool done = true;
#pragma omp for schedule(static)
  for (int64_t row = 0; row < problem.batch * problem.queries; ++row) {
    turn_query(problem, row / problem.queries, row % problem.queries);
  }
#pragma omp for schedule(dynamic, 1)
  for (int64_t part = 0; part < problem.batch * problem.splits; ++part) {
    done &= attend_part(problem, part / problem.splits, part % problem.splits);
  }
#pragma omp for schedule(static)
  for (int64_t row = 0; row < problem.batch * problem.queries; ++row) {
    merge(problem, row / problem.queries, row % problem.queries);
  }
  return done;
}

}  // namespace kvsplice
