// Copies of transformer blocks between host buffers, in a thread that never takes the GIL.
//
// A Python module of its own, `blip2fast._block_stream`, without torch: it sees addresses only.
// `blip2fast/offload/copying.py` holds the tensors that they belong to.
#include <pybind11/pybind11.h>

#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace {

// Copies in the order of `start`; a ticket is the number of the copy, from 1.
class HostCopier {
 public:
  HostCopier() : thread_([this] { run(); }) {}
  ~HostCopier() {
    close();
  }
  HostCopier(const HostCopier&) = delete;
  HostCopier& operator=(const HostCopier&) = delete;

  uint64_t start(uintptr_t target, uintptr_t source, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) throw std::runtime_error("HostCopier is closed");
    waiting_.push_back({target, source, bytes});
    changed_.notify_all();
    return ++started_;
  }

  void wait(uint64_t ticket) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (ticket > started_) throw std::invalid_argument("no copy has this ticket");
    changed_.wait(lock, [&] { return done_ >= ticket; });
  }

  // Ends what was started, then the thread.
  void close() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
      changed_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
  }

 private:
  struct Copy {
    uintptr_t target, source;
    size_t bytes;
  };

  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return closed_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      const Copy copy = waiting_.front();
      waiting_.pop_front();
      lock.unlock();
      std::memcpy(reinterpret_cast<void*>(copy.target), reinterpret_cast<const void*>(copy.source),
                  copy.bytes);
      lock.lock();
      ++done_;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Copy> waiting_;
  uint64_t started_ = 0, done_ = 0;
  bool closed_ = false;
  std::thread thread_;  // last: it reads the others
};

}  // namespace

PYBIND11_MODULE(_block_stream, module) {
  namespace py = pybind11;
  using WithoutGil = py::call_guard<py::gil_scoped_release>;
  module.doc() = "Copies between host buffers in a thread that never takes the GIL.";
  py::class_<HostCopier>(module, "HostCopier")
      .def(py::init<>())
      .def("start", &HostCopier::start, py::arg("target"), py::arg("source"), py::arg("bytes"),
           WithoutGil(), "Begin a copy between addresses; returns its ticket.")
      .def("wait", &HostCopier::wait, py::arg("ticket"), WithoutGil(),
           "Return when the copy of this ticket is done.")
      .def("close", &HostCopier::close, WithoutGil(), "End the copies, then the thread.");
}
