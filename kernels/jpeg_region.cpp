// Decodes only the pixels that a crop needs, with the libjpeg-turbo that Pillow brings, through a C interface for ctypes
// (so callers hold no GIL). Rows above the window are only entropy-decoded, columns beside it are not transformed,
// rows below it are not read; what is inside equals a whole decode bit for bit. The library is given at run time: there
// is nothing to link with, and no header to have. Of baseline files jpeg_huffman.h decodes the coefficients.
//
// gpuload_jpeg_open(path)         0 if the library at `path` has libjpeg 6.2's interface and the calls used here
// gpuload_jpeg_read(parts, n)     decodes each Part; its status says how that went
#include <csetjmp>
#include <cstddef>
#include <cstdint>

#if defined(__LP64__) && (defined(__linux__) || defined(__APPLE__))
#include <dlfcn.h>

#include "jpeg_huffman.h"

namespace {

struct Part {                // PART of gpuload/images/decode/libjpeg.py
  const unsigned char* data; // encoded bytes
  int64_t size;              // of data
  unsigned char* out;        // u8[h, w, channels]
  int64_t room;              // bytes at out
  int32_t x, y, w, h;        // the window wanted, in pixels of the scaled image; x and w leave as what was decoded
  int32_t channels;          // 1 gray, 3 RGB
  int32_t eighths;           // scale: 8 is the image's own size; 4, 2, 1 halve it again and again in the DCT
  int32_t status;            // 0 decoded, 1 not a JPEG this can read, or anything wrong with it: decode it otherwise
  int32_t theirs;            // 1: libjpeg is to decode the coefficients; leaves as who did
  int32_t orientation, whole_w, whole_h, reserved;  // of the image, for slice_cpu.cpp
};
static_assert(sizeof(Part) == 80, "Part and PART differ");

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
struct Decompress;
struct Source {
  const unsigned char* next_input_byte;
  size_t bytes_in_buffer;
};
struct Component {
  int begin[4], quant_tbl_no, dc_tbl_no, ac_tbl_no;
  char rest[96 - 28];
};
struct Quantization {
  unsigned short values[64];
};
struct Entropy {
  void* start_pass;
  int (*decode_mcu)(Decompress*, short (**)[64]);
};
struct Decompress {
  Common common;
  Source* src;
  unsigned image_width, image_height;
  int num_components, jpeg_color_space, out_color_space;
  unsigned scale_num, scale_denom;
  double output_gamma;
  int options[12];
  unsigned output_width, output_height;
  int out_color_components, output_components, rec_outbuf_height, actual_number_of_colors;
  void* colormap;
  unsigned output_scanline, counters[4];
  void* coef_bits;
  Quantization* quantization[4];
  huffman::Spec *dc[4], *ac[4];
  int data_precision;
  Component* comp_info;
  int progressive_mode, arith_code;
  unsigned char arithmetic[48];
  unsigned restart_interval;
  char markers[432 - 372];
  int comps_in_scan;
  Component* cur_comp_info[4];
  unsigned MCUs_per_row, MCU_rows_in_scan;
  int blocks_in_MCU, MCU_membership[10];
  char rest[592 - 524];
  Entropy* entropy;
  void* last[4];
};
static_assert(sizeof(Decompress) == 632 && offsetof(Decompress, output_scanline) == 168 &&
                  offsetof(Decompress, dc) == 232 && offsetof(Decompress, progressive_mode) == 312 &&
                  offsetof(Decompress, restart_interval) == 368 && offsetof(Decompress, comps_in_scan) == 432 &&
                  offsetof(Decompress, blocks_in_MCU) == 480 && offsetof(Decompress, entropy) == 592,
              "libjpeg 6.2 on LP64");
const int GRAY = 1, RGB = 2, VERSION = 62, ROWS = 8;
const unsigned char MARK = 255;

struct Library {
  Errors* (*std_error)(Errors*);
  void (*create)(Decompress*, int, size_t);
  void (*memory)(Decompress*, const unsigned char*, unsigned long);
  int (*header)(Decompress*, int);
  int (*start)(Decompress*);
  void (*crop)(Decompress*, unsigned*, unsigned*);
  unsigned (*skip)(Decompress*, unsigned);
  unsigned (*read)(Decompress*, unsigned char**, unsigned);
  unsigned (*raw)(Decompress*, unsigned char***, unsigned);  // for jpeg_stored.cpp
  void (*abort)(Decompress*);
  void (*destroy)(Decompress*);
} jpeg;

void give_up(Common* state) { longjmp(*(jmp_buf*)state->client_data, 1); }

void complain(Common* state, int level) {
  if (level < 0) give_up(state);  // a warning: corrupt data
}

int decode_mcu(Decompress* state, short (**blocks)[64]);

struct Decoder {  // one a thread, kept: its tables are as large as a small image
  Decompress state{};
  Errors errors{};
  jmp_buf back;
  huffman::Scan scan;
  int (*theirs)(Decompress*, short (**)[64]) = nullptr;
  bool made = false, lacking = false;  // lacking: of this state tables were taken away

  bool make() {
    if (made && !lacking) return true;
    if (made) jpeg.destroy(&state);
    made = lacking = false;
    state = Decompress{};
    state.common.err = jpeg.std_error(&errors);
    errors.error_exit = give_up, errors.emit_message = complain;
    state.common.client_data = &back;  // which jpeg_CreateDecompress keeps
    if (setjmp(back)) return false;  // another version, or a structure of another size
    jpeg.create(&state, VERSION, sizeof(Decompress));
    return made = true;
  }

  void read(Part& part) {
    part.status = 1;
    if (!make()) return;
    if (setjmp(back)) return jpeg.abort(&state);
    jpeg.memory(&state, part.data, (unsigned long)part.size);
    forget();
    jpeg.header(&state, 1);
    for (int i = 0; i < state.num_components; ++i) {
      const int table = state.comp_info[i].quant_tbl_no;
      if (table < 0 || table > 3 || !state.quantization[table] || !state.quantization[table]->values[0])
        return jpeg.abort(&state);
    }
    for (int i = 0; i < 4; ++i) lacking |= lacks(state.dc[i]) | lacks(state.ac[i]);
    state.out_color_space = part.channels == 1 ? GRAY : RGB;
    state.scale_num = part.eighths, state.scale_denom = 8;
    jpeg.start(&state);
    if (!part.theirs && baseline()) state.entropy->decode_mcu = decode_mcu;
    else part.theirs = 1;
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

  // libjpeg keeps the tables of one file for the next, which may lack them. So each is marked, in a byte that reading a
  // table clears, and Huffman tables that still bear the mark behind the header are taken away: to a state without tables
  // 0 or 1 libjpeg gives the standard ones (frames of Motion JPEG), as it does for Pillow, and refuses the others. The
  // next file gets a new state: 10 µs, hence not for every file.
  void forget() {
    for (int i = 0; i < 4; ++i) {
      if (state.dc[i]) state.dc[i]->bits[0] = MARK;
      if (state.ac[i]) state.ac[i]->bits[0] = MARK;
      if (state.quantization[i]) *state.quantization[i] = Quantization{};
    }
  }

  static bool lacks(huffman::Spec*& table) {
    if (!table || table->bits[0] != MARK) return false;
    table = nullptr;
    return true;
  }

  // Whether our own Huffman decoder is ready for the scan that begins.
  bool baseline() {
    if (state.entropy->decode_mcu != theirs) {  // proves once that it is where it is thought to be
      Dl_info ours, found;
      if (!dladdr((void*)state.entropy->decode_mcu, &found) || !dladdr((void*)jpeg.start, &ours)) return false;
      if (found.dli_fbase != ours.dli_fbase) return false;
      theirs = state.entropy->decode_mcu;
    }
    if (state.progressive_mode || state.arith_code || state.data_precision != 8) return false;
    if (state.comps_in_scan != state.num_components || state.blocks_in_MCU > 10) return false;
    scan.blocks = state.blocks_in_MCU, scan.interval = (int)state.restart_interval;
    for (int i = 0; i < scan.blocks; ++i) {
      const int c = scan.component[i] = state.MCU_membership[i];
      const int dc = state.cur_comp_info[c]->dc_tbl_no, ac = state.cur_comp_info[c]->ac_tbl_no;
      if (dc < 0 || dc > 3 || ac < 0 || ac > 3 || !state.dc[dc] || !state.ac[ac]) return false;
      if (!scan.dc[dc].make(*state.dc[dc]) || !scan.ac[ac].make(*state.ac[ac])) return false;
      scan.dc_of[i] = &scan.dc[dc], scan.ac_of[i] = &scan.ac[ac];
    }
    return scan.begin(state.src->next_input_byte, state.src->bytes_in_buffer);
  }

  ~Decoder() {
    if (made) jpeg.destroy(&state);
  }
};

int decode_mcu(Decompress* state, short (**blocks)[64]) {
  huffman::Scan& scan = ((Decoder*)state)->scan;  // its first member
  if (!(blocks ? scan.mcu<true>(blocks) : scan.mcu<false>(blocks))) give_up(&state->common);
  return 1;
}

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
                    (void**)&found.abort,     (void**)&found.destroy, (void**)&found.raw};
  const char* names[] = {"jpeg_std_error",        "jpeg_CreateDecompress", "jpeg_mem_src",        "jpeg_read_header",
                         "jpeg_start_decompress", "jpeg_crop_scanline",    "jpeg_skip_scanlines", "jpeg_read_scanlines",
                         "jpeg_abort_decompress", "jpeg_destroy_decompress", "jpeg_read_raw_data"};
  for (int i = 0; i < 11; ++i)
    if (!(*slots[i] = dlsym(library, names[i]))) return 2;
  jpeg = found;
  return decoder().make() ? 0 : 3;
}

extern "C" int gpuload_jpeg_read(Part* parts, int64_t count) {
  Decoder& found = decoder();
  for (int64_t i = 0; i < count; ++i) found.read(parts[i]);
  return 0;
}

#else
extern "C" int gpuload_jpeg_open(const char*) { return 4; }
extern "C" int gpuload_jpeg_read(void*, int64_t) { return 4; }
#endif
