// Products of submatrices, float32: only kept entries are read and multiplied, and the only copies are into cache.
// The loops follow Goto and van de Geijn (2008): a slab of `a` and some panels of `b` are packed so that they stay in the
// L2 cache, and a small tile of the result is held in registers. Packing reads by index, at no extra cost, and the tile is
// stored by index.
#include <stdint.h>
#include <stdlib.h>

#include "kernels.h"
#include "product.h"
#include "tile.h"

#define DEPTH 384                  // depth of a slab: a panel of `b`, COLUMNS x DEPTH, fits into the L1 cache
#define HEIGHT (24 * ROWS)         // a slab of `a`, HEIGHT x DEPTH, fits into the L2 cache
#define PANELS 4                   // along with this many panels of `b`, packed together in order to read longer rows
#define SMALL 100000               // multiplies below which a second thread costs more than it saves

// A submatrix given by offsets: entry (i, j) is base[row[i] + column[j]]. `along`: the entries of a row are adjacent.
typedef struct {
    const float *base;
    int64_t *row, *column;
    int along;
} Indexed;

// Panels of `b`, each [depth, COLUMNS]. Consecutive columns are read row by row for all panels at once, because every row
// is on different pages, and looking up a page takes time.
static void pack_panels(Indexed b, int64_t first, int64_t depth, const int64_t *columns, int64_t n, float *restrict to) {
    const int64_t *inner = b.row + first;
    int adjacent = b.along && n % COLUMNS == 0;
    for (int64_t j = 0; adjacent && j < n; j += LANES) adjacent = consecutive(columns + j, LANES);
    if (!adjacent) {
        for (int64_t j = 0; j < n; j += COLUMNS)
            pack(b.base, inner, depth, columns + j, least(n - j, COLUMNS), COLUMNS, !b.along, to + j * depth);
        return;
    }
    for (int64_t k = 0; k < depth; k++, to += COLUMNS) {
        const float *from = b.base + inner[k], *next = b.base + inner[least(k + AHEAD, depth - 1)];
        for (int64_t j = 0; j < n; j += COLUMNS) {
            vec *panel = (vec *)(to + j * depth);
            __builtin_prefetch(next + columns[j]);
            panel[0] = *(const vec *)(from + columns[j]), panel[1] = *(const vec *)(from + columns[j + LANES]);
        }
    }
}

// rows x width of the result, by index.
static inline void store(vec (*sums)[2], float *out, const int64_t *row, int rows, const int64_t *column, int width,
                         int adjacent, const float *bias, int add, int past_caches) {
    for (int i = 0; i < rows; i++) {
        float *to = out + row[i];
        vec left = sums[i][0], right = sums[i][1];
        left += *(const vec *)bias, right += *(const vec *)(bias + LANES);
        if (past_caches && adjacent && (uintptr_t)(to + column[0]) % LINE == 0 && column[LANES] == column[0] + LANES) {
            const vec both[2] = {left, right};
            for (int j = 0; j < COLUMNS; j += 8) store_past_caches(to + column[0] + j, (const float *)both + j);
            continue;
        }
        if (adjacent) {
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
    for (int64_t r = 0; r < units.ranges; r++)
        for (int64_t i = units.starts[r]; i < units.starts[r] + units.lengths[r]; i++) *to++ = i * stride;
    return to;
}

EXPORT_SIZE(Product);

// Division of one product into tasks: slabs of bands of `high` rows, times `width` panels of columns.
typedef struct {
    Indexed a, b;
    int64_t *out_row, *out_column, *bias_index;
    int high;
    int64_t bands, per_slab, slabs, step, panels, width, tasks;
} Plan;

static int64_t height_of(const Product *p) { return p->a.rows.count; }
static int64_t depth_of(const Product *p) { return p->a.columns.count; }
static int64_t width_of(const Product *p) { return p->b.columns.count; }

static int64_t indices(const Product *p) { return 2 * (height_of(p) + depth_of(p) + width_of(p)) + width_of(p); }

static Indexed indexed(const Submatrix *s, int64_t *i) {
    offsets(s->columns, s->column_stride, offsets(s->rows, s->row_stride, i));
    return (Indexed){s->base, i, i + s->rows.count, s->column_stride == 1 || s->row_stride != 1};
}

// `i` has room for the indices.
static void plan(const Product *p, Plan *to, int64_t panels_per_task, int64_t *i) {
    const int64_t m = height_of(p), n = width_of(p);
    to->a = indexed(&p->a, i), i += m + depth_of(p);
    to->b = indexed(&p->b, i), i += depth_of(p) + n;
    to->out_row = i, to->out_column = i + m, to->bias_index = i + m + n;
    i = offsets(p->out.columns, 1, offsets(p->out.rows, p->out.row_stride, i));
    if (p->bias) offsets(p->b.columns, 1, i);
    // Tiles of almost equal height and slabs of almost equal depth, so that the last one is not a small remainder.
    to->bands = (m + ROWS - 1) / ROWS;
    to->high = (int)((m + to->bands - 1) / to->bands);
    to->bands = (m + to->high - 1) / to->high;
    to->slabs = (to->bands * to->high + HEIGHT - 1) / HEIGHT;
    to->per_slab = (to->bands + to->slabs - 1) / to->slabs;
    int64_t steps = (depth_of(p) + DEPTH - 1) / DEPTH;
    to->step = (depth_of(p) + steps - 1) / steps;
    to->panels = (n + COLUMNS - 1) / COLUMNS;
    to->width = panels_per_task;
    to->tasks = to->slabs * ((to->panels + panels_per_task - 1) / panels_per_task);
}

// One slab of rows and some panels of columns, over the whole depth.
static void run_task(const Product *p, const Plan *to, int64_t task, float *pa, float *pb) {
    const int high = to->high, add = p->mode == ADD, past_caches = p->mode == PAST_CACHES && to->step == depth_of(p);
    const int64_t m = height_of(p), n = width_of(p);
    const int64_t band0 = task % to->slabs * to->per_slab, band1 = least(band0 + to->per_slab, to->bands);
    const int64_t panel0 = task / to->slabs * to->width, panel1 = least(panel0 + to->width, to->panels);
    for (int64_t k0 = 0; k0 < depth_of(p); k0 += to->step) {
        const int64_t deep = least(to->step, depth_of(p) - k0);
        for (int64_t band = band0; band < band1; band++)
            pack(to->a.base, to->a.column + k0, deep, to->a.row + band * high, (int)least(m - band * high, high), high,
                 to->a.along, pa + (band - band0) * high * deep);
        for (int64_t s = panel0; s < panel1; s += PANELS) {
            const int64_t last = least(s + PANELS, panel1);
            pack_panels(to->b, k0, deep, to->b.column + s * COLUMNS, least(last * COLUMNS, n) - s * COLUMNS, pb);
            for (int64_t j = s; j < last; j++) {
                const int wide = (int)least(n - j * COLUMNS, COLUMNS);
                const int64_t *columns = to->out_column + j * COLUMNS;
                const int adjacent = wide == COLUMNS && consecutive(columns, LANES) && consecutive(columns + LANES, LANES);
                float bias[COLUMNS] = {0};
                if (p->bias && !k0)
                    for (int c = 0; c < wide; c++) bias[c] = p->bias[to->bias_index[j * COLUMNS + c]];
                for (int64_t band = band0; band < band1; band++) {
                    vec sums[ROWS][2];
                    const int64_t *rows = to->out_row + band * high;
                    const int filled = (int)least(m - band * high, high);
                    for (int i = 0; i < filled && !past_caches; i++) __builtin_prefetch(p->out.base + rows[i] + columns[0], 1);
                    tile(high, deep, pa + (band - band0) * high * deep, pb + (j - s) * COLUMNS * deep, sums);
                    store(sums, p->out.base, rows, filled, columns, wide, adjacent, bias, add || k0, past_caches);
                }
            }
        }
    }
}

// Independent products, whose tasks are distributed over the threads together. Returns nonzero if out of memory.
int products(const Product *list, int64_t count, int threads) {
    int64_t multiplies = 0, tasks = 0, panels = 0, room = 0;
    for (int64_t i = 0; i < count; i++) {
        multiplies += height_of(list + i) * depth_of(list + i) * width_of(list + i);
        panels += (width_of(list + i) + COLUMNS - 1) / COLUMNS * ((height_of(list + i) + HEIGHT - 1) / HEIGHT);
        room += indices(list + i);
    }
    // Several tasks per thread, since cores may be unequally loaded, but not many: each one packs its slab of `a` again.
    int64_t per_task = panels / (4 * threads) / PANELS * PANELS;
    per_task = per_task < PANELS ? PANELS : least(per_task, 8 * PANELS);
    Plan *plans = malloc(sizeof(Plan) * count + sizeof(int64_t) * room);
    if (!plans) return 1;
    int64_t *next = (int64_t *)(plans + count);
    for (int64_t i = 0; i < count; next += indices(list + i++)) {
        plan(list + i, plans + i, per_task, next);
        tasks += plans[i].tasks;
    }
    int failed = 0;
#pragma omp parallel num_threads(threads) if (multiplies > SMALL && tasks > 1)
    {
        static _Thread_local float *scratch;
        const int64_t size = HEIGHT * DEPTH + 64;
        if (!scratch) scratch = aligned_alloc(64, sizeof(float) * (size + PANELS * COLUMNS * DEPTH + 64));
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
