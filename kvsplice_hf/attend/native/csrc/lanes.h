// Vectors of the width of this processor, and the few operations on them that a compiler does not give.
//
// Written with the vector extensions that GCC and Clang share, so that one source serves AVX-512, AVX2, NEON and
// others.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define KVSPLICE_LANES 16
#elif defined(__AVX__)
#define KVSPLICE_LANES 8
#else
#define KVSPLICE_LANES 4
#endif

namespace kvsplice {

constexpr int kLanes = KVSPLICE_LANES;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t round_up(int64_t count, int64_t step) { return blocks_of(count, step) * step; }
inline int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }
// The nearest index of `count` things.
inline int64_t clamped(int64_t index, int64_t count) { return index < 0 ? 0 : smaller(index, count - 1); }

// Loads and stores at any address: dereferencing a vector would assume that it is aligned.
template <class Vector>
inline Vector load(const void* from) {
  Vector out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

template <class Vector>
inline void store(void* to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

inline Floats all(float value) { return value - Floats{}; }
// A vector that is used several times, as one that stays in a register: compilers like to read it from memory at each
// use, and loads are what the products below would wait for.
inline Floats kept(Floats vector) {
#if defined(__x86_64__)
  asm("" : "+v"(vector));
#endif
  return vector;
}
inline Floats larger(Floats one, Floats other) { return one > other ? one : other; }

// bf16 is the upper half of a float.
struct Bfloat16 {
  uint16_t bits;
};

inline float number_of(Bfloat16 half) {
  const uint32_t bits = uint32_t{half.bits} << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// To the nearest, ties to even.
inline Bfloat16 to_bfloat16(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  if (number != number) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline Floats floats(const float* from) { return load<Floats>(from); }
inline Floats floats(const Bfloat16* from) { return (Floats)(__builtin_convertvector(load<Halves>(from), Ints) << 16); }

inline void set(float& to, float number) { to = number; }
inline void set(Bfloat16& to, float number) { to = to_bfloat16(number); }
inline void put(float* to, Floats numbers) { store(to, numbers); }
inline void put(Bfloat16* to, Floats numbers) {
#if defined(__AVX512BF16__)
  store(to, _mm512_cvtneps_pbh((__m512)numbers));
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = to_bfloat16(numbers[lane]);
#endif
}

// The first `count` numbers, and 0 behind them: nothing else is read.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline Floats first_floats(const float* from, int64_t count) {
  return count >= kLanes ? floats(from) : (Floats)_mm512_maskz_loadu_ps((1u << count) - 1, from);
}
inline Floats first_floats(const Bfloat16* from, int64_t count) {
  if (count >= kLanes) return floats(from);
  const Halves halves = (Halves)_mm256_maskz_loadu_epi16((1u << count) - 1, from);
  return (Floats)(__builtin_convertvector(halves, Ints) << 16);
}
#else
template <class Number>
inline Floats first_floats(const Number* from, int64_t count) {
  if (count >= kLanes) return floats(from);
  Number numbers[kLanes] = {};
  std::memcpy(numbers, from, count * sizeof(Number));
  return floats(numbers);
}
#endif

#if defined(__AVX512F__)
inline Ints from_bytes(Bytes bytes) { return (Ints)_mm512_cvtepu8_epi32((__m128i)bytes); }
#else
// In two steps, because GCC 12 takes lane by lane what it should do in one.
inline Ints from_bytes(Bytes bytes) { return __builtin_convertvector(__builtin_convertvector(bytes, Halves), Ints); }
#endif

// exp(x) for x <= 0, to one unit in the last place or two; 0 where it would not be a normal number.
// 2^n * e^f with |f| <= log(2) / 2, and a polynomial for e^f (the coefficients of Cephes, expf).
inline Floats exp_of_negative(Floats x) {
  constexpr float kLog2e = 1.44269504088896341f, kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to whole numbers
  const Floats bounded = larger(x, all(-87.0f));
  const Floats whole = (bounded * kLog2e + kRound) - kRound;
  const Floats rest = bounded - whole * kLog2High - whole * kLog2Low;
  Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
  return x < -87.0f ? Floats{} : sum * (Floats)power;
}

// Numbers of a table of 1, 2 or 4 vectors, where a processor can look up a whole vector at once.
#if defined(__AVX512F__)
constexpr int kMostLookedUp = 4 * kLanes;
template <int vectors>
inline Floats look_up(const Floats (&table)[4], Ints index) {
  const __m512i at = (__m512i)index;
  if constexpr (vectors == 1) return (Floats)_mm512_permutexvar_ps(at, (__m512)table[0]);
  const __m512 low = _mm512_permutex2var_ps((__m512)table[0], at, (__m512)table[1]);
  if constexpr (vectors == 2) return (Floats)low;
  const __m512 high = _mm512_permutex2var_ps((__m512)table[2], at, (__m512)table[3]);
  return (Floats)_mm512_mask_mov_ps(low, _mm512_test_epi32_mask(at, _mm512_set1_epi32(2 * kLanes)), high);
}
#else
constexpr int kMostLookedUp = 0;
template <int vectors>
inline Floats look_up(const Floats (&table)[4], Ints) {
  return table[0];
}
#endif

// The even blocks of `block` lanes of two vectors, each of one followed by that of the other; and the odd ones.
template <int block>
struct Blocks;

#define KVSPLICE_BLOCKS(block, even_lanes, odd_lanes)                                                              \
  template <>                                                                                                      \
  struct Blocks<block> {                                                                                           \
    static Floats even(Floats a, Floats b) { return __builtin_shufflevector(a, b, KVSPLICE_LANES_OF even_lanes); } \
    static Floats odd(Floats a, Floats b) { return __builtin_shufflevector(a, b, KVSPLICE_LANES_OF odd_lanes); }   \
  };
#define KVSPLICE_LANES_OF(...) __VA_ARGS__

#if KVSPLICE_LANES == 16
KVSPLICE_BLOCKS(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
KVSPLICE_BLOCKS(4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
KVSPLICE_BLOCKS(2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
KVSPLICE_BLOCKS(1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#elif KVSPLICE_LANES == 8
KVSPLICE_BLOCKS(4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
KVSPLICE_BLOCKS(2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
KVSPLICE_BLOCKS(1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
#else
KVSPLICE_BLOCKS(2, (0, 1, 4, 5), (2, 3, 6, 7))
KVSPLICE_BLOCKS(1, (0, 4, 2, 6), (1, 5, 3, 7))
#endif

// The sums over the lanes of each of `kLanes` vectors, as one vector. Two vectors share a register half by half, four
// of them quarter by quarter, and so on: three operations per vector, where summing each on its own takes nine.
template <int block = 1>
inline Floats lane_sums(const Floats* vectors) {
  if constexpr (block == kLanes) {
    return vectors[0];
  } else {
    const Floats one = lane_sums<2 * block>(vectors), other = lane_sums<2 * block>(vectors + block);
    return Blocks<block>::even(one, other) + Blocks<block>::odd(one, other);
  }
}

}  // namespace kvsplice
