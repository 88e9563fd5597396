// Jensen–Shannon divergence of a candidate's next-token distribution from a reference, from logits, in one call.
//
// With d = ln q − ln p and a = |d|, the sum of amq/model/losses.py is, token of the vocabulary by token,
//
//     JSD(p, q) = ½ Σ p·ln(p/m) + q·ln(q/m) = Σ max(p, q)·F(a),   m = (p + q)/2
//     F(a) = ½ [(1 + e^−a)·(ln 2 − ln(1 + e^−a)) − a·e^−a]        0 at a = 0, a²/8 near it, ½ ln 2 as a → ∞
//
// Every term is positive and F, of which a² is a factor, is approximated to 1e-7 relative: nothing cancels, so that a
// loss of 1e-6 keeps four digits, and a relative error δ of Σ e^logit moves the loss by at most about δ of itself.

#pragma once

#include <cstdint>

#include "isa.h"

namespace amq {

struct DivergenceArgs {
    const float* reference;  // ln p [rows, vocabulary], normalised; −inf for p = 0
    const float* logits;     // [rows, vocabulary], normalised here; −inf for q = 0
    double* divergence;      // [rows], nats; NaN where a row holds NaN or +inf, or no logit above −inf
    int64_t rows;
    int64_t vocabulary;  // at least 1
};

// Handles all rows on at most `threads` threads; the result does not depend on their number.
void jensen_shannon(const Isa& isa, const DivergenceArgs& args, int threads);

}  // namespace amq
