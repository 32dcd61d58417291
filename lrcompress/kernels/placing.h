/* Numbers of two rows, put into an order: see placing.py, which finds it in the library of rows.c. */
#pragma once

#include <stdlib.h>

#include "rows_lanes.h"

#define IN_RANGE(INDEX)                                                                                              \
    for (int64_t j = 0; j < a + b; j++) beyond |= ((const INDEX *)order)[j] < 0 || ((const INDEX *)order)[j] >= a + b
#define PLACED(NUMBER, INDEX)                                                                                        \
    for (int64_t j = 0; j < a + b; j++) ((NUMBER *)to)[j] = ((const NUMBER *)row)[((const INDEX *)order)[j]]

/* y (count, a + b): at j number order[j] of first (count, a) and then rest (count, b); `size` bytes a number, 2 or 4,
   and `index_bytes` an index, 2 or 4. 0, 1 without memory, or 2 where an index is out of range. */
int placed(int64_t count, int64_t a, int64_t b, const char *first, const char *rest, const void *order, char *y,
           int32_t size, int32_t index_bytes) {
    int failed = 0, beyond = 0;
    if (index_bytes == 2) IN_RANGE(int16_t);
    else IN_RANGE(int32_t);
    if (beyond) return 2;
    _Pragma("omp parallel if (count * (a + b) > SMALL)") {
        char *row = malloc((size_t)((a + b) * size));
        if (!row) {_Pragma("omp atomic write") failed = 1;}
        _Pragma("omp for schedule(static)") for (int64_t r = 0; r < count; r++) {
            if (!row) continue;
            char *to = y + r * (a + b) * size;
            memcpy(row, first + r * a * size, (size_t)(a * size));
            memcpy(row + a * size, rest + r * b * size, (size_t)(b * size));
            if (size == 2 && index_bytes == 2) PLACED(uint16_t, int16_t);
            else if (size == 2) PLACED(uint16_t, int32_t);
            else if (index_bytes == 2) PLACED(uint32_t, int16_t);
            else PLACED(uint32_t, int32_t);
        }
        free(row);
    }
    return failed;
}
