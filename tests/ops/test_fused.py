"""Operators of one's own: the example, by its formula, its Triton kernel and its C++; and schemas that cannot be."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from required import skip
from torch._dynamo import compiled_autograd

from genfuse import ops

EXAMPLE = Path(__file__).parents[2] / "examples" / "operator"


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("triton")
    return load(EXAMPLE / "squash.py", "squash")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    if ops._op._C is None:
        skip("native", "no compiled kernels, and so no headers")
    pybind11 = pytest.importorskip("pybind11")
    built = tmp_path_factory.mktemp("squash") / f"squash_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [ops.include(), pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [os.environ.get("CXX", "c++"), "-O1", "-std=c++17", "-shared", "-fPIC", *(f"-I{i}" for i in includes)]
    subprocess.run([*command, EXAMPLE / "squash.cpp", "-o", built], check=True)
    return load(built, "squash_native")


def check(squash, dtype, tolerance):
    x = torch.randn(5, 300, dtype=dtype, requires_grad=True)
    y, logdet = squash(x)
    torch.testing.assert_close(y, x / (1 + x.abs()), rtol=tolerance, atol=tolerance)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: squash(one[None])[0][0]))(x.detach()[:, :4])
    torch.testing.assert_close(squash(x[:, :4])[1], jacobian.logdet(), rtol=tolerance, atol=10 * tolerance)
    (gradient,) = torch.autograd.grad(y.sum() + logdet.sum(), x)
    expected = 1 / (1 + x.abs()) ** 2 - 2 * x.sign() / (1 + x.abs())
    torch.testing.assert_close(gradient, expected, rtol=10 * tolerance, atol=10 * tolerance)
    compiled = torch.compile(lambda x: squash(x)[1], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), logdet)


def test_the_example_is_right_by_its_formula(example):
    with ops.using("reference"):
        check(example.squash, torch.float64, 1e-12)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU and no interpreter")
def test_the_example_is_right_by_its_triton_kernel(example):
    with ops.using("triton"):
        check(example.squash, torch.float32, 1e-6)


def test_the_example_is_right_by_its_cpp(example, native):
    squash = ops.fused(
        "example_cpp::squash(Tensor x) -> (Tensor, Tensor)",
        formula=example.formula,
        results=lambda x: (torch.empty_like(x), x.new_empty(x.shape[0])),
        problem=lambda x: (x.contiguous(), *x.shape),
        native=native,
    )
    assert ops._op.KERNELS["example_cpp::squash"].choose("cpu", "auto")[0] == "native"
    check(squash, torch.float32, 1e-6)


def test_the_page_has_the_example_as_it_is():
    page = (EXAMPLE.parents[1] / "docs" / "own-operator.md").read_text()
    assert (EXAMPLE / "squash.py").read_text().split("\n\n", 1)[1] in page


@pytest.mark.parametrize("arguments", ["int n, Tensor x", "Tensor x, int n=1", "", "int n"])
def test_a_schema_that_cannot_be_is_a_value_error(arguments):
    with pytest.raises(ValueError, match="must take tensors first, then settings, without defaults"):
        ops.fused(f"example::wrong({arguments}) -> Tensor", formula=lambda *a: a, results=lambda *a: a)


@pytest.mark.parametrize("schema", ["wrong(Tensor x) -> Tensor[]", "wrong.over(Tensor x) -> Tensor"])
def test_overloads_and_results_that_are_no_tensors_are_a_value_error(schema):
    with pytest.raises(ValueError, match="must have no overloads and return tensors"):
        ops.fused(f"example::{schema}", formula=lambda *a: a, results=lambda *a: a)


def test_a_schema_may_have_no_spaces():
    results = lambda x, n: torch.empty_like(x)  # noqa: E731
    scaled = ops.fused("example::spaced(Tensor x,int n) -> Tensor", formula=lambda x, n: n * x, results=results)
    x = torch.ones(3, requires_grad=True)
    assert torch.autograd.grad(scaled(x, 2).sum(), x)[0].tolist() == [2.0] * 3


def test_a_formula_of_another_shape_than_its_results_is_named():
    wrong = ops.fused("example::shaped(Tensor x) -> Tensor", formula=torch.sum, results=torch.empty_like)
    with pytest.raises(RuntimeError, match=r"example::shaped: its formula made results of shapes \[\(\)\]"):
        wrong(torch.ones(3))


def test_a_list_of_which_a_result_does_not_depend_has_no_gradient():
    apart = ops.fused(
        "example::apart(Tensor x, Tensor[] many, int k) -> (Tensor, Tensor)",
        formula=lambda x, many, k: (x + sum(many), k * x),
        results=lambda x, many, k: (torch.empty_like(x), torch.empty_like(x)),
    )
    leaf = torch.ones(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(apart(torch.ones(4), [leaf], 2)[1].sum(), leaf, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("constant", [None, lambda *given: (1,)], ids=["", "constant"])
def test_whole_numbers_beside_a_result_leave_it_differentiable(constant):
    both = ops.fused(
        "example::whole(Tensor x) -> (Tensor, Tensor)",
        formula=lambda x: (x * x, x.long()),
        results=lambda x: (torch.empty_like(x), torch.empty_like(x, dtype=torch.int64)),
        constant=constant,
    )
    x = torch.arange(4.0)
    square = lambda x: both(x)[0].sum()  # noqa: E731
    for found in (torch.func.grad(square)(x), torch.func.vmap(torch.func.grad(square))(x)):
        assert torch.equal(found, 2 * x)
    assert torch.equal(torch.func.jacrev(lambda x: both(x)[0])(x), 2 * x.diag())
    assert torch.equal(torch.autograd.grad(square(x.requires_grad_()), x)[0], 2 * x)


@pytest.mark.parametrize(
    ("formula", "after"),
    [
        (lambda x: (x, 2 * x), lambda y, z: (y + 1) * z),
        (lambda x: (x.view(-1), 2 * x), lambda y, z: (y + 1) * z),
        (lambda x: (x.exp(),) * 2, lambda y, z: (y + 1, z + 0)),
        (lambda x: (2 * x).expand(2, -1).unbind(), lambda y, z: (y + 1, z + 0)),
    ],
)
def test_results_that_are_arguments_or_each_other_are_apart_when_compiled(formula, after):
    aliased = ops.fused(
        "example::aliased(Tensor x) -> (Tensor, Tensor)",
        formula=formula,
        results=lambda x: (torch.empty_like(x), torch.empty_like(x)),
    )
    x = torch.arange(4.0)
    expected = after(*formula(x))
    torch.testing.assert_close(torch.compile(lambda x: after(*aliased(x)), fullgraph=True)(x), expected)
    assert torch.equal(x, torch.arange(4.0))


def test_gradients_that_are_the_cotangent_are_apart_when_compiled():
    add = ops.fused(
        "example::add(Tensor x, Tensor y) -> Tensor",
        formula=lambda x, y: x + y,
        results=lambda x, y: torch.empty_like(x),
        wrt=2,
    )
    x, y, g = torch.arange(4.0).requires_grad_(), torch.arange(4.0).requires_grad_(), torch.ones(4)
    compiled = torch.compile(lambda x, y: add(x.sin(), y.cos()), fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y), (x, y), g), (x.cos(), -y.sin()))
    assert torch.equal(g, torch.ones(4))


def test_kernels_of_gradients_by_lists_of_tensors_are_a_value_error():
    with pytest.raises(ValueError, match="lists of tensors"):
        ops.fused("example::refused(Tensor[] x) -> Tensor", formula=sum, results=lambda x: x[0].clone(), wrt=1)


def test_an_operator_that_is_defined_again_takes_the_place_of_the_first():
    def make(factor):
        return ops.fused(
            "example::scaled(Tensor x) -> Tensor", formula=lambda x: factor * x, results=torch.empty_like, wrt=1
        )

    x = torch.ones(3, requires_grad=True)
    for factor in (2.0, 3.0):
        y = make(factor)(x)
        assert torch.equal(y, factor * torch.ones(3))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], factor * torch.ones(3))
        assert torch.equal(torch.ops.example.scaled(x), y)


def of_helper(power):
    helper = lambda x: x**power  # noqa: E731
    return lambda x: helper(x)


def of_no_module(power):
    names: dict = {}
    exec(f"def formula(x):\n    return x**{power}", names)
    return names["formula"]


@pytest.mark.parametrize(
    "formula",
    [
        lambda power: lambda x: x**power,
        lambda power: lambda x, power=power: x**power,
        lambda power: partial(torch.pow, exponent=power),
        of_helper,
        of_no_module,
    ],
    ids=["closure", "default", "partial", "helper", "exec"],
)
def test_what_is_compiled_of_a_new_definition_has_its_gradients(formula, request):
    name = f"example::power_{request.node.callspec.id}"
    x = torch.full((3,), 2.0, requires_grad=True)
    for power in (2, 3):  # as a cell of a notebook that is changed and run again; the former's program is kept on disk
        torch.compiler.reset()
        operator = ops.fused(f"{name}(Tensor x) -> Tensor", formula=formula(power), results=torch.empty_like)
        y = torch.compile(operator)(x)
        torch.testing.assert_close(y, x.detach() ** power)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], power * x.detach() ** (power - 1))


def test_a_formula_may_take_from_around_what_is_not_there_yet():
    def formula(x):
        return later * x

    operator = ops.fused("example::later(Tensor x) -> Tensor", formula=formula, results=torch.empty_like)
    later = 3.0
    assert torch.equal(operator(torch.ones(2)), torch.full((2,), 3.0))


def test_gradients_of_complex_numbers_of_which_one_was_made_of_the_other():
    def formula(a, b):
        return a * b.conj()

    operator = ops.fused("example::conjugate(Tensor a, Tensor b) -> Tensor", formula=formula, results=formula)
    x = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128, requires_grad=True)

    def made_of_itself(f):
        a = x * 1
        return f(a, a * a)

    for create_graph in (False, True):
        found, truth = (
            torch.autograd.grad(made_of_itself(f).square().abs().sum(), x, create_graph=create_graph)[0]
            for f in (operator, formula)
        )
        torch.testing.assert_close(found, truth)


def test_results_that_are_arguments_are_copies_under_transforms():
    operator = ops.fused(
        "example::itself(Tensor x) -> (Tensor, Tensor)", formula=lambda x: (x, x * 2), results=lambda x: (x, x)
    )

    def function(x):
        y, _ = operator(x)
        y.mul_(3)
        return x + y

    x = torch.randn(3, 2)
    before = x.clone()
    torch.testing.assert_close(torch.func.vmap(function)(x), 4 * before)
    torch.testing.assert_close(torch.func.jvp(function, (x,), (torch.ones(3, 2),))[1], torch.full((3, 2), 4.0))
    assert torch.equal(x, before)


def test_results_without_a_derivative_may_be_the_only_one_or_beside_lists():
    x, w = torch.randn(3, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    rounded = ops.fused(
        "example::rounded(Tensor x, int n) -> Tensor",
        formula=lambda x, n: x.round().sum(), results=lambda x, n: x.new_empty(()), constant=lambda x, n: (0,),
    )  # fmt: skip
    assert not rounded(x, 1).requires_grad
    beside = ops.fused(
        "example::beside(Tensor x, Tensor[] many, int n) -> (Tensor, Tensor)",
        formula=lambda x, many, n: (x * many[0], x.round()), results=lambda x, many, n: (torch.empty_like(x),) * 2,
        constant=lambda x, many, n: (1,),
    )  # fmt: skip
    assert [y.requires_grad for y in beside(x, [w, w * 2], 1)] == [True, False]


def test_gradients_may_be_compiled_by_themselves():
    x, w = torch.randn(3, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    wanted = torch.autograd.grad(ops.actnorm(x, w, w)[0].sin().sum(), x)[0]
    with compiled_autograd._enable(torch.compile(backend="eager")):
        ops.actnorm(x, w, w)[0].sin().sum().backward()
    torch.testing.assert_close(x.grad, wanted)
