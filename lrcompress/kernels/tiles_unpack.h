/* Codes in tiles as a matrix of numbers, panels and rows of it, and what is multiplied by panels. */
#pragma once

#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"
#include "tiles_codes.h"

static inline void store(void *to, int64_t at, Floats value, int kind) {
    if (kind == FLOAT32)
        *(Floats *)((float *)to + at) = value;
    else
        put_bfloat16((uint16_t *)to + at, value);
}

/* The rows of a strip, times their scales, their columns as they are held: row r to out at[r], of a kind */
static inline void unpack_strip(const Held *held, int64_t strip, const int64_t *at, void *out, int kind, int scaled) {
    const int64_t tiles = tiles_of(held), left = held->rows - ROWS * strip;
    float made[CODES], scale[ROWS];
    const uint8_t *head = held->head + 2 * strip * tiles;
    const Words *tile = held->tiles + held->start[2 * strip];
    const int16_t *far = held->far + held->start[2 * strip + 1];
    for (int r = 0; r < ROWS && r < left; r++)
        scale[r] = scaled ? row_factor(held, row_at(held, ROWS * strip + r)) : 1;
    for (int64_t t = 0; t < tiles; t++, head += 2) {
        numbers(head, tile, far, made);
        for (int r = 0; r < ROWS && r < left; r++)
            for (int half = 0; half < 2; half++)
                store(out, at[r] + COLUMNS * t + 16 * half, *(Floats *)(made + 32 * r + 16 * half) * scale[r], kind);
        tile += head[0];
        far += head[1];
    }
}

/* Rows `first` to first + count, both whole blocks but for the last, times their scales, their columns as they are
   held, padded to whole tiles: out (count, tiles 32) of a kind. Rows are where they belong. */
void tiles_unpack(const Held *held, int64_t first, int64_t count, void *out, int kind, int scaled, int threads) {
    const int64_t width = tiles_of(held) * COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t strip = first / ROWS; strip < (first + count + ROWS - 1) / ROWS; strip++) {
        int64_t at[ROWS];
        for (int r = 0; r < ROWS && ROWS * strip + r < held->rows; r++)
            at[r] = (row_at(held, ROWS * strip + r) - first) * width;
        unpack_strip(held, strip, at, out, kind, scaled);
    }
}

/* Rows [start, stop) of whole strips, in the order that they are held in: for panels.c */
void tiles_numbers(const Held *held, int64_t start, int64_t stop, void *out, int32_t kind) {
    const int64_t width = tiles_of(held) * COLUMNS;
    for (int64_t strip = start / ROWS; strip * ROWS < stop; strip++) {
        int64_t at[ROWS];
        for (int r = 0; r < ROWS; r++) at[r] = (ROWS * strip + r - start) * width;
        unpack_strip(held, strip, at, out, kind, 1);
    }
}

/* The `wanted` rows (n), their columns where they belong, scaled: out (n, columns) */
void tiles_rows(const Held *held, const int64_t *wanted, int64_t n, float *out, int threads) {
    const int64_t tiles = tiles_of(held);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        int64_t place = wanted[i] / held->block * held->block;
        while (row_at(held, place) != wanted[i]) place++;
        const int64_t strip = place / ROWS, r = place % ROWS;
        const uint8_t *head = held->head + 2 * strip * tiles;
        const Words *tile = held->tiles + held->start[2 * strip];
        const int16_t *far = held->far + held->start[2 * strip + 1];
        const float scale = held->row_scale[held->row_index[wanted[i]]];
        float *to = out + i * held->columns;
        for (int64_t t = 0; t < tiles; t++, head += 2) {
            float made[COLUMNS] = {0};
            const int b = head[0];
            for (int half = 0; half < 2 && b; half++)
                *(Floats *)(made + 16 * half) = __builtin_convertvector(codes_of(tile, b, (int)(2 * r + half)), Floats);
            for (int k = 0; k < head[1]; k++)
                if ((far[k] & 15) == r) made[far[k] >> 4 & 31] += (float)(far[k] >> 9);
            for (int64_t j = COLUMNS * t; j < COLUMNS * (t + 1) && j < held->columns; j++) {
                const int64_t column = held->column_order[j];
                to[column] = made[j - COLUMNS * t] * scale * held->column_scale[held->column_index[column]];
            }
            tile += head[0];
            far += head[1];
        }
    }
}

/* Numbers of a row of x (columns) in the order of the columns: to (columns) */
#define ORDERED(TYPE)                                                                                       \
    for (int64_t j = 0; j < columns; j++) ((TYPE *)own)[j] = ((const TYPE *)x)[i * columns + held->column_order[j]]

/* x (n, columns) of a kind, its columns scaled and in their order, zeros behind them: out (n, tiles 32) of that kind.
   0, or 1 without memory. */
int tiles_sort(const Held *held, const void *x, int64_t n, void *out, int kind, int threads) {
    const int64_t width = tiles_of(held) * COLUMNS, columns = held->columns;
    float *scale = calloc((size_t)width, sizeof(float));
    int failed = !scale;
    for (int64_t j = 0; scale && j < columns; j++) scale[j] = column_factor(held, held->column_order[j]);
#pragma omp parallel num_threads(threads)
    {
        void *own = calloc((size_t)width, sizeof(float));
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            if (!own || !scale) continue;
            if (kind == FLOAT32) {
                ORDERED(float);
                for (int64_t j = 0; j < width; j++) ((float *)out)[i * width + j] = ((float *)own)[j] * scale[j];
            } else {
                ORDERED(uint16_t);
                for (int64_t j = 0; j < width; j += 16) {
                    const Words bits = __builtin_convertvector(*(Halves *)((uint16_t *)own + j), Words) << 16;
                    store(out, i * width + j, (Floats)bits * *(Floats *)(scale + j), kind);
                }
            }
        }
        free(own);
    }
    free(scale);
    return failed;
}

/* What tiles_sort does, the other way round: x (n, tiles 32), its columns in their order, to out (n, columns), scaled */
void tiles_unsort(const Held *held, const void *x, int64_t n, void *out, int kind, int threads) {
    const int64_t width = tiles_of(held) * COLUMNS, columns = held->columns;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < columns; j++) {
            const int64_t column = held->column_order[j];
            const float scale = column_factor(held, column);
            if (kind == FLOAT32)
                ((float *)out)[i * columns + column] = ((const float *)x)[i * width + j] * scale;
            else
                ((uint16_t *)out)[i * columns + column] =
                    to_bfloat16(from_bfloat16(((const uint16_t *)x)[i * width + j]) * scale);
        }
}

static inline __attribute__((always_inline)) Floats sixteen(const void *from, int64_t at, int kind) {
    if (kind == FLOAT32) return *(const Floats *)((const float *)from + at);
    return (Floats)(__builtin_convertvector(*(const Halves *)((const uint16_t *)from + at), Words) << 16);
}

/* out (columns) = sums over the n rows of a times b, each (n, columns) of a kind; every thread has columns of its own */
void tiles_paired(const void *a, const void *b, int64_t n, int64_t columns, float *out, int kind, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < columns; first += 64) {
        const int64_t vectors = columns - first < 64 ? (columns - first) / 16 : 4, rest = columns - first - 16 * vectors;
        Floats sums[4] = {{0}, {0}, {0}, {0}};
        float beside[16] = {0};
        for (int64_t i = 0; i < n; i++) {
            const int64_t at = i * columns + first;
            for (int64_t v = 0; v < vectors; v++) sums[v] += sixteen(a, at + 16 * v, kind) * sixteen(b, at + 16 * v, kind);
            if (vectors == 4) continue;
            for (int64_t j = 0, k = at + 16 * vectors; j < rest; j++, k++)
                beside[j] += kind == FLOAT32
                                 ? ((const float *)a)[k] * ((const float *)b)[k]
                                 : from_bfloat16(((const uint16_t *)a)[k]) * from_bfloat16(((const uint16_t *)b)[k]);
        }
        for (int64_t v = 0; v < vectors; v++) *(Floats *)(out + first + 16 * v) = sums[v];
        if (vectors < 4)
            for (int64_t j = 0; j < rest; j++) out[first + 16 * vectors + j] = beside[j];
    }
}
