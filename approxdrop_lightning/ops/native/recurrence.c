// The recurrence of an LSTM over all steps, float32. The recurrent weight is packed once; the pointwise operations are
// applied to each tile of the product while it is in cache. The order of the gates is i, f, g, o.
#include <stdint.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "tile.h"

#define DEPTH 1024  // depth of a panel, so that it stays in the L2 cache

// exp as 2^n * polynomial, relative error below 2e-7. Without branches and calls, so that the compiler vectorizes it.
static inline float fast_exp(float x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
    x = x < -87.0f ? -87.0f : x;  // NaN stays NaN
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + round, n = shifted - round;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (int32_t)((uint32_t)(bits + 127) << 23);
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

static inline float tanh_(float x) {
    float square = x * x;  // near 0 the quotient would lose all digits, hence the series up to x^7
    float small = x * (1.0f + square * (-0.333333333f + square * (0.133333333f - square * 0.0539682540f)));
    float e = fast_exp(2.0f * x);
    float large = 1.0f - 2.0f / (e + 1.0f);
    return square < 0.01f ? small : large;
}

// out[rows, COLUMNS] = a @ panel, for `a` packed in bands of `high` rows.
static void panel_product(int64_t bands, int high, int64_t depth, const float *a, const float *panel, float *out) {
    for (int64_t k0 = 0; k0 < depth; k0 += DEPTH)
        for (int64_t band = 0; band < bands; band++) {
            vec sums[ROWS][2], *to = (vec *)(out + band * high * COLUMNS);
            tile(high, least(depth - k0, DEPTH), a + (band * depth + k0) * high, panel + k0 * COLUMNS, sums);
            for (int i = 0; i < 2 * high; i++) {
                if (k0) to[i] += sums[i / 2][i % 2];
                else to[i] = sums[i / 2][i % 2];
            }
        }
}

// Writes n + COLUMNS of them and returns their end.
static int64_t *multiples(int64_t n, int64_t step, int64_t *to) {
    for (int64_t i = 0; i < n + COLUMNS; i++) to[i] = i * step;
    return to + n + COLUMNS;
}

// Shared by both directions: bands of rows, the depth of the products, arrays of offsets, and the workspace of each
// thread. A single allocation that starts at `inner`, which is NULL if out of memory.
typedef struct {
    int64_t batch, bands, depth, *inner, *rows, *weight_rows, each;
    int high;
    float *scratch;
} Shape;

static Shape shape_of(int64_t batch, int64_t depth, int64_t row, int64_t hidden, int64_t weight_row, int64_t products,
                      int threads) {
    Shape s = {.batch = batch, .bands = (batch + ROWS - 1) / ROWS, .depth = depth};
    s.high = (int)((batch + s.bands - 1) / s.bands);
    s.bands = (batch + s.high - 1) / s.high;
    // A thread's packed rows, then its sums; no two threads write to the same cache line.
    s.each = (s.bands * s.high * (depth + products * COLUMNS) + 16 + 31) / 16 * 16;
    s.inner = malloc(sizeof(int64_t) * (depth + batch + 4 * hidden + 3 * COLUMNS) + sizeof(float) * s.each * threads);
    if (!s.inner) return s;
    s.rows = multiples(depth, 1, s.inner);
    s.weight_rows = multiples(batch, row, s.rows);
    s.scratch = (float *)multiples(4 * hidden, weight_row, s.weight_rows);
    return s;
}

static float *own_scratch(const Shape *s) {
#ifdef _OPENMP
    return s->scratch + s->each * omp_get_thread_num();
#else
    return s->scratch;
#endif
}

static void pack_rows(const Shape *s, const float *from, const int64_t *inner, float *to) {
    for (int64_t band = 0; band < s->bands; band++)
        pack(from, inner, s->depth, s->rows + band * s->high, (int)least(s->batch - band * s->high, s->high), s->high, 1,
             to + band * s->high * s->depth);
}

// Computes h and c of all steps, and acts, the activated gates. h and c start with the initial state.
// weight is [4 * hidden, depth], contiguous, and kept lists the hidden units that it reads; NULL means all.
// packed has room for 4 * depth * hidden, with hidden rounded up to a multiple of COLUMNS, and 8 more.
// Returns nonzero if out of memory; then nothing was done.
int lstm_forward(const float *restrict gates, float *restrict h, float *restrict c, float *restrict acts,
                  const float *restrict weight, const int64_t *kept, float *restrict packed,
                  int64_t steps, int64_t batch, int64_t hidden, int64_t depth, int threads) {
    const Shape s = shape_of(batch, depth, hidden, hidden, depth, 4, threads);
    if (!s.inner) return 1;
    const int64_t panels = (hidden + COLUMNS - 1) / COLUMNS, size = s.bands * s.high * COLUMNS;
#pragma omp parallel num_threads(threads)
    {
        float *a = own_scratch(&s), *sums = a + s.bands * s.high * depth + 16;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < 4 * panels; i++) {
            const int64_t first = i / 4 * COLUMNS;
            pack(weight, s.inner, depth, s.weight_rows + i % 4 * hidden + first, (int)least(hidden - first, COLUMNS), COLUMNS, 1,
                 packed + i * COLUMNS * depth);
        }
        for (int64_t t = 0; t < steps; t++) {
            const float *c_now = c + t * batch * hidden;
            float *c_next = c + (t + 1) * batch * hidden, *h_next = h + (t + 1) * batch * hidden;
            pack_rows(&s, h + t * batch * hidden, kept ? kept : s.inner, a);
#pragma omp for schedule(dynamic, 1)
            for (int64_t panel = 0; panel < panels; panel++) {
                const int64_t first = panel * COLUMNS, wide = least(hidden - first, COLUMNS);
                for (int q = 0; q < 4; q++)
                    panel_product(s.bands, s.high, depth, a, packed + (4 * panel + q) * COLUMNS * depth, sums + q * size);
                for (int64_t b = 0; b < batch; b++) {
                    const int64_t at = b * hidden + first;
                    const float *in = gates + t * batch * 4 * hidden + 4 * b * hidden + first, *sum = sums + b * COLUMNS;
                    float *out = acts + t * batch * 4 * hidden + 4 * b * hidden + first;
#pragma omp simd
                    for (int64_t j = 0; j < wide; j++) {
                        float i = sigmoid(in[j] + sum[j]), f = sigmoid(in[hidden + j] + sum[size + j]);
                        float g = tanh_(in[2 * hidden + j] + sum[2 * size + j]);
                        float o = sigmoid(in[3 * hidden + j] + sum[3 * size + j]);
                        float next = f * c_now[at + j] + i * g;
                        out[j] = i, out[hidden + j] = f, out[2 * hidden + j] = g, out[3 * hidden + j] = o;
                        c_next[at + j] = next, h_next[at + j] = o * tanh_(next);
                    }
                }
            }
        }
    }
    free(s.inner);
    return 0;
}

// Runs backward through the steps and computes dgates from dh_out, the gradient of all outputs. dh and dc hold the
// gradients of the last state and are overwritten by those of the initial state. packed has room for 4 * hidden * depth,
// with depth rounded up, and 8 more. Return value as in lstm_forward.
int lstm_backward(const float *restrict acts, const float *restrict c, const float *restrict dh_out,
                   float *restrict dh, float *restrict dc, float *restrict dgates,
                   const float *restrict weight, const int64_t *kept, float *restrict packed, int64_t steps,
                   int64_t batch, int64_t hidden, int64_t depth, int threads) {
    const Shape s = shape_of(batch, 4 * hidden, 4 * hidden, hidden, depth, 1, threads);
    if (!s.inner) return 1;
    const int64_t panels = (depth + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(threads)
    {
        float *a = own_scratch(&s), *sums = a + s.bands * s.high * s.depth + 16;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < panels; i++)
            pack(weight, s.weight_rows, 4 * hidden, s.inner + i * COLUMNS, (int)least(depth - i * COLUMNS, COLUMNS), COLUMNS, 0,
                 packed + i * COLUMNS * 4 * hidden);
        for (int64_t t = steps - 1; t >= 0; t--) {
            const float *act = acts + t * batch * 4 * hidden, *c_t = c + t * batch * hidden, *c_next = c_t + batch * hidden;
            const float *dh_t = dh_out + t * batch * hidden;
            float *out = dgates + t * batch * 4 * hidden;
#pragma omp for schedule(static)
            for (int64_t b = 0; b < batch; b++) {
                const float *x = act + 4 * b * hidden;
                float *to = out + 4 * b * hidden;
#pragma omp simd
                for (int64_t j = 0; j < hidden; j++) {
                    const int64_t k = b * hidden + j;
                    float i = x[j], f = x[hidden + j], g = x[2 * hidden + j], o = x[3 * hidden + j];
                    float both = dh_t[k] + dh[k], tanh_k = tanh_(c_next[k]);
                    float d = dc[k] + both * o * (1.0f - tanh_k * tanh_k);
                    to[j] = d * g * i * (1.0f - i);
                    to[hidden + j] = d * c_t[k] * f * (1.0f - f);
                    to[2 * hidden + j] = d * i * (1.0f - g * g);
                    to[3 * hidden + j] = both * tanh_k * o * (1.0f - o);
                    dc[k] = d * f;
                    dh[k] = 0.0f;
                }
            }
            pack_rows(&s, out, s.inner, a);
#pragma omp for schedule(dynamic, 1)
            for (int64_t panel = 0; panel < panels; panel++) {
                const int64_t first = panel * COLUMNS, wide = least(depth - first, COLUMNS);
                panel_product(s.bands, s.high, s.depth, a, packed + panel * COLUMNS * s.depth, sums);
                for (int64_t b = 0; b < batch; b++)
                    for (int64_t j = 0; j < wide; j++)
                        dh[b * hidden + (kept ? kept[first + j] : first + j)] = sums[b * COLUMNS + j];
            }
        }
    }
    free(s.inner);
    return 0;
}
