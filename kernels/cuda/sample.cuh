// The next token of each row, chosen as amq/runtime/sampling.py chooses it: temperature, then top-k, top-p and min-p, then a
// draw. Three launches, each a fixed amount of work for the rows that are there:
//
//     scan    all of the GPU: the largest logit of each region (256 tokens) of a row, and the lowest token that has it
//     gather  all of the GPU: weights exp((logit − largest) / temperature); their sum in each region, and a bit for each token
//             that a cheap bound does not rule out: the candidates
//     finish  one block per row: which candidates survive, and the draw
//
// Everything that is summed is an integer: a weight is counted in 2^-44ths of the largest one, which a row of 2^19 tokens
// cannot overflow, and a token below that is never drawn. So sums have no order, a row's token follows from its logits,
// settings, seed and place alone, and comparisons are exact. Logits are compared as integers too, by `key_of`.
//
// Nothing is sorted: the k-th largest key and the key at which top-p ends are found bit by bit, from the counts or sums of
// the candidates at or above a key, two bits per pass over them.

#pragma once

#include <cmath>
#include <cstdint>

#include "device.cuh"

namespace amq {

constexpr int kRegion = 256, kRegionWords = kRegion / 32;  // tokens that one warp looks at
constexpr int kScanThreads = 256, kFinishThreads = 512;
constexpr int kScanRegions = kScanThreads / 32, kFinishWarps = kFinishThreads / 32;
constexpr int kFinishRegisters = 128;
constexpr int kMostVocabulary = 1 << 19;
constexpr float kWeightUnits = 0x1p44f;

constexpr uint32_t kNaNKey = 0xffffffffu, kInfinityKey = 0xff800000u, kMinusInfinityKey = 0x007fffffu;

struct Candidate {
    float score;
    int32_t token;
};

// What a call has of scratch, by row where not said otherwise.
struct SampleArguments {
    SampleCall call;
    int32_t regions;
    uint64_t* totals;       // [regions]: weights, of the survivors where those are known already
    uint32_t* best_keys;    // [regions]
    int32_t* best_tokens;   // [regions]
    uint32_t* masks;        // [regions · kRegionWords]: candidates
    Candidate* candidates;  // [regions · kRegion]: the same one after another, by token
    int32_t* place;         // of all rows: row of `out`
};

// A row's settings, and what of them needs no look at candidates.
struct Filter {
    uint32_t largest_key;
    float largest, inverse_temperature, min_p, top_p;
    int top_k;
    bool plain;  // neither top-k nor top-p
};

// Orders floats as integers: NaN above all, −0 and 0 alike.
AMQ_DEVICE uint32_t key_of(float score) {
    if (score != score) return kNaNKey;
    if (score == 0.0f) score = 0.0f;
    const uint32_t bits = *reinterpret_cast<const uint32_t*>(&score);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

AMQ_DEVICE float score_of(uint32_t key) {
    const uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
    return *reinterpret_cast<const float*>(&bits);
}

AMQ_DEVICE bool is_finite_key(uint32_t key) { return key > kMinusInfinityKey && key < kInfinityKey; }

AMQ_DEVICE Filter filter_of(const SampleCall& call, int row, uint32_t largest_key) {
    Filter filter;
    filter.largest_key = largest_key;
    filter.largest = score_of(largest_key);
    filter.inverse_temperature = 1.0f / fmaxf(call.temperature[row], 1e-30f);
    filter.min_p = call.min_p[row];
    filter.top_p = call.top_p[row];
    filter.top_k = call.top_k[row];
    filter.plain = filter.top_k <= 0 && filter.top_p >= 1.0f;
    return filter;
}

AMQ_DEVICE float weight_of(const Filter& filter, float score) {
    return expf((score - filter.largest) * filter.inverse_temperature);
}

AMQ_DEVICE uint64_t units_of(float weight) { return static_cast<uint64_t>(weight * kWeightUnits); }

AMQ_DEVICE uint64_t shuffle_xor(uint64_t value, int lanes) {
    const uint32_t low = shuffle_xor(static_cast<uint32_t>(value), lanes);
    const uint32_t high = shuffle_xor(static_cast<uint32_t>(value >> 32), lanes);
    return static_cast<uint64_t>(high) << 32 | low;
}

AMQ_DEVICE uint64_t warp_sum(uint64_t v) {
    for (int lanes = 16; lanes > 0; lanes /= 2) v += shuffle_xor(v, lanes);
    return v;
}

AMQ_DEVICE uint64_t warp_max(uint64_t v) {
    for (int lanes = 16; lanes > 0; lanes /= 2) v = max(v, shuffle_xor(v, lanes));
    return v;
}

// Of the lanes before this one; `total`: of all.
AMQ_DEVICE uint64_t warp_sum_before(uint64_t v, int lane, uint64_t* total) {
    uint64_t before = 0;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const uint64_t other = shuffle_xor(v, lanes);
        if (lane & lanes) before += other;
        v += other;
    }
    *total = v;
    return before;
}

// The largest key first, of equals the lowest token.
AMQ_DEVICE uint64_t ranked(uint32_t key, int32_t token) {
    return static_cast<uint64_t>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
AMQ_DEVICE uint32_t key_of_ranked(uint64_t rank) { return static_cast<uint32_t>(rank >> 32); }
AMQ_DEVICE int32_t token_of_ranked(uint64_t rank) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank)); }

// ---- scan

__global__ void __launch_bounds__(kScanThreads) sample_scan_kernel(SampleArguments arguments) {
    const SampleCall& call = arguments.call;
    const int row_blocks = (arguments.regions + kScanRegions - 1) / kScanRegions;
    const int row = blockIdx.x / row_blocks, lane = threadIdx.x % 32;
    const int region = blockIdx.x % row_blocks * kScanRegions + threadIdx.x / 32;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        const uint32_t step = static_cast<uint32_t>(*call.step);
        *arguments.place = static_cast<int32_t>(step % static_cast<uint32_t>(call.steps));
        *call.step = static_cast<int32_t>(step + 1);
    }
    if (call.positions[row] < 0 || region >= arguments.regions) return;
    const float* logits = call.logits + static_cast<int64_t>(row) * call.vocabulary;
    uint64_t best = 0;
    for (int i = lane; i < kRegion; i += 32) {
        const int token = region * kRegion + i;
        if (token < call.vocabulary) best = max(best, ranked(key_of(logits[token]), token));
    }
    best = warp_max(best);
    if (lane > 0) return;
    const int64_t at = static_cast<int64_t>(row) * arguments.regions + region;
    arguments.best_keys[at] = key_of_ranked(best);
    arguments.best_tokens[at] = token_of_ranked(best);
}

// ---- gather

// A key that at least top_k tokens reach, 0 where none is known: thread i knows the largest key `mine` of every 256th region
// from i on, and the k-th largest of these is one. Also the largest of all.
AMQ_DEVICE uint32_t key_that_enough_reach(int top_k, uint32_t mine) {
    __shared__ uint32_t keys[kScanThreads];
    __shared__ uint32_t reached;
    keys[threadIdx.x] = mine;
    if (threadIdx.x == 0) reached = 0;
    synchronize();
    if (top_k > 0 && top_k <= kScanThreads) {
        int larger = 0;
        for (int i = 0; i < kScanThreads; ++i)
            larger += keys[i] > mine || (keys[i] == mine && i < static_cast<int>(threadIdx.x));
        if (larger == top_k - 1) reached = mine;
    }
    synchronize();
    return reached;
}

// Of all threads.
AMQ_DEVICE uint32_t scan_block_max(uint32_t mine) {
    __shared__ uint32_t largest[kScanRegions];
    const uint64_t of_warp = warp_max(static_cast<uint64_t>(mine));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = static_cast<uint32_t>(of_warp);
    synchronize();
    uint32_t all = 0;
    for (int i = 0; i < kScanRegions; ++i) all = max(all, largest[i]);
    return all;
}

// Which tokens of a region are candidates, and its total. With top-k, totals are of those that survive it and come later.
// Without, tokens of at most (1 − p) / vocabulary of the total, which is at least 1, cannot make up more than the 1 − p that
// top-p leaves out; half of it, for the rounding of all this.
AMQ_DEVICE void gather_region(const SampleArguments& arguments, const Filter& filter, uint32_t least_key, int row, int region) {
    const SampleCall& call = arguments.call;
    const int lane = threadIdx.x % 32;
    const float* logits = call.logits + static_cast<int64_t>(row) * call.vocabulary;
    const int64_t at = static_cast<int64_t>(row) * arguments.regions + region;
    const float least = filter.top_k > 0 ? 0.0f : fmaxf(filter.min_p, 0.5f * (1.0f - filter.top_p) / call.vocabulary);
    uint64_t total = 0;
    for (int word = 0; word < kRegionWords; ++word) {
        const int token = region * kRegion + word * 32 + lane;
        const float score = token < call.vocabulary ? logits[token] : -INFINITY;
        const float weight = weight_of(filter, score);
        const uint64_t units = units_of(weight);
        if (!filter.plain || weight >= filter.min_p) total += units;
        if (filter.plain) continue;
        const uint32_t mask = ballot(units > 0 && weight >= least && key_of(score) >= least_key);
        if (lane == 0) arguments.masks[at * kRegionWords + word] = mask;
    }
    total = warp_sum(total);
    if (lane == 0) arguments.totals[at] = total;
}

__global__ void __launch_bounds__(kScanThreads) sample_gather_kernel(SampleArguments arguments) {
    const SampleCall& call = arguments.call;
    const int row_blocks = (arguments.regions + kScanRegions - 1) / kScanRegions;
    const int row = blockIdx.x / row_blocks, region = blockIdx.x % row_blocks * kScanRegions + threadIdx.x / 32;
    if (call.positions[row] < 0 || !(call.temperature[row] > 0.0f)) return;
    const uint32_t* best = arguments.best_keys + static_cast<int64_t>(row) * arguments.regions;
    uint32_t mine = 0;
    for (int i = threadIdx.x; i < arguments.regions; i += kScanThreads) mine = max(mine, best[i]);
    const uint32_t largest = scan_block_max(mine);
    if (!is_finite_key(largest)) return;
    const Filter filter = filter_of(call, row, largest);
    const uint32_t least_key = key_that_enough_reach(filter.top_k, mine);
    if (region < arguments.regions) gather_region(arguments, filter, least_key, row, region);
}

// ---- finish: by all threads of one block, with results that all have

template <int kCount>
AMQ_DEVICE void finish_block_sums(uint64_t (&values)[kCount]) {
    __shared__ uint64_t sums[kFinishWarps][kCount];
    for (uint64_t& value : values) value = warp_sum(value);
    synchronize();  // what an earlier call left has been read
    if (threadIdx.x % 32 == 0)
        for (int i = 0; i < kCount; ++i) sums[threadIdx.x / 32][i] = values[i];
    synchronize();
    for (int i = 0; i < kCount; ++i) {
        values[i] = 0;
        for (int warp = 0; warp < kFinishWarps; ++warp) values[i] += sums[warp][i];
    }
}

AMQ_DEVICE uint64_t finish_block_sum(uint64_t mine) {
    uint64_t values[1] = {mine};
    finish_block_sums(values);
    return values[0];
}

AMQ_DEVICE uint64_t finish_block_max(uint64_t mine) {
    __shared__ uint64_t largest[kFinishWarps];
    const uint64_t of_warp = warp_max(mine);
    synchronize();
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = of_warp;
    synchronize();
    uint64_t all = 0;
    for (int i = 0; i < kFinishWarps; ++i) all = max(all, largest[i]);
    return all;
}

// Of the threads before this one.
AMQ_DEVICE uint64_t finish_block_sum_before(uint64_t mine) {
    __shared__ uint64_t sums[kFinishWarps];
    uint64_t of_warp;
    uint64_t before = warp_sum_before(mine, threadIdx.x % 32, &of_warp);
    synchronize();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = of_warp;
    synchronize();
    for (int i = 0; i < static_cast<int>(threadIdx.x / 32); ++i) before += sums[i];
    return before;
}

// An item of `count`, by value(i): the first at which the running sum passes `target`, and what of target is left there.
struct Place {
    int index;
    uint64_t inside;
};

// Each warp sums up a stretch of the items; that in which the target lies goes through its own again.
template <class Value>
AMQ_DEVICE Place find_place(int count, uint64_t target, Value value) {
    __shared__ uint64_t sums[kFinishWarps];
    __shared__ Place found;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int stretch = (count + kFinishWarps - 1) / kFinishWarps, first = warp * stretch, last = min(first + stretch, count);
    uint64_t mine = 0;
    for (int i = first + lane; i < last; i += 32) mine += value(i);
    mine = warp_sum(mine);
    synchronize();
    if (lane == 0) sums[warp] = mine;
    synchronize();
    uint64_t before = 0;
    for (int i = 0; i < warp; ++i) before += sums[i];
    if (target >= before && target < before + mine) {  // the same for all of a warp
        for (int start = first; start < last; start += 32) {
            const uint64_t own = start + lane < last ? value(start + lane) : 0;
            uint64_t total;
            const uint64_t at = before + warp_sum_before(own, lane, &total);
            if (target >= at && target < at + own) found = {start + lane, target - at};
            before += total;
        }
    }
    synchronize();
    return found;
}

// The largest key at which the values of the candidates with that key or a larger one come to `target`, which all of them
// together do. Found from the highest bit on in which keys differ.
template <class Value>
AMQ_DEVICE uint32_t key_at(const Candidate* candidates, int count, uint64_t target, Value value) {
    uint32_t largest = 0, smallest = 0xffffffffu;
    for (int i = threadIdx.x; i < count; i += kFinishThreads) {
        const uint32_t key = key_of(candidates[i].score);
        largest = max(largest, key);
        smallest = min(smallest, key);
    }
    largest = static_cast<uint32_t>(finish_block_max(largest));
    smallest = ~static_cast<uint32_t>(finish_block_max(~smallest));
    int shift = 30;
    while (shift > 0 && largest >> shift == smallest >> shift) shift -= 2;
    uint32_t found = shift < 30 ? largest >> (shift + 2) << (shift + 2) : 0;
    for (; shift >= 0; shift -= 2) {
        uint64_t sums[3] = {};
        for (int i = threadIdx.x; i < count; i += kFinishThreads) {
            const uint32_t key = key_of(candidates[i].score);
            const uint64_t own = value(candidates[i]);
            for (int digit = 0; digit < 3; ++digit)
                if (key >= found + (static_cast<uint32_t>(digit + 1) << shift)) sums[digit] += own;
        }
        finish_block_sums(sums);
        uint32_t digits = 0;
        for (uint64_t sum : sums) digits += sum >= target;
        found += digits << shift;
    }
    return found;
}

// Lists a row's candidates by token; returns how many there are.
AMQ_DEVICE int list_candidates(const SampleArguments& arguments, int row, Candidate* candidates) {
    const SampleCall& call = arguments.call;
    const float* logits = call.logits + static_cast<int64_t>(row) * call.vocabulary;
    const int words = arguments.regions * kRegionWords;
    const uint32_t* masks = arguments.masks + static_cast<int64_t>(row) * words;
    const int own = (words + kFinishThreads - 1) / kFinishThreads;
    const int first = threadIdx.x * own, last = min(first + own, words);
    uint64_t mine = 0;
    for (int word = first; word < last; ++word) mine += count_bits(masks[word]);
    int at = static_cast<int>(finish_block_sum_before(mine));
    for (int word = first; word < last; ++word)
        for (uint32_t mask = masks[word]; mask != 0; mask &= mask - 1) {
            const int token = word * 32 + count_bits((mask & (0u - mask)) - 1);
            candidates[at++] = {logits[token], token};
        }
    return static_cast<int>(finish_block_sum(mine));  // and the list is there for all
}

// A number below 2^64 that follows from seed and place: splitmix64's steps, from a start that the seed is mixed to first, so
// that the numbers of two seeds do not run side by side.
AMQ_DEVICE uint64_t mixed(uint64_t v) {
    v = (v ^ v >> 30) * 0xbf58476d1ce4e5b9u;
    v = (v ^ v >> 27) * 0x94d049bb133111ebu;
    return v ^ v >> 31;
}
AMQ_DEVICE uint64_t random_number(uint64_t seed, int32_t place) {
    constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;
    return mixed(mixed(seed + kStep) + kStep * (static_cast<uint64_t>(static_cast<uint32_t>(place)) + 1));
}

// Without top-k and top-p: the region, then the token in it.
AMQ_DEVICE int32_t draw_from_all(const SampleArguments& arguments, const Filter& filter, int row, uint64_t random) {
    const SampleCall& call = arguments.call;
    const float* logits = call.logits + static_cast<int64_t>(row) * call.vocabulary;
    const uint64_t* totals = arguments.totals + static_cast<int64_t>(row) * arguments.regions;
    uint64_t total = 0;
    for (int i = threadIdx.x; i < arguments.regions; i += kFinishThreads) total += totals[i];
    total = finish_block_sum(total);
    const Place region = find_place(arguments.regions, multiply_high(random, total), [&](int i) { return totals[i]; });
    const int first = region.index * kRegion;
    const Place token = find_place(min(kRegion, call.vocabulary - first), region.inside, [&](int i) {
        const float weight = weight_of(filter, logits[first + i]);
        return weight >= filter.min_p ? units_of(weight) : uint64_t{0};
    });
    return first + token.index;
}

// What top-k and top-p leave: keys above `key`, and of those that equal it tokens up to `token`.
struct Bound {
    uint32_t key;
    int32_t token;
};

AMQ_DEVICE Bound bound_of(const SampleArguments& arguments, const Filter& filter, int row, const Candidate* candidates,
                          int count) {
    Bound bound = {0, INT32_MAX};
    if (filter.top_k > 0 && filter.top_k < count)
        bound.key = key_at(candidates, count, filter.top_k, [](const Candidate&) { return uint64_t{1}; });
    if (filter.top_p >= 1.0f) return bound;
    const auto units = [&](const Candidate& candidate) {
        return key_of(candidate.score) < bound.key ? 0 : units_of(weight_of(filter, candidate.score));
    };
    uint64_t kept = 0, all = 0;
    for (int i = threadIdx.x; i < count; i += kFinishThreads) kept += units(candidates[i]);
    all = kept = finish_block_sum(kept);
    if (filter.top_k <= 0) {
        const uint64_t* totals = arguments.totals + static_cast<int64_t>(row) * arguments.regions;
        all = 0;
        for (int i = threadIdx.x; i < arguments.regions; i += kFinishThreads) all += totals[i];
        all = finish_block_sum(all);
    }
    // A token survives if those before it come to less than this.
    const uint64_t target = static_cast<uint64_t>(ceil(static_cast<double>(filter.top_p) * static_cast<double>(all)));
    if (kept < target) return bound;  // min-p rules out some that top-p would leave
    const uint32_t key = key_at(candidates, count, target, units);
    uint64_t above = 0;
    for (int i = threadIdx.x; i < count; i += kFinishThreads)
        if (key_of(candidates[i].score) > key) above += units(candidates[i]);
    above = finish_block_sum(above);
    // The first of its equals at which the sum comes to the target.
    const Place last = find_place(count, target - above - 1, [&](int i) {
        return key_of(candidates[i].score) == key ? units(candidates[i]) : 0;
    });
    return {key, candidates[last.index].token};
}

AMQ_DEVICE int32_t draw_from_candidates(const SampleArguments& arguments, const Filter& filter, int row, uint64_t random) {
    Candidate* candidates = arguments.candidates + static_cast<int64_t>(row) * arguments.regions * kRegion;
    const int count = list_candidates(arguments, row, candidates);
    const Bound bound = bound_of(arguments, filter, row, candidates, count);
    const auto units = [&](int i) {
        const uint32_t key = key_of(candidates[i].score);
        const float weight = weight_of(filter, candidates[i].score);
        const bool survives = key > bound.key || (key == bound.key && candidates[i].token <= bound.token);
        return survives && weight >= filter.min_p ? units_of(weight) : uint64_t{0};
    };
    uint64_t total = 0;
    for (int i = threadIdx.x; i < count; i += kFinishThreads) total += units(i);
    total = finish_block_sum(total);
    return candidates[find_place(count, multiply_high(random, total), units).index].token;
}

__global__ void AMQ_REGISTERS(kFinishRegisters, kFinishThreads) sample_finish_kernel(SampleArguments arguments) {
    const SampleCall& call = arguments.call;
    const int row = blockIdx.x;
    int32_t* out = call.out + static_cast<int64_t>(*arguments.place) * call.rows + row;
    const int position = call.positions[row];
    if (position < 0) {
        if (threadIdx.x == 0) *out = -1;
        return;
    }
    const int64_t at = static_cast<int64_t>(row) * arguments.regions;
    uint64_t best = 0;
    for (int i = threadIdx.x; i < arguments.regions; i += kFinishThreads)
        best = max(best, ranked(arguments.best_keys[at + i], arguments.best_tokens[at + i]));
    best = finish_block_max(best);
    const bool good = is_finite_key(key_of_ranked(best));
    const int32_t drawn = call.drawn[row];
    int32_t token = token_of_ranked(best);
    if (good && call.temperature[row] > 0.0f) {
        const Filter filter = filter_of(call, row, key_of_ranked(best));
        const uint64_t random = random_number(call.seed[row], drawn);
        token = filter.plain ? draw_from_all(arguments, filter, row, random)
                             : draw_from_candidates(arguments, filter, row, random);
    }
    synchronize();  // all have read the row's position and place
    if (threadIdx.x > 0) return;
    *out = good ? token : -1;
    call.tokens[row] = good ? token : 0;
    call.positions[row] = position + 1;
    call.drawn[row] = drawn + 1;
}

}  // namespace amq
