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
#include "rows.h"
#include "workspace.h"

namespace kvsplice {

constexpr float kLowest = -FLT_MAX;

// The parts of the working memory: queries as rows want them, for each sequence; what they score on the centres, [B,
// M]; the sums of each part of the rows, see `Partial`; and how keys are read.
inline int64_t turned_size(const Problem& problem) {
  return with_rows(problem, [&]<class Rows>() { return Rows::turned_size(problem); });
}
inline float* turned_of(const Problem& problem, int64_t sequence) {
  return problem.room + sequence * turned_size(problem);
}
inline float* constants_of(const Problem& problem) { return turned_of(problem, problem.batch); }
inline float* partials_of(const Problem& problem) { return constants_of(problem) + problem.batch * problem.queries; }

// Numbers of the sums of a query: whole vectors, in pairs where two are mixed at a time.
inline int64_t sums_of(const Problem& problem) { return round_up(problem.mixed, 2 * kLanes); }

inline int64_t room_without_keys(const Problem& problem) {
  return problem.batch * (turned_size(problem) + problem.queries * (1 + problem.splits * (sums_of(problem) + 2)));
}

inline int64_t room_of(const Problem& problem) {
  return room_without_keys(problem) + folded_size(problem.keys, problem.codec);
}

inline void set_room(Problem& problem, float* room) {
  problem.room = room;
  problem.keys.room = room + room_without_keys(problem);
}

inline Partial partial_of(const Problem& problem, int64_t sequence, int64_t split) {
  const int64_t width = sums_of(problem), queries = problem.queries;
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
inline void soften(const Partial& partial, int64_t query, float* scores, float scaling, const float* bias,
                   int64_t count, int64_t padded) {
  for (int64_t row = 0; row < count; ++row) scores[row] *= scaling;
  for (int64_t row = 0; row < count && bias != nullptr; ++row) scores[row] += bias[row];
  for (int64_t row = count; row < padded; ++row) scores[row] = -INFINITY;
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

inline void hide(const Problem& problem, const Tile& tile, float* scores) {
  const int64_t* hidden = problem.hidden + tile.sequence * problem.hidden_count;
  for (int64_t index = 0; index < problem.hidden_count; ++index) {
    const int64_t row = hidden[index] - tile.first;
    if (row >= 0 && row < tile.count) scores[row] = -INFINITY;
  }
}

template <class Rows>
void attend_tile(const Problem& problem, const Tile& tile, const Partial& partial, float* memory) {
  Ahead ahead;
  const int64_t behind = tile.first + tile.count, rows_left = rows_of_sequence(problem, tile.sequence) - behind;
  if (rows_left > 0) {  // of rows in pages, those in the page of the first one
    int64_t count = smaller(tile.count, rows_left);
    if (problem.pages) count = smaller(count, problem.page_rows - behind % problem.page_rows);
    ahead.next = row_of(problem, tile.sequence, behind);
    ahead.end = ahead.next + count * problem.row_stride;
  }
  const Rows rows(problem, tile, memory, turned_of(problem, tile.sequence));
  rows.read();
  for (int64_t start = 0; start < problem.queries; start += kMostQueries) {
    const int64_t queries = smaller(kMostQueries, problem.queries - start);
    rows.score(start, queries, ahead);
    for (int64_t head = 0; head < queries; ++head) {
      float* weights = rows.weights + head * Rows::kStride;
      const float* bias = problem.bias ? bias_of(problem, tile.sequence, start + head) + tile.first : nullptr;
      hide(problem, tile, weights);
      soften(partial, start + head, weights, problem.scaling, bias, tile.count, round_up(tile.count, kStrip));
    }
    rows.mix(partial, start, queries, ahead);
  }
}

// The sums of a part before its rows are read.
inline void begin_part(const Problem& problem, int64_t sequence, int64_t split) {
  const Partial partial = partial_of(problem, sequence, split);
  std::memset(partial.sums, 0, problem.queries * partial.width * sizeof(float));
  for (int64_t query = 0; query < problem.queries; ++query) {
    partial.peak[query] = kLowest;
    partial.total[query] = 0;
  }
}

// Calls `take(tile)` for the tiles of a part that some query sees.
template <class Rows, class Take>
void each_tile(const Problem& problem, int64_t sequence, int64_t split, Take&& take) {
  const int64_t each = round_up(blocks_of(problem.rows, problem.splits), kStrip);
  const int64_t last = smaller((split + 1) * each, rows_of_sequence(problem, sequence));
  for (int64_t first = split * each; first < last; first += Rows::kTile) {
    const Tile tile = {sequence, first, smaller(Rows::kTile, last - first)};
    if (!is_hidden(problem, sequence, tile.first, tile.count)) take(tile);
  }
}

// Whether there was the memory for it.
template <class Rows>
bool attend_part(const Problem& problem, int64_t sequence, int64_t split) {
  thread_local Workspace workspace;
  begin_part(problem, sequence, split);
  float* memory = workspace.take(Rows::memory_size(problem));
  if (memory == nullptr) return false;
  each_tile<Rows>(problem, sequence, split, [&](const Tile& tile) {
    attend_tile<Rows>(problem, tile, partial_of(problem, sequence, split), memory);
  });
  return true;
}

// One query row as rows want it, and what it scores on the centres of packed ones.
template <class Rows>
void turn_query(const Problem& problem, int64_t sequence, int64_t query) {
  const float* from = problem.query + sequence * problem.query_stride + query * (problem.dim - problem.unscored);
  Rows::turn(problem, from, query, turned_of(problem, sequence));
  float constant = 0;
  // Where keys were coded before their rotation, the centres of their codes are in their mean.
  const int64_t centred = problem.kind != kPacked ? 0 : problem.keys.dim ? problem.values : problem.dim;
  for (int64_t number = problem.unscored; number < centred; ++number) {
    constant += from[number - problem.unscored] * problem.codec.base(number);
  }
  constants_of(problem)[sequence * problem.queries + query] = constant * static_cast<float>(problem.scaling);
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
    const int64_t as_read = problem.codec_column(column), number = problem.codec.index[as_read];
    const float scale = problem.column_scales ? problem.column_scales[column] : problem.codec.scale(as_read);
    if (number < problem.values) output[number] += sums[column] / total * scale;
  }
}

// The steps of all of it. Called by all threads of a parallel region. False in the one that had no memory.
template <class Rows>
bool attend(const Problem& problem) {
  bool done = true;
  if (problem.keys.dim) fold_keys<typename Rows::Kind>(problem.keys, problem.codec, problem.keys.start);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < problem.batch * problem.queries; ++row) {
    turn_query<Rows>(problem, row / problem.queries, row % problem.queries);
  }
#pragma omp for schedule(dynamic, 1)
  for (int64_t part = 0; part < problem.batch * problem.splits; ++part) {
    done &= attend_part<Rows>(problem, part / problem.splits, part % problem.splits);
  }
#pragma omp for schedule(static)
  for (int64_t row = 0; row < problem.batch * problem.queries; ++row) {
    merge(problem, row / problem.queries, row % problem.queries);
  }
  return done;
}

inline bool attend(const Problem& problem) {
  return with_rows(problem, [&]<class Rows>() { return attend<Rows>(problem); });
}

}  // namespace kvsplice
