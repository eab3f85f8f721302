// Linear layer that reads the kept inputs and computes all outputs in one pass over the weight, float32. Every group of
// rows must keep whole panels of PANEL consecutive inputs.
//
// Several orders of the inputs result in many small groups that keep different panels; with product.c every group would
// read its own submatrix of the weight. Here each panel of the weight is packed once for all groups, and each group sums
// over the panels that it keeps; the gradient of a panel is summed over all groups that keep it and stored once. Further
// orders therefore cost nothing but shorter loops.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "tile.h"

#define PANEL 16            // inputs per panel, PANEL in one_pass.py; a tile of the result is HIGH x PANEL
#define VECS (PANEL / LANES)
#define HIGH (12 / VECS)
#define DEPTH 384           // depth of a packed slab, as in product.c,
#define HEIGHT 144          // and its number of rows
#define PANELS 4            // panels of outputs that are packed together
#define NEAR 49152          // floats of a slab of the output gradient that stay in the L2 cache
#define GAP 8               // packing writes up to eight values past the end of what it packs

// `LayerStruct` in one_pass.py.
typedef struct {
    int64_t rows, inputs, outputs, groups;
    const int64_t *row, *first_row;      // rows of the batch, group after group, and the start of each group
    const int64_t *panel, *first_panel;  // panels that each group keeps, in the same form
    float *x;                            // or its gradient: group after group, [rows of the group, its inputs]
    float *y;                            // or its gradient: [rows, outputs]
    float *weight;                       // or its gradient: entry (output, input) at output * w_output + input * w_input
    int64_t w_output, w_input;
    const float *bias;  // [outputs], or NULL
} Layer;

EXPORT_SIZE(Layer);
const int64_t one_pass_panel = PANEL;

// `depth` terms of the sums of a tile, and the offsets of their packed factors.
typedef struct {
    int64_t a, b, depth;
} Terms;

typedef struct {
    int64_t width, x, rows, first_row, high, bands, packed;  // x, packed: offsets of the group's values
} Group;

typedef struct {
    int64_t panels;
    Group *group;
    int64_t *column, *iota, *input_at, *output_at, *row_at;  // column: start of each kept panel in its group's x
} Layout;

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

static inline void store_row(const vec *sums, float *to, int64_t width, const float *bias, int add) {
    if (width == PANEL) {
        for (int v = 0; v < VECS; v++) {
            vec sum = sums[v], *at = (vec *)(to + v * LANES);
            if (bias) sum += *(const vec *)(bias + v * LANES);
            if (add) sum += *at;
            *at = sum;
        }
        return;
    }
    const float *sum = (const float *)sums;
    for (int64_t j = 0; j < width; j++) to[j] = (add ? to[j] : 0) + sum[j] + (bias ? bias[j] : 0);
}

// to[k * PANEL + j] = base[inner[k] + outer[j]]
static void pack_panel(const float *base, const int64_t *inner, int64_t depth, const int64_t *outer, int64_t width,
                       int inner_along, float *to) {
    if (inner_along || width < PANEL || outer[1] != outer[0] + 1) {
        pack(base, inner, depth, outer, (int)width, PANEL, inner_along, to);
        return;
    }
    for (int64_t k = 0; k < depth; k++, to += PANEL) memcpy(to, base + inner[k] + outer[0], sizeof(float) * PANEL);
}

// Spread a row over packed panels, `step` apart.
static void spread(const float *row, int64_t width, float *to, int64_t step) {
    for (; width >= PANEL; width -= PANEL, row += PANEL, to += step) memcpy(to, row, sizeof(float) * PANEL);
    if (width) memcpy(to, row, sizeof(float) * width), memset(to + width, 0, sizeof(float) * (PANEL - width));
}

static int64_t in_panel(const Layer *g, int64_t panel) { return least(PANEL, g->inputs - panel * PANEL); }

// Bands of almost equal height, so that the last one is not a small remainder.
static int64_t even_height(int64_t rows) {
    const int64_t bands = (rows + HIGH - 1) / HIGH;
    return bands ? (rows + bands - 1) / bands : 1;
}

static int lay_out(const Layer *g, Layout *l) {
    const int64_t longest = g->inputs > g->outputs ? g->inputs : g->outputs, kept = g->first_panel[g->groups];
    char *room = malloc(sizeof(Group) * (g->groups + 1) + sizeof(int64_t) * (kept + longest + g->inputs + g->outputs + g->rows));
    if (!room) return 0;
    l->panels = (g->inputs + PANEL - 1) / PANEL;
    l->group = (Group *)room;
    l->column = (int64_t *)(l->group + g->groups + 1);
    l->iota = l->column + kept, l->input_at = l->iota + longest, l->output_at = l->input_at + g->inputs;
    l->row_at = l->output_at + g->outputs;
    for (int64_t i = 0; i < longest; i++) l->iota[i] = i;
    for (int64_t i = 0; i < g->inputs; i++) l->input_at[i] = i * g->w_input;
    for (int64_t i = 0; i < g->outputs; i++) l->output_at[i] = i * g->w_output;
    for (int64_t i = 0; i < g->rows; i++) l->row_at[i] = g->row[i] * g->outputs;
    Group next = {0};
    for (int64_t i = 0; i < g->groups; i++) {
        next.width = 0, next.first_row = g->first_row[i], next.rows = g->first_row[i + 1] - next.first_row;
        for (int64_t s = g->first_panel[i]; s < g->first_panel[i + 1]; s++) {
            l->column[s] = next.width;
            next.width += in_panel(g, g->panel[s]);
        }
        next.high = even_height(next.rows), next.bands = (next.rows + next.high - 1) / next.high;
        l->group[i] = next;
        next.x += next.rows * next.width;
        next.packed += next.bands * (next.high * next.width + GAP);
    }
    l->group[g->groups] = next;
    return 1;
}

// Number of slabs, of up to HEIGHT rows each, that a group is split into.
static int64_t row_slabs(const Group *of) { return (of->bands * of->high + HEIGHT - 1) / HEIGHT; }

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

// y[rows of a group] = x @ weight[:, its inputs].T + bias, for each group.
int one_pass_product(const Layer *g, int threads) {
    Layout l;
    if (!lay_out(g, &l)) return 1;
    const int64_t tasks = (g->outputs + PANELS * PANEL - 1) / (PANELS * PANEL);
    float *packed = work_space(0, l.group[g->groups].packed + GAP);
    int failed = !packed;
#pragma omp parallel num_threads(threads) if (packed && threads > 1)
    {
        float *own = work_space(1, PANELS * PANEL * g->inputs + GAP);
        Terms *terms = malloc(sizeof(Terms) * (l.panels + 1));
        if (!own || !terms) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < g->groups; i++) {
            const Group *of = l.group + i;
            for (int64_t band = 0; packed && band < of->bands; band++) {
                int64_t at[HIGH];
                const int64_t first = band * of->high, filled = least(of->high, of->rows - first);
                for (int64_t r = 0; r < filled; r++) at[r] = (first + r) * of->width;
                pack(g->x + of->x, l.iota, of->width, at, (int)filled, (int)of->high, 1,
                     packed + of->packed + band * (of->high * of->width + GAP));
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            if (failed) continue;
            const int64_t first = task * PANELS * PANEL, last = least(first + PANELS * PANEL, g->outputs);
            for (int64_t j = first; j < last; j += PANEL)
                pack_panel(g->weight, l.input_at, g->inputs, l.output_at + j, least(PANEL, last - j), g->w_input == 1,
                           own + (j - first) * g->inputs);
            for (int64_t i = 0; i < g->groups; i++) {
                const Group *of = l.group + i;
                int64_t count = 0;
                for (int64_t s = g->first_panel[i]; s < g->first_panel[i + 1]; s++)
                    terms[count++] = (Terms){l.column[s] * of->high, g->panel[s] * PANEL * PANEL, in_panel(g, g->panel[s])};
                for (int64_t j = first; j < last; j += PANEL)
                    for (int64_t band = 0; band < of->bands; band++) {
                        vec sums[HIGH][VECS];
                        const int64_t r0 = band * of->high;
                        const int64_t *row = l.row_at + of->first_row + r0;
                        tile_sums(of->high, packed + of->packed + band * (of->high * of->width + GAP),
                                  own + (j - first) * g->inputs, terms, count, sums);
                        for (int64_t r = 0; r < least(of->high, of->rows - r0); r++)
                            store_row(sums[r], g->y + row[r] + j, least(PANEL, last - j), g->bias ? g->bias + j : NULL, 0);
                    }
            }
        }
        free(terms);
    }
    free(l.group);
    return failed;
}

// dx = dy[rows of the group] @ weight[:, its inputs], for each group.
int one_pass_input_grad(const Layer *g, int threads) {
    Layout l;
    if (!lay_out(g, &l)) return 1;
    const int64_t slabs = (g->outputs + DEPTH - 1) / DEPTH, step = slabs ? (g->outputs + slabs - 1) / slabs : 0;
    int64_t tasks = 0;  // each is up to HEIGHT rows of a group
    for (int64_t i = 0; i < g->groups; i++) tasks += row_slabs(l.group + i);
    float *packed = work_space(0, l.panels * PANEL * step + GAP);
    int failed = !packed;
#pragma omp parallel num_threads(threads) if (packed && threads > 1)
    {
        float *own = work_space(1, (HEIGHT + HIGH) * step + GAP);
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t k0 = 0; k0 < g->outputs; k0 += step) {
            const int64_t deep = least(step, g->outputs - k0);
            // In the memory order of the weight's rows.
#pragma omp for schedule(static)
            for (int64_t i = 0; i < (g->w_input == 1 ? deep : l.panels); i++) {
                if (failed) continue;
                if (g->w_input == 1)
                    spread(g->weight + l.output_at[k0 + i], g->inputs, packed + i * PANEL, deep * PANEL);
                else
                    pack(g->weight, l.output_at + k0, deep, l.input_at + i * PANEL, (int)in_panel(g, i), PANEL, 1,
                         packed + i * PANEL * deep);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tasks; task++) {
                int64_t i = 0, slab = task, count;
                while (slab >= (count = row_slabs(l.group + i))) slab -= count, i++;
                const Group *of = l.group + i;
                const int64_t per = (of->bands + count - 1) / count, band0 = slab * per, band1 = least(band0 + per, of->bands);
                if (failed) continue;
                for (int64_t band = band0; band < band1; band++) {
                    const int64_t r0 = band * of->high;
                    pack(g->y, l.iota + k0, deep, l.row_at + of->first_row + r0, (int)least(of->high, of->rows - r0),
                         (int)of->high, 1, own + (band - band0) * of->high * deep);
                }
                for (int64_t s = g->first_panel[i]; s < g->first_panel[i + 1]; s++) {
                    const int64_t width = in_panel(g, g->panel[s]);
                    const Terms terms = {0, 0, deep};
                    for (int64_t band = band0; band < band1; band++) {
                        vec sums[HIGH][VECS];
                        const int64_t r0 = band * of->high;
                        tile_sums(of->high, own + (band - band0) * of->high * deep, packed + g->panel[s] * PANEL * deep, &terms,
                                  1, sums);
                        float *to = g->x + of->x + r0 * of->width + l.column[s];
                        for (int64_t r = 0; r < least(of->high, of->rows - r0); r++)
                            store_row(sums[r], to + r * of->width, width, NULL, k0 > 0);
                    }
                }
            }
        }
    }
    free(l.group);
    return failed;
}

// dw[:, input] = sum of dy[rows of the group].T @ x[:, input] over the groups that keep the input; zero if none does.
int one_pass_weight_grad(const Layer *g, int threads) {
    Layout l;
    if (!lay_out(g, &l)) return 1;
    const int64_t kept = g->first_panel[g->groups], high = even_height(g->outputs);
    const int64_t bands = (g->outputs + high - 1) / high;
    int64_t per = NEAR / (g->rows * high + GAP + 1), room = 0;
    per = per < 1 ? 1 : per;
    // For each panel, the terms from all groups that keep it.
    Terms *terms = malloc(sizeof(Terms) * (kept + 1) + sizeof(int64_t) * (l.panels + 1 + 2 * kept));
    if (!terms) {
        free(l.group);
        return 1;
    }
    int64_t *first = (int64_t *)(terms + kept + 1), *group_of = first + l.panels + 1, *place = group_of + kept;
    memset(first, 0, sizeof(int64_t) * (l.panels + 1));
    for (int64_t s = 0; s < kept; s++) first[g->panel[s] + 1]++;
    for (int64_t s = 0; s < l.panels; s++) first[s + 1] += first[s];
    for (int64_t i = 0; i < g->groups; i++)
        for (int64_t s = g->first_panel[i]; s < g->first_panel[i + 1]; s++) {
            group_of[s] = i, place[s] = room;
            terms[first[g->panel[s]]++] = (Terms){l.group[i].first_row * high, room, l.group[i].rows};
            room += l.group[i].rows * PANEL;
        }
    for (int64_t s = l.panels; s > 0; s--) first[s] = first[s - 1];
    first[0] = 0;
    float *packed = work_space(0, room + GAP);
    int failed = !packed;
#pragma omp parallel num_threads(threads) if (packed && threads > 1)
    {
        float *own = work_space(1, per * (g->rows * high + GAP));
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t s = 0; s < kept; s++) {
            const Group *of = l.group + group_of[s];
            const float *from = g->x + of->x + l.column[s];
            const int64_t width = in_panel(g, g->panel[s]);
            float *to = packed + place[s];
            for (int64_t r = 0; packed && r < of->rows; r++) spread(from + r * of->width, width, to + r * PANEL, 0);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < (bands + per - 1) / per; task++) {
            const int64_t band0 = task * per, band1 = least(band0 + per, bands), size = g->rows * high + GAP;
            if (failed) continue;
            for (int64_t band = band0; band < band1; band++)
                pack(g->y, l.row_at, g->rows, l.iota + band * high, (int)least(high, g->outputs - band * high), (int)high,
                     0, own + (band - band0) * size);
            for (int64_t s = 0; s < l.panels; s++) {
                const int64_t width = in_panel(g, s);
                for (int64_t band = band0; band < band1; band++) {
                    vec sums[HIGH][VECS];
                    const int64_t filled = least(high, g->outputs - band * high);
                    float *to = g->weight + s * PANEL + band * high * g->w_output;
                    for (int64_t i = 0; i < filled; i++) __builtin_prefetch(to + i * g->w_output, 1);
                    tile_sums(high, own + (band - band0) * size, packed, terms + first[s], first[s + 1] - first[s], sums);
                    for (int64_t i = 0; i < filled; i++) store_row(sums[i], to + i * g->w_output, width, NULL, 0);
                }
            }
        }
    }
    free(terms);
    free(l.group);
    return failed;
}
