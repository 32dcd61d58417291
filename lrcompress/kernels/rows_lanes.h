/* 16 numbers side by side in a register, and how numbers of all kinds come into one and go out of it.

   Without AVX-512 the same code runs on whatever vectors the compiler has. */
#pragma once

#include <stdint.h>
#include <string.h>

#include "bfloat16.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE
#endif

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, SMALL = 1 << 16 }; /* SMALL: up to so many numbers one thread is fastest */
enum { FLOAT32, BFLOAT16, INT8 };

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));

INLINE float number(const void *from, int64_t at, int kind) {
    if (kind == INT8) return ((const int8_t *)from)[at];
    return kind == BFLOAT16 ? from_bfloat16(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

INLINE void put(void *to, int64_t at, int kind, float value) {
    if (kind == BFLOAT16)
        ((uint16_t *)to)[at] = to_bfloat16(value);
    else
        ((float *)to)[at] = value;
}

INLINE Lanes lanes(const float *from) { return *(const Lanes *)from; }

INLINE float total(Lanes of) {
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += of[l];
    return sum;
}

/* `columns` of the lanes as numbers of a kind */
INLINE void put_lanes(void *to, int64_t at, int kind, Lanes of, int columns) {
    if (columns == LANES && kind == FLOAT32)
        *(Lanes *)((float *)to + at) = of;
    else if (columns == LANES && kind == BFLOAT16)
        put_bfloat16((uint16_t *)to + at, of);
    else
        for (int l = 0; l < columns; l++) put(to, at + l, kind, of[l]);
}

/* the first `count` of 16 columns in a mask of bits, the lowest first, from bit `at` of `bytes` bytes on */
INLINE uint32_t mask_at(const uint8_t *mask, int64_t bytes, int64_t at, int count) {
    uint32_t word = 0;
    int64_t byte = at >> 3, there = bytes - byte;
    if (there >= 4)
        memcpy(&word, mask + byte, 4);
    else
        for (int64_t k = 0; k < there; k++) word |= (uint32_t)mask[byte + k] << (8 * k);
    return word >> (at & 7) & ((1u << count) - 1);
}

/* numbers of `kind` from `at` on in the lanes of `mask`, zero in the others; returns how many there are */
INLINE int spread(const void *from, int64_t at, uint32_t mask, int kind, Lanes *to) {
    int count = __builtin_popcount(mask);
#ifdef WIDE
    __mmask16 some = (__mmask16)((1u << count) - 1);
    __m512 found;
    if (kind == FLOAT32)
        found = _mm512_maskz_loadu_ps(some, (const float *)from + at);
    else if (kind == BFLOAT16)
        found = _mm512_castsi512_ps(_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, (const uint16_t *)from + at)), 16));
    else
        found = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, (const int8_t *)from + at)));
    *to = (Lanes)_mm512_maskz_expand_ps((__mmask16)mask, found);
#else
    *to = (Lanes){0};
    for (; mask; mask &= mask - 1) (*to)[__builtin_ctz(mask)] = number(from, at++, kind);
#endif
    return count;
}
