// One row of the sampler, compiled once per instruction set (rows.cpp) and chosen at run time (sample.cpp).
#pragma once

#include <cstdint>

namespace lada_rt {

// Lanes per group when maxima are gathered, and elements per block: four loads of 16 lanes.
constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 64;
constexpr int64_t kGroups = 256;

// Working memory of one thread; every array has room for a whole row of kBlock-padded length.
struct RowScratch {
  float* row;        // widened logits
  float* lane_max;   // [padded / 4] maxima of four elements
  float* value;      // candidates, in ascending id order
  int32_t* id;
  int32_t* key;
  int64_t* mass;
  int32_t* work_key;  // candidates still undecided in a search
  int64_t* work_mass;
};

struct RowTask {
  const float* logits;     // [vocab] float32
  const float* next;       // the row after it, prefetched, or null
  int64_t vocab;
  int64_t top_k;           // 0: off
  float top_p;             // >= 1: off
  float inv_temperature;
  uint64_t seed;
  uint32_t step;
  uint32_t position;
  const float* exp_noise;  // [vocab] or null
  float* probs;            // [vocab] or null: write the distribution instead of drawing
};

struct RowResult {
  int32_t token;
  float log_confidence;
};

// Returns false when the row holds NaN or +inf, or nothing but -inf.
using SampleRow = bool (*)(const RowTask& task, const RowScratch& scratch, RowResult* result);
using WidenRow = void (*)(const uint16_t* in, int64_t n, float* out);

struct RowKernels {
  SampleRow sample_row;
  WidenRow widen_float16;
  WidenRow widen_bfloat16;
};

extern const RowKernels kRowsDefault;
#ifdef LADA_RT_X86_VARIANTS
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;
#endif

}  // namespace lada_rt
