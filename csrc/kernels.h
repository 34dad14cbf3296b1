// CPU kernels of lada-rt. Plain pointers and sizes; only bind.cpp knows Python.
// Every function throws std::invalid_argument for an argument it cannot use.
#pragma once

#include <cstdint>

namespace lada_rt {

// Largest vocabulary: 65,536 weights of 2^46 units sum below 2^63.
constexpr int64_t kMaxVocab = 65536;

enum class LogitsType { kFloat32, kFloat16, kBFloat16 };

struct Logits {
  const void* data;
  LogitsType type;
  int64_t rows;
  int64_t vocab;
  int64_t row_stride;  // in elements
};

struct SampleParams {
  uint64_t seed;
  uint32_t step;
  int64_t top_k;         // 0: off
  float top_p;           // >= 1: off
  float inv_temperature;
};

// Filters each row (nucleus on the raw logits with the full-row normaliser, then top-k), draws one token by an
// exponential race and returns its log probability in the filtered, renormalised, temperature-scaled distribution.
// positions [rows]: absolute frame of each row, the only thing that ties a row to its random numbers.
// exp_noise [rows, vocab] or null: recorded Exp(1) draws instead of Philox.
// n_threads 0: one per available core, fewer when the work is small. The result does not depend on it.
void sample(const Logits& logits, const int64_t* positions, const SampleParams& params, const float* exp_noise,
            int n_threads, int32_t* tokens, float* log_confidence);

// Dense [rows, vocab] probabilities of the filtered distribution that `sample` draws from; removed tokens are 0.
void filtered_probs(const Logits& logits, const SampleParams& params, int n_threads, float* probs);

enum class Strategy { kLowConfidence, kRandom, kFixedPosition };

struct RemaskParams {
  int64_t n_masked;  // how many of the rows stay masked
  float tau;         // weight of the Gumbel noise, >= 0; only for kLowConfidence
  Strategy strategy;
  int64_t mask_id;
  uint64_t seed;
  uint32_t step;
};

// Writes the tokens of all `n_rows` masked positions into codes [n_codes], except at the n_masked positions with the
// smallest (score, position), which hold mask_id, and lists those in rows_next [n_masked], ascending.
// rows [n_rows] is strictly ascending. noise [n_codes] or null, indexed by position.
void remask(int64_t* codes, int64_t n_codes, const int64_t* rows, const int32_t* tokens, const float* log_confidence,
            int64_t n_rows, const RemaskParams& params, const float* noise, int64_t* rows_next);

// One Philox4x32-10 block.
void philox_block(const uint32_t counter[4], uint64_t key, uint32_t out[4]);

// n standard normals; element i is output i % 4 of the block with counter (i / 4, window, 0, flow stream).
void philox_normal(uint64_t seed, uint32_t window, int64_t n, float* out);

}  // namespace lada_rt
