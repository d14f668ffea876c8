import json
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from builders import attributes, labels, random_flow
from flowback import InputError, TarFlow
from flowback.flow.autotune import FILE, Autotune, Measurement, choose, machine_name
from flowback.flow.decoding import Solver, solve
from flowback.tasks import autotune as measuring
from flowback.tasks.autotune import autotune, candidates

HERE = machine_name(torch.device("cpu"))
SWEEPS = Solver("gauss_seidel")
SEQUENTIAL, JACOBI, WINDOW = Solver("sequential"), Solver("jacobi"), Solver("gauss_seidel", 4)


@pytest.fixture
def flow():
    return random_flow(std=0.1)


@pytest.fixture
def z(flow):
    return torch.randn(3, *flow.token_shape, dtype=torch.float64)


def made_of(rows, machine=HERE, blocks=3):
    """Measurements that take the same solver for every block: `rows` is {number of rows: solver}."""
    return Autotune(machine, {n: [Measurement(solver, 1.0, 2.0, 8, 1e-6)] * blocks for n, solver in rows.items()})


def chosen(flow, rows):
    return choose(flow.autotune, flow.config.blocks, rows, flow.device)


@pytest.fixture
def race(monkeypatch):
    """Replace the clock: `race(seconds)` lets each solve take `seconds(block, solver, how often it ran before)`."""

    def start(seconds):
        now, runs = [0.0], Counter()

        def timed(F, solver, tolerance):
            runs[F.block, solver] += 1
            now[0] += seconds(F.block, solver, runs[F.block, solver] - 1)
            return solve(F, solver, tolerance)

        monkeypatch.setattr(measuring, "solve", timed)
        monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        return runs

    return start


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_autotune_measures_every_block_at_every_number_of_rows(flow):
    found = autotune(flow, rows=(2, 1, 2), repeats=1)
    assert flow.autotune is found
    assert found.machine == HERE
    assert list(found.rows) == [1, 2]
    for measured in found.rows.values():
        assert len(measured) == flow.config.blocks
        for block in measured:
            assert block.solver in candidates(9, draft=True)  # which is tried where bfloat16 is fast
            assert 0 < block.seconds <= block.sequential_seconds
            assert block.sweeps >= 1
            assert block.residual <= 1e-10


@pytest.mark.parametrize("tokens", [1, 2, 9, 64])
def test_candidates_are_different_and_start_with_the_sequential_loop(tokens):
    solvers = candidates(tokens)
    assert solvers[0] == SEQUENTIAL
    assert len(set(solvers)) == len(solvers)
    assert {solver.method for solver in solvers} == {"sequential", "gauss_seidel"}
    assert candidates(tokens, draft=True)[:-1] == solvers
    assert all(solver.window is None or 1 <= solver.window <= tokens for solver in solvers)


def test_the_fastest_wins_block_one_first(flow, race):
    fastest = dict(zip(flow.blocks, [SWEEPS, SEQUENTIAL, Solver("gauss_seidel", 2)], strict=True))
    race(lambda block, solver, before: 1.0 if solver == fastest[block] else 2.0)
    found = autotune(flow, rows=(1, 3))
    for measured in found.rows.values():
        assert [block.solver for block in measured] == list(fastest.values())
        assert [block.seconds for block in measured] == [1.0] * 3
        assert [block.sequential_seconds for block in measured] == [2.0, 1.0, 2.0]
    assert found.rows[1][1].sweeps == 8
    assert found.rows[1][1].residual == 0


def test_of_several_runs_the_fastest_counts(flow, race):
    race(lambda block, solver, before: 2.0 if solver != SWEEPS else 1.0 if before == 2 else 1.5)
    for repeats, seconds in ((2, 1.5), (3, 1.0)):
        measured = autotune(flow, rows=(1,), repeats=repeats).rows[1]
        assert [(block.solver, block.seconds) for block in measured] == [(SWEEPS, seconds)] * 3
        race(lambda block, solver, before: 2.0 if solver != SWEEPS else 1.0 if before == 2 else 1.5)


def test_what_is_slower_in_one_round_does_not_win(flow, race):
    race(lambda block, solver, before: 2.0 if solver != SWEEPS else 2.1 if before == 1 else 1.5)
    assert [block.solver for block in autotune(flow, rows=(1,)).rows[1]] == [SEQUENTIAL] * 3


def test_what_is_far_too_slow_runs_once(flow, race):
    runs = race(lambda block, solver, before: 7.0 if solver == SWEEPS else 2.0)
    autotune(flow, rows=(1,), repeats=3)
    for (_, solver), times in runs.items():
        assert times == (1 if solver == SWEEPS else 3)


def test_what_is_hardly_faster_does_not_win(flow, race):
    race(lambda block, solver, before: 1.0 if solver == SEQUENTIAL else 0.98)
    assert [block.solver for block in autotune(flow, rows=(1,)).rows[1]] == [SEQUENTIAL] * 3


def test_every_block_is_measured_on_what_those_above_it_decoded(flow, race, monkeypatch):
    seen = {}
    race(lambda block, solver, before: 1.0)
    timed = measuring.solve

    def spy(F, solver, tolerance):
        seen[F.block] = F.block.reorder(F.z)
        return timed(F, solver, tolerance)

    monkeypatch.setattr(measuring, "solve", spy)
    autotune(flow, rows=(4,))
    classes = flow.class_weights(torch.arange(4), 4)
    for lower, upper in pairwise(flow.blocks):
        assert torch.allclose(upper(seen[lower], classes).z, seen[upper], atol=1e-8)


def test_every_block_is_reported_in_a_line(flow, race):
    race(lambda block, solver, before: 0.5 if solver == Solver("gauss_seidel", 2) else 2.0)
    lines = []
    autotune(flow, rows=(1, 12), report=lines.append)
    assert [line.split("block ")[1][0] for line in lines] == list("321321")
    assert lines[-1].startswith(" 12 rows")
    assert "gauss_seidel, window 2 " in lines[-1]
    assert lines[-1].endswith("0.5000 s, 4.00 times as fast as the sequential loop")


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"image_size": 2}, {"log_scale_bound": None}])
def test_any_flow_can_be_measured(options):
    flow = random_flow(torch.float32, std=0.1, **options)
    assert len(autotune(flow, rows=(1,), repeats=1).rows[1]) == 3


def test_autotune_leaves_nothing_but_what_it_measured(flow):
    state, before = torch.get_rng_state(), attributes(flow)
    autotune(flow, rows=(1, 2), repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    after = attributes(flow)
    assert {name for name in after if after[name] != before[name]} == {".autotune"}
    assert all(p.grad is None for p in flow.parameters())


def test_the_measured_images_depend_on_their_own_seed_only(flow, monkeypatch):
    seen = []

    def spy(F, solver, tolerance):
        seen.append(F.z)
        return solve(F, solver, tolerance)

    monkeypatch.setattr(measuring, "solve", spy)
    for global_seed, own_seed in ((0, 4), (1, 4), (0, 5)):
        torch.manual_seed(global_seed)
        autotune(flow, rows=(1,), seed=own_seed, repeats=1)
    first, second, other = (seen[i * len(seen) // 3] for i in range(3))
    assert torch.equal(first, second)
    assert (first - other).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, r"rows and repeats must be whole numbers of at least 1, got \[\] and 3"),
        ({"rows": [0, 4]}, r"got \[0, 4\] and 3"),
        ({"rows": [2, -1]}, r"got \[2, -1\] and 3"),
        ({"rows": [1], "repeats": 0}, r"got \[1\] and 0"),
    ],
)
def test_impossible_measurements_are_refused(flow, arguments, message):
    with pytest.raises(InputError, match=message):
        autotune(flow, **arguments)
    assert flow.autotune is None


# ---- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "nearest"), [(1, 1), (2, 1), (3, 8), (8, 8), (15, 8), (17, 32), (32, 32), (10_000, 32)])
def test_the_nearest_number_of_rows_counts_on_a_log_scale(flow, rows, nearest):
    by_rows = {1: SEQUENTIAL, 8: JACOBI, 32: WINDOW}
    flow.autotune = made_of(by_rows)
    assert chosen(flow, rows) == [by_rows[nearest]] * 3


@pytest.mark.parametrize(
    "useless",
    [
        None,
        made_of({1: JACOBI}, machine="another machine"),
        made_of({1: JACOBI}, blocks=2),
        made_of({1: JACOBI}, blocks=4),
        made_of({}),
    ],
    ids=["none", "another machine", "fewer blocks", "more blocks", "empty"],
)
@pytest.mark.parametrize(("rows", "few"), [(1, True), (4, True), (5, False), (64, False)])
def test_without_measurements_that_fit_sweeps_serve_few_rows(flow, useless, rows, few):
    flow.autotune = useless
    assert chosen(flow, rows) == ([SWEEPS, SWEEPS, SEQUENTIAL] if few else [SEQUENTIAL] * 3)


def test_measurements_of_other_threads_are_of_another_machine(flow):
    flow.autotune = made_of({1: JACOBI})
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert chosen(flow, 8) == [SEQUENTIAL] * 3
    finally:
        torch.set_num_threads(threads)
    assert chosen(flow, 8) == [JACOBI] * 3


@pytest.mark.parametrize(("guidance", "solver"), [(0.0, JACOBI), (1.5, WINDOW)])
def test_a_guided_image_counts_as_two_rows(flow, z, guidance, solver):
    flow.autotune = made_of({3: JACOBI, 6: WINDOW})
    _, report = flow.decode_with_report(z, labels(flow), guidance)
    assert [solved.solver for solved in report] == [solver] * 3


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_measured_flow_decodes_the_same_images(flow, z, guidance):
    autotune(flow, rows=(1, 4), repeats=1)
    expected = flow.decode(z, labels(flow), guidance, method="sequential")
    assert torch.allclose(flow.decode(z, labels(flow), guidance), expected, atol=1e-8)


@pytest.mark.parametrize("solver", candidates(9, draft=True), ids=str)
def test_whatever_was_chosen_decodes_the_same_images(flow, z, solver):
    flow.autotune = made_of({1: solver})
    x, report = flow.decode_with_report(z, labels(flow), 1.5)
    assert [solved.solver for solved in report] == [solver] * 3
    assert torch.allclose(x, flow.decode(z, labels(flow), 1.5, method="sequential"), atol=1e-8)


# ---- on disk --------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(flow, tmp_path):
    for made in (made_of({1: JACOBI, 8: Solver("gauss_seidel", None, True)}), autotune(flow, rows=(1,), repeats=1)):
        made.save(tmp_path)
        assert Autotune.load(tmp_path) == made


def test_a_folder_without_measurements_has_none(tmp_path):
    assert Autotune.load(tmp_path) is None


def test_a_flow_keeps_its_measurements(flow, z, tmp_path):
    flow.autotune = made_of({1: Solver("gauss_seidel", 3), 8: JACOBI})
    flow.save_pretrained(tmp_path)
    loaded = TarFlow.from_pretrained(tmp_path)
    assert loaded.autotune == flow.autotune
    assert torch.equal(loaded.decode(z, labels(flow)), flow.decode(z, labels(flow)))


def test_a_flow_without_measurements_saves_none(flow, tmp_path):
    flow.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    assert TarFlow.from_pretrained(tmp_path).autotune is None


def test_saving_a_flow_without_measurements_removes_that_of_another(flow, tmp_path):
    flow.autotune = made_of({1: JACOBI})
    flow.save_pretrained(tmp_path)
    random_flow(seed=5).save_pretrained(tmp_path)
    assert TarFlow.from_pretrained(tmp_path).autotune is None


def change_solver(**values):
    """A damage: every block's solver gets these values."""

    def spoil(file):
        content = json.loads(file.read_text())
        for measured in content["rows"].values():
            for block in measured:
                block["solver"].update(values)
        file.write_text(json.dumps(content))

    return spoil


def change_content(change):
    def spoil(file):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return spoil


DAMAGES = {
    "not JSON": lambda file: file.write_text("rows: 1"),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-50]),
    "empty": lambda file: file.write_bytes(b""),
    "not text": lambda file: file.write_bytes(b"\xff\xfe\x80"),
    "a list": lambda file: file.write_text("[]"),
    "a word": lambda file: file.write_text('"fast"'),
    "null": lambda file: file.write_text("null"),
    "no machine": change_content(lambda content: content.pop("machine")),
    "no rows": change_content(lambda content: content.pop("rows")),
    "rows are a list": change_content(lambda content: content.update(rows=[1])),
    "rows are no number": change_content(lambda content: content.update(rows={"many": []})),
    "no list of blocks": change_content(lambda content: content.update(rows={"1": 3})),
    "blocks are numbers": change_content(lambda content: content.update(rows={"1": [1, 2, 3]})),
    "a block lacks its solver": change_content(lambda content: content["rows"]["1"][0].pop("solver")),
    "a block lacks its seconds": change_content(lambda content: content["rows"]["1"][2].pop("seconds")),
    "a block knows more": change_content(lambda content: content["rows"]["1"][1].update(watts=3)),
    "a solver knows more": change_solver(sweeps=3),
    "an unknown method": change_solver(method="newton"),
    "a window of no token": change_solver(method="gauss_seidel", window=0),
    "a negative window": change_solver(method="gauss_seidel", window=-1),
    "a window of text": change_solver(method="gauss_seidel", window="4"),
    "no rows at all": change_content(lambda content: content.update(rows={"0": content["rows"]["1"]})),
    "another format": change_content(lambda content: content.update(format=2)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name(flow, tmp_path, damage):
    flow.autotune = made_of({1: JACOBI})
    flow.save_pretrained(tmp_path)
    DAMAGES[damage](tmp_path / FILE)
    with pytest.raises(InputError, match=r"decoding\.json cannot be used"):
        TarFlow.from_pretrained(tmp_path)
