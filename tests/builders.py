"""Short spellings for cascades written as nodes: `cascade(inputs="X: b p", body=[...], outputs="Y: b")`."""

from einfall.ir.cascade import Cascade, Output, RankDecl, ScalarDecl, Tensor
from einfall.ir.expr import Const, Expr, Op, aligned
from einfall.ir.types import dtype, f32


def axes(pattern):
    """The axes of an einops pattern: `b (n j) e` is (("b",), ("n", "j"), ("e",))."""
    found, group = [], None
    for word in pattern.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            group = []
        elif word == ")":
            found.append(tuple(group))
            group = None
        elif group is None:
            found.append((word,))
        else:
            group.append(word)
    return tuple(found)


def tensor(spec, kind=None):
    """An input from `X: b p` or `X: b p = bf16`."""
    name, _, rest = spec.partition(":")
    pattern, _, element = rest.partition("=")
    return Tensor(name.strip(), axes(pattern), kind or dtype(element.strip() or "f32"))


def cascade(name="case", *, inputs=(), body, outputs, scalars=(), ranks=None):
    """A cascade from specifications of tensors and a list of statements."""
    return Cascade(
        name,
        tuple(tensor(spec) if isinstance(spec, str) else spec for spec in _listed(inputs)),
        tuple(ScalarDecl(scalar, f32) for scalar in _listed(scalars)),
        tuple(RankDecl(rank, lift(size)) for rank, size in (ranks or {}).items()),
        tuple(body),
        tuple(Output(spec.partition(":")[0].strip(), axes(spec.partition(":")[2])) for spec in _listed(outputs)),
    )


def _listed(specs):
    return (specs,) if isinstance(specs, str) else tuple(specs)


def at(spec):
    """A tensor read at its own ranks: `at("X b p")`."""
    name, *ranks = spec.split()
    return aligned(name, *ranks)


def lift(value):
    """An expression of a node or a Python number."""
    return value if isinstance(value, Expr.__args__) else Const(value)


def op(name, *args):
    """An operation, numbers becoming constants."""
    return Op(name, tuple(lift(arg) for arg in args))
