"""Clean-up of lowered bodies: work done twice becomes a tile, work done too often moves out, scales move into what is packed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ...ir.expr import OPS, Const, Expr, Masked, Op, Read, Tile, children, rewrite, substitute, walk
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Loop, Map, Node, Reduce, Scan, Store
from ...ir.types import f32

Ranks = Mapping[str, tuple[str, ...]]


def node_expressions(node: Node) -> tuple[Expr, ...]:
    """The expressions of a node; of a loop, only what it says of its states."""
    match node:
        case Map() | Reduce():
            return (node.expr,)
        case Scan():
            return (node.expr,) if node.start is None else (node.expr, node.start)
        case Dot():
            return tuple(e for e in (node.a, node.b, node.update, node.post) if e is not None)
        case Store():
            return (*node.coords, node.expr)
        case Loop():
            return tuple(e for s in node.states for e in (s.init, s.next))


def map_node(node: Node, f: Callable[[Expr], Expr]) -> Node:
    """The node with `f` applied to its expressions; a loop's body included."""
    match node:
        case Map() | Reduce():
            return replace(node, expr=f(node.expr))
        case Scan():
            return replace(node, expr=f(node.expr), start=None if node.start is None else f(node.start))
        case Dot():
            update = None if node.update is None else f(node.update)
            return replace(node, a=f(node.a), b=f(node.b), update=update, post=None if node.post is None else f(node.post))
        case Store():
            return replace(node, expr=f(node.expr))
        case Loop():
            states = tuple(replace(s, init=f(s.init), next=f(s.next)) for s in node.states)
            return replace(node, states=states, body=tuple(map_node(n, f) for n in node.body))


def is_costly(e: Expr) -> bool:
    """Whether `e` itself is worth a tile when it is used twice: a division or a special function."""
    return isinstance(e, Op) and OPS[e.name].unit == "special"


def merge_equal(loop: Loop) -> Loop:
    """Of maps, reductions and scans of a body that compute the same, the first is kept and read by all."""
    first: dict[Node, str] = {}
    names: dict[Expr, Expr] = {}
    kept: list[Node] = []
    for node in loop.body:
        node = map_node(node, lambda e: substitute(e, names))
        if isinstance(node, (Map, Reduce, Scan)):
            known = first.setdefault(replace(node, dst="", note=""), node.dst)
            if known != node.dst:
                names[Tile(node.dst)] = Tile(known)
                continue
        kept.append(node)
    states = tuple(replace(s, next=substitute(s.next, names)) for s in loop.states)
    return replace(loop, states=states, body=tuple(kept))


def share_costly(nodes: tuple[Node, ...], ranks_of: Callable[[Expr], tuple[str, ...]], name: Callable[[Expr], str]) -> tuple[Node, ...]:
    """Every costly expression that occurs twice becomes a `Map` before its first use, the largest first.

        d = sum(p) exp(s - m)                 n = exp(s - m)
        x = exp(s - m) * w            ->      d = sum(p) n
                                              x = n * w
    """
    while True:
        counts: Counter[Expr] = Counter()
        for node in nodes:
            for e in node_expressions(node):
                counts.update(n for n in walk(e) if is_costly(n))
        repeated = [e for e, n in counts.items() if n > 1]
        if not repeated:
            return nodes
        nodes = _extract(max(repeated, key=_weight), nodes, ranks_of, name)


def _weight(e: Expr) -> int:
    return sum(1 for _ in walk(e))


def _extract(
    e: Expr, nodes: tuple[Node, ...], ranks_of: Callable[[Expr], tuple[str, ...]], name: Callable[[Expr], str]
) -> tuple[Node, ...]:
    """`e` computed once: by the map that already is it, moved up to the first use, or by a new one."""
    made = next((n for n in nodes if isinstance(n, Map) and n.expr == e), None) or Map(name(e), ranks_of(e), e)
    place = next((i for i, n in enumerate(nodes) if n is made), len(nodes))
    rest = [n for n in nodes if n is not made]
    first = min(place, next(i for i, n in enumerate(rest) if any(e in walk(x) for x in node_expressions(n))))
    table: dict[Expr, Expr] = {e: Tile(made.dst)}
    changed = [map_node(n, lambda x: substitute(x, table)) for n in rest]
    return (*changed[:first], made, *changed[first:])


def hoist_parts(nodes: tuple[Node, ...], ranks_of: Callable[[Expr], tuple[str, ...]], name: Callable[[Expr], str]) -> tuple[Node, ...]:
    """A costly part of a map or store that has fewer ranks than the whole becomes a `Map` of its own ranks before it.

        store O[m,f] = o[m,f] * (1 / d[m])    ->    r[m] = 1 / d[m];  store O[m,f] = o[m,f] * r[m]
    """
    result: list[Node] = []
    for node in nodes:
        if isinstance(node, (Map, Store, Reduce)):
            whole = set(ranks_of(node.expr))
            for part in _largest(node.expr, lambda e, whole=whole: is_costly(e) and set(ranks_of(e)) < whole):  # type: ignore[misc]
                made = Map(name(part), ranks_of(part), part)
                result.append(made)
                table = {part: Tile(made.dst)}
                node = map_node(node, lambda x, table=table: substitute(x, table))  # type: ignore[misc]
        result.append(node)
    return tuple(result)


def hoist_invariants(
    body: tuple[Node, ...], inside: set[str], stream: str, ranks_of: Callable[[Expr], tuple[str, ...]], name: Callable[[Expr], str]
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """(before, body): costly expressions that do not change from tile to tile are computed once before the loop.

    `inside` are the tiles that the loop defines, states included.
    """

    def invariant(e: Expr) -> bool:
        if stream in ranks_of(e):
            return False
        return not any((isinstance(n, Tile) and n.name in inside) or isinstance(n, Masked) or _of_tile(n, stream) for n in walk(e))

    before: dict[Expr, Map] = {}
    changed: list[Node] = []
    for node in body:
        table: dict[Expr, Expr] = {}
        for e in node_expressions(node):
            for part in _largest(e, lambda x: is_costly(x) and invariant(x)):
                if part not in before:
                    before[part] = Map(name(part), ranks_of(part), part)
                table[part] = Tile(before[part].dst)
        changed.append(map_node(node, lambda x, table=table: substitute(x, table)) if table else node)  # type: ignore[misc]
    return tuple(before.values()), tuple(changed)


def _of_tile(e: Expr, stream: str) -> bool:
    return type(e).__name__ in ("Start", "Count", "Seen") and getattr(e, "rank", None) == stream


def _largest(e: Expr, wanted: Callable[[Expr], bool]) -> list[Expr]:
    """The outermost subexpressions that are wanted, each once; coordinates of reads are left alone."""
    if wanted(e):
        return [e]
    if isinstance(e, Read):
        return []
    found: dict[Expr, None] = {}
    for child in children(e):
        found.update(dict.fromkeys(_largest(child, wanted)))
    return list(found)


def fold_scales(nodes: tuple[Node, ...], is_number: Callable[[Expr], bool], is_float32: Callable[[Expr], bool]) -> tuple[Node, ...]:
    """Contractions that are used only times one number take that number in.

        s = dot(e) q, K ; t = max(p) s * c ; n = exp(s * c - m)    ->    q = Q * c ; s = dot(e) q, K ; t = max(p) s ; n = exp(s - m)

    Into the operand that is packed before the loops if that is f32 (anything narrower would be rounded again) and all who read it
    agree, else into the dot's `post`.
    """
    scales: dict[str, Expr] = {}
    dots: dict[str, Dot] = {}
    for body in _bodies(nodes):
        for dot in (n for n in body if isinstance(n, Dot) and n.post is None and n.update is None):
            scale = _only_scale(dot, body)
            if scale is not None and is_number(scale):
                scales[dot.dst], dots[dot.dst] = scale, dot
    folded: dict[str, Expr] = {}
    for packed in (n for n in nodes if isinstance(n, Map)):
        users = [d for d in dots.values() if Tile(packed.dst) in (d.a, d.b) and d.dtype == f32]
        agreed = {scales[d.dst] for d in users}
        if len(agreed) == 1 and _uses(packed.dst, nodes) == len(users) and is_float32(packed.expr):
            folded[packed.dst] = agreed.pop()

    def change(node: Node) -> Node:
        if isinstance(node, Loop):
            return replace(node, body=tuple(change(n) for n in node.body))
        if isinstance(node, Map) and node.dst in folded:
            node = replace(node, expr=Op("mul", (node.expr, folded[node.dst])))
        if isinstance(node, Dot) and node.dst in scales:
            inside = any(isinstance(x, Tile) and x.name in folded for x in (node.a, node.b))
            return node if inside else replace(node, post=Op("mul", (Tile(node.dst), scales[node.dst])))
        return map_node(node, lambda e: rewrite(e, unscaled))

    def unscaled(e: Expr) -> Expr | None:
        if isinstance(e, Op) and e.name == "mul":
            for x, y in (e.args, e.args[::-1]):
                if isinstance(x, Tile) and scales.get(x.name) == y:
                    return x
        return None

    return tuple(change(n) for n in nodes)


def _bodies(nodes: tuple[Node, ...]) -> Iterable[tuple[Node, ...]]:
    yield from (n.body for n in nodes if isinstance(n, Loop))


def _only_scale(dot: Dot, body: Iterable[Node]) -> Expr | None:
    """The one expression by which every use of the dot is multiplied, or None."""
    me = Tile(dot.dst)
    scales: set[Expr] = set()
    for node in body:
        if node is dot:
            continue
        for e in node_expressions(node):
            products = [n for n in walk(e) if isinstance(n, Op) and n.name == "mul" and me in n.args]
            if sum(1 for n in walk(e) if n == me) != len(products):
                return None
            scales.update(n.args[1] if n.args[0] == me else n.args[0] for n in products)
    return scales.pop() if len(scales) == 1 else None


def _uses(tile: str, nodes: tuple[Node, ...]) -> int:
    """How often a tile is read, loops included."""
    here = sum(1 for n in nodes for e in node_expressions(n) for x in walk(e) if x == Tile(tile))
    return here + sum(_uses(tile, body) for body in _bodies(nodes))


def drop_dead(nodes: tuple[Node, ...], live: set[str]) -> tuple[Node, ...]:
    """The nodes without maps, reductions and contractions that nothing reads; `live` names what is read from outside."""
    needed = set(live)
    kept: list[Node] = []
    for node in reversed(nodes):
        if isinstance(node, Loop):
            inner = drop_dead(node.body, {n.name for s in node.states for n in walk(s.next) if isinstance(n, Tile)})
            node = replace(node, body=inner)
            needed.update(n.name for x in inner for e in node_expressions(x) for n in walk(e) if isinstance(n, Tile))
        elif not isinstance(node, Store) and node.dst not in needed:
            continue
        kept.append(node)
        needed.update(n.name for e in node_expressions(node) for n in walk(e) if isinstance(n, Tile))
    return tuple(reversed(kept))


def simplify(e: Expr) -> Expr:
    """`e` without multiplications by one and repeated maxima made by the derivation."""

    def rule(node: Expr) -> Expr | None:
        match node:
            case Op(name="mul", args=(Const(value=1.0), x)) | Op(name="mul", args=(x, Const(value=1.0))):
                return x
            case Op(name="exact", args=(x,)):
                return x
            case Op(name="maximum" | "minimum" as name, args=(Op(name=inner, args=(_, b)) as x, c)) if name == inner and b == c:
                return x
            case _:
                return None

    return rewrite(e, rule)


def ranks_in(e: Expr, tiles: Ranks) -> tuple[str, ...]:
    """The ranks `e` varies over, tiles included."""
    return expression_ranks(e, tiles)
