// Remask selection: which of the drawn tokens return to MASK (spec/lada_band.md d.3 step 7 and f.4).
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "numeric.h"

namespace lada_rt {
namespace {

void check(int64_t n_codes, const int64_t* rows, int64_t n_rows, const RemaskParams& p) {
  if (p.n_masked < 0 || p.n_masked > n_rows) {
    throw std::invalid_argument("expected 0 <= n_masked <= " + std::to_string(n_rows) + " masked rows, got " +
                                std::to_string(p.n_masked));
  }
  if (!(p.tau >= 0.0f) || !std::isfinite(p.tau)) {
    throw std::invalid_argument("expected a finite tau >= 0, got " + std::to_string(p.tau));
  }
  int64_t last = -1;
  for (int64_t i = 0; i < n_rows; ++i) {
    if (rows[i] <= last || rows[i] >= n_codes) {
      throw std::invalid_argument("expected rows strictly ascending in [0, " + std::to_string(n_codes) + "), got " +
                                  std::to_string(rows[i]) + " at index " + std::to_string(i));
    }
    last = rows[i];
  }
}

float score_of(int64_t position, float log_confidence, const RemaskParams& p, const float* noise) {
  const uint32_t at = static_cast<uint32_t>(position);
  switch (p.strategy) {
    case Strategy::kLowConfidence: {
      if (!(p.tau > 0.0f)) return log_confidence;
      const float g = noise ? noise[position] : gumbel_of(philox_word(p.step, at, 0, kStreamRemask, p.seed));
      const float weighted = p.tau * g;
      return log_confidence + weighted;
    }
    case Strategy::kRandom:
      return noise ? noise[position] : unit_of(philox_word(p.step, at, 0, kStreamRemask, p.seed));
    case Strategy::kFixedPosition:
      // The same at every step: the step word stays 0.
      return noise ? noise[position] : unit_of(philox_word(0, at, 0, kStreamRemask, p.seed));
  }
  return 0.0f;
}

}  // namespace

void remask(int64_t* codes, int64_t n_codes, const int64_t* rows, const int32_t* tokens, const float* log_confidence,
            int64_t n_rows, const RemaskParams& params, const float* noise, int64_t* rows_next) {
  check(n_codes, rows, n_rows, params);
  const int64_t n = params.n_masked;
  if (n == 0) {
    for (int64_t i = 0; i < n_rows; ++i) codes[rows[i]] = tokens[i];
    return;
  }
  if (n == n_rows) {
    for (int64_t i = 0; i < n_rows; ++i) codes[rows[i]] = params.mask_id;
    std::copy(rows, rows + n_rows, rows_next);
    return;
  }
  // (score, index) in one word: rows ascend, so the index breaks ties by position.
  std::vector<uint64_t> order(static_cast<size_t>(n_rows));
  for (int64_t i = 0; i < n_rows; ++i) {
    const float score = score_of(rows[i], log_confidence[i], params, noise);
    if (std::isnan(score)) {
      throw std::invalid_argument("expected scores that are numbers, got NaN at position " + std::to_string(rows[i]) +
                                  "; check log_confidence and noise");
    }
    const uint32_t key = static_cast<uint32_t>(order_key(score)) ^ 0x80000000u;
    order[static_cast<size_t>(i)] = (static_cast<uint64_t>(key) << 32) | static_cast<uint32_t>(i);
  }
  std::vector<uint64_t> sorted(order);
  std::nth_element(sorted.begin(), sorted.begin() + (n - 1), sorted.end());
  const uint64_t last = sorted[static_cast<size_t>(n - 1)];
  int64_t m = 0;
  for (int64_t i = 0; i < n_rows; ++i) {
    const bool stays = order[static_cast<size_t>(i)] <= last;
    codes[rows[i]] = stays ? params.mask_id : tokens[i];
    if (stays) rows_next[m++] = rows[i];
  }
}

}  // namespace lada_rt
