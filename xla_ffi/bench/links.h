// The limits of the links between GPUs: rows pushed to peers or pulled from them between fixed
// slots, in the bench's own memory. Nothing is routed, counted or allocated.
//
// Every rank makes a LinkRank, gives its handle to all others, attaches theirs, and then calls the
// same measurements with the same arguments in the same order. Waits on peers end after some
// seconds. All of it throws std::runtime_error.
#ifndef JAX_DEEPEP_BENCH_LINKS_H_
#define JAX_DEEPEP_BENCH_LINKS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/link_kernels.h"

namespace jax_deepep {

class LinkRank {
 public:
  // Allocates for chains of up to `rows` rows of `row_bytes`, and copies of up to `copy_bytes`.
  LinkRank(int ordinal, int rank, int num_ranks, int rows, int64_t row_bytes, int64_t copy_bytes);
  ~LinkRank();
  LinkRank(const LinkRank&) = delete;
  LinkRank& operator=(const LinkRank&) = delete;

  // Names this rank's memory to the other processes of this host.
  std::string handle() const;
  void Attach(int rank, const std::string& handle);

  // The following return device seconds of this rank, one number per trial. All ranks begin
  // together.

  // `length` steps, one after the other in one CUDA graph.
  std::vector<double> Chain(ChainStep step, int rows, int length, int trials);
  // `bytes` to the next rank, or from it, on all ranks at once: by kernels on `num_sms` SMs, or by
  // copy engines if that is 0.
  std::vector<double> Copy(bool push, bool bulk, int num_sms, int64_t bytes, int trials);
  // A flag from rank 2n to 2n + 1 and back, with a row each way or alone, on average over
  // `count`. A rank without a partner returns an empty vector.
  std::vector<double> RoundTrips(bool with_row, int count, int trials);

 private:
  void Reset();
  void Rendezvous(uint64_t wait_ns);
  double SecondsOf(const std::function<void()>& enqueue);
  void Finish();
  void CheckBytes(const char* at, int64_t bytes, int value) const;

  const int ordinal_;
  const int64_t copy_bytes_;
  LinkFrame frame_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_BENCH_LINKS_H_
