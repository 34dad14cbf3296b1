// C++ checks of the CPU kernels for AddressSanitizer and UBSan: odd sizes, every filter, bad rows, exact-size buffers
// on the heap, so that a read past a row's end is caught; and bit equality of the instruction-set builds.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "../../csrc/kernels.h"
#include "../../csrc/rows.h"

using namespace lada_rt;

namespace {

int failures = 0;

void expect(bool ok, const char* what, int64_t vocab) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s (V = %lld)\n", what, static_cast<long long>(vocab));
  ++failures;
}

// Row scratch of exactly the documented sizes.
struct Buffers {
  explicit Buffers(int64_t vocab)
      : n(static_cast<size_t>((vocab + kBlock - 1) / kBlock * kBlock + kGroups)),
        row(n), lane(n), value(n), id(n), key(n), work_key(n), mass(n), work_mass(n) {}
  RowScratch scratch() {
    return {row.data(), lane.data(), value.data(), id.data(), key.data(), mass.data(), work_key.data(),
            work_mass.data()};
  }
  size_t n;
  std::vector<float> row, lane, value;
  std::vector<int32_t> id, key, work_key;
  std::vector<int64_t> mass, work_mass;
};

std::vector<const RowKernels*> builds() {
  std::vector<const RowKernels*> all = {&kRowsDefault};
#ifdef LADA_RT_X86_VARIANTS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) all.push_back(&kRowsAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    all.push_back(&kRowsAvx512);
  }
#endif
  return all;
}

void fill(std::vector<float>& row, int kind, std::mt19937& rng) {
  std::normal_distribution<float> normal(0.0f, 3.0f);
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < row.size(); ++i) {
    const float x = normal(rng);
    switch (kind) {
      case 0: row[i] = x; break;
      case 1: row[i] = std::round(x); break;           // ties
      case 2: row[i] = 0.0f; break;                    // one tie group
      case 3: row[i] = i % 7 == 3 ? x : -inf; break;   // mostly excluded
      default: row[i] = x * 1e37f; break;              // differences overflow
    }
  }
  if (kind == 3) row[row.size() - 1] = 1.0f;
}

void check_rows() {
  std::mt19937 rng(1);
  const int64_t ks[] = {0, 1, 5, 100, 128, 129, 5000};
  const float ps[] = {0.0f, 0.5f, 0.9f, 1.0f};
  for (const int64_t vocab : {1, 2, 15, 16, 17, 63, 64, 65, 127, 1000, 1023, 1024, 1025, 1100, 16384, 16385}) {
    Buffers buffers(vocab);
    std::vector<float> row(static_cast<size_t>(vocab)), noise(row.size()), probs(row.size()), first(row.size());
    for (int kind = 0; kind < 5; ++kind) {
      fill(row, kind, rng);
      for (float& q : noise) q = std::exponential_distribution<float>()(rng);
      for (const int64_t k : ks) {
        for (const float p : ps) {
          RowResult reference{};
          for (const RowKernels* build : builds()) {
            RowTask task{};
            task.logits = row.data();
            task.vocab = vocab;
            task.top_k = k;
            task.top_p = p;
            task.inv_temperature = 1.25f;
            task.seed = 0x123456789abcdefULL;
            task.step = 4;
            task.position = 0xffffffffu;
            task.exp_noise = kind % 2 ? noise.data() : nullptr;
            RowResult result{};
            expect(build->sample_row(task, buffers.scratch(), &result), "a good row is accepted", vocab);
            expect(result.token >= 0 && result.token < vocab && result.log_confidence <= 1e-6f, "result in range", vocab);
            task.probs = probs.data();
            build->sample_row(task, buffers.scratch(), &result);
            expect(probs[static_cast<size_t>(result.token)] > 0.0f, "the drawn token was kept", vocab);
            if (build == &kRowsDefault) {
              reference = result;
              first = probs;
            }
            expect(result.token == reference.token && result.log_confidence == reference.log_confidence &&
                       probs == first,
                   "instruction sets agree", vocab);
          }
        }
      }
    }
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      for (const int64_t where : {int64_t{0}, vocab / 2, vocab - 1}) {
        fill(row, 0, rng);
        row[static_cast<size_t>(where)] = bad;
        for (const RowKernels* build : builds()) {
          RowTask task{};
          task.logits = row.data();
          task.vocab = vocab;
          task.top_k = 100;
          task.top_p = 0.9f;
          task.inv_temperature = 1.0f;
          RowResult result{};
          expect(!build->sample_row(task, buffers.scratch(), &result), "a bad row is refused", vocab);
        }
      }
    }
  }
}

void check_widening() {
  std::vector<uint16_t> bits(65536);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  for (const RowKernels* build : builds()) {
    std::vector<float> half(bits.size()), brain(bits.size());
    build->widen_float16(bits.data(), 65536, half.data());
    build->widen_bfloat16(bits.data(), 65536, brain.data());
    for (uint32_t i = 0; i < 65536; ++i) {
      const int exponent = static_cast<int>(i >> 10 & 31), mantissa = static_cast<int>(i & 1023);
      const float sign = i & 0x8000u ? -1.0f : 1.0f;
      if (exponent == 31) {
        expect(mantissa ? std::isnan(half[i]) : std::isinf(half[i]), "float16 specials", i);
      } else {
        const float exact = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(1.0f * mantissa, -24);
        expect(half[i] == sign * exact, "float16 values", i);
      }
    }
    expect(brain[0x3f80] == 1.0f && brain[0xc000] == -2.0f && std::isnan(brain[0x7fc0]), "bfloat16 values", 0);
  }
}

void check_calls() {
  std::mt19937 rng(2);
  const int64_t rows = 37, vocab = 3001, stride = 3007;
  std::vector<float> logits(static_cast<size_t>((rows - 1) * stride + vocab));
  fill(logits, 0, rng);
  std::vector<int64_t> positions(rows);
  for (int64_t r = 0; r < rows; ++r) positions[static_cast<size_t>(r)] = 3 * r;
  const Logits view{logits.data(), LogitsType::kFloat32, rows, vocab, stride};
  SampleParams params{7, 1, 100, 0.9f, 1.0f};
  std::vector<int32_t> tokens(rows), again(rows);
  std::vector<float> confidence(rows);
  sample(view, positions.data(), params, nullptr, 1, tokens.data(), confidence.data());
  sample(view, positions.data(), params, nullptr, 5, again.data(), confidence.data());
  expect(tokens == again, "threads do not change the draw", vocab);

  const int64_t frames = 3 * rows;
  std::vector<int64_t> codes(static_cast<size_t>(frames), 16384);
  for (const Strategy strategy : {Strategy::kLowConfidence, Strategy::kRandom, Strategy::kFixedPosition}) {
    for (const int64_t n : {int64_t{0}, int64_t{1}, rows / 2, rows}) {
      std::vector<int64_t> next(static_cast<size_t>(n));
      remask(codes.data(), frames, positions.data(), tokens.data(), confidence.data(), rows,
             {n, 3.0f, strategy, 16384, 9, 2}, nullptr, next.data());
      int64_t masked = 0;
      for (const int64_t position : positions) masked += codes[static_cast<size_t>(position)] == 16384;
      expect(masked == n, "n_masked positions stay masked", n);
    }
  }
  bool refused = false;
  try {
    params.top_p = std::numeric_limits<float>::quiet_NaN();
    sample(view, positions.data(), params, nullptr, 1, tokens.data(), confidence.data());
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, "NaN top_p is refused", vocab);
  for (const int64_t n : {0, 1, 2, 3, 4, 5, 1001}) {
    std::vector<float> normals(static_cast<size_t>(n));
    philox_normal(5, 1, n, normals.data());
    for (const float z : normals) expect(std::fabs(z) < 7.0f, "normals in range", n);
  }
}

}  // namespace

int main() {
  check_rows();
  check_widening();
  check_calls();
  std::printf(failures ? "%d failures\n" : "all kernel checks passed\n", failures);
  return failures != 0;
}
