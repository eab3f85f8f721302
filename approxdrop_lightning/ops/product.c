// A product of parts of matrices, float32: what is not wanted is neither read nor multiplied, and nothing is copied
// but into cache. The loops are those of Goto and van de Geijn (2008): a block of `a` and some columns of `b` are packed
// so that they stay in the second cache, and a small tile of the result is held in registers. Here the packing reads by
// index, which costs no more than packing does anyway, and the tile is stored by index.
#include <stdint.h>
#include <stdlib.h>

#include "kernels.h"

// A tile of ROWS x COLUMNS leaves registers for one row of `b` and one entry of `a`.
#if defined(__AVX512F__) && !defined(LANES)
#define LANES 16
#define ROWS 12
#elif !defined(LANES)
#define LANES 8
#define ROWS 6
#endif
#define COLUMNS (2 * LANES)
#define DEPTH 384                  // of a block: COLUMNS x DEPTH of `b` fit into the first cache
#define HEIGHT (24 * ROWS)         // HEIGHT x DEPTH of `a` fit into the second one,
#define STRIPS 4                   // beside so many strips of `b`; packed together, they are read in longer pieces
#define SMALL 100000               // multiplies below which a second thread costs more than it saves

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i8){__VA_ARGS__})
#endif

// Entry (i, j) lies at base[row[i] + column[j]]; `along` says that neighbours of a row are neighbours in memory.
typedef struct {
    const float *base;
    int64_t *row, *column;
    int along;
} Part;

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

// A constant number of rows keeps the sums in registers.
static void tile(int rows, int64_t depth, const float *a, const float *b, vec (*out)[2]) {
    switch (rows) {
#define CASE(n) \
    case n: tile_of(n, depth, a, b, out); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

// to[k * step + i] = from[i][k] for i, k < 8. Stored in the order of k: with a step below 8 the next ones overwrite.
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

// to[k * full + i] = base[inner[k] + outer[i]] for i < width; what is beyond width is anything that is finite to read.
// Writes up to eight values past the end.
static void pack(const float *base, const int64_t *inner, int64_t depth, const int64_t *outer, int width, int full,
                 int inner_along, float *restrict to) {
    if (!inner_along) {
        if (width == COLUMNS && consecutive(outer, COLUMNS)) {
            for (int64_t k = 0; k < depth; k++, to += full) {
                const vec *from = (const vec *)(base + inner[k] + outer[0]);
                ((vec *)to)[0] = from[0], ((vec *)to)[1] = from[1];
            }
            return;
        }
        for (int64_t k = 0; k < depth; k++, to += full) {
            for (int i = 0; i < width; i++) to[i] = base[inner[k] + outer[i]];
            for (int i = width; i < full; i++) to[i] = 0;
        }
        return;
    }
    // Eights from the last one on: what is stored past an eight's end belongs to one that is stored later.
    for (int i = (full - 1) / 8 * 8; i >= 0; i -= 8) {
        const float *from[8];
        for (int j = 0; j < 8; j++) from[j] = base + outer[least(i + j, width - 1)];
        for (int64_t k = 0; k < depth;) {
            if (k + 8 <= depth && inner[k + 7] == inner[k] + 7 && consecutive(inner + k, 8)) {
                transpose(from, inner[k], to + k * full + i, full);
                k += 8;
            } else {
                for (int j = 0; j < least(full - i, 8); j++) to[k * full + i + j] = from[j][inner[k]];
                k++;
            }
        }
    }
}

// Strips of `b`, each [depth, COLUMNS]. Consecutive columns are read in one piece.
static void pack_strips(Part b, int64_t first, int64_t depth, const int64_t *columns, int64_t n, float *restrict to) {
    const int64_t *inner = b.row + first;
    if (b.along && n == STRIPS * COLUMNS && consecutive(columns, n)) {
        for (int64_t k = 0; k < depth; k++) {
            const float *from = b.base + inner[k] + columns[0];
            for (int s = 0; s < STRIPS; s++) {
                vec *strip = (vec *)(to + (s * depth + k) * COLUMNS);
                strip[0] = *(const vec *)(from + s * COLUMNS), strip[1] = *(const vec *)(from + s * COLUMNS + LANES);
            }
        }
        return;
    }
    for (int64_t j = 0; j < n; j += COLUMNS)
        pack(b.base, inner, depth, columns + j, least(n - j, COLUMNS), COLUMNS, !b.along, to + j * depth);
}

// rows x width of the result, by index.
static inline void store(vec (*sums)[2], float *out, const int64_t *row, int rows, const int64_t *column, int width,
                         int run, const float *bias, int add) {
    for (int i = 0; i < rows; i++) {
        float *to = out + row[i];
        vec left = sums[i][0], right = sums[i][1];
        if (bias) left += *(const vec *)bias, right += *(const vec *)(bias + LANES);
        if (run) {
            vec *at = (vec *)(to + column[0]);
            if (add) left += at[0], right += at[1];
            at[0] = left, at[1] = right;
            continue;
        }
        vec both[2] = {left, right};
        const float *value = (const float *)both;
        for (int j = 0; j < width; j++) to[column[j]] = add ? to[column[j]] + value[j] : value[j];
    }
}

static int64_t *offsets(Units units, int64_t stride, int64_t *to) {
    for (int64_t r = 0; r < units.runs; r++)
        for (int64_t i = units.starts[r]; i < units.starts[r] + units.lengths[r]; i++) *to++ = i * stride;
    return to;
}

// out[out_rows, out_columns] = a[rows, inner] @ b[inner_b, columns] + bias[columns], or += with add. Strides are in
// entries; bias may be NULL.
void product(int64_t m, int64_t depth, int64_t n, const float *a, int64_t a_row, int64_t a_column, Units rows,
             Units inner, const float *b, int64_t b_row, int64_t b_column, Units inner_b, Units columns, float *out,
             int64_t out_row, Units out_rows, Units out_columns, const float *bias, int add, int threads) {
    int64_t *indices = malloc(sizeof(int64_t) * (2 * (m + depth + n) + n));
    Part left = {a, indices, indices + m, a_column == 1 || a_row != 1};
    int64_t *bj = offsets(inner, a_column, offsets(rows, a_row, indices)) + depth;
    Part right = {b, bj - depth, bj, b_column == 1 || b_row != 1};
    int64_t *ci = offsets(columns, b_column, offsets(inner_b, b_row, bj - depth)), *cj = ci + m, *which = cj + n;
    offsets(out_columns, 1, offsets(out_rows, out_row, ci));
    if (bias) offsets(columns, 1, which);

    // Tiles of almost equal height, blocks of almost equal depth: the last one is no remainder.
    int64_t bands = (m + ROWS - 1) / ROWS;
    int high = (int)((m + bands - 1) / bands);
    bands = (m + high - 1) / high;
    int64_t blocks = (bands * high + HEIGHT - 1) / HEIGHT, per_block = (bands + blocks - 1) / blocks;
    int64_t steps = (depth + DEPTH - 1) / DEPTH, step = (depth + steps - 1) / steps;
    int64_t strips = (n + COLUMNS - 1) / COLUMNS;
    // Several tasks for each thread, since a machine's cores are not equally free; but a block of `a` is packed anew
    // for each.
    int64_t width = strips * blocks / (4 * threads) / STRIPS * STRIPS;
    width = width < STRIPS ? STRIPS : least(width, 8 * STRIPS);
    int64_t tasks = blocks * ((strips + width - 1) / width);
#pragma omp parallel num_threads(threads) if (m * depth * n > SMALL && tasks > 1)
    {
        static _Thread_local float *scratch;
        const int64_t size = HEIGHT * DEPTH + 64;
        if (!scratch) scratch = aligned_alloc(64, sizeof(float) * (size + STRIPS * COLUMNS * DEPTH + 64));
        float *pa = scratch, *pb = scratch + size;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t band0 = task % blocks * per_block, band1 = least(band0 + per_block, bands);
            int64_t strip0 = task / blocks * width, strip1 = least(strip0 + width, strips);
            for (int64_t k0 = 0; k0 < depth; k0 += step) {
                int64_t deep = least(step, depth - k0);
                for (int64_t p = band0; p < band1; p++)
                    pack(a, left.column + k0, deep, left.row + p * high, least(m - p * high, high), high, left.along,
                         pa + (p - band0) * high * deep);
                for (int64_t s = strip0; s < strip1; s += STRIPS) {
                    int64_t last = least(s + STRIPS, strip1);
                    pack_strips(right, k0, deep, bj + s * COLUMNS, least(last * COLUMNS, n) - s * COLUMNS, pb);
                    for (int64_t j = s; j < last; j++) {
                        int wide = (int)least(n - j * COLUMNS, COLUMNS);
                        int run = wide == COLUMNS && consecutive(cj + j * COLUMNS, wide);
                        float kept[COLUMNS] = {0};
                        if (bias)
                            for (int c = 0; c < wide; c++) kept[c] = bias[which[j * COLUMNS + c]];
                        for (int64_t p = band0; p < band1; p++) {
                            vec sums[ROWS][2];
                            tile(high, deep, pa + (p - band0) * high * deep, pb + (j - s) * COLUMNS * deep, sums);
                            store(sums, out, ci + p * high, (int)least(m - p * high, high), cj + j * COLUMNS, wide,
                                  run, bias && !k0 ? kept : 0, add || k0);
                        }
                    }
                }
            }
        }
    }
    free(indices);
}
