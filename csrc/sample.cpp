// Sampling over all rows: checks, choice of instruction set, threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "kernels.h"
#include "rows.h"

namespace lada_rt {
namespace {

const RowKernels& row_kernels() {
#ifdef LADA_RT_X86_VARIANTS
  static const RowKernels& chosen = [&]() -> const RowKernels& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      return kRowsAvx512;
    }
    if (__builtin_cpu_supports("avx2")) return kRowsAvx2;
    return kRowsDefault;
  }();
  return chosen;
#else
  return kRowsDefault;
#endif
}

int available_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// One thread's buffers, in one allocation per call and thread.
class Workspace {
 public:
  explicit Workspace(int64_t vocab) {
    const size_t n = static_cast<size_t>((vocab + kBlock - 1) / kBlock * kBlock + kGroups);
    floats_.reset(new float[3 * n]);
    ints_.reset(new int32_t[3 * n]);
    masses_.reset(new int64_t[2 * n]);
    scratch_ = {floats_.get(),   floats_.get() + n,   floats_.get() + 2 * n, ints_.get(), ints_.get() + n,
                masses_.get(), ints_.get() + 2 * n, masses_.get() + n};
  }
  const RowScratch& scratch() const { return scratch_; }

 private:
  std::unique_ptr<float[]> floats_;
  std::unique_ptr<int32_t[]> ints_;
  std::unique_ptr<int64_t[]> masses_;
  RowScratch scratch_;
};

void check(const Logits& logits, const SampleParams& params, int n_threads) {
  if (logits.rows < 0 || logits.vocab < 1 || logits.vocab > kMaxVocab) {
    throw std::invalid_argument("expected logits [R, V] with 1 <= V <= 65536, got V = " + std::to_string(logits.vocab) +
                                "; split or pad the vocabulary");
  }
  if (params.top_k < 0) {
    throw std::invalid_argument("expected top_k >= 1, or 0 for off, got " + std::to_string(params.top_k));
  }
  if (!(params.top_p >= 0.0f)) {
    throw std::invalid_argument("expected top_p >= 0 (1 or more is off), got " + std::to_string(params.top_p));
  }
  if (!(params.inv_temperature > 0.0f) || !std::isfinite(params.inv_temperature)) {
    throw std::invalid_argument("expected a temperature above 0 with a finite float32 inverse, got an inverse of " +
                                std::to_string(params.inv_temperature));
  }
  if (n_threads < 0) {
    throw std::invalid_argument("expected n_threads >= 1, or 0 for automatic, got " + std::to_string(n_threads));
  }
}

void run_rows(const Logits& logits, const int64_t* positions, const SampleParams& params, const float* exp_noise,
              int n_threads, int32_t* tokens, float* log_confidence, float* probs) {
  const RowKernels& kernels = row_kernels();
  const int64_t rows = logits.rows, vocab = logits.vocab;
  if (rows == 0) return;

  // A thread costs tens of microseconds to start; 2^18 elements take about as long.
  const int64_t work_limit = std::max<int64_t>(1, (rows * vocab) >> 18);
  const int64_t wanted = n_threads > 0 ? n_threads : available_cores();
  const int64_t workers = std::max<int64_t>(1, std::min({wanted, work_limit, rows}));
  const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(16, rows / (4 * workers)));

  // Allocated before any thread starts, so that running out of memory is an ordinary exception.
  std::vector<std::unique_ptr<Workspace>> workspaces;
  for (int64_t w = 0; w < workers; ++w) workspaces.push_back(std::make_unique<Workspace>(vocab));

  constexpr int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> next{0}, first_bad{none};
  auto work = [&](const RowScratch& scratch) noexcept {
    for (;;) {
      const int64_t begin = next.fetch_add(chunk);
      if (begin >= rows) return;
      const int64_t end = std::min(rows, begin + chunk);
      for (int64_t r = begin; r < end; ++r) {
        RowTask task{};
        if (logits.type == LogitsType::kFloat32) {
          task.logits = static_cast<const float*>(logits.data) + r * logits.row_stride;
          task.next = r + 1 < rows ? task.logits + logits.row_stride : nullptr;
        } else {
          const uint16_t* in = static_cast<const uint16_t*>(logits.data) + r * logits.row_stride;
          (logits.type == LogitsType::kFloat16 ? kernels.widen_float16 : kernels.widen_bfloat16)(in, vocab, scratch.row);
          task.logits = scratch.row;
        }
        task.vocab = vocab;
        task.top_k = params.top_k;
        task.top_p = params.top_p;
        task.inv_temperature = params.inv_temperature;
        task.seed = params.seed;
        task.step = params.step;
        task.position = positions ? static_cast<uint32_t>(positions[r]) : 0;
        task.exp_noise = exp_noise ? exp_noise + r * vocab : nullptr;
        task.probs = probs ? probs + r * vocab : nullptr;
        RowResult result{};
        if (!kernels.sample_row(task, scratch, &result)) {
          int64_t seen = first_bad.load();
          while (r < seen && !first_bad.compare_exchange_weak(seen, r)) {
          }
          continue;
        }
        if (!probs) {
          tokens[r] = result.token;
          log_confidence[r] = result.log_confidence;
        }
      }
    }
  };

  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(workers));
  for (int64_t w = 1; w < workers; ++w) {
    try {
      threads.emplace_back(work, std::cref(workspaces[static_cast<size_t>(w)]->scratch()));
    } catch (const std::system_error&) {
      break;  // no more threads to be had: the ones that run share the rows
    }
  }
  work(workspaces[0]->scratch());
  for (std::thread& t : threads) t.join();

  if (first_bad.load() != none) {
    const int64_t r = first_bad.load();
    const std::string where = positions ? " (position " + std::to_string(positions[r]) + ")" : "";
    throw std::invalid_argument("expected finite logits, or -inf to exclude a token: row " + std::to_string(r) + where +
                                " holds NaN or +inf, or nothing but -inf; check the network's output");
  }
}

}  // namespace

void sample(const Logits& logits, const int64_t* positions, const SampleParams& params, const float* exp_noise,
            int n_threads, int32_t* tokens, float* log_confidence) {
  check(logits, params, n_threads);
  for (int64_t r = 0; r < logits.rows; ++r) {
    if (positions[r] < 0 || positions[r] > std::numeric_limits<uint32_t>::max()) {
      throw std::invalid_argument("expected positions in [0, 2^32), got " + std::to_string(positions[r]) + " at row " +
                                  std::to_string(r) + "; pass absolute frame indices");
    }
  }
  run_rows(logits, positions, params, exp_noise, n_threads, tokens, log_confidence, nullptr);
}

void filtered_probs(const Logits& logits, const SampleParams& params, int n_threads, float* probs) {
  check(logits, params, n_threads);
  run_rows(logits, nullptr, params, nullptr, n_threads, nullptr, nullptr, probs);
}

}  // namespace lada_rt
