"""What is known of the tiles of a program before it is written: which decide something, and which are never NaN."""

from __future__ import annotations

from ...ir.expr import Bitcast, Cast, Const, Expr, Op, Tile, children, walk
from ...ir.tile import Dot, Loop, Map, Reduce, Scan, Store, TileProgram, nodes_of
from .arithmetic import DECIDING


def precise_tiles(program: TileProgram) -> frozenset[str]:
    """The tiles whose values are rounded to bits or compared, at once or after more arithmetic: one unit in the last place may show."""
    narrow = {o.name for o in program.outputs if not o.dtype.is_float or o.dtype.bits < 16}
    found: set[str] = set()
    made: dict[str, Expr] = {}
    for node in nodes_of(program.body):
        match node:
            case Map() | Reduce() | Scan():
                made[node.dst] = node.expr
                found |= _deciding(node.expr, not node.dtype.is_float)
            case Store():
                found |= _deciding(node.expr, node.tensor in narrow)
            case Loop():
                for s in node.states:
                    found |= _deciding(s.next, not s.dtype.is_float)
            case Dot():
                found |= _deciding(node.a, False) | _deciding(node.b, False)
    waiting = list(found)
    while waiting:
        inner = {n.name for n in walk(made[name]) if isinstance(n, Tile)} if (name := waiting.pop()) in made else set()
        waiting += list(inner - found)
        found |= inner
    return frozenset(found)


def _deciding(e: Expr, deciding: bool) -> set[str]:
    """The tiles below operations that decide."""
    match e:
        case Tile(name=name):
            return {name} if deciding else set()
        case Cast(dtype=t):
            deciding = deciding or not t.is_float or t.bits < 16
        case Bitcast():
            deciding = True
        case Op(name=name):
            deciding = deciding or name in DECIDING
        case _:
            pass
    return {name for child in children(e) for name in _deciding(child, deciding)}


def ordered_tiles(program: TileProgram) -> frozenset[str]:
    """Tiles that are never NaN: maxima and minima within a tile, and what is made of them by more of these."""
    nodes = list(nodes_of(program.body))
    states = [s for node in nodes if isinstance(node, Loop) for s in node.states]
    found = {node.dst for node in nodes if isinstance(node, Reduce) and node.op in ("max", "min")}
    found |= {s.name for s in states if isinstance(s.init, Const) and s.init.value == s.init.value}
    while True:
        before = len(found)
        maps = {node.dst for node in nodes if isinstance(node, Map) and _ordered(node.expr, found)}
        found = {name for name in found if not any(s.name == name and not _ordered(s.next, found | maps) for s in states)} | maps
        if len(found) == before:
            return frozenset(found)


def _ordered(e: Expr, known: set[str]) -> bool:
    match e:
        case Tile(name=name):
            return name in known
        case Const(value=value):
            return value == value
        case Op(name="maximum" | "minimum", args=(a, b)):
            return _ordered(a, known) and _ordered(b, known)
        case _:
            return False
