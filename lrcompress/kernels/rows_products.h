/* PRODUCTS: y = x Wᵀ, y = x W and rows as numbers, for one form of rows. */
#pragma once

#include <stdlib.h>

#include "rows_lanes.h"

enum { TOGETHER = 4, LONG = 4096 };

/* rows of numbers as float32, each filled up with zeros to `width`; NULL without memory */
static float *padded(const void *x, int kind, int64_t rows, int64_t columns, int64_t width) {
    float *made = aligned_alloc(64, (size_t)(rows * width) * sizeof(float));
    for (int64_t r = 0; made && r < rows; r++) {
        float *to = made + r * width;
        if (kind == BFLOAT16)
            for (int64_t j = 0; j < columns; j++) to[j] = from_bfloat16(((const uint16_t *)x)[r * columns + j]);
        else
            memcpy(to, (const float *)x + r * columns, (size_t)columns * sizeof(float));
        memset(to + columns, 0, (size_t)(width - columns) * sizeof(float));
    }
    return made;
}

static float *zeros(int64_t count) { /* a multiple of 16 */
    float *made = aligned_alloc(64, (size_t)count * sizeof(float));
    return made ? memset(made, 0, (size_t)count * sizeof(float)) : made;
}

/* NAME_product: y (count, rows) = x (count, columns) Wᵀ. NAME_transposed: y (count, columns) = x (count, rows) W.
   NAME_numbers: rows from `start` to `stop` of W. Kinds are those of x and y alike. 0, or 1 without memory.
   A row after the other is read fastest. Where one x fills the cache, ABREAST rows share what is read of it. */
#define PRODUCTS(NAME, WEIGHT, FORM, CONSTANT, ABREAST)                                                              \
    INLINE void NAME##_dot(const WEIGHT *w, int64_t row, const float *x, int64_t width, const int count,             \
                           void *y, int64_t at, int kind) {                                                          \
        Lanes sum[TOGETHER] = {{0}};                                                                                 \
        WEIGHT##Row state; FORM##_begin(w, row, &state, CONSTANT);                                                   \
        int64_t full = w->columns / LANES, b = 0;                                                                    \
        for (; b + TOGETHER <= full; b += TOGETHER)                                                                  \
            _Pragma("GCC unroll 4") for (int k = 0; k < TOGETHER; k++) {                                             \
                Lanes found = FORM##_next(w, &state, LANES, CONSTANT);                                               \
                _Pragma("GCC unroll 4") for (int r = 0; r < count; r++)                                              \
                    sum[count == 1 ? k : r] += found * lanes(x + r * width + (b + k) * LANES);                       \
            }                                                                                                        \
        for (; b * LANES < w->columns; b++) {                                                                        \
            int64_t left = w->columns - b * LANES;                                                                   \
            Lanes found = FORM##_next(w, &state, left < LANES ? (int)left : LANES, CONSTANT);                        \
            _Pragma("GCC unroll 4") for (int r = 0; r < count; r++) sum[r] += found * lanes(x + r * width + b * LANES);\
        }                                                                                                            \
        if (count == 1) sum[0] += sum[1] + sum[2] + sum[3];                                                          \
        _Pragma("GCC unroll 4") for (int r = 0; r < count; r++) put(y, at + r * w->rows, kind, total(sum[r]));       \
    }                                                                                                                \
    INLINE void NAME##_abreast(const WEIGHT *w, int64_t first, const float *x, void *y, int kind) {                  \
        Lanes sum[ABREAST][2] = {{{0}}};                                                                             \
        WEIGHT##Row state[ABREAST];                                                                                  \
        for (int i = 0; i < ABREAST; i++) FORM##_begin(w, first + i, &state[i], CONSTANT);                           \
        int64_t full = w->columns / LANES, b = 0;                                                                    \
        for (; b + 2 <= full; b += 2)                                                                                \
            _Pragma("GCC unroll 2") for (int k = 0; k < 2; k++) {                                                    \
                Lanes here = lanes(x + (b + k) * LANES);                                                             \
                _Pragma("GCC unroll 4") for (int i = 0; i < ABREAST; i++)                                            \
                    sum[i][k] += here * FORM##_next(w, &state[i], LANES, CONSTANT);                                  \
            }                                                                                                        \
        for (; b * LANES < w->columns; b++) {                                                                        \
            int64_t left = w->columns - b * LANES;                                                                   \
            _Pragma("GCC unroll 4") for (int i = 0; i < ABREAST; i++)                                                \
                sum[i][0] += lanes(x + b * LANES) *                                                                  \
                             FORM##_next(w, &state[i], left < LANES ? (int)left : LANES, CONSTANT);                  \
        }                                                                                                            \
        for (int i = 0; i < ABREAST; i++) put(y, first + i, kind, total(sum[i][0] + sum[i][1]));                     \
    }                                                                                                                \
    int NAME##_product(const WEIGHT *w, const void *x, int32_t kind, int64_t count, void *y) {                       \
        int64_t width = (w->columns + LANES - 1) / LANES * LANES;                                                    \
        float *wide = padded(x, kind, count, w->columns, width);                                                     \
        if (!wide) return 1;                                                                                         \
        int64_t abreast = ABREAST > 1 && count == 1 && w->columns > LONG ? w->rows / ABREAST * ABREAST : 0;          \
        _Pragma("omp parallel if (w->rows * w->columns > SMALL)") {                                                  \
            _Pragma("omp for schedule(static) nowait") for (int64_t row = 0; row < abreast; row += ABREAST)          \
                NAME##_abreast(w, row, wide, y, kind);                                                               \
            _Pragma("omp for schedule(static)") for (int64_t row = abreast; row < w->rows; row++) {                  \
                int64_t r = 0;                                                                                       \
                for (; r + TOGETHER <= count; r += TOGETHER)                                                         \
                    NAME##_dot(w, row, wide + r * width, width, TOGETHER, y, r * w->rows + row, kind);               \
                for (; r < count; r++) NAME##_dot(w, row, wide + r * width, width, 1, y, r * w->rows + row, kind);   \
            }                                                                                                        \
        }                                                                                                            \
        free(wide);                                                                                                  \
        return 0;                                                                                                    \
    }                                                                                                                \
    int NAME##_transposed(const WEIGHT *w, const void *x, int32_t kind, int64_t count, void *y) {                    \
        int64_t width = (w->columns + LANES - 1) / LANES * LANES;                                                    \
        float *sums = zeros(count * width);                                                                          \
        int failed = !sums;                                                                                          \
        _Pragma("omp parallel if (!failed && w->rows * w->columns > SMALL)") {                                       \
            float *own = zeros(count * width);                                                                       \
            if (!own) {_Pragma("omp atomic write") failed = 1;}                                                      \
            _Pragma("omp for schedule(static)") for (int64_t row = 0; row < w->rows; row++)                          \
                for (int64_t r = 0; own && r < count; r++) {                                                         \
                    float factor = number(x, r * w->rows + row, kind);                                               \
                    WEIGHT##Row state; FORM##_begin(w, row, &state, CONSTANT);                                       \
                    for (int64_t j = 0; j < w->columns; j += LANES) {                                                \
                        int left = w->columns - j < LANES ? (int)(w->columns - j) : LANES;                           \
                        *(Lanes *)(own + r * width + j) += factor * FORM##_next(w, &state, left, CONSTANT);          \
                    }                                                                                                \
                }                                                                                                    \
            _Pragma("omp critical") for (int64_t k = 0; own && sums && k < count * width; k++) sums[k] += own[k];    \
            free(own);                                                                                               \
        }                                                                                                            \
        for (int64_t r = 0; !failed && r < count; r++)                                                               \
            for (int64_t j = 0; j < w->columns; j++) put(y, r * w->columns + j, kind, sums[r * width + j]);          \
        free(sums);                                                                                                  \
        return failed;                                                                                               \
    }                                                                                                                \
    void NAME##_numbers(const WEIGHT *w, int64_t start, int64_t stop, void *to, int32_t kind) {                      \
        _Pragma("omp parallel for schedule(static) if ((stop - start) * w->columns > SMALL)")                        \
        for (int64_t row = start; row < stop; row++) {                                                               \
            WEIGHT##Row state; FORM##_begin(w, row, &state, CONSTANT);                                               \
            for (int64_t j = 0; j < w->columns; j += LANES) {                                                        \
                int left = w->columns - j < LANES ? (int)(w->columns - j) : LANES;                                   \
                put_lanes(to, (row - start) * w->columns + j, kind, FORM##_next(w, &state, left, CONSTANT), left);   \
            }                                                                                                        \
        }                                                                                                            \
    }
