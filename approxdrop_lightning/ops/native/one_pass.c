// Linear layer between groups of rows that keep different inputs and outputs, in one pass over the weight, float32. Every
// group must keep whole panels of PANEL consecutive units.
//
// Several orders of the units result in many small groups that keep different panels; with product.c every group would
// read, and sum the gradient of, its own submatrix of the weight. Here each panel of the weight is packed once for all
// groups that use it; the gradient of a panel is summed over all of these groups and stored once. Further orders
// therefore cost little but shorter loops.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "tile.h"

#define PANEL 16            // units per panel, PANEL in one_pass.py; a tile of the result is HIGH x PANEL
#define VECS (PANEL / LANES)
#define HIGH (12 / VECS)
#define SHARE (8 / VECS)    // rows of a tile of the weight's gradient, a divisor of PANEL
#define NEAR 131072         // floats of packed weight that stay in the L2 cache,
#define MOST 16             // panels of it,
#define DEPTH 1024          // and their depth
#define NEAR_ROWS 1024      // rows of the batch whose packed values do
#define GAP 8               // packing writes up to eight values past the end of what it packs

// Inputs or outputs of the layer, or their gradient. `OperandStruct` in one_pass.py.
typedef struct {
    int64_t units;
    // Panels that each group keeps, group after group, and the start of each group's; the values are packed in the same
    // order, [rows of the group, its units]. NULL: [rows of the batch, units].
    const int64_t *panel, *first_panel;
    float *values;
} Operand;

// `LayerStruct` in one_pass.py.
typedef struct {
    int64_t groups;
    const int64_t *row, *first_row;  // rows of the batch, group after group, and the start of each group
    Operand inputs, outputs;
    float *weight;  // or its gradient: entry (output, input) at output * w_output + input * w_input
    int64_t w_output, w_input;
    const float *bias;  // [outputs], or NULL
} Layer;

EXPORT_SIZE(Operand);
EXPORT_SIZE(Layer);
const int64_t one_pass_panel = PANEL;

// `depth` terms of the sums of a tile, and the offsets of their packed factors.
typedef struct {
    int64_t a, b, depth;
} Terms;

// Where an operand's values lie.
typedef struct {
    int64_t panels;
    int64_t *row_at;  // offset of each row, rows in the order of the groups
    int64_t *place;   // [groups, panels]: offset of a panel within the rows of a group; DROPPED if there is none
    int64_t *width;   // [groups]: number of units that a group keeps
} Layout;

#define DROPPED (-1)

static inline __attribute__((always_inline)) void sum_terms(int rows, const float *a0, const float *b0, const Terms *terms,
                                                             int64_t n_terms, vec (*out)[VECS]) {
    vec sum[HIGH][VECS];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECS; v++) sum[i][v] = (vec){0};
    for (int64_t p = 0; p < n_terms; p++) {
        const float *a = a0 + terms[p].a, *b = b0 + terms[p].b;
        for (int64_t k = 0; k < terms[p].depth; k++, a += rows, b += PANEL) {
            const vec left = *(const vec *)b, right = *(const vec *)(b + (VECS - 1) * LANES);
#pragma GCC unroll 12
            for (int i = 0; i < rows; i++) {
                sum[i][0] += a[i] * left;
                if (VECS > 1) sum[i][VECS - 1] += a[i] * right;
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECS; v++) out[i][v] = sum[i][v];
}

// With a constant number of rows the sums stay in registers.
static __attribute__((noinline)) void tile_sums(int64_t rows, const float *a, const float *b, const Terms *terms, int64_t n_terms, vec (*out)[VECS]) {
    switch (rows) {
#define SUM(n) \
    case n: sum_terms(n, a, b, terms, n_terms, out); break;
        SUM(1) SUM(2) SUM(3) SUM(4) SUM(5) SUM(6)
#if HIGH > 6
        SUM(7) SUM(8) SUM(9) SUM(10) SUM(11) SUM(12)
#endif
    }
}

enum { WRITE, ADD, PAST_CACHES };

static inline void store_row(const vec *sums, float *to, int64_t width, const float *bias, int mode) {
    if (mode == PAST_CACHES && width == PANEL && (uintptr_t)to % LINE == 0) {
        for (int j = 0; j < PANEL; j += 8) store_past_caches(to + j, (const float *)sums + j);
        return;
    }
    if (width == PANEL) {
        for (int v = 0; v < VECS; v++) {
            vec sum = sums[v], *at = (vec *)(to + v * LANES);
            if (bias) sum += *(const vec *)(bias + v * LANES);
            if (mode == ADD) sum += *at;
            *at = sum;
        }
        return;
    }
    const float *sum = (const float *)sums;
    for (int64_t j = 0; j < width; j++) to[j] = (mode == ADD ? to[j] : 0) + sum[j] + (bias ? bias[j] : 0);
}

static int64_t in_panel(int64_t units, int64_t panel) { return least(PANEL, units - panel * PANEL); }

// Bands of almost equal height, so that the last one is not a small remainder.
static int64_t even_height(int64_t rows) {
    const int64_t bands = (rows + HIGH - 1) / HIGH;
    return bands ? (rows + bands - 1) / bands : 1;
}

static int64_t rows_of(const Layer *g, int64_t group) { return g->first_row[group + 1] - g->first_row[group]; }

static int lay_out(const Layer *g, const Operand *of, Layout *l) {
    const int64_t rows = g->first_row[g->groups];
    l->panels = (of->units + PANEL - 1) / PANEL;
    l->row_at = malloc(sizeof(int64_t) * (rows + g->groups * (l->panels + 1)));
    if (!l->row_at) return 0;
    l->place = l->row_at + rows, l->width = l->place + g->groups * l->panels;
    int64_t start = 0;
    for (int64_t i = 0; i < g->groups; i++) {
        int64_t *place = l->place + i * l->panels, width = 0;
        for (int64_t p = 0; p < l->panels; p++) place[p] = of->panel ? DROPPED : p * PANEL;
        for (int64_t s = of->panel ? of->first_panel[i] : 0; of->panel && s < of->first_panel[i + 1]; s++) {
            place[of->panel[s]] = width;
            width += in_panel(of->units, of->panel[s]);
        }
        l->width[i] = of->panel ? width : of->units;
        for (int64_t r = g->first_row[i]; r < g->first_row[i + 1]; r++, start += width)
            l->row_at[r] = of->panel ? start : g->row[r] * of->units;
    }
    return 1;
}

// Workspace that a thread keeps: shared by all threads (0), or private (1).
static float *work_space(int which, int64_t floats) {
    static _Thread_local float *kept[2];
    static _Thread_local int64_t sizes[2];
    if (sizes[which] < floats) {
        free(kept[which]);
        kept[which] = aligned_alloc(64, (sizeof(float) * floats + 63) / 64 * 64);
        sizes[which] = kept[which] ? floats : 0;
    }
    return kept[which];
}

// Pack panels [first, last) of the weight's outputs between inputs k0 and k0 + depth, as far as a group needs them: each
// is [depth, PANEL], to[(panel - first) * depth * PANEL + k * PANEL + j] = weight(panel * PANEL + j, k0 + k).
static void pack_weight(const Layer *g, int64_t first, int64_t last, int64_t k0, int64_t depth, const char *needed,
                        const int64_t *iota, float *to) {
    const int64_t outputs = g->outputs.units, panels = (depth + PANEL - 1) / PANEL;
    if (g->w_output == 1 && last * PANEL <= outputs) {  // all panels of a row at once, because rows lie on different pages
        for (int64_t p = 0; p < panels; p++) {
            int64_t list[MOST], n = 0;
            for (int64_t i = 0; i < last - first; i++)
                if (needed[i * panels + p]) list[n++] = i;
            for (int64_t k = p * PANEL; k < least((p + 1) * PANEL, depth); k++) {
                const float *from = g->weight + (k0 + k) * g->w_input + first * PANEL;
                const int64_t ahead = least(AHEAD, depth - 1 - k) * g->w_input;
                for (int64_t i = 0; i < n; i++) {
                    __builtin_prefetch(from + ahead + list[i] * PANEL);
                    memcpy(to + (list[i] * depth + k) * PANEL, from + list[i] * PANEL, sizeof(float) * PANEL);
                }
            }
        }
        return;
    }
    for (int64_t panel = first; panel < last; panel++, needed += panels, to += depth * PANEL) {
        const int64_t width = in_panel(outputs, panel);
        int64_t at[PANEL];
        for (int64_t j = 0; j < width; j++) at[j] = (panel * PANEL + j) * g->w_output;
        for (int64_t p = 0, end; p < panels; p = end) {
            for (end = p + 1; end < panels && needed[end] == needed[p]; end++) {}
            if (!needed[p]) continue;
            const float *base = g->weight + (k0 + p * PANEL) * g->w_input;
            float *out = to + p * PANEL * PANEL;
            const int64_t deep = least(end * PANEL, depth) - p * PANEL;
            if (g->w_input == 1) {
                pack(base, iota, deep, at, (int)width, PANEL, 1, out);
                continue;
            }
            for (int64_t k = 0; k < deep; k++)
                for (int64_t j = 0; j < width; j++) out[k * PANEL + j] = base[k * g->w_input + at[j]];
        }
    }
}

// Which panels of inputs, [first_in, last_in), are read for outputs of panels [first, last).
static void mark_needed(const Layer *g, const Layout *x, const Layout *y, int64_t first, int64_t last, int64_t first_in,
                        int64_t last_in, char *needed) {
    const int64_t panels = last_in - first_in;
    memset(needed, 0, (last - first) * panels);
    for (int64_t i = 0; i < g->groups; i++)
        for (int64_t q = first; q < last; q++) {
            if (y->place[i * y->panels + q] == DROPPED) continue;
            const int64_t *place = x->place + i * x->panels + first_in;
            char *to = needed + (q - first) * panels;
            for (int64_t p = 0; p < panels; p++) to[p] |= place[p] != DROPPED;
        }
}

// The panels of inputs of one slab that a group keeps, in ascending order: where their values lie within a row, and the
// terms that they contribute to a sum, of values that are packed in this order.
static void find_terms(const Layer *g, const Layout *x, int64_t group, int64_t first, int64_t last, int64_t high,
                       int64_t *columns, int64_t *width, Terms *terms, int64_t *n_terms) {
    *width = *n_terms = 0;
    for (int64_t p = first; p < last; p++) {
        const int64_t place = x->place[group * x->panels + p], wide = in_panel(g->inputs.units, p);
        if (place == DROPPED) continue;
        if (*n_terms && terms[*n_terms - 1].b + terms[*n_terms - 1].depth * PANEL == (p - first) * PANEL * PANEL)
            terms[*n_terms - 1].depth += wide;
        else
            terms[(*n_terms)++] = (Terms){*width * high, (p - first) * PANEL * PANEL, wide};
        for (int64_t k = 0; k < wide; k++) columns[(*width)++] = place + k;
    }
}

// outputs = inputs @ weight.T + bias for the units that each group of rows keeps. The gradient of the inputs is the same
// product with the roles of inputs and outputs exchanged.
int one_pass_product(const Layer *g, int threads) {
    Layout x = {0}, y = {0};
    const int64_t inputs = g->inputs.units, outputs = g->outputs.units;
    int failed = !lay_out(g, &g->inputs, &x) || !lay_out(g, &g->outputs, &y);
    // Slabs of the depth, and panels of the weight that are packed together.
    const int64_t slabs = (inputs + DEPTH - 1) / DEPTH, slab = slabs ? (x.panels + slabs - 1) / slabs : 0, step = slab * PANEL;
    const int64_t fitting = least(MOST, step ? NEAR / (step * PANEL) : 1), each = (y.panels + 2 * threads - 1) / (2 * threads);
    const int64_t per = fitting < 1 ? 1 : threads > 1 ? least(fitting, each) : fitting;
    const int64_t tasks = (y.panels + per - 1) / per;
    int64_t *iota = malloc(sizeof(int64_t) * (step + g->groups * (4 + step) + 1));
    Terms *terms = malloc(sizeof(Terms) * (g->groups * slab + 1));
    failed |= !iota || !terms;
    int64_t *high = iota + step, *packed_at = high + g->groups, *width = packed_at + g->groups, *n_terms = width + g->groups;
    int64_t *columns = n_terms + g->groups;
    for (int64_t k = 0; !failed && k < step; k++) iota[k] = k;
    for (int64_t s = 0; s < slabs && !failed; s++) {
        const int64_t first_in = s * slab, last_in = least(first_in + slab, x.panels);
        const int64_t k0 = first_in * PANEL, deep = least(step, inputs - k0);
        int64_t room = 0;
        for (int64_t i = 0; i < g->groups; i++) {
            high[i] = even_height(rows_of(g, i)), packed_at[i] = room;
            find_terms(g, &x, i, first_in, last_in, high[i], columns + i * step, width + i, terms + i * slab, n_terms + i);
            room += (rows_of(g, i) + high[i] - 1) / high[i] * (high[i] * width[i] + GAP);
        }
        float *packed = work_space(0, room + GAP);
        failed = !packed;
#pragma omp parallel num_threads(threads) if (!failed && threads > 1)
        {
            float *own = failed ? NULL : work_space(1, per * step * PANEL + GAP);
            char *needed = malloc(per * slab + 1);
            if (!own || !needed) {
#pragma omp atomic write
                failed = 1;
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < g->groups; i++) {
                if (!packed) continue;
                float *to = packed + packed_at[i];
                for (int64_t r = 0; r < rows_of(g, i); r += high[i], to += high[i] * width[i] + GAP)
                    pack(g->inputs.values, columns + i * step, width[i], x.row_at + g->first_row[i] + r,
                         (int)least(high[i], rows_of(g, i) - r), (int)high[i], 1, to);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tasks; task++) {
                if (failed) continue;
                const int64_t first = task * per, last = least(first + per, y.panels);
                mark_needed(g, &x, &y, first, last, first_in, last_in, needed);
                pack_weight(g, first, last, k0, deep, needed, iota, own);
                for (int64_t i = 0; i < g->groups; i++)
                    for (int64_t p = first; p < last; p++) {
                        const int64_t place = y.place[i * y.panels + p], wide = in_panel(outputs, p);
                        if (place == DROPPED) continue;
                        const float *bias = g->bias && !s ? g->bias + p * PANEL : NULL, *a = packed + packed_at[i];
                        for (int64_t r = 0; r < rows_of(g, i); r += high[i], a += high[i] * width[i] + GAP) {
                            vec sums[HIGH][VECS];
                            const int64_t *row = y.row_at + g->first_row[i] + r;
                            tile_sums(high[i], a, own + (p - first) * deep * PANEL, terms + i * slab, n_terms[i], sums);
                            for (int64_t j = 0; j < least(high[i], rows_of(g, i) - r); j++)
                                store_row(sums[j], g->outputs.values + row[j] + place, wide, bias, s ? ADD : WRITE);
                        }
                    }
            }
            free(needed);
        }
    }
    free(iota), free(terms), free(x.row_at), free(y.row_at);
    return failed;
}

// Consecutive rows of a group.
typedef struct {
    int64_t group, first, rows;
} Rows;

// weight(output, input) = sum of outputs * inputs over the rows of the groups that keep both; zero if none does.
int one_pass_weight_grad(const Layer *g, int threads, int past_caches) {
    Layout x = {0}, y = {0};
    const int64_t inputs = g->inputs.units, outputs = g->outputs.units, bands = PANEL / SHARE;
    int failed = !lay_out(g, &g->inputs, &x) || !lay_out(g, &g->outputs, &y);
    // Rows are summed slab by slab: as many parts of groups as stay in the cache.
    int64_t n_parts = 0;
    for (int64_t i = 0; i < g->groups; i++) n_parts += (rows_of(g, i) + NEAR_ROWS - 1) / NEAR_ROWS;
    Rows *parts = malloc(sizeof(Rows) * (n_parts + 1));
    int64_t *packed_at = malloc(sizeof(int64_t) * (n_parts * x.panels + 1));
    failed |= !parts || !packed_at;
    n_parts = 0;
    for (int64_t i = 0; !failed && i < g->groups; i++)
        for (int64_t r = 0; r < rows_of(g, i); r += NEAR_ROWS)
            parts[n_parts++] = (Rows){i, g->first_row[i] + r, least(NEAR_ROWS, rows_of(g, i) - r)};
    int64_t part0 = 0;
    do {
        int64_t part1 = part0, rows = 0, room = 0;
        while (!failed && part1 < n_parts && (part1 == part0 || rows + parts[part1].rows <= NEAR_ROWS)) {
            const Rows part = parts[part1];
            for (int64_t p = 0; p < x.panels; p++)
                if (x.place[part.group * x.panels + p] != DROPPED)
                    packed_at[part1 * x.panels + p] = room, room += part.rows * PANEL;
            rows += part.rows, part1++;
        }
        const int64_t fitting = NEAR / 2 / (rows * PANEL + 1), each = (y.panels + 2 * threads - 1) / (2 * threads);
        const int64_t per = fitting < 1 ? 1 : threads > 1 ? least(fitting, each) : fitting;
        const int mode = part0 ? ADD : past_caches ? PAST_CACHES : WRITE;
        float *packed = failed ? NULL : work_space(0, room + GAP);
        failed |= !packed;
#pragma omp parallel num_threads(threads) if (!failed && threads > 1)
        {
            float *own = failed ? NULL : work_space(1, per * rows * PANEL + GAP);
            Terms *terms = malloc(sizeof(Terms) * (part1 - part0 + 1));
            int64_t *kept = malloc(sizeof(int64_t) * per * 2 * (part1 - part0 + 1));  // of each panel: part, place in own
            int64_t *n_kept = malloc(sizeof(int64_t) * (per + 1));
            if (!own || !terms || !kept || !n_kept) {
#pragma omp atomic write
                failed = 1;
            }
#pragma omp for schedule(static)
            for (int64_t i = part0; i < part1; i++) {
                const Rows part = parts[i];
                for (int64_t r = 0; packed && r < part.rows; r++) {
                    const float *from = g->inputs.values + x.row_at[part.first + r];
                    for (int64_t p = 0; p < x.panels; p++) {
                        const int64_t place = x.place[part.group * x.panels + p], width = in_panel(inputs, p);
                        if (place == DROPPED) continue;
                        float *to = packed + packed_at[i * x.panels + p] + r * PANEL;
                        if (width == PANEL)
                            memcpy(to, from + place, sizeof(float) * PANEL);
                        else
                            memcpy(to, from + place, sizeof(float) * width), memset(to + width, 0, sizeof(float) * (PANEL - width));
                    }
                }
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < (y.panels + per - 1) / per; task++) {
                if (failed) continue;
                const int64_t first = task * per, last = least(first + per, y.panels);
                for (int64_t q = first; q < last; q++) {
                    // Bands of SHARE outputs, each with the rows of all parts that keep the panel.
                    int64_t *list = kept + (q - first) * 2 * (part1 - part0), n = 0, before = 0;
                    for (int64_t i = part0; i < part1; i++)
                        if (y.place[parts[i].group * y.panels + q] != DROPPED)
                            list[2 * n] = i, list[2 * n++ + 1] = before, before += parts[i].rows;
                    n_kept[q - first] = n;
                    float *to = own + (q - first) * rows * PANEL;
                    const int64_t width = in_panel(outputs, q);
                    for (int64_t i = 0; i < n; i++) {
                        const Rows part = parts[list[2 * i]];
                        const int64_t place = y.place[part.group * y.panels + q];
                        for (int64_t r = 0; r < part.rows; r++) {
                            const float *from = g->outputs.values + y.row_at[part.first + r] + place;
                            for (int64_t b = 0; b < bands; b++) {
                                float *at = to + (b * rows + list[2 * i + 1] + r) * SHARE;
                                const int64_t filled = least(SHARE, width - b * SHARE);
                                if (filled == SHARE)
                                    memcpy(at, from + b * SHARE, sizeof(float) * SHARE);
                                else
                                    for (int64_t j = 0; j < SHARE; j++) at[j] = j < filled ? from[b * SHARE + j] : 0;
                            }
                        }
                    }
                }
                for (int64_t p = 0; p < x.panels; p++) {
                    const int64_t width = in_panel(inputs, p);
                    for (int64_t q = first; q < last; q++) {
                        const int64_t *list = kept + (q - first) * 2 * (part1 - part0);
                        int64_t n = 0;
                        for (int64_t i = 0; i < n_kept[q - first]; i++) {
                            const int64_t part = list[2 * i];
                            if (x.place[parts[part].group * x.panels + p] != DROPPED)
                                terms[n++] = (Terms){list[2 * i + 1] * SHARE, packed_at[part * x.panels + p], parts[part].rows};
                        }
                        if (!n && mode == ADD) continue;
                        for (int64_t b = 0; b * SHARE < in_panel(outputs, q); b++) {
                            vec sums[HIGH][VECS];
                            const int64_t output = q * PANEL + b * SHARE, filled = least(SHARE, outputs - output);
                            float *to = g->weight + output * g->w_output + p * PANEL;
                            for (int64_t i = 0; i < filled && mode != PAST_CACHES; i++) __builtin_prefetch(to + i * g->w_output, 1);
                            tile_sums(SHARE, own + ((q - first) * PANEL + b * SHARE) * rows, packed, terms, n, sums);
                            for (int64_t i = 0; i < filled; i++) store_row(sums[i], to + i * g->w_output, width, NULL, mode);
                        }
                    }
                }
            }
            fence();
            free(terms), free(kept), free(n_kept);
        }
        part0 = part1;
    } while (!failed && part0 < n_parts);
    free(parts), free(packed_at), free(x.row_at), free(y.row_at);
    return failed;
}
