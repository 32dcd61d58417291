/* GATHERED: the product with many rows of x and few numbers in each of W's: only what is there is multiplied. */
#pragma once

#include <stdlib.h>

#include "rows_sparse.h"

INLINE void masked_list(const Masked *w, int64_t row, int32_t *columns, float *values) {
    MaskedRow at;
    masked_begin(w, row, &at, 0);
    for (int64_t j = 0; j < w->columns; j += LANES) {
        int count = w->columns - j < LANES ? (int)(w->columns - j) : LANES;
        for (uint32_t mask = mask_at(w->mask, w->mask_bytes, at.bit + j, count); mask; mask &= mask - 1) {
            *columns++ = (int32_t)j + __builtin_ctz(mask);
            *values++ = number(w->values, at.value++, w->value_kind) * at.step;
        }
    }
}

INLINE void indexed_list(const Indexed *w, int64_t row, int32_t *columns, float *values) {
    IndexedRow at;
    indexed_begin(w, row, &at, 0);
    for (int64_t k = at.value; k < at.end; k++) {
        *columns++ = w->index_bytes == 2 ? ((const int16_t *)w->index)[k] : ((const int32_t *)w->index)[k];
        *values++ = number(w->values, k, w->value_kind) * at.step;
    }
}

enum { CHUNK = 128 };

/* y (rows, count) = W z, z (columns, count) and y float32, count a multiple of CHUNK. 0, or 1 without memory.
   A chunk of z stays in the cache while every row reads some of it. */
#define GATHERED(FORM, WEIGHT)                                                                                       \
    int FORM##_gathered(const WEIGHT *w, const float *z, int64_t count, float *y) {                                  \
        int failed = 0;                                                                                              \
        _Pragma("omp parallel") {                                                                                    \
            int32_t *columns = malloc((size_t)w->nonzeros * sizeof(int32_t));                                        \
            float *values = malloc((size_t)w->nonzeros * sizeof(float));                                             \
            int there = columns && values;                                                                           \
            if (!there) {_Pragma("omp atomic write") failed = 1;}                                                    \
            for (int64_t c = 0; c < count; c += CHUNK) {                                                             \
                _Pragma("omp for schedule(static)") for (int64_t row = 0; row < w->rows; row++) {                    \
                    if (!there) continue;                                                                            \
                    FORM##_list(w, row, columns, values);                                                            \
                    Lanes sum[CHUNK / LANES] = {{0}};                                                                \
                    for (int64_t k = 0; k < w->nonzeros; k++) {                                                      \
                        const float *from = z + columns[k] * count + c;                                              \
                        _Pragma("GCC unroll 8") for (int l = 0; l < CHUNK / LANES; l++)                              \
                            sum[l] += values[k] * lanes(from + l * LANES);                                           \
                    }                                                                                                \
                    memcpy(y + row * count + c, sum, sizeof sum);                                                    \
                }                                                                                                    \
            }                                                                                                        \
            free(columns);                                                                                           \
            free(values);                                                                                            \
        }                                                                                                            \
        return failed;                                                                                               \
    }
