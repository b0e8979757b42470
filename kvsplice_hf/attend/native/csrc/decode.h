// The attention of one new token per sequence, from its query to its output, on the CPU: the C++ twin of
// `kvsplice_hf.absorbed` where all queries are of one token, and without gradients.
//
// A step of a small model is a handful of small products per layer; starting each of them from PyTorch takes longer
// than the product. See `kvsplice_hf.absorbed` for what is computed.
//
// Legend: B sequences, H heads, K exact tokens, S stored rows, R, r, P, N, V as in `kvsplice_hf.absorbed`.
#pragma once

#include "attend.h"
#include "transform.h"
#include "weights.h"

namespace kvsplice {

struct Decoding {
  Problem rows;  // whose query, output, sizes and room are set here; B sequences, H queries each, r values
  int64_t latent, rank, rotated, nope, value;  // R, r, P, N, V
  const float* query;                          // [B, H, N + P]
  Numbers weight;                              // of kv_b_proj, [H, N + V, R]
  Numbers expand;                              // [R, r]
  Transform transform;
  Numbers exact;       // latents [B, K, R], with P rotated numbers behind each where rows are packed
  const float* sinks;  // one logit per head that carries no value, [H]; or null
  float* output;       // [B, H, V]
  float* room;         // as many numbers as `room_of` says

  int64_t head_stride() const { return (nope + value) * latent; }
};

// What goes from step to step, for each of the B H queries.
struct DecodingRoom {
  int64_t latent, rank, shared;    // numbers from one query to the next
  float* latents;                  // queries against latents, [latent]
  float* divided;                  // the same over the divisors; later on mixed latents
  float* codes;                    // queries against codes; later on mixed codes, [rank]
  float *queries, *mixed, *sizes;  // of `Problem`
  float* shares;                   // of the rows, of each exact token, and of the sink, [shared]
  float *divisors, *offset;        // of what `expand` gives, [R]: for all queries
  float* rest;

  explicit DecodingRoom(const Decoding& given) {
    const int64_t queries_in_all = given.rows.batch * given.rows.queries;
    latent = round_up(given.latent, kLanes);
    rank = round_up(given.rank, kLanes);
    shared = given.rows.hidden_count + 2;
    latents = given.room;
    divided = latents + queries_in_all * latent;
    codes = divided + queries_in_all * latent;
    queries = codes + queries_in_all * rank;
    mixed = queries + queries_in_all * given.rows.dim;
    sizes = mixed + queries_in_all * given.rank;
    shares = sizes + queries_in_all;
    divisors = shares + queries_in_all * shared;
    offset = divisors + given.latent;
    rest = offset + given.latent;
  }
};

inline int64_t room_of(const Decoding& given) { return DecodingRoom(given).rest - given.room + room_of(given.rows); }

// Queries against latents: a block of columns of one head, all sequences.
inline void absorb_query(const Decoding& given, const DecodingRoom& room, int64_t head, int64_t block) {
  const int64_t width = given.nope + given.rotated, heads = given.rows.queries;
  const int64_t first = block * kColumnsAtOnce, last = smaller(first + kColumnsAtOnce, given.latent);
  with_type(given.weight, [&](const auto* keys) {
    mix(keys + head * given.head_stride(), given.latent, given.nope, given.query + head * width, heads * width,
        given.rows.batch, first, last, room.latents + head * room.latent, heads * room.latent);
  });
  for (int64_t sequence = 0; sequence < given.rows.batch; ++sequence) {
    const int64_t start = (sequence * heads + head) * room.latent;
    for (int64_t column = first; column < last; ++column) {
      room.divided[start + column] = room.latents[start + column] / room.divisors[column];
    }
  }
}

// Queries against codes: a block of columns, all queries.
inline void compress_queries(const Decoding& given, const DecodingRoom& room, int64_t block) {
  const int64_t first = block * kCodesAtOnce, last = smaller(first + kCodesAtOnce, given.rank);
  with_type(given.expand, [&](const auto* expand) {
    mix(expand, given.rank, given.latent, room.divided, room.latent, given.rows.batch * given.rows.queries, first, last,
        room.codes, room.rank);
  });
}

// What one query scores on an exact token, or the lowest number where there is none.
inline float exact_score(const Decoding& given, const DecodingRoom& room, int64_t flat, int64_t index) {
  const Problem& rows = given.rows;
  const int64_t sequence = flat / rows.queries, position = rows.hidden[sequence * rows.hidden_count + index];
  if (position < 0 || position >= rows_of_sequence(rows, sequence)) return kLowest;
  const float *latent = room.latents + flat * room.latent,
              *rotated = given.query + flat * (given.nope + given.rotated) + given.nope;
  const int64_t width = given.latent + (rows.kind == kPacked ? given.rotated : 0);
  float sum = 0;
  with_type(given.exact, [&](const auto* exact) {
    exact += (sequence * rows.hidden_count + index) * width;
#pragma omp simd reduction(+ : sum)
    for (int64_t column = 0; column < given.latent; ++column) {
      sum += latent[column] * (number_of(exact + column) - room.offset[column]);
    }
    for (int64_t column = 0; column < given.rotated && rows.kind == kPacked; ++column) {
      sum += rotated[column] * number_of(exact + given.latent + column);
    }
  });
  if (rows.kind != kPacked) {  // whose rows hold the rotated numbers as they are
    const Numbers stored = {row_of(rows, sequence, position), rows.kind == kBfloat16};
    with_type(stored, [&](const auto* row) {
      for (int64_t column = 0; column < given.rotated; ++column)
        sum += rotated[column] * number_of(row + given.rank + column);
    });
  }
  const float bias = rows.bias ? bias_of(rows, sequence, flat % rows.queries)[position] : 0.0f;
  return sum * static_cast<float>(rows.scaling) + bias;
}

// Before the rows are read: the query of one head against rows, and its scores on what is not among them.
inline void prepare(const Decoding& given, const DecodingRoom& room, int64_t flat) {
  float* query = room.queries + flat * given.rows.dim;
  std::memcpy(query, room.codes + flat * room.rank, given.rank * sizeof(float));
  std::memcpy(query + given.rank, given.query + flat * (given.nope + given.rotated) + given.nope,
              given.rotated * sizeof(float));
  float* shares = room.shares + flat * room.shared;
  for (int64_t index = 0; index < given.rows.hidden_count; ++index) {
    shares[1 + index] = exact_score(given, room, flat, index);
  }
  shares[room.shared - 1] = kLowest;
  if (given.sinks != nullptr) {
    float constant = 0;  // which every other score leaves out
#pragma omp simd reduction(+ : constant)
    for (int64_t column = 0; column < given.latent; ++column) {
      constant += room.latents[flat * room.latent + column] * room.offset[column];
    }
    shares[room.shared - 1] =
        given.sinks[flat % given.rows.queries] - constant * static_cast<float>(given.rows.scaling);
  }
}

// Once the rows are read: one softmax over them and the others, and the share of the rows in the mixed codes.
inline void share(const Decoding& given, const DecodingRoom& room, int64_t flat) {
  float *shares = room.shares + flat * room.shared, *codes = room.codes + flat * room.rank;
  shares[0] = room.sizes[flat];
  float peak = kLowest, total = 0;
  for (int64_t index = 0; index < room.shared; ++index) peak = std::fmax(peak, shares[index]);
  for (int64_t index = 0; index < room.shared; ++index) {
    shares[index] = std::exp(shares[index] - peak);
    total += shares[index];
  }
  for (int64_t index = 0; index < room.shared; ++index) shares[index] /= total;
  for (int64_t column = 0; column < room.rank; ++column) {
    codes[column] = column < given.rank ? room.mixed[flat * given.rank + column] * shares[0] : 0.0f;
  }
}

// A block of the numbers of the mixed latents, all queries.
inline void expand_mixed(const Decoding& given, const DecodingRoom& room, int64_t block) {
  const int64_t first = block * kRowsAtOnce, last = smaller(first + kRowsAtOnce, given.latent);
  const Problem& rows = given.rows;
  const int64_t width = given.latent + (rows.kind == kPacked ? given.rotated : 0);
  with_type(given.expand, [&](const auto* expand) {
    with_type(given.exact, [&](const auto* exact) {
      dot(expand, given.rank, first, last, given.rank, room.codes, room.rank, rows.batch * rows.queries,
          [&](int64_t flat, int64_t number, float product) {
            const float* shares = room.shares + flat * room.shared;
            float sum = product / room.divisors[number] + shares[0] * room.offset[number];
            for (int64_t index = 0; index < rows.hidden_count; ++index) {
              const int64_t token = flat / rows.queries * rows.hidden_count + index;
              sum += shares[1 + index] * number_of(exact + token * width + number);
            }
            room.divided[flat * room.latent + number] = sum;
          });
    });
  });
}

// A block of the outputs of one head, all sequences.
inline void absorb_output(const Decoding& given, const DecodingRoom& room, int64_t head, int64_t block) {
  const int64_t heads = given.rows.queries;
  const int64_t first = block * kRowsAtOnce, last = smaller(first + kRowsAtOnce, given.value);
  with_type(given.weight, [&](const auto* weight) {
    const auto* values = weight + head * given.head_stride() + given.nope * given.latent;
    const float* mixed = room.divided + head * room.latent;
    dot(values, given.latent, first, last, given.latent, mixed, heads * room.latent, given.rows.batch,
        [&](int64_t sequence, int64_t number, float product) {
          given.output[(sequence * heads + head) * given.value + number] = product;
        });
  });
}

// The steps of all of it. Called by all threads of a parallel region. False in the one that had no memory.
inline bool decode(const Decoding& given) {
  const DecodingRoom room(given);
  const int64_t heads = given.rows.queries, queries = given.rows.batch * heads;
  Problem rows = given.rows;
  rows.query = room.queries, rows.query_stride = heads * rows.dim;
  rows.output = room.mixed, rows.sizes = room.sizes;
  set_room(rows, room.rest);
  // What is behind the last number of a latent must be 0 for whole vectors.
#pragma omp for schedule(static) nowait
  for (int64_t flat = 0; flat < queries; ++flat) {
    for (int64_t column = given.latent; column < room.latent; ++column) room.divided[flat * room.latent + column] = 0;
  }
#pragma omp for schedule(static)
  for (int64_t column = 0; column < given.latent; ++column) {
    invert(given.transform, column, room.divisors[column], room.offset[column]);
  }
  const int64_t column_blocks = blocks_of(given.latent, kColumnsAtOnce);
#pragma omp for schedule(static)
  for (int64_t task = 0; task < heads * column_blocks; ++task) {
    absorb_query(given, room, task / column_blocks, task % column_blocks);
  }
#pragma omp for schedule(static)
  for (int64_t block = 0; block < blocks_of(given.rank, kCodesAtOnce); ++block) compress_queries(given, room, block);
#pragma omp for schedule(static)
  for (int64_t flat = 0; flat < queries; ++flat) prepare(given, room, flat);
  const bool done = attend(rows);
#pragma omp for schedule(static)
  for (int64_t flat = 0; flat < queries; ++flat) share(given, room, flat);
#pragma omp for schedule(static)
  for (int64_t block = 0; block < blocks_of(given.latent, kRowsAtOnce); ++block) expand_mixed(given, room, block);
  const int64_t value_blocks = blocks_of(given.value, kRowsAtOnce);
#pragma omp for schedule(static)
  for (int64_t task = 0; task < heads * value_blocks; ++task) {
    absorb_output(given, room, task / value_blocks, task % value_blocks);
  }
  return done;
}

}  // namespace kvsplice
