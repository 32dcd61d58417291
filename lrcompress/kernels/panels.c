/* Products of many rows of bfloat16 with a weight of which a panel of rows at a time is there as numbers.

   Every thread decodes HEIGHT rows of the weight for itself, puts DEPTH of their columns, pair by pair, into an order
   that its second cache holds and the inner loop reads through, and multiplies all rows of x by them: what is decoded
   never leaves the processor's own caches. All that is added is added in float32. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define NATIVE
#endif

#define INLINE static inline __attribute__((always_inline))

/* The inner loop makes TALL rows of x times WIDE rows of the weight: TALL * WIDE / LANES sums in registers. */
enum { LANES = 16, TALL = 6, WIDE = 64, HEIGHT = 128, DEPTH = 2048, FEWEST = 128, MOST = 4096, MOST_IN_ORDER = 1024, SHARED = 8 };
enum { BFLOAT16 = 1 };

typedef float Floats __attribute__((vector_size(64), aligned(64), may_alias));
typedef uint32_t Pair __attribute__((aligned(2), may_alias));
typedef uint32_t Pairs __attribute__((vector_size(64), aligned(64), may_alias));

/* rows [start, stop) of a weight as numbers of a kind, one after the other */
typedef void (*Numbers)(const void *weight, int64_t start, int64_t stop, void *to, int32_t kind);

/* Whether the processor multiplies pairs of bfloat16 and has no unit for whole tiles of them, which torch would use. */
int panels_fast(void) {
#if defined(NATIVE) && !defined(__AMX_BF16__)
    return 1;
#else
    return 0;
#endif
}

/* sums + the two products of a pair in every lane */
INLINE Floats with_pairs(Floats sums, Pairs a, Pairs b) {
#ifdef NATIVE
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (Floats)(a << 16) * (Floats)(b << 16);
    return sums + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

#ifdef NATIVE
#define TURNED(TO, FROM, LOW, HIGH, STEP)                                                                  \
    for (int i = 0; i < LANES; i++)                                                                        \
        if (!(i & STEP)) {                                                                                 \
            TO[i] = (Pairs)LOW((__m512i)FROM[i], (__m512i)FROM[i + STEP]);                                 \
            TO[i + STEP] = (Pairs)HIGH((__m512i)FROM[i], (__m512i)FROM[i + STEP]);                         \
        }
#define EVEN_QUARTERS(A, B) _mm512_shuffle_i32x4(A, B, 0x88)
#define ODD_QUARTERS(A, B) _mm512_shuffle_i32x4(A, B, 0xdd)

/* 16 vectors of 16, rows for columns: column k comes to be vector TURNED_TO(k) */
#define TURNED_TO(K) (((K) & 12) | ((K) & 1) << 1 | ((K) >> 1 & 1))
INLINE void transpose(Pairs *v) {
    Pairs t[LANES];
    TURNED(t, v, _mm512_unpacklo_epi32, _mm512_unpackhi_epi32, 1)
    TURNED(v, t, _mm512_unpacklo_epi64, _mm512_unpackhi_epi64, 2)
    TURNED(t, v, EVEN_QUARTERS, ODD_QUARTERS, 4)
    TURNED(v, t, EVEN_QUARTERS, ODD_QUARTERS, 8)
}
#endif

/* Columns [first, first + depth) of rows (count, columns): to (ceil(count / WIDE), pairs of depth, WIDE), zeros behind
   the last row and column. */
static void pack_panel(const uint16_t *rows, int64_t count, int64_t columns, int64_t first, int64_t depth, uint32_t *to) {
    const int64_t pairs = (depth + 1) / 2;
    for (int64_t group = 0; group * LANES < (count + WIDE - 1) / WIDE * WIDE; group++) {
        uint32_t *own = to + group * LANES / WIDE * pairs * WIDE + group * LANES % WIDE;
        for (int64_t p = 0; p < pairs; p += LANES) {
            Pairs found[LANES] = {{0}};
            const int64_t left = depth - 2 * p;
            const uint16_t *from = rows + group * LANES * columns + first + 2 * p;
            const int there = count - group * LANES < LANES ? (int)(count - group * LANES) : LANES;
            if (there == LANES && left >= 2 * LANES)
                for (int r = 0; r < LANES; r++) memcpy(found + r, from + r * columns, sizeof(Pairs));
            else
                for (int r = 0; r < there; r++)
                    memcpy(found + r, from + r * columns, (size_t)(left < 2 * LANES ? left : 2 * LANES) * 2);
#ifdef NATIVE
            transpose(found);
            for (int64_t k = 0; k < LANES && p + k < pairs; k++) *(Pairs *)(own + (p + k) * WIDE) = found[TURNED_TO(k)];
#else
            for (int64_t k = 0; k < LANES && p + k < pairs; k++)
                for (int r = 0; r < LANES; r++) own[(p + k) * WIDE + r] = found[r][k];
#endif
        }
    }
}

/* sums (TALL, HEIGHT) += TALL rows of x times WIDE rows of the weight, of so many pairs; = where `first`. Where `y` is
   given, with `stride` numbers from row to row, the sums of the first `tall` rows go there instead. */
INLINE void multiply(const Pair *const *x, int64_t at, const uint32_t *weight, int64_t pairs, float *sums, int first,
                     uint16_t *y, int64_t stride, int64_t tall) {
    enum { ACROSS = WIDE / LANES };
    Floats own[TALL][ACROSS];
    for (int i = 0; i < TALL; i++)
        for (int j = 0; j < ACROSS; j++) own[i][j] = first ? (Floats){0} : *(Floats *)(sums + i * HEIGHT + j * LANES);
    for (int64_t p = 0; p < pairs; p++) {
        Pairs there[ACROSS];
#pragma GCC unroll 4
        for (int j = 0; j < ACROSS; j++) there[j] = *(const Pairs *)(weight + p * WIDE + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < TALL; i++) {
            const Pairs factor = (Pairs){0} + x[i][at + p];
#pragma GCC unroll 4
            for (int j = 0; j < ACROSS; j++) own[i][j] = with_pairs(own[i][j], factor, there[j]);
        }
    }
    if (y)
#pragma GCC unroll 6
        for (int i = 0; i < TALL; i++) {
            if (i < tall)
                for (int j = 0; j < ACROSS; j++) put_bfloat16(y + i * stride + j * LANES, own[i][j]);
        }
    else
        for (int i = 0; i < TALL; i++)
            for (int j = 0; j < ACROSS; j++) *(Floats *)(sums + i * HEIGHT + j * LANES) = own[i][j];
}

/* Number j of every row of y (count, rows) becomes number order[j] of its block: for the threads of a team. */
static void order_rows(uint16_t *y, int64_t count, int64_t rows, const uint16_t *order, int64_t block) {
    uint16_t own[MOST_IN_ORDER];
#pragma omp for schedule(static)
    for (int64_t r = 0; r < count; r++)
        for (int64_t first = 0; first < rows; first += block) {
            const int64_t left = rows - first < block ? rows - first : block;
            uint16_t *to = y + r * rows + first;
            memcpy(own, to, (size_t)left * 2);
            for (int64_t j = 0; j < left; j++) to[order[first + j]] = own[j];
        }
}

/* y (count, rows) = x (count, columns) Wᵀ, all in bfloat16. Of every `block` rows of the weight, as `numbers` gives them,
   row j makes column order[j] of these columns of y: at most MOST_IN_ORDER; j where `order` is null.
   0, or 1 without memory. */
int panels_product(Numbers numbers, const void *weight, int64_t rows, int64_t columns, const uint16_t *order,
                   int64_t block, const uint16_t *x, int64_t count, uint16_t *y, int threads) {
    const int64_t strips = (count + TALL - 1) / TALL, pairs = (columns + 1) / 2;
    const int64_t height = rows < SHARED * HEIGHT * threads ? WIDE : HEIGHT; /* few panels are shared out better in halves */
    const int64_t panels = (rows + height - 1) / height;
    /* Where panels are few, rows of x are shared out too, and each share decodes for itself. */
    int64_t shares = (SHARED * threads + panels - 1) / panels;
    if (shares > (count + FEWEST - 1) / FEWEST) shares = (count + FEWEST - 1) / FEWEST;
    if (shares < (count + MOST - 1) / MOST) shares = (count + MOST - 1) / MOST;
    if (shares < 1) shares = 1;
    const int64_t share = (strips + shares - 1) / shares;
    /* A row ends with a whole pair, and there are whole strips of rows. */
    Pair *none = calloc((size_t)pairs, 4), *even = columns % 2 ? malloc((size_t)(count * pairs) * 4) : NULL;
    const int ready = none && (even || columns % 2 == 0);
    int failed = !ready;
#pragma omp parallel for num_threads(threads) schedule(static) if (even != NULL)
    for (int64_t r = 0; r < count; r++) {
        if (!even) continue;
        memcpy(even + r * pairs, x + r * columns, (size_t)columns * 2);
        ((uint16_t *)(even + r * pairs))[columns] = 0;
    }
    const Pair *input = even ? even : (const Pair *)x;
#pragma omp parallel num_threads(threads)
    {
        const int64_t depth = columns < DEPTH ? columns : DEPTH;
        uint16_t *decoded = numbers ? aligned_alloc(64, (size_t)(HEIGHT * columns) * 2) : NULL;
        uint32_t *packed = aligned_alloc(64, (size_t)((depth + 1) / 2 * HEIGHT) * 4);
        float *sums = aligned_alloc(64, (size_t)(share * TALL * HEIGHT) * 4);
        const int there = ready && (decoded || !numbers) && packed && sums;
        if (!there) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t work = 0; work < panels * shares; work++) {
            const int64_t start = work % panels * height, stop = start + height < rows ? start + height : rows;
            const int64_t from = work / panels * share, to = from + share < strips ? from + share : strips;
            if (!there || from >= to) continue;
            const uint16_t *panel = numbers ? decoded : (const uint16_t *)weight + start * columns;
            if (numbers) numbers(weight, start, stop, decoded, BFLOAT16);
            for (int64_t first = 0; first < columns; first += DEPTH) {
                const int64_t wide = columns - first < DEPTH ? columns - first : DEPTH, half = (wide + 1) / 2;
                pack_panel(panel, stop - start, columns, first, wide, packed);
                for (int64_t i = from; i < to; i++) {
                    const Pair *own[TALL];
                    for (int r = 0; r < TALL; r++) own[r] = i * TALL + r < count ? input + (i * TALL + r) * pairs : none;
                    for (int64_t j = start; j < stop; j += WIDE) {
                        const int whole = first + DEPTH >= columns && stop - j >= WIDE;
                        multiply(own, first / 2, packed + (j - start) * half, half,
                                 sums + (i - from) * TALL * HEIGHT + j - start, !first,
                                 whole ? y + i * TALL * rows + j : NULL, rows, count - i * TALL);
                    }
                }
            }
            /* what is less than WIDE rows of the weight */
            for (int64_t r = from * TALL; r < to * TALL && r < count; r++)
                for (int64_t j = start + (stop - start) / WIDE * WIDE; j < stop; j++)
                    y[r * rows + j] = to_bfloat16(sums[(r - from * TALL) * HEIGHT + j - start]);
        }
        if (order) order_rows(y, count, rows, order, block);
        free(decoded);
        free(packed);
        free(sums);
    }
    free(none);
    free(even);
    return failed;
}
