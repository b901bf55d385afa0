// Crop, orient, antialiased resize, mirror, normalise: ragged uint8 images -> one batch, in one launch.
//
// In   rows   Row[count]            one per image, see below; 64-bit addresses and offsets throughout
//      pixels u8[height, width, channels] interleaved, `pitch` bytes from row to row, channels 1 or 3
// Out  out    T[count, channels, out_h, out_w] at strides (sn, sc, sy, sx) in elements: NCHW or channels-last;
//             T is f32, f16, bf16 (round to nearest even) or u8 (nearest, halves up, clamped to 0..255)
// out = value * scale[c] + shift[c]; value is in 0..255, unrounded between the two passes. Gray becomes three equal
// channels; RGB becomes one by ITU-R 601-2 luma. A row of height 0 becomes zeros (not shift).
//
// Filter: Pillow's BILINEAR resize(box=): a triangle of half-width max(1, step) source pixels around each output's
// centre, cut at the image's edge, divided by its sum. Centres are computed in double: in float they would be off by
// 5e-4 pixels at pixel 8000, an eighth of a grey level at an edge. Offsets inside one window are float.
// Torch twin: gpuload.images.resize.resize_twin.
//
// Orientation costs nothing to read: the filter is separable and symmetric, so the image is resized as it is stored,
// rows along memory, and only the place of each output is turned or mirrored. Orientations 5 to 8 therefore write
// columns (scattered, but into a small output) where reading columns would scatter over the large input.
//
// One block makes a tile of at most TILE outputs of one stored row `v`. It walks the tile's source columns in chunks of
// at most CHUNK pixels: first the vertical pass, one thread a column, neighbouring threads on neighbouring bytes, into
// shared memory; then the horizontal pass adds the chunk to the outputs it touches. Shared memory is 15 KiB whatever
// the size of the image, so occupancy does not depend on the data: 60,000 pixels wide is slower, never impossible.
//
// The same source runs on the CPU through cpu_shim.h: every loop inside a block is block-stride, threads meet only in
// shared memory between __syncthreads(), so a block of one thread is a correct block.

#ifndef GPULOAD_CPU
#define SHARED __shared__
__device__ inline unsigned short half_bits(float x) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
__device__ inline unsigned int float_bits(float x) { return __float_as_uint(x); }
#endif

typedef long long i64;
constexpr int TILE = 128, CHUNK = 1024;

struct Row {  // 72 bytes; mirrored by gpuload.kernels.ROW
  unsigned long long pixels;
  i64 pitch;
  double x, y, w, h;  // region in pixels of the oriented image
  int height, width, channels, orientation, flip, reserved;
};

static_assert(sizeof(Row) == 72, "Row and gpuload.kernels.ROW differ");

struct Frame {  // the resize as the pixels are stored: `rows` along v (memory rows), `cols` along u
  double u, v, du, dv;  // start of the region, source pixels per output
  int rows, cols;
  bool turned, mirror_u, mirror_v;  // turned: u runs along the output's y
};

struct Window {  // source pixels [lo, hi) of one output; pixel lo + k has weight triangle((k - center) * inv)
  int lo, hi;
  float center, inv;
};

__device__ inline Frame stored_frame(const Row& r, int out_h, int out_w) {
  const int o = r.orientation;
  Frame f;
  f.turned = o >= 5;
  f.mirror_u = o == 2 || o == 3 || o == 7 || o == 8;
  f.mirror_v = o == 3 || o == 4 || o == 6 || o == 7;
  f.rows = f.turned ? out_w : out_h;
  f.cols = f.turned ? out_h : out_w;
  const double u = f.turned ? r.y : r.x, lu = f.turned ? r.h : r.w;
  const double v = f.turned ? r.x : r.y, lv = f.turned ? r.w : r.h;
  f.u = f.mirror_u ? r.width - u - lu : u;
  f.v = f.mirror_v ? r.height - v - lv : v;
  f.du = lu / f.cols;
  f.dv = lv / f.rows;
  if (r.flip) (f.turned ? f.mirror_v : f.mirror_u) ^= true;
  return f;
}

// Never empty and always inside [0, size), whatever the region: a wrong one gives wrong pixels, not a wrong address.
__device__ inline Window window(double start, double step, int output, int size) {
  const double support = step > 1 ? step : 1, center = start + (output + 0.5) * step;
  const double lo = center - support + 0.5, hi = center + support + 0.5;
  Window w;
  w.lo = lo < 0 ? 0 : lo < size ? (int)lo : size - 1;
  w.hi = hi < w.lo + 1 ? w.lo + 1 : hi < size ? (int)hi : size;
  w.center = (float)(center - 0.5 - w.lo);
  w.inv = 1 / (float)support;
  return w;
}

__device__ inline float triangle(float x) {
  x = 1 - (x < 0 ? -x : x);
  return x > 0 ? x : 0;
}

__device__ inline float luma(float r, float g, float b) {  // Pillow's convert("L"), unrounded
  return (r * 19595 + g * 38470 + b * 7471) * (1.0f / 65536);
}

struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };
__device__ inline void store(float* p, float v) { *p = v; }
__device__ inline void store(Half* p, float v) { p->bits = half_bits(v); }
__device__ inline void store(Bfloat* p, float v) {
  const unsigned int b = float_bits(v);
  p->bits = (unsigned short)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
__device__ inline void store(unsigned char* p, float v) { *p = v < 0 ? 0 : v > 255 ? 255 : (unsigned char)(v + 0.5f); }

struct Tile {  // what one block makes of one image: outputs [first, last) of stored row v; none where first >= last
  Row row;
  Frame frame;
  Window rows;     // of v
  int begin, end;  // source columns that are read; none where there is no image
  int v, first, last;
};

// By one thread for its block: double arithmetic is slow on the GPUs that are not made for it.
__device__ inline Tile plan(const Row& row, int out_h, int out_w, unsigned int block) {
  Tile t;
  t.row = row;
  const Frame f = t.frame = stored_frame(row, out_h, out_w);
  const int tiles = (f.cols + TILE - 1) / TILE, width = (f.cols + tiles - 1) / tiles;
  t.v = (int)(block / tiles);
  t.first = (int)(block % tiles) * width;
  t.last = t.v >= f.rows ? t.first : t.first + width < f.cols ? t.first + width : f.cols;
  t.begin = t.end = 0;
  if (row.height > 0) {
    t.rows = window(f.v, f.dv, t.v, row.height);
    t.begin = window(f.u, f.du, t.first, row.width).lo;
    t.end = window(f.u, f.du, t.last - 1, row.width).hi;
  }
  return t;
}

// One column of the vertical pass: channel c (or the luma) of stored column x, over the window w of stored rows.
__device__ inline float column(const Row& r, const Window& w, int x, int c, bool to_luma) {
  const unsigned char* p = (const unsigned char*)r.pixels + w.lo * r.pitch + (i64)x * r.channels + c;
  float sum = 0, total = 0;
#pragma unroll 4
  for (int k = 0; k < w.hi - w.lo; ++k, p += r.pitch) {
    const float weight = triangle((k - w.center) * w.inv);
    total += weight;
    sum += weight * (to_luma ? luma(p[0], p[1], p[2]) : p[0]);
  }
  return total > 0 ? sum / total : 0;
}

template <typename T>
__device__ inline void resize(const Row* rows, T* out, i64 count, int out_h, int out_w, int channels, i64 sn, i64 sc,
                              i64 sy, i64 sx, float scale0, float scale1, float scale2, float shift0, float shift1,
                              float shift2) {
  SHARED float line[3 * CHUNK];                   // vertical pass: [pixels of the chunk, planes]
  SHARED float sums[3 * TILE], totals[3 * TILE];  // horizontal pass: [outputs of the tile, planes]
  SHARED Tile tile;
  for (i64 n = blockIdx.y; n < count; n += gridDim.y) {
    __syncthreads();  // the previous image has been written
    if (threadIdx.x == 0) tile = plan(rows[n], out_h, out_w, blockIdx.x);
    __syncthreads();
    const Row r = tile.row;
    const Frame f = tile.frame;
    const int v = tile.v, first = tile.first, last = tile.last;
    if (first >= last) continue;  // the whole block
    const int planes = r.channels == 3 && channels == 3 ? 3 : 1, outputs = (last - first) * planes;
    for (int k = threadIdx.x; k < outputs; k += blockDim.x) sums[k] = totals[k] = 0;
    for (int chunk = tile.begin; chunk < tile.end; chunk += CHUNK) {
      const int stop = chunk + CHUNK < tile.end ? chunk + CHUNK : tile.end;
      __syncthreads();  // the previous chunk has been read
      for (int i = threadIdx.x; i < (stop - chunk) * planes; i += blockDim.x)
        line[i] = column(r, tile.rows, chunk + i / planes, i % planes, planes < r.channels);
      __syncthreads();
      for (int k = threadIdx.x; k < outputs; k += blockDim.x) {
        const Window w = window(f.u, f.du, first + k / planes, r.width);
        const int from = w.lo > chunk ? w.lo : chunk, to = w.hi < stop ? w.hi : stop;
        float sum = sums[k], total = totals[k];
        for (int x = from; x < to; ++x) {
          const float weight = triangle((x - w.lo - w.center) * w.inv);
          total += weight;
          sum += weight * line[(x - chunk) * planes + k % planes];
        }
        sums[k] = sum;
        totals[k] = total;
      }
    }
    __syncthreads();
    for (int k = threadIdx.x; k < (last - first) * channels; k += blockDim.x) {
      const int c = k % channels, at = k / channels * planes + (planes == 1 ? 0 : c), u = first + k / channels;
      const int pu = f.mirror_u ? f.cols - 1 - u : u, pv = f.mirror_v ? f.rows - 1 - v : v;
      const float scale = c == 0 ? scale0 : c == 1 ? scale1 : scale2, shift = c == 0 ? shift0 : c == 1 ? shift1 : shift2;
      T* p = out + n * sn + c * sc + (f.turned ? pu * sy + pv * sx : pv * sy + pu * sx);
      store(p, totals[at] > 0 ? sums[at] / totals[at] * scale + shift : 0);
    }
  }
}

#define ENTRY(name, T)                                                                                               \
  extern "C" __global__ void name(const Row* rows, T* out, i64 count, int out_h, int out_w, int channels, i64 sn,     \
                                  i64 sc, i64 sy, i64 sx, float scale0, float scale1, float scale2, float shift0,     \
                                  float shift1, float shift2) {                                                      \
    resize<T>(rows, out, count, out_h, out_w, channels, sn, sc, sy, sx, scale0, scale1, scale2, shift0, shift1,       \
              shift2);                                                                                               \
  }
ENTRY(resize_normalize_f32, float)
ENTRY(resize_normalize_f16, Half)
ENTRY(resize_normalize_bf16, Bfloat)
ENTRY(resize_normalize_u8, unsigned char)
