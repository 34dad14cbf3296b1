// The arithmetic every implementation of the sampler shares, operation for operation.
//
// Each function is a fixed sequence of IEEE single-precision multiplications, additions and integer operations: no
// fused multiply-add, no division, no library call. The Python twin is kernels/lada_rt_kernels/numeric.py; both give
// the same bits. Everything here has internal linkage, because the file is compiled once per instruction set and the
// linker must never pick the AVX-512 body for the baseline build.
#pragma once

#include <cstdint>
#include <cstring>

namespace lada_rt {
namespace {

// Masses are integers in units of 2^-46 of the row's largest weight. Integer addition has no order, so sums agree
// whatever the block size, vector width or thread count. 65,536 weights of 2^46 stay under 2^63.
constexpr int kMassBits = 46;
constexpr float kMassToUnit = 0x1p-46f;

constexpr uint32_t kStreamDraw = 0;    // counter: step, position, token id
constexpr uint32_t kStreamRemask = 1;  // counter: step, position, 0
constexpr uint32_t kStreamFlow = 2;    // counter: element / 4, window, 0

constexpr float kSmallestNormal = 0x1p-126f;
constexpr float kLogConfidenceFloor = -46.0517018598809f;  // ln(1e-20)

inline int32_t float_bits(float x) {
  int32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b;
}

inline float bits_float(int32_t b) {
  float x;
  std::memcpy(&x, &b, sizeof x);
  return x;
}

// exp(d) * 2^shift for d <= 0; arguments under -87 (also -inf) count as -87, so no subnormal ever appears.
template <int shift>
inline float exp_shifted(float d) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
  d = d > -87.0f ? d : -87.0f;
  const float t = d * 1.44269504f + magic;
  const float n = t - magic;
  float r = d - n * 0.693359375f;  // exact: the high part of ln 2 has 9 bits
  r = r - n * -2.12194440e-4f;
  float p = 0x1.6a23cep-10f;
  p = p * r + 0x1.123a2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The bits of `magic` vanish in the shift by 23; unsigned, because a negative n shifts its sign out.
  const uint32_t scale = (static_cast<uint32_t>(float_bits(t)) << 23) + (static_cast<uint32_t>(shift) << 23);
  return bits_float(static_cast<int32_t>(static_cast<uint32_t>(float_bits(p)) + scale));
}

// floor(exp(d) * 2^46)
inline int64_t mass_of(float d) {
#if defined(__AVX512DQ__) || !defined(__x86_64__)
  return static_cast<int64_t>(exp_shifted<kMassBits>(d));
#else
  // Without a vector conversion to 64-bit integers, shift the mantissa into place: the same truncation.
  const uint32_t b = static_cast<uint32_t>(float_bits(exp_shifted<0>(d)));
  const uint64_t mantissa = (b & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 127u - (b >> 23);
  return static_cast<int64_t>((mantissa << (kMassBits - 23)) >> (shift < 63u ? shift : 63u));
#endif
}

// ln(1 + f) + e ln 2 for f in [sqrt(1/2) - 1, sqrt(2) - 1]
inline float log_parts(float f, float e) {
  float p = 0x1.1457c4p-4f;
  p = p * f + -0x1.de3c48p-4f;
  p = p * f + 0x1.e6f07ap-4f;
  p = p * f + -0x1.fc22p-4f;
  p = p * f + 0x1.233766p-3f;
  p = p * f + -0x1.555c4ep-3f;
  p = p * f + 0x1.99a4b6p-3f;
  p = p * f + -0x1.000006p-2f;
  p = p * f + 0x1.555548p-2f;
  const float z = f * f;
  float y = p * f;
  y = y * z;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * z;
  y = f + y;
  return y + e * 0.693359375f;
}

// x = (1 + f) 2^e, f in [sqrt(1/2) - 1, sqrt(2) - 1]; x positive and normal
inline void split_log(float x, float& f, float& e) {
  const int32_t b = float_bits(x);
  const int32_t exponent = (b - 0x3f3504f3) >> 23;
  f = bits_float(b - static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  e = static_cast<float>(exponent);
}

inline float log_normal(float x) {
  float f, e;
  split_log(x, f, e);
  return log_parts(f, e);
}

// A uniform in (0, 1) from one random word. Near 0 it keeps the word's full 2^-33 resolution.
inline float unit_of(uint32_t word) {
  const float v = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
  return v < 0x1.fffffep-1f ? v : 0x1.fffffep-1f;
}

// q = -ln(1 - v) ~ Exp(1). Small v is taken as f = -v directly, without the rounding of 1 - v: the smallest q
// decides a race, so it keeps full relative precision.
inline float exponential_of(float v) {
  float f, e;
  split_log(1.0f - v, f, e);
  const bool small = v < 0.29289f;
  return -log_parts(small ? -v : f, small ? 0.0f : e);
}

// -ln(q), q floored at the smallest normal float
inline float gumbel_of_exponential(float q) { return -log_normal(q > kSmallestNormal ? q : kSmallestNormal); }

// -ln(Exp(1)) is a standard Gumbel draw
inline float gumbel_of(uint32_t word) { return gumbel_of_exponential(exponential_of(unit_of(word))); }

// Order-preserving signed integer of a float that is not NaN; -0 and +0 share one key.
inline int32_t order_key(float x) {
  const int32_t b = float_bits(x + 0.0f);
  return b ^ ((b >> 31) & 0x7fffffff);
}

// Philox4x32-10 (Salmon et al., SC 2011). The rounds are straight-line code, so that a loop over tokens vectorises.
struct PhiloxState {
  uint32_t c0, c1, c2, c3;
};

inline PhiloxState philox_round(PhiloxState c, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c.c0;
  const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c.c2;
  return {static_cast<uint32_t>(p1 >> 32) ^ c.c1 ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.c3 ^ k1, static_cast<uint32_t>(p0)};
}

inline PhiloxState philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  constexpr uint32_t w0 = 0x9E3779B9u, w1 = 0xBB67AE85u;
  const uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  PhiloxState c = {c0, c1, c2, c3};
  c = philox_round(c, k0, k1);
  c = philox_round(c, k0 + w0, k1 + w1);
  c = philox_round(c, k0 + 2 * w0, k1 + 2 * w1);
  c = philox_round(c, k0 + 3 * w0, k1 + 3 * w1);
  c = philox_round(c, k0 + 4 * w0, k1 + 4 * w1);
  c = philox_round(c, k0 + 5 * w0, k1 + 5 * w1);
  c = philox_round(c, k0 + 6 * w0, k1 + 6 * w1);
  c = philox_round(c, k0 + 7 * w0, k1 + 7 * w1);
  c = philox_round(c, k0 + 8 * w0, k1 + 8 * w1);
  return philox_round(c, k0 + 9 * w0, k1 + 9 * w1);
}

inline uint32_t philox_word(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t stream, uint64_t key) {
  return philox(c0, c1, c2, stream, key).c0;
}

}  // namespace
}  // namespace lada_rt
