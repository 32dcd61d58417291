/* Rows of few numbers, in the order of their columns. */
#pragma once

#include "rows_lanes.h"

/* columns are those of a mask of bits */
typedef struct {
    int64_t rows, columns, nonzeros, mask_bytes;
    const uint8_t *mask;
    const void *values, *scale; /* scale: of every row of int8, otherwise NULL */
    int32_t scale_kind, value_kind;
} Masked;

typedef struct {
    int64_t bit, value;
    float step;
} MaskedRow;

INLINE void masked_begin(const Masked *w, int64_t row, MaskedRow *at, const int unused) {
    *at = (MaskedRow){row * w->columns, row * w->nonzeros, w->scale ? number(w->scale, row, w->scale_kind) : 1};
}

INLINE Lanes masked_next(const Masked *w, MaskedRow *at, int columns, const int unused) {
    Lanes found;
    at->value += spread(w->values, at->value, mask_at(w->mask, w->mask_bytes, at->bit, columns), w->value_kind, &found);
    at->bit += columns;
    return found * at->step;
}

/* columns are named in ascending order, by int16 or int32 */
typedef struct {
    int64_t rows, columns, nonzeros;
    const void *index, *values, *scale;
    int32_t scale_kind, value_kind, index_bytes;
} Indexed;

typedef struct {
    int64_t column, value, end;
    float step;
} IndexedRow;

INLINE void indexed_begin(const Indexed *w, int64_t row, IndexedRow *at, const int unused) {
    int64_t from = row * w->nonzeros;
    *at = (IndexedRow){0, from, from + w->nonzeros, w->scale ? number(w->scale, row, w->scale_kind) : 1};
}

INLINE Lanes indexed_next(const Indexed *w, IndexedRow *at, int columns, const int unused) {
    uint32_t mask = 0;
    for (int64_t k = at->value; k < at->end; k++) {
        int64_t index = w->index_bytes == 2 ? ((const int16_t *)w->index)[k] : ((const int32_t *)w->index)[k];
        if (index >= at->column + columns) break;
        mask |= 1u << (index - at->column);
    }
    Lanes found;
    at->value += spread(w->values, at->value, mask, w->value_kind, &found);
    at->column += columns;
    return found * at->step;
}
