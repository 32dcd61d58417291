/* How integer codes lie in tiles of their own width.

   A strip is 16 rows of codes, in an order of rows; a tile of it is 32 columns, in an order of columns. A tile of width
   b is b vectors of 16 words (little-endian int32). Lane l of them holds 32 codes of b bits, two's complement, lowest bits
   first and running on from one vector's word to the next: code 2 r + h is that of row r and column 16 h + l.
   What does not fit lies beside, 16 bits each: position in the tile (bits 0 to 8: 16 column + row) and what is to
   be added (bits 9 to 15, signed). A strip's tiles follow one another, and so do its tiles' far values; `start` has, a
   strip, where both begin (in vectors, in far values), `head`, a tile, its width and its count of far values. */
#pragma once

#include <stdint.h>

#define ROWS 16
#define COLUMNS 32
#define CODES (ROWS * COLUMNS)
#define MOST_FAR 255

enum { FLOAT32, BFLOAT16 };

typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

static const uint8_t WIDTHS[] = {0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 32};

/* How a weight (rows, columns) is held: row_order (rows) is the row, less the first of its `block`, at every place;
   column_order (columns) likewise; row_index, column_index its scales' places in row_scale, column_scale (256 each);
   row_gain (rows), column_gain (columns) multiply these, but for single rows (tiles_rows), or are NULL. */
typedef struct {
    int64_t rows, columns, block;
    const Words *tiles;
    const uint8_t *head;
    const int16_t *far;
    const int32_t *start;
    const uint16_t *row_order, *column_order;
    const uint8_t *row_index, *column_index;
    const float *row_scale, *column_scale, *row_gain, *column_gain;
} Held;

static inline int64_t tiles_of(const Held *held) { return (held->columns + COLUMNS - 1) / COLUMNS; }

static inline float row_factor(const Held *held, int64_t row) {
    const float scale = held->row_scale[held->row_index[row]];
    return held->row_gain ? scale * held->row_gain[row] : scale;
}

static inline float column_factor(const Held *held, int64_t column) {
    const float scale = held->column_scale[held->column_index[column]];
    return held->column_gain ? scale * held->column_gain[column] : scale;
}

static inline int64_t row_at(const Held *held, int64_t place) {
    return place / held->block * held->block + held->row_order[place];
}
