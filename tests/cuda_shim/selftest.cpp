// The shim's own tests: `selftest CASE`. tests/test_cuda_shim.py runs them and says which must fail, and how.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "device.cuh"

using namespace amq;

#define EXPECT(condition)                                                              \
    do {                                                                               \
        if (!(condition)) {                                                            \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                              \
        }                                                                              \
    } while (0)

// ---- mma, against a plain triple loop

template <class A, class B, class Sum>
struct MmaArguments {
    const A* a;  // [16, depth]
    const B* b;  // [depth, 8]
    Sum* c;      // [16, 8]
};

template <class T>
uint32_t register_of(const T (&elements)[4 / sizeof(T)]) {
    uint32_t word;
    std::memcpy(&word, elements, 4);
    return word;
}

// Rows and columns of a lane's elements as the PTX manual numbers them, "Matrix Fragments for mma.m16n8k16" for
// two-byte elements and "m16n8k32" for bytes: a_i, b_i, c_i with the formulas given there.
template <class A, class B, class Sum, class Kind>
__global__ void mma_kernel(MmaArguments<A, B, Sum> arguments) {
    constexpr bool bytes = sizeof(A) == 1;
    constexpr int per_register = bytes ? 4 : 2, depth = 8 * per_register;
    const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
    A a[4][per_register];
    for (int i = 0; i < 4 * per_register; ++i) {
        int row, column;
        if (bytes) {
            row = (i < 4 || (8 <= i && i < 12)) ? group : group + 8;
            column = in_group * 4 + (i & 3) + (i >= 8 ? 16 : 0);
        } else {
            row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
            column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        }
        a[i / per_register][i % per_register] = arguments.a[row * depth + column];
    }
    B b[2][per_register];
    for (int i = 0; i < 2 * per_register; ++i) {
        const int row = bytes ? in_group * 4 + (i & 3) + (i >= 4 ? 16 : 0) : in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
        b[i / per_register][i % per_register] = arguments.b[row * 8 + group];
    }
    Sum c[4];
    Sum* places[4];
    for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
        places[i] = arguments.c + row * 8 + column;
        c[i] = *places[i];
    }
    const uint32_t words[4] = {register_of(a[0]), register_of(a[1]), register_of(a[2]), register_of(a[3])};
    mma(c, words, register_of(b[0]), register_of(b[1]), Kind{});
    for (int i = 0; i < 4; ++i) *places[i] = c[i];
}

double number(__half v) { return to_float(v); }
double number(__nv_bfloat16 v) { return to_float(v); }
double number(uint8_t v) { return v; }
double number(int8_t v) { return v; }

// Random matrices from the two functions; every sum must come out exactly, so they make sums that fp32 holds.
template <class A, class B, class Sum, class Kind, class MakeA, class MakeB>
void check_mma(MakeA make_a, MakeB make_b, Sum start) {
    constexpr int depth = 8 * 4 / sizeof(A);
    std::vector<A> a(16 * depth);
    std::vector<B> b(depth * 8);
    std::vector<Sum> c(16 * 8);
    for (int round = 0; round < 20; ++round) {
        for (A& v : a) v = make_a();
        for (B& v : b) v = make_b();
        for (size_t i = 0; i < c.size(); ++i) c[i] = start * static_cast<Sum>(i);
        const auto before = c;
        EXPECT(launch(&mma_kernel<A, B, Sum, Kind>, 1, 32, nullptr, {a.data(), b.data(), c.data()}) == cudaSuccess);
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < 8; ++column) {
                double sum = before[row * 8 + column];
                for (int k = 0; k < depth; ++k) sum += number(a[row * depth + k]) * number(b[k * 8 + column]);
                EXPECT(c[row * 8 + column] == sum);
            }
    }
}

std::mt19937 generator(5);
int random_integer(int lowest, int highest) { return std::uniform_int_distribution<int>(lowest, highest)(generator); }

template <class T>
T from_integer(int v, float unit = 1.0f) {
    T out;
    from_float(v * unit, &out);
    return out;
}

void mma_f16() {
    const auto normal = [] { return from_integer<__half>(random_integer(-63, 63), 0.125f); };
    check_mma<__half, __half, float, __half>(normal, normal, 1.0f);
    // Subnormals: the codes of HalfElement, which has them at the bottom of an fp16 number.
    const auto subnormal = [] {
        return __half{static_cast<uint16_t>(random_integer(0, 1023) | random_integer(0, 1) << 15)};
    };
    check_mma<__half, __half, float, __half>(subnormal, normal, 0.0f);
    check_mma<__half, __half, float, __half>(normal, subnormal, 0x1p-24f);
}

void mma_bf16() {
    const auto normal = [] { return from_integer<__nv_bfloat16>(random_integer(-63, 63), 0.125f); };
    check_mma<__nv_bfloat16, __nv_bfloat16, float, __nv_bfloat16>(normal, normal, 1.0f);
}

void mma_u8_s8() {
    const auto code = [] { return static_cast<uint8_t>(random_integer(0, 255)); };
    const auto activation = [] { return static_cast<int8_t>(random_integer(-128, 127)); };
    check_mma<uint8_t, int8_t, int32_t, int8_t>(code, activation, -12345);
}

// ---- numbers

double value_of_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits >> 15 ? -size : size;
}

// Each fp16 number is itself, and what lies between two neighbours goes to the nearer one, the middle to the even one.
void conversions() {
    const auto half_of = [](double v) {
        __half out;
        from_float(static_cast<float>(v), &out);
        return out.bits;
    };
    for (uint16_t bits = 0; bits < 0x7c00; ++bits) {
        const double here = value_of_half(bits), above = value_of_half(bits + 1), middle = (here + above) / 2;
        const uint16_t negative = bits | 0x8000;
        EXPECT(to_float(__half{bits}) == here && to_float(__half{negative}) == -here);
        EXPECT(half_of(here) == bits && half_of(-here) == negative);
        EXPECT(half_of(middle) == bits + bits % 2);
        EXPECT(half_of(std::nextafter(static_cast<float>(middle), 0.0f)) == bits);
        EXPECT(half_of(std::nextafter(static_cast<float>(middle), INFINITY)) == bits + 1);
    }
    EXPECT(half_of(INFINITY) == 0x7c00 && half_of(-1e30) == 0xfc00 && half_of(NAN) == 0x7fff);
    EXPECT(to_float(__half{0xfc00}) == -INFINITY && std::isnan(to_float(__half{0x7c01})));
    EXPECT(unpack_halves(0xc0003c00).x == 1.0f && unpack_halves(0xc0003c00).y == -2.0f);
    const auto bfloat_of = [](float v) {
        __nv_bfloat16 out;
        from_float(v, &out);
        return out.bits;
    };
    EXPECT(bfloat_of(1.0f) == 0x3f80 && bfloat_of(1.00390625f) == 0x3f80 && bfloat_of(1.01171875f) == 0x3f82);
    EXPECT(bfloat_of(1.00390637f) == 0x3f81 && bfloat_of(3.4e38f) == 0x7f80 && bfloat_of(-NAN) == 0x7fff);
    EXPECT(to_float(__nv_bfloat16{0xc040}) == -3.0f);
    EXPECT(round_even(2.5f) == 2.0f && round_even(-3.5f) == -4.0f);
}

// ---- blocks of threads

struct Data {
    const float* x;
    float* y;
    int size;
};

// One sum per block, with every barrier that it needs.
__global__ void __launch_bounds__(128) reduce(Data data) {
    __shared__ float sums[128];
    const int i = threadIdx.x;
    for (int round = 0; round < 3; ++round) {
        sums[i] = data.x[blockIdx.x * blockDim.x + i];
        synchronize();
        for (int distance = 64; distance > 0; distance /= 2) {
            if (i < distance) sums[i] += sums[i + distance];
            synchronize();
        }
        if (i == 0) data.y[blockIdx.x] = sums[0];
        synchronize();
    }
}

std::vector<float> numbers(int count) {
    std::vector<float> x(count);
    for (float& v : x) v = static_cast<float>(random_integer(-100, 100));
    return x;
}

void reduction() {
    const std::vector<float> x = numbers(5 * 128);
    std::vector<float> y(5);
    EXPECT(launch(&reduce, 5, 128, nullptr, {x.data(), y.data(), 5}) == cudaSuccess);
    for (int block = 0; block < 5; ++block) {
        float sum = 0.0f;
        for (int i = 0; i < 128; ++i) sum += x[block * 128 + i];
        EXPECT(y[block] == sum);
    }
    EXPECT(launch(&reduce, 0, 128, nullptr, {x.data(), y.data(), 5}) == cudaErrorInvalidConfiguration);
    EXPECT(launch(&reduce, 1, 2048, nullptr, {x.data(), y.data(), 5}) == cudaErrorInvalidConfiguration);
}

__global__ void shuffle_all(Data data) {
    for (int lanes = 0; lanes < 32; ++lanes)
        data.y[lanes * blockDim.x + threadIdx.x] = shuffle_xor(data.x[threadIdx.x], lanes);
}

void shuffles() {
    const std::vector<float> x = numbers(96);
    std::vector<float> y(32 * 96);
    EXPECT(launch(&shuffle_all, 1, 96, nullptr, {x.data(), y.data(), 96}) == cudaSuccess);
    for (int lanes = 0; lanes < 32; ++lanes)
        for (int i = 0; i < 96; ++i) EXPECT(y[lanes * 96 + i] == x[i ^ lanes]);
}

// Who has an odd number says so; floats hold 24 bits exactly.
__global__ void vote_all(Data data) {
    const uint32_t odd = ballot(static_cast<int>(data.x[threadIdx.x]) % 2 != 0);
    data.y[threadIdx.x] = static_cast<float>(odd >> threadIdx.x % 32 & 1);
    data.y[96 + threadIdx.x] = static_cast<float>(count_bits(odd));
    data.y[192 + threadIdx.x] = static_cast<float>(shuffle_xor(0xffffff00u + threadIdx.x, 3) & 0xffff);
}

void votes() {
    const std::vector<float> x = numbers(96);
    std::vector<float> y(3 * 96);
    EXPECT(launch(&vote_all, 1, 96, nullptr, {x.data(), y.data(), 96}) == cudaSuccess);
    for (int i = 0; i < 96; ++i) {
        const auto is_odd = [&](int j) { return static_cast<int>(x[j]) % 2 != 0; };
        int odd = 0;
        for (int lane = 0; lane < 32; ++lane) odd += is_odd(i / 32 * 32 + lane);
        EXPECT(y[i] == is_odd(i) && y[96 + i] == odd && y[192 + i] == 0xff00 + (i ^ 3));
    }
    EXPECT(multiply_high(~uint64_t{0}, ~uint64_t{0}) == ~uint64_t{0} - 1 && multiply_high(1u, ~uint64_t{0}) == 0);
}

// Shared memory is undefined when a block starts, also in a template and after another block.
template <class T>
__global__ void read_unwritten(Data data) {
    __shared__ T values[33];
    data.y[blockIdx.x * 33 + threadIdx.x] = to_float(values[threadIdx.x]);
    synchronize();
    values[threadIdx.x] = T{};
}

template <class T>
void check_undefined() {
    std::vector<float> y(3 * 33);
    EXPECT(launch(&read_unwritten<T>, 3, 33, nullptr, {nullptr, y.data(), 0}) == cudaSuccess);
    for (float v : y) EXPECT(std::isnan(v));
}

void undefined_shared() {
    check_undefined<float>();
    check_undefined<__half>();
    check_undefined<__nv_bfloat16>();
}

// 128 threads and 200 collectives: to be timed by hand, with `selftest speed`.
__global__ void busy(Data data) {
    float sum = data.x[threadIdx.x];
    for (int i = 0; i < 100; ++i) {
        sum = 0.5f * (sum + shuffle_xor(sum, 1 << i % 5));
        synchronize();
    }
    data.y[threadIdx.x] = sum;
}

__global__ void busy_mma(Data data) {
    float c[4] = {};
    const uint32_t word = 0x3c003c00;
    for (int i = 0; i < 200; ++i) mma(c, {word, word, word, word}, word, word, __half{});
    data.y[threadIdx.x] = c[0];
}

void speed() {
    const std::vector<float> x = numbers(128);
    std::vector<float> y(128);
    for (auto kernel : {&busy, &busy_mma}) {
        const auto from = std::chrono::steady_clock::now();
        for (int i = 0; i < 10; ++i) launch(kernel, 1, 128, nullptr, {x.data(), y.data(), 128});
        const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - from;
        const char* what = kernel == &busy ? "100 shuffles, 100 barriers" : "200 mma";
        std::printf("%s: %.2f ms per block\n", what, taken.count() / 10);
    }
}

// ---- planted bugs

template <void (*kKernel)(Data)>
void run(int blocks = 1, int threads = 64) {
    const std::vector<float> x = numbers(1022);  // the last 16 bytes are half in it
    std::vector<float> y(threads);
    launch(kKernel, blocks, threads, nullptr, {x.data(), y.data(), threads});
    for (float v : y) std::printf("%g ", v);
    std::printf("\n");
}

__global__ void divergent_barrier(Data) {
    if (threadIdx.x < 40) synchronize();
}
__global__ void two_barriers(Data) {
    if (threadIdx.x < 40)
        synchronize();
    else
        synchronize();
}
__global__ void extra_round(Data data) {
    for (int i = 0; i < (threadIdx.x == 3 ? 5 : 4); ++i) data.y[threadIdx.x] = shuffle_xor(data.x[threadIdx.x], 1);
    synchronize();
}
__global__ void early_return(Data data) {
    if (threadIdx.x == 37) return;
    float c[4] = {};
    mma(c, {1, 1, 1, 1}, 1, 1, __half{});
    data.y[threadIdx.x] = c[0];
}
__global__ void partial_warp(Data data) { data.y[threadIdx.x] = shuffle_xor(data.x[threadIdx.x], 1); }

__global__ void missing_barrier(Data data) {
    __shared__ float values[64];
    values[threadIdx.x] = data.x[threadIdx.x];
    data.y[threadIdx.x] = values[(threadIdx.x + 32) % 64];
}
// The barrier at the end of the loop is missing: a warp that is ahead overwrites what another still reads.
__global__ void missing_second_barrier(Data data) {
    __shared__ float values[64];
    float sum = 0.0f;
    for (int i = 0; i < 4; ++i) {
        values[threadIdx.x] = data.x[threadIdx.x + 64 * i];
        synchronize();
        sum += values[(threadIdx.x + 32) % 64];
    }
    data.y[threadIdx.x] = sum;
}
// Nothing depends on the order, as all write the same number: only ThreadSanitizer can tell.
__global__ void harmless_race(Data data) {
    __shared__ float value;
    value = data.x[0];
    synchronize();
    data.y[threadIdx.x] = value;
}
__global__ void blocks_share_output(Data data) { data.y[threadIdx.x] = static_cast<float>(blockIdx.x); }

__global__ void write_past_end(Data data) { data.y[threadIdx.x + 1] = 1.0f; }
__global__ void read_past_end(Data data) {
    const auto from = reinterpret_cast<const uint4*>(data.x) + threadIdx.x;
    data.y[threadIdx.x] = static_cast<float>(load_once(from).x & 1);
}
__global__ void shared_past_end(Data data) {
    __shared__ float values[64];
    float* to = values;
    to[threadIdx.x + data.size / 64] = 1.0f;
    data.y[threadIdx.x] = values[threadIdx.x];
}
__global__ void stack_past_end(Data data) {
    float values[8] = {};
    synchronize();
    float* to = values;
    to[data.size / 8] = 1.0f;
    synchronize();
    data.y[threadIdx.x] = values[threadIdx.x % 8];
}
template <bool kOnce>
__global__ void misaligned(Data data) {
    const auto from = reinterpret_cast<const uint4*>(data.x + 2);
    data.y[threadIdx.x] = static_cast<float>((kOnce ? load_once(from) : load_shared_by_many(from)).x);
}
__global__ void misaligned_pair(Data data) {
    data.y[threadIdx.x] = reinterpret_cast<const float2*>(data.x + 1)->x;
}
__global__ void shift_too_far(Data data) { data.y[threadIdx.x] = static_cast<float>(1 << (threadIdx.x + data.size)); }

int main(int count, char** arguments) {
    const std::map<std::string, void (*)()> cases = {
        {"mma_f16", &mma_f16},
        {"mma_bf16", &mma_bf16},
        {"mma_u8_s8", &mma_u8_s8},
        {"conversions", &conversions},
        {"reduction", &reduction},
        {"shuffles", &shuffles},
        {"votes", &votes},
        {"undefined_shared", &undefined_shared},
        {"speed", &speed},
        {"divergent_barrier", [] { run<&divergent_barrier>(); }},
        {"two_barriers", [] { run<&two_barriers>(); }},
        {"extra_round", [] { run<&extra_round>(); }},
        {"early_return", [] { run<&early_return>(); }},
        {"partial_warp", [] { run<&partial_warp>(1, 48); }},
        {"missing_barrier", [] { run<&missing_barrier>(); }},
        {"missing_second_barrier", [] { run<&missing_second_barrier>(); }},
        {"harmless_race", [] { run<&harmless_race>(); }},
        {"blocks_share_output", [] { run<&blocks_share_output>(3); }},
        {"write_past_end", [] { run<&write_past_end>(); }},
        {"read_past_end", [] { run<&read_past_end>(1, 256); }},
        {"shared_past_end", [] { run<&shared_past_end>(); }},
        {"stack_past_end", [] { run<&stack_past_end>(); }},
        {"misaligned_once", [] { run<&misaligned<true>>(); }},
        {"misaligned_by_many", [] { run<&misaligned<false>>(); }},
        {"misaligned_pair", [] { run<&misaligned_pair>(); }},
        {"shift_too_far", [] { run<&shift_too_far>(); }},
    };
    for (int i = 1; i < count; ++i) cases.at(arguments[i])();
}
