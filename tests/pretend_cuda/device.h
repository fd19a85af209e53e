// The pretend device: streams that are threads, memory that is the host's, copies, page-locked host memory.
//
// Device memory is ordinary host memory. Each stream is a thread with a queue. Copies and kernels are asynchronous
// where the real ones are, and, where the settings say so, late, slow and poisoned. Everything in here needs
// `gpu().mutex`, unless a comment says otherwise.

#pragma once

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <unordered_map>

#include "order.h"

constexpr size_t PAGE = 4096, LARGE_PAGE = 2 << 20, POOL_STEP = 512;
constexpr size_t LAUNCHES_AHEAD = 1024;  // of a stream, as on NVIDIA's cards
constexpr int POISON = 0xFF;  // NaN in every floating-point type
constexpr double CYCLES_PER_MS = 2e6;  // of torch.cuda._sleep

// ---- settings, each as PRETEND_CUDA_<name> in the environment ------------------------------------------------------

struct Settings {
  double vram = 24e9;        // bytes of the device
  double context = 300e6;    // of these, what the driver takes for itself
  double copy_gbps = 0;      // speed of the link, each way; 0: copies are as fast as memcpy
  double late_ms = 3;        // half of the late tasks begin up to so much later
  double seed = 0;           // of the lateness
  bool late_copies = false, late_compute = false;
  bool poison = false;          // fresh memory, and the target of a copy that is under way, holds NaN
  bool float_products = false;  // matrix products of 16 bits are computed in float32: some CPUs are faster so
  bool pageable_waits = false;  // a copy from pageable memory blocks the host until it is over

  bool set(const std::string& name, const std::string& value) {
    const std::map<std::string, double*> numbers = {{"VRAM", &vram},
                                                    {"CONTEXT", &context},
                                                    {"COPY_GBPS", &copy_gbps},
                                                    {"LATE_MS", &late_ms},
                                                    {"SEED", &seed}};
    const std::map<std::string, bool*> switches = {{"POISON", &poison},
                                                   {"FLOAT_PRODUCTS", &float_products},
                                                   {"PAGEABLE_WAITS", &pageable_waits}};
    if (auto it = numbers.find(name); it != numbers.end()) *it->second = atof(value.c_str());
    else if (auto it = switches.find(name); it != switches.end()) *it->second = !value.empty() && value != "0";
    else if (name == "LATE") {
      late_copies = value.find("copies") != std::string::npos;
      late_compute = value.find("compute") != std::string::npos;
    } else return false;
    return true;
  }

  Settings() {
    const std::string prefix = "PRETEND_CUDA_";
    for (char** entry = environ; *entry; ++entry) {
      std::string text = *entry;
      auto equals = text.find('=');
      if (text.rfind(prefix, 0) == 0) set(text.substr(prefix.size(), equals - prefix.size()), text.substr(equals + 1));
    }
  }
};

// ---- what there is -------------------------------------------------------------------------------------------------

struct Point {  // a place in a stream's queue
  bool is_reached = false;
  double at_ms = 0;
  Clock clock;
};
using PointPtr = std::shared_ptr<Point>;

enum class Kind { order, compute, copy };

struct Task {
  Kind kind;
  std::function<void()> work;
  std::vector<PointPtr> after;
  PointPtr done;
};

struct CUstream_st {
  int priority = 0, lane = -1;
  bool waits_for_legacy = false;  // and the legacy stream for it
  std::deque<Task> queue;
  std::condition_variable filled;
  bool has_thread = false;
  PointPtr last = std::make_shared<Point>();
  Clock clock;
  CUstream_st() { last->is_reached = true; }
};

struct CUevent_st {
  bool has_time;
  PointPtr point;  // null: never recorded
};

struct Allocation {
  size_t size, charged;
  bool is_pooled;  // by cudaMallocAsync
};

struct LockedPages {
  size_t size;
  bool is_allocated;           // by cudaHostAlloc
  std::vector<Access> copies;  // the last of each lane
};

struct Gpu {
  Settings settings;
  std::mutex mutex, link;
  double link_free_ms[2] = {0, 0};  // each way, when the last copy is over; needs `link`
  std::condition_variable reached;
  std::mt19937 random{static_cast<unsigned>(settings.seed)};
  std::map<uintptr_t, Allocation> allocations;
  std::map<uintptr_t, LockedPages> locked;
  History history;
  std::set<CUstream_st*> streams;
  CUstream_st legacy;
  int lanes = 1;
  Clock host{0};
  size_t copied_to_device = 0, copied_to_host = 0;
  double used = settings.context, pooled = 0, pooled_peak = 0;
  std::unordered_map<const void*, const char*> kernels;
  std::map<std::string, uint64_t> calls;
  std::map<std::string, std::pair<int64_t, int>> faults;  // by function: calls that still succeed, then the code
  std::set<std::string> names;
  std::vector<std::string> violations;
  cudaError_t sticky = cudaSuccess;  // what every call answers from here on
  int running = 0;                   // tasks at work
  Gpu() { streams.insert(&legacy); }
};

inline Gpu& gpu() {
  static Gpu* made = new Gpu;  // never destroyed: its threads outlive main
  return *made;
}

inline void violate(const std::string& what) {
  auto& violations = gpu().violations;
  if (violations.size() < 20) fprintf(stderr, "pretend CUDA: VIOLATION: %s\n", what.c_str());
  violations.push_back(what);
}

inline size_t rounded(size_t size, size_t step) { return (std::max<size_t>(size, 1) + step - 1) / step * step; }

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// ---- streams -------------------------------------------------------------------------------------------------------

inline double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void nap(double ms) {  // without the mutex
  if (ms > 0) std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(ms));
}

inline void work_off(CUstream_st* stream) {  // a stream's thread; without the mutex
  auto& all = gpu();
  std::unique_lock lock(all.mutex);
  for (;;) {
    stream->filled.wait(lock, [&] { return !stream->queue.empty(); });
    Task task = std::move(stream->queue.front());
    stream->queue.pop_front();
    for (auto& point : task.after) all.reached.wait(lock, [&] { return point->is_reached; });
    if (task.work) {
      bool may_be_late = (task.kind == Kind::copy && all.settings.late_copies) ||
                         (task.kind == Kind::compute && all.settings.late_compute);
      double delay_ms = may_be_late && all.random() % 2 ? all.settings.late_ms * (all.random() % 1000) / 1000 : 0;
      lock.unlock();
      nap(delay_ms);
      lock.lock();
      if (all.sticky == cudaSuccess) {  // a device that has failed runs nothing more: its memory may be gone
        ++all.running;
        lock.unlock();
        task.work();
        lock.lock();
        --all.running;
      }
      task.work = nullptr;
    }
    task.done->at_ms = now_ms();
    task.done->is_reached = true;
    all.reached.notify_all();
  }
}

// What the host queues next on the stream comes after all that the host has waited for.
inline void advance(CUstream_st& stream) {
  if (stream.lane < 0) stream.lane = gpu().lanes++;
  join(stream.clock, gpu().host);
  if (stream.clock.size() <= static_cast<size_t>(stream.lane)) stream.clock.resize(stream.lane + 1);
  ++stream.clock[stream.lane];
}

inline PointPtr enqueue(CUstream_st& stream, Kind kind, std::function<void()> work, std::vector<PointPtr> after = {}) {
  auto& all = gpu();
  bool is_legacy = &stream == &all.legacy;
  for (auto* other : all.streams) {
    bool is_ordered = is_legacy ? other->waits_for_legacy : stream.waits_for_legacy && other == &all.legacy;
    if (!is_ordered || other == &stream) continue;
    if (!other->last->is_reached) after.push_back(other->last);
    join(stream.clock, other->clock);
  }
  for (auto& point : after) join(stream.clock, point->clock);
  auto done = std::make_shared<Point>();
  done->clock = stream.clock;
  if (!stream.has_thread) {
    stream.has_thread = true;
    std::thread(work_off, &stream).detach();
  }
  stream.last = done;
  stream.queue.push_back({kind, std::move(work), std::move(after), done});
  stream.filled.notify_one();
  return done;
}

inline PointPtr end_of(CUstream_st& stream) { return enqueue(stream, Kind::order, nullptr); }

inline void host_wait(std::unique_lock<std::mutex>& lock, const PointPtr& point) {
  gpu().reached.wait(lock, [&] { return point->is_reached; });
  join(gpu().host, point->clock);
}

inline void wait_for_all(std::unique_lock<std::mutex>& lock) {
  std::vector<PointPtr> points;
  for (auto* stream : gpu().streams)
    if (stream->has_thread) points.push_back(end_of(*stream));
  for (auto& point : points) host_wait(lock, point);
}

inline CUstream_st* stream_of(cudaStream_t handle) {  // null: there is no such stream
  if (handle == nullptr || handle == cudaStreamLegacy) return &gpu().legacy;
  return gpu().streams.count(handle) ? handle : nullptr;
}

// ---- memory --------------------------------------------------------------------------------------------------------

inline void* map_pages(size_t size) {
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return pages == MAP_FAILED ? nullptr : pages;
}

inline cudaError_t allocate(void** out, size_t size, bool is_pooled) {
  auto& all = gpu();
  *out = nullptr;
  if (size == 0) return cudaSuccess;
  size_t charged = rounded(size, is_pooled ? POOL_STEP : LARGE_PAGE);
  if (all.used + charged > all.settings.vram) return cudaErrorMemoryAllocation;
  void* pages = map_pages(rounded(size, LARGE_PAGE));
  if (pages == nullptr) return cudaErrorMemoryAllocation;
  all.used += charged;
  if (is_pooled) all.pooled += charged, all.pooled_peak = std::max(all.pooled_peak, all.pooled);
  all.allocations[address(pages)] = {size, charged, is_pooled};
  if (all.settings.poison) memset(pages, POISON, size);
  *out = pages;
  return cudaSuccess;
}

inline void deallocate(std::map<uintptr_t, Allocation>::iterator it) {
  auto& [at, one] = *it;
  gpu().used -= one.charged;
  if (one.is_pooled) gpu().pooled -= one.charged;
  gpu().history.forget(at, one.size);
  munmap(reinterpret_cast<void*>(at), rounded(one.size, LARGE_PAGE));
  gpu().allocations.erase(it);
}

template <class Map>
typename Map::iterator holder_of(Map& map, uintptr_t at) {
  auto it = map.upper_bound(at);
  if (it == map.begin()) return map.end();
  --it;
  return at < it->first + it->second.size ? it : map.end();
}

enum class Place { device, locked, pageable, straddles };

inline Place place_of(const void* pointer, size_t size) {
  uintptr_t at = address(pointer);
  auto inside = [&](auto it, Place place) { return at + size <= it->first + it->second.size ? place : Place::straddles; };
  if (auto it = holder_of(gpu().allocations, at); it != gpu().allocations.end()) return inside(it, Place::device);
  if (auto it = holder_of(gpu().locked, at); it != gpu().locked.end()) return inside(it, Place::locked);
  return Place::pageable;
}

// A kernel or a copy on `stream` reads or writes device memory.
inline void touch(CUstream_st& stream, const void* pointer, size_t size, bool is_write, const char* what) {
  Access access{stream.lane, stream.clock[stream.lane], what};
  auto wrong = gpu().history.touch(address(pointer), size, is_write, access, stream.clock);
  if (!wrong.empty()) violate(wrong);
}

inline void take_link_time(size_t size, bool to_host) {  // without the mutex: one copy at a time has the link, each way
  double gbps = gpu().settings.copy_gbps;
  if (gbps <= 0) return;
  auto& free_ms = gpu().link_free_ms[to_host];
  std::unique_lock lock(gpu().link);
  double over_ms = free_ms = std::max(free_ms, now_ms()) + size / gbps / 1e6;  // a nap too long delays no later copy
  lock.unlock();
  nap(over_ms - now_ms());
}

inline cudaError_t copy(std::unique_lock<std::mutex>& lock, void* to, const void* from, size_t size, CUstream_st& stream,
                        bool is_async) {
  auto& all = gpu();
  if (size == 0) return cudaSuccess;
  Place target = place_of(to, size), source = place_of(from, size);
  if (target == Place::straddles || source == Place::straddles) return cudaErrorInvalidValue;
  std::shared_ptr<char[]> staged;
  if (source == Place::pageable) {  // is read before the call returns, as NVIDIA documents
    lock.unlock();
    staged.reset(new char[size]);
    memcpy(staged.get(), from, size);
    from = staged.get();
    lock.lock();
  }
  advance(stream);
  const char* name = source != Place::device   ? "a copy to the device"
                     : target == Place::device ? "a copy on the device"
                                               : "a copy to the host";
  if (source == Place::device) touch(stream, from, size, false, name);
  if (target == Place::device) touch(stream, to, size, true, name);
  if (source != Place::device && target == Place::device) all.copied_to_device += size;
  if (source == Place::device && target != Place::device) all.copied_to_host += size;
  Access access{stream.lane, stream.clock[stream.lane], name};
  uintptr_t pages = 0;
  for (auto [pointer, place] : {std::pair<const void*, Place>{to, target}, {from, source}})
    if (place == Place::locked) {
      auto it = holder_of(all.locked, address(pointer));
      auto& copies = it->second.copies;
      auto is_older = [&](auto& other) { return other.lane == access.lane; };
      copies.erase(std::remove_if(copies.begin(), copies.end(), is_older), copies.end());
      copies.push_back(access);
      pages = it->first;
    }
  auto done = enqueue(stream, Kind::copy, [=, poison = all.settings.poison] {
    if (pages) {
      std::lock_guard lock(gpu().mutex);
      if (!gpu().locked.count(pages)) return violate("a copy runs after its host memory was unlocked");
    }
    if (poison && target != Place::pageable) memset(to, POISON, size);
    if (source != target) take_link_time(size, target != Place::device);
    memmove(to, staged ? staged.get() : from, size);
  });
  bool on_host = target != Place::device && source != Place::device;
  bool waits = !is_async || on_host || target == Place::pageable ||
               (source == Place::pageable && all.settings.pageable_waits);
  if (waits) host_wait(lock, done);
  return cudaSuccess;
}

inline cudaError_t lock_pages(uintptr_t begin, size_t size) {
  uintptr_t first = begin / PAGE * PAGE, end = rounded(begin + size, PAGE);
  std::vector<unsigned char> resident((end - first) / PAGE);
  bool is_mapped = mincore(reinterpret_cast<void*>(first), end - first, resident.data()) == 0;
  if (begin == 0 || size == 0 || !is_mapped) return cudaErrorInvalidValue;
  for (auto& [at, one] : gpu().locked)
    if (at / PAGE * PAGE < end && first < rounded(at + one.size, PAGE)) return cudaErrorHostMemoryAlreadyRegistered;
  gpu().locked[begin] = {size, false, {}};
  return cudaSuccess;
}

inline cudaError_t unlock_pages(uintptr_t at, bool is_allocated, const char* what) {
  auto it = gpu().locked.find(at);
  if (it == gpu().locked.end() || it->second.is_allocated != is_allocated)
    return is_allocated ? cudaErrorInvalidValue : cudaErrorHostMemoryNotRegistered;
  for (auto& copy : it->second.copies)
    if (!copy.is_over(gpu().host)) {
      violate(std::string(what) + ", but the host has not waited for " + copy.what + " on lane " + std::to_string(copy.lane));
      break;
    }
  size_t size = it->second.size;
  gpu().locked.erase(it);
  if (is_allocated) munmap(reinterpret_cast<void*>(at), rounded(size, PAGE));
  return cudaSuccess;
}
