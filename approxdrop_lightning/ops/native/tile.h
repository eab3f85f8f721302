// The inner loops of a product, float32: a tile of the result held in registers, and the packing of its operands.
#ifndef APPROXDROP_TILE_H
#define APPROXDROP_TILE_H
#include <stdint.h>
#include <string.h>

// A tile of ROWS x COLUMNS leaves registers for one row of `b` and one entry of `a`.
#if defined(__AVX512F__) && !defined(LANES)
#define LANES 16
#define ROWS 12
#elif !defined(LANES)
#define LANES 8
#define ROWS 6
#endif
#define COLUMNS (2 * LANES)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i8){__VA_ARGS__})
#endif

// Prefetch distance along the depth: the hardware prefetcher cannot predict where kept entries lie.
#define AHEAD 16

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int consecutive(const int64_t *offsets, int64_t n) {
    if (offsets[n - 1] != offsets[0] + n - 1) return 0;
    int yes = 1;
    for (int64_t i = 1; i < n; i++) yes &= offsets[i] == offsets[0] + i;
    return yes;
}

static inline __attribute__((always_inline)) void tile_of(int rows, int64_t depth, const float *restrict a,
                                                          const float *restrict b, vec (*out)[2]) {
    vec sum[ROWS][2];
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int64_t k = 0; k < depth; k++, a += rows, b += COLUMNS) {
        vec left = *(const vec *)b, right = *(const vec *)(b + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) sum[i][0] += a[i] * left, sum[i][1] += a[i] * right;
    }
    for (int i = 0; i < rows; i++) out[i][0] = sum[i][0], out[i][1] = sum[i][1];
}

// With a constant number of rows the sums stay in registers.
static inline void tile(int rows, int64_t depth, const float *a, const float *b, vec (*out)[2]) {
    switch (rows) {
#define CASE(n) \
    case n: tile_of(n, depth, a, b, out); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

// to[k * step + i] = from[i][k] for i, k < 8. Stored in the order of k; with a step below 8, later stores overwrite.
static inline void transpose(const float *const *from, int64_t at, float *to, int64_t step) {
    v8 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = *(const v8 *)(from[i] + at);
    for (int i = 0; i < 8; i += 2) {
        t[i] = SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = SHUFFLE(t[i], t[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 1] = SHUFFLE(t[i], t[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        r[i + 2] = SHUFFLE(t[i + 1], t[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 3] = SHUFFLE(t[i + 1], t[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; i++) *(v8 *)(to + i * step) = SHUFFLE(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    for (int i = 0; i < 4; i++) *(v8 *)(to + (i + 4) * step) = SHUFFLE(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
}

// to[k * full + i] = base[inner[k] + outer[i]] for i < width; the content beyond width is unspecified.
// Writes up to eight values past the end.
static inline void pack(const float *base, const int64_t *inner, int64_t depth, const int64_t *outer, int width, int full,
                 int inner_along, float *restrict to) {
    if (!inner_along) {
        if (width == COLUMNS && consecutive(outer, LANES) && consecutive(outer + LANES, LANES)) {
            for (int64_t k = 0; k < depth; k++, to += full) {
                const float *from = base + inner[k];
                __builtin_prefetch(base + inner[least(k + AHEAD, depth - 1)] + outer[0]);
                ((vec *)to)[0] = *(const vec *)(from + outer[0]), ((vec *)to)[1] = *(const vec *)(from + outer[LANES]);
            }
            return;
        }
        if (width == ROWS && consecutive(outer, ROWS)) {
            for (int64_t k = 0; k < depth; k++, to += full) memcpy(to, base + inner[k] + outer[0], sizeof(float) * ROWS);
            return;
        }
        for (int64_t k = 0; k < depth; k++, to += full) {
            for (int i = 0; i < width; i++) to[i] = base[inner[k] + outer[i]];
            for (int i = width; i < full; i++) to[i] = 0;
        }
        return;
    }
    // Groups of eight, last one first: values stored past the end of a group are overwritten by a later one.
    for (int i = (full - 1) / 8 * 8; i >= 0; i -= 8) {
        const float *from[8];
        for (int j = 0; j < 8; j++) from[j] = base + outer[least(i + j, width - 1)];
        for (int64_t k = 0; k < depth;) {
            if (k + 8 <= depth && inner[k + 7] == inner[k] + 7 && consecutive(inner + k, 8)) {
                const int64_t next = inner[least(k + 2 * AHEAD, depth - 1)];
                for (int j = 0; j < 8; j++) __builtin_prefetch(from[j] + next);
                transpose(from, inner[k], to + k * full + i, full);
                k += 8;
            } else {
                for (int j = 0; j < least(full - i, 8); j++) to[k * full + i + j] = from[j][inner[k]];
                k++;
            }
        }
    }
}

#endif
