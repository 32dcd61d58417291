/* Interleaved rANS over codes in classes, the fast twin of lrcompress/coding/plain.py: same bytes, same refusals.

   The class of entry (i, j) is map[row[i] + column[j]]; a class has one decode table of 4096 entries, each
   value (8 bits, signed; -128: escape) | frequency - 1 (12 bits) | slot - start (12 bits), and a shift: the code's
   lowest bits, stored as they are. Lane of an entry: its flat index modulo `lanes`, a power of two up to 32.
   What is read and written is checked against the buffers' lengths, whatever the bytes say. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PRECISION 12
#define LOWER 65536u
#define ESCAPE (-128)
#define CHUNK 64
#define SYMBOLS 256

enum { FINE, WORDS, STATE, EXTRA, RANGE, MEMORY };

static inline uint32_t load16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }

static inline uint32_t load32(const uint8_t *p) { return load16(p) | load16(p + 2) << 16; }

typedef struct {
    const uint8_t *data;
    int64_t at, end; /* bits */
} Bits;

/* `width` bits, 0 to 40, most significant first; the caller has checked that they are there */
static inline uint64_t take(Bits *bits, int width) {
    uint64_t value = 0;
    int64_t at = bits->at;
    int got = 0;
    while (got < width) {
        int room = 8 - (int)(at & 7), want = width - got < room ? width - got : room;
        value = value << want | ((bits->data[at >> 3] >> (room - want)) & ((1u << want) - 1));
        at += want;
        got += want;
    }
    bits->at = at;
    return value;
}

/* Elias gamma; 0 where there is none within the buffer */
static uint64_t take_gamma(Bits *bits) {
    int zeros = 0;
    while (bits->at < bits->end && !(bits->data[bits->at >> 3] >> (7 - (bits->at & 7)) & 1)) {
        bits->at++;
        if (++zeros > 34) return 0;
    }
    if (bits->at + zeros + 1 > bits->end) return 0;
    return take(bits, zeros + 1);
}

#define DECODER(NAME, TYPE, MIN, MAX)                                                                                 \
    int NAME(const uint8_t *data, int64_t words, int64_t extra, int32_t lanes, int64_t rows, int64_t columns,        \
             const uint8_t *row, const uint8_t *column, const uint8_t *map, const uint32_t *table,                   \
             const uint8_t *shift, const int32_t *low, const int32_t *high, TYPE *out) {                             \
        uint32_t state[32];                                                                                          \
        const uint32_t mask = (uint32_t)lanes - 1;                                                                   \
        const uint8_t *p = data + 4 * lanes, *end = p + 2 * words;                                                   \
        int64_t low_bits = 0, escapes = 0;                                                                           \
        uint32_t *base = malloc(sizeof *base * (size_t)columns);                                                     \
        if (!base) return MEMORY;                                                                                    \
        int result = FINE;                                                                                           \
        for (int lane = 0; lane < lanes; lane++) {                                                                   \
            state[lane] = load32(data + 4 * lane);                                                                   \
            if (state[lane] < LOWER) result = STATE;                                                                 \
        }                                                                                                            \
        uint32_t flat = 0;                                                                                           \
        for (int64_t i = 0; i < rows && result == FINE; i++) {                                                       \
            TYPE *to = out + i * columns;                                                                            \
            for (int64_t j = 0; j < columns; j++) {                                                                  \
                uint32_t class = map[row[i] + column[j]];                                                            \
                base[j] = class << PRECISION;                                                                        \
                low_bits += shift[class];                                                                            \
            }                                                                                                        \
            for (int64_t j = 0; j < columns; j += CHUNK) {                                                           \
                int64_t stop = j + CHUNK < columns ? j + CHUNK : columns;                                            \
                if (end - p >= 2 * CHUNK) {                                                                          \
                    for (int64_t k = j; k < stop; k++, flat++) {                                                     \
                        uint32_t x = state[flat & mask], entry = table[base[k] + (x & 4095)];                        \
                        to[k] = (int8_t)entry;                                                                       \
                        escapes += (int8_t)entry == ESCAPE;                                                          \
                        x = ((entry >> 8 & 4095) + 1) * (x >> PRECISION) + (entry >> 20);                            \
                        uint32_t refill = -(uint32_t)(x < LOWER); /* all ones: no branch, half of them go wrong */   \
                        state[flat & mask] = x << (refill & 16) | (load16(p) & refill);                              \
                        p += refill & 2;                                                                             \
                    }                                                                                                \
                    continue;                                                                                        \
                }                                                                                                    \
                for (int64_t k = j; k < stop; k++, flat++) {                                                         \
                    uint32_t x = state[flat & mask], entry = table[base[k] + (x & 4095)];                            \
                    to[k] = (int8_t)entry;                                                                           \
                    escapes += (int8_t)entry == ESCAPE;                                                              \
                    x = ((entry >> 8 & 4095) + 1) * (x >> PRECISION) + (entry >> 20);                                \
                    if (x < LOWER) {                                                                                 \
                        if (p == end) {                                                                              \
                            result = WORDS;                                                                          \
                            goto done;                                                                               \
                        }                                                                                            \
                        x = x << 16 | load16(p);                                                                     \
                        p += 2;                                                                                      \
                    }                                                                                                \
                    state[flat & mask] = x;                                                                          \
                }                                                                                                    \
            }                                                                                                        \
        }                                                                                                            \
        if (result != FINE) goto done;                                                                               \
        if (p != end) result = WORDS;                                                                                \
        for (int lane = 0; lane < lanes; lane++)                                                                     \
            if (state[lane] != LOWER) result = STATE;                                                                \
        if (result != FINE) goto done;                                                                               \
        Bits bits = {end, low_bits, extra * 8}, lows = {end, 0, low_bits};                                           \
        if (low_bits > bits.end) {                                                                                   \
            result = EXTRA;                                                                                          \
            goto done;                                                                                               \
        }                                                                                                            \
        for (int64_t i = 0; i < rows && (escapes || low_bits); i++) {                                                \
            TYPE *to = out + i * columns;                                                                            \
            for (int64_t j = 0; j < columns; j++) {                                                                  \
                if (!low_bits && to[j] != ESCAPE) continue;                                                          \
                uint32_t class = map[row[i] + column[j]];                                                            \
                int64_t value = to[j];                                                                               \
                if (value == ESCAPE) {                                                                               \
                    uint64_t far = take_gamma(&bits);                                                                \
                    if (!far) {                                                                                      \
                        result = EXTRA;                                                                              \
                        goto done;                                                                                   \
                    }                                                                                                \
                    int64_t past = (int64_t)((far - 1) >> 1) + 1;                                                    \
                    value = (far - 1) & 1 ? low[class] - past : high[class] + past;                                  \
                } else if (!shift[class])                                                                            \
                    continue;                                                                                        \
                value = value * ((int64_t)1 << shift[class]) + (int64_t)take(&lows, shift[class]);                   \
                if (value < MIN || value > MAX) {                                                                    \
                    result = RANGE;                                                                                  \
                    goto done;                                                                                       \
                }                                                                                                    \
                to[j] = (TYPE)value;                                                                                 \
            }                                                                                                        \
        }                                                                                                            \
        if ((bits.at + 7) / 8 != extra) result = EXTRA;                                                              \
    done:                                                                                                            \
        free(base);                                                                                                  \
        return result;                                                                                               \
    }

DECODER(decode_int8, int8_t, INT8_MIN, INT8_MAX)
DECODER(decode_int16, int16_t, INT16_MIN, INT16_MAX)
DECODER(decode_int32, int32_t, INT32_MIN, INT32_MAX)

/* `width` bits most significant first into a buffer of zeros */
static void put(uint8_t *to, int64_t at, uint64_t value, int width) {
    for (int left = width; left > 0;) {
        int room = 8 - (int)(at & 7), some = left < room ? left : room;
        to[at >> 3] |= (uint8_t)((value >> (left - some) & ((1u << some) - 1)) << (room - some));
        at += some;
        left -= some;
    }
}

/* Low bits of all entries, then the escapes; returns the count of bits. `to` is NULL, or zeros enough for them. */
int64_t encode_extra(const int32_t *codes, int64_t rows, int64_t columns, const uint8_t *row, const uint8_t *column,
                     const uint8_t *map, const uint8_t *shift, const int32_t *low, const int32_t *high, uint8_t *to) {
    int64_t at = 0;
    for (int escapes = 0; escapes < 2; escapes++)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < columns; j++) {
                uint32_t class = map[row[i] + column[j]];
                int32_t code = codes[i * columns + j];
                int width = shift[class];
                if (!escapes) {
                    if (to && width) put(to, at, (uint32_t)code & (((uint32_t)1 << width) - 1), width);
                    at += width;
                    continue;
                }
                int64_t value = code >> width, past;
                if (value > high[class])
                    past = 2 * (value - high[class] - 1) + 1;
                else if (value < low[class])
                    past = 2 * (low[class] - value - 1) + 2;
                else
                    continue;
                int zeros = 63 - __builtin_clzll((uint64_t)past);
                if (to) put(to, at + zeros, (uint64_t)past, zeros + 1);
                at += 2 * zeros + 1;
            }
    return at;
}

/* frequency and start: a row of 256 a class, symbol 0 the escape, 1 + v - low value v. Words come out in the order in
   which they are read, at the end of `words`, a buffer as long as there are entries; returns their count. */
int64_t encode_words(const int32_t *codes, int64_t rows, int64_t columns, const uint8_t *row, const uint8_t *column,
                     const uint8_t *map, const uint8_t *shift, const int32_t *low, const int32_t *high,
                     const uint16_t *frequency, const uint16_t *start, int32_t lanes, uint32_t *state,
                     uint16_t *words) {
    int64_t flat = rows * columns, at = flat;
    const uint32_t mask = (uint32_t)lanes - 1;
    for (int lane = 0; lane < lanes; lane++) state[lane] = LOWER;
    for (int64_t i = rows - 1; i >= 0; i--)
        for (int64_t j = columns - 1; j >= 0; j--) {
            flat--;
            uint32_t class = map[row[i] + column[j]];
            int32_t value = codes[flat] >> shift[class];
            uint32_t symbol = value < low[class] || value > high[class] ? 0 : (uint32_t)(value - low[class]) + 1;
            uint32_t f = frequency[class * SYMBOLS + symbol], x = state[flat & mask];
            if (x >= (uint64_t)f << 20) {
                words[--at] = (uint16_t)x;
                x >>= 16;
            }
            state[flat & mask] = ((x / f) << PRECISION) + x % f + start[class * SYMBOLS + symbol];
        }
    return rows * columns - at;
}
