// The fast CPU loops of resize_normalize, compiled once per instruction set: resize_cpu.cpp includes this file inside
// a namespace after setting the target, and picks one at run time. No standard library here, so that no inline
// function compiled for a newer CPU can be linked into the portable code. The loops over bytes and floats are plain:
// GCC vectorises them, and intrinsics in their place measured 7 % faster at best.

typedef float f4 __attribute__((vector_size(16), may_alias));
typedef float f4u __attribute__((vector_size(16), aligned(4), may_alias));
typedef int i4 __attribute__((vector_size(16), may_alias));
typedef unsigned char b4 __attribute__((vector_size(4), aligned(1), may_alias));

static i4 pixel(const unsigned char* p) {
#ifdef F16C  // GCC converts byte by byte
  int bytes;
  __builtin_memcpy(&bytes, p, 4);
  return (i4)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes));
#else
  return __builtin_convertvector(*(const b4*)p, i4);
#endif
}

static void put_levels(i4 sums, unsigned char* to) {
  const i4 low = {0, 0, 0, 0}, high = {255, 255, 255, 255};
  i4 v = sums >> 22;
  v = v < low ? low : v > high ? high : v;
  *(b4*)to = __builtin_convertvector(v, b4);
}

// line[i] (+)= sum over K rows of w[k] * p[k * pitch + i], for n bytes i.
template <int K, bool ADD>
static void blend(const unsigned char* __restrict p, i64 pitch, const float* __restrict w, float* __restrict line, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    float sum = w[0] * p[i];
    for (int k = 1; k < K; ++k) sum += w[k] * p[k * pitch + i];
    line[i] = ADD ? line[i] + sum : sum;
  }
}

// The vertical pass of one output row: `taps` source rows from p.
static void vertical(const unsigned char* p, i64 pitch, const float* w, int taps, float* line, i64 n) {
  switch (taps) {
    case 1: return blend<1, false>(p, pitch, w, line, n);
    case 2: return blend<2, false>(p, pitch, w, line, n);
    case 3: return blend<3, false>(p, pitch, w, line, n);
    case 5: return blend<5, false>(p, pitch, w, line, n);
  }
  blend<4, false>(p, pitch, w, line, n);
  int k = 4;
  for (; k + 4 <= taps; k += 4) blend<4, true>(p + k * pitch, pitch, w + k, line, n);
  p += k * pitch, w += k;
  if (taps - k == 1) blend<1, true>(p, pitch, w, line, n);
  if (taps - k == 2) blend<2, true>(p, pitch, w, line, n);
  if (taps - k == 3) blend<3, true>(p, pitch, w, line, n);
}

// The horizontal pass of four lines at once: quad (r, j) = sum of w * the pixel's channels; the lanes beyond the
// channels are not used. Loads four floats where a pixel has three (or one): lines are padded for that.
template <int TAPS>
static void horizontal(const float* lines, i64 pitch, const Axis& u, int planes, f4* quads, i64 along, i64 across) {
  const int taps = TAPS ? TAPS : u.taps;
  for (int j = 0; j < u.count; ++j) {
    const float *w = u.weights + (i64)j * taps, *p = lines + (i64)(u.lo[j] - u.first) * planes;
    f4 a = {0, 0, 0, 0}, b = a, c = a, d = a;
    for (int k = 0; k < taps; ++k, p += planes) {
      a += w[k] * *(const f4u*)p;
      b += w[k] * *(const f4u*)(p + pitch);
      c += w[k] * *(const f4u*)(p + 2 * pitch);
      d += w[k] * *(const f4u*)(p + 3 * pitch);
    }
    f4* q = quads + j * along;
    q[0] = a, q[across] = b, q[2 * across] = c, q[3 * across] = d;
  }
}

static void horizontal_any(const float* lines, i64 pitch, const Axis& u, int planes, f4* quads, i64 along, i64 across) {
  switch (u.taps) {
    case 2: return horizontal<2>(lines, pitch, u, planes, quads, along, across);
    case 3: return horizontal<3>(lines, pitch, u, planes, quads, along, across);
    case 4: return horizontal<4>(lines, pitch, u, planes, quads, along, across);
    case 5: return horizontal<5>(lines, pitch, u, planes, quads, along, across);
  }
  horizontal<0>(lines, pitch, u, planes, quads, along, across);
}

// to[i] = from[i] * scale + shift, rounded as `store` does.
static void convert(const float* from, float* to, i64 n, float scale, float shift) {
  for (i64 i = 0; i < n; ++i) to[i] = from[i] * scale + shift;
}

static void convert(const float* from, Half* to, i64 n, float scale, float shift) {
  i64 i = 0;
#ifdef F16C
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i) * scale + shift, 0));
#endif
  for (; i < n; ++i) store(to + i, from[i] * scale + shift);
}

static void convert(const float* from, Bfloat* to, i64 n, float scale, float shift) {
  for (i64 i = 0; i < n; ++i) store(to + i, from[i] * scale + shift);
}

static void convert(const float* from, unsigned char* to, i64 n, float, float) {
  for (i64 i = 0; i < n; ++i) {
    const int v = (int)(from[i] + 0.5f);  // a mean of bytes: never far outside 0..255
    to[i] = (unsigned char)(v < 0 ? 0 : v > 255 ? 255 : v);
  }
}

// Lane c of n quads, n rounded up to 4, to planes + c * pitch.
static void split(const f4* q, i64 n, float* planes, i64 pitch) {
  for (i64 i = 0; i < n; i += 4, q += 4) {
    const f4 rg = SHUFFLE(q[0], q[1], 0, 4, 1, 5), rg2 = SHUFFLE(q[2], q[3], 0, 4, 1, 5);
    const f4 b = SHUFFLE(q[0], q[1], 2, 6, 3, 7), b2 = SHUFFLE(q[2], q[3], 2, 6, 3, 7);
    *(f4u*)(planes + i) = SHUFFLE(rg, rg2, 0, 1, 4, 5);
    *(f4u*)(planes + pitch + i) = SHUFFLE(rg, rg2, 2, 3, 6, 7);
    *(f4u*)(planes + 2 * pitch + i) = SHUFFLE(b, b2, 0, 1, 4, 5);
  }
}

// One row of the output, of n pixels, from its quads.
template <typename T>
static void emit(const f4* quads, i64 n, int planes, const Job& job, float* buffer, T* out) {
  if (!job.channels_last || job.channels == 1) {
    const i64 pitch = (n + 3) / 4 * 4;
    split(quads, n, buffer, pitch);
    for (int c = 0; c < job.channels; ++c)
      convert(buffer + (planes == 1 ? 0 : c * pitch), out + c * job.plane, n, job.scale[c], job.shift[c]);
    return;
  }
  const f4 scale = {job.scale[0], job.scale[1], job.scale[2], 0}, shift = {job.shift[0], job.shift[1], job.shift[2], 0};
  for (i64 i = 0; i < n; ++i) {  // each store's fourth lane is overwritten by the next
    const f4 q = planes == 1 ? SHUFFLE(quads[i], quads[i], 0, 0, 0, 0) : quads[i];
    *(f4u*)(buffer + 3 * i) = q * scale + shift;
  }
  convert(buffer, out, 3 * n, 1, 0);
}

// One image. The axes are in output order, so mirrors are in them already.
template <typename T>
static void image(const Row& r, bool turned, const Axis& u, const Axis& v, const Job& job, const Scratch& s, T* out) {
  const bool to_luma = r.channels == 3 && job.channels == 1;
  const int planes = to_luma ? 1 : r.channels, aligned = (v.count + 3) / 4 * 4;
  const i64 bytes = (i64)u.span * r.channels, pitch = bytes + 4, x = (i64)u.first * r.channels;
  const i64 step = job.channels_last ? (i64)job.channels * job.out_w : job.out_w;
  f4* quads = (f4*)s.quads;
  for (int y = 0; y < v.count; y += 4) {
    for (int k = 0; k < 4 && y + k < v.count; ++k) {
      const unsigned char* p = (const unsigned char*)r.pixels + v.lo[y + k] * r.pitch + x;
      float* line = s.lines + k * pitch;
      vertical(p, r.pitch, v.weights + (i64)(y + k) * v.taps, v.taps, line, bytes);
      if (to_luma)
        for (i64 i = 0; i < u.span; ++i) line[i] = luma(line[3 * i], line[3 * i + 1], line[3 * i + 2]);
      if (to_luma && job.filter == NEAREST)
        for (i64 i = 0; i < u.span; ++i) line[i] = (float)(int)(line[i] + 0.5f);  // as Pillow's convert("L")
    }
    if (turned) {
      horizontal_any(s.lines, pitch, u, planes, quads + y, aligned, 1);
      continue;
    }
    horizontal_any(s.lines, pitch, u, planes, quads, 1, u.count);
    for (int k = 0; k < 4 && y + k < v.count; ++k)
      emit(quads + (i64)k * u.count, u.count, planes, job, s.buffer, out + (y + k) * step);
  }
  if (turned)
    for (int y = 0; y < u.count; ++y) emit(quads + (i64)y * aligned, v.count, planes, job, s.buffer, out + y * step);
}

// The first pass of BICUBIC along memory, in Pillow's integers: rows [v.first, v.first + v.span) -> u8[v.span, u.count, 4],
// four rows at once. Rows are copied, for a pixel's four bytes are read where it has three (or one).
static void first_across(const Row& r, const Axis& u, const Axis& v, const Scratch& s) {
  const i64 bytes = (i64)u.span * r.channels, pitch = bytes + 4;
  for (int y = 0; y < v.span; y += 4) {
    const int rows = v.span - y < 4 ? v.span - y : 4;
    for (int k = 0; k < rows; ++k)
      __builtin_memcpy(s.bytes + k * pitch, row_of(r, v.first + y + k) + (i64)u.first * r.channels, (size_t)bytes);
    for (int j = 0; j < u.count; ++j) {
      const unsigned char* p = s.bytes + (i64)(u.lo[j] - u.first) * r.channels;
      const int* w = u.whole + (i64)j * u.taps;
      const int half = 1 << 21;
      i4 a = {half, half, half, half}, b = a, c = a, d = a;
      for (int k = 0; k < u.taps; ++k, p += r.channels) {
        a += w[k] * pixel(p), b += w[k] * pixel(p + pitch), c += w[k] * pixel(p + 2 * pitch), d += w[k] * pixel(p + 3 * pitch);
      }
      unsigned char* to = s.levels + 4 * ((i64)y * u.count + j);
      const i64 down = 4 * (i64)u.count;
      put_levels(a, to);
      if (rows > 1) put_levels(b, to + down);
      if (rows > 2) put_levels(c, to + 2 * down);
      if (rows > 3) put_levels(d, to + 3 * down);
    }
  }
}

// The first pass of BICUBIC down columns of memory: a line of whole levels.
static void first_down(const unsigned char* p, i64 pitch, const int* w, int taps, float* line, int* sums, i64 n) {
  for (i64 i = 0; i < n; ++i) sums[i] = 1 << 21;
  for (int k = 0; k < taps; ++k, p += pitch)
    for (i64 i = 0; i < n; ++i) sums[i] += w[k] * p[i];
  for (i64 i = 0; i < n; ++i) {
    const int v = sums[i] >> 22;
    line[i] = (float)(v < 0 ? 0 : v > 255 ? 255 : v);
  }
}

static void clip(f4* quads, i64 n) {
  float* v = (float*)quads;
  for (i64 i = 0; i < 4 * n; ++i) v[i] = v[i] < 0 ? 0 : v[i] > 255 ? 255 : v[i];
}

// Clips n quads of row y, and writes them or, of a turned image, puts them where `emit` will find them.
template <typename T>
static void finish(f4* from, i64 n, int y, bool turned, i64 aligned, f4* quads, int planes, const Job& job, float* buffer,
                   T* out) {
  clip(from, n);
  if (!turned) return emit(from, n, planes, job, buffer, out);
  for (i64 j = 0; j < n; ++j) quads[j * aligned + y] = from[j];
}

// One image with BICUBIC, whose first pass rounds: along memory, or down columns of it.
template <typename T>
static void image_cubic(const Row& r, bool turned, const Axis& u, const Axis& v, const Job& job, const Scratch& s, T* out) {
  const int planes = r.channels, aligned = (v.count + 3) / 4 * 4;
  const i64 bytes = (i64)u.span * planes, pitch = bytes + 4;
  const i64 step = job.channels_last ? (i64)job.channels * job.out_w : job.out_w, down = 4 * (i64)u.count;
  f4 *quads = (f4*)s.quads, *row = quads + (turned ? (i64)u.count * aligned : 0);
  const bool along = !stored_down_first(r);
  if (along) first_across(r, u, v, s);
  for (int y = 0; y < v.count; ++y) {
    const float* w = v.weights + (i64)y * v.taps;
    if (along) {
      vertical(s.levels + (v.lo[y] - v.first) * down, down, w, v.taps, (float*)row, down);
    } else if (y % 4 == 0) {
      for (int k = 0; k < 4 && y + k < v.count; ++k) {
        const unsigned char* p = row_of(r, v.lo[y + k]) + (i64)u.first * planes;
        first_down(p, r.pitch, v.whole + (i64)(y + k) * v.taps, v.taps, s.lines + k * pitch, s.sums, bytes);
      }
      horizontal_any(s.lines, pitch, u, planes, row, 1, u.count);
    }
    finish(row + (along ? 0 : (i64)(y % 4) * u.count), u.count, y, turned, aligned, quads, planes, job, s.buffer, out + y * step);
  }
  if (turned)
    for (int y = 0; y < u.count; ++y) emit(quads + (i64)y * aligned, v.count, planes, job, s.buffer, out + y * step);
}

static void run(const Row& r, bool turned, const Axis& u, const Axis& v, const Job& job, const Scratch& s, i64 at) {
  const auto fill = [&](auto* to) {
    if (job.filter == BICUBIC) image_cubic(r, turned, u, v, job, s, to + at);
    else image(r, turned, u, v, job, s, to + at);
  };
  if (job.type == 0) fill((float*)job.out);
  if (job.type == 1) fill((Half*)job.out);
  if (job.type == 2) fill((Bfloat*)job.out);
  if (job.type == 3) fill((unsigned char*)job.out);
}
