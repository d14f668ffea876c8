"""Every strategy against its definition, written down with plain autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from builders import PatchEncoder, flat, gradients, images, labels, normal_, random_flow, relative_error
from flowback.alignment import gradients as strategies
from flowback.alignment.projectors import Projector
from flowback.core.units import nll_per_dim
from flowback.flow.block import FlowBlock
from flowback.flow.transformer import CausalTransformer
from oracle import decode_with_graph

FLOWS = {
    "conditional": {},
    "unconditional": {"num_classes": 0},
    "one number a token": {"image_size": 4, "channels": 1, "patch_size": 1, "num_classes": 2},
    "two by two": {"image_size": 4, "log_scale_bound": None},
    "rotary, gated, of unequal depth": {"positions": "rotary", "mlp": "swiglu", "layers": [2, 3, 2], "image_size": 4},
}
AT = {
    "bottom": [(1, 2)],
    "upper two": [(2, 1), (3, 2)],
    "top": [(3, 1)],
    "several layers, a gap": [(1, 1), (1, 2), (3, 2)],
}
EXACT = "exact"
REVERSE = [0, 1, 2, EXACT, "sequential"]
STRATEGIES = ["forward", "detach", *REVERSE]

flows = pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS)
places = pytest.mark.parametrize("at", AT.values(), ids=AT)
ways = pytest.mark.parametrize("strategy", STRATEGIES)


class Task:
    """A flow, a batch, a projector and targets: all that a strategy needs."""

    def __init__(self, at, **options):
        self.flow, self.at = random_flow(**options), at
        self.x, self.y = images(self.flow), labels(self.flow)
        encoder = PatchEncoder(self.flow)
        self.targets = encoder(self.x.flip(0)).detach()
        self.projector = normal_(Projector(self.flow.config.width, encoder.dim, 8).double(), 0.4)
        self.modules = nn.ModuleDict({"flow": self.flow, "projector": self.projector})
        self.N = self.flow.token_shape[0]

    def align(self, hidden):
        """Equation 5, pair by pair."""
        assert sorted(hidden) == self.at
        cosines = [F.cosine_similarity(self.projector(h), self.targets, dim=-1) for h in hidden.values()]
        return -torch.stack(cosines).mean()

    def run(self, strategy):
        """`L_NF`, `L_align` by the library."""
        arguments = self.flow, self.x, self.y, self.at, self.align
        if strategy == "forward":
            return strategies.forward(*arguments)
        if strategy == "sequential":
            return strategies.sequential(*arguments)
        terms, tolerance = (self.N - 1, 1e-12) if strategy == EXACT else (strategy, 0.0)
        return strategies.isolated(*arguments, None if strategy == "detach" else terms, tolerance)[:2]

    def gradients(self, loss):
        self.modules.zero_grad(set_to_none=True)
        loss.backward()
        return gradients(self.modules)

    # ---- the definitions --------------------------------------------------------------------------------------------

    def encoded(self):
        """`z`, `log_det` and every block's input `xc`, without graph."""
        with torch.no_grad():
            z, log_det, trace = self.flow.encode(self.x, self.y, trace=[])
        return z, log_det, trace.inputs

    def plain_nll(self):
        z, log_det = self.flow.encode(self.x, self.y)
        return z.square().mean() / 2 - log_det.mean() / (z.shape[1] * z.shape[2])

    def features(self, t, tokens):
        layers = [layer for block, layer in self.at if block == t]
        classes = self.flow.class_weights(self.y, len(self.x))
        hidden = self.flow.blocks[t - 1](tokens, classes, hidden=layers).hidden
        return {(t, layer): h for layer, h in hidden.items()}

    def forward_definition(self):
        """On the encode graph."""
        return self.align(self.flow.encode(self.x, self.y, trace=self.at)[2].hidden)

    def detach_definition(self):
        """The aligned blocks once more, each on its detached input."""
        _, _, xc = self.encoded()
        hidden = {}
        for t in sorted({t for t, _ in self.at}):
            hidden |= self.features(t, xc[t])
        return self.align(hidden)

    def unrolled_definition(self, k):
        """Reverse with the decode of every block as `k + 1` parallel sweeps that start at the detached cache.

        k = 0: `x_rev^(t-1) = mu_t(xc^(t-1)) + exp(a_t(xc^(t-1))) x_rev^t`, features from the transformer on `x_rev^(t-1)`.
        Every sweep has the same values, and sends the gradient one more token back.
        """
        z, _, xc = self.encoded()
        classes = self.flow.class_weights(self.y, len(self.x))
        x_rev, hidden = z, {}
        for t in range(len(self.flow.blocks), self.at[0][0] - 1, -1):
            sweep = xc[t]
            for _ in range(k + 1):
                out = self.flow.blocks[t - 1](sweep, classes)
                sweep = out.mu + torch.exp(out.a) * x_rev
            x_rev = sweep
            hidden |= self.features(t, x_rev)
        return self.align(dict(sorted(hidden.items())))

    def decode_definition(self, decode):
        """Reverse by its meaning: autograd through a token-by-token decode of every block."""
        x_rev, hidden = self.encoded()[0], {}
        classes = self.flow.class_weights(self.y, len(self.x))
        for t in range(len(self.flow.blocks), self.at[0][0] - 1, -1):
            x_rev = decode(self.flow.blocks[t - 1], x_rev, classes)
            hidden |= self.features(t, x_rev)
        return self.align(dict(sorted(hidden.items())))


def decode_without_cache(block, z, classes):
    """As `oracle.decode_with_graph`, with all tokens predicted anew for every token."""
    z, tokens = block.reorder(z), torch.zeros_like(z)
    for d in range(z.shape[1]):
        mu, a, _ = block.predict(tokens, classes)
        token = z[:, d] * torch.exp(a[:, d]) + mu[:, d]
        tokens = torch.cat([tokens[:, :d], token[:, None], tokens[:, d + 1 :]], dim=1)
    return block.reorder(tokens)


def assert_same(found, expected, tolerance):
    worst = max(relative_error(found, expected).items(), key=lambda item: item[1])
    assert worst[1] < tolerance, worst


# ---- values, and the likelihood's gradients --------------------------------------------------------------------------


@flows
@places
def test_values_and_likelihood_gradients_are_those_of_the_direct_definition(options, at):
    task = Task(at, **options)
    plain, alignment = task.plain_nll(), task.forward_definition()
    expected = task.gradients(plain)
    for strategy in STRATEGIES:
        l_nf, l_align = task.run(strategy)
        assert l_nf.dim() == l_align.dim() == 0, strategy
        assert abs(l_nf - plain) < 1e-12, strategy
        assert abs(l_align - alignment) < 1e-12, strategy
        assert_same(task.gradients(l_nf), expected, 1e-11)


# ---- gradients ------------------------------------------------------------------------------------------------------


@flows
@places
def test_forward_equals_its_definition(options, at):
    task = Task(at, **options)
    assert_same(task.gradients(task.run("forward")[1]), task.gradients(task.forward_definition()), 1e-10)


@flows
@places
def test_detach_equals_its_definition(options, at):
    task = Task(at, **options)
    assert_same(task.gradients(task.run("detach")[1]), task.gradients(task.detach_definition()), 1e-10)


@flows
@places
@pytest.mark.parametrize("k", [0, 1, 5])
def test_terms_of_the_adjoint_equal_unrolled_sweeps(options, at, k):
    task = Task(at, **options)
    k = min(k, task.N - 1)
    assert_same(task.gradients(task.run(k)[1]), task.gradients(task.unrolled_definition(k)), 1e-10)


@flows
@places
def test_exact_and_sequential_equal_autograd_through_the_decode(options, at):
    task = Task(at, **options)
    expected = task.gradients(task.decode_definition(decode_with_graph))
    for strategy in ("sequential", EXACT, task.N - 1):
        assert_same(task.gradients(task.run(strategy)[1]), expected, 1e-9)


@flows
def test_more_terms_come_closer(options):
    task = Task(AT["bottom"], **options)
    expected = flat(task.gradients(task.run("sequential")[1]))
    errors = [
        ((flat(task.gradients(task.run(k)[1])) - expected).norm() / expected.norm()).item()
        for k in ("detach", 0, 1, task.N // 2, task.N - 1)
    ]
    assert errors[0] > 0.1  # the published recipe is another gradient
    assert errors[1] > 1e-3
    assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-9


@places
def test_projector_gradients_are_equal_in_all_strategies(at):
    task = Task(at)
    expected = task.gradients(task.forward_definition())
    for strategy in STRATEGIES:
        found = task.gradients(task.run(strategy)[1])
        for name in expected:
            if name.startswith("projector"):
                assert torch.allclose(found[name], expected[name], atol=1e-12), (strategy, name)


# ---- who gets a gradient --------------------------------------------------------------------------------------------


def reached(grads):
    """Names of the flow's parameters with a gradient that is not exactly zero."""
    return {name.removeprefix("flow.") for name, g in grads.items() if name.startswith("flow.") and g.abs().max() > 0}


def block_names(flow, t):
    return {name for name, _ in flow.named_parameters() if name.startswith(f"blocks.{t - 1}.")}


@places
@ways
def test_alignment_reaches_the_blocks_of_its_strategy_and_no_other(at, strategy):
    task = Task(at)
    found = reached(task.gradients(task.run(strategy)[1]))
    first, last, T = at[0][0], at[-1][0], len(task.flow.blocks)
    if strategy in REVERSE:
        expected = set().union(*(block_names(task.flow, t) for t in range(first, T + 1)))
    else:
        # up to the aligned layer of an aligned block; with forward, also all of the blocks below the last one
        expected = set()
        for t in range(1, last + 1):
            names = block_names(task.flow, t)
            if strategy == "forward" and t < last:
                expected |= names
            elif deepest := max((layer for block, layer in at if block == t), default=0):
                prefix = f"blocks.{t - 1}."
                after = tuple(f"{prefix}transformer.layers.{i}." for i in range(deepest, task.flow.config.layers))
                expected |= {name for name in names if not name.startswith((*after, f"{prefix}proj_out"))}
    assert found == expected


@flows
@pytest.mark.parametrize("at", [AT["upper two"], AT["top"]], ids=["upper two", "top"])
@pytest.mark.parametrize("strategy", ["detach", 0, 2, EXACT])
def test_below_the_first_aligned_block_the_gradient_is_the_likelihoods_bit_for_bit(options, at, strategy):
    task = Task(at, **options)
    expected = task.gradients(task.plain_nll())
    l_nf, l_align = task.run(strategy)
    found = task.gradients(l_nf + 0.5 * l_align)
    for t in range(1, at[0][0]):
        for name in block_names(task.flow, t):
            assert torch.equal(found[f"flow.{name}"], expected[f"flow.{name}"]), name


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "sequential"])
@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_a_frozen_block_changes_nothing_for_the_others(strategy, frozen):
    task = Task([(2, 1)])
    l_nf, l_align = task.run(strategy)
    expected = task.gradients(l_nf + l_align)
    task.flow.blocks[frozen - 1].requires_grad_(False)
    l_nf, l_align = task.run(strategy)
    found = task.gradients(l_nf + l_align)
    for name in found:
        if name.startswith(f"flow.blocks.{frozen - 1}."):
            assert found[name].abs().max() == 0
        else:
            assert torch.allclose(found[name], expected[name], atol=1e-12), name


# ---- what it costs --------------------------------------------------------------------------------------------------


@places
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "sequential"])
def test_nothing_is_run_forward_twice(at, strategy, monkeypatch):
    task, calls = Task(at), []
    forward = CausalTransformer.forward
    monkeypatch.setattr(CausalTransformer, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    l_nf, l_align = task.run(strategy)
    task.gradients(l_nf + l_align)
    assert len(calls) == len(task.flow.blocks)


def test_terms_taken_are_reported_by_block():
    task = Task(AT["upper two"])

    def taken(terms, tolerance):
        return strategies.isolated(task.flow, task.x, task.y, task.at, task.align, terms, tolerance)[2]

    assert taken(None, 0.0) == {}
    assert taken(0, 0.0) == {2: 0, 3: 0}
    assert taken(3, 0.0) == {2: 3, 3: 3}
    assert taken(8, 1e9) == {2: 0, 3: 0}  # every term is negligible
    some = taken(8, 0.1)
    assert sorted(some) == [2, 3]
    assert all(0 < k < 8 for k in some.values())


def test_a_loose_tolerance_errs_by_about_itself():
    task = Task(AT["bottom"])
    expected = flat(task.gradients(task.run("sequential")[1]))
    for tolerance in (0.1, 1e-3, 1e-6):
        arguments = task.flow, task.x, task.y, task.at, task.align
        l_align = strategies.isolated(*arguments, task.N - 1, tolerance)[1]
        error = (flat(task.gradients(l_align)) - expected).norm() / expected.norm()
        assert error < 10 * tolerance


@ways
def test_a_flow_of_one_token_is_no_special_case(strategy):
    task = Task([(1, 1)], image_size=2)
    l_nf, l_align = task.run(strategy)
    assert_same(task.gradients(l_nf + l_align), task.gradients(task.plain_nll() + task.detach_definition()), 1e-10)


def test_nll_is_the_named_unit():
    task = Task(AT["top"])
    assert torch.equal(task.run("forward")[0], nll_per_dim(*task.flow.encode(task.x, task.y)))


def test_block_decoder_with_a_graph_inverts_the_block_and_has_the_gradient_of_one_without_a_cache():
    task = Task(AT["top"])
    classes = task.flow.class_weights(task.y, len(task.x))
    for block in task.flow.blocks:
        assert isinstance(block, FlowBlock)
        tokens = torch.randn(3, *task.flow.token_shape, dtype=torch.float64)
        z = block(tokens, classes).z.detach().requires_grad_()
        decoded = decode_with_graph(block, z, classes)
        assert torch.allclose(decoded, tokens, atol=1e-10)
        g, inputs = torch.randn_like(tokens), [z, *block.parameters()]
        found, wanted = (torch.autograd.grad(x, inputs, g) for x in (decoded, decode_without_cache(block, z, classes)))
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, wanted, strict=True))
        assert found[0].abs().min() > 0
