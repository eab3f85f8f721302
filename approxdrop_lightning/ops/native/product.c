// A product of parts of matrices, float32: what is not wanted is neither read nor multiplied, and nothing is copied
// but into cache. The loops are those of Goto and van de Geijn (2008): a block of `a` and some columns of `b` are packed
// so that they stay in the second cache, and a small tile of the result is held in registers. Here the packing reads by
// index, which costs no more than packing does anyway, and the tile is stored by index.
#include <stdint.h>
#include <stdlib.h>

#include "kernels.h"
#include "tile.h"

#define DEPTH 384                  // of a block: COLUMNS x DEPTH of `b` fit into the first cache
#define HEIGHT (24 * ROWS)         // HEIGHT x DEPTH of `a` fit into the second one,
#define STRIPS 4                   // beside so many strips of `b`; packed together, they are read in longer pieces
#define SMALL 100000               // multiplies below which a second thread costs more than it saves

// Entry (i, j) lies at base[row[i] + column[j]]; `along` says that neighbours of a row are neighbours in memory.
typedef struct {
    const float *base;
    int64_t *row, *column;
    int along;
} Part;

// Strips of `b`, each [depth, COLUMNS]. Where they are made of consecutive columns all are read row by row: rows lie on
// pages of their own, and finding a page takes time.
static void pack_strips(Part b, int64_t first, int64_t depth, const int64_t *columns, int64_t n, float *restrict to) {
    const int64_t *inner = b.row + first;
    int runs = b.along && n % COLUMNS == 0;
    for (int64_t j = 0; runs && j < n; j += LANES) runs = consecutive(columns + j, LANES);
    if (!runs) {
        for (int64_t j = 0; j < n; j += COLUMNS)
            pack(b.base, inner, depth, columns + j, least(n - j, COLUMNS), COLUMNS, !b.along, to + j * depth);
        return;
    }
    for (int64_t k = 0; k < depth; k++, to += COLUMNS) {
        const float *from = b.base + inner[k], *next = b.base + inner[least(k + AHEAD, depth - 1)];
        for (int64_t j = 0; j < n; j += COLUMNS) {
            vec *strip = (vec *)(to + j * depth);
            __builtin_prefetch(next + columns[j]);
            strip[0] = *(const vec *)(from + columns[j]), strip[1] = *(const vec *)(from + columns[j + LANES]);
        }
    }
}

// rows x width of the result, by index.
static inline void store(vec (*sums)[2], float *out, const int64_t *row, int rows, const int64_t *column, int width,
                         int run, const float *bias, int add, int past_caches) {
    for (int i = 0; i < rows; i++) {
        float *to = out + row[i];
        vec left = sums[i][0], right = sums[i][1];
        left += *(const vec *)bias, right += *(const vec *)(bias + LANES);
        if (past_caches && run && (uintptr_t)(to + column[0]) % LINE == 0 && column[LANES] == column[0] + LANES) {
            const vec both[2] = {left, right};
            for (int j = 0; j < COLUMNS; j += 8) store_past_caches(to + column[0] + j, (const float *)both + j);
            continue;
        }
        if (run) {
            vec *at[2] = {(vec *)(to + column[0]), (vec *)(to + column[LANES])};
            if (add) left += *at[0], right += *at[1];
            *at[0] = left, *at[1] = right;
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

// out[out_rows, out_columns] = a[rows, inner] @ b[inner_b, columns] + bias[columns], or += if it is to ADD. Strides are
// in entries; bias may be NULL. As product.py fills it in.
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
    int64_t how;
} Product;

enum { WRITE, ADD, PAST_CACHES };

// How one product is cut into tasks: bands of `high` rows in blocks, strips of columns in pieces of `width`.
typedef struct {
    Part a, b;
    int64_t *out_row, *out_column, *bias_index;
    int high;
    int64_t bands, per_block, blocks, step, strips, width, tasks;
} Plan;

static int64_t indices(const Product *p) { return 2 * (p->m + p->depth + p->n) + p->n; }

// `i` has room for its indices.
static void plan(const Product *p, Plan *to, int64_t width, int64_t *i) {
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
    const int high = to->high, add = p->how == ADD, past_caches = p->how == PAST_CACHES && to->step == p->depth;
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
                const int run = wide == COLUMNS && consecutive(columns, LANES) && consecutive(columns + LANES, LANES);
                float bias[COLUMNS] = {0};
                if (p->bias && !k0)
                    for (int c = 0; c < wide; c++) bias[c] = p->bias[to->bias_index[j * COLUMNS + c]];
                for (int64_t band = band0; band < band1; band++) {
                    vec sums[ROWS][2];
                    const int64_t *rows = to->out_row + band * high;
                    const int filled = (int)least(p->m - band * high, high);
                    for (int i = 0; i < filled && !past_caches; i++) __builtin_prefetch(p->out + rows[i] + columns[0], 1);
                    tile(high, deep, pa + (band - band0) * high * deep, pb + (j - s) * COLUMNS * deep, sums);
                    store(sums, p->out, rows, filled, columns, wide, run, bias, add || k0, past_caches);
                }
            }
        }
    }
}

// Products that do not depend on each other. Their tasks are shared out together. Returns whether memory was lacking.
int products(const Product *list, int64_t count, int threads) {
    int64_t multiplies = 0, tasks = 0, strips = 0, room = 0;
    for (int64_t i = 0; i < count; i++) {
        multiplies += list[i].m * list[i].depth * list[i].n;
        strips += (list[i].n + COLUMNS - 1) / COLUMNS * ((list[i].m + HEIGHT - 1) / HEIGHT);
        room += indices(list + i);
    }
    // Several tasks for each thread, since a machine's cores are not equally free; but a block of `a` is packed anew
    // for each.
    int64_t width = strips / (4 * threads) / STRIPS * STRIPS;
    width = width < STRIPS ? STRIPS : least(width, 8 * STRIPS);
    Plan *plans = malloc(sizeof(Plan) * count + sizeof(int64_t) * room);
    if (!plans) return 1;
    int64_t *next = (int64_t *)(plans + count);
    for (int64_t i = 0; i < count; next += indices(list + i++)) {
        plan(list + i, plans + i, width, next);
        tasks += plans[i].tasks;
    }
    int failed = 0;
#pragma omp parallel num_threads(threads) if (multiplies > SMALL && tasks > 1)
    {
        static _Thread_local float *scratch;
        const int64_t size = HEIGHT * DEPTH + 64;
        if (!scratch) scratch = aligned_alloc(64, sizeof(float) * (size + STRIPS * COLUMNS * DEPTH + 64));
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t i = 0, own = task;
            if (!scratch) continue;
            while (own >= plans[i].tasks) own -= plans[i++].tasks;
            run_task(list + i, plans + i, own, scratch, scratch + size);
        }
        fence();
    }
    free(plans);
    return failed;
}
