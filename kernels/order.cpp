// Random numbers and random orders without the GIL: the very numbers of their NumPy twins.
//
// gpuload_uniform  Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011); gpuload.order.philox says what the counters are.
//   Out  out    f64[rows, n]: n uniforms in (0, 1) a row, (word + 0.5) / 2^32
// gpuload_permute  the Feistel network of gpuload.order.permutation, with its cycles walked; forwards or backwards.
//   In   index  i64[count] in [0, n), keys u64[rounds]
//   Out  out    i64[count] in [0, n)
// gpuload_turns  whose turn it is among sources with shares: the chairman assignment of gpuload.order.turns.
//   In   share  i64[sources], positive, their sum is total <= 2^50, sources <= 1024; how many places follow
//   I/O  lag    i64[sources], places * share - turns * total; taken i64[sources]: turns so far
//   Out  source u16[count], index i64[count]: the source of each place, and how many turns it had before
#include <cstdint>

namespace {

struct Words {
  uint32_t w[4];
};

Words philox(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = (uint64_t)c.w[0] * 0xD2511F53u, p1 = (uint64_t)c.w[2] * 0xCD9E8D57u;
    c = {{(uint32_t)(p1 >> 32) ^ c.w[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c.w[3] ^ k1, (uint32_t)p0}};
  }
  return c;
}

uint64_t mix(uint64_t x) {  // the finaliser of SplitMix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

extern "C" void gpuload_uniform(const int64_t* rows, int64_t count, int64_t n, uint32_t epoch, uint64_t key, double* out) {
  for (int64_t i = 0; i < count; ++i, out += n)
    for (int64_t block = 0; 4 * block < n; ++block) {
      const uint64_t row = (uint64_t)rows[i];
      const Words words = philox({{(uint32_t)row, (uint32_t)(row >> 32), (uint32_t)block, epoch}}, (uint32_t)key,
                                 (uint32_t)(key >> 32));
      for (int64_t j = 0; j < 4 && 4 * block + j < n; ++j) out[4 * block + j] = (words.w[j] + 0.5) * 0x1p-32;
    }
}

extern "C" void gpuload_permute(const int64_t* index, int64_t count, uint64_t n, int low_bits, int high_bits,
                                const uint64_t* keys, int rounds, int backwards, int64_t* out) {
  const uint64_t low_mask = ((uint64_t)1 << low_bits) - 1, high_mask = ((uint64_t)1 << high_bits) - 1;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t value = (uint64_t)index[i];
    do {
      uint64_t high = value >> low_bits, low = value & low_mask;
      for (int k = 0; k < rounds; ++k) {
        const int r = backwards ? rounds - 1 - k : k;
        if (r % 2) high ^= mix(low ^ keys[r]) & high_mask;
        else low ^= mix(high ^ keys[r]) & low_mask;
      }
      value = high << low_bits | low;
    } while (value >= n);
    out[i] = (int64_t)value;
  }
}

extern "C" void gpuload_turns(const int64_t* share, int64_t sources, int64_t total, int64_t count, int64_t* lag,
                              int64_t* taken, uint16_t* source, int64_t* index) {
  const int64_t slack = 2 * sources - 2;  // nobody is more than 1 - 1/slack turns early or late
  for (int64_t place = 0; place < count; ++place) {
    int64_t next = 0;
    double least = 1e300;  // slack times the places until it is too late for `next`
    for (int64_t s = 0; s < sources; ++s) {
      lag[s] += share[s];
      if (slack * lag[s] < total) continue;  // too early
      const double left = (double)((slack - 1) * total - slack * lag[s]) / (double)share[s];
      if (left < least) next = s, least = left;
    }
    lag[next] -= total;
    source[place] = (uint16_t)next;
    index[place] = taken[next]++;
  }
}
