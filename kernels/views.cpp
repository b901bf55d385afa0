// Geometry of a batch: which region of each image is wanted, what of the image has to be decoded for it, and where that
// lies in what was decoded. Each function gives the numbers of a NumPy twin in gpuload.images (views.regions,
// views.windows_twin, resize.rows_twin), which says what they mean, bit for bit: only +, -, *, / and square roots.
//
// VIEW is 41 bytes, not aligned; HEADER and PIXELS are tables of gpuload.images, ROW one of gpuload.kernels.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

const int VIEW = 41, HEADER = 44, ORIENTATION = 13, ASK = 23, MARGIN = 2;

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

Box seen(Box r, int orientation, double height, double width) {  // the way back
  const bool mirror_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool mirror_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  if (mirror_x) r.x = width - r.x - r.w;
  if (mirror_y) r.y = height - r.y - r.h;
  if (orientation >= 5) r = {r.y, r.x, r.h, r.w};
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

struct Crop {  // CROP of gpuload.kernels
  double scale[2], ratio[2], crop_ratio, flip, out_height, out_width;
  int32_t mode, last;  // mode: 0 the whole image, 1 its middle, 2 random; last: who fits no try gets the whole
};

// Width and height of the first rectangle that fits: its area is drawn from `scale`, its shape is ratios[try].
bool drawn_size(const Crop& crop, double h, double w, const double* areas, const double* ratios, int64_t tries,
                double* rw, double* rh) {
  for (int64_t k = 0; k < tries; ++k) {
    const double area = h * w * (crop.scale[0] + areas[2 * k] * (crop.scale[1] - crop.scale[0]));
    *rw = std::sqrt(area * ratios[k]), *rh = std::sqrt(area / ratios[k]);
    if (*rw <= w && *rh <= h) return true;
  }
  return false;
}

struct Pixels {  // PIXELS of gpuload.images
  int64_t offset, pitch;
  int32_t height, width, channels, orientation, x, y, whole_height, whole_width;
  double scale;
};

struct Row {  // ROW of gpuload.kernels
  uint64_t pixels;
  int64_t pitch;
  Box region;
  int32_t height, width, channels, orientation, flip, left, top, down_first;
};

}  // namespace

// VIEW[n] of HEADER[n], one of each image; with `which`, of those images alone. `drawn` f64[n, columns]: flip, x, y, and
// then area and ratio of each try; `ratios` f64[n or count, tries] are made of those by the caller. Which images no try
// fits goes to `left`, unless `last`; returns how many.
extern "C" int64_t gpuload_views(const unsigned char* headers, int64_t n, const Crop* crop, const double* drawn,
                                 int64_t columns, const double* ratios, int64_t first, int64_t tries,
                                 const int64_t* which, int64_t count, unsigned char* views, int64_t* left) {
  int64_t without = 0;
  for (int64_t k = 0; k < (which ? count : n); ++k) {
    const int64_t i = which ? which[k] : k;
    int32_t size[2];
    memcpy(size, headers + i * HEADER, sizeof size);
    if (headers[i * HEADER + ORIENTATION] >= 5) std::swap(size[0], size[1]);
    const double h = std::max(size[0], 1), w = std::max(size[1], 1);
    const double* numbers = drawn + i * columns;
    double rw = w, rh = h, fx = 0.5, fy = 0.5;
    if (crop->mode == 1) {
      rw = std::min(w, h * crop->out_width / crop->out_height);
      rh = std::min(h, rw * crop->out_height / crop->out_width);
      rw *= crop->crop_ratio, rh *= crop->crop_ratio;
    } else if (crop->mode == 2) {
      if (drawn_size(*crop, h, w, numbers + 3 + 2 * first, ratios + k * tries, tries, &rw, &rh)) {
        fx = numbers[1], fy = numbers[2];
      } else if (!crop->last) {
        left[without++] = i;
        continue;
      } else {
        const double shape = std::min(std::max(w / h, crop->ratio[0]), crop->ratio[1]);
        rw = std::min(w, h * shape), rh = std::min(h, w / shape);
      }
    }
    const Box region = {(w - rw) * fx, (h - rh) * fy, rw, rh};
    unsigned char* view = views + i * VIEW;
    memcpy(view, &i, sizeof i);
    memcpy(view + sizeof i, &region, sizeof region);
    view[sizeof i + sizeof region] = columns > 0 && numbers[0] < crop->flip;
  }
  return without;
}

// ROW[m] of VIEW[m] of PIXELS[n] for the bilinear filter, whose offsets count from `base`. Returns m, or the first view of none of the images.
extern "C" int64_t gpuload_rows(const Pixels* pixels, int64_t n, const unsigned char* views, int64_t m, uint64_t base,
                                Row* rows) {
  for (int64_t k = 0; k < m; ++k) {
    int64_t image;
    Box r;
    memcpy(&image, views + k * VIEW, sizeof image);
    memcpy(&r, views + k * VIEW + sizeof image, sizeof r);
    if (image < 0 || image >= n) return k;
    const Pixels& p = pixels[image];
    if (p.scale != 1 || p.height != p.whole_height || p.width != p.whole_width) {
      r = stored(r, p.orientation, p.whole_height, p.whole_width);
      r = {r.x * p.scale - p.x, r.y * p.scale - p.y, r.w * p.scale, r.h * p.scale};
      r = seen(r, p.orientation, p.height, p.width);
    }
    rows[k] = {base + (uint64_t)p.offset, p.pitch, r, p.height, p.width, p.channels, p.orientation,
               views[k * VIEW + sizeof image + sizeof r], 0, 0, 0};
  }
  return m;
}

// How many of these images anything is wrong with that needs no decoding: headers.judge says what.
extern "C" int64_t gpuload_wrong(const uint64_t* at, const int64_t* size, const unsigned char* headers, int64_t n,
                                 int64_t max_pixels) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t pixels[2];
    memcpy(pixels, headers + i * HEADER, sizeof pixels);
    const bool flat = (pixels[0] < 1 || pixels[1] < 1) && !headers[i * HEADER + ASK];
    wrong += !at[i] || size[i] < 1 || flat || (int64_t)pixels[0] * pixels[1] > max_pixels;
  }
  return wrong;
}

// The window of each image that its views together look at. radius: of the filter, in steps of the output; scales: i64[n]
// in eighths, or none; windows: i64[n, 4], x0, y0, width, height in pixels of each image as it is stored, zeros where it
// has no view.
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
