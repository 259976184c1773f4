// How much work a search may do: until a time, or, to repeat an earlier run exactly, a number of rounds.
#pragma once

#include <chrono>

namespace alto {

class Effort {
  public:
    // rounds < 0: until `seconds` from now are spent. Otherwise exactly that many rounds.
    Effort(double seconds, long rounds)
        : until_(Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds))),
          rounds_(rounds) {}

    // True when another round may be made; counts it.
    bool another() {
        if (rounds_ >= 0 ? used_ >= rounds_ : Clock::now() >= until_) return false;
        ++used_;
        return true;
    }
    [[nodiscard]] long used() const { return used_; }

  private:
    using Clock = std::chrono::steady_clock;
    Clock::time_point until_;
    long rounds_;
    long used_ = 0;
};

// SplitMix64: small, fast, the same everywhere.
class Random {
  public:
    explicit Random(unsigned long long seed) : state_(seed) {}
    unsigned long long next() {
        unsigned long long z = (state_ += 0x9e3779b97f4a7c15ULL);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
        return z ^ (z >> 31);
    }
    int below(int bound) { return static_cast<int>((next() >> 32) * static_cast<unsigned long long>(bound) >> 32); }
    double unit() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

  private:
    unsigned long long state_;
};

}  // namespace alto
