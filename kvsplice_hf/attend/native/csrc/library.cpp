// What `kvsplice_hf.native` calls. Each function takes one structure, whose twin is declared in
// `kvsplice_hf.native_types`. All return 0, or 1 where there is not enough memory.

#include "attend.h"
#include "decode.h"
#include "encode.h"
#include "heads.h"
#include "pack.h"
#include "read_heads.h"
#include "workspace.h"

#define KVSPLICE_EXPORT extern "C" __attribute__((visibility("default")))

// Working memory of the calling thread, which the others of its parallel region share.
template <class Given>
float* room_for(const Given& given) {
  thread_local kvsplice::Workspace workspace;
  return workspace.take(kvsplice::room_of(given));
}

KVSPLICE_EXPORT int kvsplice_attend(const kvsplice::Problem* handed) {
  kvsplice::Problem problem = *handed;
  float* room = room_for(problem);
  if (room == nullptr) return 1;
  set_room(problem, room);
  int failed = 0;
#pragma omp parallel num_threads(problem.threads) reduction(max : failed)
  failed = !kvsplice::attend(problem);
  return failed;
}

KVSPLICE_EXPORT int kvsplice_decode(const kvsplice::Decoding* handed) {
  kvsplice::Decoding given = *handed;
  given.room = room_for(given);
  if (given.room == nullptr) return 1;
  int failed = 0;
#pragma omp parallel num_threads(given.rows.threads) reduction(max : failed)
  failed = !kvsplice::decode(given);
  return failed;
}

// Work that every thread of a parallel region takes its part in, with room to work in.
template <class Given, class Work>
int with_room(const Given* handed, Work work) {
  Given given = *handed;
  given.room = room_for(given);
  if (given.room == nullptr) return 1;
#pragma omp parallel num_threads(given.threads)
  work(given);
  return 0;
}

KVSPLICE_EXPORT int kvsplice_encode(const kvsplice::Encoding* handed) {
  return with_room(handed, [](const kvsplice::Encoding& given) { kvsplice::encode(given); });
}

KVSPLICE_EXPORT int kvsplice_pack(const kvsplice::Packing* handed) { return with_room(handed, kvsplice::pack); }

KVSPLICE_EXPORT int kvsplice_search(const kvsplice::Search* handed) { return with_room(handed, kvsplice::search); }

// Beyond 1 for memory: what was prepared of heads is of other numbers than they have now.
constexpr int kNotPrepared = 2;

bool are_prepared(const kvsplice::Head* heads, int64_t count, bool in_bf16) {
  for (int64_t index = 0; index < count; ++index) {
    if (!is_prepared(heads[index], in_bf16)) return false;
  }
  return true;
}

// How many numbers are prepared of a head.
KVSPLICE_EXPORT int64_t kvsplice_prepared_size(const kvsplice::Head* head) { return kvsplice::prepared_size(*head); }

KVSPLICE_EXPORT int kvsplice_prepare(const kvsplice::Head* head, int64_t in_bf16) {
  kvsplice::prepare(*head, in_bf16);
  return 0;
}

KVSPLICE_EXPORT int kvsplice_decode_heads(const kvsplice::HeadsDecoding* handed) {
  kvsplice::HeadsDecoding given = *handed;
  if (!are_prepared(given.heads, given.count, given.in_bf16)) return kNotPrepared;
  given.room = room_for(given);
  if (given.room == nullptr) return 1;
  int failed = 0;
#pragma omp parallel num_threads(given.threads) reduction(max : failed)
  failed = !kvsplice::decode_heads(given);
  return failed;
}

KVSPLICE_EXPORT int kvsplice_encode_heads(const kvsplice::HeadsEncoding* handed) {
  if (!are_prepared(handed->heads, handed->count, handed->in_bf16)) return kNotPrepared;
  int failed = 0;
#pragma omp parallel num_threads(handed->threads) reduction(max : failed)
  failed = !kvsplice::encode_heads(*handed);
  return failed;
}

KVSPLICE_EXPORT int kvsplice_read_heads(const kvsplice::HeadsReading* handed) {
  kvsplice::HeadsReading given = *handed;
  if (!are_prepared(given.stored.heads, given.stored.count, false)) return kNotPrepared;
  given.room = room_for(given);
  if (given.room == nullptr) return 1;
  int failed = 0;
#pragma omp parallel num_threads(given.stored.threads) reduction(max : failed)
  failed = !kvsplice::read_heads(given);
  return failed;
}
