// What the compiled kernels share.
#ifndef APPROXDROP_KERNELS_H
#define APPROXDROP_KERNELS_H
#include <stdint.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define LINE 64  // bytes of a cache line

// Eight floats past the caches: what is not read soon need neither be read before it is written, nor drive out what is.
// Pays for whole lines only. After the last one comes a fence.
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

// Some rows or columns of a matrix, as ranges of consecutive ones. `UnitsStruct` of patterns/units.py.
typedef struct {
    const int64_t *starts, *lengths;
    int64_t ranges, count;
} Units;

// Lets a test compare the size of a struct with that of its counterpart in Python.
#define EXPORT_SIZE(type) const int64_t sizeof_##type = sizeof(type)

#endif
