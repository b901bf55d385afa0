// Uniforms of Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011), without the GIL: the numbers of
// gpuload.order.philox.uniform, which says what the counters are.
//
// Out  out  f64[rows, n]: n uniforms in (0, 1) a row, (word + 0.5) / 2^32
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
