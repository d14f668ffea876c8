"""FID and its kin against torch-fidelity's own, and sFID against its definition, on random weights and small images."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.metrics import calculate_metrics
from torchvision.io import write_png

from flowback import InputError
from flowback.data import DataConfig, load_data
from flowback.measure.extractors import pooled_features, spatial_features
from flowback.measure.fidelity import (
    FolderImages,
    SplitImages,
    Statistics,
    TensorImages,
    check,
    fidelity,
    open_images,
    open_reference,
    reference_of,
)

ALL = ("fid", "is", "kid", "prc")


def pictures(n, seed, channels=3, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBACK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Inception-v3 with random weights that let the image through, and a file of them."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(model.state_dict(), file)
    return model, file


def frechet(a, b):
    """Of features `[n, d]`: with C = A^T A, the trace of sqrt(C1 C2) is the sum of the singular values of A1 A2^T."""
    centred = [(v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (a, b)]
    spread = sum((v**2).sum() for v in centred)
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + spread - 2 * shared


def test_figures_equal_torch_fidelitys_own_on_the_same_two_folders(inception, tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)  # which both resize to
    sets = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for i, image in enumerate(pictures(10, seed)):
            write_png(image, str(folder / f"{i:03d}.png"))
        sets.append(folder)
    own = calculate_metrics(
        input1=str(sets[0]), input2=str(sets[1]), fid=True, isc=True, kid=True, prc=True, cuda=False, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception[1]), kid_subset_size=10,
        feature_layer_prc="2048", save_cpu_ram=True,
    )  # fmt: skip
    ours = fidelity(FolderImages(sets[0]), FolderImages(sets[1]), ALL, "inception", str(inception[1]))
    names = {"fid": "frechet_inception_distance", "is": "inception_score_mean", "kid": "kernel_inception_distance_mean"}
    names |= {"precision": "precision", "recall": "recall"}
    for name, theirs in names.items():
        assert ours[name] == pytest.approx(own[theirs], rel=1e-6, abs=1e-9)
    assert (ours["extractor"], ours["samples"], ours["reference_images"]) == ("inception", 10, 10)


def test_fid_is_the_frechet_distance_of_the_features():
    a, b = TensorImages(pictures(8, 1)), TensorImages(pictures(6, 2) // 2)
    shipped = [pooled_features(images).double().numpy() for images in (a, b)]
    assert shipped[0].shape == (8, 1280)
    assert fidelity(a, b, ("fid",))["fid"] == pytest.approx(frechet(*shipped), rel=1e-3)


def test_sfid_is_the_frechet_distance_of_adms_spatial_features(inception):
    model, file = inception
    a, b = pictures(3, 1), pictures(2, 2) // 2
    seen = [spatial_features(model, part).double().numpy() for part in (a, b)]
    assert [found.shape for found in seen] == [(3, 7 * 17 * 17), (2, 7 * 17 * 17)]
    found = fidelity(TensorImages(a), TensorImages(b), ("sfid",), "inception", str(file))["sfid"]
    assert found == pytest.approx(frechet(*seen), rel=1e-3, abs=1e-6)


def test_spatial_features_are_the_first_channels_of_mixed_6s_first_branch(inception):
    model, _ = inception
    outputs = {}
    handles = [
        model.Mixed_6c.register_forward_hook(lambda m, i, o: outputs.update(before=o)),
        model.Mixed_6d.register_forward_hook(lambda m, i, o: outputs.update(after=o)),
    ]
    features = spatial_features(model, pictures(2, 3))
    for handle in handles:
        handle.remove()
    expected = model.Mixed_6d.branch1x1(outputs["before"])[:, :7]
    assert expected.shape[1:] == (7, 17, 17)
    assert torch.equal(outputs["after"][:, :7], expected)  # the branch comes first in the block's output
    assert torch.allclose(features, expected.flatten(1))
    assert not model.Mixed_6d.branch1x1._forward_hooks


def test_the_reference_is_computed_once(monkeypatch):
    data = load_data(DataConfig(limit=40))
    reference, name = reference_of(data, 6)
    samples = TensorImages(pictures(6, 1, channels=1, size=8))
    first = fidelity(samples, reference, ("fid",), reference_name=name)
    reads = []
    monkeypatch.setattr(SplitImages, "__getitem__", lambda self, i: reads.append(i) or pictures(1, i)[0])
    assert fidelity(samples, reference, ("fid",), reference_name=name)["fid"] == pytest.approx(first["fid"])
    assert len(reads) <= 1  # torch-fidelity looks at one image to see what it is


def test_the_references_name_changes_with_data_size_and_split():
    few, many = load_data(DataConfig(limit=40)), load_data(DataConfig(limit=41))
    names = {reference_of(data, n, train)[1] for data in (few, many) for n in (10, 20) for train in (True, False)}
    assert len(names) == 6  # the held-out images are the same in both


def test_grey_images_of_few_levels_become_colour():
    data = load_data(DataConfig(limit=10))
    images = SplitImages(data.train, data.levels, 4)
    assert len(images) == 4
    assert images[0].shape == (3, 8, 8)
    assert images[0].dtype == torch.uint8
    assert images[0].max() > 200  # 17 levels, spread over 0 … 255


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_as_written(save, tmp_path):
    images = pictures(5, 1).permute(0, 2, 3, 1).numpy()
    save(tmp_path / "samples.npz", images)
    opened = open_images(tmp_path / "samples.npz")
    assert len(opened) == 5
    for i in range(5):
        assert np.array_equal(opened[i].permute(1, 2, 0).numpy(), images[i])


def test_a_stored_npz_is_not_read_into_memory(tmp_path):
    np.savez(tmp_path / "samples.npz", pictures(5, 1).permute(0, 2, 3, 1).numpy())
    assert isinstance(open_images(tmp_path / "samples.npz").images, np.memmap)


def test_files_that_hold_no_samples_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    for name, word in (
        ("empty", "no images"),
        ("text.npz", "no samples"),
        ("other.npz", "no samples"),
        ("none", "no samples"),
    ):
        with pytest.raises(InputError, match=word):
            open_images(tmp_path / name)


class Surprise:
    def __reduce__(self):
        return (print, ("code ran",))


def test_weights_with_code_in_them_are_refused(tmp_path, capsys):
    torch.save({"fc.weight": Surprise()}, tmp_path / "weights.pth")
    images = TensorImages(pictures(3, 1))
    with pytest.raises(InputError, match="hold more than tensors"):
        fidelity(images, images, ("fid",), "inception", str(tmp_path / "weights.pth"))
    assert "code ran" not in capsys.readouterr().out


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    images = TensorImages(pictures(3, 1))
    with pytest.raises(InputError, match="do not fit extractor inception"):
        fidelity(images, images, ("fid",), "inception", str(tmp_path / "weights.pth"))


def test_weights_that_cannot_be_downloaded_are_one_sentence(monkeypatch):
    def offline(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    images = TensorImages(pictures(3, 1))
    with pytest.raises(InputError, match=r"weights of extractor inception cannot be had \(no route\); it needs a network"):
        fidelity(images, images, ("fid",), "inception")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("lpips",)}, "metric must be one of fid, sfid, is, kid, prc, got 'lpips'"),
        ({"extractor": "vgg"}, "extractor must be one of efficientnet_lite0, .*, got 'vgg'"),
        ({"metrics": ("sfid",)}, "sfid is a figure of inception"),
        ({"weights": "nowhere.pth"}, "extractor weights nowhere.pth are not a file"),
    ],
)
def test_impossible_requests_are_named(options, message):
    images = TensorImages(pictures(3, 1))
    with pytest.raises(InputError, match=message):
        fidelity(images, images, **options)


@pytest.mark.parametrize(
    ("metric", "samples", "real", "message"),
    [
        ("fid", 1, 3, "fid needs at least 2 samples, got 1"),
        ("kid", 3, 1, "kid needs at least 2 real images, got 1"),
        ("is", 9, 3, "is needs at least 10 samples, got 9"),
        ("prc", 3, 9, "prc needs at least 4 samples, got 3"),
        ("prc", 9, 3, "prc needs at least 4 real images, got 3"),
    ],
)
def test_too_few_images_for_a_metric_are_refused_before_any_work(metric, samples, real, message):
    with pytest.raises(InputError, match=message):
        check((metric,), "efficientnet_lite0", samples, (16, 16), TensorImages(pictures(real, 1)))


@given(st.integers(4, 30), st.integers(10, 30))
def test_figures_of_as_many_images_as_are_asked_for_are_finite(real, samples):
    a, b = torch.randn(samples, 5), torch.randn(real, 5)
    size = min(samples, real)
    found = isc_features_to_metric(a) | prc_features_to_metric(a, b, verbose=False)
    found |= kid_features_to_metric(a[:size], b[:size], kid_subsets=2, kid_subset_size=size, verbose=False)
    assert all(np.isfinite(value) for value in found.values())


def saved(tmp_path, **arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.linspace(0, 1, 192, dtype=np.float32).reshape(1, 8, 8, 3), r"float32 numbers from 0 to 1, \[1, 8, 8, 3\]"),
        (np.linspace(-1, 1, 192).reshape(1, 8, 8, 3), "float64 numbers from -1 to 1"),
        (
            np.full((2, 3, 8, 8), 9, np.uint8),
            r"\[2, 3, 8, 8\]; expected images: uint8 .*, \[number, height, width, channels",
        ),
        (np.full((2, 8, 8, 2), 9, np.uint8), r"\[2, 8, 8, 2\]; expected images"),
        (np.full((2, 8, 8, 3), 9, np.int64), "int64 numbers from 9 to 9"),
        (np.ones((2, 8, 8, 3), np.uint8), "uint8 numbers from 1 to 1"),  # that were cast from [0, 1]
        (np.zeros((0, 8, 8, 3), np.uint8), "expected"),
        (np.array([print, len], dtype=object), "Object arrays cannot be loaded when allow_pickle=False"),
    ],
)
def test_arrays_that_are_no_images_are_refused_by_name(tmp_path, array, message):
    with pytest.raises(InputError, match=message):
        open_images(saved(tmp_path, arr_0=array))


def test_grey_transparent_and_transposed_arrays_are_read_as_what_they_are(tmp_path):
    rgb = pictures(3, 1).permute(0, 2, 3, 1).numpy()
    columns_first = open_images(saved(tmp_path, arr_0=np.asfortranarray(rgb)))
    assert np.array_equal(columns_first[2].permute(1, 2, 0).numpy(), rgb[2])
    for grey in (rgb[..., 0], rgb[..., :1]):
        assert np.array_equal(open_images(saved(tmp_path, arr_0=grey))[1].numpy(), np.stack([rgb[1, :, :, 0]] * 3))
    half = np.concatenate([rgb, np.where(rgb[..., :1] > 99, 255, 0).astype(np.uint8)], axis=-1)
    found = open_images(saved(tmp_path, arr_0=half))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.where(half[0, :, :, 3:] == 255, rgb[0], 255))
    Image.fromarray(half[0]).save(tmp_path / "a.png")
    assert np.array_equal(open_images(tmp_path)[0].permute(1, 2, 0).numpy(), found)


def test_a_reference_is_a_tree_of_images_of_any_size_read_as_training_data_is(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, size in (("ant/a.PNG", 20), ("b.jpg", 31), (".hidden/c.png", 16)):
        Image.fromarray(pictures(1, 1, size=size)[0].permute(1, 2, 0).numpy()).save(tmp_path / name)
    reference = open_reference(tmp_path, (16, 16))
    assert [image.shape for image in (reference[0], reference[1])] == [(3, 16, 16)] * 2
    assert len(reference) == 2
    with pytest.raises(InputError, match="samples are of 8x8 pixels; expected 16x16, as the reference is"):
        fidelity(TensorImages(pictures(3, 1, size=8)), reference)


def test_adms_statistics_give_the_figures_of_their_images(inception, tmp_path, monkeypatch):
    model, weights = inception
    real, samples = pictures(3, 1), TensorImages(pictures(10, 2))
    spatial = spatial_features(model, real).double().numpy()
    whole = FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)  # to which all images are resized
    pooled = model(real)[0].double().numpy()
    statistics = {"mu": pooled.mean(0), "sigma": np.cov(pooled, rowvar=False)}
    statistics |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
    reference = open_reference(saved(tmp_path, **statistics), (16, 16))
    assert isinstance(reference, Statistics)
    compared = []
    said = {"frechet_inception_distance": 7.0}
    monkeypatch.setattr(
        "torch_fidelity.metric_fid.fid_statistics_to_metric", lambda *pair, **_: compared.extend(pair) or said
    )
    found = fidelity(samples, reference, ("fid", "is"), "inception", str(weights))  # the distance itself takes long
    own = model(pictures(10, 2))[0].double().numpy()
    for known, features in zip(compared, (own, pooled), strict=True):
        assert np.allclose(known["mu"], features.mean(0), atol=1e-5)
        assert np.allclose(known["sigma"], np.cov(features, rowvar=False), atol=1e-4)
    assert (found["fid"], found["reference_images"], np.isfinite(found["is"])) == (7, None, True)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", whole)
    monkeypatch.setattr("flowback.measure.fidelity._against", lambda pair, *_, **__: pair[0])
    sfid = fidelity(TensorImages(real[:2]), reference, ("sfid",), "inception", str(weights))["sfid"]
    assert np.allclose(sfid, spatial.mean(0))
    for metric in ("kid", "prc"):
        with pytest.raises(InputError, match=f"{metric} needs real images; the file of statistics has none"):
            check((metric,), "inception", 12, (16, 16), reference)
    with pytest.raises(InputError, match="statistics of the reference are of inception, not of dinov2"):
        check(("fid",), "dinov2", 12, (16, 16), reference)
    del statistics["mu_s"]
    with pytest.raises(InputError, match="sfid needs mu_s and sigma_s"):
        check(("sfid",), "inception", 12, (16, 16), open_reference(saved(tmp_path, **statistics), (16, 16)))
    with pytest.raises(InputError, match="holds no statistics of ADM's"):
        open_reference(saved(tmp_path, mu=np.zeros(3), sigma=np.zeros((3, 3))), (16, 16))
