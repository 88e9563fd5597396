// Which experts of a mixture a row is given to, and with what weights.

#pragma once

#include <cstdint>
#include <vector>

#include "decoder.h"

namespace amq {

class ExpertChoice {
public:
    explicit ExpertChoice(const Router& router);

    // scores: [experts], products with the router's weight. choice [top_k] ← experts, ascending; weights [top_k] ← theirs.
    //
    // Of equal scores the first is chosen. Where one is no number, or all are infinite, the first experts are, with NaN for
    // weights: the row's logits are NaN then, and no other row's are.
    void choose(const float* scores, int32_t* choice, float* weights);

private:
    bool score(const float* scores);
    void keep_best_groups();
    void take_best(int32_t* choice);
    void weigh(const int32_t* choice, float* weights) const;

    const Router& router_;
    std::vector<float> score_, judged_;      // [experts]: what weights are made of, what experts are chosen by
    std::vector<float> best_, group_score_;  // [top_k], [groups]
};

}  // namespace amq
