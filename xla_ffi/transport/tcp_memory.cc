#include "transport/tcp_memory.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

namespace jax_deepep {
namespace {

static_assert(sizeof(std::atomic<uint64_t>) == sizeof(uint64_t), "a flag is a 64-bit word");

constexpr int kPollMilliseconds = 100;
constexpr size_t kMostPieces = 512;  // of one call of sendmsg, below IOV_MAX

std::string Failure(const char* what) { return std::string(what) + ": " + std::strerror(errno); }

}  // namespace

// Reads exactly as many bytes as wanted, few at a time through a buffer.
class SocketReader {
 public:
  explicit SocketReader(int descriptor) : descriptor_(descriptor), buffer_(new char[kBytes]) {}

  // Returns an error, or empty.
  std::string Read(void* to, size_t bytes) {
    auto* out = static_cast<char*>(to);
    while (bytes > 0) {
      if (begin_ == end_ && bytes >= kBytes) {
        size_t received = 0;
        if (std::string error = Receive(out, bytes, &received); !error.empty()) return error;
        out += received;
        bytes -= received;
        continue;
      }
      if (begin_ == end_) {
        begin_ = 0;
        if (std::string error = Receive(buffer_.get(), kBytes, &end_); !error.empty()) return error;
      }
      const size_t here = std::min(bytes, end_ - begin_);
      std::memcpy(out, buffer_.get() + begin_, here);
      begin_ += here;
      out += here;
      bytes -= here;
    }
    return "";
  }

 private:
  static constexpr size_t kBytes = 1 << 16;

  std::string Receive(char* to, size_t bytes, size_t* received) {
    while (true) {
      const ssize_t got = recv(descriptor_, to, bytes, 0);
      if (got > 0) {
        *received = static_cast<size_t>(got);
        return "";
      }
      if (got == 0) return "it was closed at the other end";
      if (errno != EINTR) return Failure("recv");
    }
  }

  const int descriptor_;
  const std::unique_ptr<char[]> buffer_;
  size_t begin_ = 0, end_ = 0;
};

TcpMemory::~TcpMemory() {
  Close();
  close(descriptor_);
}

void TcpMemory::Start(std::vector<Region> regions, std::function<void()> on_flag,
                      std::function<void(const std::string&)> on_lost) {
  regions_ = std::move(regions);
  on_flag_ = std::move(on_flag);
  on_lost_ = std::move(on_lost);
  const int yes = 1;
  setsockopt(descriptor_, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));  // flags are awaited
  setsockopt(descriptor_, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof(yes));  // hosts that vanish
  sender_ = std::thread([this] { SendQueued(); });
  receiver_ = std::thread([this] { Receive(); });
}

void TcpMemory::Put(int region, size_t offset, const void* from, size_t bytes) {
  Queue({{kBytes, static_cast<uint32_t>(region), offset, bytes}, static_cast<const char*>(from)});
}

void TcpMemory::PutCopy(int region, size_t offset, const void* from, size_t bytes) {
  Item item{{kBytes, static_cast<uint32_t>(region), offset, bytes}, nullptr};
  item.copy.reset(new char[bytes]);
  std::memcpy(item.copy.get(), from, bytes);
  item.from = item.copy.get();
  Queue(std::move(item));
}

void TcpMemory::PutFlag(int region, size_t offset, uint64_t value) {
  Queue({{kFlag, static_cast<uint32_t>(region), offset, value}, nullptr});
}

void TcpMemory::Queue(Item item) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) return;
  queue_.push_back(std::move(item));
  queued_.notify_one();
}

void TcpMemory::SendQueued() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    queued_.wait(lock, [this] { return !queue_.empty() || closing_; });
    if (queue_.empty()) break;
    std::vector<Item> items;
    items.swap(queue_);
    sending_ = true;
    lock.unlock();
    const bool sent = SendAll(items);
    if (!sent) shutdown(descriptor_, SHUT_RDWR);  // the receiver reports it
    lock.lock();
    sending_ = false;
    has_failed_ = !sent;
    sent_.notify_all();
    if (!sent) break;
  }
}

bool TcpMemory::SendAll(const std::vector<Item>& items) {
  std::vector<iovec> pieces;
  for (const Item& item : items) {
    pieces.push_back({const_cast<Header*>(&item.header), sizeof(Header)});
    if (item.bytes() > 0) pieces.push_back({const_cast<char*>(item.from), item.bytes()});
  }
  size_t next = 0;
  while (next < pieces.size() && !stopping_) {
    msghdr message = {};
    message.msg_iov = pieces.data() + next;
    message.msg_iovlen = std::min(pieces.size() - next, kMostPieces);
    const ssize_t sent = sendmsg(descriptor_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) return false;
      pollfd writable = {descriptor_, POLLOUT, 0};
      poll(&writable, 1, kPollMilliseconds);
      continue;
    }
    auto left = static_cast<size_t>(sent);
    bytes_sent_ += left;
    while (next < pieces.size() && left >= pieces[next].iov_len) left -= pieces[next++].iov_len;
    if (left > 0) {
      pieces[next].iov_base = static_cast<char*>(pieces[next].iov_base) + left;
      pieces[next].iov_len -= left;
    }
  }
  return true;
}

void TcpMemory::Receive() {
  SocketReader reader(descriptor_);
  std::string error;
  while (error.empty()) error = ReceiveOne(&reader);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) return;
    closing_ = true;
    queued_.notify_one();
  }
  on_lost_(error);
}

std::string TcpMemory::ReceiveOne(SocketReader* reader) {
  Header header;
  if (std::string error = reader->Read(&header, sizeof(header)); !error.empty()) return error;
  const bool is_flag = header.kind == kFlag;
  const uint64_t bytes = is_flag ? sizeof(uint64_t) : header.bytes_or_value;
  const bool inside = header.region < regions_.size() &&
                      header.offset <= regions_[header.region].bytes &&
                      bytes <= regions_[header.region].bytes - header.offset;
  if (!inside || (is_flag && header.offset % sizeof(uint64_t) != 0)) {
    return "a put does not fit: expected at most the bytes of a region, got " +
           std::to_string(bytes) + " at " + std::to_string(header.offset) + " of region " +
           std::to_string(header.region) + "; run the same build on all hosts";
  }
  char* to = regions_[header.region].memory + header.offset;
  if (!is_flag) return reader->Read(to, bytes);
  // Pairs with acquire loads by whoever waits for the flag: earlier puts are visible then.
  reinterpret_cast<std::atomic<uint64_t>*>(to)->store(header.bytes_or_value,
                                                      std::memory_order_release);
  on_flag_();
  return "";
}

void TcpMemory::Close(std::chrono::duration<double> longest_stall) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    closing_ = true;
    queued_.notify_one();
    const auto is_sent = [this] { return has_failed_ || (queue_.empty() && !sending_); };
    const auto stall = std::chrono::duration_cast<std::chrono::nanoseconds>(longest_stall);
    for (uint64_t before = bytes_sent_ + 1; sender_.joinable() && before != bytes_sent_;) {
      before = bytes_sent_;
      if (sent_.wait_for(lock, stall, is_sent)) break;
    }
  }
  stopping_ = true;
  if (sender_.joinable()) sender_.join();
  shutdown(descriptor_, SHUT_RDWR);  // which ends the receiver
  if (receiver_.joinable()) receiver_.join();
}

}  // namespace jax_deepep
