/* Codes in tiles as a matrix of numbers, panels and rows of it, and what is multiplied by panels. */
#pragma once

#include <string.h>

#include "tiles_codes.h"

static inline uint16_t bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void store(void *to, int64_t at, Floats value, int kind) {
    if (kind == FLOAT32) {
        *(Floats *)((float *)to + at) = value;
        return;
    }
    const Words bits = (Words)value;
    *(Halves *)((uint16_t *)to + at) = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
}

/* Rows `first` to first + count, both whole blocks but for the last, times their scales, their columns as they are
   held, padded to whole tiles: out (count, tiles 32) of a kind. Rows are where they belong. */
void tiles_unpack(const Held *held, int64_t first, int64_t count, void *out, int kind, int scaled, int threads) {
    const int64_t tiles = tiles_of(held), width = tiles * COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t strip = first / ROWS; strip < (first + count + ROWS - 1) / ROWS; strip++) {
        float made[CODES];
        const uint8_t *head = held->head + 2 * strip * tiles;
        const Words *tile = held->tiles + held->start[2 * strip];
        const int16_t *far = held->far + held->start[2 * strip + 1];
        const int64_t left = held->rows - ROWS * strip;
        int64_t at[ROWS];
        float scale[ROWS];
        for (int r = 0; r < ROWS && r < left; r++) {
            int64_t row = row_at(held, ROWS * strip + r);
            at[r] = (row - first) * width;
            scale[r] = scaled ? held->row_scale[held->row_index[row]] : 1;
        }
        for (int64_t t = 0; t < tiles; t++, head += 2) {
            numbers(head, tile, far, made);
            for (int r = 0; r < ROWS && r < left; r++)
                for (int half = 0; half < 2; half++)
                    store(out, at[r] + COLUMNS * t + 16 * half, *(Floats *)(made + 32 * r + 16 * half) * scale[r], kind);
            tile += head[0];
            far += head[1];
        }
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

/* x (n, columns) of a kind, its columns scaled and in their order, zeros behind them: out (n, tiles 32) of that kind */
void tiles_sort(const Held *held, const void *x, int64_t n, void *out, int kind, int threads) {
    const int64_t width = tiles_of(held) * COLUMNS, columns = held->columns;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < width; j++) {
            const int64_t column = j < columns ? held->column_order[j] : 0;
            const float scale = j < columns ? held->column_scale[held->column_index[column]] : 0;
            if (kind == FLOAT32)
                ((float *)out)[i * width + j] = ((const float *)x)[i * columns + column] * scale;
            else {
                const uint32_t bits = (uint32_t)((const uint16_t *)x)[i * columns + column] << 16;
                float value;
                memcpy(&value, &bits, sizeof value);
                ((uint16_t *)out)[i * width + j] = bfloat16(value * scale);
            }
        }
}
