/* What a round of thresholding pursuit does beside its products of matrices, a row at a time: the fast twin of
   linalg/sparse_coding.py: Pursuit.tried. Rows have k numbers; `mask` has a 1 for every coefficient that is kept. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16

static float dot(int64_t k, const float *restrict a, const float *restrict b) {
    float parts[LANES] = {0}, sum = 0;
    int64_t j = 0;
    for (; j + LANES <= k; j += LANES)
        for (int64_t l = 0; l < LANES; l++) parts[l] += a[j + l] * b[j + l];
    for (; j < k; j++) sum += a[j] * b[j];
    for (int64_t l = 0; l < LANES; l++) sum += parts[l];
    return sum;
}

/* The bits of the `count`-th largest of k magnitudes: as integers, magnitudes keep their order. `spare` has k places. */
static uint32_t threshold(int64_t k, const uint32_t *bits, int64_t count, uint32_t *spare) {
    uint32_t high = 0;
    int64_t left = k;
    memcpy(spare, bits, k * sizeof(uint32_t));
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t seen[256] = {0}, kept = 0;
        for (int64_t j = 0; j < left; j++) seen[(spare[j] >> shift) & 255]++;
        int digit = 255;
        while (seen[digit] < count) count -= seen[digit--];
        for (int64_t j = 0; j < left; j++)
            if (((spare[j] >> shift) & 255) == (uint32_t)digit) spare[kept++] = spare[j];
        left = kept;
        high |= (uint32_t)digit << shift;
    }
    return high;
}

/* Choose the `count` largest of |codes + length * gradient|, of equal ones the first; `codes` on them to `start`. */
static void choose(int64_t k, int64_t count, const float *restrict codes, const float *restrict gradient, float length,
                   uint8_t *restrict mask, float *restrict start, uint32_t *restrict bits, uint32_t *restrict spare) {
    for (int64_t j = 0; j < k; j++) {
        const float score = fabsf(codes[j] + length * gradient[j]);
        memcpy(bits + j, &score, sizeof score);
    }
    const uint32_t least = threshold(k, bits, count, spare);
    int64_t above = 0;
    for (int64_t j = 0; j < k; j++) above += bits[j] > least;
    int64_t equal = count - above;
    for (int64_t j = 0; j < k; j++) {
        int keep = bits[j] > least;
        if (bits[j] == least && equal > 0) equal--, keep = 1;
        mask[j] = (uint8_t)keep;
        start[j] = keep ? codes[j] : 0;
    }
}

/* From codes C, Y Dᵀ and `residual` C D Dᵀ to the start of a refit: `before`, what a row explains; the mask; codes on it;
   the gradient there, to `residual` and `direction`, and its square. Only what is dropped needs rows of the Gram. */
int propose(int64_t n, int64_t k, int64_t count, const float *codes, const float *products, const float *gram,
            const float *length, float *before, uint8_t *mask, float *start, float *residual, float *direction,
            float *size) {
    int failed = 0;
#pragma omp parallel
    {
        uint32_t *spare = malloc(2 * k * sizeof(uint32_t));
        if (spare == NULL) failed = 1;
#pragma omp for schedule(dynamic, 16)
        for (int64_t i = 0; i < n; i++) {
            if (spare == NULL) continue;
            const int64_t o = i * k;
            const float *c = codes + o, *p = products + o;
            uint8_t *m = mask + o;
            float *s = start + o, *r = residual + o;
            for (int64_t j = 0; j < k; j++) r[j] = p[j] - r[j];
            before[i] = dot(k, c, p) + dot(k, c, r);
            choose(k, count, c, r, length[i], m, s, spare + k, spare);
            for (int64_t j = 0; j < k; j++) {
                const float dropped = c[j] - s[j], *row = gram + j * k;
                if (dropped == 0) continue;
                for (int64_t l = 0; l < k; l++) r[l] += dropped * row[l];
            }
            for (int64_t j = 0; j < k; j++) r[j] *= m[j];
            memcpy(direction + o, r, k * sizeof(float));
            size[i] = dot(k, r, r);
        }
        free(spare);
    }
    return failed;
}

/* A conjugate gradient step: `image` is the direction times the Gram. */
void descend(int64_t n, int64_t k, const uint8_t *mask, float *image, float *codes, float *residual, float *direction,
             float *size) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t i = 0; i < n; i++) {
        const int64_t o = i * k;
        const uint8_t *m = mask + o;
        float *w = image + o, *c = codes + o, *r = residual + o, *d = direction + o;
        for (int64_t j = 0; j < k; j++) w[j] *= m[j];
        const float curvature = dot(k, d, w);
        const float length = curvature > 0 ? size[i] / curvature : 0;
        for (int64_t j = 0; j < k; j++) {
            c[j] += length * d[j];
            r[j] -= length * w[j];
        }
        const float fresh = dot(k, r, r), share = size[i] > 0 ? fresh / size[i] : 0;
        for (int64_t j = 0; j < k; j++) d[j] = r[j] + share * d[j];
        size[i] = fresh;
    }
}

/* What every row explains with codes whose gradient on their support is `residual`. */
void explain(int64_t n, int64_t k, const float *products, const float *codes, const float *residual, float *after) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++)
        after[i] = dot(k, codes + i * k, products + i * k) + dot(k, codes + i * k, residual + i * k);
}
