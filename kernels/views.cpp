// What of each image has to be decoded so that its views can be resized, without the GIL: the numbers of the NumPy twin
// gpuload.images.views.windows_twin, which says what they mean.
//
// In   views    VIEW[m]: 41 bytes each, not aligned; headers HEADER[n]; scales i64[n] in eighths, or none
//      radius   of the filter, in steps of the output
// Out  windows  i64[n, 4]: x0, y0, width, height in pixels of each image as it is stored; zeros where it has no view
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

const int VIEW = 41, HEADER = 44, ORIENTATION = 13, MARGIN = 2;

struct Box {
  double x, y, w, h;
};

Box stored(Box r, int orientation, double height, double width) {
  if (orientation >= 5) r = {r.y, r.x, r.h, r.w};
  const bool mirror_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool mirror_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  if (mirror_x) r.x = width - r.x - r.w;
  if (mirror_y) r.y = height - r.y - r.h;
  return r;
}

struct Span {
  int64_t low, high;
};

Span span(double start, double length, double outputs, double whole, double scale, double radius) {
  const double margin = scale == 8 ? radius * std::max(1.0, length / outputs) + MARGIN
                                   : (radius * std::max(1.0, length * scale / 8 / outputs) + MARGIN) * 8 / scale;
  return {(int64_t)std::max(0.0, std::floor(start - margin)),
          (int64_t)std::min(whole, std::ceil(start + length + margin))};
}

}  // namespace

extern "C" void gpuload_windows(const unsigned char* views, int64_t m, const unsigned char* headers, int64_t n,
                                int out_height, int out_width, int radius, const int64_t* scales,
                                int64_t* windows) {
  memset(windows, 0, (size_t)n * 4 * sizeof(int64_t));
  for (int64_t k = 0; k < m; ++k) {
    int64_t image;
    Box region;
    memcpy(&image, views + k * VIEW, sizeof image);
    memcpy(&region, views + k * VIEW + sizeof image, sizeof region);
    if (image < 0 || image >= n) continue;
    int32_t size[2];
    memcpy(size, headers + image * HEADER, sizeof size);
    const int orientation = headers[image * HEADER + ORIENTATION];
    const bool turned = orientation >= 5;
    const Box r = stored(region, orientation, size[0], size[1]);
    const double scale = scales ? (double)scales[image] : 8;
    const Span x = span(r.x, r.w, turned ? out_height : out_width, size[1], scale, radius);
    const Span y = span(r.y, r.h, turned ? out_width : out_height, size[0], scale, radius);
    int64_t* w = windows + 4 * image;
    if (w[2] <= 0 && w[3] <= 0) {
      w[0] = x.low, w[1] = y.low, w[2] = x.high - x.low, w[3] = y.high - y.low;
      continue;
    }
    const int64_t right = std::max(w[0] + w[2], x.high), below = std::max(w[1] + w[3], y.high);
    w[0] = std::min(w[0], x.low), w[1] = std::min(w[1], y.low);
    w[2] = right - w[0], w[3] = below - w[1];
  }
}

// Addresses and sizes of the values of an Arrow binary array: `offsets` i32 or i64 by `width`, of n + 1 values.
extern "C" void gpuload_pointers(const unsigned char* offsets, int width, int64_t n, uint64_t base, uint64_t* at,
                                 int64_t* size) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t start, stop;
    if (width == 4) {
      int32_t pair[2];
      memcpy(pair, offsets + 4 * i, sizeof pair);
      start = pair[0], stop = pair[1];
    } else {
      memcpy(&start, offsets + 8 * i, 8);
      memcpy(&stop, offsets + 8 * i + 8, 8);
    }
    at[i] = base + (uint64_t)start;
    size[i] = stop - start;
  }
}
