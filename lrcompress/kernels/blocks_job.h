/* What is asked, a row on its way, and scales as they are stored. */
#pragma once

#include <math.h>
#include <stdint.h>

#define RUN 32     /* the longest run */
#define RUNS 16    /* the most runs in a block */
#define WIDE 9     /* ranges that the first search tries */
#define NEAR 16    /* entries of a codebook that are tried for a group */
#define SIGNS 8    /* numbers whose signs are kept together: the longest group */
#define TINY 6.103515625e-05f /* the smallest normal float16 */
#define ROOT 0.70710678f
#define POWERS 126 /* the largest power of two among scales, and minus the smallest */

typedef struct {
    int64_t m, n, block, run, count;    /* count: of levels */
    int64_t uniform, powers, has_minimum, /* powers: scales are powers of two, not float16 */
             has_steps, has_offsets;
    int64_t width, base, even;          /* of a codebook's entries, 0 where there is none; magnitudes; see codebooks.py */
    int64_t step_low, step_high, stride, offset_low, offset_high;
    int64_t rounds, passes;
    const float *levels;
    const uint8_t *entries;             /* (entries, width) */
    const int16_t *near;                /* (base ** width, NEAR) */
    const float *target;                /* (m, n) */
    const float *gram, *factor, *diagonal;  /* (n, n), (n, n), (n,) */
    const float *own_factor, *own_diagonal, *own_inverse; /* (n / run, run, run), (n / run, run), (n / run, run, run) */
    const float *rows, *rows_factor;    /* (m, m) each, NULL where rows are independent */
    float *numbers;                     /* (m, n) out: what is stored */
    uint8_t *codes;                     /* (m, n) out */
    float *scale, *minimum;             /* (m, n / block) out */
    int16_t *steps, *offsets;           /* (m, n / run) out */
} job;

typedef struct {
    const job *j;
    float *level, *scale, *offset;      /* (n,), (runs,), (runs,) of the row */
    float *wanted, *error, *moved, *carry;
} row_state;

static float half(float x) {
    union { float f; uint32_t u; } v = {x};
    float size = fabsf(x);
    if (size < TINY) return rintf(x * 16777216.0f) / 16777216.0f;
    if (size > 65504.0f) return copysignf(65504.0f, x);
    v.u += 0xfff + ((v.u >> 13) & 1);
    v.u &= ~(uint32_t)0x1fff;
    return v.f;
}

/* x as a scale is stored. */
static float held(const job *j, float x) {
    if (!j->powers) return half(x);
    int exponent;
    float mantissa = frexpf(fabsf(x), &exponent);
    exponent = x == 0 ? -POWERS : exponent - (mantissa < ROOT);
    return ldexpf(1, exponent < -POWERS ? -POWERS : exponent > POWERS ? POWERS : exponent);
}
