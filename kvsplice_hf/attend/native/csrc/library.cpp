// What `kvsplice_hf.native` calls. Each function takes one structure, whose twin is declared in
// `kvsplice_hf.native_types`. All return 0, or 1 where there is not enough memory.

#include "attend.h"
#include "decode.h"
#include "encode.h"
#include "pack.h"
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

KVSPLICE_EXPORT int kvsplice_encode(const kvsplice::Encoding* handed) { return with_room(handed, kvsplice::encode); }

KVSPLICE_EXPORT int kvsplice_pack(const kvsplice::Packing* handed) { return with_room(handed, kvsplice::pack); }

KVSPLICE_EXPORT int kvsplice_search(const kvsplice::Search* handed) { return with_room(handed, kvsplice::search); }
