"""The folder that `export` writes: a flow that loads, and a card that says what the run knows and nothing else."""

import http.server
import json
import re
import shutil
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects

from builders import SMALL_RUN, images, labels, random_flow, refuse, tiny_autoencoder
from flowback import InputError, LatentFlow, TarFlow, __version__, classify, from_pretrained
from flowback.cli import main
from flowback.flow.io import check_repo_id
from flowback.latents import load_autoencoder
from flowback.reports.card import Provenance, export, model_card, push_folder
from flowback.runs.checkpoint import State, load_flow
from flowback.runs.config import RunConfig
from flowback.tasks.classify import fit_statistics

ALIGNED = ["--alignment.strategy=reverse", "--alignment.at=[[1,1],[2,1]]", "--alignment.weight=0.25"]
ALIGNED += ["--alignment.projector_width=16", "--alignment.cache=false"]
LATENT = {"image_size": 4, "channels": 3, "patch_size": 2, "width": 32, "blocks": 2, "layers": 1, "num_classes": 10}


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBACK_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", f"--run={folder}", "--train.steps=4", *SMALL_RUN, *ALIGNED]) == 0
    assert main(["evaluate", str(folder), "--metrics=bpd,accuracy,probe", "--images=40"]) == 0
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A run to be changed."""
    return shutil.copytree(run, tmp_path / "copy")


def card_of(run, folder, *options):
    assert main(["export", str(run), str(folder), *options]) == 0
    return (folder / "README.md").read_text(encoding="utf-8")


def two_of(flow):
    return flow.sample(y=[1, 2], seed=0)


def latent_flow(autoencoder):
    """A flow in the latents, 3 x 4 x 4, of an autoencoder in a folder or on the hub."""
    return LatentFlow(random_flow(torch.float32, **LATENT), load_autoencoder(str(autoencoder))).eval()


def front_matter(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)[1])


def rows(card, heading):
    """The cells of the table under a heading."""
    section = re.split(r"^#+ ", card.split(f"# {heading}\n")[1], flags=re.MULTILINE)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"][2:]


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_the_exported_flow_is_the_runs(run, tmp_path, capsys):
    card_of(run, tmp_path / "flow")
    files = {file.name for file in (tmp_path / "flow").iterdir()}
    stored = {"classification.json", "held_out.safetensors"}
    assert files == {"README.md", "config.json", "model.safetensors", "classes.json"} | stored
    loaded, (flow, _) = TarFlow.from_pretrained(tmp_path / "flow"), load_flow(run)
    x, y = images(flow), labels(flow)
    assert torch.equal(loaded.encode(x, y)[0], flow.encode(x, y)[0])
    assert torch.equal(classify(loaded, x), classify(flow, x))  # by the same statistics
    for source in (run, tmp_path / "flow"):
        assert main(["sample", str(source), "--num=4", "--labels=3,7", "-o", str(tmp_path / f"{source.name}.png")]) == 0
    assert (tmp_path / "flow.png").read_bytes() == (tmp_path / "digits.png").read_bytes()


def test_raw_weights_have_no_statistics_of_the_averaged_ones(run, tmp_path):
    card = card_of(run, tmp_path / "flow", "--weights=raw")
    assert "raw weights of step_00000004" in card
    assert "Not evaluated.\nWhat the run measured is of its ema weights of step_00000004" in card
    assert "### Density" not in card
    assert not (tmp_path / "flow" / "classification.json").exists()
    assert not (tmp_path / "flow" / "held_out.safetensors").exists()
    raw = load_flow(run, "raw")[0].state_dict()
    loaded = TarFlow.from_pretrained(tmp_path / "flow").state_dict()
    assert all(torch.equal(loaded[name], raw[name]) for name in raw)


def test_timings_of_decoders_go_along(copy, tmp_path):
    assert main(["autotune", str(copy), "--rows=1"]) == 0
    card_of(copy, tmp_path / "flow")
    assert TarFlow.from_pretrained(tmp_path / "flow").autotune == load_flow(copy)[0].core.autotune is not None


def test_a_local_autoencoder_travels(tmp_path):
    flow = latent_flow(tiny_autoencoder(tmp_path / "vae"))
    flow.save_pretrained(tmp_path / "flow")
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    fit_statistics(flow, x).save(tmp_path / "flow")
    card = card_of(tmp_path / "flow", tmp_path / "out")
    assert str(tmp_path) not in card + (tmp_path / "out" / "config.json").read_text()
    for line in ("latents 3 x 4 x 4 of the autoencoder in `autoencoder/`", "with a license of its own"):
        assert line in card
    latents, drawn = flow.to_data(x), two_of(flow)
    scores = classify(from_pretrained(tmp_path / "flow"), x)
    shutil.rmtree(tmp_path / "vae")
    loaded = from_pretrained((tmp_path / "out").rename(tmp_path / "moved"))
    assert torch.equal(loaded.to_data(x), latents)
    assert torch.equal(two_of(loaded), drawn)
    assert torch.equal(classify(loaded, x), scores)  # by shortlist_3, of the statistics beside it


def test_an_autoencoder_of_the_hub_is_copied_if_asked(tmp_path, monkeypatch):
    whole = tmp_path / "hub"
    tiny_autoencoder(whole / "vae")  # in a pipeline
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(whole))
    latent_flow("someone/pipeline").save_pretrained(tmp_path / "flow")
    card = card_of(tmp_path / "flow", tmp_path / "without")
    assert not (tmp_path / "without" / "autoencoder").exists()
    assert "of `someone/pipeline`" in card
    assert "no part of this folder" in card
    card_of(tmp_path / "flow", tmp_path / "with", "--with-autoencoder")
    names = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(file.name for file in (tmp_path / "with" / "autoencoder").iterdir()) == names
    monkeypatch.undo()
    assert from_pretrained(tmp_path / "with").sample(y=[1]).shape == (1, 1, 8, 8)


def test_another_autoencoder_than_that_of_the_training_is_refused(tmp_path):
    flow = latent_flow(tiny_autoencoder(tmp_path / "vae"))
    flow.save_pretrained(tmp_path / "flow")
    other = tiny_autoencoder(tmp_path / "other", seed=1)
    config = json.loads((tmp_path / "flow" / "config.json").read_text())
    (tmp_path / "flow" / "config.json").write_text(
        json.dumps(config | {"autoencoder": config["autoencoder"] | {"name": str(other)}})
    )
    with pytest.raises(InputError, match="in whose latents the flow was trained"):
        export(str(tmp_path / "flow"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the card -------------------------------------------------------------------------------------------------------


def test_the_front_matter_says_what_is_known(run, tmp_path):
    front = front_matter(card_of(run, tmp_path / "flow", "--license=apache-2.0"))
    assert (front["library_name"], front["license"]) == ("flowback", "apache-2.0")
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert {"normalizing-flow", "class-conditional", "representation-alignment"} <= set(front["tags"])
    assert "latent" not in front["tags"]
    assert "datasets" not in front
    data = huggingface_hub.ModelCard((tmp_path / "flow" / "README.md").read_text(), ignore_metadata_errors=False).data
    assert data.license == "apache-2.0"


def test_a_licence_is_not_guessed(run, tmp_path):
    card = card_of(run, tmp_path / "flow")
    assert "license" not in front_matter(card)
    assert "No license was given" in card


@pytest.mark.parametrize(
    ("name", "classes", "datasets"),
    [
        ("fashion_mnist", 10, ["zalando-datasets/fashion_mnist"]),
        ("imagenet", 1000, ["ILSVRC/imagenet-1k"]),
        ("imagenet", 10, None),
        ("folder", 10, None),
    ],
)
def test_only_public_data_is_named_to_the_hub(name, classes, datasets):
    config = RunConfig.from_yaml(RunConfig().to_yaml().replace("name: digits", f"name: {name}"))
    card = model_card(random_flow(num_classes=classes), "a", Provenance(config=config, state=State()))
    assert front_matter(card).get("datasets") == datasets
    assert ("These are somebody's own images" in card) == (name == "folder")
    assert "the number of its images is not known" in card


def test_the_card_describes_flow_data_training_and_alignment(run, tmp_path):
    card = card_of(run, tmp_path / "flow")
    flow, _ = load_flow(run)
    state = json.loads((run / "checkpoints" / "step_00000004" / "state.json").read_text())
    facts = dict(rows(card, "The flow")) | dict(rows(card, "Training")) | dict(rows(card, "Alignment"))
    assert facts["parameters"] == f"{sum(p.numel() for p in flow.parameters()):,}"
    assert (facts["blocks"], facts["layers in a block"], facts["tokens"][:16]) == ("2", "1", "4 of 16 numbers ")
    assert facts["noise of training"] == "gaussian, standard deviation 0.2"
    assert facts["weights"] == "ema weights of step_00000004"
    assert facts["steps"].startswith("4 of 4 that were planned, 0 skipped")
    assert (facts["batch"], facts["EMA of the weights"], facts["seed"]) == ("16 images", "0.999", "0")
    assert facts["learning rate"].startswith("0.001, after a warm-up of 2 steps")
    assert facts["seconds of training"].startswith(f"{state['seconds']:.1f}, ")
    assert (facts["strategy"], facts["gradient"], facts["weight"]) == ("reverse", "one_step", "0.25")
    assert facts["pairs, counted from 1"] == "block 1 layer 1, block 2 layer 1"
    assert facts["encoder"] == "`efficientnet_lite0`"
    assert "`digits`: 64 images for training, 359 held out" in card
    assert "Classes, by number from 0: `0`, `1`, `2`," in card
    assert f"flowback {__version__}" in card
    assert str(run.parent) not in card


def test_every_figure_stands_with_what_it_holds_for(copy, tmp_path):
    found = json.loads((copy / "evaluation.json").read_text())
    found["classification"][0]["images"] = 39
    (copy / "evaluation.json").write_text(json.dumps(found))
    card = card_of(copy, tmp_path / "flow")
    weights = "ema weights of step_00000004"
    assert (
        f"Of 40 held-out images of `digits` where nothing else is said, with {weights}, measured on\n{found['machine']}"
        in card
    )
    assert rows(card, "Density") == [
        ["nats per dimension, of images with the noise of training", f"{found['nats_per_dim']:.4g}"],
        ["bits per dimension of the pixels: an upper bound", f"{found['bits_per_dim']:.4g}"],
        [
            "bits per dimension of the pixels: a tighter upper bound, importance-weighted",
            f"{found['bits_per_dim_importance_weighted']:.4g}",
        ],
    ]
    assert found["density"] in card
    numbers = ("seconds_per_image", "ece_before", "ece_after", "temperature")
    assert rows(card, "Classification") == [
        [row["rule"], f"{100 * row['accuracy']:.1f} %", str(row["images"]), str(row["passes"])]
        + [f"{row[name]:.4g}" for name in numbers]
        for row in found["classification"]
    ]
    assert len(found["classification"]) == 6
    assert "1 draw of the training noise" in card
    probes = [[str(row["block"]), str(row["layer"]), f"{100 * row['accuracy']:.1f} %"] for row in found["probe"]]
    assert rows(card, "Linear probes") == probes
    for metric, seconds in found["seconds_of_measuring"].items():
        assert f"{seconds} s ({metric})" in card
    assert "Not evaluated" not in card


def test_fidelity_carries_extractor_samples_reference_and_guidance(copy, tmp_path):
    """Real figures of this kind take an extractor and samples; the card only prints what is there."""
    file = copy / "evaluation.json"
    reference = {"reference": "digits-train-12-8-abc", "reference_images": 12, "extractor": "efficientnet_lite0"}
    drawn = {
        "fid": 123.456,
        "kid": 0.25,
        "kid_std": 0.0125,
        "samples": 12,
        "guidance": 1.5,
        "samples_from": "drawn with seed 3",
    }
    disk = {"precision": 0.5, "samples": 10, "guidance": None, "samples_from": "elsewhere/secret/pngs"}
    found = json.loads(file.read_text()) | {"fidelity": drawn | reference, "guidance_sweep": [disk | reference]}
    file.write_text(json.dumps(found))
    card = card_of(copy, tmp_path / "flow")
    same = ["12", "`digits-train-12-8-abc`"]
    assert rows(card, "Fidelity") == [
        ["FID", "123.5", "1.5", "efficientnet_lite0", "12", *same, "drawn with seed 3"],
        ["KID", "0.25 ± 0.0125", "1.5", "efficientnet_lite0", "12", *same, "drawn with seed 3"],
        ["precision", "0.5", "not known", "efficientnet_lite0", "10", *same, "pngs"],
    ]
    assert "secret" not in card


def test_latent_bits_are_called_so(tmp_path):
    vae = tiny_autoencoder(tmp_path / "somebody" / "vae")
    flow = latent_flow(vae)
    evaluation = {
        "nats_per_dim": 0.5,
        "latent_bits_per_dim": 0.75,
        "held_out_images": 5,
        "data": "digits",
        "weights": "ema",
    }
    evaluation["density"] = f"nats and bits of the latents of {vae.resolve()} with noise 0.2, not of pixels"
    card = model_card(flow, "a", Provenance(evaluation=evaluation), travels=True)
    assert rows(card, "Density") == [
        ["nats per dimension, of latents with the noise of training", "0.5"],
        ["latent bits per dimension: of noised latents, not of pixels", "0.75"],
    ]
    assert "of the autoencoder in `autoencoder/` with noise 0.2, not of pixels" in card
    assert "somebody/vae" not in card


def test_accuracies_without_their_costs_are_printed_all_the_same():
    evaluation = {"accuracy": {"exact": 0.5}, "noise_draws": 4, "held_out_images": 5, "data": "digits", "weights": "ema"}
    card = model_card(random_flow(), "a", Provenance(evaluation=evaluation))
    assert rows(card, "Classification") == [["exact", "50.0 %", *["-"] * 6]]
    assert "4 draws of the training noise\nare averaged" in card


def test_what_is_not_known_is_called_so(copy, run, tmp_path):
    (copy / "evaluation.json").unlink()
    card = card_of(copy, tmp_path / "run")
    assert "Not evaluated.\n" in card
    assert rows(card, "Training")
    card = card_of(run / "checkpoints" / "step_00000004", tmp_path / "checkpoint")
    assert "without the run that trained it" in card
    assert "Not evaluated, as far as this flow's folder says." in card
    assert "The names of the classes are not known" in card
    assert "not known which" in card
    assert "digits" not in card
    assert not (tmp_path / "checkpoint" / "classes.json").exists()
    card_of(tmp_path / "run", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "classes.json").read_text()) == [str(k) for k in range(10)]


def test_names_of_classes_are_no_markdown_and_many_are_not_listed():
    card = model_card(random_flow(num_classes=2), "a", Provenance(classes=["<b>`x`", "a\n# b"]))
    assert "by number from 0: `<b>'x'`, `a # b`." in card
    card = model_card(random_flow(num_classes=30), "a", Provenance(classes=["gadget"] * 30))
    assert "gadget" not in card
    assert "are in `classes.json`" in card


@pytest.mark.parametrize("classes", [0, 1, 10])
def test_the_code_of_the_card_runs(classes, tmp_path, monkeypatch):
    flow = random_flow(torch.float32, num_classes=classes)
    flow.save_pretrained(tmp_path / "some flow")
    (block,) = re.findall(r"```python\n(.*?)```", model_card(flow, "some flow"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["x"].shape == (2, 2, 6, 6)
    assert names["z"].shape == (2, *flow.token_shape)
    assert names["log_prob"].shape == (2,)
    assert ("scores" in names) == (classes > 0)


# ---- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: uploads and downloads keep to the patterns that they are given, as the real client does."""

    class Api:
        def __init__(self, token=None):
            asked.token = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok
            asked.private.setdefault(repo_id, bool(private))
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return f"https://hub/{repo_id}"

        def model_info(self, repo_id):
            return SimpleNamespace(private=asked.private[repo_id])

        def upload_folder(self, repo_id, folder_path, allow_patterns, delete_patterns, commit_message):
            for name in filter_repo_objects(files(root / repo_id), allow_patterns=delete_patterns):
                (root / repo_id / name).unlink()
            for name in filter_repo_objects(files(folder_path), allow_patterns=allow_patterns):
                (root / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder_path / name, root / repo_id / name)

    def download(repo_id, allow_patterns, **options):
        for name in filter_repo_objects(files(root / repo_id), allow_patterns=allow_patterns):
            (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / repo_id / name, tmp_path / "snapshot" / name)
        return str(tmp_path / "snapshot")

    root, asked = tmp_path / "hub", SimpleNamespace(token=None, private={}, root=tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def files(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_a_pushed_run_loads_by_its_name(run, hub, tmp_path, capsys):
    card = card_of(run, tmp_path / "flow", "--push=some-one/my.flow_2", "--private")
    assert "uploaded to https://hub/some-one/my.flow_2" in capsys.readouterr().out
    assert 'from_pretrained("some-one/my.flow_2")' in card
    assert "\n# my.flow_2\n" in card
    assert hub.private == {"some-one/my.flow_2": True}
    assert files(hub.root / "some-one" / "my.flow_2") == files(tmp_path / "flow")
    loaded, (flow, _) = TarFlow.from_pretrained("some-one/my.flow_2"), load_flow(run)
    assert torch.equal(classify(loaded, images(flow)), classify(flow, images(flow)))


def test_a_flow_of_the_hub_is_exported_with_its_classes_and_statistics(run, hub, tmp_path):
    card_of(run, tmp_path / "flow", "--push=some/flow")
    card_of("some/flow", tmp_path / "again")
    for name in ("classes.json", "classification.json", "config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "flow" / name).read_text()


def test_a_flow_in_memory_is_pushed_with_its_autoencoder(hub, tmp_path):
    flow = latent_flow(tiny_autoencoder(tmp_path / "vae"))
    assert flow.push_to_hub("some/flow", token="hf_x") == "https://hub/some/flow"
    assert (hub.token, hub.private) == ("hf_x", {"some/flow": False})
    assert "library_name: flowback" in (hub.root / "some" / "flow" / "README.md").read_text()
    drawn = two_of(flow)
    shutil.rmtree(tmp_path / "vae")
    assert torch.equal(two_of(from_pretrained("some/flow")), drawn)


def test_only_the_flows_files_go_up_and_those_of_an_earlier_flow_are_gone(run, hub, tmp_path):
    card_of(run, tmp_path / "flow", "--push=some/flow")
    remote = hub.root / "some" / "flow"
    (remote / "notes.md").write_text("mine")
    push_folder(run / "checkpoints" / "step_00000004", "some/flow")
    kept = ["README.md", "classification.json", "config.json", "held_out.safetensors", "model.safetensors", "notes.md"]
    assert files(remote) == kept  # no training.safetensors, no classes.json of before
    random_flow().push_to_hub("some/flow")
    assert files(remote) == [name for name in kept if name not in ("classification.json", "held_out.safetensors")]


def test_a_public_repository_is_not_taken_for_a_private_one(hub):
    flow = random_flow()
    flow.push_to_hub("some/flow")
    (hub.root / "some" / "flow" / "config.json").unlink()
    with pytest.raises(InputError, match=r"did not take some/flow \(it is there already, and public\)"):
        flow.push_to_hub("some/flow", private=True)
    assert "config.json" not in files(hub.root / "some" / "flow")


def test_offline_is_one_sentence_and_the_folder_stays(run, tmp_path, capsys):
    line = refuse(["export", str(run), str(tmp_path / "flow"), "--push=some/flow"], capsys)
    assert "the hub did not take some/flow (Cannot reach https://huggingface.co" in line
    assert f"this sends the folder later: hf upload some/flow {tmp_path / 'flow'}" in line
    assert TarFlow.from_pretrained(tmp_path / "flow").num_classes == 10
    with pytest.raises(InputError, match="did not take some/flow") as caught:
        random_flow().push_to_hub("some/flow")
    assert "hf upload" not in str(caught.value)


@contextmanager
def answering(status, text):
    """A server that answers every request alike."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.dumps({"error": text}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [401, 403])
def test_what_the_hub_says_is_passed_on_in_one_line(status, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with answering(status, "You may not write there.") as endpoint:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        with pytest.raises(InputError, match=r"did not take some/flow \(You may not write there\); it needs") as caught:
            random_flow().push_to_hub("some/flow", token="hf_secret")
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["flow", "a/b/c", "some/flow.git", "some/a--b", "some/", "/flow", "some/my flow", "some/-x", ""]
)
def test_names_that_are_none_on_the_hub_are_refused(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match="expected owner/name"):
        random_flow().push_to_hub(name)
    check_repo_id("some-one/my.flow_2")


def test_a_folder_without_a_flow_is_not_pushed(tmp_path):
    with pytest.raises(InputError, match=r"holds no readable config\.json"):
        push_folder(tmp_path, "some/flow")
