// Every instruction set of this machine against portable code: linears of all formats, what else a decoder computes, rounding.
//
//     compare            prints a line for each: name, and what it lacks or how many numbers were compared; ends with 1 where one
//                        is off by more than rounding, and says which

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "amq_formats.h"
#include "cpu/linear.h"
#include "cpu/prepare.h"
#include "cpu/quantize.h"
#include "cpu/rotation.h"
#include "cpu/unit.h"
#include "cpu/vector.h"

using namespace amq;

namespace {

struct Format {
    const char* name;
    CodeLayout layout;
};
#define AMQ_ROW(name, levels, unit_codes, unit_bytes) {#name, {levels, unit_codes, unit_bytes}},
const Format kFormats[] = {AMQ_FORMATS(AMQ_ROW)};
#undef AMQ_ROW
constexpr int kCount = sizeof kFormats / sizeof *kFormats;
constexpr int64_t kOut = 37, kIn[] = {64, 200, 256};  // a ragged tile, ragged groups

// What one instruction set computed: exact bits, and numbers that may differ by rounding, each beside the size that it is of.
struct Found {
    struct Part {
        std::string name;
        bool exact;
        std::vector<float> values;
        float size;
    };
    std::vector<Part> parts;

    void add(const std::string& name, bool exact, std::vector<float> values) {
        float size = 0;
        for (const float value : values) size = std::max(size, std::fabs(value));
        parts.push_back({name, exact, std::move(values), size});
    }
};

class Random {
public:
    explicit Random(unsigned seed) : engine_(seed) {}
    std::vector<float> floats(int64_t count, float scale = 1) {
        std::normal_distribution<float> normal(0, scale);
        std::vector<float> made(count);
        for (float& value : made) value = normal(engine_);
        return made;
    }
    std::vector<uint16_t> halves(int64_t count, float least, float largest) {
        std::uniform_real_distribution<float> uniform(least, largest);
        std::vector<uint16_t> made(count);
        for (uint16_t& half : made) half = float_to_half(uniform(engine_));
        return made;
    }
    std::vector<uint8_t> bytes(int64_t count) {
        std::vector<uint8_t> made(count);
        for (uint8_t& byte : made) byte = static_cast<uint8_t>(engine_());
        return made;
    }

private:
    std::mt19937 engine_;
};

// A vector's data at a cache line, as kernels want it.
struct Aligned {
    std::vector<uint8_t> memory;
    explicit Aligned(size_t bytes) : memory(bytes + 64) {}
    uint8_t* data() { return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64; }
};

void linears(const Isa& isa, Found& found) {
    for (int format = 0; format < kCount; ++format)
        for (const int64_t in : kIn)
            for (const int64_t group : {32, 64, 128}) {
                Random random(format * 1000 + static_cast<unsigned>(in + group));
                const int64_t groups = ceil_div(in, group), row_bytes = packed_bytes(kFormats[format].layout, in);
                const auto codes = random.bytes(kOut * row_bytes);
                const auto scale = random.halves(kOut * groups, 0.01f, 0.02f);
                const auto zero = random.halves(kOut * groups, 0, static_cast<float>(kFormats[format].layout.levels - 1));
                Aligned tiles(prepared_bytes(tile_bits(format), kOut, in, group));
                prepare(format, isa, {codes.data(), scale.data(), zero.data(), tiles.data(), row_bytes, groups, kOut, in, group}, 1);
                for (const int64_t rows : {1, 2, 3, 4, 5, 17}) {
                    const auto x = random.floats(rows * in), bias = random.floats(kOut);
                    for (const Mode mode : {Mode::fp32, Mode::int8})
                        for (const bool rotated : {false, in % kRotation == 0}) {
                            std::vector<float> y(rows * kOut);
                            LinearCall call{{{format, tiles.data(), kOut, bias.data()}}, x.data(), y.data(), rows, in, group, in,
                                            kOut, mode};
                            call.rotated = rotated;
                            linear(call, isa, 2);
                            found.add(std::string(kFormats[format].name) + " in " + std::to_string(in) + " group " +
                                          std::to_string(group) + " rows " + std::to_string(rows) +
                                          (mode == Mode::int8 ? " int8" : " fp32"),
                                      mode == Mode::int8, y);
                        }
                }
            }
}

void attention(const VectorKernels& kernels, Found& found) {
    constexpr int kHeadDim = 48;
    const int32_t pages[] = {2, 0, 1};
    for (int kind = 0; kind < kCacheKinds; ++kind) {
        Random random(77);
        const int64_t bytes = head_bytes(kCaches[kind], kHeadDim);
        Aligned memory(3 * bytes), keys(2 * FreshKeys::half_bytes(kHeadDim));
        const CacheView cache{memory.data(), pages, bytes, key_bytes(kCaches[kind], kHeadDim)};
        const FreshKeys fresh{{keys.data(), keys.data() + FreshKeys::half_bytes(kHeadDim)}};
        for (int position = 0; position < kSpan; ++position) {
            const auto key = random.floats(kHeadDim, 3), value = random.floats(kHeadDim);
            kernels.store[kind](cache, position, key.data(), value.data(), kHeadDim, fresh);
            if (position % kPage == kPage - 1) kernels.round_page[kind](fresh, cache.page(position), kHeadDim);
        }
        for (int rows = 1; rows <= kernels.query_rows; ++rows) {
            const auto q = random.floats(rows * kHeadDim, 0.2f);
            std::vector<float> values(2 * kMaxQueryRows * kHeadDim), out(rows * kHeadDim);
            std::vector<QueryRow> queries;
            Partial parts[kMaxQueryRows];
            for (int i = 0; i < rows; ++i) {
                queries.push_back({q.data() + i * kHeadDim, i == 1 ? 30 : 0, kSpan - 1 - i});
                parts[i].values = values.data() + i * kHeadDim;
            }
            kernels.attend[kind]({cache, queries.data(), rows, kHeadDim, 0, kSpan, rows == 2 ? 5.0f : 0.0f, fresh}, parts);
            for (int i = 0; i < rows; ++i) {
                Partial sum{-INFINITY, 0, values.data() + (kMaxQueryRows + i) * kHeadDim};
                kernels.merge(sum, parts[i], kHeadDim);
                kernels.merge(sum, parts[i], kHeadDim);
                kernels.finish(sum, kHeadDim, out.data() + i * kHeadDim);
            }
            found.add(std::string("attention ") + kCaches[kind].name, false, out);
        }
    }
}

void vectors(const Isa& isa, Found& found) {
    const VectorKernels& kernels = *isa.vector();
    for (const int64_t count : {16, 53, 160}) {
        Random random(static_cast<unsigned>(count));
        const auto x = random.floats(count), y = random.floats(count);
        std::vector<float> out(count);
        kernels.rms_norm(x.data(), y.data(), 1e-5f, count, out.data());
        found.add("rms_norm", false, out);
        const auto change = [&](const char* name, const auto& run) {
            out = x;
            run(out.data());
            found.add(name, false, out);
        };
        change("rotate", [&](float* v) { kernels.rotate(v, y.data(), y.data() + count / 4, count / 2); });
        for (const auto& activate : kernels.activate) change("activate", [&](float* v) { activate(v, y.data(), 2, count); });
        change("add", [&](float* v) { kernels.add(v, y.data(), 0.5f, count); });
        change("gate_sigmoid", [&](float* v) { kernels.gate_sigmoid(v, y.data(), count); });
        change("gate_silu", [&](float* v) { kernels.gate_silu(v, y.data(), count); });
        change("softcap", [&](float* v) { kernels.softcap(v, 3, count); });
        change("unit", [&](float* v) { kernels.unit(v, 1e-6f, 1, count); });
        const auto weights = random.bytes(4 * 5 * count);
        auto numbers = random.floats(5 * count);
        std::vector<uint16_t> halves(5 * count), bfloats(5 * count);
        for (int64_t i = 0; i < 5 * count; ++i) {
            uint32_t bits;
            std::memcpy(&bits, &numbers[i], 4);
            halves[i] = float_to_half(numbers[i]);
            bfloats[i] = static_cast<uint16_t>(bits >> 16);
        }
        const void* const kinds[] = {numbers.data(), halves.data(), bfloats.data()};
        for (int kind = 0; kind < 3; ++kind) {
            std::vector<float> product(2 * 5), wide(count);
            kernels.dense[kind](kinds[kind], count, 0, 5, numbers.data(), count, 2, product.data(), 5);
            kernels.widen[kind](kinds[kind], count, wide.data());
            found.add("dense", false, product);
            found.add("widen", true, wide);
        }
    }
    Random random(5);
    constexpr int64_t kTokens = 5, kKey = 24, kColumns = 32;
    const auto x = random.floats(kTokens * 64), weight = random.floats(4 * 53), before = random.floats(3 * 53);
    ConvolveArgs convolution;
    std::vector<float> convolved(kTokens * 53);
    convolution.x = x.data(), convolution.state = before.data(), convolution.weight = weight.data();
    convolution.out = convolved.data(), convolution.x_stride = 64, convolution.state_stride = convolution.weight_stride = 53;
    convolution.out_stride = 53, convolution.tokens = kTokens, convolution.channels = 53, convolution.kernel = 4;
    convolution.silu = true;
    kernels.convolve(convolution);
    found.add("convolve", false, convolved);
    auto state = random.floats(kColumns * kKey);
    const auto decay = random.floats(kTokens * 64, 0.1f), beta = random.floats(kTokens * 64, 0.1f);
    std::vector<float> out(kTokens * 64);
    DeltaArgs delta;
    delta.q = x.data(), delta.k = x.data() + kKey, delta.v = x.data() + 16, delta.decay = decay.data(), delta.beta = beta.data();
    delta.state = state.data(), delta.out = out.data(), delta.stride = 64, delta.tokens = kTokens, delta.key_dim = kKey;
    delta.columns = kColumns;
    kernels.delta(delta);
    found.add("delta", false, out);
    found.add("delta's state", false, state);
    attention(kernels, found);
}

// Codes, scales and zero points of rounding to nearest: all instruction sets give the same.
void rounding(const Isa& isa, Found& found) {
    constexpr int64_t kRows = 37, kFeatures = 200, kGroup = 64, kGroups = 4;
    Random random(11);
    const auto weight = random.floats(kRows * kFeatures);
    const std::vector<float> importance(kFeatures, 1), shrinks = {1, 0.9f, 0.8f};
    for (const Format& format : kFormats) {
        const int64_t bytes = packed_bytes(format.layout, kFeatures);
        std::vector<uint8_t> codes(kRows * bytes);
        std::vector<uint16_t> scale(kRows * kGroups), zero(kRows * kGroups);
        RoundingProblem problem{};
        problem.in_features = kFeatures, problem.group_size = kGroup, problem.n_groups = kGroups;
        problem.zero_points = ZeroPoints::fractional;
        problem.importance = importance.data(), problem.shrinks = shrinks.data(), problem.n_shrinks = 3, problem.refits = 2;
        quantize(isa, problem, {{weight.data(), Element::float32, kRows, {{codes.data(), scale.data(), zero.data()}}}},
                 {format.layout}, 2);
        std::vector<float> all(codes.begin(), codes.end());
        for (const uint16_t half : scale) all.push_back(half_to_float(half));
        for (const uint16_t half : zero) all.push_back(half_to_float(half));
        found.add(std::string("rounding to ") + format.name, true, all);
    }
}

Found run(const Isa& isa) {
    Found found;
    linears(isa, found);
    vectors(isa, found);
    rounding(isa, found);
    return found;
}

// How many numbers were compared; -1 where one is off, which is printed.
int64_t compare(const Isa& isa, const Found& mine, const Found& expected) {
    int64_t count = 0;
    for (size_t part = 0; part < expected.parts.size(); ++part) {
        const auto &a = mine.parts[part], &b = expected.parts[part];
        const float allowed = b.exact ? 0 : 2e-5f * b.size;  // of float32 sums of some hundred numbers in another order
        for (size_t i = 0; i < b.values.size(); ++i, ++count)
            if (!(std::fabs(a.values[i] - b.values[i]) <= allowed)) {
                std::printf("%s: %s: number %zu is %.9g, expected %.9g within %.3g\n", isa.name, b.name.c_str(), i, a.values[i],
                            b.values[i], allowed);
                return -1;
            }
    }
    return count;
}

}  // namespace

int main() {
    const Found expected = run(isas().front());
    bool good = true;
    for (const Isa& isa : isas()) {
        if (const char* reason = missing_feature(isa)) {
            std::printf("%s: %s\n", isa.name, reason);
            continue;
        }
        const int64_t count = compare(isa, run(isa), expected);
        good = good && count > 0;
        if (count > 0) std::printf("%s: %lld numbers\n", isa.name, static_cast<long long>(count));
    }
    return good ? 0 : 1;
}
