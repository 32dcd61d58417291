/* Products with integer codes held in tiles of their own width, the fast twin of lrcompress/kernels/tiles.py.

   A strip is 16 rows of codes, in an order of rows; a tile of it is 32 columns, in an order of columns. A tile of width
   b is b vectors of 16 words (little-endian int32). Lane l of them holds 32 codes of b bits, two's complement, lowest bits
   first and running on from one vector's word to the next: code 2 r + h is that of row r and column 16 h + l.
   What does not fit lies beside, 16 bits each: position in the tile (bits 0 to 8: 16 column + row) and what is to
   be added (bits 9 to 15, signed). A strip's tiles follow one another, and so do its tiles' far values; `start` has, a
   strip, where both begin (in vectors, in far values), `head`, a tile, its width and its count of far values. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LOOKED_UP 4 /* widest codes that are looked up in a register, which saves one instruction of four */
#else
#define LOOKED_UP 0
#endif

#define ROWS 16
#define COLUMNS 32
#define CODES (ROWS * COLUMNS)
#define MOST_FAR 255
#define MOST 8 /* rows that are multiplied from one unpacking */
#define PRICE 18 /* of a far value in bits: it takes 16, and time */

enum { FLOAT32, BFLOAT16 };

typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

static const uint8_t WIDTHS[] = {0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 32};

/* the codes 2 r + h of all lanes; b and code are constants wherever this is used in a loop */
static inline __attribute__((always_inline)) Ints codes_of(const Words *tile, const int b, const int code) {
    const int at = code * b, word = at / 32, low = at % 32;
    if (low + b <= 32) return (Ints)(tile[word] << (32 - low - b)) >> (32 - b);
    return (Ints)((tile[word] >> low | tile[word + 1] << (32 - low)) << (32 - b)) >> (32 - b);
}

/* the same as numbers */
static inline __attribute__((always_inline)) Floats values_of(const Words *tile, const int b, const int code) {
#if LOOKED_UP
    if (b <= LOOKED_UP) {
        const int at = code * b, word = at / 32, low = at % 32;
        Words found = tile[word] >> low;
        if (low + b > 32) found |= tile[word + 1] << (32 - low);
        Floats meaning; /* of every four bits: whatever lies above the b bits of a code counts for nothing */
        for (int k = 0; k < 16; k++) meaning[k] = (float)((int32_t)((uint32_t)k << (32 - b)) >> (32 - b));
        return (Floats)_mm512_permutexvar_ps((__m512i)found, (__m512)meaning);
    }
#endif
    return __builtin_convertvector(codes_of(tile, b, code), Floats);
}

#define BY_WIDTH(CALL)                  \
    switch (head[0]) {                  \
        case 1: CALL(1); break;         \
        case 2: CALL(2); break;         \
        case 3: CALL(3); break;         \
        case 4: CALL(4); break;         \
        case 5: CALL(5); break;         \
        case 6: CALL(6); break;         \
        case 8: CALL(8); break;         \
        case 10: CALL(10); break;       \
        case 12: CALL(12); break;       \
        case 16: CALL(16); break;       \
        case 32: CALL(32); break;       \
    }

/* sums[r] += the tile times x (32) */
static inline __attribute__((always_inline)) void add_products(const Words *tile, const int b, const float *x,
                                                               Floats *sums) {
    const Floats left = *(const Floats *)x, right = *(const Floats *)(x + 16);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        sums[r] += values_of(tile, b, 2 * r) * left;
        sums[r] += values_of(tile, b, 2 * r + 1) * right;
    }
}

/* out[row][column] of one tile, (16, 32) */
static inline __attribute__((always_inline)) void spread(const Words *tile, const int b, float *out) {
#pragma GCC unroll 32
    for (int code = 0; code < COLUMNS; code++) *(Floats *)(out + 16 * code) = values_of(tile, b, code);
}

static void numbers(const uint8_t *head, const Words *tile, const int16_t *far, float *out) {
#define SPREAD(B) spread(tile, B, out)
    BY_WIDTH(SPREAD)
    if (!head[0]) memset(out, 0, sizeof(float) * CODES);
    for (int k = 0; k < head[1]; k++) out[(far[k] & 15) * COLUMNS + (far[k] >> 4 & 31)] += (float)(far[k] >> 9);
}

enum { AHEAD = 1024, LANES = 16, CHAINS = 4 };

/* beside[chain][row] += far values times x, each in its tile's columns from `first` on; sums of one row do not wait for
   each other */
static void add_far(int64_t count, const int16_t *far, const int32_t *first, const float *x, float beside[CHAINS][ROWS]) {
    int64_t k = 0;
    for (; k + CHAINS <= count; k += CHAINS)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++)
            beside[c][far[k + c] & 15] += (float)(far[k + c] >> 9) * x[first[k + c] + (far[k + c] >> 4 & 31)];
    for (; k < count; k++) beside[0][far[k] & 15] += (float)(far[k] >> 9) * x[first[k] + (far[k] >> 4 & 31)];
}

/* y (16) = strip times x (32 tiles). Far values of many tiles are added together: a loop for the few of each would be
   left at another place every time, which costs more than they do. */
static void strip_product(int64_t tiles, const uint8_t *head, const Words *tile, const int16_t *far, const float *x,
                          float *y) {
    Floats sums[ROWS];
    float beside[CHAINS][ROWS] = {{0}};
    int32_t first[AHEAD + MOST_FAR + LANES];
    int64_t waiting = 0;
    for (int r = 0; r < ROWS; r++) sums[r] = (Floats){0};
    for (int64_t t = 0; t < tiles; t++, head += 2) {
        const int32_t column = (int32_t)(COLUMNS * t);
#define MULTIPLY(B) add_products(tile, B, x + column, sums)
        BY_WIDTH(MULTIPLY)
        *(Ints *)(first + waiting) = (Ints){0} + column;
        for (int k = LANES; k < head[1]; k += LANES) *(Ints *)(first + waiting + k) = (Ints){0} + column;
        tile += head[0];
        waiting += head[1];
        if (waiting >= AHEAD || t == tiles - 1) {
            add_far(waiting, far, first, x, beside);
            far += waiting;
            waiting = 0;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float sum = beside[0][r] + beside[1][r] + beside[2][r] + beside[3][r];
        for (int lane = 0; lane < LANES; lane++) sum += sums[r][lane];
        y[r] = sum;
    }
}

/* the same for n rows of x, up to MOST, each `stride` after the one before; y is (n, 16) */
static void strip_products(int64_t tiles, const uint8_t *head, const Words *tile, const int16_t *far, const float *x,
                           int64_t n, int64_t stride, float *y) {
    Floats sums[MOST * ROWS];
    float made[CODES];
    memset(sums, 0, sizeof(Floats) * ROWS * (size_t)n);
    for (int64_t t = 0; t < tiles; t++, head += 2, x += COLUMNS) {
        if (!head[0] && !head[1]) continue;
        numbers(head, tile, far, made);
        for (int64_t i = 0; i < n; i++) {
            const Floats left = *(const Floats *)(x + i * stride), right = *(const Floats *)(x + i * stride + 16);
            Floats *sum = sums + ROWS * i;
            for (int r = 0; r < ROWS; r++)
                sum[r] += *(Floats *)(made + 32 * r) * left + *(Floats *)(made + 32 * r + 16) * right;
        }
        tile += head[0];
        far += head[1];
    }
    for (int64_t i = 0; i < n * ROWS; i++) {
        float sum = 0;
        for (int lane = 0; lane < 16; lane++) sum += sums[i][lane];
        y[i] = sum;
    }
}

/* How a weight (rows, columns) is held: row_order (rows) is the row, less the first of its `block`, at every place;
   column_order (columns) likewise; row_index, column_index its scales' places in row_scale, column_scale (256 each). */
typedef struct {
    int64_t rows, columns, block;
    const Words *tiles;
    const uint8_t *head;
    const int16_t *far;
    const int32_t *start;
    const uint16_t *row_order, *column_order;
    const uint8_t *row_index, *column_index;
    const float *row_scale, *column_scale;
} Held;

static inline int64_t tiles_of(const Held *held) { return (held->columns + COLUMNS - 1) / COLUMNS; }

static inline int64_t row_at(const Held *held, int64_t place) {
    return place / held->block * held->block + held->row_order[place];
}

/* y (n, rows) = x (n, columns) times the weight, transposed, n up to MOST; 1 where there is no memory */
int tiles_multiply(const Held *held, const float *x, int64_t n, float *y, int threads) {
    const int64_t tiles = tiles_of(held), strips = (held->rows + ROWS - 1) / ROWS, width = tiles * COLUMNS;
    float *sorted = aligned_alloc(64, sizeof(float) * (size_t)(n * width));
    if (!sorted) return 1;
    for (int64_t i = 0; i < n; i++) {
        const float *from = x + i * held->columns;
        float *to = sorted + i * width;
#pragma GCC unroll 8
        for (int64_t j = 0; j < held->columns; j++) {
            const int64_t column = held->column_order[j];
            to[j] = from[column] * held->column_scale[held->column_index[column]];
        }
        memset(to + held->columns, 0, sizeof(float) * (size_t)(width - held->columns));
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t strip = 0; strip < strips; strip++) {
        float made[MOST * ROWS];
        const uint8_t *head = held->head + 2 * strip * tiles;
        const Words *tile = held->tiles + held->start[2 * strip];
        const int16_t *far = held->far + held->start[2 * strip + 1];
        if (n == 1)
            strip_product(tiles, head, tile, far, sorted, made);
        else
            strip_products(tiles, head, tile, far, sorted, n, width, made);
        for (int r = 0; r < ROWS && ROWS * strip + r < held->rows; r++) {
            int64_t row = row_at(held, ROWS * strip + r);
            float scale = held->row_scale[held->row_index[row]];
            for (int64_t i = 0; i < n; i++) y[i * held->rows + row] = made[i * ROWS + r] * scale;
        }
    }
    free(sorted);
    return 0;
}

static inline uint16_t bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void store(void *to, int64_t at, Floats value, int kind) {
    if (kind == FLOAT32) {
        *(Floats *)((float *)to + at) = value;
        return;
    }
    const Words bits = (Words)value;
    *(Halves *)((uint16_t *)to + at) = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
}

/* Rows `first` to first + count, both whole blocks but for the last, times their scales, their columns as they are
   held, padded to whole tiles: out (count, tiles 32) of a kind. Rows are where they belong. */
void tiles_unpack(const Held *held, int64_t first, int64_t count, void *out, int kind, int scaled, int threads) {
    const int64_t tiles = tiles_of(held), width = tiles * COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t strip = first / ROWS; strip < (first + count + ROWS - 1) / ROWS; strip++) {
        float made[CODES];
        const uint8_t *head = held->head + 2 * strip * tiles;
        const Words *tile = held->tiles + held->start[2 * strip];
        const int16_t *far = held->far + held->start[2 * strip + 1];
        const int64_t left = held->rows - ROWS * strip;
        int64_t at[ROWS];
        float scale[ROWS];
        for (int r = 0; r < ROWS && r < left; r++) {
            int64_t row = row_at(held, ROWS * strip + r);
            at[r] = (row - first) * width;
            scale[r] = scaled ? held->row_scale[held->row_index[row]] : 1;
        }
        for (int64_t t = 0; t < tiles; t++, head += 2) {
            numbers(head, tile, far, made);
            for (int r = 0; r < ROWS && r < left; r++)
                for (int half = 0; half < 2; half++)
                    store(out, at[r] + COLUMNS * t + 16 * half, *(Floats *)(made + 32 * r + 16 * half) * scale[r], kind);
            tile += head[0];
            far += head[1];
        }
    }
}

/* The `wanted` rows (n), their columns where they belong, scaled: out (n, columns) */
void tiles_rows(const Held *held, const int64_t *wanted, int64_t n, float *out, int threads) {
    const int64_t tiles = tiles_of(held);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        int64_t place = wanted[i] / held->block * held->block;
        while (row_at(held, place) != wanted[i]) place++;
        const int64_t strip = place / ROWS, r = place % ROWS;
        const uint8_t *head = held->head + 2 * strip * tiles;
        const Words *tile = held->tiles + held->start[2 * strip];
        const int16_t *far = held->far + held->start[2 * strip + 1];
        const float scale = held->row_scale[held->row_index[wanted[i]]];
        float *to = out + i * held->columns;
        for (int64_t t = 0; t < tiles; t++, head += 2) {
            float made[COLUMNS] = {0};
            const int b = head[0];
            for (int half = 0; half < 2 && b; half++)
                *(Floats *)(made + 16 * half) = __builtin_convertvector(codes_of(tile, b, (int)(2 * r + half)), Floats);
            for (int k = 0; k < head[1]; k++)
                if ((far[k] & 15) == r) made[far[k] >> 4 & 31] += (float)(far[k] >> 9);
            for (int64_t j = COLUMNS * t; j < COLUMNS * (t + 1) && j < held->columns; j++) {
                const int64_t column = held->column_order[j];
                to[column] = made[j - COLUMNS * t] * scale * held->column_scale[held->column_index[column]];
            }
            tile += head[0];
            far += head[1];
        }
    }
}

/* x (n, columns) of a kind, its columns scaled and in their order, zeros behind them: out (n, tiles 32) of that kind */
void tiles_sort(const Held *held, const void *x, int64_t n, void *out, int kind, int threads) {
    const int64_t width = tiles_of(held) * COLUMNS, columns = held->columns;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < width; j++) {
            const int64_t column = j < columns ? held->column_order[j] : 0;
            const float scale = j < columns ? held->column_scale[held->column_index[column]] : 0;
            if (kind == FLOAT32)
                ((float *)out)[i * width + j] = ((const float *)x)[i * columns + column] * scale;
            else {
                const uint32_t bits = (uint32_t)((const uint16_t *)x)[i * columns + column] << 16;
                float value;
                memcpy(&value, &bits, sizeof value);
                ((uint16_t *)out)[i * width + j] = bfloat16(value * scale);
            }
        }
}

/* smallest and largest code of width b */
static inline int64_t lowest(int b) { return b ? -((int64_t)1 << (b - 1)) : 0; }
static inline int64_t highest(int b) { return b ? ((int64_t)1 << (b - 1)) - 1 : 0; }

/* far values that width b needs for the codes of a tile */
static int64_t far_values(const int32_t *codes, int b) {
    if (b == 32) return 0;
    const int32_t low = (int32_t)lowest(b), high = (int32_t)highest(b);
    int64_t count = 0;
    for (int k = 0; k < CODES; k++) {
        const uint32_t over = codes[k] > high ? (uint32_t)codes[k] - (uint32_t)high : 0;
        const uint32_t under = codes[k] < low ? (uint32_t)low - (uint32_t)codes[k] : 0;
        count += (over + 62) / 63 + (under + 63) / 64;
    }
    return count;
}

/* Pack codes (rows, columns) of 1, 2 or 4 bytes, whole strips but for the last. data, head and far are large enough for
   width 32 and MOST_FAR a tile; used: vectors and far values before, and after. */
void tiles_pack(const void *codes, int bytes, int64_t rows, int64_t columns, const uint16_t *row_order,
                const uint16_t *column_order, uint32_t *data, uint8_t *head, int16_t *far, int32_t *start, int32_t *used) {
    const int64_t tiles = (columns + COLUMNS - 1) / COLUMNS;
    int64_t words = 0, beside = 0;
    for (int64_t strip = 0; strip * ROWS < rows; strip++) {
        start[2 * strip] = used[0] + (int32_t)(words / 16);
        start[2 * strip + 1] = used[1] + (int32_t)beside;
        for (int64_t t = 0; t < tiles; t++, head += 2) {
            int32_t tile[CODES] = {0};
            for (int64_t r = 0; r < ROWS && strip * ROWS + r < rows; r++)
                for (int64_t j = 0; j < COLUMNS && t * COLUMNS + j < columns; j++) {
                    const int64_t at = row_order[strip * ROWS + r] * columns + column_order[t * COLUMNS + j];
                    tile[r * COLUMNS + j] = bytes == 1   ? ((const int8_t *)codes)[at]
                                            : bytes == 2 ? ((const int16_t *)codes)[at]
                                                         : ((const int32_t *)codes)[at];
                }
            int best = 32;
            int64_t count = 0, cost = CODES * 32;
            for (size_t k = 0; k < sizeof WIDTHS; k++) {
                const int64_t found = far_values(tile, WIDTHS[k]), price = CODES * WIDTHS[k] + PRICE * found;
                if (found <= MOST_FAR && price < cost) best = WIDTHS[k], count = found, cost = price;
            }
            head[0] = (uint8_t)best;
            head[1] = (uint8_t)count;
            const int64_t low = lowest(best), high = highest(best);
            memset(data + words, 0, (size_t)best * 64);
            for (int k = 0; k < CODES; k++) {
                const int r = k / COLUMNS, column = k % COLUMNS, lane = column % 16;
                const int64_t near = tile[k] < low ? low : tile[k] > high ? high : tile[k];
                for (int64_t rest = tile[k] - near; rest;) {
                    const int64_t some = rest < -64 ? -64 : rest > 63 ? 63 : rest;
                    far[beside++] = (int16_t)(some * 512 + 16 * column + r);
                    rest -= some;
                }
                const int at = (2 * r + column / 16) * best;
                const uint64_t bits = ((uint64_t)near & (((uint64_t)1 << best) - 1)) << (at % 32);
                if (!best) continue;
                data[words + at / 32 * 16 + lane] |= (uint32_t)bits;
                if (bits >> 32) data[words + (at / 32 + 1) * 16 + lane] |= (uint32_t)(bits >> 32);
            }
            words += 16 * best;
        }
    }
    used[0] += (int32_t)(words / 16);
    used[1] += (int32_t)beside;
}
