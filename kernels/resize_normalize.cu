// Crop, orient, antialiased resize, mirror, normalise: ragged uint8 images -> one batch, in one launch.
//
// In   rows   Row[count]            one per image, see below; 64-bit addresses and offsets throughout
//      pixels u8[height, width, channels] interleaved, `pitch` bytes from row to row, channels 1 or 3
// Out  out    T[count, channels, out_h, out_w] at strides (sn, sc, sy, sx) in elements: NCHW or channels-last;
//             T is f32, f16, bf16 (round to nearest even) or u8 (nearest, halves up, clamped to 0..255)
// out = value * scale[c] + shift[c]; value is in 0..255. Gray becomes three equal channels; RGB becomes one by ITU-R 601-2
// luma. A row of height 0 becomes zeros (not shift).
//
// Filters: Pillow's resize(box=), which antialiases: a kernel as wide as `radius` output steps (at least as many source
// pixels) around each output's centre, cut at the image's edge, divided by its sum.
//   BILINEAR  a triangle of radius 1. Nothing is rounded between the two passes.
//   BICUBIC   Keys' cubic with a = -0.5, of radius 2, which overshoots. Pillow rounds and clips to 0..255 between its two
//             passes, and so does this, the first pass in Pillow's own integers (weights in 1/2^22), so that halves round
//             alike. The second one is not rounded, but clipped. Which comes first, the row says (see `down_first`).
//   NEAREST   the pixel that the output's centre lies in, its place found by adding up steps, as Pillow does.
// Centres are computed in double: in float they would be off by 5e-4 pixels at pixel 8000, an eighth of a grey level at an
// edge. Offsets inside one window are float. Torch twin: gpuload.images.resize.resize_twin.
//
// Orientation costs nothing to read: the filters are separable and symmetric, so the image is resized as it is stored,
// rows along memory, and only the place of each output is turned or mirrored. Orientations 5 to 8 therefore write
// columns (scattered, but into a small output) where reading columns would scatter over the large input.
//
// One block makes BAND stored rows of the output, tile after tile. A tile is as many outputs as CHUNK source pixels reach;
// their windows are worked out once, and then threads meet three times a tile, whatever its height:
//   down    the vertical pass of all rows of the band: a thread has four neighbouring bytes of a row, read as one word,
//           into `line`. STREAM: it walks down the source rows once and turns each byte into a float once, for the two
//           output rows that it counts for. Otherwise each output row reads its own source rows, again through the cache.
//   across  the horizontal pass: a thread has one output pixel with its channels.
// Bicubic, along memory first: a thread has one output column and walks down the source rows, the horizontal pass of each
// rounded and added to the rows of the band in registers. Where a window is wider than CHUNK a thread computes a whole output by
// itself (`direct`): 60,000 pixels wide is slower, never impossible.
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
#ifndef FILTER
#define FILTER BILINEAR
#endif
#ifndef BAND  // stored rows of the output that a block makes
#define BAND 8
#endif
#ifndef CHUNK  // source pixels of a tile
#define CHUNK 256
#endif
#ifndef STREAM
#define STREAM 1
#endif

typedef long long i64;
typedef unsigned char u8;
enum Filter { BILINEAR, BICUBIC, NEAREST };
constexpr int TILE = 256;                        // outputs of a tile, at most
constexpr int LINE = 3 * CHUNK, TABLE = 2048;    // floats of a row of `line`; weights beside lines that are shorter then
constexpr int SHORT = (BAND * LINE - TABLE) / BAND;
constexpr int ONE = 1 << 22;                     // of a weight in integers

struct Row {  // 80 bytes; mirrored by gpuload.kernels.ROW
  unsigned long long pixels;
  i64 pitch;
  double x, y, w, h;  // region in pixels of what is here, oriented
  int height, width, channels, orientation, flip;
  int left, top;      // where it begins in the whole image, oriented: NEAREST adds up from there
  int down_first;     // BICUBIC: which pass is the first one, in the picture as it is seen
};

static_assert(sizeof(Row) == 80, "Row and gpuload.kernels.ROW differ");

struct Side {  // the resize along one axis of the pixels as they are stored
  double start, step;  // of the region, source pixels per output
  int count, size;     // outputs; source pixels
  bool mirror;         // output 0 is the last one along the source
  bool backwards;      // the stored axis runs against the one that is seen
  double seen;         // start along that one, where the source begins at `origin`: for NEAREST
  int origin;
};

struct Frame {  // u along memory rows, v across them
  Side u, v;
  bool turned;  // u runs along the output's y
};

struct Window {  // source pixels [lo, hi) of one output; pixel k has the weight kernel((k - lo - center) * inv) * norm
  int lo, hi;
  float center, inv, norm;
};

__device__ inline Frame stored_frame(const Row& r, int out_h, int out_w) {
  const int o = r.orientation;
  const bool mirror_u = o == 2 || o == 3 || o == 7 || o == 8, mirror_v = o == 3 || o == 4 || o == 6 || o == 7;
  Frame f;
  f.turned = o >= 5;
  const double u = f.turned ? r.y : r.x, lu = f.turned ? r.h : r.w;
  const double v = f.turned ? r.x : r.y, lv = f.turned ? r.w : r.h;
  const int across = f.turned ? out_h : out_w, down = f.turned ? out_w : out_h;
  f.u = Side{mirror_u ? r.width - u - lu : u, lu / across, across, r.width, mirror_u, mirror_u, u, f.turned ? r.top : r.left};
  f.v = Side{mirror_v ? r.height - v - lv : v, lv / down, down, r.height, mirror_v, mirror_v, v, f.turned ? r.left : r.top};
  if (r.flip) (f.turned ? f.v : f.u).mirror ^= true;
  return f;
}

template <int F>
__device__ inline double support_of(const Side& s) {
  return (F == BICUBIC ? 2 : 1) * (s.step > 1 ? s.step : 1);
}

__device__ inline double first_center(const Side& s) { return s.seen + s.origin + s.step * 0.5; }  // in the whole, as seen

// The stored pixel that lies at `at` in the whole, as it is seen.
__device__ inline int pixel_at(const Side& s, double at) {
  const double limit = (double)s.origin + s.size;
  const int found = at < limit ? (at > s.origin ? (int)at - s.origin : 0) : s.size - 1;
  return s.backwards ? s.size - 1 - found : found;
}

// Which source pixel output `output` is.
__device__ inline int nearest(const Side& s, int output) {
  double at = first_center(s);
  for (int k = s.backwards ? s.count - 1 - output : output; k > 0; --k) at += s.step;
  return pixel_at(s, at);
}

// Never empty and always inside the image, whatever the region: a wrong one gives wrong pixels, not a wrong address.
template <int F>
__device__ inline Window window(const Side& s, int output) {
  Window w;
  if (F == NEAREST) {
    w.lo = nearest(s, output), w.hi = w.lo + 1;
    w.center = 0, w.inv = w.norm = 1;
    return w;
  }
  const double support = support_of<F>(s), center = s.start + (output + 0.5) * s.step;
  const double lo = center - support + 0.5, hi = center + support + 0.5;
  w.lo = lo < 0 ? 0 : lo < s.size ? (int)lo : s.size - 1;
  w.hi = hi < w.lo + 1 ? w.lo + 1 : hi < s.size ? (int)hi : s.size;
  w.center = (float)(center - 0.5 - w.lo);
  w.inv = (F == BICUBIC ? 2 : 1) / (float)support;
  w.norm = 1;
  return w;
}

template <typename R>
__device__ inline R cubic(R x) {
  x = x < 0 ? -x : x;
  if (x < 1) return (R(1.5) * x - R(2.5)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * R(-0.5) : 0;
}

template <int F>
__device__ inline float kernel(float x) {
  if (F == NEAREST) return 1;
  if (F == BICUBIC) return cubic(x);
  x = 1 - (x < 0 ? -x : x);
  return x > 0 ? x : 0;
}

template <int F>
__device__ inline float weight(const Window& w, int pixel) {
  return kernel<F>((pixel - w.lo - w.center) * w.inv) * w.norm;
}

template <int F>
__device__ inline Window normal(Window w) {  // its weights add up to 1, or are none
  float total = 0;
  for (int k = w.lo; k < w.hi; ++k) total += weight<F>(w, k);
  w.norm = F == BICUBIC ? (total != 0 ? 1 / total : 0) : total > 0 ? 1 / total : 0;
  return w;
}

// The weights of BICUBIC in Pillow's integers, one for each pixel of the output's window.
struct Exact {
  double shift, inv, over;  // kernel((pixel + shift) * inv) * over
  __device__ int operator()(int pixel) const {
    const double w = cubic((pixel + shift) * inv) * over * ONE;
    return (int)(w < 0 ? w - 0.5 : w + 0.5);
  }
};

__device__ inline Exact exact(const Side& s, int output, const Window& w) {
  Exact e;
  e.shift = 0.5 - (s.start + (output + 0.5) * s.step);
  e.inv = 2 / support_of<BICUBIC>(s), e.over = 1;
  double total = 0;
  for (int k = w.lo; k < w.hi; ++k) total += cubic((k + e.shift) * e.inv);
  e.over = total != 0 ? 1 / total : 0;
  return e;
}

__device__ inline int level(int sum) {  // of a first pass
  const int v = (sum + ONE / 2) >> 22;
  return v < 0 ? 0 : v > 255 ? 255 : v;
}

__device__ inline float luma(float r, float g, float b) {  // Pillow's convert("L"), unrounded
  return (r * 19595 + g * 38470 + b * 7471) * (1.0f / 65536);
}

__device__ inline int luma_level(const u8* p) { return (p[0] * 19595 + p[1] * 38470 + p[2] * 7471 + 32768) >> 16; }

struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };
__device__ inline void store(float* p, float v) { *p = v; }
__device__ inline void store(Half* p, float v) { p->bits = half_bits(v); }
__device__ inline void store(Bfloat* p, float v) {
  const unsigned int b = float_bits(v);
  p->bits = (unsigned short)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
__device__ inline void store(u8* p, float v) { *p = v < 0 ? 0 : v > 255 ? 255 : (u8)(v + 0.5f); }

template <typename T>
struct Target {
  T* out;  // of the image
  i64 sc, sy, sx;
  int channels;
  float scale[3], shift[3];

  // `value` of channels or, for gray, of one.
  __device__ void put(const Frame& f, int u, int v, const float* value, bool gray) const {
    const int pu = f.u.mirror ? f.u.count - 1 - u : u, pv = f.v.mirror ? f.v.count - 1 - v : v;
    T* p = out + (f.turned ? pu * sy + pv * sx : pv * sy + pu * sx);
#pragma unroll
    for (int c = 0; c < 3; ++c)
      if (c < channels) store(p + c * sc, value[gray ? 0 : c] * scale[c] + shift[c]);
  }
};

struct Shared {
  Window down[BAND], across[TILE];
  float line[BAND * LINE];
};

// Static: on the CPU the linker would make the memory of several builds in one process one, whatever their sizes.
static __device__ inline Shared& shared() {
  SHARED Shared found;
  return found;
}

struct Tile {  // outputs [u0, u0 + across) of rows [v0, v0 + down), from source columns [begin, begin + span)
  int u0, v0, across, down, begin, span;
};

__device__ inline const u8* row_of(const Row& r, int y) { return (const u8*)r.pixels + y * r.pitch; }

// Bytes p[0] to p[count - 1], 1 to 4 of them, as the low ones of a word. Reads only words that hold one of these.
__device__ inline unsigned int four(const u8* p, int count) {
  const unsigned int beyond = (unsigned int)((unsigned long long)p & 3);
  const unsigned int* words = (const unsigned int*)(p - beyond);
  const unsigned int low = words[0];
  if (beyond == 0) return low;
  const unsigned int high = (int)beyond + count > 4 ? words[1] : 0;
  return low >> 8 * beyond | high << (32 - 8 * beyond);
}

__device__ inline void add(float* sums, float weight, unsigned int bytes) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] += weight * (float)(bytes >> 8 * i & 255);
}

// The vertical pass of one word for one row of the band.
template <int F>
__device__ inline void down_alone(const Row& r, const Window& w, i64 at, int count, float* line) {
  float sums[4] = {0, 0, 0, 0};
  const u8* p = row_of(r, w.lo) + at;
#pragma unroll 4
  for (int k = w.lo; k < w.hi; ++k, p += r.pitch) add(sums, weight<F>(w, k), four(p, count));
  for (int i = 0; i < 4; ++i) line[i] = sums[i];
}

// The same for all rows of the band, each source row read once: at steps of 1 and more it counts for at most two of them.
__device__ inline void down_stream(const Row& r, const Window* rows, int down, i64 at, int count, float* line) {
  float sums[4] = {0, 0, 0, 0};
  int y = rows[0].lo;
  const u8* p = row_of(r, y) + at;
  for (int j = 0; j < down; ++j) {
    float later[4] = {0, 0, 0, 0};
    const Window w = rows[j], next = rows[j + 1 < down ? j + 1 : j];
    const float both = j + 1 < down ? 1.0f : 0.0f;
#pragma unroll 4
    for (; y < w.hi; ++y, p += r.pitch) {
      const unsigned int bytes = four(p, count);
      add(sums, weight<BILINEAR>(w, y), bytes);
      add(later, both * weight<BILINEAR>(next, y), bytes);
    }
    for (int i = 0; i < 4; ++i) line[j * LINE + i] = sums[i], sums[i] = later[i];
  }
}

__device__ inline void down(const Row& r, const Frame& f, const Tile& t, Shared& s) {
  const int bytes = t.span * r.channels, words = (bytes + 3) / 4;
  const i64 begin = (i64)t.begin * r.channels;
  const bool inside = f.v.start > -0.5 && f.v.start + f.v.step * f.v.count < f.v.size + 0.5;
  const bool stream = STREAM && f.v.step >= 1 && inside;
  for (int k = threadIdx.x; k < (stream ? 1 : t.down) * words; k += blockDim.x) {
    const int j = k / words, at = k % words * 4, count = bytes - at < 4 ? bytes - at : 4;
    if (stream) down_stream(r, s.down, t.down, begin + at, count, s.line + at);
    else down_alone<BILINEAR>(r, s.down[j], begin + at, count, s.line + j * LINE + at);
  }
}

// The vertical pass of BICUBIC, where it comes first: whole levels, of luma where that is what is wanted.
__device__ inline void down_exact(const Row& r, const Tile& t, Shared& s, int planes, int taps) {
  const int* table = (const int*)s.line;
  float* line = s.line + TABLE;
  for (int k = threadIdx.x; k < t.down * t.span * planes; k += blockDim.x) {
    const int j = k / (t.span * planes), at = k % (t.span * planes), x = t.begin + at / planes;
    const Window w = s.down[j];
    const u8* p = row_of(r, w.lo) + (i64)x * r.channels + at % planes;
    int sum = 0;
    for (int y = w.lo; y < w.hi; ++y, p += r.pitch)
      sum += table[j * taps + y - w.lo] * (planes < r.channels ? luma_level(p) : p[0]);
    line[j * SHORT + at] = (float)level(sum);
  }
}

template <int F, typename T>
__device__ inline void across(const Frame& f, const Tile& t, const Shared& s, const float* line, int pitch, int planes,
                              const Target<T>& out) {
  for (int k = threadIdx.x; k < t.down * t.across; k += blockDim.x) {
    const int j = k / t.across, u = k % t.across;
    const Window w = s.across[u];
    const float* p = line + j * pitch + (w.lo - t.begin) * planes;
    float sums[3] = {0, 0, 0};
    for (int x = w.lo; x < w.hi; ++x, p += planes) {
      const float a = weight<F>(w, x);
      sums[0] += a * p[0];
      if (planes == 3) sums[1] += a * p[1], sums[2] += a * p[2];
    }
    if (F == BICUBIC)
      for (int c = 0; c < 3; ++c) sums[c] = sums[c] < 0 ? 0 : sums[c] > 255 ? 255 : sums[c];
    if (planes > out.channels) sums[0] = luma(sums[0], sums[1], sums[2]);
    out.put(f, t.u0 + u, t.v0 + j, sums, planes == 1);
  }
}

// BICUBIC, along memory first: one output column a thread, both passes.
template <typename T>
__device__ inline void columns(const Row& r, const Frame& f, const Tile& t, const Shared& s, int planes, int taps,
                               const Target<T>& out) {
  for (int u = threadIdx.x; u < t.across; u += blockDim.x) {
    const Window w = s.across[u];
    const int* table = (const int*)s.line + u * taps;
    float sums[BAND][3] = {};
    int y = s.down[0].lo;
    for (const int end = s.down[t.down - 1].hi; y < end; ++y) {
      const u8* p = row_of(r, y) + (i64)w.lo * r.channels;
      int first[3] = {0, 0, 0};
      for (int k = 0; k < w.hi - w.lo; ++k, p += r.channels) {
        const int a = table[k];
        first[0] += a * (planes < r.channels ? luma_level(p) : p[0]);
        if (planes == 3) first[1] += a * p[1], first[2] += a * p[2];
      }
#pragma unroll
      for (int j = 0; j < BAND; ++j) {
        const Window& rows = s.down[j < t.down ? j : 0];
        const float b = y >= rows.lo && y < rows.hi ? weight<BICUBIC>(rows, y) : 0;
        for (int c = 0; c < planes; ++c) sums[j][c] += b * (float)level(first[c]);
      }
    }
#pragma unroll
    for (int j = 0; j < BAND; ++j) {
      for (int c = 0; c < 3; ++c) sums[j][c] = sums[j][c] < 0 ? 0 : sums[j][c] > 255 ? 255 : sums[j][c];
      if (j < t.down) out.put(f, t.u0 + u, t.v0 + j, sums[j], planes == 1);
    }
  }
}

// One sample of the output by itself: the first pass along the axis `a`, whose pixels are `pa` bytes apart, then `b`.
template <int F>
__device__ inline float direct(const u8* pixels, const Side& a, int at_a, i64 pa, const Side& b, int at_b, i64 pb,
                               bool to_luma) {
  const Window wa = normal<F>(window<F>(a, at_a)), wb = normal<F>(window<F>(b, at_b));
  Exact weights{0, 0, 0};
  if (F == BICUBIC) weights = exact(a, at_a, wa);
  float sum = 0;
  for (int y = wb.lo; y < wb.hi; ++y) {
    const u8* p = pixels + y * pb + wa.lo * pa;
    float first = 0;
    int whole = 0;
    for (int x = wa.lo; x < wa.hi; ++x, p += pa) {
      if (F == BICUBIC) whole += weights(x) * (to_luma ? luma_level(p) : p[0]);
      else first += weight<F>(wa, x) * (to_luma ? luma(p[0], p[1], p[2]) : p[0]);
    }
    sum += weight<F>(wb, y) * (F == BICUBIC ? (float)level(whole) : first);
  }
  return F != BICUBIC ? sum : sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

__device__ inline bool stored_down_first(const Row& r) { return (r.down_first != 0) == (r.orientation < 5); }

template <int F, typename T>
__device__ inline void directly(const Row& r, const Frame& f, const Tile& t, int planes, const Target<T>& out) {
  const bool to_luma = planes < r.channels, down_first = F == BICUBIC && stored_down_first(r);
  for (int k = threadIdx.x; k < t.down * t.across; k += blockDim.x) {
    const int v = t.v0 + k / t.across, u = t.u0 + k % t.across;
    float value[3];
    for (int c = 0; c < planes; ++c) {
      const u8* p = (const u8*)r.pixels + c;
      value[c] = down_first ? direct<F>(p, f.v, v, r.pitch, f.u, u, r.channels, to_luma)
                            : direct<F>(p, f.u, u, r.channels, f.v, v, r.pitch, to_luma);
    }
    out.put(f, u, v, value, planes == 1);
  }
}

template <int F>
__device__ inline int taps_of(const Side& s) {  // as many as a window has, at most
  const double most = 2 * support_of<F>(s) + 2;
  return most < 1e6 ? (int)most : 1000000;
}

// How many outputs a tile of `room` source pixels has, 0 where one alone needs more.
template <int F>
__device__ inline int outputs_of(const Side& s, int room) {
  const double left = room - 2 * support_of<F>(s) - 2, outputs = left / s.step + 1;
  return !(left >= 0) ? 0 : outputs >= TILE ? TILE : outputs >= 1 ? (int)outputs : 1;
}

// The rows of one band of one image.
template <int F, typename T>
__device__ inline void band(const Row& r, const Frame& f, int v0, const Target<T>& out) {
  Shared& s = shared();
  const bool rows_exact = F == BICUBIC && stored_down_first(r), columns_first = F == BICUBIC && !rows_exact;
  const int planes = F != BILINEAR && out.channels == 1 ? 1 : r.channels;  // of what is resized; BILINEAR: luma comes last
  const int taps = taps_of<F>(columns_first ? f.u : f.v), most = columns_first ? BAND * LINE / taps : TILE;
  Tile t;
  t.v0 = v0, t.down = f.v.count - v0 < BAND ? f.v.count - v0 : BAND;
  int wide = F == NEAREST || columns_first ? TILE : outputs_of<F>(f.u, rows_exact ? SHORT / 3 : CHUNK);
  if (rows_exact && BAND * taps > TABLE) wide = 0;
  if (wide > most) wide = most;
  const bool alone = wide == 0;
  for (t.u0 = 0; t.u0 < f.u.count; t.u0 += t.across) {
    t.across = f.u.count - t.u0 < (alone ? TILE : wide) ? f.u.count - t.u0 : alone ? TILE : wide;
    if (alone) {
      directly<F>(r, f, t, planes, out);
      continue;
    }
    __syncthreads();  // the tile before has been written
    for (int k = threadIdx.x; k < t.across + t.down; k += blockDim.x) {
      const bool is_row = k < t.down;
      const Side& side = is_row ? f.v : f.u;
      const int output = is_row ? v0 + k : t.u0 + k - t.down;
      const Window w = normal<F>(window<F>(side, output));
      (is_row ? s.down[k] : s.across[k - t.down]) = w;
      if (F == BICUBIC && is_row == rows_exact) {
        const Exact weights = exact(side, output, w);
        int* table = (int*)s.line + (is_row ? k : k - t.down) * taps;
        for (int x = w.lo; x < w.hi; ++x) table[x - w.lo] = weights(x);
      }
    }
    __syncthreads();
    if (columns_first) {
      columns(r, f, t, s, planes, taps, out);
      continue;
    }
    if (F == NEAREST) {
      for (int k = threadIdx.x; k < t.down * t.across; k += blockDim.x) {
        const int j = k / t.across, u = k % t.across;
        const u8* p = row_of(r, s.down[j].lo) + (i64)s.across[u].lo * r.channels;
        float value[3] = {(float)(planes < r.channels ? luma_level(p) : p[0]), 0, 0};
        if (planes == 3) value[1] = p[1], value[2] = p[2];
        out.put(f, t.u0 + u, v0 + j, value, planes == 1);
      }
      continue;
    }
    t.begin = s.across[0].lo, t.span = s.across[t.across - 1].hi - t.begin;
    if (rows_exact) down_exact(r, t, s, planes, taps);
    else down(r, f, t, s);
    __syncthreads();
    across<F>(f, t, s, s.line + (rows_exact ? TABLE : 0), rows_exact ? SHORT : LINE, planes, out);
  }
}

template <int F, typename T>
__device__ inline void resize(const Row* rows, T* out, i64 count, int out_h, int out_w, int channels, i64 sn, i64 sc,
                              i64 sy, i64 sx, float scale0, float scale1, float scale2, float shift0, float shift1,
                              float shift2) {
  for (i64 n = blockIdx.y; n < count; n += gridDim.y) {
    const Row r = rows[n];
    const Frame f = stored_frame(r, out_h, out_w);
    const int v0 = (int)blockIdx.x * BAND;
    if (v0 >= f.v.count) continue;  // the whole block
    const Target<T> to{out + n * sn, sc, sy, sx, channels, {scale0, scale1, scale2}, {shift0, shift1, shift2}};
    if (r.height > 0) {
      band<F>(r, f, v0, to);
      continue;
    }
    const int down = f.v.count - v0 < BAND ? f.v.count - v0 : BAND;
    for (int k = threadIdx.x; k < down * f.u.count * channels; k += blockDim.x) {
      const int at = k / channels, v = v0 + at / f.u.count, u = at % f.u.count;
      store(to.out + k % channels * sc + (f.turned ? u * sy + v * sx : v * sy + u * sx), 0);
    }
  }
}

#define ENTRY(name, T)                                                                                                \
  extern "C" __global__ void name(const Row* rows, T* out, i64 count, int out_h, int out_w, int channels, i64 sn,     \
                                  i64 sc, i64 sy, i64 sx, float scale0, float scale1, float scale2, float shift0,     \
                                  float shift1, float shift2) {                                                       \
    resize<FILTER, T>(rows, out, count, out_h, out_w, channels, sn, sc, sy, sx, scale0, scale1, scale2, shift0,       \
                      shift1, shift2);                                                                                \
  }
ENTRY(resize_normalize_f32, float)
ENTRY(resize_normalize_f16, Half)
ENTRY(resize_normalize_bf16, Bfloat)
ENTRY(resize_normalize_u8, u8)
