/* Rows of two of every four columns, with their places in two bits each. */
#pragma once

#include "rows_lanes.h"

typedef struct {
    int64_t rows, columns, quads, row_bytes;
    const uint8_t *places;
    const void *values;
    int32_t value_kind;
} Pairs;

typedef struct {
    const uint8_t *places;
    int64_t value;
} PairsRow;

/* the columns of two quads that a byte of four places names: bits 0 to 7 */
#define TWO(a, b) (1 << (a) | 1 << (b))
#define QUADS(n) (uint8_t)(TWO((n) & 3, (n) >> 2 & 3) | TWO((n) >> 4 & 3, (n) >> 6 & 3) << 4)
#define FOUR(n) QUADS(n), QUADS(n + 1), QUADS(n + 2), QUADS(n + 3)
#define SIXTEEN(n) FOUR(n), FOUR(n + 4), FOUR(n + 8), FOUR(n + 12)
#define SIXTY_FOUR(n) SIXTEEN(n), SIXTEEN(n + 16), SIXTEEN(n + 32), SIXTEEN(n + 48)
static const uint8_t COLUMNS[256] = {SIXTY_FOUR(0), SIXTY_FOUR(64), SIXTY_FOUR(128), SIXTY_FOUR(192)};

INLINE void pairs_begin(const Pairs *w, int64_t row, PairsRow *at, const int unused) {
    *at = (PairsRow){w->places + row * w->row_bytes, row * 2 * w->quads};
}

INLINE Lanes pairs_next(const Pairs *w, PairsRow *at, int columns, const int unused) {
    Lanes found;
    uint32_t mask = COLUMNS[at->places[0]];
    if (columns > 8) mask |= (uint32_t)COLUMNS[at->places[1]] << 8;
    mask &= (1u << (columns + 3) / 4 * 4) - 1; /* a last byte that is not full has places of no quad */
    at->places += 2;
    at->value += spread(w->values, at->value, mask, w->value_kind, &found);
    return found;
}
