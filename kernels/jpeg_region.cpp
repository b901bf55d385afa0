// Decodes only the pixels that a crop needs, with the libjpeg-turbo that Pillow brings, through a C interface for ctypes
// (so callers hold no GIL). Rows above the window are only entropy-decoded, columns beside it are not transformed,
// rows below it are not read; what is inside equals a whole decode bit for bit. The library is given at run time: there
// is nothing to link with, and no header to have.
//
// gpuload_jpeg_open(path)         0 if the library at `path` has libjpeg 6.2's interface and the calls used here
// gpuload_jpeg_read(parts, n)     decodes each Part; its status says how that went
#include <csetjmp>
#include <cstddef>
#include <cstdint>

#if defined(__LP64__) && (defined(__linux__) || defined(__APPLE__))
#include <dlfcn.h>

namespace {

struct Part {                // PART of gpuload/decode/region.py
  const unsigned char* data; // encoded bytes
  int64_t size;              // of data
  unsigned char* out;        // u8[h, w, channels]
  int64_t room;              // bytes at out
  int32_t x, y, w, h;        // the window wanted, in pixels of the scaled image; x and w leave as what was decoded
  int32_t channels;          // 1 gray, 3 RGB
  int32_t eighths;           // scale: 8 is the image's own size; 4, 2, 1 halve it again and again in the DCT
  int32_t status;            // 0 decoded, 1 not a JPEG this can read, or anything wrong with it: decode it otherwise
  int32_t reserved;
};

// libjpeg's binary interface, version 6.2 on LP64: the members used here, at their places.
struct Common;
struct Errors {
  void (*error_exit)(Common*);
  void (*emit_message)(Common*, int);
  char rest[168 - 16];
};
struct Common {
  Errors* err;
  void *mem, *progress, *client_data;
  int is_decompressor, global_state;
};
struct Decompress {
  Common common;
  void* src;
  unsigned image_width, image_height;
  int num_components, jpeg_color_space, out_color_space;
  unsigned scale_num, scale_denom;
  double output_gamma;
  int options[12];
  unsigned output_width, output_height;
  int out_color_components, output_components, rec_outbuf_height, actual_number_of_colors;
  void* colormap;
  unsigned output_scanline;
  char rest[632 - 172];
};
static_assert(sizeof(Decompress) == 632 && offsetof(Decompress, output_scanline) == 168, "libjpeg 6.2 on LP64");
const int GRAY = 1, RGB = 2, VERSION = 62, ROWS = 8;

struct Library {
  Errors* (*std_error)(Errors*);
  void (*create)(Decompress*, int, size_t);
  void (*memory)(Decompress*, const unsigned char*, unsigned long);
  int (*header)(Decompress*, int);
  int (*start)(Decompress*);
  void (*crop)(Decompress*, unsigned*, unsigned*);
  unsigned (*skip)(Decompress*, unsigned);
  unsigned (*read)(Decompress*, unsigned char**, unsigned);
  void (*abort)(Decompress*);
  void (*destroy)(Decompress*);
} jpeg;

void give_up(Common* state) { longjmp(*(jmp_buf*)state->client_data, 1); }

void complain(Common* state, int level) {
  if (level < 0) give_up(state);  // a warning: corrupt data
}

struct Decoder {  // one a thread, kept: its tables are as large as a small image
  Decompress state{};
  Errors errors{};
  jmp_buf back;
  bool made = false;

  bool make() {
    if (made) return true;
    state.common.err = jpeg.std_error(&errors);
    errors.error_exit = give_up, errors.emit_message = complain;
    state.common.client_data = &back;  // which jpeg_CreateDecompress keeps
    if (setjmp(back)) return false;  // another version, or a structure of another size
    jpeg.create(&state, VERSION, sizeof(Decompress));
    return made = true;
  }

  void read(Part& part) {
    part.status = 1;
    if (setjmp(back)) return jpeg.abort(&state);
    jpeg.memory(&state, part.data, (unsigned long)part.size);
    jpeg.header(&state, 1);
    state.out_color_space = part.channels == 1 ? GRAY : RGB;
    state.scale_num = part.eighths, state.scale_denom = 8;
    jpeg.start(&state);
    unsigned x = part.x, w = part.w, y = part.y, end = y + part.h;
    if (x + w > state.output_width || end > state.output_height || state.output_components != part.channels)
      return jpeg.abort(&state);
    if (w < state.output_width) jpeg.crop(&state, &x, &w);  // to the left as far as a block begins
    const int64_t pitch = (int64_t)w * part.channels;
    if (pitch * part.h > part.room) return jpeg.abort(&state);
    if (y) jpeg.skip(&state, y);
    while (state.output_scanline < end) {
      unsigned char* rows[ROWS];
      unsigned n = 0;
      for (; n < ROWS && state.output_scanline + n < end; ++n) rows[n] = part.out + pitch * (state.output_scanline + n - y);
      if (!jpeg.read(&state, rows, n)) return jpeg.abort(&state);
    }
    jpeg.abort(&state);  // the rest is not needed
    part.x = (int32_t)x, part.w = (int32_t)w, part.status = 0;
  }

  ~Decoder() {
    if (made) jpeg.destroy(&state);
  }
};

Decoder& decoder() {
  static thread_local Decoder found;
  return found;
}

}  // namespace

extern "C" int gpuload_jpeg_open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return 1;
  Library found;
  void** slots[] = {(void**)&found.std_error, (void**)&found.create, (void**)&found.memory, (void**)&found.header,
                    (void**)&found.start,     (void**)&found.crop,   (void**)&found.skip,   (void**)&found.read,
                    (void**)&found.abort,     (void**)&found.destroy};
  const char* names[] = {"jpeg_std_error",        "jpeg_CreateDecompress", "jpeg_mem_src",        "jpeg_read_header",
                         "jpeg_start_decompress", "jpeg_crop_scanline",    "jpeg_skip_scanlines", "jpeg_read_scanlines",
                         "jpeg_abort_decompress", "jpeg_destroy_decompress"};
  for (int i = 0; i < 10; ++i)
    if (!(*slots[i] = dlsym(library, names[i]))) return 2;
  jpeg = found;
  return decoder().make() ? 0 : 3;
}

extern "C" int gpuload_jpeg_read(Part* parts, int64_t count) {
  Decoder& found = decoder();
  if (!found.make()) return 3;
  for (int64_t i = 0; i < count; ++i) found.read(parts[i]);
  return 0;
}

#else
extern "C" int gpuload_jpeg_open(const char*) { return 4; }
extern "C" int gpuload_jpeg_read(void*, int64_t) { return 4; }
#endif
