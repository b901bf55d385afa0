// What files say of themselves, read without decoding anything, through a C interface for ctypes (callers hold no GIL).
//
// gpuload_headers(at, size, n, out)   reads n files, bytes [at[i], at[i] + size[i]) each, into out[i]
//
// Nothing outside these bytes is read, and nothing is allocated. The plain Python twin it is tested against, byte for
// byte of the table, is `read_twin` of gpuload/images/headers.py; a rule changed here is changed there.
//
// JPEG: markers are read as libjpeg-turbo reads them (jdmarker.c), up to the first scan. Where it would give the file
// up before that (a frame of no pixels, a second frame, a segment of a wrong length, the end of the file), the header
// says kind, end and `ask` alone: Pillow, which carries libjpeg, then has the last word. What only decoding refuses
// (12 bits, processes it does not know, tables that are missing) is told as it stands.
// Pillow has a reader of its own before libjpeg's. It stops at FF01 before the scan, goes on behind a second start
// marker, an end marker and FFF0 to FFFD, and takes the size of the last frame: it differs in files that one of the two
// refuses, so where it opens a file and libjpeg decodes it, size and orientation here are Pillow's.
#include <cstdint>
#include <cstring>

namespace {

struct Header {  // HEADER of gpuload/images/__init__.py, which says what each member means
  int32_t height, width, restart;
  uint8_t kind, orientation, channels, precision, process, components, scan, end, jfif, adobe, colour, ask;
  uint8_t dc, ac, quantisation, id[4], h[4], v[4], table[4], reserved;
};
static_assert(sizeof(Header) == 44, "HEADER has 44 bytes");

enum Kind : uint8_t { NONE, JPEG, PNG, GIF, BMP, TIFF, JPEG2000, QOI, WEBP, AVIF, PNM };  // KINDS
enum Colour : uint8_t { GRAY = 1, YCBCR, RGB, OTHER };
const uint8_t WITHOUT = 255;     // process of a JPEG file whose frame could not be read
const int64_t PADDING = 4094;    // bytes that may follow the end of a file and still be called padding
const int ABSENT = 0, ASK = -1;  // answers of `orientation_of` beside 1 to 8

struct Bytes {
  const unsigned char* at;
  int64_t size;

  unsigned char operator[](int64_t i) const { return at[i]; }
  unsigned u16(int64_t i) const { return at[i] << 8 | at[i + 1]; }
  uint32_t u32(int64_t i) const { return (uint32_t)u16(i) << 16 | u16(i + 2); }
  Bytes part(int64_t start, int64_t length) const { return {at + start, length}; }

  bool has(int64_t i, const char* text, int64_t length) const {
    return i >= 0 && i + length <= size && !memcmp(at + i, text, (size_t)length);
  }
  template <int N>
  bool has(int64_t i, const char (&text)[N]) const { return has(i, text, N - 1); }

  int64_t find(const char* text, int64_t length, int64_t start) const {  // -1 where it is not
    for (int64_t i = start; i + length <= size; ++i) {
      const void* next = memchr(at + i, text[0], (size_t)(size - length + 1 - i));
      if (!next) return -1;
      i = (const unsigned char*)next - at;
      if (has(i, text, length)) return i;
    }
    return -1;
  }
  template <int N>
  bool holds(const char (&text)[N]) const { return find(text, N - 1, 0) >= 0; }
};

bool is_space(unsigned char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

Kind sniff(const Bytes& file) {
  if (file.has(0, "\xff\xd8\xff")) return JPEG;
  if (file.has(0, "\x89PNG\r\n\x1a\n")) return PNG;
  if (file.has(0, "GIF8")) return GIF;
  if (file.has(0, "BM")) return BMP;
  if (file.has(0, "II*\0") || file.has(0, "MM\0*")) return TIFF;
  if (file.has(0, "\0\0\0\x0cjP  \r\n\x87\n") || file.has(0, "\xff\x4f\xff\x51")) return JPEG2000;
  if (file.has(0, "qoif")) return QOI;
  if (file.has(0, "RIFF") && file.has(8, "WEBP")) return WEBP;
  const bool brand = file.has(8, "avif") || file.has(8, "avis") || file.has(8, "mif1") || file.has(8, "heic");
  if (file.has(4, "ftyp") && brand) return AVIF;
  if (file.size > 2 && file[0] == 'P' && file[1] >= '1' && file[1] <= '6' && is_space(file[2])) return PNM;
  return NONE;
}

// Where the file ends, padding aside. GPU decoders fill up what is missing of a cut file with gray, and who stops below
// a crop never comes to the cut: hence the question whether the end marker is there.
int64_t without_padding(const Bytes& file) {
  int64_t end = file.size;
  while (end > 0 && file.size - end < PADDING) {
    const unsigned char c = file[end - 1];
    if (c != 0 && c != '\t' && c != '\n' && c != '\r' && c != ' ') break;
    --end;
  }
  return end;
}

// --- EXIF ---

const int TAG = 0x0112, SHORT = 3;
const int BYTES_OF[17] = {0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8};  // of one value, by TIFF type; 0 unknown

// Of a TIFF structure in which all is as it should be (TIFF 6.0, section 2: byte order, 42, offset of the directory;
// there a count and entries of 12 bytes). ASK for any other, and where the tag stands twice with two values: versions
// of Pillow differ.
int orientation_of(const Bytes& tiff) {
  const bool big = tiff.has(0, "MM\0*");
  if (tiff.size < 10 || (!big && !tiff.has(0, "II*\0"))) return ASK;
  auto u16 = [&](int64_t i) -> unsigned { return big ? tiff.u16(i) : tiff[i] | tiff[i + 1] << 8; };
  auto u32 = [&](int64_t i) -> uint32_t { return big ? tiff.u32(i) : u16(i) | (uint32_t)u16(i + 2) << 16; };
  const int64_t start = u32(4);
  if (start + 2 > tiff.size) return ASK;
  const int64_t stop = start + 2 + 12 * (int64_t)u16(start);
  if (stop > tiff.size) return ASK;
  int found = ABSENT;
  int64_t elsewhere = 0;  // bytes of values that do not fit into their entries
  for (int64_t entry = start + 2; entry < stop; entry += 12) {
    const unsigned tag = u16(entry), type = u16(entry + 2);
    const int64_t count = u32(entry + 4), value = u32(entry + 8);
    if (tag == TAG) {
      const int given = (int)u16(entry + 8), valid = given >= 1 && given <= 8 ? given : 1;
      if (type != SHORT || count != 1 || (found != ABSENT && found != valid)) return ASK;
      found = valid;
    } else if (found == ABSENT) {  // Pillow stops at the first value that is not there
      const int64_t size = count * (type < 17 ? BYTES_OF[type] : 0);
      elsewhere += size;
      if (size > 4 && (value + size > tiff.size || elsewhere > tiff.size)) return ASK;
    }
  }
  return found;
}

// Whether XMP data turn the image, by the first `tiff:Orientation="6` or `tiff:Orientation>6`: Pillow looks there where
// EXIF data have no orientation.
bool turns(const Bytes& xmp) {
  const char name[] = "tiff:Orientation";
  const int64_t length = sizeof name - 1;
  for (int64_t i = 0; (i = xmp.find(name, length, i)) >= 0;) {
    i += length;
    const int64_t digit = i + (xmp.has(i, "=\"") ? 2 : xmp.has(i, ">") ? 1 : xmp.size);
    if (digit < xmp.size && xmp[digit] >= '0' && xmp[digit] <= '9') return xmp[digit] >= '2' && xmp[digit] <= '8';
  }
  return false;
}

// --- JPEG ---

struct Jpeg {
  const Bytes& file;
  Header& out;
  Bytes exif{nullptr, 0}, xmp{nullptr, 0};  // the first segment of the one, the last of the other
  int64_t at = 2;                           // behind the start marker

  // 0 at the end of the file. Garbage before a marker and fill bytes are passed over, as libjpeg does.
  int next_marker() {
    while (at < file.size) {
      const void* next = memchr(file.at + at, 0xFF, (size_t)(file.size - at));
      if (!next) return 0;
      at = (const unsigned char*)next - file.at;
      while (at < file.size && file[at] == 0xFF) ++at;
      if (at < file.size && file[at++]) return file[at - 1];
    }
    return 0;
  }

  // Everything up to the first scan; false where libjpeg gives the file up. Then `at` is where the scan's data begin.
  bool read() {
    for (;;) {
      const int marker = next_marker();
      if (marker == 0x01 || (marker >= 0xD0 && marker <= 0xD7)) continue;  // they have no length
      if (!marker || at + 2 > file.size) return false;
      const int64_t length = (int64_t)file.u16(at) - 2;  // below 0: refused by all that have a content
      const Bytes segment = file.part(at + 2, length);
      at += 2 + (length > 0 ? length : 0);
      if (at > file.size) return false;
      if (marker == 0xDA) return scan(segment);
      if (!take(marker, segment)) return false;
    }
  }

  bool take(int marker, const Bytes& segment) {
    if (marker == 0xC4) return huffman(segment);
    if (marker == 0xCC) return conditioning(segment);
    if (marker == 0xDB) return quantisation(segment);
    if (marker == 0xDD) return restart(segment);
    if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC8) return frame(marker & 15, segment);
    if (marker >= 0xE0 && marker <= 0xEF) application(marker & 15, segment);
    else if (marker != 0xDC && marker != 0xFE) return false;  // DNL and comments are passed over
    return true;
  }

  bool frame(int process, const Bytes& segment) {
    if (out.process != WITHOUT || segment.size < 6 || segment.size != 6 + 3 * segment[5]) return false;
    out.process = (uint8_t)process, out.precision = segment[0];
    out.height = (int32_t)segment.u16(1), out.width = (int32_t)segment.u16(3), out.components = segment[5];
    if (!out.height || !out.width || !out.components || out.components > 10) return false;
    for (int i = 0; i < out.components; ++i) {
      const unsigned char *c = segment.at + 6 + 3 * i, h = c[1] >> 4, v = c[1] & 15;
      if (h < 1 || h > 4 || v < 1 || v > 4) return false;
      if (i < 4) out.id[i] = c[0], out.h[i] = h, out.v[i] = v, out.table[i] = c[2];
    }
    frame_ids = segment.at + 6;
    return true;
  }
  const unsigned char* frame_ids = nullptr;

  // Ids are looked up as libjpeg does it, files whose components share one among them.
  bool scan(const Bytes& segment) {
    if (out.process == WITHOUT || segment.size < 1) return false;
    const int n = segment[0], of_frame = out.components < 4 ? out.components : 4;
    if (n < 1 || n > 4 || segment.size != 4 + 2 * n) return false;
    int chosen[4] = {-1, -1, -1, -1};
    for (int i = 0; i < n; ++i) {
      int c = 0;
      while (c < of_frame && !(segment[1 + 2 * i] == frame_ids[3 * c] && chosen[c] < 0)) ++c;
      if (c == of_frame) return false;
      for (int k = 0; k < i; ++k)
        if (chosen[k] == c) return false;
      chosen[i] = c;
    }
    out.scan = (uint8_t)n;
    return true;
  }

  bool huffman(const Bytes& segment) {
    int64_t i = 0, left = segment.size;
    while (left > 16) {
      int64_t count = 0;
      for (int k = 1; k <= 16; ++k) count += segment[i + k];
      left -= 17;
      const int index = segment[i] & ~0x10;
      if (count > 256 || count > left || index > 3) return false;
      (segment[i] & 0x10 ? out.ac : out.dc) |= (uint8_t)(1 << index);
      left -= count, i += 17 + count;
    }
    return left == 0;
  }

  bool quantisation(const Bytes& segment) {
    int64_t i = 0;
    while (i < segment.size) {
      const int index = segment[i] & 15;
      if (index > 3) return false;
      out.quantisation |= (uint8_t)(1 << index);
      i += segment[i] >> 4 ? 129 : 65;
    }
    return i == segment.size;
  }

  bool conditioning(const Bytes& segment) {  // of arithmetic coding
    if (segment.size < 0 || segment.size % 2) return false;
    for (int64_t i = 0; i < segment.size; i += 2) {
      const int index = segment[i], value = segment[i + 1];
      if (index > 31 || (index < 16 && (value & 15) > value >> 4)) return false;
    }
    return true;
  }

  bool restart(const Bytes& segment) {
    if (segment.size != 2) return false;
    out.restart = (int32_t)segment.u16(0);
    return true;
  }

  void application(int number, const Bytes& segment) {
    if (number == 0 && segment.size >= 14 && segment.has(0, "JFIF\0")) out.jfif = 1;
    if (number == 14 && segment.size >= 12 && segment.has(0, "Adobe"))
      out.adobe = segment[11] < 254 ? segment[11] + 1 : 255;
    if (number != 1) return;
    if (!exif.at && segment.has(0, "Exif\0\0")) exif = segment.part(6, segment.size - 6);
    if (segment.has(0, "http://ns.adobe.com/xap/1.0/\0")) xmp = segment.part(29, segment.size - 29);
  }

  Colour colour() const {  // default_decompress_parms of libjpeg-turbo's jdapimin.c
    const uint8_t* id = out.id;
    const bool lossless = out.process == 3 || out.process == 11;
    if (out.components == 1) return GRAY;
    if (out.components != 3) return OTHER;
    if (out.jfif) return YCBCR;
    if (out.adobe) return out.adobe == 1 ? RGB : YCBCR;
    if (id[0] == 'R' && id[1] == 'G' && id[2] == 'B') return RGB;
    return lossless ? RGB : YCBCR;
  }

  void metadata() {
    const int found = exif.at ? orientation_of(exif) : ABSENT;
    out.ask = found == ASK || (found == ABSENT && turns(xmp));
    if (found > 0) out.orientation = (uint8_t)found;
  }

  uint8_t end() const {
    const int64_t last = without_padding(file) - 2;
    if (last >= at && file.has(last, "\xff\xd9")) return 2;
    return file.find("\xff\xd9", 2, at) >= 0;
  }
};

void read_jpeg(const Bytes& file, Header& out) {
  out.process = WITHOUT;
  Jpeg jpeg{file, out};
  if (jpeg.read()) {
    out.colour = jpeg.colour(), out.channels = out.colour == GRAY ? 1 : 3;
    jpeg.metadata();
    out.end = jpeg.end();
    return;
  }
  out = Header{};
  out.kind = JPEG, out.orientation = 1, out.process = WITHOUT, out.ask = 1;
  out.end = file.has(without_padding(file) - 2, "\xff\xd9") ? 2 : 0;
}

// --- PNG ---

bool is_word(const unsigned char* name) {
  for (int i = 0; i < 4; ++i) {
    const unsigned char c = name[i], letter = c | 0x20;
    if (!((letter >= 'a' && letter <= 'z') || (c >= '0' && c <= '9') || c == '_')) return false;
  }
  return true;
}

// Whether Pillow's `getexif` may take an orientation from the chunk.
bool may_turn(const Bytes& file, int64_t name, const Bytes& content) {
  if (file.has(name, "eXIf")) return true;
  if (!file.has(name, "tEXt") && !file.has(name, "zTXt") && !file.has(name, "iTXt")) return false;
  const int64_t end = content.find("\0", 1, 0);
  const Bytes keyword = content.part(0, end < 0 ? content.size : end);
  return keyword.holds("exif") || keyword.holds("xmp");
}

bool png_frame(const Bytes& ihdr, Header& out) {
  const int depth = ihdr[8], type = ihdr[9];
  const int depths = type == 0 ? 31 : type == 3 ? 15 : type == 2 || type == 4 || type == 6 ? 24 : 0;  // their sum
  const uint32_t width = ihdr.u32(0), height = ihdr.u32(4);
  if (!(depth & depths) || depth & (depth - 1)) return false;
  if (!width || !height || width > INT32_MAX || height > INT32_MAX) return false;
  out.width = (int32_t)width, out.height = (int32_t)height, out.precision = (uint8_t)depth;
  out.channels = type == 0 || (type == 4 && depth == 8) ? 1 : 3;  // 16 bits of gray and alpha are RGBA to Pillow
  return true;
}

// Chunks are walked to the last, as metadata may follow the pixels.
void read_png(const Bytes& file, Header& out) {
  bool known = false;
  for (int64_t at = 8; at + 12 <= file.size;) {
    const int64_t length = file.u32(at), name = at + 4;
    if (length > file.size - 12 - at || !is_word(file.at + name)) break;
    const Bytes content = file.part(at + 8, length);
    if (file.has(name, "IHDR")) known = at == 8 && length >= 13 && png_frame(content, out);
    if (may_turn(file, name, content)) out.ask = 1;
    at += 12 + length;
    if (file.has(name, "IEND")) {
      out.end = without_padding(file) <= at ? 2 : 1;
      break;
    }
  }
  if (known) return;
  out.height = out.width = 0, out.precision = out.channels = 0;
  out.ask = 1;
}

}  // namespace

extern "C" void gpuload_headers(const uint64_t* at, const int64_t* size, int64_t n, Header* out) {
  for (int64_t i = 0; i < n; ++i) {
    Header& header = out[i] = Header{};
    header.orientation = 1;
    if (!at[i] || size[i] <= 0) continue;
    const Bytes file{(const unsigned char*)(uintptr_t)at[i], size[i]};
    header.kind = sniff(file);
    if (header.kind == JPEG) read_jpeg(file, header);
    else if (header.kind == PNG) read_png(file, header);
    else header.ask = 1;
  }
}
