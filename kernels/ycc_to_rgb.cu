// The planes of JPEG files, as a hardware decoder stores them -> RGB, byte for byte what libjpeg makes of them (and so
// Pillow): its chroma interpolation ("fancy upsampling") and its colour conversion, in integers, in one launch for
// images of any sizes and samplings.
//
// In   images  Planes[count]    see below; 64-bit addresses
//      first   i64[count + 1]   blocks before each image: ceil(height * ceil(width / WIDE) / UNITS) of every image, added up
// Out  out     u8[height, width, 3] interleaved, `out_pitch` bytes from row to row, of every image
//
// The planes hold real samples up to ceil(width / h) x ceil(height / v); what a decoder puts behind them is not read.
// 2x1 and 2x2 are triangle filters where the chroma planes have more than 2 columns, 1x2 always; everything else repeats
// samples. Right shifts of negative numbers are arithmetic. NumPy twin: gpuload.images.planes.ycc_to_rgb_twin.
//
// A unit is WIDE neighbouring pixels of a row: one thread reads their samples once (8 bytes of a chroma plane at 4:2:0),
// writes 12 bytes, as words where the addresses allow it. A block makes UNITS units of one image and finds its image by
// halving `first`, so that no block of a batch of unequal images is idle. Nothing is shared and there are no barriers.

typedef long long i64;
typedef unsigned char u8;

namespace ycc {  // another kernel in the same library has functions of these names

constexpr unsigned int WIDE = 4, UNITS = 1024;

struct Planes {  // 64 bytes; mirrored by gpuload.images.planes.PLANES
  unsigned long long y, cb, cr;  // cb and cr are 0 for gray
  int pitch_y, pitch_c;          // bytes from row to row
  int height, width;             // of the image
  int h, v;                      // luma samples to one of chroma, across and down
  unsigned long long out;
  i64 out_pitch;
};

static_assert(sizeof(Planes) == 64, "Planes and gpuload.images.planes.PLANES differ");

struct Unit {  // pixels [x, x + count) of row y
  int x, y, count;
};

__device__ inline int nearest(int at, int size) { return at < 0 ? 0 : at < size ? at : size - 1; }

// Chroma of the pixels of a unit, interpolated: `to` gets WIDE values, those beyond the image without a meaning.
__device__ inline void interpolate(const Planes& p, unsigned long long plane, const Unit& unit, int* to) {
  const int width = (p.width + p.h - 1) / p.h, height = (p.height + p.v - 1) / p.v;  // of the plane
  const int row = unit.y / p.v, odd = unit.y & 1, beside = nearest(row - 1 + 2 * odd, height);
  const u8* near = (const u8*)plane + (i64)row * p.pitch_c;
  const u8* far = (const u8*)plane + (i64)beside * p.pitch_c;
  const bool across = p.h == 2 && width > 2;
  if (across && (p.v == 1 || p.v == 2)) {
    int s[WIDE / 2 + 2];  // columns from one left of the unit to one right of it, the two rows mixed
    for (int k = 0; k < (int)WIDE / 2 + 2; ++k) {
      const int i = nearest(unit.x / 2 - 1 + k, width);
      s[k] = p.v == 1 ? near[i] : 3 * near[i] + far[i];
    }
    const int shift = p.v == 1 ? 2 : 4, even_half = p.v == 1 ? 1 : 8, odd_half = p.v == 1 ? 2 : 7;
    for (int k = 0; k < (int)WIDE / 2; ++k) {
      to[2 * k] = (3 * s[k + 1] + s[k] + even_half) >> shift;
      to[2 * k + 1] = (3 * s[k + 1] + s[k + 2] + odd_half) >> shift;
    }
  } else if (p.h == 1 && p.v == 2) {
    for (int k = 0; k < (int)WIDE; ++k) {
      const int i = nearest(unit.x + k, width);
      to[k] = (3 * near[i] + far[i] + 1 + odd) >> 2;
    }
  } else {
    for (int k = 0; k < (int)WIDE; ++k) to[k] = near[nearest((unit.x + k) / p.h, width)];
  }
}

__device__ inline u8 level(int value) { return (u8)(value < 0 ? 0 : value > 255 ? 255 : value); }

// 16-bit fixed point: 1.402, 0.34414, 0.71414, 1.772; one rounding for the sum of both in green.
__device__ inline void colour(int y, int cb, int cr, u8* rgb) {
  cb -= 128, cr -= 128;
  rgb[0] = level(y + ((91881 * cr + 32768) >> 16));
  rgb[1] = level(y + ((-22554 * cb - 46802 * cr + 32768) >> 16));
  rgb[2] = level(y + ((116130 * cb + 32768) >> 16));
}

__device__ inline unsigned int word(const u8* b) { return b[0] | b[1] << 8 | b[2] << 16 | (unsigned int)b[3] << 24; }

__device__ inline void convert(const Planes& p, const Unit& unit) {
  u8 luma[WIDE], rgb[3 * WIDE];
  const u8* from = (const u8*)p.y + (i64)unit.y * p.pitch_y + unit.x;
  if (unit.count == (int)WIDE && (((unsigned long long)from) & 3) == 0) {
    const unsigned int four = *(const unsigned int*)from;
    for (int k = 0; k < (int)WIDE; ++k) luma[k] = (u8)(four >> 8 * k);
  } else {
    for (int k = 0; k < (int)WIDE; ++k) luma[k] = from[k < unit.count ? k : 0];
  }
  if (p.cb) {
    int cb[WIDE], cr[WIDE];
    interpolate(p, p.cb, unit, cb);
    interpolate(p, p.cr, unit, cr);
    for (int k = 0; k < (int)WIDE; ++k) colour(luma[k], cb[k], cr[k], rgb + 3 * k);
  } else {
    for (int k = 0; k < 3 * (int)WIDE; ++k) rgb[k] = luma[k / 3];
  }
  u8* to = (u8*)p.out + (i64)unit.y * p.out_pitch + 3 * (i64)unit.x;
  if (unit.count == (int)WIDE && (((unsigned long long)to) & 3) == 0) {
    for (int k = 0; k < 3; ++k) ((unsigned int*)to)[k] = word(rgb + 4 * k);
  } else {
    for (int k = 0; k < 3 * unit.count; ++k) to[k] = rgb[k];
  }
}

}  // namespace ycc

extern "C" __global__ void ycc_to_rgb(const ycc:: Planes* images, const i64* first, i64 count) {
  for (i64 block = blockIdx.x; block < first[count]; block += gridDim.x) {
    using namespace ycc;
    i64 n = 0, end = count;  // the image is one of [n, end)
    while (end - n > 1) {
      const i64 middle = (n + end) / 2;
      (first[middle] <= block ? n : end) = middle;
    }
    const Planes p = images[n];
    const unsigned int across = ((unsigned int)p.width + WIDE - 1) / WIDE, all = across * (unsigned int)p.height;
    const unsigned int from = (unsigned int)(block - first[n]) * UNITS, to = all - from < UNITS ? all : from + UNITS;
    for (unsigned int k = from + threadIdx.x; k < to; k += blockDim.x) {
      const unsigned int y = k / across, x = (k - y * across) * WIDE;
      const unsigned int left = (unsigned int)p.width - x;
      convert(p, Unit{(int)x, (int)y, (int)(left < WIDE ? left : WIDE)});
    }
  }
}
