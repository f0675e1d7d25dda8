// solera._io: files read into, and written from, one arena of memory by threads of their own.
//
// The arena is any writable buffer of the caller's (solera.weights._ring keeps it); it holds no
// tensors here, only bytes by their place. A ticket stands for any number of reads or writes;
// waiting for it gives up the GIL and raises the first error, with its errno and path. The Python
// form of the same is in _ring.py.
//
// With a descriptor opened past the page cache (O_DIRECT), whole pages go to and from the device
// directly: half the memory traffic, no CPU time for copies, and nothing else is pushed out of the
// cache. It wants file offsets, addresses and lengths that are multiples of a page, so a read takes
// in the whole pages around what was asked for (the caller leaves room), and a write leaves its
// first and last partial page to the ordinary descriptor.
#include <pybind11/pybind11.h>

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kChunk = uint64_t(4)
                            << 20;  // one system call; also how work is split over threads
constexpr uint64_t kFlush = uint64_t(1)
                            << 20;  // buffered writes from this size on are flushed and dropped

uint64_t down(uint64_t value) { return value / kPage * kPage; }
uint64_t up(uint64_t value) { return down(value + kPage - 1); }

struct Ticket {
  int64_t open = 0;  // chunks not done yet
  int error = 0;
  std::string path;
};

struct Chunk {
  std::shared_ptr<Ticket> ticket;
  std::shared_ptr<const std::string> path;
  int fd, direct;  // direct: -1 where there is none
  bool drop;       // from the page cache, when done
  uint64_t offset, length;
  char* at;
};

// All of pread or pwrite, whatever a single call did. 0, or errno; bytes done through `done`.
template <class Call>
int all_of(Call call, uint64_t length, uint64_t least, uint64_t& done) {
  done = 0;
  while (done < length) {
    const ssize_t got = call(done);
    if (got < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    done += uint64_t(got);
    if (got == 0 || (done >= least && least < length)) break;
  }
  return done >= least ? 0 : ENODATA;  // the file is shorter than its header said
}

void forget(int fd, uint64_t offset, uint64_t length) {
#ifdef __linux__
  posix_fadvise(fd, off_t(offset), off_t(length), POSIX_FADV_DONTNEED);
#else
  (void)fd, (void)offset, (void)length;
#endif
}

int read_plain(int fd, uint64_t offset, uint64_t length, char* at) {
  uint64_t done;
  return all_of(
      [&](uint64_t from) { return pread(fd, at + from, length - from, off_t(offset + from)); },
      length, length, done);
}

int read_chunk(const Chunk& c) {
  if (c.direct >= 0) {
    const uint64_t first = down(c.offset), length = up(c.offset + c.length) - first;
    char* at = c.at - (c.offset - first);
    uint64_t done;
    const int error = all_of(
        [&](uint64_t from) {
          return pread(c.direct, at + from, length - from, off_t(first + from));
        },
        length, c.offset + c.length - first, done);
    if (error != EINVAL) return error;
  }
  const int error = read_plain(c.fd, c.offset, c.length, c.at);
  if (!error && c.drop) forget(c.fd, c.offset, c.length);
  return error;
}

int write_plain(int fd, uint64_t offset, uint64_t length, const char* at) {
  uint64_t done;
  return all_of(
      [&](uint64_t from) { return pwrite(fd, at + from, length - from, off_t(offset + from)); },
      length, length, done);
}

int write_chunk(const Chunk& c) {
  const uint64_t first = up(c.offset), last = down(c.offset + c.length);
  if (c.direct >= 0 && first < last) {
    int error = write_plain(c.direct, first, last - first, c.at + (first - c.offset));
    if (!error) error = write_plain(c.fd, c.offset, first - c.offset, c.at);
    if (!error)
      error = write_plain(c.fd, last, c.offset + c.length - last, c.at + (last - c.offset));
    if (error != EINVAL) return error;
  }
  const int error = write_plain(c.fd, c.offset, c.length, c.at);
#ifdef __linux__
  if (!error && c.length >= kFlush) {
    sync_file_range(
        c.fd, off_t(c.offset), off_t(c.length),
        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    forget(c.fd, c.offset, c.length);
  }
#endif
  return error;
}

// Threads that take chunks from a queue, oldest first.
class Crew {
 public:
  Crew(int threads, int (*work)(const Chunk&)) : work_(work) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
  }

  ~Crew() {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      stopped_ = true;
      queue_.clear();
    }
    ready_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void add(Chunk whole) {
    std::lock_guard<std::mutex> hold(mutex_);
    while (whole.length) {
      Chunk part = whole;
      const uint64_t cut = (whole.offset / kChunk + 1) * kChunk;  // on pages of the file
      if (whole.offset + whole.length > cut) part.length = cut - whole.offset;
      whole.offset += part.length;
      whole.length -= part.length;
      whole.at += part.length;
      ++part.ticket->open;
      queue_.push_back(std::move(part));
      ready_.notify_one();
    }
  }

  void wait(const Ticket& ticket) {
    std::unique_lock<std::mutex> hold(mutex_);
    done_.wait(hold, [&] { return ticket.open == 0; });
  }

  bool idle(const Ticket& ticket) {
    std::lock_guard<std::mutex> hold(mutex_);
    return ticket.open == 0;
  }

 private:
  void run() {
    std::unique_lock<std::mutex> hold(mutex_);
    for (;;) {
      ready_.wait(hold, [&] { return stopped_ || !queue_.empty(); });
      if (stopped_) return;
      Chunk chunk = std::move(queue_.front());
      queue_.pop_front();
      if (!chunk.ticket->error) {
        hold.unlock();
        const int error = work_(chunk);
        hold.lock();
        if (error && !chunk.ticket->error) {
          chunk.ticket->error = error;
          chunk.ticket->path = *chunk.path;
        }
      }
      if (--chunk.ticket->open == 0) done_.notify_all();
    }
  }

  int (*work_)(const Chunk&);
  std::mutex mutex_;
  std::condition_variable ready_, done_;
  std::deque<Chunk> queue_;
  std::vector<std::thread> threads_;
  bool stopped_ = false;
};

class Ring {
 public:
  Ring(const py::buffer& arena, int readers, int writers) : view_(arena.request(true)) {
    if (readers < 1 || writers < 1) throw py::value_error("readers, writers: expected 1 or more");
    base_ = static_cast<char*>(view_.ptr);
    size_ = uint64_t(view_.size) * uint64_t(view_.itemsize);
    readers_ = std::make_unique<Crew>(readers, read_chunk);
    writers_ = std::make_unique<Crew>(writers, write_chunk);
  }

  ~Ring() { close(); }

  void close() {
    py::gil_scoped_release release;
    readers_.reset();
    writers_.reset();
  }

  void read(uint64_t ticket, const std::string& path, int fd, int direct, bool drop,
            uint64_t offset, uint64_t length, uint64_t place) {
    const uint64_t before = direct < 0 ? 0 : offset - down(offset);
    const uint64_t after = direct < 0 ? 0 : up(offset + length) - (offset + length);
    check(offset, length, place, direct, before, after);
    add(reading_, readers_, ticket, path,
        {nullptr, nullptr, fd, direct, drop, offset, length, base_ + place});
  }

  void write(uint64_t ticket, const std::string& path, int fd, int direct, uint64_t offset,
             uint64_t length, uint64_t place) {
    check(offset, length, place, direct, 0, 0);
    add(writing_, writers_, ticket, path,
        {nullptr, nullptr, fd, direct, true, offset, length, base_ + place});
  }

  void wait_read(uint64_t ticket) { wait(reading_, readers_, ticket); }
  void wait_write(uint64_t ticket) { wait(writing_, writers_, ticket); }
  bool written(uint64_t ticket) {
    const auto found = writing_.find(ticket);
    return found == writing_.end() || !writers_ || writers_->idle(*found->second);
  }

 private:
  typedef std::map<uint64_t, std::shared_ptr<Ticket>> Tickets;

  void check(uint64_t offset, uint64_t length, uint64_t place, int direct, uint64_t before,
             uint64_t after) const {
    if (place < before || place > size_ || length + after > size_ - place)
      throw py::index_error("place: outside the arena");
    if (direct >= 0 && (reinterpret_cast<uintptr_t>(base_) + place - offset) % kPage)
      throw py::value_error("place: expected the offset's position within a page");
  }

  void add(Tickets& tickets, const std::unique_ptr<Crew>& crew, uint64_t ticket,
           const std::string& path, Chunk chunk) {
    if (!crew) throw py::value_error("the ring is closed");
    auto& state = tickets[ticket];
    if (!state) state = std::make_shared<Ticket>();
    chunk.ticket = state;
    chunk.path = std::make_shared<const std::string>(path);
    crew->add(std::move(chunk));
  }

  void wait(Tickets& tickets, const std::unique_ptr<Crew>& crew, uint64_t ticket) {
    const auto found = tickets.find(ticket);
    if (found == tickets.end()) return;
    const std::shared_ptr<Ticket> state = found->second;
    tickets.erase(found);
    if (!crew) throw py::value_error("the ring is closed");
    {
      py::gil_scoped_release release;
      crew->wait(*state);
    }
    if (state->error) {
      errno = state->error;
      PyErr_SetFromErrnoWithFilename(PyExc_OSError, state->path.c_str());
      throw py::error_already_set();
    }
  }

  py::buffer_info view_;
  char* base_;
  uint64_t size_;
  Tickets reading_, writing_;
  std::unique_ptr<Crew> readers_, writers_;
};

}  // namespace

PYBIND11_MODULE(_io, m) {
  m.doc() = "Files to and from one arena of memory, by threads that hold no GIL.";
  m.attr("CHUNK") = kChunk;
  py::class_<Ring>(m, "Ring")
      .def(py::init<const py::buffer&, int, int>(), py::arg("arena"), py::arg("readers"),
           py::arg("writers"))
      .def("read", &Ring::read)
      .def("write", &Ring::write)
      .def("wait_read", &Ring::wait_read)
      .def("wait_write", &Ring::wait_write)
      .def("written", &Ring::written)
      .def("close", &Ring::close);
}
