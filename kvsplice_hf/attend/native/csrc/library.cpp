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

KVSPLICE_EXPORT int kvsplice_encode(const kvsplice::Encoding* handed) {
  kvsplice::Encoding given = *handed;
  given.room = room_for(given);
  if (given.room == nullptr) return 1;
#pragma omp parallel num_threads(given.threads)
  kvsplice::encode(given);
  return 0;
}

KVSPLICE_EXPORT int kvsplice_pack(const kvsplice::Packing* handed) {
  kvsplice::Packing packing = *handed;
  packing.room = room_for(packing);
  if (packing.room == nullptr) return 1;
#pragma omp parallel num_threads(packing.threads)
  kvsplice::pack(packing);
  return 0;
}

KVSPLICE_EXPORT int kvsplice_search(const kvsplice::Search* handed) {
  kvsplice::Search given = *handed;
  given.room = room_for(given);
  if (given.room == nullptr) return 1;
#pragma omp parallel num_threads(given.threads)
  kvsplice::search(given);
  return 0;
}
