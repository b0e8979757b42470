// Layers with ordinary attention, on the CPU: all key heads of a layer in one call. A key head is a latent (its value)
// and a rotated key; no query meets values. See `kvsplice_hf.code.heads`.
//
// Legend: B sequences, K key heads, G queries of each, S stored rows, T new tokens, v and d numbers of a value and of a
// key, E exact tokens.
#pragma once

#include "attend.h"
#include "encode.h"
#include "transform.h"
#include "weights.h"

namespace kvsplice {

// What is the same at each step of a model.
struct Head {
  Encoding coding;         // of one token; what belongs to a call is left open
  Keys keys;               // how they are read; the same
  int64_t columns, mixed;  // see `Problem`
  int64_t first_byte;      // of its row in that of the layer
  float* prepared;         // see `PreparedHead`; `prepare` fills it
};

// ---- What is prepared once

constexpr int kMarkNumbers = 16;  // that a mark takes, in which whole vectors go on

// Tells of what numbers something was prepared.
class Mark {
 public:
  template <class Number>
  void add(const Number* numbers, int64_t count) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(numbers);
    const int64_t size = count * sizeof(Number), step = sizeof(Ints);
    for (int64_t at = 0; at < size; at += 2 * step) {
      one_ = one_ * 0x01000193 ^ part(bytes, at, size);
      other_ = other_ * 0x01000193 ^ part(bytes, at + step, size);
    }
  }
  void add(const Numbers& numbers, int64_t count) {
    with_type(numbers, [&](const auto* data) { add(data, count); });
  }
  uint64_t value() const {
    uint64_t sum = 0xCBF29CE484222325;
    for (int lane = 0; lane < kLanes; ++lane) {
      for (const uint32_t part : {static_cast<uint32_t>(one_[lane]), static_cast<uint32_t>(other_[lane])}) {
        sum = (sum ^ part) * 0x100000001B3;
      }
    }
    return sum;
  }

 private:
  typedef uint32_t Parts __attribute__((vector_size(kLanes * 4)));
  static Parts part(const uint8_t* bytes, int64_t at, int64_t size) {
    Parts found = {};
    if (at + int64_t{sizeof found} <= size) return load<Parts>(bytes + at);
    if (at < size) std::memcpy(&found, bytes + at, size - at);
    return found;
  }
  Parts one_ = {}, other_ = {};
};

inline uint64_t mark_of(const Head& head, bool in_bf16) {
  const Keys& keys = head.keys;
  const Codec& codec = head.coding.packer.codec;
  const int64_t numbers = head.coding.packer.numbers, sizes[] = {in_bf16, keys.dim, keys.rank, keys.start, numbers};
  Mark mark;
  mark.add(sizes, 5);
  const Transform& transform = head.coding.transform;
  for (const Numbers& part : {transform.scale, transform.shift, transform.offset}) {
    if (part.data) mark.add(part, head.coding.latent);
  }
  if (keys.dim == 0) return mark.value();
  mark.add(keys.expand, keys.dim * keys.rank);
  mark.add(keys.mean, keys.dim);
  mark.add(keys.pairs, keys.dim);
  mark.add(codec.index, codec.coded + codec.raw);
  mark.add(codec.reaches, codec.coded);
  mark.add(codec.scales, numbers);
  mark.add(codec.centres, numbers);
  mark.add(codec.widths, numbers);
  return mark.value();
}

// The mark, the transform as it is read, and keys as they are.
struct PreparedHead {
  float *mark, *scale, *shift, *column_scales, *keys, *rest;

  explicit PreparedHead(const Head& head) {
    const int64_t latent = round_up(head.coding.latent, kLanes);
    mark = head.prepared;
    scale = mark + kMarkNumbers, shift = scale + latent, column_scales = shift + latent;
    keys = column_scales + head.mixed;
    rest = keys + folded_size(head.keys, head.coding.packer.codec);
  }
};

inline int64_t prepared_size(const Head& head) { return PreparedHead(head).rest - head.prepared; }

inline bool is_prepared(const Head& head, bool in_bf16) {
  return load<uint64_t>(PreparedHead(head).mark) == mark_of(head, in_bf16);
}

inline void prepare(const Head& head, bool in_bf16) {
  const PreparedHead prepared(head);
  for (int64_t column = 0; column < head.coding.latent; ++column) {
    read(head.coding.transform, column, prepared.scale[column], prepared.shift[column]);
  }
  Keys keys = head.keys;
  keys.room = prepared.keys;
  Problem problem{};
  problem.codec = head.coding.packer.codec, problem.keys = keys;
  problem.values = head.coding.rank + head.coding.predicted;
  for (int64_t column = 0; column < head.mixed; ++column) {
    prepared.column_scales[column] = problem.codec.scale(problem.codec_column(column));
  }
  problem.kind = kPacked, problem.in_bf16 = in_bf16;
  if (keys.dim) {
    with_rows(problem, [&]<class Rows>() {
      fold_keys<typename Rows::Kind>(keys, head.coding.packer.codec, keys.start);
      return true;
    });
  }
  store(prepared.mark, mark_of(head, in_bf16));
}

inline Transform ready_transform(const Head& head) {
  const PreparedHead prepared(head);
  return {{prepared.scale, 0}, {prepared.shift, 0}, {}, 1};
}

// ---- A step: one new query per sequence and query head

// Strides count bytes for rows and numbers for anything else.
struct HeadsDecoding {
  int64_t count;  // K
  const Head* heads;
  int64_t in_bf16;                           // see `Problem`
  int64_t batch, queries, rows, value, key;  // B, G, S, v, d
  const uint8_t* data;
  int64_t batch_stride, row_stride;
  const int64_t* pages;  // see `Problem`
  int64_t pages_stride, page_rows, page_stride;
  const int64_t* lengths;
  const float* query;  // [B, K G, d]
  double scaling;
  const float* bias;  // [B or 1, S], or null
  int64_t bias_batch_stride;
  const uint8_t* table;  // see `Keys`
  int64_t table_stride, table_slots;
  const int32_t* slots;
  int64_t slots_stride;
  int64_t splits, threads;
  const int64_t* hidden;  // rows of exact tokens, [B, E]
  int64_t hidden_count;
  Numbers exact;       // [B, E, K (v + d)]: each head's value and key
  const float* sinks;  // one logit per query head that carries no value, [K G]; or null
  float* output;       // [B, K G, v]
  float* room;         // as many numbers as `room_of` says
};

inline int64_t room_of_head(const Problem& problem) {
  const int64_t queries = problem.batch * problem.queries;
  return round_up(room_without_keys(problem) + queries * (problem.values + 1), kLanes);
}

// The rows of one key head as any other rows.
inline Problem head_problem(const HeadsDecoding& given, int64_t index) {
  const Head& head = given.heads[index];
  Problem problem{};
  problem.batch = given.batch, problem.queries = given.queries, problem.rows = given.rows;
  problem.values = problem.unscored = head.coding.rank + head.coding.predicted;
  problem.dim = problem.values + given.key;
  problem.kind = kPacked, problem.in_bf16 = given.in_bf16;
  problem.data = given.data + head.first_byte;
  problem.batch_stride = given.batch_stride, problem.row_stride = given.row_stride;
  problem.pages = given.pages, problem.pages_stride = given.pages_stride;
  problem.page_rows = given.page_rows, problem.page_stride = given.page_stride;
  problem.lengths = given.lengths;
  problem.query = given.query + index * given.queries * given.key;
  problem.query_stride = given.count * given.queries * given.key;
  problem.scaling = given.scaling;
  problem.bias = given.bias, problem.bias_queries = 1, problem.bias_batch_stride = given.bias_batch_stride;
  problem.columns = head.columns, problem.mixed = head.mixed;
  problem.column_scales = PreparedHead(head).column_scales;
  problem.codec = head.coding.packer.codec;
  problem.keys = head.keys;
  problem.keys.table = given.table, problem.keys.table_stride = given.table_stride;
  problem.keys.table_slots = given.table_slots;
  problem.keys.slots = given.slots, problem.keys.slots_stride = given.slots_stride;
  problem.keys.room = PreparedHead(head).keys;
  problem.splits = given.splits, problem.threads = given.threads;
  problem.hidden = given.hidden, problem.hidden_count = given.hidden_count;
  return problem;
}

// With its part of the room, of which each head has as much.
inline Problem head_problem(const HeadsDecoding& given, int64_t index, int64_t room_of_each) {
  Problem problem = head_problem(given, index);
  problem.room = given.room + index * room_of_each;
  problem.output = problem.room + room_without_keys(problem);
  problem.sizes = problem.output + problem.batch * problem.queries * problem.values;
  return problem;
}

inline int64_t room_of_each(const HeadsDecoding& given) {
  int64_t most = 0;
  for (int64_t index = 0; index < given.count; ++index) {
    const int64_t room = room_of_head(head_problem(given, index));
    most = most < room ? room : most;
  }
  return most;
}

inline int64_t room_of(const HeadsDecoding& given) { return given.count * room_of_each(given); }

// Calls `take(exact token, its value and key)`.
template <class Take>
void each_exact(const HeadsDecoding& given, const Problem& problem, int64_t index, int64_t sequence, Take&& take) {
  const int64_t width = given.value + problem.dim - problem.values;
  with_type(given.exact, [&](const auto* exact) {
    for (int64_t token = 0; token < problem.hidden_count; ++token) {
      take(token, exact + ((sequence * problem.hidden_count + token) * given.count + index) * width);
    }
  });
}

// Shares of a query in one softmax: `shares[0]` is that of all rows, those behind it are of the exact tokens. What the
// sink has of it is lost.
inline void find_shares(const HeadsDecoding& given, const Problem& problem, int64_t index, int64_t sequence,
                        int64_t query, float* shares) {
  const int64_t keys = problem.dim - problem.values, exact_tokens = problem.hidden_count;
  const float* from = problem.query + sequence * problem.query_stride + query * keys;
  shares[0] = problem.sizes[sequence * problem.queries + query];
  each_exact(given, problem, index, sequence, [&](int64_t token, const auto* exact) {
    const int64_t position = problem.hidden[sequence * exact_tokens + token];
    const bool is_there = position >= 0 && position < rows_of_sequence(problem, sequence);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t number = 0; number < keys; ++number) sum += from[number] * number_of(exact + given.value + number);
    const float bias = is_there && problem.bias ? bias_of(problem, sequence, query)[position] : 0.0f;
    shares[1 + token] = is_there ? sum * static_cast<float>(problem.scaling) + bias : kLowest;
  });
  const float sink = given.sinks ? given.sinks[index * problem.queries + query] : kLowest;
  float peak = sink;
  for (int64_t token = 0; token <= exact_tokens; ++token) peak = std::fmax(peak, shares[token]);
  float total = std::exp(sink - peak);
  for (int64_t token = 0; token <= exact_tokens; ++token) total += shares[token] = std::exp(shares[token] - peak);
  for (int64_t token = 0; token <= exact_tokens; ++token) shares[token] /= total;
}

// The output of a query of one head: its mixed codes decoded, and exact values. Whether there was the memory for it.
inline bool decode_mixed(const HeadsDecoding& given, const Problem& problem, int64_t index, int64_t sequence,
                         int64_t query) {
  thread_local Workspace workspace;
  const Encoding& coding = given.heads[index].coding;
  const Transform transform = ready_transform(given.heads[index]);
  float *output = given.output + ((sequence * given.count + index) * problem.queries + query) * given.value,
        *shares = workspace.take(problem.hidden_count + 1);
  if (shares == nullptr) return false;
  merge(problem, sequence, query);
  find_shares(given, problem, index, sequence, query, shares);
  const float* codes = problem.output + (sequence * problem.queries + query) * problem.values;
  with_type(coding.expand, [&](const auto* expand) {
    for (int64_t number = 0; number < given.value; ++number, expand += problem.values) {
      float divisor, offset, sum = 0;
      invert(transform, number, divisor, offset);
#pragma omp simd reduction(+ : sum)
      for (int64_t code = 0; code < problem.values; ++code) sum += number_of(expand + code) * codes[code];
      output[number] = shares[0] * (sum / divisor + offset);
    }
  });
  each_exact(given, problem, index, sequence, [&](int64_t token, const auto* exact) {
    for (int64_t number = 0; number < given.value; ++number)
      output[number] += shares[1 + token] * number_of(exact + number);
  });
  return true;
}

// One part of the rows of all heads, tile by tile: all keys of a tile are turned alike. Whether there was the memory.
template <class Rows>
bool attend_heads_part(const HeadsDecoding& given, int64_t room, int64_t sequence, int64_t split) {
  using Reader = KeyReader<typename Rows::Kind>;
  thread_local Workspace workspace;
  const auto problem_of = [&](int64_t index) { return head_problem(given, index, room); };
  int64_t most = 0, turns_size = 0;
  for (int64_t index = 0; index < given.count; ++index) {
    const Problem problem = problem_of(index);
    begin_part(problem, sequence, split);
    most = std::max(most, Rows::memory_size(problem));
    turns_size = std::max(turns_size, Reader::turns_size(problem.keys));
  }
  float* memory = workspace.take(turns_size + most);
  if (memory == nullptr) return false;
  const Problem any = problem_of(0);
  each_tile<Rows>(any, sequence, split, [&](const Tile& tile) {
    bool are_taken = false;
    for (int64_t index = 0; index < given.count; ++index) {
      Problem problem = problem_of(index);
      if (problem.keys.dim) {
        if (!are_taken) take_turns(problem.keys, sequence, tile.first, tile.count, Reader::as_turns(memory));
        are_taken = true;
        problem.keys.turns = memory;
      }
      attend_tile<Rows>(problem, tile, partial_of(problem, sequence, split), memory + turns_size);
    }
  });
  return true;
}

// The steps of all of it. Called by all threads of a parallel region. False in the one that had no memory.
template <class Rows>
bool decode_heads(const HeadsDecoding& given) {
  const int64_t room = room_of_each(given), batch = given.batch, queries = given.queries;
  bool done = true;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < given.count * batch; ++task) {
    const Problem problem = head_problem(given, task / batch, room);
    for (int64_t query = 0; query < queries; ++query) turn_query<Rows>(problem, task % batch, query);
  }
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < batch * given.splits; ++task) {
    done &= attend_heads_part<Rows>(given, room, task / given.splits, task % given.splits);
  }
  const int64_t of_head = batch * queries;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < given.count * of_head; ++task) {
    const int64_t index = task / of_head, sequence = task % of_head / queries;
    done &= decode_mixed(given, head_problem(given, index, room), index, sequence, task % queries);
  }
  return done;
}

inline bool decode_heads(const HeadsDecoding& given) {
  return with_rows(head_problem(given, 0), [&]<class Rows>() { return decode_heads<Rows>(given); });
}

// ---- New tokens

// Strides count numbers.
struct HeadsEncoding {
  int64_t count;  // K
  const Head* heads;
  int64_t in_bf16;  // what they are prepared for
  int64_t batch, tokens;
  Numbers values, keys;  // [B, K, T, v] and [B, K, T, d], the last numbers side by side
  int64_t value_strides[3], key_strides[3];
  const uint8_t* turns;  // the angles of keys, [B or 1, T, d / 2]; or null
  int64_t turns_stride;  // from one sequence to the next
  uint8_t* rows;         // [B, T, row_bytes]
  int64_t row_bytes, threads;
};

inline Numbers numbers_at(const Numbers& numbers, int64_t index) {
  const int64_t size = numbers.is_bfloat16 ? sizeof(Bfloat16) : sizeof(float);
  return {static_cast<const uint8_t*>(numbers.data) + index * size, numbers.is_bfloat16};
}

// Whether there was the memory for it.
inline bool encode_head(const HeadsEncoding& given, int64_t index, int64_t sequence, int64_t token) {
  thread_local Workspace workspace;
  const Head& head = given.heads[index];
  const auto at = [&](const int64_t* strides) {
    return sequence * strides[0] + index * strides[1] + token * strides[2];
  };
  Encoding coding = head.coding;
  coding.tokens = coding.threads = 1;
  coding.latents = numbers_at(given.values, at(given.value_strides));
  coding.rotations = numbers_at(given.keys, at(given.key_strides));
  coding.keys.turns = given.turns + sequence * given.turns_stride + token * (coding.rotated / 2);
  coding.keys.turned = 1;
  coding.kind = kPacked;
  coding.transform = ready_transform(head);
  coding.rows = given.rows + (sequence * given.tokens + token) * given.row_bytes + head.first_byte;
  coding.room = workspace.take(room_of(coding));
  if (coding.room == nullptr) return false;
  encode<ThisThread>(coding, EncodingRoom(coding));
  return true;
}

// Called by all threads of a parallel region. False in the one that had no memory.
inline bool encode_heads(const HeadsEncoding& given) {
  bool done = true;
#pragma omp for schedule(dynamic, 1) collapse(3)
  for (int64_t sequence = 0; sequence < given.batch; ++sequence) {
    for (int64_t index = 0; index < given.count; ++index) {
      for (int64_t token = 0; token < given.tokens; ++token) done &= encode_head(given, index, sequence, token);
    }
  }
  return done;
}

}  // namespace kvsplice
