// Asymmetric numeral systems with tables per channel: a state x in [2^31, 2^63) takes the symbol of frequency f and
// cumulative frequency c by x ← 2^16·⌊x/f⌋ + x mod f + c, after its low 32 bits went out where the result would be too
// large. Decoding undoes the steps in reverse, so the encoder goes from the last code to the first and fills its memory
// from the end. Tokens take turns on kStates states, because each step waits for the one before it.

#include "coder.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>

namespace amq {
namespace {

constexpr uint32_t kTotal = 1u << kTotalBits;
constexpr uint64_t kLeastState = 1ull << 31, kMostState = 1ull << 63;
constexpr int kStates = 2;
constexpr int64_t kStateBytes = 8, kWordBytes = 4;

// ---- the model: amq/split/coder.py, function by function

constexpr int kSteps = 256;          // of an octave
constexpr int kOne = 30;             // fraction bits of a weight
constexpr uint32_t kShared = 512;    // frequency that all codes of a channel share evenly
constexpr int kPositions = 255;      // steps of `center` from the first code to the last
constexpr int kRateBits = 24;        // fraction bits of a rate
constexpr int kFastest = 5;          // octaves below one code of the shortest half-life
constexpr int kRatesPerOctave = 8;
constexpr int kRates = 128;

// ⌊2^32 · 2^(−1/2^j)⌋ for j = 1 … 8.
constexpr uint64_t kRoots[] = {0xb504f333, 0xd744fcca, 0xeac0c6e7, 0xf5257d15,
                               0xfa83b2db, 0xfd3e0c0c, 0xfe9e115c, 0xff4ecb59};

struct Powers {
    std::array<uint32_t, kSteps> of;  // 2^(−i/256), kOne fraction bits

    Powers() {
        for (int i = 0; i < kSteps; ++i) {
            uint64_t power = 1ull << kOne;
            for (int j = 1; j <= 8; ++j)
                if (i >> (8 - j) & 1) power = power * kRoots[j - 1] >> 32;
            of[i] = static_cast<uint32_t>(power);
        }
    }

    // Steps per 1/kPositions of a code.
    uint64_t rate(int index) const {
        constexpr uint64_t kFirst = (static_cast<uint64_t>(kSteps) << (kFastest + kRateBits)) / kPositions;
        const uint64_t part = of[index % kRatesPerOctave * (kSteps / kRatesPerOctave)];
        return (kFirst * part >> kOne) >> (index / kRatesPerOctave);
    }
};

// Unnormalised weights, kOne fraction bits. Returns their sum.
uint64_t weigh(const Powers& powers, int levels, int center, int scale, uint32_t* weight) {
    const uint64_t rate = powers.rate(scale >> 1);
    const bool logistic = scale & 1;
    const int position = center * (levels - 1);
    uint64_t sum = 0;
    for (int code = 0; code < levels; ++code) {
        const int distance = std::abs(code * kPositions - position);
        const uint64_t steps = static_cast<uint64_t>(distance) * rate >> kRateBits;
        uint64_t t = steps < kSteps * (kOne + 1) ? powers.of[steps % kSteps] >> (steps / kSteps) : 0;
        if (logistic) {
            const uint64_t u = t + (1u << kOne);
            t = (t << 32) / (u * u >> kOne);
        }
        weight[code] = static_cast<uint32_t>(t);
        sum += t;
    }
    return sum;
}

void frequencies(const Powers& powers, int levels, int center, int scale, uint32_t* out) {
    const uint64_t sum = weigh(powers, levels, center, scale, out);
    const uint32_t base = kShared / levels;
    const uint64_t factor = (static_cast<uint64_t>(kTotal - base * levels) << 40) / sum;
    uint32_t rest = kTotal, best = 0;
    int largest = 0;
    for (int code = 0; code < levels; ++code) {
        out[code] = base + static_cast<uint32_t>(out[code] * factor >> 40);
        rest -= out[code];
        if (out[code] > best) best = out[code], largest = code;
    }
    out[largest] += rest;
}

// ---- the coder

void store(uint8_t* at, uint64_t value, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i) at[i] = static_cast<uint8_t>(value >> (8 * i));
}

template <class T>
T load(const uint8_t* at) {
    T value = 0;
    for (size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(at[i]) << (8 * i);
    return value;
}

struct Symbol {
    uint64_t reciprocal;  // ⌊(2^64 − 1)/frequency⌋
    uint32_t frequency, start;
};

// Bytes from the end of a buffer backwards.
struct Writer {
    uint8_t* out;
    int64_t left;  // bytes before what was written

    bool put(uint64_t value, int64_t bytes) {
        if (left < bytes) return false;
        left -= bytes;
        store(out + left, value, bytes);
        return true;
    }
};

inline bool push(uint64_t& x, const Symbol& symbol, Writer& writer) {
    if (x >= static_cast<uint64_t>(symbol.frequency) << (63 - kTotalBits)) {
        if (!writer.put(x & 0xffffffff, kWordBytes)) return false;
        x >>= 32;
    }
    // x/frequency without a division: the estimate is right or one too small.
    uint64_t quotient = static_cast<uint64_t>(static_cast<unsigned __int128>(x) * symbol.reciprocal >> 64);
    uint64_t remainder = x - quotient * symbol.frequency;
    const bool more = remainder >= symbol.frequency;
    quotient += more;
    remainder -= more ? symbol.frequency : 0;
    x = (quotient << kTotalBits) + remainder + symbol.start;
    return true;
}

struct Reader {
    const uint8_t* at;
    const uint8_t* end;
};

// Of one channel: which code a part of [0, kTotal) belongs to.
struct Lookup {
    static constexpr int kShift = 7;
    uint32_t frequency[kMostLevels];
    uint32_t start[kMostLevels + 1];
    uint8_t first[kTotal >> kShift];  // the code at the start of each 2^kShift

    void fill(const Powers& powers, int levels, int center, int scale) {
        frequencies(powers, levels, center, scale, frequency);
        uint32_t sum = 0, place = 0;
        for (int code = 0; code < levels; ++code) {
            start[code] = sum;
            sum += frequency[code];
            for (; place << kShift < sum; ++place) first[place] = static_cast<uint8_t>(code);
        }
        start[levels] = sum;
    }
};

inline bool pop(uint64_t& x, const Lookup& lookup, Reader& reader, uint8_t& code) {
    const uint32_t slot = x & (kTotal - 1);
    uint32_t found = lookup.first[slot >> Lookup::kShift];
    while (slot >= lookup.start[found + 1]) ++found;
    code = static_cast<uint8_t>(found);
    x = lookup.frequency[found] * (x >> kTotalBits) + slot - lookup.start[found];
    if (x < kLeastState) {
        if (reader.end - reader.at < kWordBytes) return false;
        x = x << 32 | load<uint32_t>(reader.at);
        reader.at += kWordBytes;
    }
    return true;
}

// ---- the choice of a model

// How often each code of a channel occurs. Where there are many that differ widely, neighbours count as one, because a
// smooth density gives them nearly the same.
struct Histogram {
    static constexpr int kEnough = 64;      // codes, to find a density by
    static constexpr double kSmooth = 8;    // mean distance from the median, in codes, of which every other may go
    int levels, merged = 0;                 // 2^merged codes are one
    int32_t counts[kMostLevels] = {};
    int median = 0;
    double deviation = 0;  // mean distance from the median

    Histogram(const uint8_t* row, int64_t tokens, int levels) : levels(levels) {
        for (int64_t t = 0; t < tokens; ++t) ++counts[row[t]];
        locate(tokens);
        while (this->levels > kEnough && deviation > kSmooth) {
            const int half = (this->levels + 1) / 2;
            for (int code = 0; code < half; ++code) {
                const bool pair = 2 * code + 1 < this->levels;
                counts[code] = counts[2 * code] + (pair ? counts[2 * code + 1] : 0);
            }
            this->levels = half;
            ++merged;
            locate(tokens);
        }
    }

    void locate(int64_t tokens) {
        median = 0;
        for (int64_t below = counts[0]; 2 * below < tokens; below += counts[median]) ++median;
        int64_t sum = 0;
        for (int code = 0; code < levels; ++code) sum += static_cast<int64_t>(counts[code]) * std::abs(code - median);
        deviation = static_cast<double>(sum) / tokens;
    }
};

// The length of a channel's codes under a model.
class Cost {
  public:
    Cost() {
        for (int i = 0; i < kEntries; ++i) bits_[i] = static_cast<float>(-std::log2(1.0 + (i + 0.5) / kEntries));
    }

    double operator()(const Histogram& histogram, int center, int scale) {
        frequencies(powers_, histogram.levels, center, scale, frequency_);
        double sum = 0;
        for (int code = 0; code < histogram.levels; ++code)
            if (histogram.counts[code]) sum += histogram.counts[code] * bits(frequency_[code]);
        return sum;
    }

  private:
    static constexpr int kEntryBits = 10, kEntries = 1 << kEntryBits;

    double bits(uint32_t frequency) const {
        const int exponent = kTotalBits - (31 - __builtin_clz(frequency));
        return exponent + bits_[(frequency << exponent & (kTotal - 1)) >> (kTotalBits - kEntryBits)];
    }

    Powers powers_;
    float bits_[kEntries];
    uint32_t frequency_[kMostLevels];
};

struct Choice {
    int center, rate, shape;
    double cost;
};

// The rate at which codes have the given mean distance from the median, nearly. For Laplace, whose codes have weights of
// θ^distance, the distance is 2θ/(1 − θ²); the logistic's half-life is shorter by what is in its tail.
int first_rate(double deviation, int shape) {
    if (deviation <= 0) return 0;
    const double octaves = -std::log2((std::sqrt(1 + deviation * deviation) - 1) / deviation);  // per code
    const double rate = kFastest - std::log2(octaves + (shape ? std::min(2.0, 0.386 * octaves) : 0));
    return static_cast<int>(std::lround(rate * kRatesPerOctave));
}

// Steps to better neighbours, shorter ones once there is none.
Choice descend(Cost& cost, const Histogram& histogram, int shape) {
    const auto at = [&](int center, int rate) -> Choice {
        center = std::clamp(center, 0, kPositions);
        rate = std::clamp(rate, 0, kRates - 1);
        return {center, rate, shape, cost(histogram, center, rate * 2 + shape)};
    };
    const double unit = static_cast<double>(kPositions) / (histogram.levels - 1);
    Choice best = at(static_cast<int>(histogram.median * unit + 0.5), first_rate(histogram.deviation, shape));
    int move = std::max(1, static_cast<int>(std::max(histogram.deviation, 0.5) * unit / 3)), turn = kRatesPerOctave / 2;
    for (;;) {
        const double before = best.cost;
        for (int sign : {-1, 1}) {
            const Choice moved = at(best.center + sign * move, best.rate);
            if (moved.cost < best.cost) best = moved;
            const Choice turned = at(best.center, best.rate + sign * turn);
            if (turned.cost < best.cost) best = turned;
        }
        if (best.cost < before) continue;
        if (move < 2 && turn < 2) return best;
        move = std::max(1, move / 2);
        turn = std::max(1, turn / 2);
    }
}

}  // namespace

void powers(uint32_t* out) {
    const Powers powers;
    std::copy(powers.of.begin(), powers.of.end(), out);
}

void frequencies(int levels, int center, int scale, uint32_t* out) { frequencies(Powers(), levels, center, scale, out); }

int64_t encode(const CoderArgs& args, const uint8_t* codes, uint8_t* out, int64_t capacity) {
    const Powers powers;
    Writer writer{out, capacity};
    std::array<uint64_t, kStates> state;
    state.fill(kLeastState);
    uint32_t frequency[kMostLevels];
    Symbol symbols[kMostLevels];
    for (int64_t c = args.channels - 1; c >= 0; --c) {
        const int levels = args.levels[c];
        if (levels < 2) continue;
        frequencies(powers, levels, args.center[c], args.scale[c], frequency);
        uint32_t sum = 0;
        for (int code = 0; code < levels; ++code) {
            symbols[code] = {UINT64_MAX / frequency[code], frequency[code], sum};
            sum += frequency[code];
        }
        const uint8_t* const row = codes + c * args.tokens;
        for (int64_t t = args.tokens - 1; t >= 0; --t)
            if (!push(state[t % kStates], symbols[row[t]], writer)) return -1;
    }
    for (int i = kStates - 1; i >= 0; --i)
        if (!writer.put(state[i], kStateBytes)) return -1;
    return writer.left;
}

Coded decode(const CoderArgs& args, const uint8_t* data, int64_t size, uint8_t* codes) {
    if (size < kStates * kStateBytes) return Coded::kTooShort;
    std::array<uint64_t, kStates> state;
    for (int i = 0; i < kStates; ++i) {
        state[i] = load<uint64_t>(data + i * kStateBytes);
        if (state[i] < kLeastState || state[i] >= kMostState) return Coded::kBadStart;
    }
    const Powers powers;
    Reader reader{data + kStates * kStateBytes, data + size};
    Lookup lookup;
    for (int64_t c = 0; c < args.channels; ++c) {
        uint8_t* const row = codes + c * args.tokens;
        if (args.levels[c] < 2) {
            std::fill(row, row + args.tokens, 0);
            continue;
        }
        lookup.fill(powers, args.levels[c], args.center[c], args.scale[c]);
        for (int64_t t = 0; t < args.tokens; ++t)
            if (!pop(state[t % kStates], lookup, reader, row[t])) return Coded::kTooShort;
    }
    if (reader.at != reader.end) return Coded::kTrailing;
    for (uint64_t x : state)
        if (x != kLeastState) return Coded::kBadEnd;
    return Coded::kGood;
}

void fit(const CoderArgs& args, const uint8_t* codes, uint8_t* center, uint8_t* scale) {
    Cost cost;
    for (int64_t c = 0; c < args.channels; ++c) {
        center[c] = scale[c] = 0;
        if (args.levels[c] < 2 || args.tokens < 1) continue;
        const Histogram histogram(codes + c * args.tokens, args.tokens, args.levels[c]);
        const Choice laplace = descend(cost, histogram, 0), logistic = descend(cost, histogram, 1);
        const Choice& best = logistic.cost < laplace.cost ? logistic : laplace;
        // The middle of codes that count as one, where they are many; as many octaves more per half-life as halvings.
        const double merged = 1 << histogram.merged;
        const double place = merged * best.center * (histogram.levels - 1) + (merged - 1) / 2 * kPositions;
        center[c] = static_cast<uint8_t>(std::clamp(std::lround(place / (args.levels[c] - 1)), 0l, 255l));
        const int rate = std::min(best.rate + histogram.merged * kRatesPerOctave, kRates - 1);
        scale[c] = static_cast<uint8_t>(2 * rate + best.shape);
    }
}

}  // namespace amq
