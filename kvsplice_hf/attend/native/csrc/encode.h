// From the latents of new tokens to the rows that a cache stores: the C++ twin of `kvsplice_hf.LearnedKVSplice.rows`,
// without LayerNorm and gradients. Rounds where that rounds, so that codes are the same with and without a cache.
//
// Legend: R, r, P as in `kvsplice_hf.absorbed`.
#pragma once

#include "attend.h"
#include "keys.h"
#include "pack.h"
#include "transform.h"
#include "weights.h"

namespace kvsplice {

// How keys are coded before their rotation: see `kvsplice_hf.code.keys`.
struct KeyCoding {
  int64_t rank;          // p, numbers of a key's code; 0 where rows hold rotated keys
  Numbers compress;      // [p, P]
  Numbers mean;          // [P]
  const int64_t* pairs;  // which numbers are turned together, [2, F]
  const uint8_t* turns;  // the angles of the first tokens, in steps: [turned, F]
  int64_t turned;        // after so many tokens they come over again
};

struct Encoding {
  int64_t tokens, latent, rank, rotated;  // how many; R, r, P
  Numbers latents, rotations;             // [tokens, R] and [tokens, P]
  Transform transform;
  Numbers compress;   // [r, R]
  Numbers expand;     // [R, r + predicted]
  int64_t predicted;  // p where latents are predicted from what packing leaves of codes of keys, by the last p columns
  KeyCoding keys;
  int64_t kind;   // of the rows, a `RowKind`
  Packer packer;  // where they are packed
  void* rows;     // [tokens, r + P] or [tokens, r + p], or packed
  int64_t threads;
  float* room;  // as many numbers as `room_of` says
};

// What goes from step to step: transformed latents and keys before their rotation, both filled up with 0 to whole
// vectors, and rows as numbers.
struct EncodingRoom {
  int64_t latent, key, dim, kept;  // numbers from one token to the next
  float *latents, *keys, *rows;
  float* key_codes;  // as they will be read, where latents are predicted from that
  uint8_t* found;    // their codes along a trellis, [tokens, found_of_token]
  int64_t found_of_token;
  SearchRoom search{nullptr, 0};
  float* rest;

  // `thread` of those that share the room.
  explicit EncodingRoom(const Encoding& given, int64_t thread = 0) {
    latent = round_up(given.latent, kLanes);
    key = given.keys.rank ? round_up(given.rotated, kLanes) : 0;
    dim = given.rank + (given.keys.rank ? given.keys.rank : given.rotated);
    latents = given.room;
    keys = latents + given.tokens * latent;
    rows = keys + given.tokens * key;
    kept = round_up(given.predicted, kLanes);
    key_codes = rows + given.tokens * dim;
    const Trellis& longest = given.packer.longest();
    found = reinterpret_cast<uint8_t*>(key_codes + given.tokens * kept);
    found_of_token = given.predicted ? round_up(given.packer.chains[1].columns, kLanes * sizeof(float)) : 0;
    float* rooms = key_codes + given.tokens * (kept + found_of_token / sizeof(float));
    search = SearchRoom(rooms + thread * SearchRoom::size(longest.columns), longest.columns);
    rest = rooms + given.threads * SearchRoom::size(longest.columns);
  }
};

inline int64_t room_of(const Encoding& given) { return EncodingRoom(given).rest - given.room; }

inline float rounded(float number, bool to_half) { return to_half ? number_of(to_bfloat16(number)) : number; }

// One number of the latents of all tokens.
inline void transform_column(const Encoding& given, const EncodingRoom& room, int64_t column) {
  float scale, shift;
  read(given.transform, column, scale, shift);
  for (int64_t token = 0; token < given.tokens; ++token) {
    const float number = number_at(given.latents, token * given.latent + column) * scale + shift;
    room.latents[token * room.latent + column] = rounded(number, given.compress.is_bfloat16 && !given.predicted);
  }
}

// What is left of a block of numbers of the latents of all tokens where they are predicted.
inline void subtract_predicted(const Encoding& given, const EncodingRoom& room, int64_t block) {
  const int64_t first = block * kRowsAtOnce, last = smaller(first + kRowsAtOnce, given.latent);
  with_type(given.expand, [&](const auto* expand) {
    dot(expand + given.rank, given.rank + given.predicted, first, last, given.predicted, room.key_codes, room.kept,
        given.tokens, [&](int64_t token, int64_t number, float product) {
          float& left = room.latents[token * room.latent + number];
          left = rounded(left - product, given.compress.is_bfloat16);
        });
  });
}

inline void read_key_back(const Encoding& given, const EncodingRoom& room, int64_t token) {
  float* kept = room.key_codes + token * room.kept;
  read_back(given.packer, room.rows + token * room.dim, given.rank, kept, room.search,
            room.found + token * room.found_of_token);
  for (int64_t number = given.predicted; number < room.kept; ++number) kept[number] = 0;
}

// A block of the codes of all tokens.
inline void compress_latents(const Encoding& given, const EncodingRoom& room, int64_t block) {
  const int64_t first = block * kRowsAtOnce, last = smaller(first + kRowsAtOnce, given.rank);
  const bool to_half = given.compress.is_bfloat16 || given.latents.is_bfloat16;
  with_type(given.compress, [&](const auto* compress) {
    dot(compress, given.latent, first, last, given.latent, room.latents, room.latent, given.tokens,
        [&](int64_t token, int64_t number, float product) {
          room.rows[token * room.dim + number] = rounded(product, to_half);
        });
  });
}

// The key of a token before its rotation, without the mean.
inline void undo_turns(const Encoding& given, const EncodingRoom& room, int64_t token) {
  const int64_t pairs = given.rotated / 2;
  const uint8_t* turns = given.keys.turns + token % given.keys.turned * pairs;
  const auto& circle = Circle<float>::instance();
  float* key = room.keys + token * room.key;
  for (int64_t column = given.rotated; column < room.key; ++column) key[column] = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t first = clamped(given.keys.pairs[pair], given.rotated),
                  second = clamped(given.keys.pairs[pairs + pair], given.rotated);
    const float one = number_at(given.rotations, token * given.rotated + first),
                other = number_at(given.rotations, token * given.rotated + second);
    const float cosine = circle.cosines[turns[pair] % kSteps], sine = circle.sines[turns[pair] % kSteps];
    key[first] = one * cosine + other * sine - number_at(given.keys.mean, first);
    key[second] = other * cosine - one * sine - number_at(given.keys.mean, second);
  }
}

// A block of the codes of all keys.
inline void compress_keys(const Encoding& given, const EncodingRoom& room, int64_t block) {
  const int64_t first = block * kRowsAtOnce, last = smaller(first + kRowsAtOnce, given.keys.rank);
  with_type(given.keys.compress, [&](const auto* compress) {
    dot(compress, given.rotated, first, last, given.rotated, room.keys, room.key, given.tokens,
        [&](int64_t token, int64_t number, float product) {
          room.rows[token * room.dim + given.rank + number] = rounded(product, given.latents.is_bfloat16);
        });
  });
}

inline void store_row(const Encoding& given, const EncodingRoom& room, int64_t token) {
  float* row = room.rows + token * room.dim;
  for (int64_t column = 0; column < given.rotated && given.keys.rank == 0; ++column) {
    const float number = number_at(given.rotations, token * given.rotated + column);
    row[given.rank + column] = rounded(number, given.latents.is_bfloat16);
  }
  if (given.kind == kPacked) {
    uint8_t* known = given.predicted ? room.found + token * room.found_of_token : nullptr;
    pack_row(given.packer, row, static_cast<uint8_t*>(given.rows) + token * given.packer.codec.row_bytes, room.search,
             known);
  } else if (given.kind == kBfloat16) {
    Bfloat16* stored = static_cast<Bfloat16*>(given.rows) + token * room.dim;
    for (int64_t column = 0; column < room.dim; ++column) stored[column] = to_bfloat16(row[column]);
  } else {
    std::memcpy(static_cast<float*>(given.rows) + token * room.dim, row, room.dim * sizeof(float));
  }
}

// Who takes the parts of each step: all threads of a parallel region, or the calling one.
struct AllThreads {
  template <class Work>
  static void each(int64_t count, Work&& work) {
#pragma omp for schedule(static)
    for (int64_t index = 0; index < count; ++index) work(index);
  }
};
struct ThisThread {
  template <class Work>
  static void each(int64_t count, Work&& work) {
    for (int64_t index = 0; index < count; ++index) work(index);
  }
};

// The steps of all of it.
template <class Who>
void encode(const Encoding& given, const EncodingRoom& room) {
  Who::each(given.tokens, [&](int64_t token) {
    for (int64_t column = given.latent; column < room.latent; ++column) room.latents[token * room.latent + column] = 0;
  });
  Who::each(given.latent, [&](int64_t column) { transform_column(given, room, column); });
  if (given.keys.rank) {
    Who::each(given.tokens, [&](int64_t token) { undo_turns(given, room, token); });
    Who::each(blocks_of(given.keys.rank, kRowsAtOnce), [&](int64_t block) { compress_keys(given, room, block); });
  }
  if (given.predicted) {
    Who::each(given.tokens, [&](int64_t token) { read_key_back(given, room, token); });
    Who::each(blocks_of(given.latent, kRowsAtOnce), [&](int64_t block) { subtract_predicted(given, room, block); });
  }
  Who::each(blocks_of(given.rank, kRowsAtOnce), [&](int64_t block) { compress_latents(given, room, block); });
  Who::each(given.tokens, [&](int64_t token) { store_row(given, room, token); });
}

// Called by all threads of a parallel region.
inline void encode(const Encoding& given) { encode<AllThreads>(given, EncodingRoom(given, omp_get_thread_num())); }

}  // namespace kvsplice
