/* Rounding tiles of a weight with feedback to both sides, the fast twin of linalg/two_sided.py: Tiles.round.

   A tile is `n` x `n`; `by_column` is (column, row), and left and right lie with their last row first. Entries are
   rounded row by row: what one gets wrong moves those to its right by `right`, and those below by `left`. */

#include <math.h>
#include <stdint.h>

static void round_tile(int64_t n, const float *restrict wanted, const float *restrict cut, float *restrict codes,
                       float *restrict error, float *restrict carried, float *restrict by_row,
                       float *restrict by_column, const float *restrict left, const float *restrict right) {
    for (int64_t i = 0; i < n; i++) {
        const float *down = left + (n - 1 - i) * n;
        float *before = by_row + i * n;
        for (int64_t j = 0; j < n; j++) {
            const float *along = right + (n - 1 - j) * n;
            float *above = by_column + j * n;
            const int64_t at = i * n + j;
            const float target = wanted[at] - before[j] - above[i];
            const float code = copysignf(floorf(fabsf(target) + cut[at]), target);
            const float wrong = code - wanted[at], whole = before[j] + wrong;
            codes[at] = code;
            error[at] = wrong;
            carried[at] = whole;
            for (int64_t k = j + 1; k < n; k++) before[k] += wrong * along[k];
            for (int64_t k = i + 1; k < n; k++) above[k] += whole * down[k];
        }
    }
}

void round_tiles(int64_t count, int64_t n, const float *wanted, const float *cut, float *codes, float *error,
                 float *carried, float *by_row, float *by_column, const float *left, const float *right) {
    const int64_t size = n * n;
#pragma omp parallel for schedule(dynamic)
    for (int64_t at = 0; at < count; at++) {
        const int64_t o = at * size;
        round_tile(n, wanted + o, cut + o, codes + o, error + o, carried + o, by_row + o, by_column + o, left + o,
                   right + o);
    }
}
