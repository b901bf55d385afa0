// The planes of JPEG files as they are stored: no chroma is interpolated, no colour converted. libjpeg's raw output,
// through the same library and the same state as jpeg_region.cpp. A JPEG engine's planes are compared with these.
//
// gpuload_jpeg_stored(files, n)   reads each Planes; its status says how that went
//
// In   data, size, plane, pitch, room, lenient
// Out  components, w, h (of each plane, samples, without the padding of the last blocks), status
#include "jpeg_region.cpp"

#include <cstring>
#include <vector>

#if defined(__LP64__) && (defined(__linux__) || defined(__APPLE__))

namespace {

struct Planes {               // PLANES_OF of gpuload/images/decode/libjpeg.py
  const unsigned char* data;  // encoded bytes
  int64_t size;
  unsigned char* plane[3];    // u8[h, w] each, null for a plane that is not wanted
  int64_t pitch[3];           // bytes from one row to the next
  int64_t room[3];            // bytes at plane
  int32_t w[3], h[3];
  int32_t components;         // 1 or 3
  int32_t lenient;            // 1: what libjpeg warns about is decoded all the same
  int32_t status;             // 0 read; 1 not a JPEG that this can read, wrong inside, or larger than the room
  int32_t reserved;
};
static_assert(sizeof(Planes) == 128, "Planes and PLANES_OF differ");

struct Size {  // of a component, behind its tables: members of libjpeg's jpeg_component_info
  int blocks_wide, blocks_high, dct, w, h;
};

const int RAW = 1;  // of Decompress::options
const int MOST = 4;  // a component's sampling factor

void ignore(Common*, int) {}

struct Rows {  // scratch memory of a thread: one row of MCUs
  std::vector<unsigned char> bytes[3];
  unsigned char* row[3][MOST * 8];
  unsigned char** of[3];
};

bool fits(const Planes& out, int c) {
  return !out.plane[c] ||
         (out.pitch[c] >= out.w[c] && out.pitch[c] * (out.h[c] - 1) + out.w[c] <= out.room[c]);
}

// May jump back to the caller's setjmp: nothing here has a destructor.
bool read_rows(Decompress& state, Planes& out, Rows& rows) {
  int tallest = 1;
  for (int c = 0; c < out.components; ++c) {
    Size size;
    std::memcpy(&size, state.comp_info[c].rest, sizeof size);
    const int high = state.comp_info[c].begin[3], pitch = size.blocks_wide * 8;
    out.w[c] = size.w, out.h[c] = size.h;
    if (size.dct != 8 || high > MOST || !fits(out, c)) return false;
    if (high > tallest) tallest = high;
    rows.bytes[c].resize((size_t)pitch * high * 8);
    rows.of[c] = rows.row[c];
    for (int y = 0; y < high * 8; ++y) rows.row[c][y] = rows.bytes[c].data() + (size_t)pitch * y;
  }
  for (int mcu = 0; state.output_scanline < state.output_height; ++mcu) {
    if (!jpeg.raw(&state, rows.of, (unsigned)tallest * 8)) return false;
    for (int c = 0; c < out.components; ++c) {
      const int count = state.comp_info[c].begin[3] * 8, first = mcu * count;
      for (int y = 0; y < count && first + y < out.h[c] && out.plane[c]; ++y)
        std::memcpy(out.plane[c] + out.pitch[c] * (first + y), rows.row[c][y], (size_t)out.w[c]);
    }
  }
  return true;
}

void read_planes(Decoder& found, Planes& out) {
  static thread_local Rows rows;
  Decompress& state = found.state;
  found.errors.emit_message = out.lenient ? ignore : complain;
  out.status = 1;
  if (!setjmp(found.back)) {
    jpeg.memory(&state, out.data, (unsigned long)out.size);
    found.forget();
    jpeg.header(&state, 1);
    out.components = state.num_components;
    if (out.components == 1 || out.components == 3) {
      state.options[RAW] = 1, state.out_color_space = state.jpeg_color_space;
      jpeg.start(&state);
      if (read_rows(state, out, rows)) out.status = 0;
    }
  }
  jpeg.abort(&state);
  found.errors.emit_message = complain;
}

}  // namespace

extern "C" int gpuload_jpeg_stored(Planes* files, int64_t count) {
  Decoder& found = decoder();
  if (!found.make()) return 3;
  for (int64_t i = 0; i < count; ++i) read_planes(found, files[i]);
  return 0;
}

#else
extern "C" int gpuload_jpeg_stored(void*, int64_t) { return 4; }
#endif
