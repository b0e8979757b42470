// Products of bf16 numbers two by two, for processors that take them at once: twice as many as of float32.
#pragma once

#include "lanes.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define KVSPLICE_TWINS 1
#else
#define KVSPLICE_TWINS 0
#endif

#if KVSPLICE_TWINS
namespace kvsplice {

constexpr int kTwins = 2 * kLanes;
typedef uint16_t Twins __attribute__((vector_size(2 * kTwins)));  // pairs of bf16 numbers

inline Twins twins(const Bfloat16* from) { return load<Twins>(from); }
inline Twins first_twins(const Bfloat16* from, int64_t count) {
  return count >= kTwins ? twins(from) : (Twins)_mm512_maskz_loadu_epi16((1u << count) - 1, from);
}
inline Twins all_twins(const Bfloat16* pair) { return (Twins)_mm512_set1_epi32(load<int32_t>(pair)); }
inline Twins kept(Twins vector) {
  asm("" : "+v"(vector));
  return vector;
}

// Adds to each sum the products of a pair with another.
inline Floats add_products(Floats sums, Twins one, Twins other) {
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)one, (__m512bh)other);
}

// Pairs of a number of one vector and the number at the same place of the other. Not in their order: of each eight, the
// first four are in the low pairs, the others in the high ones.
inline Twins low_pairs(Twins one, Twins other) { return (Twins)_mm512_unpacklo_epi16((__m512i)one, (__m512i)other); }
inline Twins high_pairs(Twins one, Twins other) { return (Twins)_mm512_unpackhi_epi16((__m512i)one, (__m512i)other); }

// From one order to the other: of numbers in low and high pairs, the first vector and the second; and back.
inline Floats first_of(Floats low, Floats high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
}
inline Floats second_of(Floats low, Floats high) {
  return __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
}
inline Floats low_of(Floats first, Floats second) {
  return __builtin_shufflevector(first, second, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}
inline Floats high_of(Floats first, Floats second) {
  return __builtin_shufflevector(first, second, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// Numbers as they are in low and in high pairs; and numbers in that order as bf16 in their own.
inline Floats low_floats(Twins numbers) { return (Floats)low_pairs(Twins{}, numbers); }
inline Floats high_floats(Twins numbers) { return (Floats)high_pairs(Twins{}, numbers); }
inline Twins joined(Floats low, Floats high) {
  const __m512i fours = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (Twins)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), fours);
}

}  // namespace kvsplice
#endif
