// What the compiled kernels have in common.
#ifndef APPROXDROP_KERNELS_H
#define APPROXDROP_KERNELS_H
#include <stdint.h>

// Some rows or columns of a matrix, as runs of consecutive ones.
typedef struct {
    const int64_t *starts, *lengths;
    int64_t runs;
} Units;

#endif
