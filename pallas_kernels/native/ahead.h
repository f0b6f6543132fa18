// Memory that is read soon, fetched a little at a time between other work, so that computing and reading overlap.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lamina {

class Ahead {
 public:
  // `steps`: how often `some` will be called until all is to be there. `from` may lie beyond what is mapped:
  // nothing is read.
  Ahead(const void* from, int64_t bytes, int64_t steps)
      : at_(static_cast<const char*>(from)), stop_(at_ + bytes), step_((bytes + steps * kLine - 1) / std::max<int64_t>(steps * kLine, 1) * kLine) {}

  void some() {
    // Into the second cache: to the first, a core waits for each line as if it were read at once.
    for (const char* until = std::min(stop_, at_ + step_); at_ < until; at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_, *stop_;
  int64_t step_;
};

}  // namespace lamina
