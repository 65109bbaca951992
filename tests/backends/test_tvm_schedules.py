"""Schedules: every legal choice computes the same, illegal ones are refused by entry and number, the defaults are what they should be."""

from __future__ import annotations

import programs as p
import pytest
import torch
from einfall.ir.errors import ScheduleError
from einfall.ir.types import bf16
from einfall.schedules.layout import complete
from einfall.schedules.schedule import DotSchedule, GroupSchedule, Schedule
from kernels import host, narrow, run
from test_tvm_kernels import attention_oracle, close, random

needs_avx512 = pytest.mark.skipif(host().vector_width != 16, reason="register tiles of sixteen lanes")

ATTENTION = {
    "rows in lanes": Schedule.make(dot={"s": DotSchedule((("p", 4), ("m", 64)), "m"), "o'": DotSchedule((("m", 8), ("f", 32)), "f")}),
    "keys in lanes": Schedule.make(dot={"s": DotSchedule((("m", 8), ("p", 32)), "p")}, layout={"s": ("m", "p"), "n": ("m", "p")}),
    "horizontal": Schedule.make(dot={"s": DotSchedule((("m", 4), ("p", 4)), "e")}, layout={"s": ("m", "p"), "q": ("m", "e")}),
    "horizontal across": Schedule.make(dot={"s": DotSchedule((("m", 2), ("p", 2)), "e")}, layout={"s": ("p", "m")}),
    "output rows in lanes": Schedule.make(dot={"o'": DotSchedule((("f", 8), ("m", 32)), "m")}, layout={"o": ("f", "m"), "o'": ("f", "m")}),
    "update at load": Schedule.make(dot={"o'": DotSchedule((("m", 4), ("f", 64)), "f", update_at_load=True)}),
    "split layout": Schedule.make(layout={"s": ("m/32", "p", "m%32"), "q": ("m/16", "e", "m%16")}),
    "one accumulator": Schedule.make(dot={"s": DotSchedule((("m", 16),), "m"), "o'": DotSchedule((("f", 16),), "f")}),
    "short groups": Schedule.make(group={"t": GroupSchedule("m", 1), "n": GroupSchedule("m", 2)}),
    "zigzag": Schedule.make(grid_order="zigzag"),
    "rising": Schedule.make(grid_order="rising"),
}  # fmt: skip


@needs_avx512
@pytest.mark.parametrize("name", ATTENTION)
def test_schedules_of_attention(name):
    for options, m, n in [({"causal": True}, 70, 131), ({}, 3, 200)]:
        q, k, v = random(m, 1, 3, m, 64), random(n, 1, 3, n, 64), random(n + 1, 1, 3, n, 64)
        actual = run(p.attention(**options), {"Q": q, "K": k, "V": v}, {"scale": 0.3}, schedule=ATTENTION[name])["O"]
        close(actual, attention_oracle(q, k, v, 0.3, **options), 3e-6)


@needs_avx512
@pytest.mark.parametrize("name", ["rows in lanes", "output rows in lanes", "horizontal", "update at load", "keys in lanes"])
def test_schedules_of_bf16_attention(name):
    q, k, v = (random(i, 1, 2, r, 64, dtype=torch.bfloat16) for i, r in enumerate((70, 131, 131)))
    actual = run(p.attention(causal=True, dtype=bf16), {"Q": q, "K": k, "V": v}, {"scale": 0.125}, schedule=ATTENTION[name])["O"]
    assert (actual.double() - attention_oracle(q, k, v, 0.125, causal=True)).abs().max() < 2e-2


@needs_avx512
def test_probabilities_with_the_lane_along_the_pairs():
    schedule = Schedule.make(group={"n": GroupSchedule("p", 2), "t": GroupSchedule("m", 1)})
    q, k, v = (random(i, 1, 2, r, 64, dtype=torch.bfloat16) for i, r in enumerate((70, 131, 131)))
    actual = run(p.attention(causal=True, dtype=bf16), {"Q": q, "K": k, "V": v}, {"scale": 0.125}, schedule=schedule)["O"]
    assert (actual.double() - attention_oracle(q, k, v, 0.125, causal=True)).abs().max() < 2e-2


@needs_avx512
def test_depth_blocks_of_a_result_that_lies_across_the_lane():
    dot = DotSchedule((("p", 64),), "p", k_block=16)
    q, k, v = (random(i, 1, 1, r, 64) for i, r in enumerate((70, 131, 131)))
    schedule = Schedule.make(dot={"s": dot}, layout={"s": ("p", "m")})
    actual = run(p.attention(), {"Q": q, "K": k, "V": v}, {"scale": 0.2}, schedule=schedule)["O"]
    close(actual, attention_oracle(q, k, v, 0.2), 3e-6)


@needs_avx512
def test_depth_blocks():
    schedule = Schedule.make(dot={"s": DotSchedule((("v", 8), ("t", 32)), "t", k_block=128)})
    x, w, y = random(1, 70, 512), random(2, 200, 512) / 20, torch.arange(70, dtype=torch.int32)
    expected = torch.nn.functional.cross_entropy(x.double() @ w.double().t(), y.long(), reduction="none")
    close(run(p.cross_entropy(e=512), {"X": x, "W": w, "Y": y}, schedule=schedule)["L"], expected, 1e-5)


ILLEGAL = {
    "registers": (Schedule.make(dot={"s": DotSchedule((("p", 16), ("m", 32)), "m")}), "dot[s].register needs 35 vector registers"),
    "lanes": (Schedule.make(dot={"s": DotSchedule((("m", 24),), "m")}), "multiple of 16"),
    "lane": (Schedule.make(dot={"s": DotSchedule((), "f")}), "dot[s].lane is 'f'"),
    "register rank": (Schedule.make(dot={"s": DotSchedule((("f", 4),), "m")}), "dot[s].register names 'f'"),
    "layout": (Schedule.make(layout={"s": ("m",)}), "layout[s]"),
    "layout rank": (Schedule.make(layout={"s": ("m", "q")}), "layout[s]"),
    "layout split": (Schedule.make(layout={"s": ("m/32", "p", "m%16")}), "layout[s]"),
    "padding": (Schedule.make(dot={"o'": DotSchedule((("m", 9), ("f", 16)), "f")}), "rank 'm' of 64 would be padded to 288"),
}  # fmt: skip


@needs_avx512
@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_schedules_are_refused(name):
    from einfall.backends.tvm import TvmCpu

    schedule, message = ILLEGAL[name]
    with pytest.raises(ScheduleError) as error:
        TvmCpu().emit(p.attention(), schedule, host())
    assert message in str(error.value)


def test_entries_of_other_kernels_are_ignored():
    schedule = Schedule.make(dot={"x": DotSchedule((("m", 99),))}, layout={"y": ("m", "m/7")}, group={"z": GroupSchedule("m", 3)})
    x = random(1, 3, 64)
    close(run(p.log_sum_exp(), {"X": x}, schedule=schedule)["L"], x.double().logsumexp(-1), 1e-6)


@needs_avx512
def test_default_register_tiles_and_layouts():
    chosen = complete(p.attention(), Schedule(), host())
    dots, layouts = dict(chosen.dot), dict(chosen.layout)
    assert dots["s"].lane == "m" and dict(dots["s"].register) == {"p": 8, "m": 32}
    assert dots["o'"].lane == "f" and dict(dots["o'"].register) == {"m": 4, "f": 64}
    assert layouts["q"] == ("e", "m") and layouts["s"] == layouts["n"] == ("p", "m") and layouts["o"] == ("m", "f")
    few = complete(p.decode(), Schedule(), host())
    assert dict(few.dot)["s"].lane == "e" and dict(few.layout)["n"] == ("r", "p")


def test_defaults_fit_the_registers_of_either_processor():
    for target in (host(), narrow()):
        for program in (p.attention(e=80, f=33), p.attention(rows=7), p.decode(rows=3), p.matmul(), p.norm_matmul(n=37), p.cross_entropy()):
            again = complete(program, complete(program, Schedule(), target), target)
            assert again == complete(program, Schedule(), target)  # what is complete stays as it is
