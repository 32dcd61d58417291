/* Rows of a weight onto one of ggml's block types, each after the ones before it: see lrcompress/ggml/rounding.py and
   plain.py, which does the same for strips of rows. Everything row-major float32; loops run along a row so that the
   compiler vectorises them. */

#include <stdlib.h>

#include "blocks_row.h"

static void store_row(const row_state *r, int64_t row) {
    const job *j = r->j;
    for (int64_t i = 0; i < j->n; i++) {
        int64_t run = i / j->run;
        int code = 0;
        while (j->levels[code] != r->level[i]) code++;
        j->codes[row * j->n + i] = (uint8_t)code;
        j->numbers[row * j->n + i] = r->level[i] * r->scale[run] - r->offset[run];
    }
}

static void load_row(row_state *r, int64_t row) {
    const job *j = r->j;
    int64_t runs = j->n / j->run, supers = j->n / j->block, per = j->block / j->run;
    for (int64_t run = 0; run < runs; run++) {
        int64_t at = row * supers + run / per;
        r->scale[run] = j->scale[at] * (j->has_steps ? j->steps[row * runs + run] : 1);
        r->offset[run] = j->has_minimum ? j->minimum[at] * (j->has_offsets ? j->offsets[row * runs + run] : 1) : 0;
    }
    for (int64_t i = 0; i < j->n; i++) r->level[i] = j->levels[j->codes[row * j->n + i]];
}

/* 0, or 1 where there is no memory. */
int round_rows(const job *j) {
    int64_t m = j->m, n = j->n;
    float *room = calloc(5 * n + 2 * (n / j->run), sizeof(float));
    if (!room) return 1;
    row_state r = {j, room, room + 5 * n, room + 5 * n + n / j->run, room + n, room + 2 * n, room + 3 * n, room + 4 * n};
    for (int64_t round = 0; round < j->rounds; round++) for (int64_t i = 0; i < m; i++) {
        memcpy(r.wanted, j->target + i * n, n * sizeof(float));
        if (j->rows) for (int64_t k = 0; k < (round ? m : i); k++) {
            float by = round ? (k == i ? 0 : j->rows[i * m + k] / j->rows[i * m + i]) : j->rows_factor[k * m + i];
            if (by == 0) continue;
            const float *number = j->numbers + k * n, *target = j->target + k * n;
            for (int64_t c = 0; c < n; c++) r.wanted[c] -= by * (number[c] - target[c]);
        }
        if (round) load_row(&r, i);
        else sweep(&r, i);
        descend(&r, i);
        store_row(&r, i);
    }
    free(room);
    return 0;
}
