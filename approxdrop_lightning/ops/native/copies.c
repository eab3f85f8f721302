// Indexed copies and sums that would take several calls in PyTorch. Matrices are row-major; sizes are in bytes where their
// names say so.
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

#define MAX_THREADS 64
#define PARALLEL_FROM 16384  // elements below which a second thread costs more than it saves

static inline void copy_range(char *restrict to, const char *restrict from, int64_t bytes) {
    switch (bytes) {  // a constant size becomes a few vector moves instead of a call
        case 4: memcpy(to, from, 4); break;
        case 64: memcpy(to, from, 64); break;
        default: memcpy(to, from, bytes);
    }
}

// A thread's share of the ranges, [first, last), and the number of units before them.
static void split(Units units, int64_t *first, int64_t *last, int64_t *before) {
    int64_t thread = 0, threads = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
    *first = units.ranges * thread / threads, *last = units.ranges * (thread + 1) / threads, *before = 0;
    for (int64_t r = 0; r < *first; r++) *before += units.lengths[r];
}

// Split a single long range of rows, which would otherwise go to one thread.
static void cut(Units *rows, int64_t *starts, int64_t *lengths, int threads) {
    if (rows->ranges != 1) return;
    int64_t start = rows->starts[0], length = rows->lengths[0];
    for (int64_t t = 0; t < threads; t++) {
        starts[t] = start + length * t / threads;
        lengths[t] = start + length * (t + 1) / threads - starts[t];
    }
    rows->starts = starts, rows->lengths = lengths, rows->ranges = threads;
}

// to = from[rows, columns]; the rows of `to` are contiguous.
void take(char *restrict to, int64_t to_bytes, const char *restrict from, int64_t from_bytes, Units rows,
          Units columns, int64_t item, int64_t size, int threads) {
    int64_t cut_starts[MAX_THREADS], cut_lengths[MAX_THREADS];
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    cut(&rows, cut_starts, cut_lengths, threads);
#pragma omp parallel num_threads(threads) if (size > PARALLEL_FROM)
    {
        int64_t first, last, before;
        split(rows, &first, &last, &before);
        char *line = to + before * to_bytes;
        for (int64_t r = first; r < last; r++)
            for (int64_t i = rows.starts[r]; i < rows.starts[r] + rows.lengths[r]; i++, line += to_bytes) {
                char *out = line;
                for (int64_t c = 0; c < columns.ranges; c++) {
                    int64_t bytes = columns.lengths[c] * item;
                    copy_range(out, from + i * from_bytes + columns.starts[c] * item, bytes);
                    out += bytes;
                }
            }
    }
}

// to[rows, columns] = from, whose rows are contiguous; with clear, the other columns of these rows are zeroed.
void put(char *restrict to, int64_t to_bytes, const char *restrict from, int64_t from_bytes, Units rows,
         Units columns, int64_t item, int64_t size, int threads, int clear) {
    int64_t cut_starts[MAX_THREADS], cut_lengths[MAX_THREADS];
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    cut(&rows, cut_starts, cut_lengths, threads);
#pragma omp parallel num_threads(threads) if (size > PARALLEL_FROM)
    {
        int64_t first, last, before;
        split(rows, &first, &last, &before);
        const char *line = from + before * from_bytes;
        for (int64_t r = first; r < last; r++)
            for (int64_t i = rows.starts[r]; i < rows.starts[r] + rows.lengths[r]; i++, line += from_bytes) {
                const char *in = line;
                if (clear) memset(to + i * to_bytes, 0, to_bytes);
                for (int64_t c = 0; c < columns.ranges; c++) {
                    int64_t bytes = columns.lengths[c] * item;
                    copy_range(to + i * to_bytes + columns.starts[c] * item, in, bytes);
                    in += bytes;
                }
            }
    }
}

static inline void clear(char *to, int64_t bytes, int past_caches) {
    const float zeros[8] = {0};
    const int64_t before = -(uintptr_t)to % LINE;
    if (!past_caches || bytes < before + LINE) {
        memset(to, 0, bytes);
        return;
    }
    memset(to, 0, before);
    for (to += before, bytes -= before; bytes >= LINE; to += LINE, bytes -= LINE)
        store_past_caches((float *)to, zeros), store_past_caches((float *)(to + LINE / 2), zeros);
    memset(to, 0, bytes);
}

// to[rows, columns] = 0.
void zero(char *restrict to, int64_t to_bytes, Units rows, Units columns, int64_t item, int64_t size, int threads,
          int past_caches) {
    int64_t cut_starts[MAX_THREADS], cut_lengths[MAX_THREADS];
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    cut(&rows, cut_starts, cut_lengths, threads);
#pragma omp parallel num_threads(threads) if (size > PARALLEL_FROM)
    {
#pragma omp for
        for (int64_t r = 0; r < rows.ranges; r++)
            for (int64_t i = rows.starts[r]; i < rows.starts[r] + rows.lengths[r]; i++)
                for (int64_t c = 0; c < columns.ranges; c++)
                    clear(to + i * to_bytes + columns.starts[c] * item, columns.lengths[c] * item, past_caches);
        fence();
    }
}

EXPORT_SIZE(Units);

// to[columns] += sum over the rows of contiguous float32 values, [rows, columns].
void column_sums(const float *restrict values, int64_t rows, Units columns, float *restrict to, int threads) {
#pragma omp parallel num_threads(threads) if (rows * columns.count > 4 * PARALLEL_FROM)
    {
        int64_t first, last, before;
        split(columns, &first, &last, &before);
        for (int64_t row = 0; row < rows; row++) {
            const float *from = values + row * columns.count + before;
            for (int64_t r = first; r < last; from += columns.lengths[r++])
                for (int64_t j = 0; j < columns.lengths[r]; j++) to[columns.starts[r] + j] += from[j];
        }
    }
}
