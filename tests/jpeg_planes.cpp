// The planes of a JPEG file as they are stored, by the libjpeg that Pillow brings ("raw data"): what a hardware decoder
// gives. Blocks are whole, so beyond the real samples lies what the encoder padded them with.
//
// jpeg_planes(data, size, out, room, info)   0, 1 not decoded, 2 no room
//
// Out  out   the planes, one after the other
//      info  i32[1 + 3 * 5]: components; of each: offset, pitch, rows, columns (real ones), and h << 8 | v
#include "jpeg_region.cpp"

#include <algorithm>
#include <vector>

namespace {

struct Shape {  // of a Component: the members used, at their places in libjpeg's structure
  int id, index, h, v, tables[3];
  unsigned blocks_across, blocks_down;
  int scaled;
  unsigned width, height;
};

struct Raw {
  Decompress state{};
  Errors errors{};
  jmp_buf back;
};

}  // namespace

extern "C" int jpeg_planes(const unsigned char* data, int64_t size, unsigned char* out, int64_t room, int32_t* info) {
  typedef unsigned ReadRaw(Decompress*, unsigned char***, unsigned);
  Dl_info home;
  if (!dladdr((void*)jpeg.start, &home)) return 1;
  ReadRaw* read = (ReadRaw*)dlsym(dlopen(home.dli_fname, RTLD_NOW), "jpeg_read_raw_data");
  Raw raw;
  raw.state.common.err = jpeg.std_error(&raw.errors);
  raw.errors.error_exit = give_up, raw.errors.emit_message = complain;
  raw.state.common.client_data = &raw.back;
  if (!read || setjmp(raw.back)) return jpeg.destroy(&raw.state), 1;
  jpeg.create(&raw.state, VERSION, sizeof(Decompress));
  jpeg.memory(&raw.state, data, (unsigned long)size);
  jpeg.header(&raw.state, 1);
  raw.state.options[1] = 1;  // raw_data_out
  jpeg.start(&raw.state);
  const int count = info[0] = raw.state.num_components;
  static std::vector<unsigned char*> rows[3];  // static, as a jump would not destroy them
  int most = 1;
  int64_t used = 0;
  for (int c = 0; c < count; ++c) {
    const Shape& shape = *(const Shape*)&raw.state.comp_info[c];
    const int pitch = (int)shape.blocks_across * 8 + 64, down = ((int)shape.blocks_down + 4) * 8;
    const int32_t found[5] = {(int32_t)used, pitch, (int32_t)shape.height, (int32_t)shape.width, shape.h << 8 | shape.v};
    std::copy(found, found + 5, info + 1 + 5 * c);
    rows[c].clear();
    for (int y = 0; y < down; ++y) rows[c].push_back(out + used + (int64_t)y * pitch);
    used += (int64_t)pitch * down;
    most = std::max(most, shape.v);
  }
  if (used > room) return jpeg.destroy(&raw.state), 2;
  for (int band = 0; raw.state.output_scanline < raw.state.output_height; ++band) {
    unsigned char** at[3];
    for (int c = 0; c < count; ++c) at[c] = rows[c].data() + 8 * band * ((const Shape*)&raw.state.comp_info[c])->v;
    if (!read(&raw.state, at, 8 * most)) return jpeg.destroy(&raw.state), 1;
  }
  jpeg.destroy(&raw.state);
  return 0;
}
