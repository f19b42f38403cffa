// Integers in: addresses, distances and sizes in elements, dtype codes (0 float32, 1 bfloat16). The
// caller has checked them (fpdm/kernels/launch.py); an address may be 0 where the headers say so.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/loop.h"
#include "cpu/unroll.h"

namespace py = pybind11;
using fpdm::Block;
using fpdm::i64;
using fpdm::Linear;
using fpdm::Rows;
using fpdm::Shape;
using fpdm::Sum;
using fpdm::Vector;

namespace {

const fpdm::Variant* active;

void* at(i64 address) { return reinterpret_cast<void*>(address); }
float* floats(i64 address) { return reinterpret_cast<float*>(address); }

void adaln(i64 b, i64 t, i64 d, int zt, int type, i64 z, i64 shift, i64 shift_stride, i64 scale,
           i64 scale_stride, i64 out) {
    active->adaln({b, t, d, zt, type}, at(z), {at(shift), shift_stride}, {at(scale), scale_stride},
                  at(out));
}

void adaln_backward(i64 b, i64 t, i64 d, int zt, int type, i64 dy, i64 z, i64 scale,
                    i64 scale_stride, i64 dz, i64 dshift, i64 dshift_stride, i64 dscale,
                    i64 dscale_stride) {
    active->adaln_backward({b, t, d, zt, type}, at(dy), at(z), {at(scale), scale_stride}, at(dz),
                           {floats(dshift), dshift_stride}, {floats(dscale), dscale_stride});
}

void gate_residual(i64 b, i64 t, i64 d, int zt, int type, i64 z, i64 y, i64 gate, i64 gate_stride,
                   i64 out, i64 prev, i64 norms) {
    active->gate_residual({b, t, d, zt, type}, at(z), at(y), {at(gate), gate_stride}, at(out),
                          at(prev), floats(norms));
}

void gate_residual_adaln(i64 b, i64 t, i64 d, int zt, int type, i64 z, i64 y, i64 gate,
                         i64 gate_stride, i64 shift, i64 shift_stride, i64 scale, i64 scale_stride,
                         i64 z_out, i64 out) {
    active->gate_residual_adaln({b, t, d, zt, type}, at(z), at(y), {at(gate), gate_stride},
                                {at(shift), shift_stride}, {at(scale), scale_stride}, at(z_out),
                                at(out));
}

void gate_residual_backward(i64 b, i64 t, i64 d, int zt, int type, i64 dout, i64 y, i64 gate,
                            i64 gate_stride, i64 dgate, i64 dgate_stride, i64 out) {
    active->gate_residual_backward({b, t, d, zt, type}, at(dout), at(y), {at(gate), gate_stride},
                                   {floats(dgate), dgate_stride}, at(out));
}

void gelu(int type, i64 n, i64 x, i64 out) { active->gelu(type, n, at(x), at(out)); }

void gelu_backward(int type, i64 n, i64 dy, i64 x, i64 out, i64 total) {
    active->gelu_backward(type, n, at(dy), at(x), at(out), floats(total));
}

void linear(int type, int out_type, bool transposed, i64 rows, i64 cols, i64 depth, i64 x,
            i64 weight, i64 weight_stride, i64 bias, i64 out) {
    active->linear({rows, cols, depth, type, out_type, transposed, false, at(x), at(weight),
                    weight_stride, at(bias), nullptr, nullptr, at(out)});
}

void linear_add_gelu(int type, i64 rows, i64 cols, i64 depth, i64 x, i64 weight, i64 weight_stride,
                     i64 bias, i64 addend, i64 pre, i64 out) {
    active->linear({rows, cols, depth, type, type, true, true, at(x), at(weight), weight_stride,
                    at(bias), at(addend), at(pre), at(out)});
}

void adaln_linear(i64 b, i64 t, i64 d, int zt, int type, i64 z, i64 shift, i64 shift_stride,
                  i64 scale, i64 scale_stride, i64 cols, i64 weight, i64 weight_stride, i64 bias,
                  i64 y, i64 out) {
    Block block{};
    block.rows = {b, t, d, zt, type};
    block.z = at(z);
    block.shift = {at(shift), shift_stride};
    block.scale = {at(scale), scale_stride};
    block.y = at(y);
    active->adaln_linear({b * t, cols, d, type, type, true, false, at(y), at(weight), weight_stride,
                          at(bias), nullptr, nullptr, at(out)},
                         block);
}

void linear_gate(i64 b, i64 t, i64 d, int zt, int type, i64 depth, i64 x, i64 weight,
                 i64 weight_stride, i64 bias, i64 z, i64 gate, i64 gate_stride, i64 p, i64 z_out,
                 i64 prev, i64 norms, i64 shift, i64 shift_stride, i64 scale, i64 scale_stride,
                 i64 y) {
    Block block{{b, t, d, zt, type},
                at(z),
                at(prev),
                {at(gate), gate_stride},
                {at(shift), shift_stride},
                {at(scale), scale_stride},
                at(z_out),
                at(y),
                floats(norms)};
    active->linear_gate({b * t, d, depth, type, type, true, false, at(x), at(weight), weight_stride,
                         at(bias), nullptr, nullptr, at(p)},
                        block);
}

void pack(int type, i64 cols, i64 depth, i64 weight, i64 stride, i64 out) {
    active->pack(type, cols, depth, at(weight), stride, at(out));
}

using Addresses = std::vector<i64>;

// sizes: b t d type heads; addends: u, modulation and its stride; weights: address, stride and bias
// of A W2 qkv proj fc1 fc2
fpdm::Operands operands(const Addresses& sizes, const Addresses& addends,
                        const Addresses& weights) {
    auto weight = [&](size_t i) {
        return fpdm::Weight{at(weights[3 * i]), weights[3 * i + 1], at(weights[3 * i + 2])};
    };
    const int type = int(sizes[3]);
    return {{sizes[0], sizes[1], sizes[2], type, type},
            sizes[4],
            at(addends[0]),
            at(addends[1]),
            addends[2],
            {weight(0), weight(1), weight(2), weight(3), weight(4), weight(5)}};
}

// buffers: x z[0] z[1] wide y o norms
fpdm::Iteration iteration(const fpdm::Operands& o, const Addresses& buffers) {
    return {o,
            at(buffers[0]),
            {at(buffers[1]), at(buffers[2])},
            {at(buffers[3]), at(buffers[4]), at(buffers[5])},
            floats(buffers[6])};
}

bool interrupted() {
    py::gil_scoped_acquire held;
    return PyErr_CheckSignals() != 0;
}

// what `run` returns, unless a signal's handler raised meanwhile
template <class F>
auto without_gil(F run) {
    const auto found = [&] {
        py::gil_scoped_release released;
        return run();
    }();
    if (PyErr_Occurred()) throw py::error_already_set();
    return found;
}

void iterate(const Addresses& sizes, const Addresses& addends, const Addresses& weights,
             const Addresses& buffers, i64 k) {
    const auto it = iteration(operands(sizes, addends, weights), buffers);
    without_gil([&] { return fpdm::iterate(*active, it, k, interrupted); });
}

// watch: rows count cap place used result residual
i64 solve(const Addresses& sizes, const Addresses& addends, const Addresses& weights,
          const Addresses& buffers, i64 most, const Addresses& watch, i64 next, float tol) {
    const auto it = iteration(operands(sizes, addends, weights), buffers);
    auto slots = [&](size_t i) { return static_cast<i64*>(at(watch[i])); };
    const fpdm::Watch w{slots(0),      slots(1),         slots(2), slots(3), slots(4),
                        at(watch[5]), floats(watch[6]), next,     tol};
    return without_gil([&] { return fpdm::solve(*active, it, w, most, interrupted); });
}

// kept: x xs residual compute, widths of the last two, then the offsets; part: first sample, count
fpdm::Unrolled unrolled(const fpdm::Operands& o, i64 m, const Addresses& kept,
                        const Addresses& part) {
    fpdm::Unrolled u{o,  m, at(kept[0]), at(kept[1]), at(kept[2]), at(kept[3]), {kept[4], kept[5]},
                     {}, part[0], part[1]};
    for (size_t i = 0; i < size_t(fpdm::ACTIVATIONS); i++) u.offsets[i] = kept[6 + i];
    return u;
}

// buffers: wide y o z[0] z[1] out norms
void unroll(const Addresses& sizes, const Addresses& addends, const Addresses& weights, i64 m,
            const Addresses& kept, const Addresses& part, const Addresses& buffers) {
    const auto u = unrolled(operands(sizes, addends, weights), m, kept, part);
    const fpdm::Forward f{{at(buffers[0]), at(buffers[1]), at(buffers[2])},
                          {at(buffers[3]), at(buffers[4])},
                          at(buffers[5]),
                          floats(buffers[6])};
    without_gil([&] { return fpdm::unroll(*active, u, f, interrupted); });
}

// sums: address, stride and bias of A W2 qkv proj fc1 fc2, modulation and its stride, u; buffers:
// wide d0 d1 e g; again: as kept, of one iteration of the part, or empty
void unroll_backward(const Addresses& sizes, const Addresses& addends, const Addresses& weights,
                     i64 m, const Addresses& kept, const Addresses& part, const Addresses& sums,
                     const Addresses& buffers, const Addresses& again, bool wants_dx) {
    auto o = operands(sizes, addends, weights);
    const auto u = unrolled(o, m, kept, part);
    o.rows.batch = u.count;
    auto sum = [&](size_t i) {
        return fpdm::Gradient{floats(sums[3 * i]), sums[3 * i + 1], floats(sums[3 * i + 2])};
    };
    const fpdm::Backward b{
        {{sum(0), sum(1), sum(2), sum(3), sum(4), sum(5)}, floats(sums[18]), floats(sums[20]), sums[19]},
        {at(buffers[0]), at(buffers[1]), at(buffers[2]), at(buffers[3])},
        again.empty() ? fpdm::Unrolled{} : unrolled(o, 1, again, {0, u.count}),
        at(buffers[4]),
        wants_dx};
    without_gil([&] { return fpdm::unroll_backward(*active, u, b, interrupted); });
}

void wgrad(int type, i64 rows, i64 outs, i64 ins, i64 dy, i64 x, i64 dweight, i64 stride,
           i64 dbias) {
    active->wgrad(type, rows, outs, ins, at(dy), at(x), floats(dweight), stride, floats(dbias));
}

void attention(int type, i64 b, i64 t, i64 heads, i64 width, i64 qkv, i64 out) {
    active->attention({b, t, heads, width, type}, at(qkv), at(out));
}

void attention_backward(int type, i64 b, i64 t, i64 heads, i64 width, i64 dy, i64 qkv, i64 out) {
    active->attention_backward({b, t, heads, width, type}, at(dy), at(qkv), at(out));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    const char* wanted = std::getenv("FPDM_CPU_ISA");
    active = fpdm::choose(wanted);
    if (!active)
        throw py::import_error("FPDM_CPU_ISA: got " + std::string(wanted) +
                               ", expected one of those built that this processor can run");
    m.attr("isa") = active->name;
    m.attr("columns") = active->columns;
    m.attr("packed") = fpdm::PACKED;
    m.attr("pair") = active->pair;
    auto nogil = py::call_guard<py::gil_scoped_release>();
    m.def("adaln", adaln, nogil);
    m.def("adaln_backward", adaln_backward, nogil);
    m.def("gate_residual", gate_residual, nogil);
    m.def("gate_residual_adaln", gate_residual_adaln, nogil);
    m.def("gate_residual_backward", gate_residual_backward, nogil);
    m.def("gelu", gelu, nogil);
    m.def("gelu_backward", gelu_backward, nogil);
    m.def("linear", linear, nogil);
    m.def("linear_add_gelu", linear_add_gelu, nogil);
    m.def("adaln_linear", adaln_linear, nogil);
    m.def("linear_gate", linear_gate, nogil);
    m.def("pack", pack, nogil);
    m.def("iterate", iterate);
    m.def("solve", solve);
    m.def("unroll", unroll);
    m.def("unroll_backward", unroll_backward);
    m.def("wgrad", wgrad, nogil);
    m.def("attention", attention, nogil);
    m.def("attention_backward", attention_backward, nogil);
}
