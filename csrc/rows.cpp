// The row kernel: spec/lada_band.md section f, without a sort.
//
// Pass 1 reads the row from memory and leaves its maximum and the maxima of groups. The k-th largest group maximum
// bounds the k-th largest value from below, so a handful of candidates remain. Pass 2 (only with top_p) reads the row
// again, from cache, for the full-row mass. Everything after that touches candidates alone.
//
// Compiled once per instruction set with LADA_RT_ISA naming the table; only internal linkage, so that the builds
// cannot be mixed up by the linker.
#include "rows.h"

#include "numeric.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef LADA_RT_ISA
#define LADA_RT_ISA kRowsDefault
#endif

#if defined(__GNUC__) || defined(__clang__)
#define LADA_RT_RESTRICT __restrict__
#define LADA_RT_PREFETCH(p) __builtin_prefetch(p, 0, 2)  // level 2: level 1 holds the row at work
#else
#define LADA_RT_RESTRICT
#define LADA_RT_PREFETCH(p) ((void)(p))
#endif

namespace lada_rt {
namespace {

constexpr float kInf = __builtin_inff();

inline float larger(float a, float b) { return a > b ? a : b; }

// Bit l is set when x[l] >= bound, for kLanes values.
inline uint32_t lanes_at_least(const float* x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(bound), _CMP_GE_OQ);
#elif defined(__AVX2__)
  const __m256 b = _mm256_set1_ps(bound);
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), b, _CMP_GE_OQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + 8), b, _CMP_GE_OQ));
  return static_cast<uint32_t>(lo | (hi << 8));
#else
  uint32_t hits = 0;
  for (int l = 0; l < kLanes; ++l) hits |= static_cast<uint32_t>(x[l] >= bound) << l;
  return hits;
#endif
}

inline int lowest_bit(uint32_t bits) {
#if defined(__GNUC__) || defined(__clang__)
  return __builtin_ctz(bits);
#else
  int i = 0;
  while (!((bits >> i) & 1u)) ++i;
  return i;
#endif
}

struct Scan {
  float max;
  bool bad;  // NaN or +inf
  alignas(64) float group_max[kGroups];
};

// Row maximum, lane maxima per block of 64, and maxima of 256 disjoint groups.
void scan_row(const float* LADA_RT_RESTRICT x, int64_t vocab, float* LADA_RT_RESTRICT lane_max, Scan* scan) {
  float* LADA_RT_RESTRICT group = scan->group_max;
  int32_t bad[kLanes] = {};
  for (int64_t g = 0; g < kGroups; ++g) group[g] = -kInf;
  const int64_t full = vocab / kBlock;
  for (int64_t b = 0; b < full; ++b) {
    const float* LADA_RT_RESTRICT in = x + b * kBlock;
    float* LADA_RT_RESTRICT acc = group + (b * kLanes) % kGroups;
    float* LADA_RT_RESTRICT out = lane_max + b * kLanes;
    for (int l = 0; l < kLanes; ++l) {
      const float x0 = in[l], x1 = in[kLanes + l], x2 = in[2 * kLanes + l], x3 = in[3 * kLanes + l];
      const float m = larger(larger(x0, x1), larger(x2, x3));
      // Both fail for NaN and +inf; a comparison with NaN would drop it from the maximum unseen.
      const int32_t ok = (x0 < kInf) & (x1 < kInf) & (x2 < kInf) & (x3 < kInf);
      bad[l] |= ok ^ 1;
      out[l] = m;
      acc[l] = larger(acc[l], m);
    }
  }
  for (int64_t i = full * kBlock; i < vocab; ++i) {
    bad[0] |= !(x[i] < kInf);
    group[i % kLanes] = larger(group[i % kLanes], x[i]);
  }
  int32_t any_bad = 0;
  for (int l = 0; l < kLanes; ++l) any_bad |= bad[l];
  float lane[kLanes];
  for (int l = 0; l < kLanes; ++l) lane[l] = group[l];
  for (int64_t g = kLanes; g < kGroups; g += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] = larger(lane[l], group[g + l]);
  }
  float m = lane[0];
  for (int l = 1; l < kLanes; ++l) m = larger(m, lane[l]);
  scan->max = m;
  scan->bad = any_bad != 0;
}

int64_t count_at_least(const int32_t* LADA_RT_RESTRICT key, int64_t n, int32_t bound) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += key[i] >= bound;
  return count;
}

int64_t mass_at_least(const int32_t* LADA_RT_RESTRICT key, const int64_t* LADA_RT_RESTRICT mass, int64_t n,
                      int32_t bound) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += key[i] >= bound ? mass[i] : 0;
  return sum;
}

void key_range(const int32_t* LADA_RT_RESTRICT key, int64_t n, int64_t* low, int64_t* high) {
  int32_t lo = key[0], hi = key[0];
  for (int64_t i = 1; i < n; ++i) {
    lo = key[i] < lo ? key[i] : lo;
    hi = key[i] > hi ? key[i] : hi;
  }
  *low = lo;
  *high = hi;
}

// A key with at least k and at most k + slack of the n keys at or above it; with slack 0, ties apart, the k-th
// largest key. Bisection over 32-bit keys: it ends after 32 rounds whatever the values.
int32_t kth_largest(const int32_t* key, int64_t n, int64_t k, int64_t slack, int32_t* work) {
  int64_t low, high;
  key_range(key, n, &low, &high);
  ++high;
  int64_t above = 0;  // keys at or above `high`; they may still be in the active set
  int64_t left = 0;   // keys that have left the active set
  for (int round = 1; high - low > 1; ++round) {
    const int64_t mid = low + (high - low) / 2;
    const int64_t count = left + count_at_least(key, n, static_cast<int32_t>(mid));
    if (count >= k) {
      low = mid;
      if (count <= k + slack) break;
    } else {
      high = mid;
      above = count;
    }
    if (n > 1024 && round % 3 == 0) {
      int64_t m = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int32_t one = key[i];
        work[m] = one;
        m += (one >= low) & (one < high);
      }
      left = above;
      key = work;
      n = m;
    }
  }
  return static_cast<int32_t>(low);
}

struct MassCut {
  int32_t key;    // the largest key whose mass at or above it exceeds the limit
  int64_t above;  // mass strictly above that key
};

// Precondition: the total mass exceeds the limit.
MassCut cut_by_mass(const int32_t* key, const int64_t* mass, int64_t n, int64_t limit, int32_t* work_key,
                    int64_t* work_mass) {
  int64_t low, high;
  key_range(key, n, &low, &high);
  ++high;
  int64_t above = 0;  // mass at or above `high`; its elements may still be in the active set
  int64_t left = 0;   // mass that has left the active set
  for (int round = 1; high - low > 1; ++round) {
    const int64_t mid = low + (high - low) / 2;
    const int64_t sum = left + mass_at_least(key, mass, n, static_cast<int32_t>(mid));
    if (sum > limit) {
      low = mid;
    } else {
      high = mid;
      above = sum;
    }
    if (n > 256 && round % 3 == 0) {
      int64_t m = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int32_t k = key[i];
        work_key[m] = k;
        work_mass[m] = mass[i];
        m += (k >= low) & (k < high);
      }
      left = above;
      key = work_key;
      mass = work_mass;
      n = m;
    }
  }
  return {static_cast<int32_t>(low), above};
}

// Candidates at or above `bound`, in ascending id order.
int64_t collect(const float* x, int64_t vocab, const float* lane_max, float bound, float* value, int32_t* id) {
  int64_t n = 0;
  const int64_t full = vocab / kBlock;
  for (int64_t b = 0; b < full; ++b) {
    if (!lanes_at_least(lane_max + b * kLanes, bound)) continue;
    for (int64_t i = b * kBlock; i < (b + 1) * kBlock; i += kLanes) {
      for (uint32_t hits = lanes_at_least(x + i, bound); hits; hits &= hits - 1) {
        const int64_t v = i + lowest_bit(hits);
        value[n] = x[v];
        id[n++] = static_cast<int32_t>(v);
      }
    }
  }
  for (int64_t v = full * kBlock; v < vocab; ++v) {
    if (x[v] >= bound) {
      value[n] = x[v];
      id[n++] = static_cast<int32_t>(v);
    }
  }
  return n;
}

int64_t row_mass(const float* LADA_RT_RESTRICT x, int64_t n, float max, const float* next) {
  constexpr int64_t chunk = 512;
  int64_t sum = 0;
  int64_t i = 0;
  for (; i + chunk <= n; i += chunk) {
    // The next row comes from memory while this one is arithmetic in cache.
    if (next) {
      for (int64_t j = 0; j < chunk; j += 16) LADA_RT_PREFETCH(next + i + j);
    }
    int64_t part = 0;
    for (int64_t j = 0; j < chunk; ++j) part += mass_of(x[i + j] - max);
    sum += part;
  }
  for (; i < n; ++i) sum += mass_of(x[i] - max);
  return sum;
}

// Keeps candidates above `key`, and the first `n_ties` equal to it.
int64_t keep_above(float* value, int32_t* id, int32_t* keys, int64_t n, int32_t key, int64_t n_ties) {
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t k = keys[i];
    const bool tie = k == key && n_ties > 0;
    n_ties -= tie;
    value[m] = value[i];
    id[m] = id[i];
    keys[m] = k;
    m += (k > key) | tie;
  }
  return m;
}

// Draws among the candidates (ascending id).
void race(const RowTask& task, const float* LADA_RT_RESTRICT value, const int32_t* LADA_RT_RESTRICT id, int64_t n,
          float max, RowResult* result) {
  constexpr int64_t chunk = 128;
  float scaled[chunk], noise[chunk];
  int64_t total = 0;
  float best = -kInf, best_scaled = 0.0f;
  int32_t token = id[0];
  bool first = true;
  for (int64_t start = 0; start < n; start += chunk) {
    const int64_t m = n - start < chunk ? n - start : chunk;
    for (int64_t i = 0; i < m; ++i) {
      scaled[i] = (value[start + i] - max) * task.inv_temperature;
      total += mass_of(scaled[i]);
    }
    if (task.exp_noise) {
      for (int64_t i = 0; i < m; ++i) noise[i] = gumbel_of_exponential(task.exp_noise[id[start + i]]);
    } else {
      for (int64_t i = 0; i < m; ++i) {
        noise[i] = gumbel_of(philox_word(task.step, task.position, static_cast<uint32_t>(id[start + i]), kStreamDraw,
                                         task.seed));
      }
    }
    for (int64_t i = 0; i < m; ++i) {
      const float score = scaled[i] + noise[i];
      // Strictly greater: ids ascend, so the lowest id wins a tie.
      if (first || score > best) {
        first = false;
        best = score;
        best_scaled = scaled[i];
        token = id[start + i];
      }
    }
  }
  const float log_confidence = best_scaled - log_normal(static_cast<float>(total) * kMassToUnit);
  result->token = token;
  result->log_confidence = larger(log_confidence, kLogConfidenceFloor);
}

void write_probs(const RowTask& task, const float* value, const int32_t* id, int64_t n, float max) {
  for (int64_t v = 0; v < task.vocab; ++v) task.probs[v] = 0.0f;
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += mass_of((value[i] - max) * task.inv_temperature);
  const float sum = static_cast<float>(total) * kMassToUnit;
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = (value[i] - max) * task.inv_temperature;
    task.probs[id[i]] = scaled < -87.0f ? 0.0f : exp_shifted<0>(scaled) / sum;
  }
}

bool sample_row(const RowTask& task, const RowScratch& s, RowResult* result) {
  const float* x = task.logits;
  const int64_t vocab = task.vocab;
  Scan scan;
  scan_row(x, vocab, s.lane_max, &scan);
  if (scan.bad || !(scan.max > -kInf)) return false;
  const float max = scan.max;
  const bool by_count = task.top_k > 0 && task.top_k < vocab;
  const bool by_mass = task.top_p < 1.0f;

  int64_t n;
  if (by_count && task.top_k <= kGroups / 2 && vocab >= 4 * kGroups) {
    for (int64_t g = 0; g < kGroups; ++g) s.key[g] = order_key(scan.group_max[g]);
    const int32_t bound = kth_largest(s.key, kGroups, task.top_k, task.top_k / 8, s.work_key);
    n = collect(x, vocab, s.lane_max, bits_float(bound ^ ((bound >> 31) & 0x7fffffff)), s.value, s.id);
  } else {
    n = vocab;
    for (int64_t v = 0; v < vocab; ++v) {
      s.value[v] = x[v];
      s.id[v] = static_cast<int32_t>(v);
    }
  }
  for (int64_t i = 0; i < n; ++i) s.key[i] = order_key(s.value[i]);
  if (by_count) {
    // Every value equal to the k-th stays: top-k never splits a tie group.
    const int32_t kth = kth_largest(s.key, n, task.top_k, 0, s.work_key);
    n = keep_above(s.value, s.id, s.key, n, kth, n);
  }
  if (by_mass) {
    int64_t kept_mass = 0;
    for (int64_t i = 0; i < n; ++i) {
      s.mass[i] = mass_of(s.value[i] - max);
      kept_mass += s.mass[i];
    }
    const int64_t row = by_count ? row_mass(x, vocab, max, task.next) : kept_mass;
    // One rounding of row, one of the product; a prefix mass over `limit` is a cumulative probability over top_p.
    const int64_t limit = static_cast<int64_t>(static_cast<double>(task.top_p) * static_cast<double>(row));
    if (kept_mass > limit) {
      const MassCut cut = cut_by_mass(s.key, s.mass, n, limit, s.work_key, s.work_mass);
      int64_t one = 0;
      for (int64_t i = 0; i < n; ++i) one = s.key[i] == cut.key ? s.mass[i] : one;
      n = keep_above(s.value, s.id, s.key, n, cut.key, (limit - cut.above) / one + 1);
    }
  }
  if (task.probs) {
    write_probs(task, s.value, s.id, n, max);
  } else {
    race(task, s.value, s.id, n, max, result);
  }
  return true;
}

void widen_float16(const uint16_t* LADA_RT_RESTRICT in, int64_t n, float* LADA_RT_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t h = in[i];
    const uint32_t magnitude = (h & 0x7fffu) << 13;
    // 2^112 rebiases the exponent, subnormals included; infinities and NaN need the full exponent instead.
    const float finite = bits_float(static_cast<int32_t>(magnitude)) * 0x1p112f;
    const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : static_cast<uint32_t>(float_bits(finite));
    out[i] = bits_float(static_cast<int32_t>(bits | ((h & 0x8000u) << 16)));
  }
}

void widen_bfloat16(const uint16_t* LADA_RT_RESTRICT in, int64_t n, float* LADA_RT_RESTRICT out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bits_float(static_cast<int32_t>(static_cast<uint32_t>(in[i]) << 16));
}

}  // namespace

const RowKernels LADA_RT_ISA = {sample_row, widen_float16, widen_bfloat16};

}  // namespace lada_rt
