// What `kvsplice_hf.native` calls. Each function takes one structure, whose twin is declared there.

#include "attend.h"
#include "decode.h"
#include "pack.h"

#define KVSPLICE_EXPORT extern "C" __attribute__((visibility("default")))

// Numbers of working memory.
KVSPLICE_EXPORT int64_t kvsplice_attend_room(const kvsplice::Problem* problem) { return kvsplice::room_of(*problem); }
KVSPLICE_EXPORT int64_t kvsplice_decode_room(const kvsplice::Decoding* given) { return kvsplice::room_of(*given); }

// All return 0, or 1 where there is not enough memory for the rows that are unpacked.
KVSPLICE_EXPORT int kvsplice_attend(const kvsplice::Problem* problem) {
  int failed = 0;
#pragma omp parallel num_threads(problem->threads) reduction(max : failed)
  failed = !kvsplice::attend(*problem);
  return failed;
}

KVSPLICE_EXPORT int kvsplice_decode(const kvsplice::Decoding* given) {
  int failed = 0;
#pragma omp parallel num_threads(given->rows.threads) reduction(max : failed)
  failed = !kvsplice::decode(*given);
  return failed;
}

KVSPLICE_EXPORT int kvsplice_pack(const kvsplice::Packing* packing) {
#pragma omp parallel num_threads(packing->threads)
  kvsplice::pack(*packing);
  return 0;
}
