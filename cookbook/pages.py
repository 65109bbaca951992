"""The generated blocks of the recipes' pages, written from the recipes themselves.

    python cookbook/pages.py [--check] [--no-tables] [--pictures] [recipe ...]

Between `<!-- explain -->` and `<!-- end -->` stands what the compiler makes of each step at the recipe's own sizes: kernels with what they
stream, read, store and move, what the rewrites saved, what is stored between steps and why. Between `<!-- table -->` and `<!-- end -->`
stand the lines of the recipe's `show`. The table of recipes in the README of the cookbook is written too. Nothing of a plan depends on
the machine; a recipe's own table may.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import click

from cookbook.recipe import Recipe, Step

COOKBOOK = Path(__file__).resolve().parent
README = COOKBOOK / "README.md"
COMPOSITIONS = ("attention/tree_shared_prefix", "eviction/int4_h2o")  # systems put together
TARGET = "cpu:generic"  # plans and traffic are the same for any; this one is the same everywhere


@dataclass(frozen=True, slots=True)
class Page:
    """A recipe and the page beside it."""

    recipe: Recipe
    module: str
    path: Path


def pages(names: Sequence[str] = ()) -> Iterator[Page]:
    """The recipes of the cookbook that have one of these names (`hydragen`, `eviction/h2o`), or all. Raises `click.BadParameter`."""
    found = {path.relative_to(COOKBOOK).with_suffix(""): path for path in sorted(COOKBOOK.glob("*/*.py")) if "\nRECIPE" in path.read_text()}
    for name in names:
        if not any(name in (key.as_posix(), key.name) for key in found):
            raise click.BadParameter(f"no recipe {name}; there are {', '.join(key.as_posix() for key in found)}")
    for key, path in found.items():
        if not names or key.as_posix() in names or key.name in names:
            module = ".".join((COOKBOOK.name, *key.parts))
            yield Page(importlib.import_module(module).RECIPE, module, path.with_suffix(".md"))


def plan_of(step: Step) -> dict[str, Any]:
    """What `explain` says of the step, as data."""
    report = step.kernel.explain(*step.tensors(0), show=False, target=TARGET, **step.arguments())
    return dict(report.to_dict())


Plans = tuple[tuple[str, dict[str, Any]], ...]


def plans_of(recipe: Recipe) -> Plans:
    """The steps of a recipe by name, each with what `explain` says of it."""
    return tuple((step.name, plan_of(step)) for step in recipe.steps)


def explained(plans: Plans) -> list[str]:
    """The lines of the explain block. Steps of which the same is to be said share a paragraph."""
    lines: list[str] = []
    for (first, *rest), names in _grouped((name, tuple(_step(data))) for name, data in plans):
        lines += ["", f"**{', '.join(names)}** {first}", *rest]
    return lines[1:]


def _grouped(said: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[tuple[str, ...], list[str]]]:
    """What is said, with everything of which it is said, in order of first appearance."""
    table: dict[tuple[str, ...], list[str]] = {}
    for name, lines in said:
        table.setdefault(lines, []).append(name)
    return list(table.items())


def index(found: Sequence[tuple[Page, Plans]]) -> list[str]:
    """The lines of the README's table of recipes: family by family, the compositions last."""
    families: dict[str, list[str]] = {}
    for page, plans in found:
        link = page.path.relative_to(COOKBOOK).with_suffix("").as_posix()
        family = "compositions" if link in COMPOSITIONS else page.path.parent.name
        families.setdefault(family, []).append(_entry(page, link, plans))
    lines: list[str] = []
    for family in sorted(families, key=lambda name: (name == "compositions", name)):
        lines += [
            "",
            f"### {family.capitalize()}",
            "",
            "| recipe | what it is | steps and their plans |",
            "|---|---|---|",
            *families[family],
        ]
    return lines[1:]


def _entry(page: Page, link: str, plans: Plans) -> str:
    said = _grouped((name, (counted(data) + _passes(data).replace(" Passes over", "; passes over").rstrip("."),)) for name, data in plans)
    cells = (f"[{page.path.stem}]({link}.md)", page.recipe.title, "<br>".join(f"{', '.join(names)}: {line}" for (line,), names in said))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _step(data: dict[str, Any]) -> list[str]:
    """A step of a recipe: one sentence, the table of its plan, and what was saved and what not."""
    sizes = ", ".join(f"{rank}={size}" for rank, size in data["sizes"].items())
    moved = sum(k["traffic_bytes"] for k in data["kernels"])
    notes = [*_saved(data), *_refused(data)]
    return [
        f"at {sizes}: {counted(data)}, {_bytes(moved)} moved, {_bytes(data['traffic_bytes'])} at the least.{_passes(data)}",
        "",
        "| | streams | reads | stores | moves |",
        "|---|---|---|---|---:|",
        *(_row(k) for k in data["kernels"]),
        *(["", *notes] if notes else []),
    ]


def counted(data: dict[str, Any]) -> str:
    """The plan's steps by kind: `2 kernels, 1 library call`."""
    kinds = [_kind(k) for k in data["kernels"]]
    own, loops = kinds.count("kernel"), kinds.count("loop")
    numbers = ((own, "kernel"), (len(kinds) - own - loops, "library call"), (loops, "loop"))
    return ", ".join(f"{n} {noun}{'' if n == 1 else 's'}" for n, noun in numbers if n) or "nothing to do"


def passes_of(data: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """{rank: passes as written, passes as planned} where either is more than one; a component with the counts of its whole is left out."""
    before, after = data["passes"]["before"], data["passes"]["after"]
    found = {rank: (n, after[rank]) for rank, n in before.items() if rank in after and max(n, after[rank]) > 1}
    whole = [rank for rank in found if " " in rank]
    inside = {part for rank in whole for part in rank.strip("()").split() if found.get(part) == found[rank]}
    return {rank: passes for rank, passes in found.items() if rank not in inside}


def _passes(data: dict[str, Any]) -> str:
    changed = [f"{rank} {a} → {b}" if a != b else f"{rank} {a}" for rank, (a, b) in passes_of(data).items()]
    return f" Passes over {', '.join(changed)}." if changed else ""


def _kind(kernel: dict[str, Any]) -> str:
    if kernel["library"] is None:
        return "kernel"
    if re.search(r"^  iterate ", kernel["library"], re.M):
        return "loop"
    rule = re.search(r"= (\w+)\(", kernel["library"])
    return rule[1] if rule else "library"


def _row(kernel: dict[str, Any]) -> str:
    streams = []
    for stage in kernel["stages"]:
        within = ", ".join(f"`{predicate}`" for predicate in stage["domain"])
        streams.append(f"{kernel['stream']}{' where ' + within if within else ''}: {', '.join(stage['reductions'])}")
    stores = ", ".join(f"{name} (kept)" if name in kernel["kept"] else name for name in kernel["outputs"])
    kind = _kind(kernel)
    named = kind if kind in ("kernel", "loop") else f"library, {kind}"
    cells = (named, "; then ".join(streams) or "-", ", ".join(kernel["inputs"]) or "-", stores, _bytes(kernel["traffic_bytes"]))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _saved(data: dict[str, Any]) -> list[str]:
    """What the rewrites before streaming made of the cascade, then each stream that several reductions share."""
    earlier = [r for r in data["rewrites"] if r["name"] != "stream_reductions"]
    shared = [r for r in data["rewrites"] if r["name"] == "stream_reductions"]
    lines = []
    if earlier:
        each = ", ".join(f"`{r['name']}`" + (f" ({r['saved']} less)" if r["saved"] else "") for r in earlier)
        lines.append(f"- Rewritten by {each}.")
    for r in shared:
        less = "; saves " + r["saved"].replace("read again", "that would be read again") if r["saved"] else ""
        lines.append(f"- {r['did']}{less}.")
    kept = [", ".join(k["kept"]) for k in data["kernels"] if k["kept"]]
    lines += [f"- {names}: stored by the first stream for the later ones, which is cheaper than to sum it again." for names in kept]
    return lines


def _refused(data: dict[str, Any]) -> list[str]:
    """What was not done, results with the same reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in data["rejected"]:
        reason = re.sub(r"^(\w+) mixes", r"`\1` mixes", r["reason"].removeprefix("stored: "))
        reasons.setdefault((r["rewrite"], reason), []).append(r["statement"])
    heads = {"fuse": "Stored between steps", "stream_reductions": "In a pass of its own"}
    return [f"- {heads.get(rewrite, rewrite)}: {', '.join(names)}; {reason}." for (rewrite, reason), names in reasons.items()]


def _bytes(n: float) -> str:
    """Bytes with three digits and a decimal prefix."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= 0.9995 * factor:
            return f"{n / factor:.3g} {prefix}B"
    return f"{n:.0f} B"


def table(page: Page, *, pictures: bool) -> list[str]:
    """The lines of the recipe's table. Its picture is written beside the page only if that is asked for."""
    with tempfile.TemporaryDirectory(prefix="einfall-pages-") as scratch:
        lines = list(page.recipe.show(page.path.parent if pictures else Path(scratch)))
    if any(line.lstrip().startswith("|") for line in lines):
        return lines
    return ["```text", *lines, "```"]


def block(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with `lines` in its block of that name. Raises `ValueError` if it does not have exactly one."""
    whole = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
    body = "\n".join(["", *lines, "", ""])
    new, count = whole.subn(lambda m: m[1] + body + m[2], text)
    if count != 1:
        raise ValueError(f"{count} blocks `<!-- {name} -->`, expected 1")
    return new


def refresh(path: Path, blocks: Mapping[str, Sequence[str]], *, write: bool) -> bool:
    """Whether some block of the page says something else; it is put in its place if `write`."""
    old = new = path.read_text(encoding="utf-8")
    for name, lines in blocks.items():
        new = block(new, name, lines)
    if write and new != old:
        path.write_text(new, encoding="utf-8")
    return new != old


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("names", nargs=-1, metavar="[RECIPE]...")
@click.option("--check", is_flag=True, help="write nothing; fail if an explain block is out of date")
@click.option("--tables/--no-tables", default=True, show_default=True, help="run `show` and write its table too")
@click.option("--pictures", is_flag=True, help="write the pictures beside the pages as well")
def main(names: tuple[str, ...], *, check: bool, tables: bool, pictures: bool) -> None:
    """Refresh or check the pages."""
    found = [(page, plans_of(page.recipe)) for page in pages(names)]
    blocks = [(page.path, {"explain": explained(plans)}) for page, plans in found]
    if not names:
        blocks.append((README, {"recipes": index(found)}))
    if tables and not check:
        for (_, lines), (page, _) in zip(blocks, found, strict=False):
            lines["table"] = table(page, pictures=pictures)
    changed = [path.relative_to(COOKBOOK).as_posix() for path, lines in blocks if refresh(path, lines, write=not check)]
    if check and changed:
        raise click.ClickException(f"out of date: {', '.join(changed)}; run python cookbook/pages.py")
    click.echo(f"written: {', '.join(changed)}" if changed else "nothing to write")


if __name__ == "__main__":
    main()
