/* Products with weights that are stored row by row, as numbers or in fewer bytes, and rows of them as numbers.

   A row is decoded in blocks of 16 columns, in registers: what multiplies never sees a decoded weight. Every kind of row
   says how it begins and what its next block is; PRODUCTS makes of that y = x Wᵀ, y = x W and rows as numbers. All
   that is added is added in float32. Without AVX-512 the same code runs on whatever vectors the compiler has. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE
#endif

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, TOGETHER = 4, SMALL = 1 << 16, LONG = 4096 };
enum { FLOAT32, BFLOAT16, INT8 };

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));

INLINE float from_bfloat16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* to the nearest, the even one of two; not a number stays so */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float number(const void *from, int64_t at, int kind) {
    if (kind == INT8) return ((const int8_t *)from)[at];
    return kind == BFLOAT16 ? from_bfloat16(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

INLINE void put(void *to, int64_t at, int kind, float value) {
    if (kind == BFLOAT16)
        ((uint16_t *)to)[at] = to_bfloat16(value);
    else
        ((float *)to)[at] = value;
}

INLINE Lanes lanes(const float *from) { return *(const Lanes *)from; }

INLINE float total(Lanes of) {
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += of[l];
    return sum;
}

/* `columns` of the lanes as numbers of a kind */
INLINE void put_lanes(void *to, int64_t at, int kind, Lanes of, int columns) {
    if (columns == LANES && kind == FLOAT32)
        *(Lanes *)((float *)to + at) = of;
#if defined(WIDE)
    else if (columns == LANES && kind == BFLOAT16) {
        __m512i bits = _mm512_castps_si512((__m512)of), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __mmask16 none = _mm512_cmp_ps_mask((__m512)of, (__m512)of, _CMP_UNORD_Q);
        __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        near = _mm512_mask_or_epi32(near, none, bits, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256((__m256i *)((uint16_t *)to + at), _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16)));
    }
#endif
    else
        for (int l = 0; l < columns; l++) put(to, at + l, kind, of[l]);
}

/* the first `count` of 16 columns in a mask of bits, the lowest first, from bit `at` of `bytes` bytes on */
INLINE uint32_t mask_at(const uint8_t *mask, int64_t bytes, int64_t at, int count) {
    uint32_t word = 0;
    int64_t byte = at >> 3, there = bytes - byte;
    if (there >= 4)
        memcpy(&word, mask + byte, 4);
    else
        for (int64_t k = 0; k < there; k++) word |= (uint32_t)mask[byte + k] << (8 * k);
    return word >> (at & 7) & ((1u << count) - 1);
}

/* numbers of `kind` from `at` on in the lanes of `mask`, zero in the others; returns how many there are */
INLINE int spread(const void *from, int64_t at, uint32_t mask, int kind, Lanes *to) {
    int count = __builtin_popcount(mask);
#ifdef WIDE
    __mmask16 some = (__mmask16)((1u << count) - 1);
    __m512 found;
    if (kind == FLOAT32)
        found = _mm512_maskz_loadu_ps(some, (const float *)from + at);
    else if (kind == BFLOAT16)
        found = _mm512_castsi512_ps(_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, (const uint16_t *)from + at)), 16));
    else
        found = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, (const int8_t *)from + at)));
    *to = (Lanes)_mm512_maskz_expand_ps((__mmask16)mask, found);
#else
    *to = (Lanes){0};
    for (; mask; mask &= mask - 1) (*to)[__builtin_ctz(mask)] = number(from, at++, kind);
#endif
    return count;
}

/* --- codes of 2, 3, 4 or 8 bits, a scale and a zero point for every group of columns, a multiple of 16 or the row --- */

typedef struct {
    int64_t rows, columns, group, groups, row_bytes, zero_bytes;
    const uint8_t *codes, *zeros;
    const void *scale;
    int32_t scale_kind, flip; /* flip: what turns codes without a sign, of int8, into these */
} Quantized;

typedef struct {
    const uint8_t *codes, *zeros, *end;
    int64_t scale, group, left;
    Lanes table; /* what the codes stand for, again and again */
    float steps[LANES], centres[LANES]; /* scales and zero points of 16 groups */
} QuantizedRow;

INLINE void quantized_begin(const Quantized *w, int64_t row, QuantizedRow *at, const int bits) {
    at->codes = w->codes + row * w->row_bytes;
    at->end = at->codes + w->row_bytes;
    at->zeros = w->zeros + row * w->zero_bytes;
    at->scale = row * w->groups;
    at->group = at->left = 0;
}

/* What 16 codes, in 2 * bits bytes, stand for in a table of 16 that repeats itself; a plain number each with 8 bits and
   without AVX-512. */
INLINE Lanes quantized_lanes(const uint8_t *from, int flip, Lanes table, const int bits) {
    uint64_t word = 0;
    uint16_t tail;
    if (bits < 8) memcpy(&word, from, bits == 3 ? 4 : 2 * (size_t)(bits & 7));
    if (bits == 3) memcpy(&tail, from + 4, 2), word |= (uint64_t)tail << 32;
#ifdef WIDE
    if (bits == 8) {
        __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)from), _mm_set1_epi8((char)flip));
        return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    }
    __m512i words, count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (bits == 2)
        words = _mm512_srlv_epi32(_mm512_set1_epi32((int)word), _mm512_slli_epi32(count, 1));
    else {
        if (bits == 3) word = (word & 0xffffff) | (word >> 24) << 32;
        words = _mm512_castsi128_si512(_mm_cvtsi64_si128((long long)word));
        words = _mm512_permutexvar_epi32(_mm512_srli_epi32(count, 3), words);
        __m512i place = _mm512_and_si512(count, _mm512_set1_epi32(7));
        words = _mm512_srlv_epi32(words, _mm512_mullo_epi32(place, _mm512_set1_epi32(bits)));
    }
    return (Lanes)_mm512_permutexvar_ps(words, (__m512)table); /* takes the lowest four bits of an index */
#else
    Lanes found;
    for (int l = 0; l < LANES; l++)
        found[l] = (float)(bits == 8 ? (uint32_t)(from[l] ^ flip) : (uint32_t)(word >> (bits * l)) & ((1u << bits) - 1));
    return found;
#endif
}

INLINE Lanes quantized_counts(const int bits) {
    Lanes counts;
    for (int l = 0; l < LANES; l++) counts[l] = (float)(l & ((1 << bits) - 1));
    return counts;
}

INLINE void quantized_group(const Quantized *w, QuantizedRow *at, const int bits) {
    int place = (int)(at->group % LANES);
    if (place == 0) {
        int64_t left = w->groups - at->group;
        int count = left < LANES ? (int)left : LANES;
        uint8_t bytes[16] = {0};
        memcpy(bytes, at->zeros + at->group / LANES * 2 * bits, ((size_t)count * bits + 7) / 8);
        *(Lanes *)at->centres = quantized_lanes(bytes, 0, quantized_counts(bits), bits);
        spread(w->scale, at->scale + at->group, (1u << count) - 1, w->scale_kind, (Lanes *)at->steps);
    }
    at->table = (quantized_counts(bits) - at->centres[place]) * at->steps[place];
    at->group++;
    at->left = w->group;
}

INLINE Lanes quantized_next(const Quantized *w, QuantizedRow *at, int columns, const int bits) {
    if (at->left <= 0) quantized_group(w, at, bits);
    at->left -= LANES;
    uint8_t rest[16] = {0};
    const uint8_t *from = at->codes;
    if (columns < LANES) memcpy(rest, from, (size_t)(at->end - from)), from = rest;
    at->codes += 2 * bits;
    Lanes found = quantized_lanes(from, w->flip, at->table, bits);
#ifdef WIDE
    if (bits < 8) return found;
#endif
    int place = (int)((at->group - 1) % LANES);
    return (found - at->centres[place]) * at->steps[place];
}

/* --- the numbers of a mask's columns, in their order --- */

typedef struct {
    int64_t rows, columns, nonzeros, mask_bytes;
    const uint8_t *mask;
    const void *values, *scale; /* scale: of every row of int8, otherwise NULL */
    int32_t scale_kind, value_kind;
} Masked;

typedef struct {
    int64_t bit, value;
    float step;
} MaskedRow;

INLINE void masked_begin(const Masked *w, int64_t row, MaskedRow *at, const int unused) {
    *at = (MaskedRow){row * w->columns, row * w->nonzeros, w->scale ? number(w->scale, row, w->scale_kind) : 1};
}

INLINE Lanes masked_next(const Masked *w, MaskedRow *at, int columns, const int unused) {
    Lanes found;
    at->value += spread(w->values, at->value, mask_at(w->mask, w->mask_bytes, at->bit, columns), w->value_kind, &found);
    at->bit += columns;
    return found * at->step;
}

/* --- the numbers of columns that are named in ascending order, by int16 or int32 --- */

typedef struct {
    int64_t rows, columns, nonzeros;
    const void *index, *values, *scale;
    int32_t scale_kind, value_kind, index_bytes;
} Indexed;

typedef struct {
    int64_t column, value, end;
    float step;
} IndexedRow;

INLINE void indexed_begin(const Indexed *w, int64_t row, IndexedRow *at, const int unused) {
    int64_t from = row * w->nonzeros;
    *at = (IndexedRow){0, from, from + w->nonzeros, w->scale ? number(w->scale, row, w->scale_kind) : 1};
}

INLINE Lanes indexed_next(const Indexed *w, IndexedRow *at, int columns, const int unused) {
    uint32_t mask = 0;
    for (int64_t k = at->value; k < at->end; k++) {
        int64_t index = w->index_bytes == 2 ? ((const int16_t *)w->index)[k] : ((const int32_t *)w->index)[k];
        if (index >= at->column + columns) break;
        mask |= 1u << (index - at->column);
    }
    Lanes found;
    at->value += spread(w->values, at->value, mask, w->value_kind, &found);
    at->column += columns;
    return found * at->step;
}

/* --- two of every four columns, with their places in two bits each --- */

typedef struct {
    int64_t rows, columns, quads, row_bytes;
    const uint8_t *places;
    const void *values;
    int32_t value_kind;
} Pairs;

typedef struct {
    const uint8_t *places;
    int64_t value;
} PairsRow;

/* the columns of two quads that a byte of four places names: bits 0 to 7 */
#define TWO(a, b) (1 << (a) | 1 << (b))
#define QUADS(n) (uint8_t)(TWO((n) & 3, (n) >> 2 & 3) | TWO((n) >> 4 & 3, (n) >> 6 & 3) << 4)
#define FOUR(n) QUADS(n), QUADS(n + 1), QUADS(n + 2), QUADS(n + 3)
#define SIXTEEN(n) FOUR(n), FOUR(n + 4), FOUR(n + 8), FOUR(n + 12)
#define SIXTY_FOUR(n) SIXTEEN(n), SIXTEEN(n + 16), SIXTEEN(n + 32), SIXTEEN(n + 48)
static const uint8_t COLUMNS[256] = {SIXTY_FOUR(0), SIXTY_FOUR(64), SIXTY_FOUR(128), SIXTY_FOUR(192)};

INLINE void pairs_begin(const Pairs *w, int64_t row, PairsRow *at, const int unused) {
    *at = (PairsRow){w->places + row * w->row_bytes, row * 2 * w->quads};
}

INLINE Lanes pairs_next(const Pairs *w, PairsRow *at, int columns, const int unused) {
    Lanes found;
    uint32_t mask = COLUMNS[at->places[0]];
    if (columns > 8) mask |= (uint32_t)COLUMNS[at->places[1]] << 8;
    mask &= (1u << (columns + 3) / 4 * 4) - 1; /* a last byte that is not full has places of no quad */
    at->places += 2;
    at->value += spread(w->values, at->value, mask, w->value_kind, &found);
    return found;
}

/* --- numbers as they are --- */

typedef struct {
    int64_t rows, columns;
    const void *values;
} Numbers;

typedef struct {
    int64_t value;
} NumbersRow;

INLINE void numbers_begin(const Numbers *w, int64_t row, NumbersRow *at, const int kind) {
    *at = (NumbersRow){row * w->columns};
}

INLINE Lanes numbers_next(const Numbers *w, NumbersRow *at, int columns, const int kind) {
    Lanes found;
    if (columns < LANES)
        spread(w->values, at->value, (1u << columns) - 1, kind, &found);
    else if (kind == FLOAT32)
        found = lanes((const float *)w->values + at->value);
    else
        found = (Lanes)(__builtin_convertvector(*(const Halves *)((const uint16_t *)w->values + at->value), Words) << 16);
    at->value += columns;
    return found;
}

/* --- products --- */

/* rows of numbers as float32, each filled up with zeros to `width`; NULL without memory */
static float *padded(const void *x, int kind, int64_t rows, int64_t columns, int64_t width) {
    float *made = aligned_alloc(64, (size_t)(rows * width) * sizeof(float));
    for (int64_t r = 0; made && r < rows; r++) {
        float *to = made + r * width;
        if (kind == BFLOAT16)
            for (int64_t j = 0; j < columns; j++) to[j] = from_bfloat16(((const uint16_t *)x)[r * columns + j]);
        else
            memcpy(to, (const float *)x + r * columns, (size_t)columns * sizeof(float));
        memset(to + columns, 0, (size_t)(width - columns) * sizeof(float));
    }
    return made;
}

static float *zeros(int64_t count) { /* a multiple of 16 */
    float *made = aligned_alloc(64, (size_t)count * sizeof(float));
    return made ? memset(made, 0, (size_t)count * sizeof(float)) : made;
}

/* NAME_product: y (count, rows) = x (count, columns) Wᵀ. NAME_transposed: y (count, columns) = x (count, rows) W.
   NAME_numbers: rows from `start` to `stop` of W. Kinds are those of x and y alike. 0, or 1 without memory.
   A row after the other is read fastest. Where one x fills the cache, ABREAST rows share what is read of it. */
#define PRODUCTS(NAME, WEIGHT, FORM, CONSTANT, ABREAST)                                                              \
    INLINE void NAME##_dot(const WEIGHT *w, int64_t row, const float *x, int64_t width, const int count,             \
                           void *y, int64_t at, int kind) {                                                          \
        Lanes sum[TOGETHER] = {{0}};                                                                                 \
        WEIGHT##Row state; FORM##_begin(w, row, &state, CONSTANT);                                                   \
        int64_t full = w->columns / LANES, b = 0;                                                                    \
        for (; b + TOGETHER <= full; b += TOGETHER)                                                                  \
            _Pragma("GCC unroll 4") for (int k = 0; k < TOGETHER; k++) {                                             \
                Lanes found = FORM##_next(w, &state, LANES, CONSTANT);                                               \
                _Pragma("GCC unroll 4") for (int r = 0; r < count; r++)                                              \
                    sum[count == 1 ? k : r] += found * lanes(x + r * width + (b + k) * LANES);                       \
            }                                                                                                        \
        for (; b * LANES < w->columns; b++) {                                                                        \
            int64_t left = w->columns - b * LANES;                                                                   \
            Lanes found = FORM##_next(w, &state, left < LANES ? (int)left : LANES, CONSTANT);                        \
            _Pragma("GCC unroll 4") for (int r = 0; r < count; r++) sum[r] += found * lanes(x + r * width + b * LANES);\
        }                                                                                                            \
        if (count == 1) sum[0] += sum[1] + sum[2] + sum[3];                                                          \
        _Pragma("GCC unroll 4") for (int r = 0; r < count; r++) put(y, at + r * w->rows, kind, total(sum[r]));       \
    }                                                                                                                \
    INLINE void NAME##_abreast(const WEIGHT *w, int64_t first, const float *x, void *y, int kind) {                  \
        Lanes sum[ABREAST][2] = {{{0}}};                                                                             \
        WEIGHT##Row state[ABREAST];                                                                                  \
        for (int i = 0; i < ABREAST; i++) FORM##_begin(w, first + i, &state[i], CONSTANT);                           \
        int64_t full = w->columns / LANES, b = 0;                                                                    \
        for (; b + 2 <= full; b += 2)                                                                                \
            _Pragma("GCC unroll 2") for (int k = 0; k < 2; k++) {                                                    \
                Lanes here = lanes(x + (b + k) * LANES);                                                             \
                _Pragma("GCC unroll 4") for (int i = 0; i < ABREAST; i++)                                            \
                    sum[i][k] += here * FORM##_next(w, &state[i], LANES, CONSTANT);                                  \
            }                                                                                                        \
        for (; b * LANES < w->columns; b++) {                                                                        \
            int64_t left = w->columns - b * LANES;                                                                   \
            _Pragma("GCC unroll 4") for (int i = 0; i < ABREAST; i++)                                                \
                sum[i][0] += lanes(x + b * LANES) *                                                                  \
                             FORM##_next(w, &state[i], left < LANES ? (int)left : LANES, CONSTANT);                  \
        }                                                                                                            \
        for (int i = 0; i < ABREAST; i++) put(y, first + i, kind, total(sum[i][0] + sum[i][1]));                     \
    }                                                                                                                \
    int NAME##_product(const WEIGHT *w, const void *x, int32_t kind, int64_t count, void *y) {                       \
        int64_t width = (w->columns + LANES - 1) / LANES * LANES;                                                    \
        float *wide = padded(x, kind, count, w->columns, width);                                                     \
        if (!wide) return 1;                                                                                         \
        int64_t abreast = ABREAST > 1 && count == 1 && w->columns > LONG ? w->rows / ABREAST * ABREAST : 0;          \
        _Pragma("omp parallel if (w->rows * w->columns > SMALL)") {                                                  \
            _Pragma("omp for schedule(static) nowait") for (int64_t row = 0; row < abreast; row += ABREAST)          \
                NAME##_abreast(w, row, wide, y, kind);                                                               \
            _Pragma("omp for schedule(static)") for (int64_t row = abreast; row < w->rows; row++) {                  \
                int64_t r = 0;                                                                                       \
                for (; r + TOGETHER <= count; r += TOGETHER)                                                         \
                    NAME##_dot(w, row, wide + r * width, width, TOGETHER, y, r * w->rows + row, kind);               \
                for (; r < count; r++) NAME##_dot(w, row, wide + r * width, width, 1, y, r * w->rows + row, kind);   \
            }                                                                                                        \
        }                                                                                                            \
        free(wide);                                                                                                  \
        return 0;                                                                                                    \
    }                                                                                                                \
    int NAME##_transposed(const WEIGHT *w, const void *x, int32_t kind, int64_t count, void *y) {                    \
        int64_t width = (w->columns + LANES - 1) / LANES * LANES;                                                    \
        float *sums = zeros(count * width);                                                                          \
        int failed = !sums;                                                                                          \
        _Pragma("omp parallel if (!failed && w->rows * w->columns > SMALL)") {                                       \
            float *own = zeros(count * width);                                                                       \
            if (!own) {_Pragma("omp atomic write") failed = 1;}                                                      \
            _Pragma("omp for schedule(static)") for (int64_t row = 0; row < w->rows; row++)                          \
                for (int64_t r = 0; own && r < count; r++) {                                                         \
                    float factor = number(x, r * w->rows + row, kind);                                               \
                    WEIGHT##Row state; FORM##_begin(w, row, &state, CONSTANT);                                       \
                    for (int64_t j = 0; j < w->columns; j += LANES) {                                                \
                        int left = w->columns - j < LANES ? (int)(w->columns - j) : LANES;                           \
                        *(Lanes *)(own + r * width + j) += factor * FORM##_next(w, &state, left, CONSTANT);          \
                    }                                                                                                \
                }                                                                                                    \
            _Pragma("omp critical") for (int64_t k = 0; own && sums && k < count * width; k++) sums[k] += own[k];    \
            free(own);                                                                                               \
        }                                                                                                            \
        for (int64_t r = 0; !failed && r < count; r++)                                                               \
            for (int64_t j = 0; j < w->columns; j++) put(y, r * w->columns + j, kind, sums[r * width + j]);          \
        free(sums);                                                                                                  \
        return failed;                                                                                               \
    }                                                                                                                \
    void NAME##_numbers(const WEIGHT *w, int64_t start, int64_t stop, void *to, int32_t kind) {                      \
        _Pragma("omp parallel for schedule(static) if ((stop - start) * w->columns > SMALL)")                        \
        for (int64_t row = start; row < stop; row++) {                                                               \
            WEIGHT##Row state; FORM##_begin(w, row, &state, CONSTANT);                                               \
            for (int64_t j = 0; j < w->columns; j += LANES) {                                                        \
                int left = w->columns - j < LANES ? (int)(w->columns - j) : LANES;                                   \
                put_lanes(to, (row - start) * w->columns + j, kind, FORM##_next(w, &state, left, CONSTANT), left);   \
            }                                                                                                        \
        }                                                                                                            \
    }

/* --- many rows with few numbers each: only what is there is multiplied --- */

INLINE void masked_list(const Masked *w, int64_t row, int32_t *columns, float *values) {
    MaskedRow at;
    masked_begin(w, row, &at, 0);
    for (int64_t j = 0; j < w->columns; j += LANES) {
        int count = w->columns - j < LANES ? (int)(w->columns - j) : LANES;
        for (uint32_t mask = mask_at(w->mask, w->mask_bytes, at.bit + j, count); mask; mask &= mask - 1) {
            *columns++ = (int32_t)j + __builtin_ctz(mask);
            *values++ = number(w->values, at.value++, w->value_kind) * at.step;
        }
    }
}

INLINE void indexed_list(const Indexed *w, int64_t row, int32_t *columns, float *values) {
    IndexedRow at;
    indexed_begin(w, row, &at, 0);
    for (int64_t k = at.value; k < at.end; k++) {
        *columns++ = w->index_bytes == 2 ? ((const int16_t *)w->index)[k] : ((const int32_t *)w->index)[k];
        *values++ = number(w->values, k, w->value_kind) * at.step;
    }
}

enum { CHUNK = 128 };

/* y (rows, count) = W z, z (columns, count) and y float32, count a multiple of CHUNK. 0, or 1 without memory.
   A chunk of z stays in the cache while every row reads some of it. */
#define GATHERED(FORM, WEIGHT)                                                                                       \
    int FORM##_gathered(const WEIGHT *w, const float *z, int64_t count, float *y) {                                  \
        int failed = 0;                                                                                              \
        _Pragma("omp parallel") {                                                                                    \
            int32_t *columns = malloc((size_t)w->nonzeros * sizeof(int32_t));                                        \
            float *values = malloc((size_t)w->nonzeros * sizeof(float));                                             \
            int there = columns && values;                                                                           \
            if (!there) {_Pragma("omp atomic write") failed = 1;}                                                    \
            for (int64_t c = 0; c < count; c += CHUNK) {                                                             \
                _Pragma("omp for schedule(static)") for (int64_t row = 0; row < w->rows; row++) {                    \
                    if (!there) continue;                                                                            \
                    FORM##_list(w, row, columns, values);                                                            \
                    Lanes sum[CHUNK / LANES] = {{0}};                                                                \
                    for (int64_t k = 0; k < w->nonzeros; k++) {                                                      \
                        const float *from = z + columns[k] * count + c;                                              \
                        _Pragma("GCC unroll 8") for (int l = 0; l < CHUNK / LANES; l++)                              \
                            sum[l] += values[k] * lanes(from + l * LANES);                                           \
                    }                                                                                                \
                    memcpy(y + row * count + c, sum, sizeof sum);                                                    \
                }                                                                                                    \
            }                                                                                                        \
            free(columns);                                                                                           \
            free(values);                                                                                            \
        }                                                                                                            \
        return failed;                                                                                               \
    }

GATHERED(masked, Masked)
GATHERED(indexed, Indexed)
PRODUCTS(quantized2, Quantized, quantized, 2, 1)
PRODUCTS(quantized3, Quantized, quantized, 3, 1)
PRODUCTS(quantized4, Quantized, quantized, 4, 1)
PRODUCTS(quantized8, Quantized, quantized, 8, 4)
PRODUCTS(masked, Masked, masked, 0, 1)
PRODUCTS(indexed, Indexed, indexed, 0, 1)
PRODUCTS(pairs, Pairs, pairs, 0, 1)
PRODUCTS(numbers0, Numbers, numbers, FLOAT32, 4)
PRODUCTS(numbers1, Numbers, numbers, BFLOAT16, 4)

/* --- numbers of two rows, put into an order --- */

#define IN_RANGE(INDEX)                                                                                              \
    for (int64_t j = 0; j < a + b; j++) beyond |= ((const INDEX *)order)[j] < 0 || ((const INDEX *)order)[j] >= a + b
#define PLACED(NUMBER, INDEX)                                                                                        \
    for (int64_t j = 0; j < a + b; j++) ((NUMBER *)to)[j] = ((const NUMBER *)row)[((const INDEX *)order)[j]]

/* y (count, a + b): at j number order[j] of first (count, a) and then rest (count, b); `size` bytes a number, 2 or 4,
   and `index_bytes` an index, 2 or 4. 0, 1 without memory, or 2 where an index is out of range. */
int placed(int64_t count, int64_t a, int64_t b, const char *first, const char *rest, const void *order, char *y,
           int32_t size, int32_t index_bytes) {
    int failed = 0, beyond = 0;
    if (index_bytes == 2) IN_RANGE(int16_t);
    else IN_RANGE(int32_t);
    if (beyond) return 2;
    _Pragma("omp parallel if (count * (a + b) > SMALL)") {
        char *row = malloc((size_t)((a + b) * size));
        if (!row) {_Pragma("omp atomic write") failed = 1;}
        _Pragma("omp for schedule(static)") for (int64_t r = 0; r < count; r++) {
            if (!row) continue;
            char *to = y + r * (a + b) * size;
            memcpy(row, first + r * a * size, (size_t)(a * size));
            memcpy(row + a * size, rest + r * b * size, (size_t)(b * size));
            if (size == 2 && index_bytes == 2) PLACED(uint16_t, int16_t);
            else if (size == 2) PLACED(uint16_t, int32_t);
            else if (index_bytes == 2) PLACED(uint32_t, int16_t);
            else PLACED(uint32_t, int32_t);
        }
        free(row);
    }
    return failed;
}
