/* Rows of numbers as they are. */
#pragma once

#include "rows_lanes.h"

typedef struct {
    int64_t rows, columns;
    const void *values;
} Numbers;

typedef struct {
    int64_t value;
} NumbersRow;

INLINE void numbers_begin(const Numbers *w, int64_t row, NumbersRow *at, const int kind) {
    *at = (NumbersRow){row * w->columns};
}

INLINE Lanes numbers_next(const Numbers *w, NumbersRow *at, int columns, const int kind) {
    Lanes found;
    if (columns < LANES)
        spread(w->values, at->value, (1u << columns) - 1, kind, &found);
    else if (kind == FLOAT32)
        found = lanes((const float *)w->values + at->value);
    else
        found = (Lanes)(__builtin_convertvector(*(const Halves *)((const uint16_t *)w->values + at->value), Words) << 16);
    at->value += columns;
    return found;
}
