// Linear layer between two row patterns, by groups of rows, float32: what its groups read and write, as products of
// submatrices (product.c). One call computes a product of all groups, since describing them from Python takes longer than
// small products do.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "product.h"

#define LARGE (1 << 20)  // bytes of a gradient that has left the caches before it is read; _LARGE in copies.py
#define PARALLEL_FROM 16384  // values below which a second thread costs more than it saves
#define PARTS 3          // most products of the weight's gradient that one group takes part in

// A row pattern: `PatternStruct` in patterns/cells.py.
typedef struct {
    int64_t n, block_size;               // units, and units per block; the last block may be smaller
    int64_t cells, offset, keep, shift;  // shift: distance between the first kept cells of consecutive groups
    int64_t groups, orders;              // groups of each order of the units
    int64_t ascending;                   // whether the units of a group ascend; else they come cell by cell
    const int64_t *order;                // positions of the blocks, order after order; NULL: the natural order
} Pattern;

EXPORT_SIZE(Pattern);

// `GroupedStruct` in row_linear/groups.py. NULL: all inputs are read, or all outputs computed.
typedef struct {
    const Pattern *in, *out;
    int64_t inputs, outputs;
    const Units *rows;  // of each group
    int64_t groups;
} Grouped;

EXPORT_SIZE(Grouped);

// A matrix of values that is dense, or packed: all groups then, one after the other, or rows in their order.
typedef struct {
    float *base;
    int64_t row_stride, column_stride;
} Values;

// Inputs or outputs of a layer: the blocks of a pattern, sorted by cell, starting with the first kept one.
typedef struct {
    const Pattern *pattern;
    int64_t n, all, blocks;  // all: the start of all units, 0
    int64_t *starts, *lengths, *first_block, *first_unit;  // of blocks, order after order; of each cell, and the end
} Side;

static int64_t cell_of(const Pattern *p, int64_t order, int64_t block, int64_t blocks) {
    const int64_t cell = ((p->order ? p->order[order * blocks + block] : block) - p->offset) % p->cells;
    return cell < 0 ? cell + p->cells : cell;
}

// Returns nonzero if out of memory; `starts` is to be freed.
static int sort_by_cell(Side *s, const Pattern *p, int64_t n) {
    *s = (Side){.pattern = p, .n = n};
    if (!p) return 0;
    const int64_t blocks = s->blocks = (n + p->block_size - 1) / p->block_size, cells = p->cells;
    s->starts = malloc(sizeof(int64_t) * p->orders * (2 * blocks + 2 * (cells + 1)));
    if (!s->starts) return 1;
    s->lengths = s->starts + p->orders * blocks, s->first_block = s->lengths + p->orders * blocks;
    s->first_unit = s->first_block + p->orders * (cells + 1);
    for (int64_t o = 0; o < p->orders; o++) {
        int64_t *first = s->first_block + o * (cells + 1), *unit = s->first_unit + o * (cells + 1);
        int64_t *start = s->starts + o * blocks, *length = s->lengths + o * blocks;
        memset(first, 0, sizeof(int64_t) * (cells + 1));
        for (int64_t b = 0; b < blocks; b++) first[cell_of(p, o, b, blocks) + 1]++;
        for (int64_t c = 0; c < cells; c++) first[c + 1] += first[c];
        memcpy(unit, first, sizeof(int64_t) * (cells + 1));  // the next free place of each cell, for now
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t at = unit[cell_of(p, o, b, blocks)]++;
            start[at] = b * p->block_size;
            length[at] = b < blocks - 1 ? p->block_size : n - start[at];
        }
        const int64_t last = cell_of(p, o, blocks - 1, blocks), missing = blocks * p->block_size - n;
        for (int64_t c = 0; c <= cells; c++) unit[c] = first[c] * p->block_size - (c > last ? missing : 0);
    }
    if (!p->ascending) return 0;
    // A shared pattern: the kept blocks ahead of the others, each in natural order.
    int64_t kept = 0, rest = s->first_block[p->keep];
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = cell_of(p, 0, b, blocks) < p->keep ? kept++ : rest++;
        s->starts[at] = b * p->block_size, s->lengths[at] = b < blocks - 1 ? p->block_size : n - b * p->block_size;
    }
    return 0;
}

static int is_packed_by_group(const Side *s) { return s->pattern && s->pattern->groups * s->pattern->orders > 1; }
static int overlaps(const Side *s) { return s->pattern && s->pattern->groups > 1 && s->pattern->shift < s->pattern->keep; }

static Units every(const Side *s) { return (Units){&s->all, &s->n, 1, s->n}; }

// Units in the cells from first up to last.
static Units between(const Side *s, int64_t order, int64_t first, int64_t last) {
    const int64_t at = order * (s->pattern->cells + 1), *block = s->first_block + at, *unit = s->first_unit + at;
    return (Units){s->starts + order * s->blocks + block[first], s->lengths + order * s->blocks + block[first],
                   block[last] - block[first], unit[last] - unit[first]};
}

static Units kept(const Side *s, int64_t group) {
    const Pattern *p = s->pattern;
    if (!p) return every(s);
    const int64_t first = group % p->groups * p->shift;
    return between(s, group / p->groups % p->orders, first, first + p->keep);
}

// Of the two parts of what a group drops in the first order, the one before its kept cells or the one behind them.
static Units dropped(const Side *s, int64_t group, int behind) {
    const int64_t first = group * s->pattern->shift;
    return behind ? between(s, 0, first + s->pattern->keep, s->pattern->cells) : between(s, 0, 0, first);
}

// Units that no group keeps.
static Units never_kept(const Side *s) { return dropped(s, s->pattern->groups - 1, 1); }

static Submatrix transposed(Submatrix m) {
    return (Submatrix){m.base, m.column_stride, m.row_stride, m.columns, m.rows};
}

// Both sides of a layer, products to be computed together, and room for ranges that consist of all rows or columns.
typedef struct {
    Side in, out;
    Product *list;
    int64_t *lengths, count, ranges;
    int threads, failed;
} Work;

static const int64_t ZERO = 0;

static void begin(Work *work, const Grouped *layer, int64_t products_per_group, int threads) {
    const int64_t most = products_per_group * layer->groups;
    *work = (Work){.list = malloc(most * (sizeof(Product) + 8 * sizeof(int64_t))), .threads = threads};
    work->lengths = (int64_t *)(work->list + most);
    work->failed = !work->list || sort_by_cell(&work->in, layer->in, layer->inputs) ||
                   sort_by_cell(&work->out, layer->out, layer->outputs);
}

static void flush(Work *work) {
    if (work->count && !work->failed) work->failed = products(work->list, work->count, work->threads);
    work->count = 0;
}

static int end(Work *work) {
    flush(work);
    free(work->list), free(work->in.starts), free(work->out.starts);
    return work->failed;
}

static Units all(Work *work, int64_t n) {
    work->lengths[work->ranges] = n;
    return (Units){&ZERO, work->lengths + work->ranges++, 1, n};
}

// Values of a group; `offset` is where they begin if values are packed by group, and moves on to those of the next one.
static Submatrix of_group(Work *work, const Side *side, Values v, Units rows, int64_t group, int64_t *offset) {
    const int64_t count = kept(side, group).count;
    if (!is_packed_by_group(side)) return (Submatrix){v.base, v.row_stride, v.column_stride, rows, all(work, count)};
    const Submatrix found = {v.base + *offset, count, 1, all(work, rows.count), all(work, count)};
    *offset += rows.count * count;
    return found;
}

static Submatrix narrow(Work *work, Submatrix m, int64_t first, int64_t count) {
    return (Submatrix){m.base + first * m.column_stride, m.row_stride, m.column_stride, m.rows, all(work, count)};
}

static void append(Work *work, Submatrix a, Submatrix b, Submatrix out, const float *bias, int64_t mode) {
    if (!out.rows.count || !out.columns.count) return;
    if (a.columns.count) {
        work->list[work->count++] = (Product){a, b, out, bias, mode};
        return;
    }
    if (mode == ADD) return;
    for (int64_t r = 0; r < out.rows.ranges; r++)  // a sum of nothing
        for (int64_t i = out.rows.starts[r]; i < out.rows.starts[r] + out.rows.lengths[r]; i++) {
            float *row = out.base + i * out.row_stride;
            Units from = b.columns;
            int64_t range = 0, next = 0;
            for (int64_t c = 0; c < out.columns.ranges; c++)
                for (int64_t j = out.columns.starts[c]; j < out.columns.starts[c] + out.columns.lengths[c]; j++, next++) {
                    while (next == from.lengths[range]) range++, next = 0;
                    row[j] = bias ? bias[from.starts[range] + next] : 0;
                }
        }
}

// y = scale * y, or scale * max(y, 0).
static void activate(float *y, int64_t n, float scale, int relu, int threads) {
#pragma omp parallel for num_threads(threads) if (n > PARALLEL_FROM)
    for (int64_t i = 0; i < n; i++) y[i] = (relu && y[i] < 0 ? 0 : y[i]) * scale;
}

// Gradient before the activation, of that after it; `y`: values after it, if it is a ReLU.
static void activate_grad(const float *dy, const float *y, int64_t n, float scale, float *to, int threads) {
#pragma omp parallel for num_threads(threads) if (n > PARALLEL_FROM)
    for (int64_t i = 0; i < n; i++) to[i] = y && y[i] <= 0 ? 0 : dy[i] * scale;
}

// y = x @ weight.T + bias for each group, scaled, after a ReLU if there is one; `y` is contiguous. Returns nonzero if out
// of memory.
int grouped_product(const Grouped *layer, float *x, int64_t x_row, int64_t x_column, float *weight, int64_t w_row,
                    int64_t w_column, const float *bias, float *y, double scale, int relu, int threads) {
    int64_t x_at = 0, y_at = 0;
    Work work;
    begin(&work, layer, 1, threads);
    for (int64_t g = 0; g < layer->groups && !work.failed; g++) {
        const Units rows = layer->rows[g];
        const Submatrix from = of_group(&work, &work.in, (Values){x, x_row, x_column}, rows, g, &x_at);
        const Submatrix to = of_group(&work, &work.out, (Values){y, kept(&work.out, 0).count, 1}, rows, g, &y_at);
        const Submatrix w = {weight, w_row, w_column, kept(&work.out, g), kept(&work.in, g)};
        append(&work, from, transposed(w), to, bias, WRITE);
    }
    flush(&work);
    int64_t n = 0;
    for (int64_t g = 0; g < layer->groups && !work.failed; g++) n += layer->rows[g].count * kept(&work.out, g).count;
    if (relu || scale != 1) activate(y, n, (float)scale, relu, threads);
    return end(&work);
}

// dx = dy @ weight for each group: the product with the roles of inputs and outputs exchanged. `dx` is contiguous.
int grouped_input_grad(const Grouped *layer, float *dy, int64_t dy_row, int64_t dy_column, float *weight, int64_t w_row,
                       int64_t w_column, float *dx, int threads) {
    const Grouped exchanged = {layer->out, layer->in, layer->outputs, layer->inputs, layer->rows, layer->groups};
    return grouped_product(&exchanged, dy, dy_row, dy_column, weight, w_column, w_row, NULL, dx, 1, 0, threads);
}

// Zero the entries of a weight's gradient that no group writes. Returns whether all of it was zeroed, where that is
// simplest.
static int clear(const Side *in, const Side *out, float *grad, int threads) {
    const int64_t size = in->n * out->n;
    const int past_caches = size * (int64_t)sizeof(float) > LARGE;
#define ZERO_AT(rows, columns)                                                                                     \
    zero((char *)grad, in->n * sizeof(float), rows, columns, sizeof(float), (rows).count * (columns).count, threads, \
         past_caches)
    if (in->pattern && out->pattern &&
        (is_packed_by_group(in) != is_packed_by_group(out) || overlaps(in) != overlaps(out))) {
        ZERO_AT(every(out), every(in));
        return 1;
    }
    if (out->pattern) {
        if (is_packed_by_group(out)) {
            ZERO_AT(never_kept(out), every(in));
        } else {
            ZERO_AT(dropped(out, 0, 1), every(in));
        }
    }
    if (!in->pattern) return 0;
    if (!is_packed_by_group(in)) {
        ZERO_AT(kept(out, 0), every(in));
    } else if (!out->pattern) {
        ZERO_AT(every(out), never_kept(in));
    } else {
        for (int64_t g = 0; g < in->pattern->groups; g++)
            for (int behind = 0; behind < 2; behind++) {
                if (!overlaps(out)) {
                    ZERO_AT(kept(out, g), dropped(in, g, behind));
                    continue;
                }
                for (int other = 0; other < 2; other++) ZERO_AT(dropped(out, 1 - g, other), dropped(in, g, behind));
            }
    }
    return 0;
#undef ZERO_AT
}

// Columns of a group's values, the units that they are of, and whether an earlier group keeps these as well.
typedef struct {
    int64_t first;
    Units units;
    int again;
} Part;

static int split_by_overlap(const Side *s, int64_t group, Part *to) {
    if (!overlaps(s) || !group) {
        to[0] = (Part){0, kept(s, group), !is_packed_by_group(s)};
        return 1;
    }
    const Units common = between(s, 0, s->pattern->shift, s->pattern->keep);
    to[0] = (Part){0, common, 1};
    to[1] = (Part){common.count, dropped(s, 0, 1), 0};
    return 2;
}

// Gradient of the weight, dense and contiguous. Each entry is written once, except that the products of groups that
// share it are summed, those of one order before those of the next.
int grouped_weight_grad(const Grouped *layer, float *dy, int64_t dy_row, int64_t dy_column, float *x, int64_t x_row,
                        int64_t x_column, float *grad, int threads) {
    Work work;
    begin(&work, layer, PARTS, threads);
    if (work.failed) return end(&work);
    const Side in = work.in, out = work.out;
    const Pattern *grouped = is_packed_by_group(&in) ? in.pattern : is_packed_by_group(&out) ? out.pattern : NULL;
    const int64_t per_order = layer->groups / (grouped ? grouped->orders : 1);
    const int cleared = clear(&in, &out, grad, threads);
    const int one_by_one = overlaps(&in) || overlaps(&out) || cleared;
    const int some_add = layer->groups > (one_by_one ? 1 : per_order);
    const int write = !some_add && in.n * out.n * (int64_t)sizeof(float) > LARGE ? PAST_CACHES : WRITE;
    // First what writes, together; then what adds: groups of one order share entries only if they overlap.
    for (int add = 0; add <= some_add; add++, flush(&work)) {
        int64_t x_at = 0, dy_at = 0;
        for (int64_t g = 0; g < layer->groups; g++) {
            const Submatrix dy_g = of_group(&work, &out, (Values){dy, dy_row, dy_column}, layer->rows[g], g, &dy_at);
            const Submatrix x_g = of_group(&work, &in, (Values){x, x_row, x_column}, layer->rows[g], g, &x_at);
            Part rows[2] = {{0, kept(&out, g), 1}}, columns[2] = {{0, kept(&in, g), 1}};
            const int split = g && !cleared && g < per_order;
            const int n_rows = split ? split_by_overlap(&out, g, rows) : 1;
            for (int r = 0; r < n_rows; r++) {
                // Rows that no group has written yet are overwritten rather than added to.
                const int n_columns = split && rows[r].again ? split_by_overlap(&in, g, columns) : 1;
                if (split && !rows[r].again) columns[0] = (Part){0, kept(&in, g), 0};
                for (int c = 0; c < n_columns; c++) {
                    const int again = g && rows[r].again && columns[c].again;
                    if (again != add) continue;
                    const Submatrix a = transposed(narrow(&work, dy_g, rows[r].first, rows[r].units.count));
                    const Submatrix b = narrow(&work, x_g, columns[c].first, columns[c].units.count);
                    append(&work, a, b, (Submatrix){grad, in.n, 1, rows[r].units, columns[c].units}, NULL, add ? ADD : write);
                    if (add && one_by_one) flush(&work);
                }
            }
            if (add && (g + 1) % per_order == 0) flush(&work);
        }
    }
    return end(&work);
}

// Gradient of the bias, summed over the rows of each group; `dy` is contiguous, and outputs have a pattern.
int grouped_bias_grad(const Grouped *layer, const float *dy, float *grad, int threads) {
    Side out;
    if (sort_by_cell(&out, layer->out, layer->outputs)) return 1;
    memset(grad, 0, out.n * sizeof(float));
    for (int64_t g = 0; g < layer->groups; g++) {
        const Units columns = kept(&out, g);
        column_sums(dy, layer->rows[g].count, columns, grad, threads);
        dy += layer->rows[g].count * columns.count;
    }
    free(out.starts);
    return 0;
}

// All gradients that are not NULL, in one call. Given `scaled`, room for `n` values, dy is that after the activation, and
// contiguous; `y`: values after it, if it is a ReLU. For `db` it must be contiguous, too.
int grouped_gradients(const Grouped *layer, float *dy, int64_t dy_row, int64_t dy_column, const float *y, float *scaled,
                      int64_t n, double scale, float *x, int64_t x_row, int64_t x_column, float *weight, int64_t w_row,
                      int64_t w_column, float *dx, float *dw, float *db, int threads) {
    if (scaled) activate_grad(dy, y, n, (float)scale, scaled, threads), dy = scaled;
    if (dx && grouped_input_grad(layer, dy, dy_row, dy_column, weight, w_row, w_column, dx, threads)) return 1;
    if (dw && grouped_weight_grad(layer, dy, dy_row, dy_column, x, x_row, x_column, dw, threads)) return 1;
    return db ? grouped_bias_grad(layer, dy, db, threads) : 0;
}
