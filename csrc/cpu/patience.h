// Whether to go on: asked after every application of the block, answered at most ten times a second.
#pragma once

#include <chrono>

namespace fpdm {

// whether to give up
using Interrupted = bool (*)();

class Patience {
  public:
    explicit Patience(Interrupted interrupted) : interrupted_(interrupted), asked_(now()) {}
    bool lasts() {
        if (now() - asked_ < std::chrono::milliseconds(100)) return true;
        asked_ = now();
        return !interrupted_();
    }

  private:
    using Clock = std::chrono::steady_clock;
    static Clock::time_point now() { return Clock::now(); }
    Interrupted interrupted_;
    Clock::time_point asked_;
};

}  // namespace fpdm
