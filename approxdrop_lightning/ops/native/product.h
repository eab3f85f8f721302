// Products of submatrices; see product.c.
#ifndef APPROXDROP_PRODUCT_H
#define APPROXDROP_PRODUCT_H
#include <stdint.h>

#include "kernels.h"

// Rows and columns of a matrix whose entry (i, j) is base[i * row_stride + j * column_stride].
// This struct and the next have counterparts in product.py.
typedef struct {
    float *base;
    int64_t row_stride, column_stride;
    Units rows, columns;
} Submatrix;

// out = a @ b + bias[b.columns], or += in mode ADD. bias may be NULL; the column stride of `out` is 1.
typedef struct {
    Submatrix a, b, out;
    const float *bias;
    int64_t mode;
} Product;

enum { WRITE, ADD, PAST_CACHES };

int products(const Product *list, int64_t count, int threads);

#endif
