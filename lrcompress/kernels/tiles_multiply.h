/* Few rows times codes in tiles, which are unpacked in registers. */
#pragma once

#include <stdlib.h>
#include <string.h>

#include "tiles_codes.h"

#define MOST 8 /* rows that are multiplied from one unpacking */

/* sums[r] += the tile times x (32) */
static inline __attribute__((always_inline)) void add_products(const Words *tile, const int b, const float *x,
                                                               Floats *sums) {
    const Floats left = *(const Floats *)x, right = *(const Floats *)(x + 16);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        sums[r] += values_of(tile, b, 2 * r) * left;
        sums[r] += values_of(tile, b, 2 * r + 1) * right;
    }
}

enum { AHEAD = 1024, LANES = 16, CHAINS = 4 };

/* beside[chain][row] += far values times x, each in its tile's columns from `first` on; sums of one row do not wait for
   each other */
static void add_far(int64_t count, const int16_t *far, const int32_t *first, const float *x, float beside[CHAINS][ROWS]) {
    int64_t k = 0;
    for (; k + CHAINS <= count; k += CHAINS)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++)
            beside[c][far[k + c] & 15] += (float)(far[k + c] >> 9) * x[first[k + c] + (far[k + c] >> 4 & 31)];
    for (; k < count; k++) beside[0][far[k] & 15] += (float)(far[k] >> 9) * x[first[k] + (far[k] >> 4 & 31)];
}

/* y (16) = strip times x (32 tiles). Far values of many tiles are added together: a loop for the few of each would be
   left at another place every time, which costs more than they do. */
static void strip_product(int64_t tiles, const uint8_t *head, const Words *tile, const int16_t *far, const float *x,
                          float *y) {
    Floats sums[ROWS];
    float beside[CHAINS][ROWS] = {{0}};
    int32_t first[AHEAD + MOST_FAR + LANES];
    int64_t waiting = 0;
    for (int r = 0; r < ROWS; r++) sums[r] = (Floats){0};
    for (int64_t t = 0; t < tiles; t++, head += 2) {
        const int32_t column = (int32_t)(COLUMNS * t);
#define MULTIPLY(B) add_products(tile, B, x + column, sums)
        BY_WIDTH(MULTIPLY)
        *(Ints *)(first + waiting) = (Ints){0} + column;
        for (int k = LANES; k < head[1]; k += LANES) *(Ints *)(first + waiting + k) = (Ints){0} + column;
        tile += head[0];
        waiting += head[1];
        if (waiting >= AHEAD || t == tiles - 1) {
            add_far(waiting, far, first, x, beside);
            far += waiting;
            waiting = 0;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float sum = beside[0][r] + beside[1][r] + beside[2][r] + beside[3][r];
        for (int lane = 0; lane < LANES; lane++) sum += sums[r][lane];
        y[r] = sum;
    }
}

/* the same for n rows of x, up to MOST, each `stride` after the one before; y is (n, 16) */
static void strip_products(int64_t tiles, const uint8_t *head, const Words *tile, const int16_t *far, const float *x,
                           int64_t n, int64_t stride, float *y) {
    Floats sums[MOST * ROWS];
    float made[CODES];
    memset(sums, 0, sizeof(Floats) * ROWS * (size_t)n);
    for (int64_t t = 0; t < tiles; t++, head += 2, x += COLUMNS) {
        if (!head[0] && !head[1]) continue;
        numbers(head, tile, far, made);
        for (int64_t i = 0; i < n; i++) {
            const Floats left = *(const Floats *)(x + i * stride), right = *(const Floats *)(x + i * stride + 16);
            Floats *sum = sums + ROWS * i;
            for (int r = 0; r < ROWS; r++)
                sum[r] += *(Floats *)(made + 32 * r) * left + *(Floats *)(made + 32 * r + 16) * right;
        }
        tile += head[0];
        far += head[1];
    }
    for (int64_t i = 0; i < n * ROWS; i++) {
        float sum = 0;
        for (int lane = 0; lane < 16; lane++) sum += sums[i][lane];
        y[i] = sum;
    }
}

/* y (n, rows) = x (n, columns) times the weight, transposed, n up to MOST; 1 where there is no memory */
int tiles_multiply(const Held *held, const float *x, int64_t n, float *y, int threads) {
    const int64_t tiles = tiles_of(held), strips = (held->rows + ROWS - 1) / ROWS, width = tiles * COLUMNS;
    float *sorted = aligned_alloc(64, sizeof(float) * (size_t)(n * width));
    if (!sorted) return 1;
    for (int64_t i = 0; i < n; i++) {
        const float *from = x + i * held->columns;
        float *to = sorted + i * width;
#pragma GCC unroll 8
        for (int64_t j = 0; j < held->columns; j++) {
            const int64_t column = held->column_order[j];
            to[j] = from[column] * column_factor(held, column);
        }
        memset(to + held->columns, 0, sizeof(float) * (size_t)(width - held->columns));
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t strip = 0; strip < strips; strip++) {
        float made[MOST * ROWS];
        const uint8_t *head = held->head + 2 * strip * tiles;
        const Words *tile = held->tiles + held->start[2 * strip];
        const int16_t *far = held->far + held->start[2 * strip + 1];
        if (n == 1)
            strip_product(tiles, head, tile, far, sorted, made);
        else
            strip_products(tiles, head, tile, far, sorted, n, width, made);
        for (int r = 0; r < ROWS && ROWS * strip + r < held->rows; r++) {
            int64_t row = row_at(held, ROWS * strip + r);
            float scale = row_factor(held, row);
            for (int64_t i = 0; i < n; i++) y[i * held->rows + row] = made[i * ROWS + r] * scale;
        }
    }
    free(sorted);
    return 0;
}
