/* Steerable convolution in the irreps basis, a chunk of pixels at a time, so that intermediate results stay in the cache

       f^ = Q f        to the irreps basis, field by field                    mix
       T = sum c E     functions of the plane and products of irreps          load
       y^ = W T        block by block                                         multiply
       y = Q^T y^      back to regular fields                                 store

   and the transposes of these steps. `block_diagonal.py` is the same algorithm, `irreps_basis.py` derives it; its step
   T = P * f is split in two here. E are sums of neighbours, see `neighbours`, and c combines the functions of the plane
   with A. A chunk is several images, or several output rows of one image.

       x, y           image   | field | element | row | pixel       contiguous
       T              block   | copy | function | row | field       along a row the pixels of the chunk: image, row, x
       y^             block   | copy | row | field                  as T
       W, packed      block   | tile of MR rows | column | row      see `pack_part`

   Vectors may be written past the end of a line of pixels: the next line overwrites the excess, and memory is allocated
   for it after the last line. `build_native.py` compiles this file with REAL=float and with REAL=double; `native.py`
   calls the functions at its end. */

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* A tile of the matrix product, MR x 2 vectors, fills the registers. */
#if defined(__AVX512F__)
#define BYTES 64
#define MR 14
#elif defined(__AVX__)
#define BYTES 32
#define MR 6
#else
#define BYTES 16
#define MR 8
#endif
typedef REAL vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
#define LANES ((long)(BYTES / sizeof(REAL)))
#define DEPTH ((long)(1024 / sizeof(REAL))) /* rows of T that a product takes at a time */

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif
#define LOAD(p) (*(const vector *)(p))
#define STORE(p, v) (*(vector *)(p) = (v))

typedef struct { /* a sparse matrix, row by row */
    const long *starts, *columns;
    const REAL *values;
} Sparse;

typedef struct {
    long order, in_fields, out_fields;
    long kernel_size, low_pass, stride, dilation; /* low_pass: the sums of neighbours are those of blurred 5 x 5 kernels */
    long batch, in_height, in_width, out_height, out_width;
    long images, rows;                        /* of a chunk: images, and output rows of each */
    long n_blocks, functions;                 /* their numbers */
    const long *sizes, *copies;               /* of each block */
    const REAL *fourier, *fourier_transposed; /* Q, Q^T [order, order] */
    Sparse terms, terms_transposed;           /* c [functions * order, n * n * order], c^T; n sums along each axis */
    long n_basis, n_entries;
    Sparse entries;                           /* [n_entries, n_basis]: the block weights of the coefficients */
} Layer;

typedef struct { /* the current chunk */
    long image, images, row, rows, line, pixels; /* line: length of a row of T in memory */
} Chunk;

static long round_up(long n, long to) { return (n + to - 1) / to * to; }
static long least(long a, long b) { return a < b ? a : b; }
static long floor_divide(long a, long b) { return (a < 0 ? a - b + 1 : a) / b; }

typedef __typeof__((vector){0} < (vector){0}) mask;
static vector positive(vector x) { return (vector)((mask)x & ~(x < (vector){0})); } /* keeps NaN */

/* An odd number of vectors: lines whose distance is a power of two would share few sets of the cache. */
static long line_length(long pixels) { return ((round_up(pixels, LANES) / LANES + 1) | 1) * LANES; }

/* Memory for WORK or for PACKED weights, which each thread reuses from call to call and frees when it ends; NULL if the
   allocation fails. Fresh memory would cost as much time as packing does. */
enum { WORK, PACKED };
static pthread_key_t scratch_keys[2];
static void make_scratch_keys(void) {
    for (int i = 0; i < 2; i++) pthread_key_create(scratch_keys + i, free);
}
static REAL *scratch(int use, long numbers) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_scratch_keys);
    long *own = pthread_getspecific(scratch_keys[use]); /* a count of numbers; the numbers begin after 64 bytes */
    if (!own || *own < numbers) {
        free(own);
        own = aligned_alloc(64, 64 + round_up(numbers * (long)sizeof(REAL), 64));
        pthread_setspecific(scratch_keys[use], own);
        if (!own) return NULL;
        *own = numbers;
    }
    return (REAL *)((char *)own + 64);
}

/* ---- To and from the irreps basis: out[r] = sum_g q[r, g] in[g], lines of n numbers, in whole vectors */

INLINE void mix_lines(int order, const REAL *q, const REAL *in, long in_step, REAL *out, long out_step, long n) {
    for (long p = 0; p < n; p += LANES) {
        vector v[16];
        for (int g = 0; g < order; g++) v[g] = LOAD(in + g * in_step + p);
        for (int r = 0; r < order; r++) {
            vector sum = q[r * order] * v[0];
            for (int g = 1; g < order; g++) sum += q[r * order + g] * v[g];
            STORE(out + r * out_step + p, sum);
        }
    }
}

/* Any order: reads from the first-level cache, not from registers */
static void mix_any(long order, const REAL *q, const REAL *in, long in_step, REAL *out, long out_step, long n) {
    for (long p = 0; p < n; p += LANES)
        for (long r = 0; r < order; r++) {
            vector sum = {0};
            for (long g = 0; g < order; g++) sum += q[r * order + g] * LOAD(in + g * in_step + p);
            STORE(out + r * out_step + p, sum);
        }
}

static void mix(long order, const REAL *q, const REAL *in, long in_step, REAL *out, long out_step, long n) {
    switch (order) {
    case 1: mix_lines(1, q, in, in_step, out, out_step, n); break;
    case 2: mix_lines(2, q, in, in_step, out, out_step, n); break;
    case 4: mix_lines(4, q, in, in_step, out, out_step, n); break;
    case 8: mix_lines(8, q, in, in_step, out, out_step, n); break;
    case 16: mix_lines(16, q, in, in_step, out, out_step, n); break;
    default: mix_any(order, q, in, in_step, out, out_step, n);
    }
}

/* ---- Matrix products */

/* c = a b, or c += a b: a[i, k] = a[i * row_a + k * step_a], m x depth; b depth x nv vectors */
INLINE void tile(int m, int nv, long depth, const REAL *a, long row_a, long step_a, const REAL *b, long ldb, REAL *c,
                 long ldc, int add) {
    vector sum[MR][2]; /* registers, once the loops over i and j are unrolled */
    UNROLL for (int i = 0; i < m; i++)
        UNROLL for (int j = 0; j < nv; j++) sum[i][j] = add ? LOAD(c + i * ldc + j * LANES) : (vector){0};
    for (long k = 0; k < depth; k++)
        UNROLL for (int i = 0; i < m; i++)
            UNROLL for (int j = 0; j < nv; j++) sum[i][j] += a[i * row_a + k * step_a] * LOAD(b + k * ldb + j * LANES);
    UNROLL for (int i = 0; i < m; i++)
        UNROLL for (int j = 0; j < nv; j++) STORE(c + i * ldc + j * LANES, sum[i][j]);
}

#define TILE(m) \
    case m: \
        if (nv == 2) tile(m, 2, depth, a, row_a, step_a, b, ldb, c, ldc, add); \
        else tile(m, 1, depth, a, row_a, step_a, b, ldb, c, ldc, add); \
        break;
INLINE void any_tile(long m, long nv, long depth, const REAL *a, long row_a, long step_a, const REAL *b, long ldb,
                     REAL *c, long ldc, int add) {
    switch (m) {
        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if MR >= 8
        TILE(7) TILE(8)
#endif
#if MR >= 14
        TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#endif
    }
}

/* c [m, columns] = a b, a packed, lines of b and c `line` apart */
static void multiply(long m, long depth, long columns, const REAL *packed, const REAL *b, REAL *c, long line) {
    for (long k = 0; k < depth; k += DEPTH)
        for (long p = 0; p < columns; p += 2 * LANES)
            for (long i = 0; i < m; i += MR)
                any_tile(least(MR, m - i), columns - p > LANES ? 2 : 1, least(DEPTH, depth - k),
                         packed + i * depth + k * MR, 1, MR, b + k * line + p, line, c + i * line + p, line, k > 0);
}

/* c [m, columns] += a b^T, a [m, pixels], b^T [pixels, columns] in whole vectors */
static void multiply_transposed(long m, long pixels, long columns, const REAL *a, long line, const REAL *b, REAL *c) {
    long width = round_up(columns, LANES);
    for (long p = 0; p < columns; p += 2 * LANES)
        for (long i = 0; i < m; i += MR)
            any_tile(least(MR, m - i), columns - p > LANES ? 2 : 1, pixels, a + i * line, line, 1, b + p, width,
                     c + i * width + p, width, 1);
}

/* b [m, pixels] -> [pixels, m in whole vectors] */
static void transpose(long m, long pixels, const REAL *b, long line, REAL *out) {
    long width = round_up(m, LANES);
    for (long i = 0; i < width; i += LANES)
        for (long p = 0; p < pixels; p++)
            for (long n = 0; n < LANES; n++) out[p * width + i + n] = i + n < m ? b[(i + n) * line + p] : 0;
}

/* ---- Sums of neighbours: E = e_a(y) e_b(x) * f^, n sums e along each axis of the k values around a pixel

       k = 3             n = 3    e = 0 1 0, 1 0 1, -1 0 1
       k = 5             n = 5    e = 0 0 1 0 0, 0 1 0 1 0, 0 -1 0 1 0, 1 0 0 0 1, -1 0 0 0 1
       k = 5, low_pass   n = 3    e = those of k = 3, convolved with 1 2 1: 0 1 2 1 0, 1 2 2 2 1, -1 -2 0 2 1

   The values are ordered by their offset from the middle: 0, 1, -1, 2, -2. */

enum { MAX_K = 5 };
INLINE int sums_of(int k, int low) { return low ? 3 : k; }

INLINE void neighbours(int k, int low, const vector *v, vector *e) {
    vector sum = v[1] + v[2], difference = v[1] - v[2];
    e[0] = v[0], e[1] = sum, e[2] = difference;
    if (k < 5) return;
    vector far_sum = v[3] + v[4], far_difference = v[3] - v[4];
    if (low) e[0] += v[0] + sum, e[1] += sum + v[0] + v[0] + far_sum, e[2] += difference + far_difference;
    else e[3] = far_sum, e[4] = far_difference;
}

/* v = e^T E */
INLINE void neighbours_transposed(int k, int low, const vector *e, vector *v) {
    if (low) {
        vector near = e[0] + e[1] + e[1], odd = e[2] + e[2];
        v[0] = e[0] + e[0] + e[1] + e[1], v[1] = near + odd, v[2] = near - odd, v[3] = e[1] + e[2], v[4] = e[1] - e[2];
        return;
    }
    v[0] = e[0], v[1] = e[1] + e[2], v[2] = e[1] - e[2];
    if (k == 5) v[3] = e[3] + e[4], v[4] = e[3] - e[4];
}

/* ---- Between images and T, field by field, with the lines of `work`

       regular   element | margin, pixels of one phase, margin                  one row of the image
       irreps    phase | row of Q | margin, pixels, margin                      f^ of that row
       h         row of the image | b | row of Q | pixel                        e_b(x) * f^, of all rows needed
       e         a | b | row of Q | pixel                                       E of one output row */

typedef struct { /* how the neighbours t = 0, 1, -1, 2, -2 of output pixels lie in a line of the image */
    long phases, phase[MAX_K], tap[MAX_K], shift[MAX_K], margin, length;
} Taps;

/* Offset of neighbour number n from the middle, in rows or columns */
static long offset(const Layer *l, long n) { return (n % 2 ? (n + 1) / 2 : -n / 2) * l->dilation; }

/* s x + t d = s (x + shift) + phase; each phase has a line of its own, with `margin` zeros on both sides */
static Taps find_taps(const Layer *l) {
    Taps t = {0};
    for (long n = 0; n < l->kernel_size; n++) {
        long away = offset(l, n), shift = floor_divide(away, l->stride), phase = away - shift * l->stride, found = 0;
        while (found < t.phases && t.phase[found] != phase) found++;
        if (found == t.phases) t.phase[t.phases++] = phase;
        t.tap[n] = found;
        t.shift[n] = shift;
        if (labs(shift) > t.margin) t.margin = labs(shift);
    }
    t.length = round_up(2 * t.margin + round_up(l->out_width, LANES), LANES);
    return t;
}

/* Copies a line of one channel from the image to the line of a phase, after its margin, or adds it back */
INLINE void split(const Layer *l, long phase, const REAL *image, REAL *line) {
    if (l->stride == 1) memcpy(line, image, l->in_width * sizeof(REAL));
    else for (long x = phase; x < l->in_width; x += l->stride) *line++ = image[x];
}
INLINE void join(const Layer *l, long phase, const REAL *line, REAL *image) {
    if (l->kernel_size == 1 && l->stride == 1) memcpy(image, line, l->in_width * sizeof(REAL)); /* nothing else adds to it */
    else for (long x = phase; x < l->in_width; x += l->stride) image[x] += *line++;
}

/* out[r] = sum_c values[r, c] in[c] for nv vectors; lines of in are n apart */
INLINE void combine_vectors(int nv, const Sparse *m, long rows, const REAL *in, long n, REAL *out, long out_step) {
    for (long r = 0; r < rows; r++) {
        vector sum[4];
        for (int j = 0; j < nv; j++) sum[j] = (vector){0};
        for (long e = m->starts[r]; e < m->starts[r + 1]; e++)
            for (int j = 0; j < nv; j++) sum[j] += m->values[e] * LOAD(in + m->columns[e] * n + j * LANES);
        for (int j = 0; j < nv; j++) STORE(out + r * out_step + j * LANES, sum[j]);
    }
}

static void combine(const Sparse *m, long rows, const REAL *in, REAL *out, long out_step, long n) {
    for (long p = 0; p < n; p += 4 * LANES) switch (least(4, (n - p) / LANES)) {
        case 1: combine_vectors(1, m, rows, in + p, n, out + p, out_step); break;
        case 2: combine_vectors(2, m, rows, in + p, n, out + p, out_step); break;
        case 3: combine_vectors(3, m, rows, in + p, n, out + p, out_step); break;
        case 4: combine_vectors(4, m, rows, in + p, n, out + p, out_step); break;
        }
}

/* Offset of the first channel of a field of x */
static long field_at(const Layer *l, long image, long field) {
    return (image * l->in_fields + field) * l->order * l->in_height * l->in_width;
}

/* Rows of an image that `rows` output rows need */
static long rows_needed(const Layer *l, long rows) {
    return l->stride * (rows - 1) + (l->kernel_size - 1) * l->dilation + 1;
}

/* T of x, 1 x 1 kernels: T = f^ */
static void load_pixels(const Layer *l, const Chunk *k, const REAL *x, REAL *t, REAL *regular) {
    long order = l->order, plane = l->in_height * l->in_width, step = l->in_fields * k->line, length = find_taps(l).length;
    for (long i = 0; i < l->in_fields; i++)
        for (long b = 0; b < k->images; b++) {
            const REAL *image = x + field_at(l, k->image + b, i) + l->stride * k->row * l->in_width;
            REAL *out = t + i * k->line + b * k->rows * l->out_width;
            for (long y = 0; y < k->rows; y++, out += l->out_width) {
                for (long g = 0; g < order; g++)
                    split(l, 0, image + g * plane + y * l->stride * l->in_width, regular + g * length);
                mix(order, l->fourier, regular, length, out, step, l->out_width);
            }
        }
}

/* T [functions * order * in_fields, pixels] of x, k x k kernels */
INLINE void load_sums(int size, int low, const Layer *l, const Chunk *k, const REAL *x, REAL *t, REAL *work) {
    long order = l->order, plane = l->in_height * l->in_width, n = round_up(l->out_width, LANES), step = l->in_fields * k->line;
    Taps taps = find_taps(l);
    int sums = sums_of(size, low);
    long lines = order * taps.length, line = order * n, needed = rows_needed(l, k->rows);
    long above = size / 2 * l->dilation, first = l->stride * k->row - above;
    REAL *regular = work, *irreps = regular + lines, *h = irreps + taps.phases * lines, *e = h + sums * needed * line;
    memset(regular, 0, lines * sizeof(REAL));
    for (long i = 0; i < l->in_fields; i++)
        for (long b = 0; b < k->images; b++) {
            const REAL *image = x + field_at(l, k->image + b, i);
            REAL *out = t + i * k->line + b * k->rows * l->out_width;
            for (long r = 0; r < needed; r++) {
                long y = first + r;
                REAL *to = h + sums * r * line;
                if (y < 0 || y >= l->in_height) {
                    memset(to, 0, sums * line * sizeof(REAL));
                    continue;
                }
                for (long f = 0; f < taps.phases; f++) {
                    long count = (l->in_width - taps.phase[f] + l->stride - 1) / l->stride;
                    for (long g = 0; g < order; g++) {
                        REAL *own = regular + g * taps.length + taps.margin;
                        split(l, taps.phase[f], image + g * plane + y * l->in_width, own);
                        if (l->stride > 1) own[count] = 0; /* overwrites the end of a longer phase */
                    }
                    mix(order, l->fourier, regular, taps.length, irreps + f * lines, taps.length, taps.length);
                }
                for (long g = 0; g < order; g++)
                    for (long p = 0; p < n; p += LANES) {
                        vector v[MAX_K], sum[MAX_K];
                        for (int a = 0; a < size; a++)
                            v[a] = LOAD(irreps + taps.tap[a] * lines + g * taps.length + taps.margin + taps.shift[a] + p);
                        neighbours(size, low, v, sum);
                        for (int a = 0; a < sums; a++) STORE(to + a * line + g * n + p, sum[a]);
                    }
            }
            for (long y = 0; y < k->rows; y++, out += l->out_width) {
                const REAL *at[MAX_K]; /* the rows around this one */
                for (int a = 0; a < size; a++) at[a] = h + sums * (l->stride * y + above + offset(l, a)) * line;
                for (long p = 0; p < sums * line; p += LANES) { /* E = e_a(y) e_b(x) * f^ */
                    vector v[MAX_K], sum[MAX_K];
                    for (int a = 0; a < size; a++) v[a] = LOAD(at[a] + p);
                    neighbours(size, low, v, sum);
                    for (int a = 0; a < sums; a++) STORE(e + a * sums * line + p, sum[a]);
                }
                combine(&l->terms, l->functions * order, e, out, step, n); /* T = c E */
            }
        }
}

static void load(const Layer *l, const Chunk *k, const REAL *x, REAL *t, REAL *work) {
    if (l->kernel_size == 1) load_pixels(l, k, x, t, work);
    else if (l->kernel_size == 3) load_sums(3, 0, l, k, x, t, work);
    else if (l->low_pass) load_sums(5, 1, l, k, x, t, work);
    else load_sums(5, 0, l, k, x, t, work);
}

/* The transposes: add the gradient with respect to T to dx, which the first chunk of an image initializes to 0 */
static void unload_pixels(const Layer *l, const Chunk *k, const REAL *t, REAL *dx, REAL *regular) {
    long order = l->order, plane = l->in_height * l->in_width, step = l->in_fields * k->line, length = find_taps(l).length;
    for (long i = 0; i < l->in_fields; i++)
        for (long b = 0; b < k->images; b++) {
            REAL *image = dx + field_at(l, k->image + b, i);
            if (k->row == 0 && l->stride > 1) memset(image, 0, order * plane * sizeof(REAL));
            const REAL *in = t + i * k->line + b * k->rows * l->out_width;
            for (long y = 0; y < k->rows; y++, in += l->out_width) {
                mix(order, l->fourier_transposed, in, step, regular, length, l->out_width);
                for (long g = 0; g < order; g++)
                    join(l, 0, regular + g * length, image + g * plane + l->stride * (k->row + y) * l->in_width);
            }
        }
}

INLINE void unload_sums(int size, int low, const Layer *l, const Chunk *k, const REAL *t, REAL *dx, REAL *work) {
    long order = l->order, plane = l->in_height * l->in_width, n = round_up(l->out_width, LANES), step = l->in_fields * k->line;
    Taps taps = find_taps(l);
    int sums = sums_of(size, low);
    long lines = order * taps.length, line = order * n, needed = rows_needed(l, k->rows);
    long above = size / 2 * l->dilation, first = l->stride * k->row - above;
    REAL *regular = work, *irreps = regular + lines, *h = irreps + taps.phases * lines, *e = h + sums * needed * line;
    REAL *own = e + sums * sums * line; /* the gradient of T of one output row: [functions * order, n] */
    for (long i = 0; i < l->in_fields; i++)
        for (long b = 0; b < k->images; b++) {
            REAL *image = dx + field_at(l, k->image + b, i);
            if (k->row == 0) memset(image, 0, order * plane * sizeof(REAL));
            const REAL *in = t + i * k->line + b * k->rows * l->out_width;
            memset(h, 0, sums * needed * line * sizeof(REAL));
            for (long y = 0; y < k->rows; y++, in += l->out_width) {
                for (long r = 0; r < l->functions * order; r++) { /* what follows belongs to another line */
                    memcpy(own + r * n, in + r * step, l->out_width * sizeof(REAL));
                    memset(own + r * n + l->out_width, 0, (n - l->out_width) * sizeof(REAL));
                }
                combine(&l->terms_transposed, sums * sums * order, own, e, n, n); /* dE = c^T dT */
                REAL *at[MAX_K];
                for (int a = 0; a < size; a++) at[a] = h + sums * (l->stride * y + above + offset(l, a)) * line;
                for (long p = 0; p < sums * line; p += LANES) {
                    vector v[MAX_K], sum[MAX_K];
                    for (int a = 0; a < sums; a++) sum[a] = LOAD(e + a * sums * line + p);
                    neighbours_transposed(size, low, sum, v);
                    for (int a = 0; a < size; a++) STORE(at[a] + p, LOAD(at[a] + p) + v[a]);
                }
            }
            for (long r = 0; r < needed; r++) {
                long y = first + r;
                const REAL *from = h + sums * r * line;
                if (y < 0 || y >= l->in_height) continue;
                memset(irreps, 0, taps.phases * lines * sizeof(REAL));
                for (long g = 0; g < order; g++)
                    for (long p = 0; p < n; p += LANES) {
                        vector v[MAX_K], sum[MAX_K];
                        for (int a = 0; a < sums; a++) sum[a] = LOAD(from + a * line + g * n + p);
                        neighbours_transposed(size, low, sum, v);
                        for (int a = 0; a < size; a++) {
                            REAL *to = irreps + taps.tap[a] * lines + g * taps.length + taps.margin + taps.shift[a] + p;
                            STORE(to, LOAD(to) + v[a]);
                        }
                    }
                for (long f = 0; f < taps.phases; f++) {
                    mix(order, l->fourier_transposed, irreps + f * lines, taps.length, regular, taps.length, taps.length);
                    for (long g = 0; g < order; g++)
                        join(l, taps.phase[f], regular + g * taps.length + taps.margin, image + g * plane + y * l->in_width);
                }
            }
        }
}

static void unload(const Layer *l, const Chunk *k, const REAL *t, REAL *dx, REAL *work) {
    if (l->kernel_size == 1) unload_pixels(l, k, t, dx, work);
    else if (l->kernel_size == 3) unload_sums(3, 0, l, k, t, dx, work);
    else if (l->low_pass) unload_sums(5, 1, l, k, t, dx, work);
    else unload_sums(5, 0, l, k, t, dx, work);
}

/* ---- Between images and y^ */

/* y = x + bias + shortcut, then ReLU if `relu`; n numbers; x can be read in whole vectors; shortcut may be NULL */
INLINE void finish(const REAL *x, REAL bias, const REAL *shortcut, int relu, REAL *y, long n) {
    for (long p = 0; p < n; p += LANES) {
        long count = least(LANES, n - p);
        vector v = LOAD(x + p) + bias, other = {0};
        if (shortcut && count == LANES) v += LOAD(shortcut + p);
        else if (shortcut) memcpy(&other, shortcut + p, count * sizeof(REAL)), v += other;
        if (relu) v = positive(v);
        if (count < LANES) memcpy(y + p, &v, count * sizeof(REAL));
        else STORE(y + p, v);
    }
}

/* y = Q^T y^ + bias + shortcut, then ReLU if `relu`; bias [out_fields] and shortcut (shaped as y) may be NULL */
static void store(const Layer *l, const Chunk *k, const REAL *irreps, const REAL *bias, const REAL *shortcut, long relu, REAL *y,
                  REAL *work) {
    long order = l->order, plane = l->out_height * l->out_width, own = k->rows * l->out_width;
    for (long o = 0; o < l->out_fields; o++) {
        mix(order, l->fourier_transposed, irreps + o * k->line, l->out_fields * k->line, work, k->line, k->pixels);
        for (long g = 0; g < order; g++)
            for (long b = 0; b < k->images; b++) {
                long place = (((k->image + b) * l->out_fields + o) * order + g) * plane + k->row * l->out_width;
                const REAL *line = work + g * k->line + b * own;
                REAL added = bias ? bias[o] : 0;
                if (shortcut) finish(line, added, shortcut + place, relu, y + place, own);
                else finish(line, added, NULL, relu, y + place, own);
            }
    }
}

/* dy^ = Q dy */
static void load_gradient(const Layer *l, const Chunk *k, const REAL *dy, REAL *irreps, REAL *work) {
    long order = l->order, plane = l->out_height * l->out_width, own = k->rows * l->out_width;
    for (long o = 0; o < l->out_fields; o++) {
        for (long g = 0; g < order; g++)
            for (long b = 0; b < k->images; b++)
                memcpy(work + g * k->line + b * own,
                       dy + (((k->image + b) * l->out_fields + o) * order + g) * plane + k->row * l->out_width,
                       own * sizeof(REAL));
        mix(order, l->fourier, work, k->line, irreps + o * k->line, l->out_fields * k->line, k->pixels);
    }
}

/* ---- Weights: [entries, out_fields, in_fields], for each block [size (row), functions, size (column), ...].
   As the matrix of a block they have the rows (row, o) and the columns (function, column, i); the offset of a number is
   the sum of the offsets of its row and its column. */

typedef struct {
    long rows, columns, *row, *column; /* row, column: offsets */
} Block;

/* The block at w; advances w to the next block */
static Block find_block(const Layer *l, long b, const REAL **w, long *offsets) {
    long size = l->sizes[b], field = l->out_fields * l->in_fields, q = l->functions * size;
    Block found = {size * l->out_fields, q * l->in_fields, offsets, offsets + size * l->out_fields};
    for (long r = 0; r < size; r++)
        for (long o = 0; o < l->out_fields; o++) found.row[r * l->out_fields + o] = r * q * field + o * l->in_fields;
    for (long n = 0; n < q; n++)
        for (long i = 0; i < l->in_fields; i++) found.column[n * l->in_fields + i] = n * field + i;
    *w += size * q * field;
    return found;
}
static long offsets_size(const Layer *l) { return 2 * l->out_fields + 2 * l->functions * l->in_fields; }

/* ---- The work, distributed over the threads of PyTorch */

/* Of the OpenMP library that PyTorch has loaded: the threads of a second one would compete with its threads. */
extern void GOMP_parallel(void (*work)(void *), void *job, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void), omp_get_num_threads(void);

typedef struct {
    const Layer *layer;
    const REAL *x, *packed, *bias, *shortcut, *dy, *weights;
    REAL *y, *dx, *dw, *out;
    long relu, transposed, next, failed, dw_size, parts;
} Job;

static Chunk chunk(const Layer *l, long index) {
    long down = (l->out_height + l->rows - 1) / l->rows; /* chunks of an image, from top to bottom */
    Chunk k = {.image = index / down * l->images, .row = index % down * l->rows};
    k.images = least(l->images, l->batch - k.image);
    k.rows = least(l->rows, l->out_height - k.row);
    k.pixels = k.images * k.rows * l->out_width;
    k.line = line_length(l->images * l->rows * l->out_width);
    return k;
}

/* Numbers in the work memory of `load` and `unload`, or of `store` and `load_gradient` */
static long work_size(const Layer *l) {
    Taps taps = find_taps(l);
    long n = round_up(l->out_width, LANES), sums = sums_of(l->kernel_size, l->low_pass);
    long around = (sums * rows_needed(l, l->rows) + sums * sums + l->functions) * l->order * n;
    long image = around + (taps.phases + 1) * l->order * taps.length;
    long lines = l->order * line_length(l->images * l->rows * l->out_width);
    return round_up(image > lines ? image : lines, LANES) + 2 * LANES;
}

/* Packs W, or W^T, of each block in the order in which `multiply` reads it: [rows / MR, columns, MR] */
static void pack_part(void *argument) {
    Job *job = argument;
    const Layer *l = job->layer;
    const REAL *w = job->weights;
    REAL *packed = job->out;
    long *offsets = malloc(offsets_size(l) * sizeof(long)), thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (!offsets) {
        job->failed = 1;
        return;
    }
    for (long b = 0; b < l->n_blocks; b++) {
        const REAL *own = w;
        Block m = find_block(l, b, &w, offsets);
        if (job->transposed) m = (Block){m.columns, m.rows, m.column, m.row};
        for (long i = thread * MR; i < m.rows; i += threads * MR) {
            REAL *to = packed + i * m.columns;
            for (long k = 0; k < m.columns; k++)
                for (long n = 0; n < MR; n++) *to++ = i + n < m.rows ? own[m.row[i + n] + m.column[k]] : 0;
        }
        packed += round_up(m.rows, MR) * m.columns;
    }
    free(offsets);
}

/* As `pack_part`, W from the coefficients [out_fields, in_fields, n_basis]: COLUMNS input fields at a time */
enum { COLUMNS = 64 };
static void pack_coefficients_part(void *argument) {
    Job *job = argument;
    const Layer *l = job->layer;
    long thread = omp_get_thread_num(), threads = omp_get_num_threads(), n_in = l->in_fields;
    REAL *w = scratch(WORK, (l->n_basis + l->n_entries) * COLUMNS), *entries = w + l->n_basis * COLUMNS;
    if (!w) {
        job->failed = 1;
        return;
    }
    for (long first = thread * COLUMNS; first < n_in; first += threads * COLUMNS)
        for (long o = 0; o < l->out_fields; o++) {
            long count = least(COLUMNS, n_in - first);
            for (long i = 0; i < count; i++)
                for (long b = 0; b < l->n_basis; b++)
                    w[b * COLUMNS + i] = job->weights[(o * n_in + first + i) * l->n_basis + b];
            combine(&l->entries, l->n_entries, w, entries, COLUMNS, COLUMNS);
            const REAL *entry = entries;
            REAL *packed = job->out;
            for (long b = 0; b < l->n_blocks; b++) {
                long size = l->sizes[b], q = l->functions * size, m = size * l->out_fields;
                for (long r = 0; r < size; r++) {
                    long row = r * l->out_fields + o;
                    REAL *to = packed + row / MR * MR * q * n_in + row % MR + first * MR;
                    for (long k = 0; k < q; k++, entry += COLUMNS, to += n_in * MR)
                        for (long i = 0; i < count; i++) to[i * MR] = entry[i];
                }
                for (long row = m; o == 0 && row < round_up(m, MR); row++) /* rows that only fill up the last tile */
                    for (long k = 0; k < q; k++)
                        for (long i = 0; i < count; i++)
                            packed[row / MR * MR * q * n_in + row % MR + (k * n_in + first + i) * MR] = 0;
                packed += round_up(m, MR) * q * n_in;
            }
        }
}

static void forward_part(void *argument) {
    Job *job = argument;
    const Layer *l = job->layer;
    long line = line_length(l->images * l->rows * l->out_width), terms = l->functions * l->order;
    REAL *t = scratch(WORK, (terms * l->in_fields + l->order * l->out_fields + 2) * line + work_size(l));
    if (!t) {
        job->failed = 1;
        return;
    }
    REAL *irreps = t + (terms * l->in_fields + 1) * line, *work = irreps + (l->order * l->out_fields + 1) * line;
    long chunks = (l->batch + l->images - 1) / l->images * ((l->out_height + l->rows - 1) / l->rows);
    for (long index; (index = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < chunks;) {
        Chunk k = chunk(l, index);
        load(l, &k, job->x, t, work);
        const REAL *in = t, *packed = job->packed;
        REAL *out = irreps;
        for (long b = 0; b < l->n_blocks; b++) {
            long m = l->sizes[b] * l->out_fields, depth = l->functions * l->sizes[b] * l->in_fields;
            for (long c = 0; c < l->copies[b]; c++, in += depth * line, out += m * line)
                multiply(m, depth, k.pixels, packed, in, out, line); /* y^ = W T */
            packed += round_up(m, MR) * depth;
        }
        store(l, &k, irreps, job->bias, job->shortcut, job->relu, job->y, work);
    }
}

/* dw: for each thread the sums [columns, rows in whole vectors] of each block */
static void backward_part(void *argument) {
    Job *job = argument;
    const Layer *l = job->layer;
    long line = line_length(l->images * l->rows * l->out_width), terms = l->functions * l->order;
    long widest = round_up(2 * l->out_fields, LANES);
    REAL *t = scratch(WORK, (terms * l->in_fields + l->order * l->out_fields + 2 + widest) * line + work_size(l));
    if (!t) {
        job->failed = 1;
        return;
    }
    REAL *irreps = t + (terms * l->in_fields + 1) * line, *turned = irreps + (l->order * l->out_fields + 1) * line;
    REAL *work = turned + widest * line, *sums = job->dw ? job->dw + omp_get_thread_num() * job->dw_size : NULL;
    if (sums) memset(sums, 0, job->dw_size * sizeof(REAL));
    long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (thread == 0) job->parts = threads;
    /* Each thread has whole images, since their chunks add to dx, and always the same, so that sums are reproducible. */
    long down = (l->out_height + l->rows - 1) / l->rows, groups = (l->batch + l->images - 1) / l->images;
    for (long index = groups * thread / threads * down; index < groups * (thread + 1) / threads * down; index++) {
        Chunk k = chunk(l, index);
        load_gradient(l, &k, job->dy, irreps, work);
        if (sums) load(l, &k, job->x, t, work);
        const REAL *packed = job->packed;
        REAL *in = t, *out = irreps, *dw = sums;
        for (long b = 0; b < l->n_blocks; b++) {
            long m = l->sizes[b] * l->out_fields, depth = l->functions * l->sizes[b] * l->in_fields;
            for (long c = 0; c < l->copies[b]; c++, in += depth * line, out += m * line) {
                if (sums) {
                    transpose(m, k.pixels, out, line, turned);
                    multiply_transposed(depth, k.pixels, m, in, line, turned, dw); /* dW^T = T dy^^T */
                }
                if (job->dx) multiply(depth, m, k.pixels, packed, out, in, line); /* dT = W^T dy^, in place of T */
            }
            if (sums) dw += depth * round_up(m, LANES);
            if (job->dx) packed += round_up(depth, MR) * m;
        }
        if (job->dx) unload(l, &k, t, job->dx, work);
    }
}

/* The gradient with respect to the weights: the sum over threads, in the order of the weights */
static void gather_part(void *argument) {
    Job *job = argument;
    const Layer *l = job->layer;
    const REAL *w = job->out, *dw = job->dw;
    long *offsets = malloc(offsets_size(l) * sizeof(long)), thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (!offsets) {
        job->failed = 1;
        return;
    }
    for (long b = 0; b < l->n_blocks; b++) {
        REAL *own = job->out + (w - job->out);
        Block m = find_block(l, b, &w, offsets);
        long width = round_up(m.rows, LANES), edge = 16;
        for (long k = thread * edge; k < m.columns; k += threads * edge) /* squares of 16 x 16 stay in the cache */
            for (long i = 0; i < m.rows; i += edge)
                for (long r = i; r < least(i + edge, m.rows); r++)
                    for (long c = k; c < least(k + edge, m.columns); c++) {
                        REAL sum = 0;
                        for (long part = 0; part < job->parts; part++) sum += dw[part * job->dw_size + c * width + r];
                        own[m.row[r] + m.column[c]] = sum;
                    }
        dw += m.columns * width;
    }
    free(offsets);
}

/* ---- Functions for Python. Status: 0; 1 if memory cannot be allocated; 2 for a kernel size that is not supported */

static int knows(const Layer *l) { return l->kernel_size == 1 || l->kernel_size == 3 || l->kernel_size == 5; }

/* For `native_library.py`: bytes of a layer, and the hash that this file had when it was compiled */
const char *source_hash(void) { return SOURCE_HASH; }

/* MR, the number of rows of a tile of packed weights */
long tile_rows(void) { return MR; }

/* Numbers in `packed`, and in the sums of each thread */
long packed_size(const Layer *l, long transposed) {
    long size = 0;
    for (long b = 0; b < l->n_blocks; b++) {
        long m = l->sizes[b] * l->out_fields, depth = l->functions * l->sizes[b] * l->in_fields;
        size += transposed ? round_up(depth, MR) * m : round_up(m, MR) * depth;
    }
    return size;
}
long sums_size(const Layer *l) {
    long size = 0;
    for (long b = 0; b < l->n_blocks; b++)
        size += l->functions * l->sizes[b] * l->in_fields * round_up(l->sizes[b] * l->out_fields, LANES);
    return size;
}

int pack_coefficients(const Layer *l, const REAL *weights, REAL *packed, long threads) {
    Job job = {.layer = l, .weights = weights, .out = packed};
    GOMP_parallel(pack_coefficients_part, &job, threads, 0);
    return job.failed;
}

int forward(const Layer *l, const REAL *x, const REAL *packed, const REAL *bias, const REAL *shortcut, long relu, REAL *y,
            long threads) {
    if (!knows(l)) return 2;
    Job job = {.layer = l, .x = x, .packed = packed, .bias = bias, .shortcut = shortcut, .relu = relu, .y = y};
    GOMP_parallel(forward_part, &job, threads, 0);
    return job.failed;
}

/* `forward` with the coefficients, packed on the way */
int convolve(const Layer *l, const REAL *x, const REAL *weights, REAL *y, long threads) {
    REAL *packed = scratch(PACKED, packed_size(l, 0));
    if (!packed || pack_coefficients(l, weights, packed, threads)) return 1;
    return forward(l, x, packed, NULL, NULL, 0, y, threads);
}

/* Computes dx (from the block weights W) or dw (with the sums of each thread), or both; the other pointers are NULL */
int backward(const Layer *l, const REAL *dy, const REAL *x, const REAL *weights, REAL *dx, REAL *sums, REAL *dw,
             long threads) {
    if (!knows(l)) return 2;
    REAL *packed = dx ? scratch(PACKED, packed_size(l, 1)) : NULL;
    Job pack = {.layer = l, .weights = weights, .transposed = 1, .out = packed};
    if (dx && packed) GOMP_parallel(pack_part, &pack, threads, 0);
    if (dx && (!packed || pack.failed)) return 1;
    Job job = {.layer = l, .dy = dy, .x = x, .packed = packed, .dx = dx, .dw = sums, .dw_size = sums_size(l)};
    job.out = dw;
    GOMP_parallel(backward_part, &job, threads, 0);
    if (dw) GOMP_parallel(gather_part, &job, threads, 0);
    return job.failed;
}
