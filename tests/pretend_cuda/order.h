// Who touched which bytes of the pretend device, and whether an order between two accesses is certain.
//
// A lane is the host, all of its threads taken as one, or a stream. A clock holds, for each lane, how much of it is
// certain to be over. Two accesses to the same bytes, one of them a write, must be in order by the clocks: then they
// are in order whatever the timing, not only in the run that was seen.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

using Clock = std::vector<uint64_t>;  // by lane; lane 0 is the host

inline void join(Clock& to, const Clock& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

struct Access {
  int lane = -1;  // -1: never
  uint64_t time = 0;
  const char* what = "";

  bool is_over(const Clock& clock) const {
    return lane < 0 || (static_cast<size_t>(lane) < clock.size() && clock[lane] >= time);
  }
};

// The accesses to the device's memory: ranges of bytes with one history each.
class History {
 public:
  // Notes an access by what knows `clock`; returns what is wrong with it, or nothing.
  std::string touch(uintptr_t begin, size_t size, bool is_write, const Access& access, const Clock& clock) {
    std::string wrong;
    if (size == 0) return wrong;
    uintptr_t end = begin + size;
    split(begin), split(end);
    auto check = [&](const Access& other, const char* how, uintptr_t at) {
      if (!wrong.empty() || other.is_over(clock)) return;
      char text[400];
      snprintf(text, sizeof text, "race: %s on lane %d %s %s on lane %d, at %#lx", access.what, access.lane, how,
               other.what, other.lane, at);
      wrong = text;
    };
    for (auto it = ranges_.lower_bound(begin); it != ranges_.end() && it->first < end;) {
      auto& [at, range] = *it;
      check(range.write, is_write ? "overwrites what may still be written by" : "reads what may still be written by", at);
      if (is_write) {
        for (auto& read : range.reads) check(read, "overwrites what may still be read by", at);
        it = ranges_.erase(it);
        continue;
      }
      auto same = std::find_if(range.reads.begin(), range.reads.end(), [&](auto& r) { return r.lane == access.lane; });
      if (same == range.reads.end()) range.reads.push_back(access);
      else *same = access;
      ++it;
    }
    if (is_write) ranges_[begin] = Range{end, access, {}};
    return wrong;
  }

  void forget(uintptr_t begin, size_t size) {
    split(begin), split(begin + size);
    ranges_.erase(ranges_.lower_bound(begin), ranges_.lower_bound(begin + size));
  }

 private:
  struct Range {
    uintptr_t end;
    Access write;
    std::vector<Access> reads;  // since the write, the last one of each lane
  };
  std::map<uintptr_t, Range> ranges_;  // by first byte; they do not overlap

  void split(uintptr_t at) {
    auto it = ranges_.upper_bound(at);
    if (it == ranges_.begin()) return;
    --it;
    if (it->first == at || it->second.end <= at) return;
    Range tail = it->second;
    it->second.end = at;
    ranges_.emplace(at, tail);
  }
};
