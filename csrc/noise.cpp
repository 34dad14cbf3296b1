// Counter-based noise outside the sampler: one Philox block, and the start noise of the flow decoder.
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "numeric.h"

namespace lada_rt {
namespace {

// sin and cos of 2 pi word / 2^32. The reduction is integer arithmetic, so it has no error at all.
void sin_cos_turn(uint32_t word, float* sine, float* cosine) {
  const uint32_t quadrant = (word + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(word - (quadrant << 30));  // [-2^29, 2^29)
  const float x = static_cast<float>(rest) * 1.46291807927e-9f;        // 2 pi / 2^32
  const float z = x * x;
  float s = -1.9517e-4f;
  s = s * z + 8.33218e-3f;
  s = s * z + -1.6666655e-1f;
  s = s * z;
  s = s * x + x;
  float c = 2.44380909e-5f;
  c = c * z + -1.38873645e-3f;
  c = c * z + 4.16666468e-2f;
  c = c * z;
  c = c * z + (1.0f - 0.5f * z);
  const float swap_s = quadrant & 1u ? c : s;
  const float swap_c = quadrant & 1u ? s : c;
  *sine = quadrant & 2u ? -swap_s : swap_s;
  *cosine = (quadrant + 1u) & 2u ? -swap_c : swap_c;
}

// -ln((word + 1/2) / 2^32), precise at both ends: near 1 it is taken from the complement, which is small.
float minus_log_unit(uint32_t word) {
  return word < 0x80000000u ? -log_normal(unit_of(word)) : exponential_of(unit_of(~word));
}

}  // namespace

void philox_block(const uint32_t counter[4], uint64_t key, uint32_t out[4]) {
  const PhiloxState c = philox(counter[0], counter[1], counter[2], counter[3], key);
  out[0] = c.c0;
  out[1] = c.c1;
  out[2] = c.c2;
  out[3] = c.c3;
}

void philox_normal(uint64_t seed, uint32_t window, int64_t n, float* out) {
  if (n < 0 || n / 4 > 0xffffffffLL) {
    throw std::invalid_argument("expected between 0 and 2^34 normals, got " + std::to_string(n));
  }
  for (int64_t i = 0; i < n; i += 4) {
    const uint32_t counter[4] = {static_cast<uint32_t>(i / 4), window, 0, kStreamFlow};
    uint32_t word[4];
    philox_block(counter, seed, word);
    float z[4];
    for (int pair = 0; pair < 4; pair += 2) {
      // Box and Muller; IEEE square root, the same everywhere.
      const float radius = std::sqrt(2.0f * minus_log_unit(word[pair]));
      float sine, cosine;
      sin_cos_turn(word[pair + 1], &sine, &cosine);
      z[pair] = radius * cosine;
      z[pair + 1] = radius * sine;
    }
    for (int64_t j = i; j < n && j < i + 4; ++j) out[j] = z[j - i];
  }
}

}  // namespace lada_rt
