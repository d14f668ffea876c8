"""Interpolation, another class, inpainting: exact where they are exact, and the right distribution where they draw."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from builders import images, labels, random_flow
from flowback import InputError, TarFlow
from flowback.core.units import from_levels
from flowback.tasks.editing import inpaint, interpolate, slerp, swap_class

KINDS = {"conditional": {}, "unconditional": {"num_classes": 0}, "one number a token": {"channels": 1, "patch_size": 1}}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def farthest(a, b):
    return (a - b).abs().max().item()


# ---- interpolation --------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("steps", [2, 5])
def test_a_walk_ends_at_the_images_given(options, steps):
    flow = random_flow(**options)
    a, b, y = images(flow), images(flow, seed=2), labels(flow)
    y_b = None if y is None else y.flip(0)
    way = interpolate(flow, a, b, steps, y, y_b)
    assert way.shape == (3, steps, *a.shape[1:])
    assert farthest(way[:, 0], a) < 1e-9
    assert farthest(way[:, -1], b) < 1e-9


def test_a_walk_from_an_image_to_itself_stays_there():
    flow = random_flow()
    x, y = images(flow), labels(flow)
    assert farthest(interpolate(flow, x, x, 4, y, y), x[:, None]) < 1e-9


def test_a_walk_goes_along_the_great_circle_and_leaves_the_ends():
    flow = random_flow()
    a, b, y = images(flow), images(flow, seed=2), torch.tensor([0, 3, -1])
    way = interpolate(flow, a, b, 5, y, y)
    (z_a, _), (z_b, _) = flow.encode(a, y), flow.encode(b, y)
    for k, s in enumerate((0, 0.25, 0.5, 0.75, 1)):
        assert farthest(flow.encode(way[:, k], y)[0], slerp(z_a, z_b, s)) < 1e-8
    assert min(farthest(way[:, 2], a), farthest(way[:, 2], b)) > 0.1


@pytest.mark.parametrize("y_b", [[3, 2, -1], None], ids=["labels", "none"])
def test_classes_move_with_z_by_mixing_their_weights(y_b):
    flow = random_flow()
    a, b, y_a = images(flow), images(flow, seed=2), torch.tensor([0, 1, 2])
    y_b = None if y_b is None else torch.tensor(y_b)
    way = interpolate(flow, a, b, 5, y_a, y_b)
    (z_a, _), (z_b, _) = flow.encode(a, y_a), flow.encode(b, y_b)
    for k in range(5):
        s = k / 4
        weights = (1 - s) * flow.class_weights(y_a, 3) + s * flow.class_weights(y_b, 3)
        assert farthest(flow.encode(way[:, k], weights)[0], slerp(z_a, z_b, s)) < 1e-8
    assert farthest(way[:, 2], flow.decode(slerp(z_a, z_b, 0.5), y_a)) > 1e-3  # the labels do matter


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_a_walk_of_less_than_two_images_is_refused(steps):
    flow = random_flow()
    with pytest.raises(InputError, match=f"^steps must be at least 2, got {steps}$"):
        interpolate(flow, images(flow), images(flow), steps)


def test_a_walk_between_images_of_other_shapes_is_refused():
    flow = random_flow()
    with pytest.raises(InputError, match="x_b must be as many images as x_a, 3, got 2"):
        interpolate(flow, images(flow), images(flow, 2), 3)
    with pytest.raises(InputError, match=r"images must have the shape \[B, 2, 6, 6\], got \[3, 2, 4, 4\]"):
        interpolate(flow, images(flow)[..., :4, :4], images(flow)[..., :4, :4], 3)
    with pytest.raises(InputError, match="label 9 is out of range"):
        interpolate(flow, images(flow), images(flow), 3, torch.tensor([0, 9, 1]))


def two_noises(dtype=torch.float64):
    a, b = torch.randn(2, 4, 9, 3, generator=seeded(3), dtype=torch.float64)
    return a.to(dtype), (1.7 * b).to(dtype)


@pytest.mark.parametrize("s", [0.0, 0.1, 0.5, 0.83, 1.0])
def test_slerp_turns_and_stretches_evenly(s):
    a, b = two_noises()
    point = slerp(a, b, s)
    assert point.shape == a.shape

    def norm(z):
        return z.norm(dim=(1, 2))

    def angle(u, v):
        return torch.acos(((u * v).sum(dim=(1, 2)) / (norm(u) * norm(v))).clamp(-1, 1))

    assert torch.allclose(norm(point), (1 - s) * norm(a) + s * norm(b), rtol=1e-12)
    assert torch.allclose(angle(a, point), s * angle(a, b), atol=1e-6)
    assert torch.allclose(angle(b, point), (1 - s) * angle(a, b), atol=1e-6)
    assert torch.allclose(slerp(b, a, 1 - s), point, atol=1e-12)


def test_slerp_starts_and_ends_where_it_should():
    a, b = two_noises()
    assert torch.allclose(slerp(a, b, 0), a, atol=1e-14)
    assert torch.allclose(slerp(a, b, 1), b, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [0, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2])
def test_slerp_of_nearly_parallel_noises_is_their_mean_nearly(distance, dtype):
    a, b = two_noises(dtype)
    b = a + distance * b
    for s in (0.0, 0.3, 1.0):
        error = farthest(slerp(a, b, s), torch.lerp(a, b, s))
        assert error < 3 * distance**2 + 20 * torch.finfo(dtype).eps


def test_slerp_does_not_mix_the_images_of_a_batch():
    a, b = two_noises()
    assert torch.allclose(slerp(a[1:2], b[1:2], 0.4), slerp(a, b, 0.4)[1:2], atol=1e-14)


# ---- another class --------------------------------------------------------------------------------------------------


@kinds
def test_an_image_swapped_to_its_own_class_is_the_image(options):
    flow = random_flow(**options)
    x, y = images(flow), labels(flow)
    assert farthest(swap_class(flow, x, y, y), x) < 1e-9


def test_a_swapped_image_has_the_same_noise_under_its_new_class():
    flow = random_flow()
    x, y, y_new = images(flow), torch.tensor([0, -1, 2]), torch.tensor([3, 1, 2])
    swapped = swap_class(flow, x, y, y_new)
    assert farthest(flow.encode(swapped, y_new)[0], flow.encode(x, y)[0]) < 1e-9
    moved = (swapped - x).abs().amax(dim=(1, 2, 3))
    assert moved[:2].min() > 1e-3
    assert moved[2] < 1e-9
    assert farthest(swap_class(flow, swapped, y_new, y), x) < 1e-8  # and back


# ---- inpainting: what is kept ---------------------------------------------------------------------------------------


def left_half(flow, n=1):
    mask = torch.zeros(n, 1, *flow.image_size, dtype=torch.bool)
    mask[..., : flow.image_size[1] // 2] = True
    return mask


@kinds
@pytest.mark.parametrize("steps", [0, 3])
def test_pixels_outside_the_mask_are_exactly_as_given(options, steps):
    flow = random_flow(**options, noise_std=0.3)
    x, y, mask = images(flow), labels(flow), left_half(flow)
    result = inpaint(flow, x, mask, y, steps, 2, seeded())
    kept = ~mask.expand_as(x)
    assert result.x.shape == x.shape
    assert torch.equal(result.x[kept], x[kept])
    assert (result.x[~kept] - x[~kept]).abs().min() > 0
    assert result.x.isfinite().all()


@pytest.mark.parametrize("content", [0.0, 5.0, math.nan])
def test_what_the_image_holds_under_the_mask_does_not_matter(content):
    flow = random_flow()
    x, y, mask = images(flow), labels(flow), left_half(flow)
    first = inpaint(flow, x, mask, y, 3, 2, seeded())
    second = inpaint(flow, torch.where(mask, content, x), mask, y, 3, 2, seeded())
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.log_prob, second.log_prob)


def test_an_empty_mask_gives_the_image_back():
    flow = random_flow()
    x = images(flow)
    result = inpaint(flow, x, torch.zeros(1, 1, 6, 6, dtype=torch.bool), labels(flow), 3, 2, seeded())
    assert torch.equal(result.x, x)
    assert farthest(result.log_prob[:, 0], result.log_prob[:, -1]) < 1e-9


def test_the_generator_decides_the_drawing():
    flow = random_flow()
    x, y, mask = images(flow), labels(flow), left_half(flow)
    before = torch.get_rng_state()
    first, second, other = (inpaint(flow, x, mask, y, 4, 2, seeded(s)).x for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert (first - other).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_masks_broadcast_over_images_and_channels():
    flow = random_flow()
    x, y, mask = images(flow), labels(flow), left_half(flow)
    expected = inpaint(flow, x, mask, y, 2, 1, seeded()).x
    for same in (mask[0, 0], mask[0], mask.expand(3, 1, 6, 6), mask.expand_as(x)):
        assert torch.equal(inpaint(flow, x, same, y, 2, 1, seeded()).x, expected)
    one_each = torch.zeros(3, 2, 6, 6, dtype=torch.bool)
    one_each[0, 0, 1, 1] = one_each[1, 1, 4, 2] = True
    changed = inpaint(flow, x, one_each, y, 2, 1, seeded()).x != x
    assert torch.equal(changed, one_each)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_it_says_how_likely_each_step_was(steps):
    flow = random_flow(noise="uniform", levels=2**30)  # hardly any noise
    x, y, mask = images(flow), labels(flow), left_half(flow)
    result = inpaint(flow, x, mask, y, steps, 2, seeded())
    assert result.log_prob.shape == (3, steps + 1)
    assert torch.allclose(result.log_prob[:, -1], flow.log_prob(result.x, y), atol=1e-5)
    assert result.acceptance.shape == (3,)
    if steps:
        moved = (result.log_prob.diff(dim=1) != 0).double().mean(dim=1)
        assert torch.equal(result.acceptance, moved)
    else:
        assert result.acceptance.isnan().all()


def test_the_likeliest_of_several_first_guesses_is_taken():
    flow = random_flow()
    x, y, mask = images(flow), labels(flow), left_half(flow)
    found = torch.stack([inpaint(flow, x, mask, y, 0, tries, seeded()).log_prob[:, 0] for tries in (1, 2, 4, 16)])
    assert (found.diff(dim=0) >= 0).all()
    assert (found[-1] > found[0] + 0.1).all()


def test_no_parameter_gets_a_gradient():
    flow = random_flow(noise_std=0.3)
    result = inpaint(flow, images(flow), left_half(flow), labels(flow), 2, 1, seeded())
    assert not result.x.requires_grad
    assert not result.log_prob.requires_grad
    assert all(p.grad is None for p in flow.parameters())


BAD = [
    ({"steps": -1}, "^steps must be at least 0, got -1$"),
    ({"tries": 0}, "^tries must be at least 1, got 0$"),
    ({"mask": torch.ones(1, 1, 6, 6)}, r"^mask must be boolean .*, got torch\.float32$"),
    ({"mask": torch.ones(1, 1, 6, 6, dtype=torch.uint8)}, r"^mask must be boolean .*, got torch\.uint8$"),
    ({"mask": torch.ones(6, 5, dtype=torch.bool)}, r"^mask must broadcast to .*\[3, 2, 6, 6\], got \[6, 5\]$"),
    ({"mask": torch.ones(3, 3, 6, 6, dtype=torch.bool)}, r"^mask must .*, got \[3, 3, 6, 6\]$"),
    ({"mask": torch.ones(1, 1, 1, 6, 6, dtype=torch.bool)}, "^mask must broadcast"),
    ({"y": torch.tensor([0, 4, 1])}, "label 4 is out of range"),
    ({"x": torch.zeros(3, 2, 5, 5), "mask": torch.ones(5, 5, dtype=torch.bool)}, r"got \[3, 2, 5, 5\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_refused(change, message):
    flow = random_flow()
    good = {"x": images(flow), "mask": left_half(flow), "y": labels(flow), "steps": 1, "tries": 1}
    with pytest.raises(InputError, match=message):
        inpaint(flow, **{**good, **change})


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_edits_work_in_every_mode_and_leave_no_graph(mode):
    flow = random_flow(noise_std=0.3)
    x, y, mask = images(flow), labels(flow), left_half(flow)
    edits = {
        "interpolate": lambda x: interpolate(flow, x, x.flip(0), 3, y, 2),
        "swap": lambda x: swap_class(flow, x, y, 2),
        "inpaint": lambda x: inpaint(flow, x, mask, y, 2, 2, seeded()).x,
    }
    for name, edit in edits.items():
        expected = edit(x)
        with mode():
            found = edit(x.clone())
            assert torch.equal(found, expected), name
        assert not found.requires_grad, name


def test_edits_take_images_of_every_form(tmp_path):
    flow = random_flow(torch.float32, channels=3, image_size=(6, 4))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 3), dtype=np.uint8)
    pictures = [Image.fromarray(image) for image in pixels]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    edits = {
        "interpolate": lambda x: interpolate(flow, x, x, 3, 1, 2),
        "swap": lambda x: swap_class(flow, x, 1, 2),
        "inpaint": lambda x: inpaint(flow, x, left_half(flow), 1, 2, 2, seeded()).x,
    }
    for name, edit in edits.items():
        expected = edit(from_levels(tensor))
        assert expected.shape == ((2, 3, 3, 6, 4) if name == "interpolate" else (2, 3, 6, 4))
        for same in (tensor, pixels, list(pixels), pictures, [tmp_path / "0.png", str(tmp_path / "1.png")]):
            assert torch.equal(edit(same), expected), (name, type(same))
        one = edit(from_levels(tensor[:1]))
        for same in (tensor[0], pixels[0], pictures[0], tmp_path / "0.png"):
            assert torch.equal(edit(same), one), (name, type(same))


# ---- inpainting: what is drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [{"noise": "uniform"}, {"noise_std": 0.5}], ids=["uniform", "gaussian"])
def test_a_flow_that_is_the_identity_draws_its_prior(noise):
    """Whatever else the image holds. Seven of eight guesses thrown away leave too short ones; the steps make that good."""
    flow = TarFlow(image_size=4, channels=1, num_classes=3, patch_size=2, width=8, head_dim=8, blocks=2, layers=1, **noise)
    x, mask = torch.full((600, 1, 4, 4), 0.7), left_half(flow)
    shrink = 1 - noise.get("noise_std", 0) ** 2  # the score step: x + s^2 (-x)

    def drawn(steps):
        result = inpaint(flow, x, mask, torch.arange(600) % 3, steps, 8, seeded())
        numbers = result.x[mask.expand_as(x)] / shrink
        return numbers.mean().item(), numbers.std().item()

    assert drawn(0)[1] < 0.9
    mean, std = drawn(80)
    assert abs(mean) < 4 / math.sqrt(4800)
    assert abs(std - 1) < 4 / math.sqrt(2 * 4800)


class Conditional:
    """The exact conditional density of some pixels of a flow of four numbers, on a grid."""

    def __init__(self, flow, x, y, places):
        self.grid = torch.linspace(-12, 12, 2001 if len(places) == 1 else 401, dtype=torch.float64)
        points = torch.cartesian_prod(*[self.grid] * len(places)).view(-1, len(places))
        many = x.flatten().repeat(len(points), 1)
        many[:, places] = points
        with torch.no_grad():
            log_prob = torch.cat([flow.log_prob(part.view(-1, 1, 2, 2), y) for part in many.split(20000)])
        weights = log_prob.softmax(0).view([len(self.grid)] * len(places))
        self.marginals = [weights] if len(places) == 1 else [weights.sum(dim=1), weights.sum(dim=0)]

    def mean_and_std(self, i):
        mean = (self.marginals[i] * self.grid).sum()
        return mean.item(), ((self.grid - mean).square() * self.marginals[i]).sum().sqrt().item()

    def distance(self, i, draws):
        """Kolmogorov-Smirnov distance, times the root of the number of draws: above 1.95 once in a thousand."""
        centre = self.marginals[i].cumsum(0) - 0.5 * self.marginals[i]
        at = np.interp(draws.sort().values, self.grid, centre)
        n = len(draws)
        steps = np.arange(n + 1) / n
        return math.sqrt(n) * max(np.abs(at - steps[:-1]).max(), np.abs(at - steps[1:]).max())


def four_numbers(blocks):
    options = {"image_size": 2, "channels": 1, "patch_size": 1, "width": 8, "mlp_ratio": 1.0, "layers": 1, "num_classes": 3}
    return random_flow(std=0.25, seed=7, blocks=blocks, noise="uniform", levels=2**16, noise_std=0.5, **options)


def many_drawings(flow, x, places, steps, n=2000):
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    mask.view(-1)[places] = True
    result = inpaint(flow, x.expand(n, 1, 2, 2), mask, torch.full((n,), 1), steps, 1, seeded())
    return result, result.x.flatten(1)[:, places]


IMAGE = torch.tensor([[[[0.4, -0.6], [0.9, 0.1]]]], dtype=torch.float64)


@pytest.mark.parametrize("places", [[0], [1], [3], [0, 2]], ids=str)
def test_steps_draw_from_the_exact_conditional_density(places):
    flow = four_numbers(blocks=2)
    exact = Conditional(flow, IMAGE, torch.tensor(1), places)
    result, draws = many_drawings(flow, IMAGE, places, steps=60)
    assert result.log_prob.shape == (2000, 61)
    assert 0.2 < result.acceptance.mean() < 1
    for i in range(len(places)):
        mean, std = exact.mean_and_std(i)
        assert abs(draws[:, i].mean().item() - mean) < 4 * std / math.sqrt(2000)
        assert abs(draws[:, i].std().item() / std - 1) < 0.1
        assert exact.distance(i, draws[:, i]) < 1.95


@pytest.mark.parametrize("places", [[0], [1]], ids=str)
def test_without_steps_a_flow_of_two_blocks_draws_from_another_density(places):
    """Else the test above would prove nothing."""
    flow = four_numbers(blocks=2)
    exact = Conditional(flow, IMAGE, torch.tensor(1), places)
    assert exact.distance(0, many_drawings(flow, IMAGE, places, steps=0)[1][:, 0]) > 4


def test_one_block_that_reads_the_known_pixels_first_needs_no_steps():
    flow = four_numbers(blocks=1)
    exact = Conditional(flow, IMAGE, torch.tensor(1), [2, 3])
    draws = many_drawings(flow, IMAGE, [2, 3], steps=0)[1]
    assert all(exact.distance(i, draws[:, i]) < 1.95 for i in (0, 1))
    wrong_way = Conditional(flow, IMAGE, torch.tensor(1), [0])
    assert wrong_way.distance(0, many_drawings(flow, IMAGE, [0], steps=0)[1][:, 0]) > 4
