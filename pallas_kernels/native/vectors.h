// Vectors of 64 bytes, and the few operations on them that the kernels need.
//
// Written with the vector types that GCC and Clang share, so that the same code runs on any CPU: the compiler
// splits a vector where registers are narrower. Intrinsics stand only where a CPU has an instruction that no
// compiler finds by itself (AVX-512: the dot product of bfloat16 pairs, sums across lanes).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lamina {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

typedef int8_t SignedBytes __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

constexpr int kLanes = 16;

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// The first 32 bytes, then zeros.
template <class Vector>
inline Vector load_half(const void* from) {
  Vector vector = {};
  std::memcpy(&vector, from, sizeof vector / 2);
  return vector;
}

template <class Vector>
inline void store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

inline Floats broadcast(float x) { return x - Floats{}; }
inline Words broadcast(uint32_t x) { return x - Words{}; }
inline Floats as_floats(Words bits) { return reinterpret_cast<Floats>(bits); }
inline Words as_words(Floats floats) { return reinterpret_cast<Words>(floats); }

// A bfloat16 is the upper half of a float32. Of 16 words that hold two each: the lower and the upper ones.
inline Floats lower(Words pairs) { return as_floats(pairs << 16); }
inline Floats upper(Words pairs) { return as_floats(pairs & 0xffff0000u); }

// sum + a * b, lane by lane.
inline Floats dot(Floats sum, Floats a, Floats b) { return sum + a * b; }

// sum + a.lower * b.lower + a.upper * b.upper.
inline Floats dot(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + lower(a) * lower(b) + upper(a) * upper(b);
#endif
}

// Of two rows of bfloat16, element by element, (first, second) as one word: the even elements, the odd ones.
inline Words even_pairs(Words first, Words second) { return (first & 0xffffu) | (second << 16); }
inline Words odd_pairs(Words first, Words second) { return (first >> 16) | (second & 0xffff0000u); }

// Conversions to other widths, which GCC does number by number unless it is told how.
inline Halves narrow(Words x) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, Halves);
#endif
}

// Rounded to the nearest bfloat16, ties to even, as bits. NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The same for 16 numbers that are no NaN.
inline Halves round_to_bfloat16(Floats x) {
  Words bits = as_words(x);
  return narrow((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// 16 whole numbers of 8 bits.
inline Floats floats_of(SignedBytes x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#else
  return __builtin_convertvector(x, Floats);
#endif
}

// 16 numbers of float8 e4m3fn, without its NaN.
inline Floats floats_of(Bytes x) {
#if defined(__AVX512F__)
  Words bits = (Words)_mm512_cvtepu8_epi32((__m128i)x);
#else
  Words bits = __builtin_convertvector(x, Words);
#endif
  // Exponent and mantissa in the places of a float32's, the bias 127 instead of 7. With exponent 0 there is no
  // leading 1: what stands for 2^-7 (1 + m / 8) is to be 2^-6 m / 8.
  Floats magnitude = as_floats(((bits & 0x7fu) << 20) + (120u << 23));
  magnitude = (bits & 0x78u) == 0 ? magnitude + magnitude - 0x1p-6f : magnitude;
  return as_floats(as_words(magnitude) | (bits & 0x80u) << 24);
}

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

inline float largest(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < kLanes; i++) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

inline bool any(Ints x) {
  int32_t bits = 0;
  for (int i = 0; i < kLanes; i++) bits |= x[i];
  return bits != 0;
}

inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += x[i];
  return total;
#endif
}

// The sums of 16 vectors.
inline Floats sums(const Floats* x) {
#if defined(__AVX512F__)
  __m512 by2[8], by4[4];
  for (int i = 0; i < 8; i++) {
    __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
    by2[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; i++) {
    __m512d a = _mm512_castps_pd(by2[2 * i]), b = _mm512_castps_pd(by2[2 * i + 1]);
    by4[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  auto halve = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return (Floats)halve(halve(by4[0], by4[1]), halve(by4[2], by4[3]));
#else
  Floats totals;
  for (int i = 0; i < kLanes; i++) totals[i] = sum(x[i]);
  return totals;
#endif
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87.
inline Floats exp_of_negative(Floats x) {
  const Floats lowest = broadcast(-87.0f);
  Floats clamped = maximum(x, lowest);
  // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to a whole number.
  Floats shifted = clamped * 1.44269504f + 12582912.0f;
  Floats n = shifted - 12582912.0f;
  Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Floats y = broadcast(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  Ints exponent = __builtin_convertvector(n, Ints) << 23;
  Floats scaled = reinterpret_cast<Floats>(reinterpret_cast<Ints>(y) + exponent);
  return x < lowest ? Floats{} : scaled;
}

}  // namespace lamina
