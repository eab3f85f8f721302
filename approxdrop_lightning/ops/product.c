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
        left += *(const vec *)bias, right += *(const vec *)(bias + LANES);
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
// entries; bias may be NULL. As product.py fills it in.
typedef struct {
    int64_t m, depth, n;
    const float *a;
    int64_t a_row, a_column;
    Units rows, inner;
    const float *b;
    int64_t b_row, b_column;
    Units inner_b, columns;
    float *out;
    int64_t out_row;
    Units out_rows, out_columns;
    const float *bias;
    int64_t add;
} Product;

// How one product is cut into tasks: bands of `high` rows in blocks, strips of columns in pieces of `width`.
typedef struct {
    int64_t *indices;
    Part a, b;
    int64_t *out_row, *out_column, *bias_index;
    int high;
    int64_t bands, per_block, blocks, step, strips, width, tasks;
} Plan;

static void plan(const Product *p, Plan *to, int64_t width) {
    int64_t *i = malloc(sizeof(int64_t) * (2 * (p->m + p->depth + p->n) + p->n));
    to->indices = i;
    to->a = (Part){p->a, i, i + p->m, p->a_column == 1 || p->a_row != 1};
    i = offsets(p->inner, p->a_column, offsets(p->rows, p->a_row, i));
    to->b = (Part){p->b, i, i + p->depth, p->b_column == 1 || p->b_row != 1};
    i = offsets(p->columns, p->b_column, offsets(p->inner_b, p->b_row, i));
    to->out_row = i, to->out_column = i + p->m, to->bias_index = i + p->m + p->n;
    i = offsets(p->out_columns, 1, offsets(p->out_rows, p->out_row, i));
    if (p->bias) offsets(p->columns, 1, i);
    // Tiles of almost equal height, blocks of almost equal depth: the last one is no remainder.
    to->bands = (p->m + ROWS - 1) / ROWS;
    to->high = (int)((p->m + to->bands - 1) / to->bands);
    to->bands = (p->m + to->high - 1) / to->high;
    to->blocks = (to->bands * to->high + HEIGHT - 1) / HEIGHT;
    to->per_block = (to->bands + to->blocks - 1) / to->blocks;
    int64_t steps = (p->depth + DEPTH - 1) / DEPTH;
    to->step = (p->depth + steps - 1) / steps;
    to->strips = (p->n + COLUMNS - 1) / COLUMNS;
    to->width = width;
    to->tasks = to->blocks * ((to->strips + width - 1) / width);
}

// One block of rows and some strips of columns, over the whole depth.
static void run_task(const Product *p, const Plan *to, int64_t task, float *pa, float *pb) {
    const int high = to->high, add = (int)p->add;
    const int64_t band0 = task % to->blocks * to->per_block, band1 = least(band0 + to->per_block, to->bands);
    const int64_t strip0 = task / to->blocks * to->width, strip1 = least(strip0 + to->width, to->strips);
    for (int64_t k0 = 0; k0 < p->depth; k0 += to->step) {
        const int64_t deep = least(to->step, p->depth - k0);
        for (int64_t band = band0; band < band1; band++)
            pack(p->a, to->a.column + k0, deep, to->a.row + band * high, (int)least(p->m - band * high, high), high,
                 to->a.along, pa + (band - band0) * high * deep);
        for (int64_t s = strip0; s < strip1; s += STRIPS) {
            const int64_t last = least(s + STRIPS, strip1);
            pack_strips(to->b, k0, deep, to->b.column + s * COLUMNS, least(last * COLUMNS, p->n) - s * COLUMNS, pb);
            for (int64_t j = s; j < last; j++) {
                const int wide = (int)least(p->n - j * COLUMNS, COLUMNS);
                const int64_t *columns = to->out_column + j * COLUMNS;
                const int run = wide == COLUMNS && consecutive(columns, wide);
                float bias[COLUMNS] = {0};
                if (p->bias && !k0)
                    for (int c = 0; c < wide; c++) bias[c] = p->bias[to->bias_index[j * COLUMNS + c]];
                for (int64_t band = band0; band < band1; band++) {
                    vec sums[ROWS][2];
                    tile(high, deep, pa + (band - band0) * high * deep, pb + (j - s) * COLUMNS * deep, sums);
                    store(sums, p->out, to->out_row + band * high, (int)least(p->m - band * high, high), columns, wide,
                          run, bias, add || k0);
                }
            }
        }
    }
}

// Products that do not depend on each other. Their tasks are shared out together.
void products(const Product *list, int64_t count, int threads) {
    int64_t multiplies = 0, tasks = 0, strips = 0;
    for (int64_t i = 0; i < count; i++) {
        multiplies += list[i].m * list[i].depth * list[i].n;
        strips += (list[i].n + COLUMNS - 1) / COLUMNS * ((list[i].m + HEIGHT - 1) / HEIGHT);
    }
    // Several tasks for each thread, since a machine's cores are not equally free; but a block of `a` is packed anew
    // for each.
    int64_t width = strips / (4 * threads) / STRIPS * STRIPS;
    width = width < STRIPS ? STRIPS : least(width, 8 * STRIPS);
    Plan *plans = malloc(sizeof(Plan) * count);
    for (int64_t i = 0; i < count; i++) {
        plan(list + i, plans + i, width);
        tasks += plans[i].tasks;
    }
#pragma omp parallel num_threads(threads) if (multiplies > SMALL && tasks > 1)
    {
        static _Thread_local float *scratch;
        const int64_t size = HEIGHT * DEPTH + 64;
        if (!scratch) scratch = aligned_alloc(64, sizeof(float) * (size + STRIPS * COLUMNS * DEPTH + 64));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t i = 0, own = task;
            while (own >= plans[i].tasks) own -= plans[i++].tasks;
            run_task(list + i, plans + i, own, scratch, scratch + size);
        }
    }
    for (int64_t i = 0; i < count; i++) free(plans[i].indices);
    free(plans);
}
