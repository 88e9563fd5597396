// Binding of the quantizing kernels (cpu/quantize.h): what module.cpp says holds here too.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/quantize.h"
#include "cpu/symmetric.h"
#include "modules.h"

namespace py = pybind11;
using amq::exact_address_of;
using amq::Memory;
using amq::product;
using amq::require;
using amq::require_size;

namespace {

using Results = std::tuple<Memory, Memory, Memory>;  // qweight, scale, zero_point of one weight in one format
using Weight = std::tuple<Memory, std::string, int64_t, std::vector<Results>>;  // and what it is made of, and its rows
using Layout = std::tuple<int, int, int>;

amq::Element element_of(const std::string& name) {
    if (name == "float32") return amq::Element::float32;
    if (name == "float16") return amq::Element::half;
    if (name == "bfloat16") return amq::Element::bfloat;
    throw std::invalid_argument("weight: expected float32, float16 or bfloat16, got '" + name + "'");
}

amq::ZeroPoints zero_points_of(const std::string& name) {
    if (name == "fractional") return amq::ZeroPoints::fractional;
    if (name == "integer") return amq::ZeroPoints::integer;
    if (name == "symmetric") return amq::ZeroPoints::symmetric;
    throw std::invalid_argument("zero_points: expected fractional, integer or symmetric, got '" + name + "'");
}

std::vector<amq::CodeLayout> checked_formats(const std::vector<Layout>& formats) {
    std::vector<amq::CodeLayout> layouts;
    for (const auto& [levels, unit_codes, unit_bytes] : formats) {
        require(levels >= 2 && levels <= 256, "levels", "2 to 256", levels);
        require(unit_codes >= 1 && unit_codes <= 56, "unit_codes", "1 to 56", unit_codes);  // a code is a bit at least
        require(unit_bytes >= 1 && unit_bytes <= 7, "unit_bytes", "1 to 7", unit_bytes);
        layouts.push_back({levels, unit_codes, unit_bytes});
    }
    require(!layouts.empty(), "formats", "at least one", 0);
    return layouts;
}

amq::PackedRows checked_results(const Results& results, const amq::CodeLayout& layout, int64_t rows, int64_t in_features,
                                int64_t groups) {
    const auto& [qweight, scale, zero_point] = results;
    return {exact_address_of<uint8_t>(qweight, "qweight", product({rows, amq::packed_bytes(layout, in_features)}, "qweight")),
            exact_address_of<uint16_t>(scale, "scale", product({rows, groups, 2}, "scale")),
            exact_address_of<uint16_t>(zero_point, "zero_point", product({rows, groups, 2}, "zero_point"))};
}

std::vector<amq::WeightRows> checked_weights(const std::vector<Weight>& weights,
                                             const std::vector<amq::CodeLayout>& formats, int64_t in_features,
                                             int64_t groups) {
    std::vector<amq::WeightRows> checked;
    for (const auto& [memory, element_name, rows, results] : weights) {
        const amq::Element element = element_of(element_name);
        require_size(rows, "rows", 0);
        require(results.size() == formats.size(), "results", std::to_string(formats.size()), results.size());
        if (rows == 0) continue;  // an empty tensor may have no address
        const int64_t itemsize = element == amq::Element::float32 ? 4 : 2;
        amq::WeightRows weight = {
            exact_address_of<void>(memory, "weight", product({rows, in_features, itemsize}, "weight")), element, rows, {}};
        for (size_t f = 0; f < formats.size(); ++f)
            weight.results.push_back(checked_results(results[f], formats[f], rows, in_features, groups));
        checked.push_back(std::move(weight));
    }
    return checked;
}

const int64_t* checked_order(const Memory& memory, int64_t in_features) {
    const int64_t* order = exact_address_of<int64_t>(memory, "order", in_features * 8);
    std::vector<bool> seen(in_features);
    for (int64_t k = 0; k < in_features; ++k) {
        require(order[k] >= 0 && order[k] < in_features && !seen[order[k]], "order", "every feature once", order[k]);
        seen[order[k]] = true;
    }
    return order;
}

// hessian (0, 0): to nearest.
void quantize(const std::vector<Weight>& weights, const std::vector<Layout>& formats, int64_t in_features,
              int64_t group_size, const std::string& zero_points, const Memory& importance, const Memory& shrinks,
              int refits, int sweeps, const Memory& hessian, const Memory& factor, const Memory& order, const Memory& sums,
              const Memory& totals, int threads, const std::string& isa_name) {
    const amq::Isa& isa = amq::find_isa(isa_name);
    require_size(in_features, "in_features", 1);
    require(group_size >= 1 && group_size <= amq::kDepth && (group_size <= amq::kColumns || group_size % amq::kColumns == 0),
            "group_size", "at most " + std::to_string(amq::kDepth) + ", in whole blocks", group_size);
    require(refits >= 0 && refits <= 1000, "refits", "0 to 1000", refits);
    require(sweeps >= 0 && sweeps <= 1000, "sweeps", "0 to 1000", sweeps);
    amq::require_threads(threads);
    const int64_t groups = (in_features - 1) / group_size + 1, tried = std::get<1>(shrinks) / 4;
    require(tried >= 1 && tried <= 1000, "shrinks", "1 to 1000 numbers", tried);
    amq::RoundingProblem problem = {};
    problem.in_features = in_features, problem.group_size = group_size, problem.n_groups = groups;
    problem.zero_points = zero_points_of(zero_points);
    problem.importance = exact_address_of<float>(importance, "importance", in_features * 4);
    problem.shrinks = exact_address_of<float>(shrinks, "shrinks", tried * 4);
    problem.n_shrinks = static_cast<int>(tried), problem.refits = refits;
    problem.sweeps = sweeps;
    if (std::get<0>(hessian)) {
        const int64_t square = product({in_features, in_features, 4}, "hessian");
        problem.hessian = exact_address_of<float>(hessian, "hessian", square);
        problem.factor = exact_address_of<float>(factor, "factor", square);
        problem.order = checked_order(order, in_features);
        problem.sums = exact_address_of<float>(sums, "sums", in_features * groups * 4);
        problem.totals = exact_address_of<double>(totals, "totals", groups * groups * 8);
    }
    const auto layouts = checked_formats(formats);
    const auto rows = checked_weights(weights, layouts, in_features, groups);
    py::gil_scoped_release release;
    amq::quantize(isa, problem, rows, layouts, threads);
}

void add_gram(const Memory& x, int64_t tokens, int64_t features, const Memory& gram, int threads,
              const std::string& isa_name) {
    const amq::Isa& isa = amq::find_isa(isa_name);
    require_size(tokens, "tokens", 0);
    require_size(features, "features", 1);
    amq::require_threads(threads);
    if (tokens == 0) return;  // an empty tensor may have no address
    const float* from = exact_address_of<float>(x, "x", product({tokens, features, 4}, "x"));
    float* to = exact_address_of<float>(gram, "gram", product({features, features, 4}, "gram"));
    py::gil_scoped_release release;
    amq::add_gram(isa, from, tokens, features, to, threads);
}

bool cholesky(const Memory& matrix, int64_t size, int threads, const std::string& isa_name) {
    const amq::Isa& isa = amq::find_isa(isa_name);
    require_size(size, "size", 1);
    amq::require_threads(threads);
    float* data = exact_address_of<float>(matrix, "matrix", product({size, size, 4}, "matrix"));
    py::gil_scoped_release release;
    return amq::cholesky(isa, data, size, threads);
}

void mirror(const Memory& matrix, int64_t size, int threads) {
    require_size(size, "size", 1);
    amq::require_threads(threads);
    float* data = exact_address_of<float>(matrix, "matrix", product({size, size, 4}, "matrix"));
    py::gil_scoped_release release;
    amq::mirror(data, size, threads);
}

}  // namespace

void bind_quantize(py::module_& m) {
    m.def("quantize", &quantize, py::kw_only(), py::arg("weights"), py::arg("formats"), py::arg("in_features"),
          py::arg("group_size"), py::arg("zero_points"), py::arg("importance"), py::arg("shrinks"), py::arg("refits"),
          py::arg("sweeps"), py::arg("hessian"), py::arg("factor"), py::arg("order"), py::arg("sums"), py::arg("totals"),
          py::arg("threads"), py::arg("isa") = "", "Weights -> packed rows; see csrc/cpu/quantize.h");
    m.def("add_gram", &add_gram, py::kw_only(), py::arg("x"), py::arg("tokens"), py::arg("features"), py::arg("gram"),
          py::arg("threads"), py::arg("isa") = "", "The upper triangle of gram += x^T x; see csrc/cpu/symmetric.h");
    m.def("cholesky", &cholesky, py::kw_only(), py::arg("matrix"), py::arg("size"), py::arg("threads"),
          py::arg("isa") = "", "Upper triangle -> R of R^T R, in place; False where there is none");
    m.def("mirror", &mirror, py::kw_only(), py::arg("matrix"), py::arg("size"), py::arg("threads"),
          "Copies the upper triangle below the diagonal");
}
