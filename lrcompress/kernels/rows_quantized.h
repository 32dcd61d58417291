/* Rows of codes of 2, 3, 4 or 8 bits, a scale and a zero point for every group of columns, a multiple of 16 or the row. */
#pragma once

#include "rows_lanes.h"

typedef struct {
    int64_t rows, columns, group, groups, row_bytes, zero_bytes;
    const uint8_t *codes, *zeros;
    const void *scale;
    int32_t scale_kind, flip; /* flip: what turns codes without a sign, of int8, into these */
} Quantized;

typedef struct {
    const uint8_t *codes, *zeros, *end;
    int64_t scale, group, left;
    Lanes table; /* what the codes stand for, again and again */
    float steps[LANES], centres[LANES]; /* scales and zero points of 16 groups */
} QuantizedRow;

INLINE void quantized_begin(const Quantized *w, int64_t row, QuantizedRow *at, const int bits) {
    at->codes = w->codes + row * w->row_bytes;
    at->end = at->codes + w->row_bytes;
    at->zeros = w->zeros + row * w->zero_bytes;
    at->scale = row * w->groups;
    at->group = at->left = 0;
}

/* What 16 codes, in 2 * bits bytes, stand for in a table of 16 that repeats itself; a plain number each with 8 bits and
   without AVX-512. */
INLINE Lanes quantized_lanes(const uint8_t *from, int flip, Lanes table, const int bits) {
    uint64_t word = 0;
    uint16_t tail;
    if (bits < 8) memcpy(&word, from, bits == 3 ? 4 : 2 * (size_t)(bits & 7));
    if (bits == 3) memcpy(&tail, from + 4, 2), word |= (uint64_t)tail << 32;
#ifdef WIDE
    if (bits == 8) {
        __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)from), _mm_set1_epi8((char)flip));
        return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    }
    __m512i words, count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (bits == 2)
        words = _mm512_srlv_epi32(_mm512_set1_epi32((int)word), _mm512_slli_epi32(count, 1));
    else {
        if (bits == 3) word = (word & 0xffffff) | (word >> 24) << 32;
        words = _mm512_castsi128_si512(_mm_cvtsi64_si128((long long)word));
        words = _mm512_permutexvar_epi32(_mm512_srli_epi32(count, 3), words);
        __m512i place = _mm512_and_si512(count, _mm512_set1_epi32(7));
        words = _mm512_srlv_epi32(words, _mm512_mullo_epi32(place, _mm512_set1_epi32(bits)));
    }
    return (Lanes)_mm512_permutexvar_ps(words, (__m512)table); /* takes the lowest four bits of an index */
#else
    Lanes found;
    for (int l = 0; l < LANES; l++)
        found[l] = (float)(bits == 8 ? (uint32_t)(from[l] ^ flip) : (uint32_t)(word >> (bits * l)) & ((1u << bits) - 1));
    return found;
#endif
}

INLINE Lanes quantized_counts(const int bits) {
    Lanes counts;
    for (int l = 0; l < LANES; l++) counts[l] = (float)(l & ((1 << bits) - 1));
    return counts;
}

INLINE void quantized_group(const Quantized *w, QuantizedRow *at, const int bits) {
    int place = (int)(at->group % LANES);
    if (place == 0) {
        int64_t left = w->groups - at->group;
        int count = left < LANES ? (int)left : LANES;
        uint8_t bytes[16] = {0};
        memcpy(bytes, at->zeros + at->group / LANES * 2 * bits, ((size_t)count * bits + 7) / 8);
        *(Lanes *)at->centres = quantized_lanes(bytes, 0, quantized_counts(bits), bits);
        spread(w->scale, at->scale + at->group, (1u << count) - 1, w->scale_kind, (Lanes *)at->steps);
    }
    at->table = (quantized_counts(bits) - at->centres[place]) * at->steps[place];
    at->group++;
    at->left = w->group;
}

INLINE Lanes quantized_next(const Quantized *w, QuantizedRow *at, int columns, const int bits) {
    if (at->left <= 0) quantized_group(w, at, bits);
    at->left -= LANES;
    uint8_t rest[16] = {0};
    const uint8_t *from = at->codes;
    if (columns < LANES) memcpy(rest, from, (size_t)(at->end - from)), from = rest;
    at->codes += 2 * bits;
    Lanes found = quantized_lanes(from, w->flip, at->table, bits);
#ifdef WIDE
    if (bits < 8) return found;
#endif
    int place = (int)((at->group - 1) % LANES);
    return (found - at->centres[place]) * at->steps[place];
}
