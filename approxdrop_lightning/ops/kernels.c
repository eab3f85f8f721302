// Copies and pointwise work that PyTorch has no single call for. Compiled by native.py with the user's compiler.
// Sizes are in bytes where named so, matrices are row-major.
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PARALLEL_FROM 16384  // elements below which a second thread costs more than it saves

static inline void copy_run(char *restrict to, const char *restrict from, int64_t bytes) {
    switch (bytes) {  // a constant size becomes a few vector moves instead of a call
        case 4: memcpy(to, from, 4); break;
        case 64: memcpy(to, from, 64); break;
        default: memcpy(to, from, bytes);
    }
}

// to[i, :] = from[rows[i], the runs of columns]
void take(char *restrict to, int64_t to_bytes, const char *restrict from, int64_t from_bytes, const int64_t *rows,
          int64_t n_rows, const int64_t *starts, const int64_t *lengths, int64_t runs, int64_t item, int threads) {
#pragma omp parallel for num_threads(threads) if (n_rows * to_bytes > 4 * PARALLEL_FROM)
    for (int64_t i = 0; i < n_rows; i++) {
        char *out = to + i * to_bytes;
        const char *in = from + rows[i] * from_bytes;
        for (int64_t r = 0; r < runs; r++) {
            int64_t bytes = lengths[r] * item;
            copy_run(out, in + starts[r] * item, bytes);
            out += bytes;
        }
    }
}

// to[rows[i], the runs of columns] = from[i, :]; with clear the row's other columns become zero.
void put(char *restrict to, int64_t to_bytes, const char *restrict from, int64_t from_bytes, const int64_t *rows,
         int64_t n_rows, const int64_t *starts, const int64_t *lengths, int64_t runs, int64_t item, int clear,
         int threads) {
#pragma omp parallel for num_threads(threads) if (n_rows * to_bytes > 4 * PARALLEL_FROM)
    for (int64_t i = 0; i < n_rows; i++) {
        char *out = to + rows[i] * to_bytes;
        const char *in = from + i * from_bytes;
        if (clear) memset(out, 0, to_bytes);
        for (int64_t r = 0; r < runs; r++) {
            int64_t bytes = lengths[r] * item;
            copy_run(out + starts[r] * item, in, bytes);
            in += bytes;
        }
    }
}

// exp by 2^n * polynomial, relative error below 2e-7; a compiler vectorizes it as it stands.
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = (float)(int32_t)(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f));
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } scale = {((int32_t)n + 127) << 23};
    return p * scale.f;
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
