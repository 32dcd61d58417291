/* The search of scales and offsets, of a run and of the runs of a block together. */
#pragma once

#include "blocks_run.h"

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
