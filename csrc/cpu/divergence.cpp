// The row loops of divergence.h, compiled once per instruction set.
//
// Plain loops that the compiler vectorises. For that the file has flags of its own in CMakeLists.txt: `omp simd`, which
// lets sums be reordered, contraction to fused multiply-adds, no traps. NaN and infinity keep their meaning.

#include "divergence.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "threads.h"

namespace amq {
namespace {

constexpr int64_t kBlock = 1024;  // logits summed in float32 before the sum goes on in double
// Logarithms below this count as this: 256k tokens of e^−64 weigh 4e-23, and nothing on the way becomes subnormal.
constexpr float kLeast = -64.0f;
constexpr float kSaturated = 20.0f;  // F(20) = ½ ln 2 but for 6e-8 of it

// A limit of which the compiler forgets the value. Clamping to a constant it takes apart into compares and blends, 55 µs
// per 49152 logits in L2; clamping to a variable is one instruction, 47 µs (GCC 12, AVX2, one thread of an Intel Xeon
// with AMX, November 2026).
AMQ_INLINE float opaque(float limit) {
    asm("" : "+m"(limit));
    return limit;
}

// The comparisons below are false for NaN, and so arranged that NaN stays.
AMQ_INLINE float at_least(float x, float least) { return x < least ? least : x; }
AMQ_INLINE float at_most(float x, float most) { return x > most ? most : x; }

// e^x for kLeast ≤ x ≤ 0 or a little more, 1e-7 relative (2^f on |f| ≤ ½: minimax of degree 5).
AMQ_INLINE float exp_bounded(float x) {
    constexpr float kLog2E = 1.44269504f;
    // Adding this leaves round(x·log₂e) + 127 in the lowest bits: the exponent field of the power of two.
    constexpr float kRound = 0x1.8p23f + 127.0f;
    const float rounded = x * kLog2E + kRound;
    const float f = x * kLog2E - (rounded - kRound);
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits <<= 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    float y = 0.00132764715f;
    y = y * f + 0.00967554133f;
    y = y * f + 0.0555071327f;
    y = y * f + 0.240221197f;
    y = y * f + 0.693146967f;
    y = y * f + 1.00000007f;
    return y * power;
}

// F(a) for 0 ≤ a ≤ kSaturated, 1e-7 relative: a² times a minimax rational function.
AMQ_INLINE float divergence_term(float a) {
    float p = -1.08515171e-08f;
    p = p * a + 2.06697166e-05f;
    p = p * a + 3.96547285e-05f;
    p = p * a + 2.4596968e-03f;
    p = p * a - 2.12185353e-03f;
    p = p * a + 0.124999988f;
    float q = 5.65551831e-05f;
    q = q * a + 2.41704603e-04f;
    q = q * a + 4.28439192e-03f;
    q = q * a + 2.87798814e-02f;
    q = q * a + 0.136222012f;
    q = q * a + 0.48302078f;
    q = q * a + 1.0f;
    return a * a * p / q;
}

// NaN may get lost here; the sums below find it.
AMQ_INLINE float largest(const float* x, int64_t count) {
    float result = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : result)
    for (int64_t i = 0; i < count; ++i) result = result > x[i] ? result : x[i];
    return result;
}

AMQ_INLINE float sum_of_exp(const float* x, int64_t count, float shift) {
    const float least = opaque(kLeast);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += exp_bounded(at_least(x[i] - shift, least));
    return sum;
}

AMQ_INLINE float sum_of_terms(const float* reference, const float* x, int64_t count, float shift, float log_sum) {
    const float least = opaque(kLeast), saturated = opaque(kSaturated);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
        const float log_q = at_least(x[i] - shift - log_sum, least), log_p = at_least(reference[i], least);
        const float larger = log_p > log_q ? log_p : log_q;
        sum += exp_bounded(larger) * divergence_term(at_most(std::fabs(log_q - log_p), saturated));
    }
    return sum;
}

// The reference is fetched while the log-sum-exp is computed: with both in memory, 58 instead of 94 µs per 49152 logits
// (AVX2, one thread of an Intel Xeon with AMX, November 2026).
AMQ_INLINE void prefetch(const float* x, int64_t count) {
    constexpr int64_t kCacheLine = 64 / sizeof(float);
    for (int64_t i = 0; i < count; i += kCacheLine) __builtin_prefetch(x + i, 0, 2);
}

AMQ_INLINE double divergence_of_row(const float* reference, const float* x, int64_t vocabulary) {
    float shift = -std::numeric_limits<float>::infinity();  // the largest logit so far
    double sum = 0;
    for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
        const int64_t count = std::min(kBlock, vocabulary - begin);
        prefetch(reference + begin, count);
        const float larger = std::max(shift, largest(x + begin, count));
        if (larger == -std::numeric_limits<float>::infinity()) continue;
        if (larger > shift) sum *= std::exp(static_cast<double>(shift) - larger);
        shift = larger;
        sum += sum_of_exp(x + begin, count, shift);
    }
    const float log_sum = static_cast<float>(std::log(sum));
    double divergence = 0;
    for (int64_t begin = 0; begin < vocabulary; begin += kBlock)
        divergence += sum_of_terms(reference + begin, x + begin, std::min(kBlock, vocabulary - begin), shift, log_sum);
    return divergence;
}

AMQ_INLINE void divergence_of_rows(const DivergenceArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        a.divergence[row] =
            divergence_of_row(a.reference + row * a.vocabulary, a.logits + row * a.vocabulary, a.vocabulary);
}

void rows_portable(const DivergenceArgs& a, int64_t begin, int64_t end) { divergence_of_rows(a, begin, end); }

AMQ_TARGET_AVX2 void rows_avx2(const DivergenceArgs& a, int64_t begin, int64_t end) {
    divergence_of_rows(a, begin, end);
}

}  // namespace

void jensen_shannon(const Isa& isa, const DivergenceArgs& args, int threads) {
    using Kernel = void (*)(const DivergenceArgs&, int64_t begin, int64_t end);
    // Waking a thread costs a few µs, in which one thread handles about this many logits.
    constexpr int64_t kLogitsPerThread = 1 << 13;
    const int64_t useful = 1 + args.rows * args.vocabulary / kLogitsPerThread;
    const Kernel kernel = isa.avx2_loops ? rows_avx2 : rows_portable;
    parallel_rows(args.rows, static_cast<int>(std::min<int64_t>(threads, useful)),
                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace amq
