from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from builders import attributes, images, labels, random_flow
from flowback import Guidance, InputError
from flowback.flow import decoding as decoders
from flowback.flow.autotune import Autotune, Measurement, machine_name
from flowback.flow.block import FlowBlock
from flowback.flow.decoding import DECODERS, TOLERANCES, CausalMap, Solver, solve
from flowback.flow.patches import patchify, unpatchify

N = 9  # tokens of the flow that `random_flow` makes unless told otherwise
SLACK = 1.02  # a residual may be relative to |F(x)| or to |x|, which differ by the tolerance
SOLVERS = [
    Solver("sequential"),
    Solver("jacobi"),
    Solver("jacobi", draft=True),
    Solver("gauss_seidel"),
    *(Solver("gauss_seidel", window) for window in (1, 2, 3, N, N + 5)),
    Solver("gauss_seidel", draft=True),
    Solver("gauss_seidel", 3, draft=True),
]
PARALLEL = [solver for solver in SOLVERS if solver.method != "sequential"]


def words(solver):
    return f"{solver.method}-{solver.window}{'-draft' if solver.draft else ''}"


all_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=words)
some_solvers = pytest.mark.parametrize("solver", SOLVERS[::2], ids=words)
parallel_solvers = pytest.mark.parametrize("solver", PARALLEL, ids=words)
all_methods = pytest.mark.parametrize("method", [*DECODERS, "auto"])
both_orders = pytest.mark.parametrize("t", [1, 2], ids=["raster", "flipped"])


def noise(flow, batch=3, seed=2):
    z = torch.randn(batch, *flow.token_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.to(next(flow.parameters()).dtype)


def use(flow, *solvers):
    """Let method auto take these solvers, one for each block or one for all."""
    solvers = solvers if len(solvers) > 1 else solvers * flow.config.blocks
    measured = [Measurement(solver, 1.0, 1.0, 1, 0.0) for solver in solvers]
    flow.autotune = Autotune(machine_name(torch.device("cpu")), {1: measured})
    return flow


def elementwise_flow(shift=0.0, log_scale=0.0, **options):
    """A flow of `x_d = z_d exp(log_scale x_(d-1)) + shift x_(d-1)`, without transformer."""
    flow = random_flow(**options)
    D = flow.token_shape[1]
    for p in flow.parameters():
        p.data.zero_()
    for block in flow.blocks:
        block.proj_in.weight.data[:D] = torch.eye(D)
        block.proj_out.weight.data[:, :D] = torch.cat([shift * torch.eye(D), log_scale * torch.eye(D)])
    return flow


def causal_map(flow, t, z, guidance=None):
    """Of block t, with labels that include a dropped one."""
    classes = flow.class_weights(labels(flow, len(z)), len(z))
    return CausalMap(flow.blocks[t - 1], z, classes, guidance or Guidance())


def slow_sweep(block, z, x, classes, guidance):
    """`z exp(a(x)) + mu(x)` of all tokens, by one whole pass for each half of the guidance."""
    mu, a, _ = block.predict(block.reorder(x), classes)
    if guidance.scale:
        tokens = z.shape[1]
        mu_u, a_u, _ = block.predict(block.reorder(x), torch.full_like(classes, 1 / classes.shape[1]))
        w = guidance.scale * torch.ones(tokens, 1, dtype=z.dtype)
        if guidance.schedule == "annealed":
            w = w * torch.arange(tokens)[:, None] / (tokens - 1)
        mu = mu + w * (mu - mu_u) if guidance.guided != "a" else mu
        a = a + w * (a - a_u) if guidance.guided != "mu" else a
    return z * torch.exp(block.reorder(a)) + block.reorder(mu)


def slow_decode(flow, z, y=None, guidance=None, known=None):
    """Each block by its definition: as many sweeps as there are tokens, after which the last one is right."""
    classes = flow.class_weights(y, len(z))
    for t in range(len(flow.blocks), 0, -1):
        x = z
        for _ in range(z.shape[1]):
            x = slow_sweep(flow.blocks[t - 1], z, x, classes, guidance or Guidance())
            if known is not None and t == 1:
                values, places = (patchify(part, flow.config.patch_size) for part in known)
                x = torch.where(places, values, x)
        z = x
    return unpatchify(z, flow.config.patch_size, flow.image_size)


def true_residual(flow, t, z, x, guidance=None):
    """`|F(x) - x| / max(1, |x|)` of block t's input `x [B, N, D]`, measured by one whole pass."""
    new = slow_sweep(flow.blocks[t - 1], z, x, flow.class_weights(labels(flow, len(z)), len(z)), guidance or Guidance())
    return float(((new - x).abs() / x.abs().clamp(min=1)).max())


# ---- all decoders give the same images ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(p, K) for p in ("float64", "float32") for K in (0, 4)], ids=str)
def unguided(request):
    """A flow, noise, labels, the images by definition, and how near to them a decoder has to come."""
    precision, num_classes = request.param
    flow = random_flow(getattr(torch, precision), std=0.1, num_classes=num_classes, blocks=2)
    z, y = noise(flow), labels(flow)
    with torch.no_grad():
        return flow, z, y, slow_decode(flow, z, y), 1e-8 if precision == "float64" else 1e-4


@all_solvers
def test_every_solver_finds_the_fixed_point(unguided, solver):
    flow, z, y, expected, atol = unguided
    assert torch.allclose(use(flow, solver).decode(z, y), expected, atol=atol)


@pytest.fixture(
    scope="module", params=[(s, what) for s in ("constant", "annealed") for what in ("both", "a", "mu")], ids=str
)
def guided(request):
    """A flow, noise, labels, a guidance and the guided images by definition."""
    flow, guidance = random_flow(std=0.1, blocks=2), Guidance(1.7, *request.param)
    z, y = noise(flow), labels(flow)
    with torch.no_grad():
        return flow, z, y, guidance, slow_decode(flow, z, y, guidance)


@all_solvers
def test_every_solver_finds_the_guided_fixed_point(guided, solver):
    flow, z, y, guidance, expected = guided
    assert torch.allclose(use(flow, solver).decode(z, y, guidance), expected, atol=1e-8)


@all_solvers
@both_orders
@pytest.mark.parametrize("scale", [0.0, 1.5])
@torch.no_grad()
def test_every_solver_solves_a_single_block_of_either_order(solver, t, scale, monkeypatch):
    monkeypatch.setattr(decoders, "JACOBI_SHARE", 2.0)
    flow = random_flow(std=0.1)
    assert flow.blocks[t - 1].flip == (t == 2)
    F = causal_map(flow, t, noise(flow), Guidance(scale))
    expected, _ = solve(F, Solver("sequential"), 1e-10)
    x, solved = solve(F, solver, 1e-10)
    assert not solved.fell_back
    assert torch.allclose(x, expected, atol=1e-8)


@all_methods
def test_decoding_inverts_encoding(method):
    flow = random_flow(std=0.1)
    x, y = images(flow), labels(flow)
    assert torch.allclose(flow.decode(flow.encode(x, y)[0].detach(), y, method=method), x, atol=1e-8)


@pytest.mark.parametrize(
    "methods",
    [
        ["jacobi", "gauss_seidel", "sequential"],
        ("gauss_seidel", "auto", "jacobi"),
        ["auto"] * 3,
    ],
)
def test_every_block_may_have_a_method_of_its_own(methods):
    flow = use(random_flow(std=0.1), Solver("sequential"), Solver("gauss_seidel", 2), Solver("jacobi"))
    z, y = noise(flow), labels(flow)
    x, report = flow.decode_with_report(z, y, 1.5, method=methods)
    automatic = ["sequential", "gauss_seidel", "jacobi"]
    expected = [a if method == "auto" else method for method, a in zip(methods, automatic, strict=True)]
    assert [solved.solver.method for solved in report] == expected
    assert torch.allclose(x, flow.decode(z, y, 1.5, method="sequential"), atol=1e-8)


@some_solvers
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_a_single_token_needs_no_pass(solver, scale):
    flow = use(random_flow(image_size=2), solver)
    z = noise(flow)
    x, report = flow.decode_with_report(z, labels(flow), Guidance(scale, "annealed"))
    assert torch.equal(x, unpatchify(z, 2, (2, 2)))
    assert [(solved.tokens, solved.residual, solved.fell_back) for solved in report] == [(0, 0.0, False)] * 3


@given(
    seed=st.integers(0, 10_000),
    methods=st.lists(st.sampled_from([*DECODERS, "auto"]), min_size=3, max_size=3),
    batch=st.integers(1, 3),
    guidance=st.sampled_from([0.0, 1.5]),
)
def test_any_mixture_of_methods_equals_the_sequential_decoder(seed, methods, batch, guidance):
    flow = random_flow(std=0.08, seed=seed)
    z, y = noise(flow, batch, seed), labels(flow, batch) if batch > 1 else labels(flow, 2)[1:]  # guidance needs a label
    expected = flow.decode(z, y, guidance, method="sequential")
    assert torch.allclose(flow.decode(z, y, guidance, method=methods), expected, atol=1e-8)


def test_gauss_seidel_one_token_wide_is_the_sequential_decoder():
    flow = random_flow()
    z, y = noise(flow), labels(flow)
    expected = flow.decode(z, y, 1.0, method="sequential")
    x, report = use(flow, Solver("gauss_seidel", 1)).decode_with_report(z, y, 1.0)
    assert torch.equal(x, expected)
    assert [(s.sweeps, s.tokens, s.residual, s.fell_back) for s in report] == [(N - 1, N - 1, 0.0, False)] * 3


@all_methods
def test_every_method_works_under_autocast(method):
    flow = random_flow(torch.float32, std=0.1)
    z, y = noise(flow), labels(flow)
    expected = flow.decode(z, y, 1.0, method="sequential")
    with torch.autocast("cpu", torch.bfloat16):
        x = flow.decode(z, y, 1.0, method=method)
    assert x.dtype == torch.float32
    assert torch.allclose(x, expected, atol=0.1)
    assert not torch.equal(x, expected)  # it did run in bfloat16


@all_methods
def test_every_method_works_in_inference_mode(method):
    flow = random_flow(std=0.1)
    z, y = noise(flow), labels(flow)
    expected = flow.decode(z, y, method=method)
    with torch.inference_mode():
        assert torch.equal(flow.decode(z, y, method=method), expected)


@pytest.mark.parametrize("method", ["sequential", "jacobi", "gauss_seidel", "auto"])
def test_no_noise_gives_no_images(method):
    flow = random_flow()
    assert flow.decode(noise(flow, 0), torch.zeros(0, dtype=torch.long), method=method).shape == (0, 2, 6, 6)


@pytest.mark.parametrize("schedule", ["constant", "annealed"])
@pytest.mark.parametrize("what", ["both", "a", "mu"])
def test_guidance_of_many_tokens_is_that_of_each(schedule, what):
    mu, a = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    guidance, first = Guidance(1.7, schedule, what), 3
    w = guidance.weights(torch.zeros(1, N, 4, dtype=torch.float64))[first : first + 5]
    together = guidance.apply(mu, a, w)
    alone = [guidance.apply(mu[:, i : i + 1], a[:, i : i + 1], w[i : i + 1]) for i in range(5)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert whole.shape == (3, 5, 4)
        assert torch.allclose(whole, torch.cat(parts, dim=1), atol=1e-14)


# ---- nothing but the images -----------------------------------------------------------------------------------------


@some_solvers
@pytest.mark.parametrize("image_size", [2, 6])
def test_z_and_the_known_images_are_not_written_to(solver, image_size):
    flow = use(random_flow(std=0.1, image_size=image_size), solver)
    z, given, mask = noise(flow), images(flow), torch.rand(3, 2, image_size, image_size) < 0.5
    before = z.clone(), given.clone(), mask.clone()
    x = flow.decode(z, labels(flow), 1.0, known=(given, mask))
    x += 1
    assert all(torch.equal(now, then) for now, then in zip((z, given, mask), before, strict=True))


@some_solvers
def test_nothing_is_left_on_the_modules(solver):
    flow = use(random_flow(std=0.1), solver)
    before = attributes(flow)
    for z in (noise(flow), noise(flow).requires_grad_()):
        with torch.no_grad():
            assert not flow.decode(z, labels(flow), 1.0).requires_grad
        assert flow.decode(z, labels(flow), 1.0).requires_grad
    assert attributes(flow) == before
    assert all(p.grad is None for p in flow.parameters())


@pytest.mark.parametrize("method", ["jacobi", "gauss_seidel"])
def test_only_the_draft_runs_in_bfloat16(method, monkeypatch):
    flow = use(random_flow(torch.float32, std=0.1), Solver(method, draft=True))
    original, precise = FlowBlock.predict_next, []

    def spy(block, *args, **kwargs):
        precise.append(not torch.is_autocast_enabled("cpu"))
        return original(block, *args, **kwargs)

    monkeypatch.setattr(FlowBlock, "predict_next", spy)
    _, report = flow.decode_with_report(noise(flow), labels(flow))
    assert len(precise) == sum(solved.sweeps for solved in report)
    for solved in reversed(report):
        own, precise = precise[: solved.sweeps], precise[solved.sweeps :]
        assert own == sorted(own)
        assert 1 <= own.count(False) <= decoders.DRAFT_SWEEPS
        assert own[-1]


# ---- the report -----------------------------------------------------------------------------------------------------


@all_methods
@pytest.mark.parametrize("image_size", [6, 16])
@torch.no_grad()
def test_report_counts_what_ran_block_one_first(method, image_size, monkeypatch):
    flow = random_flow(std=0.06, image_size=image_size)
    seen: dict[nn.Parameter, list[int]] = {block.class_embed: [] for block in flow.blocks}  # which copies of a block share
    original = FlowBlock.predict_next

    def spy(block, x, *args, **kwargs):
        seen[block.class_embed].append(x.shape[1])
        return original(block, x, *args, **kwargs)

    monkeypatch.setattr(FlowBlock, "predict_next", spy)
    _, report = flow.decode_with_report(noise(flow), labels(flow), 1.5, method=method)
    assert [(s.sweeps, s.tokens) for s in report] == [(len(passes), sum(passes)) for passes in seen.values()]
    assert len(report) == 3


@all_solvers
@pytest.mark.parametrize("tolerance", [1e-10, 1e-3])
@torch.no_grad()
def test_report_stays_within_its_bounds(solver, tolerance):
    flow = use(random_flow(std=0.05, image_size=16, blocks=2), solver)
    tokens = flow.token_shape[0]
    _, report = flow.decode_with_report(noise(flow), labels(flow), tolerance=tolerance)
    for solved in report:
        assert solved.solver == solver
        assert not solved.fell_back
        assert 1 <= solved.sweeps <= tokens - 1 + solver.draft * decoders.DRAFT_SWEEPS
        assert solved.tokens >= tokens - 1
        assert 0 <= solved.residual <= tolerance
    if solver.method == "sequential":
        assert [(s.sweeps, s.tokens, s.residual) for s in report] == [(tokens - 1, tokens - 1, 0.0)] * 2


@all_solvers
@both_orders
@pytest.mark.parametrize(("tolerance", "scale"), [(1e-10, 0.0), (1e-2, 1.5)])
@torch.no_grad()
def test_residual_bounds_that_of_the_returned_tokens(solver, t, tolerance, scale):
    flow = random_flow(std=0.05, image_size=16, blocks=2)
    z = noise(flow)
    x, solved = solve(causal_map(flow, t, z, Guidance(scale)), solver, tolerance)
    assert true_residual(flow, t, z, x, Guidance(scale)) <= SLACK * solved.residual + 1e-14
    assert solved.residual <= tolerance


@pytest.mark.parametrize("method", ["jacobi", "gauss_seidel"])
@torch.no_grad()
def test_residual_bounds_that_of_the_returned_tokens_where_each_is_ten_times_the_one_before(method):
    flow = elementwise_flow(shift=10.0)
    z = torch.zeros(1, *flow.token_shape, dtype=torch.float64)
    z[:, 0] = 1e-3
    x, solved = solve(causal_map(flow, 1, z), Solver(method), 1e-2)
    assert true_residual(flow, 1, z, x) <= SLACK * solved.residual + 1e-14


@torch.no_grad()
def test_residual_says_how_far_the_last_update_of_jacobi_went():
    flow = elementwise_flow(shift=0.5, image_size=16)
    z = torch.ones(1, *flow.token_shape, dtype=torch.float64)
    _, solved = solve(causal_map(flow, 1, z), Solver("jacobi"), 1e-2)
    assert (solved.sweeps, solved.tokens) == (6, 6 * 63)
    assert solved.residual == pytest.approx(0.5**6 / (2 - 0.5**5), abs=1e-12)  # x = 1 + 1/2 + 1/4 + ...


@parallel_solvers
def test_a_looser_tolerance_takes_no_more_sweeps(solver):
    flow = use(random_flow(std=0.05, image_size=16, blocks=2), solver)
    z, y = noise(flow), labels(flow)
    sweeps = [
        [solved.sweeps for solved in flow.decode_with_report(z, y, tolerance=tolerance)[1]]
        for tolerance in (1e-10, 1e-5, 1e-1)
    ]
    for tight, loose in pairwise(sweeps):
        assert all(a >= b for a, b in zip(tight, loose, strict=True))
    if solver.window != 1 and not solver.draft:
        assert sum(sweeps[0]) > sum(sweeps[-1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_tolerance_comes_with_the_precision(dtype, tolerance):
    assert TOLERANCES[dtype] == tolerance
    flow = random_flow(dtype, std=0.05, image_size=16)
    z, y = noise(flow), labels(flow)
    reports = [flow.decode_with_report(z, y, method="jacobi", tolerance=t)[1] for t in (None, tolerance)]
    assert reports[0] == reports[1]
    assert max(solved.residual for solved in reports[0]) <= tolerance


# ---- where sweeps do not converge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [False, True])
def test_jacobi_that_does_not_converge_falls_back(draft):
    flow = use(random_flow(std=0.3, image_size=16), Solver("jacobi", draft=draft))
    z, y, tokens = noise(flow), labels(flow), flow.token_shape[0]
    x, report = flow.decode_with_report(z, y)
    assert x.isfinite().all()
    assert torch.equal(x, flow.decode(z, y, method="sequential"))
    tried = round(decoders.JACOBI_SHARE * tokens) + draft * decoders.DRAFT_SWEEPS
    for solved in report:
        assert solved.fell_back
        assert solved.residual == 0
        assert (solved.sweeps, solved.tokens) == (tried + tokens - 1, (tried + 1) * (tokens - 1))


@pytest.mark.parametrize("window", [None, 3])
def test_gauss_seidel_that_takes_too_long_goes_on_token_by_token(window, monkeypatch):
    monkeypatch.setattr(decoders, "WORK_LIMIT", 1)
    flow = use(random_flow(std=0.1), Solver("gauss_seidel", window))
    z, y = noise(flow), labels(flow)
    x, report = flow.decode_with_report(z, y)
    assert torch.allclose(x, flow.decode(z, y, method="sequential"), atol=1e-8)
    for solved in report:
        assert solved.fell_back
        assert solved.residual <= 1e-10
        assert solved.sweeps <= N - 1
        assert N - 1 <= solved.tokens <= 3 * N


def test_gauss_seidel_falls_back_within_its_own_limit():
    flow = elementwise_flow(shift=1.0, image_size=16)
    z = noise(flow, 1)
    x, solved = solve(causal_map(flow, 1, z), Solver("gauss_seidel"), 1e-10)
    assert torch.allclose(x, z.cumsum(1), atol=1e-10)
    assert solved.fell_back
    assert solved.tokens <= (decoders.WORK_LIMIT + 2) * 64


@pytest.mark.parametrize("method", ["jacobi", "gauss_seidel"])
def test_sweeps_that_move_nothing_until_the_end_are_exact(method, monkeypatch):
    monkeypatch.setattr(decoders, "JACOBI_SHARE", 1.0)
    flow = elementwise_flow(shift=1.0)
    z = noise(flow)
    x, solved = solve(causal_map(flow, 1, z), Solver(method), 1e-10)
    assert torch.allclose(x, z.cumsum(1), atol=1e-10)
    assert solved.residual <= 1e-10
    assert not solved.fell_back


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@parallel_solvers
def test_an_image_that_is_not_finite_spoils_no_other(solver, bad):
    flow = use(random_flow(std=0.1, blocks=2), solver)
    z, y = noise(flow), labels(flow)
    z[1, 4, 2] = bad
    x, report = flow.decode_with_report(z, y)
    assert not x[1].isfinite().all()
    for row in (slice(0, 1), slice(2, 3)):
        assert torch.allclose(x[row], flow.decode(z[row], y[row], method="sequential"), atol=1e-8)
    for solved in report:
        assert solved.fell_back or solver.method == "gauss_seidel"
        assert solved.sweeps <= 2 * N + decoders.DRAFT_SWEEPS
        assert solved.residual <= 1e-10


@both_orders
@pytest.mark.parametrize("window", [None, 3])
def test_tokens_that_are_not_finite_are_accepted_only_as_exact(t, window):
    flow = random_flow(std=0.1)
    z = noise(flow, 1)
    z[:] = float("nan")
    x, solved = solve(causal_map(flow, t, z), Solver("gauss_seidel", window), 1e-10)
    assert x.isnan().all()
    assert (solved.sweeps, solved.residual) == (N - 1, 0.0)


@both_orders
@pytest.mark.parametrize(
    "solver",
    [
        Solver("sequential"),
        Solver("jacobi"),
        Solver("gauss_seidel"),
        Solver("gauss_seidel", draft=True),
        Solver("gauss_seidel", 4),
    ],
)
def test_tokens_before_one_that_is_not_finite_are_right(t, solver):
    flow = random_flow(std=0.1)
    z = noise(flow, 1)
    expected, _ = solve(causal_map(flow, t, z), Solver("sequential"), 1e-10)
    z[:, N // 2] = float("nan")
    x, _ = solve(causal_map(flow, t, z), solver, 1e-10)
    before = slice(N // 2 + 1, N) if flow.blocks[t - 1].flip else slice(0, N // 2)
    assert torch.allclose(x[:, before], expected[:, before], atol=1e-8)


@pytest.mark.parametrize(
    "solver",
    [
        Solver("sequential"),
        Solver("jacobi"),
        Solver("gauss_seidel", 1),
        Solver("gauss_seidel"),
        Solver("gauss_seidel", 2),
        Solver("gauss_seidel", draft=True),
    ],
)
def test_guesses_that_overflow_do_not_reach_the_images(solver):
    flow = elementwise_flow(log_scale=1.0, log_scale_bound=None, image_size=4)
    z = torch.tensor([-1e3, 1e3, 1.0, 1.0], dtype=torch.float64)[None, :, None].expand(2, 4, 8)
    x, solved = solve(causal_map(flow, 1, z), solver, 1e-10)
    assert torch.allclose(x[0, :, 0], torch.tensor([-1e3, 0, 1, torch.e], dtype=torch.float64), atol=1e-10)
    assert solved.residual <= 1e-10


# ---- known pixels ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0.0, 1.5])
def inpainted(request):
    """A flow, the arguments of decode with known pixels, and the images by definition."""
    flow = random_flow(std=0.1, blocks=2)
    z, y, given = noise(flow), labels(flow), images(flow)
    mask = torch.rand(given.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    with torch.no_grad():
        return flow, (z, y, request.param), (given, mask), slow_decode(flow, z, y, Guidance(request.param), (given, mask))


@all_solvers
def test_known_pixels_stay_and_the_others_follow_from_them(inpainted, solver):
    flow, arguments, (given, mask), expected = inpainted
    x = use(flow, solver).decode(*arguments, known=(given, mask))
    assert torch.equal(x[mask], given[mask])
    assert torch.allclose(x, expected, atol=1e-8)
    assert (x - flow.decode(*arguments))[~mask].abs().max() > 1e-3


@some_solvers
def test_all_pixels_known_are_the_given_images_and_none_the_decoded_ones(solver):
    flow = use(random_flow(std=0.1), solver)
    z, y, given = noise(flow), labels(flow), images(flow)
    everywhere = torch.ones(given.shape, dtype=torch.bool)
    assert torch.equal(flow.decode(z, y, known=(given, everywhere)), given)
    assert torch.equal(flow.decode(z, y, known=(given, ~everywhere)), flow.decode(z, y))


@all_methods
def test_what_known_images_hold_elsewhere_does_not_matter(method):
    flow = random_flow(std=0.1)
    z, y, given = noise(flow), labels(flow), images(flow)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[:, :3] = True
    x = flow.decode(z, y, method=method, known=(given, mask))
    other = torch.where(mask, given, float("nan"))
    assert torch.equal(flow.decode(z, y, method=method, known=(other, mask.expand(3, 1, 6, 6))), x)
    assert torch.equal(x[..., :3], given[..., :3])


# ---- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "newton"}, "decoding method must be one of auto, sequential, jacobi, gauss_seidel, got 'newton'"),
        ({"method": ["jacobi", "newton", "auto"]}, "decoding method must be .*, got 'newton'"),
        ({"method": ["jacobi", "auto"]}, "decoding methods must be one, or one for each of 3 blocks, got 2"),
        ({"method": ["jacobi"] * 4}, "3 blocks, got 4"),
        ({"method": []}, "3 blocks, got 0"),
        ({"tolerance": 0}, "tolerance must be above 0, got 0"),
        ({"tolerance": -1e-3}, r"tolerance must be above 0, got -0\.001"),
        ({"tolerance": float("nan")}, "tolerance must be above 0, got nan"),
        ({"tolerance": float("inf")}, "tolerance must be above 0, got inf"),
        (
            {"known": (torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4, dtype=torch.bool))},
            r"images must .* \[3, 2, 4, 4\]",
        ),
    ],
)
def test_impossible_requests_are_named(arguments, message):
    flow = random_flow()
    with pytest.raises(InputError, match=message):
        flow.decode(noise(flow), **arguments)
