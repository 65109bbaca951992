"""What an emitted file may hold, so that importing one from a folder or a cache runs nothing but Triton's compiler.

    docstring ; import triton ; NAME = literal | tl.constexpr(literal) ; @triton.jit def ... ; def main(): ...
    if __name__ == "__main__": main()

A function of Triton's is read by its compiler, which calls whatever a name in it stands for. So names there stand for the language
alone: no attribute with a leading underscore or of a module inside Triton, no built-in that reaches further.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache

from ...ir.errors import BuildError
from ..base import Source

AWAY = ("core", "extra", "random", "semantic", "standard", "target_info", "triton", "language", "handle")  # attributes that lead out of it
REFUSED = ("getattr", "hasattr", "eval", "exec")  # the first two are all of Python's own that Triton's compiler lets a kernel reach


def check_emitted(source: Source) -> None:
    """Raise `BuildError` naming the first line that is none of an emitted kernel."""
    wrong = _wrong(source.text)
    if wrong is not None:
        raise BuildError(f"the source of {source.entry} is no emitted kernel: {wrong}", hint="compile the kernel again")


@lru_cache(maxsize=64)
def _wrong(text: str) -> str | None:
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return str(error)
    for node in body:
        for place in _foreign(node):
            return f"line {place.lineno}: {ast.unparse(place).splitlines()[0][:100]}"
    return None


def _foreign(node: ast.stmt) -> Iterator[ast.stmt | ast.expr]:
    """What of a statement at the top of the file does not belong there."""
    match node:
        case ast.Expr(value=ast.Constant()):
            return
        case ast.Import(names=names) if all(n.name in ("triton", "triton.language") for n in names):
            return
        case ast.ImportFrom(module=module, level=0) if module in ("__future__", "triton.language.extra", "triton.language.extra.cuda"):
            return
        case ast.Assign(targets=[ast.Name()], value=value) if _literal(value):
            return
        case ast.AnnAssign(target=ast.Name(), value=ast.expr() as value) if _literal(value) and ast.unparse(node.annotation).isidentifier():
            return
        case ast.FunctionDef(decorator_list=[decorator]) if _jit(decorator):
            yield from _inside(node)
        case ast.FunctionDef(name="main", decorator_list=[], returns=None | ast.Constant()) if not _given(node.args):
            return
        case ast.If() if ast.unparse(node) == ast.unparse(ast.parse('if __name__ == "__main__": main()')):
            return
        case _:
            yield node


def _literal(value: ast.expr) -> bool:
    match value:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="tl"), attr="constexpr"), args=[argument], keywords=[]):
            return _literal(argument)
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant()], keywords=[]):
            return True
        case ast.UnaryOp(operand=operand):
            return _literal(operand)
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def _jit(decorator: ast.expr) -> bool:
    """Whether it is `triton.jit`, with literal options if any."""
    if isinstance(decorator, ast.Call):
        return not decorator.args and all(k.arg and _literal(k.value) for k in decorator.keywords) and _jit(decorator.func)
    return ast.unparse(decorator) == "triton.jit"


def _given(arguments: ast.arguments) -> list[ast.expr]:
    """What is computed when the function is defined."""
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [*arguments.defaults, *(d for d in arguments.kw_defaults if d is not None), *(a.annotation for a in listed if a.annotation)]


def _inside(function: ast.FunctionDef) -> Iterator[ast.stmt | ast.expr]:
    """What of a function of Triton's does not belong to the language."""
    for value in _given(function.args):
        if not _literal(value) and ast.unparse(value) != "tl.constexpr":
            yield value
    for statement in function.body:
        for node in ast.walk(statement):
            match node:
                case ast.Attribute(attr=attr) if attr.startswith("_") or attr in AWAY:
                    yield node
                case ast.Attribute(value=ast.Name(id="triton"), attr=attr) if attr not in ("cdiv", "next_power_of_2"):
                    yield node
                case ast.Name(id=name) if name in REFUSED or name.startswith("__"):
                    yield node
                case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Lambda():
                    yield node
