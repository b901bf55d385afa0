// A libnvjpeg for machines without a GPU: the functions that gpuload calls, on memory of the host, with the planes of
// Pillow's libjpeg and nvJPEG's own status codes. What an H100 was seen to do is kept: a call with an image that the
// engine does not take fails as a whole and writes nothing; damage inside the entropy-coded data is no failure.
//
// Work is put on a stream and done when something comes after it there (standin_run) or somebody waits for it
// (standin_wait), so that whoever reads too early finds what was there before. Only the wait frees a state. The rules of the library are checked, and breaking one is noted (standin_broken):
//   a state that is busy is not called, initialised or destroyed        the images of a call have one sampling
//   every call has as many images as the state was initialised for      planes are as wide as their pitches say
//   the encoded bytes are the same when the wait ends                    no two images share memory
#include "jpeg_stored.cpp"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

enum Status { SUCCESS, NOT_INITIALIZED, INVALID, BAD_JPEG, NOT_SUPPORTED, ALLOCATOR, EXECUTION, ARCH_MISMATCH };
enum Format { YUV = 1, LUMA = 2 };
const int HARDWARE = 3;

struct Image {  // nvjpegImage_t
  unsigned char* channel[4];
  size_t pitch[4];
};

struct Info {  // what a header says
  int status = BAD_JPEG, process = -1, precision = 0, width = 0, height = 0, components = 0, scan = 0;
  int h[3] = {0, 0, 0}, v[3] = {0, 0, 0};

  bool engine() const {
    if (status || process != 0 || precision != 8 || scan != components) return false;
    if (components == 1) return true;
    const bool chroma = components == 3 && h[1] == 1 && v[1] == 1 && h[2] == 1 && v[2] == 1;
    return chroma && h[0] <= 2 && v[0] <= 2;  // 4:1:1 and 4:1:0 are not supported
  }
  int wide(int c) const { return c ? (width + h[0] - 1) / h[0] : width; }
  int high(int c) const { return c ? (height + v[0] - 1) / v[0] : height; }
  int sampling() const { return components == 1 ? 0 : h[0] * 16 + v[0]; }
};

Info parse(const unsigned char* p, size_t size) {
  Info found;
  if (size < 4 || p[0] != 0xff || p[1] != 0xd8) return found;
  for (size_t at = 2; at + 4 <= size && p[at] == 0xff;) {
    const int marker = p[at + 1];
    const size_t length = p[at + 2] << 8 | p[at + 3];
    const unsigned char* s = p + at + 4;
    if (at + 2 + length > size) return found;
    if (marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc) {
      found.process = marker - 0xc0, found.precision = s[0], found.components = s[5];
      found.height = s[1] << 8 | s[2], found.width = s[3] << 8 | s[4];
      for (int c = 0; c < std::min(found.components, 3); ++c) found.h[c] = s[7 + 3 * c] >> 4, found.v[c] = s[7 + 3 * c] & 15;
    }
    if (marker == 0xda) {
      found.scan = s[0];
      if (found.process >= 0) found.status = SUCCESS;
      return found;
    }
    at += 2 + length;
  }
  return found;
}

struct Handle {};
struct Query {
  Info info;
};
struct State {
  Handle* of;
  int size = 0, format = 0;
  bool busy = false;
};
struct Item {
  const unsigned char* data;
  std::vector<unsigned char> copy;
  Info info;
  Image to;
};
struct Job {
  State* state;
  int format;
  std::vector<Item> items;
};
struct Stream {
  std::deque<Job> jobs;  // nobody waited for them yet
  size_t run = 0;        // how many of them are done all the same
  int64_t put = 0, waited = 0;
};

std::mutex one_at_a_time;
std::set<Handle*> handles;
std::set<State*> states;
std::set<Query*> queries;
std::set<Stream*> streams;
std::map<std::string, int64_t> settings, counts;
std::string broken;

void rule(bool kept, const char* what) {
  if (!kept && broken.find(what) == std::string::npos) broken += std::string(what) + "\n";
}

bool takes(const Info& info) {
  return info.engine() && info.width != settings["refused_width"] && info.width >= settings["least_side"] &&
         info.height >= settings["least_side"] && info.sampling() != settings["refused_sampling"];
}

int planes_of(int format, const Info& info) { return format == LUMA || info.components == 1 ? 1 : 3; }

// Whether the images of the call, and of all that are still to be done, have memory of their own.
bool apart(const Job& job) {
  std::vector<std::pair<const unsigned char*, std::pair<const unsigned char*, const unsigned char*>>> ranges;
  const auto add = [&](const Job& one) {
    for (const Item& item : one.items)
      for (int c = 0; c < planes_of(one.format, item.info); ++c) {
        const unsigned char* start = item.to.channel[c];
        ranges.push_back({start, {start + item.to.pitch[c] * (item.info.high(c) - 1) + item.info.wide(c), item.data}});
      }
  };
  add(job);
  for (const Stream* stream : streams)
    for (const Job& other : stream->jobs) add(other);
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    const bool same = ranges[i].first == ranges[i - 1].first && ranges[i].second == ranges[i - 1].second;
    if (!same && ranges[i].first < ranges[i - 1].second.first) return false;
  }
  return true;
}

bool unchanged(const Item& item) {  // also where the memory is no longer there
  std::vector<unsigned char> now(item.copy.size());
  iovec to{now.data(), now.size()}, from{(void*)item.data, now.size()};
  return process_vm_readv(getpid(), &to, 1, &from, 1, 0) == (ssize_t)now.size() && now == item.copy;
}

void decode(const Job& job, const Item& item) {
  Planes file{};
  file.data = item.copy.data(), file.size = (int64_t)item.copy.size(), file.lenient = 1;
  const int count = planes_of(job.format, item.info);
  for (int c = 0; c < count; ++c) {
    file.plane[c] = item.to.channel[c], file.pitch[c] = (int64_t)item.to.pitch[c];
    file.room[c] = file.pitch[c] * item.info.high(c);
  }
  gpuload_jpeg_stored(&file, 1);
  if (file.status)  // nothing that libjpeg can go on with
    for (int c = 0; c < count; ++c)
      for (int y = 0; y < item.info.high(c); ++y) std::memset(file.plane[c] + file.pitch[c] * y, 128, item.info.wide(c));
  if (item.info.sampling() == settings["other_sampling"]) file.plane[count - 1][0] ^= 4;  // another inverse transform
}

void run(Stream* stream, size_t until) {
  for (; stream->run < until; ++stream->run)
    for (const Item& item : stream->jobs[stream->run].items) decode(stream->jobs[stream->run], item);
}

void wait(Stream* stream, int64_t until) {
  for (; stream->waited < until; ++stream->waited) {
    run(stream, std::max<size_t>(stream->run, 1));
    for (const Item& item : stream->jobs.front().items)
      rule(unchanged(item), "The encoded bytes changed, or were freed, before the wait.");
    stream->jobs.front().state->busy = false;
    stream->jobs.pop_front();
    --stream->run;
  }
}

}  // namespace

using Guard = std::lock_guard<std::mutex>;
extern "C" {

int nvjpegCreateEx(int backend, void*, void*, unsigned flags, Handle** handle) {
  Guard guard(one_at_a_time);
  if (backend != HARDWARE || flags) return INVALID;
  if (!settings["engines"]) return ARCH_MISMATCH;
  handles.insert(*handle = new Handle);
  ++counts["handles"];
  return SUCCESS;
}

int nvjpegDestroy(Handle* handle) {
  Guard guard(one_at_a_time);
  for (const State* state : states) rule(state->of != handle, "A handle was destroyed before its states.");
  if (!handles.erase(handle)) return INVALID;
  delete handle;
  return SUCCESS;
}

int nvjpegGetHardwareDecoderInfo(Handle* handle, unsigned* engines, unsigned* cores) {
  Guard guard(one_at_a_time);
  if (!handles.count(handle)) return INVALID;
  *engines = (unsigned)settings["engines"], *cores = 1;
  return SUCCESS;
}

int nvjpegJpegStateCreate(Handle* handle, State** state) {
  Guard guard(one_at_a_time);
  if (!handles.count(handle)) return INVALID;
  states.insert(*state = new State{handle});
  ++counts["states"];
  return SUCCESS;
}

int nvjpegJpegStateDestroy(State* state) {
  Guard guard(one_at_a_time);
  if (!states.erase(state)) return INVALID;
  rule(!state->busy, "A state was destroyed before the wait.");
  delete state;
  return SUCCESS;
}

int nvjpegDecodeBatchedInitialize(Handle* handle, State* state, int size, int threads, int format) {
  Guard guard(one_at_a_time);
  if (!states.count(state) || state->of != handle || size < 1 || threads < 1) return INVALID;
  if (format != YUV && format != LUMA) return INVALID;
  rule(!state->busy, "A state was initialised before the wait.");
  state->size = size, state->format = format;
  ++counts["initialised"];
  return SUCCESS;
}

int nvjpegDecodeBatchedPreAllocate(Handle* handle, State* state, int size, int width, int height, int, int) {
  Guard guard(one_at_a_time);
  if (!states.count(state) || state->of != handle || size < 1 || width < 1 || height < 1) return INVALID;
  return SUCCESS;
}

int nvjpegDecodeBatched(Handle* handle, State* state, const unsigned char* const* data, const size_t* lengths,
                        Image* destinations, Stream* stream) {
  Guard guard(one_at_a_time);
  if (!states.count(state) || state->of != handle || !streams.count(stream)) return INVALID;
  if (!state->size) return NOT_INITIALIZED;
  rule(!state->busy, "A state was called again before the wait.");
  if (state->busy) return EXECUTION;
  ++counts["calls"];
  if (settings["status"]) return (int)settings["status"];
  Job job{state, state->format, {}};
  bool supported = true, whole = true;
  for (int i = 0; i < state->size; ++i) {
    rule(data[i] && lengths[i], "A call had fewer images than the state was initialised for.");
    if (!data[i] || !lengths[i]) return INVALID;
    Item item{data[i], {data[i], data[i] + lengths[i]}, parse(data[i], lengths[i]), destinations[i]};
    supported = supported && takes(item.info);
    whole = whole && !(settings["broken_width"] && item.info.width == settings["broken_width"]);
    job.items.push_back(std::move(item));
  }
  if (!supported) return NOT_SUPPORTED;
  if (!whole) return BAD_JPEG;
  for (const Item& item : job.items) {
    rule(item.info.sampling() == job.items[0].info.sampling(), "The images of a call have two samplings.");
    for (int c = 0; c < planes_of(job.format, item.info); ++c) {
      const bool room = item.to.channel[c] && item.to.pitch[c] >= (size_t)item.info.wide(c);
      rule(room, "A plane is wider than its pitch.");
      if (!room) return INVALID;
    }
  }
  rule(apart(job), "Two images share memory.");
  counts["images"] += state->size;
  state->busy = true;
  stream->jobs.push_back(std::move(job));
  ++stream->put;
  return SUCCESS;
}

int nvjpegJpegStreamCreate(Handle* handle, Query** query) {
  Guard guard(one_at_a_time);
  if (!handles.count(handle)) return INVALID;
  queries.insert(*query = new Query);
  return SUCCESS;
}

int nvjpegJpegStreamDestroy(Query* query) {
  Guard guard(one_at_a_time);
  if (!queries.erase(query)) return INVALID;
  delete query;
  return SUCCESS;
}

int nvjpegJpegStreamParseHeader(Handle* handle, const unsigned char* data, size_t length, Query* query) {
  Guard guard(one_at_a_time);
  if (!handles.count(handle) || !queries.count(query)) return INVALID;
  query->info = parse(data, length);
  return query->info.status;
}

int nvjpegDecodeBatchedSupported(Handle* handle, Query* query, int* is_supported) {
  Guard guard(one_at_a_time);
  if (!handles.count(handle) || !queries.count(query)) return INVALID;
  ++counts["queries"];
  *is_supported = takes(query->info) ? 0 : 1;
  return SUCCESS;
}

// What a test says to it, and asks it.

void standin_reset() {
  Guard guard(one_at_a_time);
  settings = {{"engines", 7}, {"refused_sampling", -1}, {"other_sampling", -1}};
  counts.clear(), broken.clear();
}

void standin_set(const char* name, int64_t value) {
  Guard guard(one_at_a_time);
  settings[name] = value;
}

int64_t standin_count(const char* name) {
  Guard guard(one_at_a_time);
  if (std::string(name) == "alive") return (int64_t)(handles.size() + states.size() + queries.size());
  return counts[name];
}

const char* standin_broken() {
  Guard guard(one_at_a_time);
  return broken.c_str();
}

// CUDA's part.

Stream* standin_stream() {
  Guard guard(one_at_a_time);
  Stream* made = new Stream;
  streams.insert(made);
  return made;
}

void standin_stream_destroy(Stream* stream) {
  Guard guard(one_at_a_time);
  wait(stream, stream->put);
  streams.erase(stream);
  delete stream;
}

int64_t standin_record(Stream* stream) {
  Guard guard(one_at_a_time);
  return stream->put;
}

void standin_run(Stream* stream) {
  Guard guard(one_at_a_time);
  run(stream, stream->jobs.size());
}

void standin_wait(Stream* stream, int64_t until) {
  Guard guard(one_at_a_time);
  wait(stream, until);
}
}
