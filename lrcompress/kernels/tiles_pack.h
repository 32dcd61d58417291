/* Codes into tiles, each of the width at which it takes fewest bits. */
#pragma once

#include <string.h>

#include "tiles_layout.h"

#define PRICE 18 /* of a far value in bits: it takes 16, and time */

/* smallest and largest code of width b */
static inline int64_t lowest(int b) { return b ? -((int64_t)1 << (b - 1)) : 0; }
static inline int64_t highest(int b) { return b ? ((int64_t)1 << (b - 1)) - 1 : 0; }

/* far values that width b needs for the codes of a tile */
static int64_t far_values(const int32_t *codes, int b) {
    if (b == 32) return 0;
    const int32_t low = (int32_t)lowest(b), high = (int32_t)highest(b);
    int64_t count = 0;
    for (int k = 0; k < CODES; k++) {
        const uint32_t over = codes[k] > high ? (uint32_t)codes[k] - (uint32_t)high : 0;
        const uint32_t under = codes[k] < low ? (uint32_t)low - (uint32_t)codes[k] : 0;
        count += (over + 62) / 63 + (under + 63) / 64;
    }
    return count;
}

/* Pack codes (rows, columns) of 1, 2 or 4 bytes, whole strips but for the last. data, head and far are large enough for
   width 32 and MOST_FAR a tile; used: vectors and far values before, and after. */
void tiles_pack(const void *codes, int bytes, int64_t rows, int64_t columns, const uint16_t *row_order,
                const uint16_t *column_order, uint32_t *data, uint8_t *head, int16_t *far, int32_t *start, int32_t *used) {
    const int64_t tiles = (columns + COLUMNS - 1) / COLUMNS;
    int64_t words = 0, beside = 0;
    for (int64_t strip = 0; strip * ROWS < rows; strip++) {
        start[2 * strip] = used[0] + (int32_t)(words / 16);
        start[2 * strip + 1] = used[1] + (int32_t)beside;
        for (int64_t t = 0; t < tiles; t++, head += 2) {
            int32_t tile[CODES] = {0};
            for (int64_t r = 0; r < ROWS && strip * ROWS + r < rows; r++)
                for (int64_t j = 0; j < COLUMNS && t * COLUMNS + j < columns; j++) {
                    const int64_t at = row_order[strip * ROWS + r] * columns + column_order[t * COLUMNS + j];
                    tile[r * COLUMNS + j] = bytes == 1   ? ((const int8_t *)codes)[at]
                                            : bytes == 2 ? ((const int16_t *)codes)[at]
                                                         : ((const int32_t *)codes)[at];
                }
            int best = 32;
            int64_t count = 0, cost = CODES * 32;
            for (size_t k = 0; k < sizeof WIDTHS; k++) {
                const int64_t found = far_values(tile, WIDTHS[k]), price = CODES * WIDTHS[k] + PRICE * found;
                if (found <= MOST_FAR && price < cost) best = WIDTHS[k], count = found, cost = price;
            }
            head[0] = (uint8_t)best;
            head[1] = (uint8_t)count;
            const int64_t low = lowest(best), high = highest(best);
            memset(data + words, 0, (size_t)best * 64);
            for (int k = 0; k < CODES; k++) {
                const int r = k / COLUMNS, column = k % COLUMNS, lane = column % 16;
                const int64_t near = tile[k] < low ? low : tile[k] > high ? high : tile[k];
                for (int64_t rest = tile[k] - near; rest;) {
                    const int64_t some = rest < -64 ? -64 : rest > 63 ? 63 : rest;
                    far[beside++] = (int16_t)(some * 512 + 16 * column + r);
                    rest -= some;
                }
                const int at = (2 * r + column / 16) * best;
                const uint64_t bits = ((uint64_t)near & (((uint64_t)1 << best) - 1)) << (at % 32);
                if (!best) continue;
                data[words + at / 32 * 16 + lane] |= (uint32_t)bits;
                if (bits >> 32) data[words + (at / 32 + 1) * 16 + lane] |= (uint32_t)(bits >> 32);
            }
            words += 16 * best;
        }
    }
    used[0] += (int32_t)(words / 16);
    used[1] += (int32_t)beside;
}
