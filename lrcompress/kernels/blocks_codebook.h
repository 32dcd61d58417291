/* Groups of numbers onto the entries of a codebook, magnitudes with signs kept apart: see codebooks.py. */
#pragma once

#include <string.h>

#include "blocks_job.h"

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
