// From the latents of new tokens to the rows that a cache stores: the C++ twin of `kvsplice_hf.LearnedKVSplice.rows`,
// without LayerNorm and gradients. Rounds where that rounds, so that codes are the same with and without a cache.
//
// Legend: R, r, P as in `kvsplice_hf.absorbed`.
#pragma once

#include "attend.h"
#include "pack.h"
#include "transform.h"
#include "weights.h"

namespace kvsplice {

struct Encoding {
  int64_t tokens, latent, rank, rotated;  // how many; R, r, P
  Numbers latents, rotations;             // [tokens, R] and [tokens, P]
  Transform transform;
  Numbers compress;  // [r, R]
  int64_t kind;      // of the rows, a `RowKind`
  Packer packer;     // where they are packed
  void* rows;        // [tokens, r + P], or packed
  int64_t threads;
  float* room;  // as many numbers as `room_of` says
};

// What goes from step to step: transformed latents, filled up with 0 to whole vectors, and rows as numbers.
struct EncodingRoom {
  int64_t latent, dim;  // numbers from one token to the next
  float *latents, *rows, *rest;

  explicit EncodingRoom(const Encoding& given) {
    latent = round_up(given.latent, kLanes);
    dim = given.rank + given.rotated;
    latents = given.room;
    rows = latents + given.tokens * latent;
    rest = rows + given.tokens * dim;
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
    room.latents[token * room.latent + column] = rounded(number, given.compress.is_bfloat16);
  }
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

inline void store_row(const Encoding& given, const EncodingRoom& room, int64_t token) {
  float* row = room.rows + token * room.dim;
  for (int64_t column = 0; column < given.rotated; ++column) {
    const float number = number_at(given.rotations, token * given.rotated + column);
    row[given.rank + column] = rounded(number, given.latents.is_bfloat16);
  }
  if (given.kind == kPacked) {
    pack_row(given.packer, row, static_cast<uint8_t*>(given.rows) + token * given.packer.codec.row_bytes);
  } else if (given.kind == kBfloat16) {
    Bfloat16* stored = static_cast<Bfloat16*>(given.rows) + token * room.dim;
    for (int64_t column = 0; column < room.dim; ++column) stored[column] = to_bfloat16(row[column]);
  } else {
    std::memcpy(static_cast<float*>(given.rows) + token * room.dim, row, room.dim * sizeof(float));
  }
}

// The steps of all of it. Called by all threads of a parallel region.
inline void encode(const Encoding& given) {
  const EncodingRoom room(given);
#pragma omp for schedule(static) nowait
  for (int64_t token = 0; token < given.tokens; ++token) {
    for (int64_t column = given.latent; column < room.latent; ++column) room.latents[token * room.latent + column] = 0;
  }
#pragma omp for schedule(static)
  for (int64_t column = 0; column < given.latent; ++column) transform_column(given, room, column);
#pragma omp for schedule(static)
  for (int64_t block = 0; block < blocks_of(given.rank, kRowsAtOnce); ++block) compress_latents(given, room, block);
#pragma omp for schedule(static)
  for (int64_t token = 0; token < given.tokens; ++token) store_row(given, room, token);
}

}  // namespace kvsplice
