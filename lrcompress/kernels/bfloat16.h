/* Numbers of 16 bits, with the exponent of float32. */
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE_REGISTERS
#endif

typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));

static inline __attribute__((always_inline)) float from_bfloat16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* to the nearest, the even one of two; not a number stays so */
static inline __attribute__((always_inline)) uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* 16 of them; where the processor has an instruction for it numbers below 2^-126 become zero */
static inline __attribute__((always_inline)) void put_bfloat16(uint16_t *to, Sixteen of) {
#if defined(WIDE_REGISTERS) && defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)of));
#elif defined(WIDE_REGISTERS)
    __m512i bits = _mm512_castps_si512((__m512)of), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __mmask16 none = _mm512_cmp_ps_mask((__m512)of, (__m512)of, _CMP_UNORD_Q);
    __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    near = _mm512_mask_or_epi32(near, none, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16)));
#else
    for (int l = 0; l < 16; l++) to[l] = to_bfloat16(of[l]);
#endif
}
