// The CPU build of resize_normalize.cu, with a plain C interface for ctypes (so callers hold no GIL). Two ways:
//
//   gpuload_resize          the product's CPU path. Same windows and weights, computed once per image; loops in an
//                           order that suits a CPU: four output rows at a time, vertical pass over contiguous bytes,
//                           horizontal pass on whole pixels. Compiled for AVX2 and the baseline, picked at run time, so
//                           that a wheel is portable (AVX-512 measured 5 % faster: not worth a third copy).
//   gpuload_resize_literal  the kernel source itself, block by block: what the tests compare with the torch twin
//                           where there is no GPU.
//
// Both take what the kernel takes; see the header of resize_normalize.cu. Returns 0, or 1 when out of memory.
#include "cpu_shim.h"
#include "resize_normalize.cu"

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GPULOAD_BASELINE)
#define MULTIVERSION 1
#include <immintrin.h>
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int Shuffle __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Shuffle{__VA_ARGS__})
#endif

namespace {

struct Axis {  // the filter along one axis, in output order; every output has `taps` weights, some of them 0
  int count, taps, first, span;  // outputs; source pixels [first, first + span) are read
  const int* lo;                 // [count]: first source pixel of each output
  const float* weights;          // [count, taps]
  const int* whole;              // the same in 1/2^22, for a first pass that rounds as Pillow does; BICUBIC alone
};

struct Job {  // what is the same for every image
  void* out;
  int type, filter, out_h, out_w, channels;
  bool channels_last;
  i64 plane;  // out_h * out_w
  const float *scale, *shift;
};

struct Scratch {
  float *lines, *quads, *buffer;
  unsigned char *levels, *bytes;  // BICUBIC: what the first pass made; four padded rows
  int* sums;                      // of such a row
};

namespace baseline {
#include "resize_cpu_body.h"
}  // namespace baseline
#ifdef MULTIVERSION
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define F16C 1  // GCC does not define __F16C__ after a target pragma in C++
namespace avx2 {
#include "resize_cpu_body.h"
}  // namespace avx2
#undef F16C
#pragma GCC pop_options
#endif

typedef void Run(const Row&, bool, const Axis&, const Axis&, const Job&, const Scratch&, i64);

Run* pick() {
#ifdef MULTIVERSION
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::run;  // F16C is older than AVX2
#endif
  return baseline::run;
}

struct AxisBuffer {
  std::vector<int> lo;
  std::vector<float> weights;
  std::vector<int> whole;

  template <int F>
  Axis build(const Side& side) {
    const int count = side.count;
    int taps = 1, first = side.size, end = 0;
    lo.resize(count);
    std::vector<Window>& w = windows;
    w.resize(count);
    double at = F == NEAREST ? first_center(side) : 0;
    for (int k = 0; F == NEAREST && k < count; ++k, at += side.step) {  // as `window`, which adds up from 0 each time
      const int j = side.mirror == side.backwards ? k : count - 1 - k, lo = pixel_at(side, at);
      w[j] = Window{lo, lo + 1, 0, 1, 1};
    }
    for (int j = 0; j < count; ++j) {
      if (F != NEAREST) w[j] = window<F>(side, side.mirror ? count - 1 - j : j);
      taps = std::max(taps, w[j].hi - w[j].lo);
      first = std::min(first, w[j].lo);
      end = std::max(end, w[j].hi);
    }
    weights.assign((size_t)count * taps, 0.0f);
    if (F == BICUBIC) whole.assign((size_t)count * taps, 0);
    for (int j = 0; j < count; ++j) {
      const int n = w[j].hi - w[j].lo;
      lo[j] = std::min(w[j].lo, end - taps);  // the padding must not reach beyond what is read
      const size_t at = (size_t)j * taps + (w[j].lo - lo[j]);
      float *to = &weights[at], total = 0;
      for (int k = 0; k < n; ++k) total += to[k] = kernel<F>((k - w[j].center) * w[j].inv);
      for (int k = 0; k < n && (F == BICUBIC ? total != 0 : total > 0); ++k) to[k] /= total;
      if (F != BICUBIC) continue;
      const Exact weight = exact(side, side.mirror ? count - 1 - j : j, w[j]);
      for (int k = 0; k < n; ++k) whole[at + k] = weight(w[j].lo + k);
    }
    return Axis{count, taps, first, end - first, lo.data(), weights.data(), whole.data()};
  }

  Axis build(const Side& side, int filter) {
    return filter == BICUBIC ? build<BICUBIC>(side) : filter == NEAREST ? build<NEAREST>(side) : build<BILINEAR>(side);
  }

 private:
  std::vector<Window> windows;
};

int bytes_of(int type) { return type == 0 ? 4 : type == 3 ? 1 : 2; }

struct Buffers {  // of a thread, kept: a call may be for one image
  AxisBuffer u, v;
  std::vector<float> lines, quads, pixels;
  std::vector<unsigned char> levels, bytes, gray;
  std::vector<int> sums;
};

// The window of an RGB image that is read, as Pillow's convert("L").
Row gray_of(const Row& r, const Axis& u, const Axis& v, std::vector<unsigned char>& gray) {
  const size_t size = (size_t)u.span * v.span;
  if (gray.size() < size) gray.resize(size);
  for (int y = 0; y < v.span; ++y) {
    const unsigned char* p = row_of(r, v.first + y) + (i64)u.first * r.channels;
    unsigned char* to = gray.data() + (i64)y * u.span;
    for (int x = 0; x < u.span; ++x) to[x] = (unsigned char)luma_level(p + 3 * x);
  }
  Row found = r;  // its pixels begin where those of the whole image would
  found.pitch = u.span, found.channels = 1;
  found.pixels = (unsigned long long)(size_t)gray.data() - (unsigned long long)(v.first * found.pitch + u.first);
  return found;
}

void resize_all(const Row* rows, i64 count, const Job& job) {
  static Run* const run = pick();
  static thread_local Buffers kept;
  const i64 size = job.channels * job.plane, wide = std::max(job.out_h, job.out_w);
  const int bytes = bytes_of(job.type);
  AxisBuffer &ub = kept.u, &vb = kept.v;
  std::vector<float>&lines = kept.lines, &quads = kept.quads, &buffer = kept.pixels;
  if (buffer.size() < (size_t)(3 * (wide + 4) + 4)) buffer.resize(3 * (wide + 4) + 4);
  for (i64 n = 0; n < count; ++n) {
    Row r = rows[n];
    if (r.height <= 0) {
      std::memset((char*)job.out + n * size * bytes, 0, size * bytes);
      continue;
    }
    const Frame f = stored_frame(r, job.out_h, job.out_w);
    const Axis u = ub.build(f.u, job.filter), v = vb.build(f.v, job.filter);
    if (job.filter == BICUBIC && r.channels > job.channels) r = gray_of(r, u, v, kept.gray);
    const size_t line = 4 * ((size_t)u.span * r.channels + 4);
    const size_t rows = 4 * (size_t)u.count, all = (size_t)u.count * ((v.count + 3) / 4 * 4);
    const size_t quad = 4 * ((f.turned ? all : 0) + (f.turned && job.filter != BICUBIC ? 0 : rows)) + 16;
    if (lines.size() < line) lines.resize(line);
    if (quads.size() < quad + 4) quads.resize(quad + 4);
    if (job.filter == BICUBIC) {
      const size_t levels = 4 * (size_t)u.count * v.span;
      if (kept.levels.size() < levels) kept.levels.resize(levels);
      if (kept.bytes.size() < line) kept.bytes.resize(line);
      if (kept.sums.size() < line) kept.sums.resize(line);
    }
    float* aligned = (float*)(((size_t)quads.data() + 15) / 16 * 16);
    const Scratch scratch{lines.data(), aligned, buffer.data(), kept.levels.data(), kept.bytes.data(), kept.sums.data()};
    run(r, f.turned, u, v, job, scratch, n * size);
  }
}

}  // namespace

extern "C" int gpuload_resize(const Row* rows, void* out, i64 count, int type, int filter, int out_h, int out_w,
                              int channels, int channels_last, const float* scale_shift) {
  const Job job{out,      type,          filter, out_h, out_w, channels, channels_last != 0, (i64)out_h * out_w,
                scale_shift, scale_shift + 3};
  try {
    resize_all(rows, count, job);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

template <int F, typename T>
static void literal(const Row* rows, T* out, i64 count, int out_h, int out_w, int channels, bool last, const float* s) {
  const i64 sc = last ? 1 : (i64)out_h * out_w, sx = last ? channels : 1;
  const i64 sy = sx * out_w, sn = (i64)channels * out_h * out_w;
  gridDim = {(unsigned)(std::max(out_h, out_w) + BAND - 1) / BAND, (unsigned)std::min<i64>(count, 3), 1};
  for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = {x, y, 0};
      resize<F>(rows, out, count, out_h, out_w, channels, sn, sc, sy, sx, s[0], s[1], s[2], s[3], s[4], s[5]);
    }
}

extern "C" int gpuload_resize_literal(const Row* rows, void* out, i64 count, int type, int filter, int out_h, int out_w,
                                      int channels, int channels_last, const float* s) {
  const auto run = [&](auto* to) {
    const auto call = filter == BICUBIC   ? literal<BICUBIC, std::remove_pointer_t<decltype(to)>>
                      : filter == NEAREST ? literal<NEAREST, std::remove_pointer_t<decltype(to)>>
                                          : literal<BILINEAR, std::remove_pointer_t<decltype(to)>>;
    call(rows, to, count, out_h, out_w, channels, channels_last != 0, s);
  };
  if (type == 0) run((float*)out);
  if (type == 1) run((Half*)out);
  if (type == 2) run((Bfloat*)out);
  if (type == 3) run((unsigned char*)out);
  return 0;
}
