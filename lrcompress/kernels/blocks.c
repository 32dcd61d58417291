/* Rows of a weight onto one of ggml's block types, each after the ones before it: see lrcompress/ggml/rounding.py and
   plain.py, which does the same for strips of rows. Everything row-major float32; loops run along a row so that the compiler vectorises them. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

static inline float nearest(const job *j, float x) {
    if (j->uniform) {
        float r = rintf(x), low = j->levels[0], high = j->levels[j->count - 1];
        return r < low ? low : r > high ? high : r;
    }
    int at = 0;
    for (int k = 0; k + 1 < j->count; k++) at += x > (j->levels[k] + j->levels[k + 1]) * 0.5f;
    return j->levels[at];
}

/* A group of numbers with a sign and a magnitude each, `cost` of which turning a sign round would add to their loss. */
typedef struct { float sign[SIGNS], cost[SIGNS]; int place[SIGNS], negative; } group;

/* Each number rounded by itself, with feedback; `first`: signs are those of the numbers, else those that g has. */
static void alone(const job *j, const float *target, float scale, const float *factor, int64_t stride, const float *diagonal,
                  int first, group *g) {
    int w = (int)j->width, base = (int)j->base;
    const float *magnitude = j->levels + base;
    float wanted[SIGNS], inverse = scale == 0 ? 0 : 1 / scale;
    memcpy(wanted, target, w * sizeof(float));
    if (first) g->negative = 0;
    for (int i = 0; i < w; i++) {
        float x = wanted[i] * inverse;
        if (first) g->sign[i] = x < 0 ? -1 : 1, g->negative += x < 0;
        x *= g->sign[i];
        int place = 0;
        for (int k = 0; k + 1 < base; k++) place += x > (magnitude[k] + magnitude[k + 1]) * 0.5f;
        g->place[i] = place;
        float off = x - magnitude[place], turned = x + magnitude[0];
        g->cost[i] = diagonal[i] * (turned * turned - off * off);
        float error = g->sign[i] * magnitude[place] * scale - target[i];
        const float *f = factor + i * stride;
        for (int k = i + 1; k < w; k++) wanted[k] -= f[k] * error;
    }
}

/* The best of the entries near g's magnitudes with its signs; its loss, if below `best`, else `best`. */
static float entry_near(const job *j, const float *target, float scale, const float *factor, int64_t stride,
                        const float *diagonal, const group *g, float best, float *levels) {
    int w = (int)j->width, key = 0, found = -1;
    const float *magnitude = j->levels + j->base;
    for (int i = w - 1; i >= 0; i--) key = key * (int)j->base + g->place[i];
    const int16_t *near = j->near + (int64_t)key * NEAR;
    float error[SIGNS][NEAR], loss[NEAR] = {0};
    for (int i = 0; i < w; i++) {
        float signed_scale = g->sign[i] * scale;
        for (int c = 0; c < NEAR; c++) error[i][c] = magnitude[j->entries[near[c] * w + i]] * signed_scale - target[i];
    }
    for (int k = 0; k < w; k++) {
        float sum[NEAR] = {0};
        for (int i = 0; i <= k; i++) {
            float f = factor[i * stride + k];
            for (int c = 0; c < NEAR; c++) sum[c] += error[i][c] * f;
        }
        for (int c = 0; c < NEAR; c++) loss[c] += diagonal[k] * sum[c] * sum[c];
    }
    for (int c = 0; c < NEAR; c++) if (loss[c] < best) best = loss[c], found = c;
    if (found >= 0)
        for (int i = 0; i < w; i++) levels[i] = g->sign[i] * magnitude[j->entries[near[found] * w + i]];
    return best;
}

/* Levels of a group, and their loss. odd: negative numbers modulo 2, -1 where any will do; *natural: before any was turned. */
static float group_levels(const job *j, const float *target, float scale, const float *factor, int64_t stride,
                          const float *diagonal, int odd, int *natural, float *levels) {
    group g;
    alone(j, target, scale, factor, stride, diagonal, 1, &g);
    *natural = g.negative & 1;
    if (odd < 0 || odd == *natural) return entry_near(j, target, scale, factor, stride, diagonal, &g, INFINITY, levels);
    float best = INFINITY;
    for (int turn = 0, before = -1; turn < 2; turn++) {
        int least = -1;
        for (int i = 0; i < j->width; i++) if (i != before && (least < 0 || g.cost[i] < g.cost[least])) least = i;
        group turned = g;
        turned.sign[least] *= -1;
        alone(j, target, scale, factor, stride, diagonal, 0, &turned);
        best = entry_near(j, target, scale, factor, stride, diagonal, &turned, best, levels);
        before = least;
    }
    return best;
}

/* Eight numbers whose signs are kept together, its groups one after the other with feedback. odd: of the first group;
   *parity: what it got; *bent: whether a sign of the last group was turned for it. */
static float eight_levels(const job *j, const float *target, float scale, const float *factor, int64_t stride,
                          const float *diagonal, int odd, int *parity, int *bent, float *levels) {
    int w = (int)j->width;
    float wanted[SIGNS], loss = 0;
    memcpy(wanted, target, sizeof wanted);
    for (int start = 0; start < SIGNS; start += w) {
        int natural;
        loss += group_levels(j, wanted + start, scale, factor + start * stride + start, stride, diagonal + start, odd, &natural,
                             levels + start);
        *bent = odd >= 0 && natural != odd;
        if (start == 0) *parity = odd < 0 ? natural : odd;
        if (j->even) odd = *parity;
        for (int i = start; i < start + w; i++) {
            float error = levels[i] * scale - target[i];
            const float *f = factor + i * stride;
            for (int k = start + w; k < SIGNS; k++) wanted[k] -= f[k] * error;
        }
    }
    return loss;
}

static float fed_back_groups(const job *j, const float *target, float scale, const float *factor, int64_t stride,
                             const float *diagonal, float limit, float *levels) {
    int b = (int)j->run, halves = j->even && j->width < SIGNS;
    float wanted[RUN], other[SIGNS], loss = 0;
    memcpy(wanted, target, b * sizeof(float));
    for (int start = 0; start < b; start += SIGNS) {
        const float *f = factor + start * stride + start, *d = diagonal + start;
        int parity, bent;
        float own = eight_levels(j, wanted + start, scale, f, stride, d, j->even && !halves ? 0 : -1, &parity, &bent, levels + start);
        if (halves && bent) {
            float turned = eight_levels(j, wanted + start, scale, f, stride, d, 1 - parity, &parity, &bent, other);
            if (turned < own) own = turned, memcpy(levels + start, other, sizeof other);
        }
        loss += own;
        if (loss >= limit) return loss;
        for (int i = start; i < start + SIGNS; i++) {
            float error = levels[i] * scale - target[i];
            const float *row = factor + i * stride;
            for (int k = start + SIGNS; k < b; k++) wanted[k] -= row[k] * error;
        }
    }
    return loss;
}

/* Levels of target (b,) rounded with feedback inside the run, and their loss; stops once it is no less than `limit`. */
static float fed_back(const job *j, const float *target, float scale, float offset, const float *factor, int64_t stride,
                      const float *diagonal, float limit, float *levels) {
    if (j->width) return fed_back_groups(j, target, scale, factor, stride, diagonal, limit, levels);
    int b = (int)j->run;
    float wanted[RUN], loss = 0, inverse = scale == 0 ? 0 : 1 / scale;
    memcpy(wanted, target, b * sizeof(float));
    for (int i = 0; i < b; i++) {
        float level = nearest(j, (wanted[i] + offset) * inverse), number = level * scale - offset;
        float off = number - wanted[i], error = number - target[i];
        const float *f = factor + i * stride;
        levels[i] = level;
        loss += diagonal[i] * off * off;
        if (loss >= limit) return loss;
        for (int k = i + 1; k < b; k++) wanted[k] -= f[k] * error;
    }
    return loss;
}

static float loss_of(const job *j, const float *levels, float scale, float offset, const float *target, const float *factor,
                     int64_t stride, const float *diagonal) {
    int b = (int)j->run;
    float sum[RUN] = {0}, loss = 0;
    for (int i = 0; i < b; i++) {
        float error = levels[i] * scale - offset - target[i];
        const float *f = factor + i * stride;
        for (int k = i; k < b; k++) sum[k] += error * f[k];
    }
    for (int i = 0; i < b; i++) loss += diagonal[i] * sum[i] * sum[i];
    return loss;
}

/* Least-squares scale and offset of given levels. */
static void refit(const job *j, const float *levels, const float *target, const float *factor, int64_t stride,
                  const float *diagonal, float *scale, float *offset) {
    int b = (int)j->run;
    float a[RUN] = {0}, t[RUN] = {0}, o[RUN] = {0};
    double aa = 0, at = 0, oo = 0, ao = 0, ot = 0;
    for (int i = 0; i < b; i++) {
        const float *f = factor + i * stride;
        for (int k = i; k < b; k++) {
            a[k] += levels[i] * f[k];
            t[k] += target[i] * f[k];
            o[k] += f[k];
        }
    }
    for (int i = 0; i < b; i++) {
        double d = diagonal[i];
        aa += d * a[i] * a[i]; at += d * a[i] * t[i]; oo += d * o[i] * o[i]; ao += d * a[i] * o[i]; ot += d * o[i] * t[i];
    }
    *scale = aa > 0 ? (float)(at / aa) : 0;
    *offset = 0;
    double det = aa * oo - ao * ao;
    if (j->has_minimum && det > 1e-6 * aa * oo) {
        *scale = (float)((at * oo - ot * ao) / det);
        *offset = (float)(-(aa * ot - ao * at) / det);
    }
}

static void first_scales(const job *j, const float *target, const float *factor, int64_t stride, const float *diagonal,
                         float *scale, float *offset) {
    int b = (int)j->run, count = WIDE;
    float low = target[0], high = target[0], extreme = 0, best = INFINITY, levels[RUN], chosen[RUN] = {0};
    float lowest = j->levels[0], highest = j->levels[j->count - 1];
    for (int i = 0; i < b; i++) {
        low = fminf(low, target[i]);
        high = fmaxf(high, target[i]);
        if (fabsf(target[i]) > fabsf(extreme)) extreme = target[i];
    }
    *scale = TINY;
    *offset = 0;
    if (j->has_minimum) {
        if (j->has_offsets) low = fminf(low, 0), high = fmaxf(high, 0);
        float middle = j->has_offsets ? 0 : (low + high) / 2;
        for (int p = 0; p < 6; p++) for (int q = 0; q < 6; q++) {
            float bottom = middle + (low - middle) * (0.55f + 0.1f * p), top = middle + (high - middle) * (0.55f + 0.1f * q);
            float s = (top - bottom) / (j->count - 1);
            if (s == 0) s = TINY;
            float loss = fed_back(j, target, s, -bottom, factor, stride, diagonal, best, levels);
            if (loss < best) { best = loss; *scale = s; *offset = -bottom; memcpy(chosen, levels, sizeof chosen); }
        }
    } else {
        int signs = -lowest > highest ? 2 : 1;
        if (signs == 1) extreme = fabsf(extreme);
        for (int p = 0; p < count * signs + (j->width > 0); p++) {
            float reach = signs == 2 ? 0.6f + 0.5f * (p % count) / (count - 1) : 0.6f + (j->width ? 0.7f : 0.45f) * p / (count - 1);
            float s = signs == 2 ? (p < count ? extreme : -extreme) / lowest * reach : extreme / highest * reach;
            if (p == count * signs) s = extreme / j->levels[j->base]; /* all of one size: few books have it but for the smallest */
            if (s == 0) s = TINY;
            float loss = fed_back(j, target, s, 0, factor, stride, diagonal, best, levels);
            if (loss < best) { best = loss; *scale = s; memcpy(chosen, levels, sizeof chosen); }
        }
    }
    float s, o;
    refit(j, chosen, target, factor, stride, diagonal, &s, &o);
    if (j->has_offsets && o < 0) o = 0;
    if (loss_of(j, chosen, s, o, target, factor, stride, diagonal) < best) *scale = s, *offset = o;
}

/* A float16 d and whole steps low, low + stride, ..., high with d * steps near values, weighted. */
static float best_steps(const float *values, const float *weight, int count, float low, float high, float stride,
                        float *steps) {
    float extreme = 0, best = INFINITY, found = 0, tried[RUNS];
    for (int i = 0; i < count; i++) if (fabsf(values[i]) > fabsf(extreme)) extreme = values[i];
    if (low >= 0 && extreme < 0) extreme = 0;
    for (int i = 0; i < count; i++) steps[i] = fmaxf(0, low);
    for (int p = 0; p < (low < 0 ? 34 : 17); p++) {
        float d = half(extreme / (p < 17 && low < 0 ? low : high) * (0.85f + 0.025f * (p % 17))), loss = 0;
        for (int i = 0; i < count; i++) {
            float step = low + stride * rintf(((d == 0 ? 0 : values[i] / d) - low) / stride);
            step = step < low ? low : step > high ? high : step;
            float off = step * d - values[i];
            tried[i] = step;
            loss += weight[i] * off * off;
        }
        if (loss < best) { best = loss; found = d; memcpy(steps, tried, count * sizeof(float)); }
    }
    return found;
}

/* The best of scales near the present one for a run. `keep`: the present levels stay where nothing is better. */
static int choose(row_state *r, int64_t row, int64_t run, const float *target, const float *factor, int64_t stride,
                  const float *diagonal, int spread, int keep) {
    const job *j = r->j;
    int b = (int)j->run;
    int64_t supers = j->n / j->block, runs = j->n / j->run, at = run * j->run / j->block;
    float *level = r->level + run * b, s = r->scale[run], o = r->offset[run];
    float levels[RUN], chosen[RUN] = {0}, best = INFINITY, bs = s, bo = o;
    int16_t *sc = j->has_steps ? j->steps + row * runs + run : NULL;
    int16_t *mn = j->has_offsets ? j->offsets + row * runs + run : NULL;
    float d = j->scale[row * supers + at], dmin = j->has_minimum ? j->minimum[row * supers + at] : 0;
    int step = sc ? *sc : 0, shift = mn ? *mn : 0, found = 0;
    if (keep) best = loss_of(j, level, s, o, target, factor, stride, diagonal);
    for (int p = -spread; p <= spread; p++) for (int q = j->has_minimum ? -1 : 0; q <= (j->has_minimum ? 1 : 0); q++) {
        float ts, to = 0;
        int a = 0, c = 0;
        if (sc) {
            a = *sc + (int)j->stride * p;
            if (a < j->step_low || a > j->step_high) continue;
            ts = d * a;
            if (mn) {
                c = *mn + q;
                if (c < j->offset_low || c > j->offset_high) continue;
                to = dmin * c;
            }
        } else {
            ts = held(j, s * (j->powers ? ldexpf(1, p) : 1 + 0.06f * p / spread));
            if (j->has_minimum) to = half(o + 0.5f * q * s);
        }
        float loss = fed_back(j, target, ts, to, factor, stride, diagonal, best, levels);
        if (loss < best) {
            best = loss; bs = ts; bo = to; step = a; shift = c; found = 1;
            memcpy(chosen, levels, b * sizeof(float));
        }
    }
    if (!found) return 0;
    if (!sc) {
        float fs, fo;
        refit(j, chosen, target, factor, stride, diagonal, &fs, &fo);
        fs = held(j, fs);
        fo = half(fo);
        if (loss_of(j, chosen, fs, fo, target, factor, stride, diagonal) < best) bs = fs, bo = fo;
        j->scale[row * supers + at] = bs;
        if (j->has_minimum) j->minimum[row * supers + at] = bo;
    }
    memcpy(level, chosen, b * sizeof(float));
    r->scale[run] = bs;
    r->offset[run] = bo;
    if (sc) *sc = (int16_t)step;
    if (mn) *mn = (int16_t)shift;
    return 1;
}

static void sweep(row_state *r, int64_t row) {
    const job *j = r->j;
    int64_t n = j->n, b = j->run, per = j->block / b, supers = n / j->block;
    memset(r->carry, 0, n * sizeof(float));
    for (int64_t at = 0; at < supers; at++) {
        float local[RUN], s[RUNS], o[RUNS], weight[RUNS], sc[RUNS], mn[RUNS];
        for (int64_t k = 0; k < per; k++) {
            int64_t start = at * j->block + k * b;
            for (int64_t i = 0; i < b; i++) local[i] = r->wanted[start + i] - r->carry[start + i];
            first_scales(j, local, j->factor + start * n + start, n, j->diagonal + start, s + k, o + k);
            weight[k] = 0;
            for (int64_t i = 0; i < b; i++) weight[k] += j->diagonal[start + i];
        }
        float *d = j->scale + row * supers + at;
        if (j->has_steps) {
            *d = best_steps(s, weight, (int)per, j->step_low, j->step_high, j->stride, sc);
            if (j->has_offsets) {
                float dmin = best_steps(o, weight, (int)per, j->offset_low, j->offset_high, 1, mn);
                j->minimum[row * supers + at] = dmin;
                for (int64_t k = 0; k < per; k++) o[k] = dmin * mn[k];
            }
            for (int64_t k = 0; k < per; k++) {
                s[k] = *d * sc[k];
                j->steps[row * (n / b) + at * per + k] = (int16_t)sc[k];
                if (j->has_offsets) j->offsets[row * (n / b) + at * per + k] = (int16_t)mn[k];
            }
        }
        for (int64_t k = 0; k < per; k++) {
            int64_t run = at * per + k, start = run * b;
            r->scale[run] = j->has_steps ? s[k] : held(j, s[k]);
            r->offset[run] = j->has_steps ? o[k] : half(o[k]);
            for (int64_t i = 0; i < b; i++) local[i] = r->wanted[start + i] - r->carry[start + i];
            choose(r, row, run, local, j->factor + start * n + start, n, j->diagonal + start, 2, 0);
            for (int64_t i = 0; i < b; i++) {
                float e = r->level[start + i] * r->scale[run] - r->offset[run] - r->wanted[start + i];
                const float *f = j->factor + (start + i) * n;
                for (int64_t c = start + b; c < n; c++) r->carry[c] += e * f[c];
            }
        }
    }
}

static void move(row_state *r, int64_t at, float by) {
    const float *g = r->j->gram + at * r->j->n;
    r->error[at] += by;
    for (int64_t c = 0; c < r->j->n; c++) r->moved[c] += by * g[c];
}

/* Least squares of a block's scale (which = 0) or minimum (1) for given codes and steps. */
static int refit_super(row_state *r, int64_t row, int64_t at, int which) {
    const job *j = r->j;
    int64_t n = j->n, b = j->run, per = j->block / b, start = at * j->block;
    float direction[RUN * RUNS], *store = (which ? j->minimum : j->scale) + row * (n / j->block) + at;
    double slope = 0, curve = 0;
    for (int64_t i = 0; i < j->block; i++) {
        int64_t run = at * per + i / b;
        direction[i] = which ? -(float)j->offsets[row * (n / b) + run] : r->level[start + i] * j->steps[row * (n / b) + run];
        slope += (double)r->moved[start + i] * direction[i];
    }
    float product[RUN * RUNS] = {0};
    for (int64_t i = 0; i < j->block; i++) {
        const float *g = j->gram + (start + i) * n + start;
        for (int64_t c = 0; c < j->block; c++) product[c] += direction[i] * g[c];
    }
    for (int64_t i = 0; i < j->block; i++) curve += (double)product[i] * direction[i];
    if (curve <= 0) return 0;
    float now = *store, new = half((float)(now - slope / curve)), by = new - now;
    if (2 * by * slope + (double)by * by * curve >= 0) return 0;
    *store = new;
    for (int64_t i = 0; i < j->block; i++) if (direction[i] != 0) move(r, start + i, by * direction[i]);
    for (int64_t k = 0; k < per; k++) {
        int64_t run = at * per + k;
        if (which) r->offset[run] = new * j->offsets[row * (n / b) + run];
        else r->scale[run] = new * j->steps[row * (n / b) + run];
    }
    return 1;
}

/* Passes of exact descent, every run in turn with all others as they are. */
static void descend(row_state *r, int64_t row) {
    const job *j = r->j;
    int64_t n = j->n, b = j->run;
    memset(r->moved, 0, n * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        int64_t run = i / b;
        float e = r->level[i] * r->scale[run] - r->offset[run] - r->wanted[i];
        r->error[i] = 0;
        move(r, i, e);
    }
    for (int64_t pass = 0; pass < j->passes; pass++) {
        int changed = 0;
        for (int64_t run = 0; run < n / b; run++) {
            int64_t start = run * b;
            float local[RUN], now[RUN], shift[RUN] = {0};
            const float *inverse = j->own_inverse + run * b * b;
            for (int64_t i = 0; i < b; i++)
                for (int64_t c = 0; c < b; c++) shift[c] += r->moved[start + i] * inverse[i * b + c];
            for (int64_t i = 0; i < b; i++) {
                now[i] = r->level[start + i] * r->scale[run] - r->offset[run];
                local[i] = now[i] - shift[i];
            }
            if (!choose(r, row, run, local, j->own_factor + run * b * b, b, j->own_diagonal + run * b, 1, 1)) continue;
            changed = 1;
            for (int64_t i = 0; i < b; i++) {
                float by = r->level[start + i] * r->scale[run] - r->offset[run] - now[i];
                if (by != 0) move(r, start + i, by);
            }
        }
        if (j->has_steps) for (int64_t at = 0; at < n / j->block; at++) {
            changed |= refit_super(r, row, at, 0);
            if (j->has_offsets) changed |= refit_super(r, row, at, 1);
        }
        if (!changed) break;
    }
}

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
