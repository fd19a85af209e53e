// The pretend accelerator's memory: host memory that is counted, capped, and poisoned while it holds nothing.

#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

namespace pretend {

inline const c10::Device kDevice(c10::DeviceType::HPU, 0);

// Every byte of fresh and of freed memory. As bf16, fp16, fp32 and float8 it reads as NaN, as int8 as -1.
inline constexpr int kPoison = 0xFF;

// torch's CUDA allocator rounds every allocation up to this (kMinBlockSize), so figures compare with those of a GPU.
inline constexpr size_t kGranularity = 512;

// Freed blocks stay mapped, and poisoned, until this many bytes have been freed after them: a tensor that outlives its
// memory then reads NaN, as it would in a caching allocator, and does not crash the process.
inline constexpr size_t kQuarantineBytes = 64 << 20;

class DeviceMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t wanted) override {
    if (wanted == 0) return {nullptr, nullptr, &DeviceMemory::release, kDevice};
    const size_t size = (wanted + kGranularity - 1) / kGranularity * kGranularity;
    const std::lock_guard<std::mutex> guard(mutex_);
    TORCH_CHECK_WITH(OutOfMemoryError, in_use_ + size <= limit_, "the pretend accelerator is out of memory: tried to ",
                     "allocate ", size, " bytes with ", in_use_, " of ", limit_, " bytes in use");
    void* address = nullptr;
    TORCH_CHECK(posix_memalign(&address, kGranularity, size) == 0, "the host has no ", size,
                " bytes for the pretend accelerator");
    std::memset(address, kPoison, size);
    sizes_[address] = size;
    in_use_ += size;
    peak_ = std::max(peak_, in_use_);
    ++allocations_;
    return {address, address, &DeviceMemory::release, kDevice};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &DeviceMemory::release; }

  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }

  void set_limit(size_t limit) {
    const std::lock_guard<std::mutex> guard(mutex_);
    limit_ = limit;
  }

  void reset_peak() {
    const std::lock_guard<std::mutex> guard(mutex_);
    peak_ = in_use_;
  }

  std::map<std::string, size_t> stats() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return {{"in_use", in_use_}, {"peak", peak_}, {"limit", limit_}, {"allocations", allocations_}};
  }

 private:
  static void release(void* address);

  void quarantine(void* address) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = sizes_.find(address);
    std::memset(address, kPoison, found->second);
    in_use_ -= found->second;
    quarantined_ += found->second;
    graves_.emplace_back(address, found->second);
    sizes_.erase(found);
    while (quarantined_ > kQuarantineBytes) {
      std::free(graves_.front().first);
      quarantined_ -= graves_.front().second;
      graves_.pop_front();
    }
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> sizes_;
  std::deque<std::pair<void*, size_t>> graves_;
  size_t in_use_ = 0, peak_ = 0, limit_ = SIZE_MAX, quarantined_ = 0, allocations_ = 0;
};

// Never destroyed: tensors may be freed by the interpreter after this library's static objects are gone.
inline DeviceMemory& memory() {
  static auto* instance = new DeviceMemory;
  return *instance;
}

inline void DeviceMemory::release(void* address) {
  if (address != nullptr) memory().quarantine(address);
}

}  // namespace pretend
