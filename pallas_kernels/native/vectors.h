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

typedef uint8_t Bytes __attribute__((vector_size(32)));

constexpr int kLanes = 16;

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// The first half, then zeros.
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

// The same for whole numbers of 16 bits.
inline Ints dot(Ints sum, Words a, Words b) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  auto upper = [](Words x) { return (Ints)x >> 16; };
  return sum + upper(a << 16) * upper(b << 16) + upper(a) * upper(b);
#endif
}

// Of two rows of 16-bit elements, element by element, (first, second) as one word: the even elements, the odd ones.
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

inline Words widen(Halves x) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}

// Rounded to the nearest bfloat16, ties to even, as bits. NaN stays NaN.
inline Halves round_to_bfloat16(Floats x) {
  Words bits = as_words(x), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return narrow((x == x ? rounded : bits | 0x400000u) >> 16);
}

// Rounded to whole numbers, of numbers from -32767 to 32767.
inline Halves round_to_int16(Floats x) {
  return narrow(as_words(x + 12582912.0f));  // 1.5 * 2^23: what is left of the fraction are the lowest bits
}

inline Floats absolute(Floats x) { return as_floats(as_words(x) & 0x7fffffffu); }

// 32 whole numbers of 8 bits as numbers of 16 bits, two to a word.
inline Words int16_of_int8(Bytes x) {
#if defined(__AVX512BW__)
  return (Words)_mm512_cvtepi8_epi16((__m256i)x);
#else
  Words pairs = widen((Halves)x);
  Words even = (Words)((Ints)(pairs << 24) >> 24), odd = (Words)((Ints)(pairs << 16) >> 24);
  return (even & 0xffffu) | odd << 16;
#endif
}

#if defined(__AVX512VBMI__)
// The lower and the upper bytes of the 128 magnitudes of float8 e4m3fn as bfloat16.
struct alignas(64) Float8Bytes {
  uint8_t lower[128] = {}, upper[128] = {};
  constexpr Float8Bytes() {
    for (int i = 0; i < 128; i++) {
      int exponent = i >> 3, mantissa = i & 7;
      if (exponent == 0 && mantissa > 0) {
        for (exponent = 1; mantissa < 8; exponent--) mantissa *= 2;
      }
      int bits = i == 0 ? 0 : (exponent + 120) << 7 | (mantissa & 7) << 4;
      lower[i] = bits & 0xff, upper[i] = bits >> 8;
    }
  }
};
constexpr Float8Bytes kFloat8Bytes;
#endif

// 32 numbers of float8 e4m3fn, without its NaN, as bfloat16, which hold them exactly, two to a word.
inline Words bfloat16_of_float8(Bytes x) {
#if defined(__AVX512VBMI__)
  alignas(64) static constexpr uint8_t twice[64] = {
      0,  0,  1,  1,  2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,  8,  8,  9,  9,  10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15,
      16, 16, 17, 17, 18, 18, 19, 19, 20, 20, 21, 21, 22, 22, 23, 23, 24, 24, 25, 25, 26, 26, 27, 27, 28, 28, 29, 29, 30, 30, 31, 31};
  auto from = [](const uint8_t* bytes) { return _mm512_load_si512(bytes); };
  __m512i index = _mm512_permutexvar_epi8(from(twice), _mm512_castsi256_si512((__m256i)x));
  __m512i lower = _mm512_permutex2var_epi8(from(kFloat8Bytes.lower), index, from(kFloat8Bytes.lower + 64));
  __m512i upper = _mm512_permutex2var_epi8(from(kFloat8Bytes.upper), index, from(kFloat8Bytes.upper + 64));
  __m512i magnitude = _mm512_mask_mov_epi8(lower, 0xaaaaaaaaaaaaaaaa, upper);
  return (Words)_mm512_or_si512(magnitude, _mm512_and_si512(index, _mm512_set1_epi16(int16_t(0x8000))));
#else
  auto bits = [](Words byte) {
    // Exponent and mantissa in the places of a float32's, the bias 127 instead of 7. With exponent 0 there is no
    // leading 1: what stands for 2^-7 (1 + m / 8) is to be 2^-6 m / 8.
    Floats magnitude = as_floats(((byte & 0x7fu) << 20) + (120u << 23));
    magnitude = (byte & 0x78u) == 0 ? magnitude + magnitude - 0x1p-6f : magnitude;
    return as_words(magnitude) | (byte & 0x80u) << 24;
  };
  Words pairs = widen((Halves)x);
  return bits(pairs & 0xffu) >> 16 | bits(pairs >> 8);
#endif
}

// NaN where b is.
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

inline Floats floats_of(Floats x) { return x; }
inline Floats floats_of(Ints x) { return __builtin_convertvector(x, Floats); }

inline float largest(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < kLanes; i++) most = x[i] > most ? x[i] : most;
  return most;
#endif
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
template <class Vector>
inline Vector sums(const Vector* x) {
  Vector totals;
#if defined(__AVX512F__)
  Vector by2[8], by4[4];
  for (int i = 0; i < 8; i++) {
    __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
    by2[i] = (Vector)_mm512_unpacklo_ps(a, b) + (Vector)_mm512_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 4; i++) {
    __m512d a = (__m512d)by2[2 * i], b = (__m512d)by2[2 * i + 1];
    by4[i] = (Vector)_mm512_unpacklo_pd(a, b) + (Vector)_mm512_unpackhi_pd(a, b);
  }
  auto halve = [](Vector x, Vector y) {
    __m512 a = (__m512)x, b = (__m512)y;
    return (Vector)_mm512_shuffle_f32x4(a, b, 0x88) + (Vector)_mm512_shuffle_f32x4(a, b, 0xdd);
  };
  totals = halve(halve(by4[0], by4[1]), halve(by4[2], by4[3]));
#else
  for (int i = 0; i < kLanes; i++) {
    totals[i] = 0;
    for (int j = 0; j < kLanes; j++) totals[i] += x[i][j];
  }
#endif
  return totals;
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87; NaN of NaN.
inline Floats exp_of_negative(Floats x) {
  const Floats lowest = broadcast(-87.0f);
  Floats clamped = maximum(lowest, x);
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
