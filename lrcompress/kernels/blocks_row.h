/* A row: run after run, each for the errors of those before it, then every run again for the errors of all others. */
#pragma once

#include "blocks_scales.h"

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
