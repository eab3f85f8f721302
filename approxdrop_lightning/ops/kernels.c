// Copies and pointwise work that PyTorch has no single call for. Compiled by native.py with the user's compiler.
// Sizes are in bytes where named so, matrices are row-major.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

#define MAX_THREADS 64
#define PARALLEL_FROM 16384  // elements below which a second thread costs more than it saves

static inline void copy_run(char *restrict to, const char *restrict from, int64_t bytes) {
    switch (bytes) {  // a constant size becomes a few vector moves instead of a call
        case 4: memcpy(to, from, 4); break;
        case 64: memcpy(to, from, 64); break;
        default: memcpy(to, from, bytes);
    }
}

// Runs of a list, in equal parts for the threads: each starts where the runs before it end.
static void part(Units units, int64_t *first, int64_t *last, int64_t *before) {
    int64_t thread = 0, threads = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
    *first = units.runs * thread / threads, *last = units.runs * (thread + 1) / threads, *before = 0;
    for (int64_t r = 0; r < *first; r++) *before += units.lengths[r];
}

// One long run of rows is cut, or it would be one thread's.
static void cut(Units *rows, int64_t *starts, int64_t *lengths, int threads) {
    if (rows->runs != 1) return;
    int64_t start = rows->starts[0], length = rows->lengths[0];
    for (int64_t t = 0; t < threads; t++) {
        starts[t] = start + length * t / threads;
        lengths[t] = start + length * (t + 1) / threads - starts[t];
    }
    rows->starts = starts, rows->lengths = lengths, rows->runs = threads;
}

// to = from[rows, columns]; rows of `to` follow each other.
void take(char *restrict to, int64_t to_bytes, const char *restrict from, int64_t from_bytes, Units rows,
          Units columns, int64_t item, int64_t size, int threads) {
    int64_t cut_starts[MAX_THREADS], cut_lengths[MAX_THREADS];
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    cut(&rows, cut_starts, cut_lengths, threads);
#pragma omp parallel num_threads(threads) if (size > PARALLEL_FROM)
    {
        int64_t first, last, before;
        part(rows, &first, &last, &before);
        char *line = to + before * to_bytes;
        for (int64_t r = first; r < last; r++)
            for (int64_t i = rows.starts[r]; i < rows.starts[r] + rows.lengths[r]; i++, line += to_bytes) {
                char *out = line;
                for (int64_t c = 0; c < columns.runs; c++) {
                    int64_t bytes = columns.lengths[c] * item;
                    copy_run(out, from + i * from_bytes + columns.starts[c] * item, bytes);
                    out += bytes;
                }
            }
    }
}

// to[rows, columns] = from, whose rows follow each other; with clear the other columns of these rows become zero.
void put(char *restrict to, int64_t to_bytes, const char *restrict from, int64_t from_bytes, Units rows,
         Units columns, int64_t item, int64_t size, int threads, int clear) {
    int64_t cut_starts[MAX_THREADS], cut_lengths[MAX_THREADS];
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    cut(&rows, cut_starts, cut_lengths, threads);
#pragma omp parallel num_threads(threads) if (size > PARALLEL_FROM)
    {
        int64_t first, last, before;
        part(rows, &first, &last, &before);
        const char *line = from + before * from_bytes;
        for (int64_t r = first; r < last; r++)
            for (int64_t i = rows.starts[r]; i < rows.starts[r] + rows.lengths[r]; i++, line += from_bytes) {
                const char *in = line;
                if (clear) memset(to + i * to_bytes, 0, to_bytes);
                for (int64_t c = 0; c < columns.runs; c++) {
                    int64_t bytes = columns.lengths[c] * item;
                    copy_run(to + i * to_bytes + columns.starts[c] * item, in, bytes);
                    in += bytes;
                }
            }
    }
}

// to[rows, columns] = 0.
void zero(char *restrict to, int64_t to_bytes, Units rows, Units columns, int64_t item, int64_t size, int threads) {
    int64_t cut_starts[MAX_THREADS], cut_lengths[MAX_THREADS];
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    cut(&rows, cut_starts, cut_lengths, threads);
#pragma omp parallel for num_threads(threads) if (size > PARALLEL_FROM)
    for (int64_t r = 0; r < rows.runs; r++)
        for (int64_t i = rows.starts[r]; i < rows.starts[r] + rows.lengths[r]; i++)
            for (int64_t c = 0; c < columns.runs; c++)
                memset(to + i * to_bytes + columns.starts[c] * item, 0, columns.lengths[c] * item);
}

// exp by 2^n * polynomial, relative error below 2e-7. No branch and no call, so that the compiler vectorizes it.
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
    float square = x * x;  // near 0 the quotient would lose all digits: the series to x^7
    float small = x * (1.0f + square * (-0.333333333f + square * (0.133333333f - square * 0.0539682540f)));
    float e = fast_exp(2.0f * x);
    float large = 1.0f - 2.0f / (e + 1.0f);
    return square < 0.01f ? small : large;
}

// One step of an LSTM: gates [batch, 4 * hidden] before their nonlinearity (i, f, g, o), acts the same after it.
void lstm_forward(const float *restrict gates, const float *restrict c, float *restrict acts, float *restrict c_next,
                  float *restrict tanh_c, float *restrict h_next, int64_t batch, int64_t hidden, int threads) {
#pragma omp parallel for num_threads(threads) if (batch * hidden > PARALLEL_FROM / 4)
    for (int64_t b = 0; b < batch; b++) {
        const float *in = gates + b * 4 * hidden;
        float *out = acts + b * 4 * hidden;
#pragma omp simd
        for (int64_t j = 0; j < hidden; j++) {
            int64_t k = b * hidden + j;
            float i = sigmoid(in[j]), f = sigmoid(in[hidden + j]);
            float g = tanh_(in[2 * hidden + j]), o = sigmoid(in[3 * hidden + j]);
            float next = f * c[k] + i * g, squashed = tanh_(next);
            out[j] = i, out[hidden + j] = f, out[2 * hidden + j] = g, out[3 * hidden + j] = o;
            c_next[k] = next, tanh_c[k] = squashed, h_next[k] = o * squashed;
        }
    }
}

// Its backward: dgates from dh and dc, which becomes that of the step before. dh is the sum of two parts.
void lstm_backward(const float *restrict acts, const float *restrict c, const float *restrict tanh_c,
                   const float *restrict dh_out, const float *restrict dh_later, float *restrict dc,
                   float *restrict dgates, int64_t batch, int64_t hidden, int threads) {
#pragma omp parallel for num_threads(threads) if (batch * hidden > PARALLEL_FROM / 4)
    for (int64_t b = 0; b < batch; b++) {
        const float *act = acts + b * 4 * hidden;
        float *out = dgates + b * 4 * hidden;
#pragma omp simd
        for (int64_t j = 0; j < hidden; j++) {
            int64_t k = b * hidden + j;
            float i = act[j], f = act[hidden + j], g = act[2 * hidden + j], o = act[3 * hidden + j];
            float dh = dh_out[k] + dh_later[k], t = tanh_c[k];
            float d = dc[k] + dh * o * (1.0f - t * t);
            out[j] = d * g * i * (1.0f - i);
            out[hidden + j] = d * c[k] * f * (1.0f - f);
            out[2 * hidden + j] = d * i * (1.0f - g * g);
            out[3 * hidden + j] = dh * t * o * (1.0f - o);
            dc[k] = d * f;
        }
    }
}
