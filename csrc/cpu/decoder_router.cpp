// The loops of decoder_router.h: some hundred scores of a row, where a product with the router's weight takes a thousand times
// as long.

#include "decoder_router.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace amq {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

}  // namespace

ExpertChoice::ExpertChoice(const Router& router)
    : router_(router), score_(router.experts()), judged_(router.experts()), best_(router.top_k), group_score_(router.groups) {}

void ExpertChoice::choose(const float* scores, int32_t* choice, float* weights) {
    if (!score(scores)) {
        for (int64_t i = 0; i < router_.top_k; ++i) choice[i] = static_cast<int32_t>(i);
        std::fill_n(weights, router_.top_k, std::numeric_limits<float>::quiet_NaN());
        return;
    }
    if (router_.groups > 1) keep_best_groups();
    take_best(choice);
    std::sort(choice, choice + router_.top_k);
    weigh(choice, weights);
}

// Whether all scores are numbers.
bool ExpertChoice::score(const float* scores) {
    const int64_t experts = router_.experts();
    if (router_.score == Score::softmax) {
        const float largest = *std::max_element(scores, scores + experts);
        double sum = 0;
        for (int64_t i = 0; i < experts; ++i) sum += score_[i] = std::exp(scores[i] - largest);
        for (int64_t i = 0; i < experts; ++i) score_[i] = static_cast<float>(score_[i] / sum);
    } else {
        for (int64_t i = 0; i < experts; ++i) score_[i] = 1 / (1 + std::exp(-scores[i]));
    }
    bool numbers = true;
    for (int64_t i = 0; i < experts; ++i) {
        judged_[i] = router_.correction ? score_[i] + router_.correction[i] : score_[i];
        numbers = numbers && judged_[i] == judged_[i];
    }
    return numbers;
}

// A group is as good as its two best experts together.
void ExpertChoice::keep_best_groups() {
    const int64_t size = router_.experts() / router_.groups;
    for (int64_t group = 0; group < router_.groups; ++group) {
        float first = kNever, second = kNever;
        for (int64_t i = group * size; i < (group + 1) * size; ++i) {
            second = std::max(second, std::min(first, judged_[i]));
            first = std::max(first, judged_[i]);
        }
        group_score_[group] = first + second;
    }
    for (int64_t group = 0; group < router_.groups; ++group) {
        int64_t better = 0;
        for (int64_t other = 0; other < router_.groups; ++other)
            better += group_score_[other] > group_score_[group] || (group_score_[other] == group_score_[group] && other < group);
        if (better >= router_.top_groups) std::fill_n(&judged_[group * size], size, kNever);
    }
}

// The best so far lie in order, so that most experts cost one comparison.
void ExpertChoice::take_best(int32_t* choice) {
    int64_t count = 0;
    for (int64_t expert = 0; expert < router_.experts(); ++expert) {
        const float value = judged_[expert];
        if (count == router_.top_k && !(value > best_[count - 1])) continue;
        int64_t place = count < router_.top_k ? count++ : count - 1;
        for (; place > 0 && value > best_[place - 1]; --place) {
            best_[place] = best_[place - 1];
            choice[place] = choice[place - 1];
        }
        best_[place] = value;
        choice[place] = static_cast<int32_t>(expert);
    }
}

void ExpertChoice::weigh(const int32_t* choice, float* weights) const {
    float sum = router_.epsilon;
    for (int64_t i = 0; i < router_.top_k; ++i) sum += weights[i] = score_[choice[i]];
    for (int64_t i = 0; i < router_.top_k; ++i) {
        if (router_.normalized) weights[i] /= sum;
        weights[i] *= router_.scale;
        if (router_.expert_scale) weights[i] *= router_.expert_scale[choice[i]];
    }
}

}  // namespace amq
