// Definitions shared by the compiled kernels.
#ifndef APPROXDROP_KERNELS_H
#define APPROXDROP_KERNELS_H
#include <stdint.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define LINE 64  // bytes of a cache line

// Store eight floats past the caches: data that is not read soon need not be loaded before it is written, nor evict
// other data. Only worthwhile for whole lines, and requires a fence after the last one.
static inline void store_past_caches(float *to, const float *from) {
#ifdef __AVX__
    _mm256_stream_ps(to, _mm256_loadu_ps(from));
#else
    for (int i = 0; i < 8; i++) to[i] = from[i];
#endif
}

static inline void fence(void) {
#ifdef __AVX__
    _mm_sfence();
#endif
}

// Rows or columns of a matrix, as ranges of consecutive ones. `UnitsStruct` in patterns/units.py.
typedef struct {
    const int64_t *starts, *lengths;
    int64_t ranges, count;
} Units;

// copies.c
void zero(char *restrict to, int64_t to_bytes, Units rows, Units columns, int64_t item, int64_t size, int threads,
          int past_caches);
void column_sums(const float *restrict values, int64_t rows, Units columns, float *restrict to, int threads);

// Allows a test to compare the size of a struct with that of its Python counterpart.
#define EXPORT_SIZE(type) const int64_t sizeof_##type = sizeof(type)

#endif
