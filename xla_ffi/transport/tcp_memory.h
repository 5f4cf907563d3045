// Writes into memory of a process on another node, over a TCP connection: what RDMA does, for hosts
// without it. Puts of one connection arrive in the order in which they were queued.
#ifndef JAX_DEEPEP_TRANSPORT_TCP_MEMORY_H_
#define JAX_DEEPEP_TRANSPORT_TCP_MEMORY_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace jax_deepep {

class TcpMemory {
 public:
  // Memory here that the peer may write. It names a region by its index.
  struct Region {
    char* memory;
    size_t bytes;
  };

  // Takes over `descriptor`, a connected socket.
  explicit TcpMemory(int descriptor) : descriptor_(descriptor) {}
  ~TcpMemory();
  TcpMemory(const TcpMemory&) = delete;
  TcpMemory& operator=(const TcpMemory&) = delete;

  // Begin. `on_flag` is called after a flag of the peer has been set here, `on_lost` at the end,
  // with the reason, if the connection ends before Close. Both on the thread that writes to the
  // regions.
  void Start(std::vector<Region> regions, std::function<void()> on_flag,
             std::function<void(const std::string&)> on_lost);

  // Queue a write of `bytes` to `offset` of a region of the peer. Returns at once: `from` must stay
  // as it is until the peer has confirmed a later flag. Thread-safe, as the next two.
  void Put(int region, size_t offset, const void* from, size_t bytes);

  // Likewise, of a copy.
  void PutCopy(int region, size_t offset, const void* from, size_t bytes);

  // Queue a release store of a std::atomic<uint64_t>, after all puts before it.
  void PutFlag(int region, size_t offset, uint64_t value);

  // Send what is queued, unless the peer accepts nothing for `longest_stall`, and end. Idempotent.
  void Close(std::chrono::duration<double> longest_stall = {});

 private:
  enum Kind : uint32_t { kBytes, kFlag };

  // Precedes the bytes of a put.
  struct Header {
    Kind kind;
    uint32_t region;
    uint64_t offset;
    uint64_t bytes_or_value;
  };

  struct Item {
    Header header;
    const char* from = nullptr;
    std::unique_ptr<char[]> copy = nullptr;

    size_t bytes() const { return header.kind == kBytes ? header.bytes_or_value : 0; }
  };

  void Queue(Item item);
  void SendQueued();
  bool SendAll(const std::vector<Item>& items);
  void Receive();
  std::string ReceiveOne(class SocketReader* reader);

  const int descriptor_;
  std::vector<Region> regions_;
  std::function<void()> on_flag_;
  std::function<void(const std::string&)> on_lost_;

  std::mutex mutex_;
  std::condition_variable queued_;
  std::condition_variable sent_;
  std::vector<Item> queue_;
  bool sending_ = false;
  bool closing_ = false;
  bool has_failed_ = false;  // nothing is sent any more
  std::atomic<uint64_t> bytes_sent_{0};
  std::atomic<bool> stopping_{false};
  std::thread sender_;
  std::thread receiver_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TRANSPORT_TCP_MEMORY_H_
