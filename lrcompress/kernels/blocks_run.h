/* A run of numbers with a scale and an offset: its levels, their loss, and the scale and offset that suit them. */
#pragma once

#include "blocks_codebook.h"

static inline float nearest(const job *j, float x) {
    if (j->uniform) {
        float r = rintf(x), low = j->levels[0], high = j->levels[j->count - 1];
        return r < low ? low : r > high ? high : r;
    }
    int at = 0;
    for (int k = 0; k + 1 < j->count; k++) at += x > (j->levels[k] + j->levels[k + 1]) * 0.5f;
    return j->levels[at];
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
