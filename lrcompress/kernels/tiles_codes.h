/* The codes of one tile as numbers, a register at a time. */
#pragma once

#include <string.h>

#include "tiles_layout.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define LOOKED_UP 4 /* widest codes that are looked up in a register, which saves one instruction of four */
#else
#define LOOKED_UP 0
#endif

/* the codes 2 r + h of all lanes; b and code are constants wherever this is used in a loop */
static inline __attribute__((always_inline)) Ints codes_of(const Words *tile, const int b, const int code) {
    const int at = code * b, word = at / 32, low = at % 32;
    if (low + b <= 32) return (Ints)(tile[word] << (32 - low - b)) >> (32 - b);
    return (Ints)((tile[word] >> low | tile[word + 1] << (32 - low)) << (32 - b)) >> (32 - b);
}

/* the same as numbers */
static inline __attribute__((always_inline)) Floats values_of(const Words *tile, const int b, const int code) {
#if LOOKED_UP
    if (b <= LOOKED_UP) {
        const int at = code * b, word = at / 32, low = at % 32;
        Words found = tile[word] >> low;
        if (low + b > 32) found |= tile[word + 1] << (32 - low);
        Floats meaning; /* of every four bits: whatever lies above the b bits of a code counts for nothing */
        for (int k = 0; k < 16; k++) meaning[k] = (float)((int32_t)((uint32_t)k << (32 - b)) >> (32 - b));
        return (Floats)_mm512_permutexvar_ps((__m512i)found, (__m512)meaning);
    }
#endif
    return __builtin_convertvector(codes_of(tile, b, code), Floats);
}

#define BY_WIDTH(CALL)                  \
    switch (head[0]) {                  \
        case 1: CALL(1); break;         \
        case 2: CALL(2); break;         \
        case 3: CALL(3); break;         \
        case 4: CALL(4); break;         \
        case 5: CALL(5); break;         \
        case 6: CALL(6); break;         \
        case 8: CALL(8); break;         \
        case 10: CALL(10); break;       \
        case 12: CALL(12); break;       \
        case 16: CALL(16); break;       \
        case 32: CALL(32); break;       \
    }

/* out[row][column] of one tile, (16, 32) */
static inline __attribute__((always_inline)) void spread(const Words *tile, const int b, float *out) {
#pragma GCC unroll 32
    for (int code = 0; code < COLUMNS; code++) *(Floats *)(out + 16 * code) = values_of(tile, b, code);
}

static void numbers(const uint8_t *head, const Words *tile, const int16_t *far, float *out) {
#define SPREAD(B) spread(tile, B, out)
    BY_WIDTH(SPREAD)
    if (!head[0]) memset(out, 0, sizeof(float) * CODES);
    for (int k = 0; k < head[1]; k++) out[(far[k] & 15) * COLUMNS + (far[k] >> 4 & 31)] += (float)(far[k] >> 9);
}
