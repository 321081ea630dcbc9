"""Both stages from nothing on a folder of twelve pictures, stopped and resumed, and badly fed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, picture_folder, script

from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints
from latentdiff.pipeline import LatentDiffusionPipeline

STAGE_1 = {
    "seed": 0,
    "data": {"size": 32, "balance": ["base"], "held_out_fraction": 0.2},
    "model": {"channels": [8, 8, 16], "layers": 1, "latent_channels": 4, "norm_groups": 4},
    "loss": {"adversarial": 0.1, "adversarial_start": 0.5},
    "optim": {"lr": 1e-3, "steps": 6, "warmup": 2, "batch_size": 4, "accumulation": 2},
    "evaluate_every": 3,
    "checkpoint_every": 1,
}
STAGE_2 = {
    "seed": 0,
    "data": {"size": 32, "held_out_fraction": 0.0},
    "unet": {"channels": [64, 64], "attention": [True, False], "head_dim": 16},
    "text": {"vocabulary": 540, "window": 8, "width": 32, "layers": 1, "heads": 2},
    "optim": {"lr": 1e-3, "steps": 6, "warmup": 2, "batch_size": 4, "accumulation": 2},
    "sample_prompts": ["a red disc"],
    "evaluate_every": 6,
    "checkpoint_every": 1,
    "save_dtype": "float32",
}


def run_stage(stage: str, config: dict, folder: Path, *overrides: str, dry: bool = False) -> None:
    """One run of a stage's `main`, as the command line calls it but with errors passed on."""
    module = script(stage)
    kind = {"autoencoder": "AutoencoderConfig", "diffusion": "DiffusionConfig"}[stage]
    path = folder / f"{stage}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    module.train(module.load_config(getattr(module, kind), path, list(overrides)), dry)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture folder and a stage-1 model trained on it for a few steps."""
    folder = tmp_path_factory.mktemp("stages")
    picture_folder(folder / "pictures")
    run_stage("autoencoder", STAGE_1, folder, f"out={folder}/ae", f"data.root={folder}/pictures")
    return folder


def newest(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    return {
        f"{path.stem}/{name}": value
        for path in sorted(checkpoints(run / "checkpoints")[0].glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def test_a_stopped_run_goes_on_to_the_very_same_weights(work: Path) -> None:
    """A real SIGTERM to the real command after its first save, against one whole run."""
    stage, config = "diffusion", {**STAGE_2, "vae": str(work / "ae/vae")}
    whole, parts = work / f"{stage}-whole", work / f"{stage}-parts"
    run_stage(stage, config, work, f"out={whole}", f"data.root={work}/pictures")
    command = [
        *(sys.executable, str(ROOT / f"training/{stage}.py")),
        *("--config", str(work / f"{stage}.yaml")),
        *(f"out={parts}", f"data.root={work}/pictures"),
    ]
    threads = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # sums are split by it
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=threads)
    while first.poll() is None and not checkpoints(parts / "checkpoints"):
        time.sleep(0.005)
    first.terminate()
    errors = first.communicate()[1]
    assert first.returncode == 143, errors
    assert checkpoints(parts / "checkpoints")[0].name < checkpoints(whole / "checkpoints")[0].name
    second = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=threads, check=False
    )
    assert second.returncode == 0, second.stderr
    assert "resuming" in second.stdout + second.stderr
    expected, got = newest(whole), newest(parts)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_stage_1_leaves_standardised_latents_pictures_and_its_config(work: Path) -> None:
    run = work / "ae"
    assert (run / "config.yaml").is_file()
    assert sorted(p.name for p in (run / "pictures").iterdir()) == [
        "reconstructions-00000003.png",
        "reconstructions-00000006.png",
    ]
    scale = json.loads((run / "vae/config.json").read_text())["scaling_factor"]
    assert scale == 1.0
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == 6


def test_stage_2_writes_a_model_that_the_pipeline_opens(work: Path) -> None:
    out = work / "opens"
    run_stage(
        "diffusion",
        {**STAGE_2, "vae": str(work / "ae/vae")},
        work,
        f"out={out}",
        f"data.root={work}/pictures",
    )
    pipe = LatentDiffusionPipeline.from_pretrained(out / "model")
    made = pipe("a red disc", num_inference_steps=2, seed=0, progress=False)
    assert made.images[0].size == (32, 32)
    assert (out / "pictures/samples-00000006.png").is_file()


@pytest.mark.parametrize(
    ("process", "prediction", "times"),
    [
        ("vp-linear", "eps", "uniform"),
        ("vp-cosine-zsnr", "x0", "uniform"),
        ("flow", "flow", "logit-normal"),
    ],
)
def test_stage_2_trains_every_target_and_may_leave_the_tower_as_it_is(
    work: Path, tmp_path: Path, process: str, prediction: str, times: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    gamma = "null" if prediction == "flow" else "5.0"
    shared = [
        f"data.root={work}/pictures",
        f"objective.process={process}",
        f"objective.prediction={prediction}",
        f"objective.times={times}",
        f"objective.min_snr_gamma={gamma}",
        "optim.steps=2",
    ]
    config = {**STAGE_2, "vae": str(work / "ae/vae")}
    run_stage("diffusion", config, work, f"out={first}", *shared)
    frozen = [f"text.pretrained={first}/model", "text.train=false"]
    run_stage("diffusion", config, work, f"out={second}", *shared, *frozen)
    towers = [
        load_file(next((r / "model/text_encoder").glob("*.safetensors"))) for r in (first, second)
    ]
    assert all(torch.equal(value, towers[1][name]) for name, value in towers[0].items())
    pipe = LatentDiffusionPipeline.from_pretrained(second / "model")
    assert pipe.bundle.prediction == prediction
    assert pipe("a red disc", num_inference_steps=2, seed=0, progress=False).nfe == 2


def test_stage_2_learns_variances(work: Path, tmp_path: Path) -> None:
    """Both losses are recorded, v has moved, and the model draws with it and without."""
    where = [f"data.root={work}/pictures", "optim.steps=2", "objective.learned_variance=true"]
    config = {**STAGE_2, "vae": str(work / "ae/vae")}
    run_stage("diffusion", config, work, f"out={tmp_path}/run", *where)
    record = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert record["loss"] > 0.001 * record["bound"] > 0
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "run/model")
    assert pipe.bundle.network.learns_variance
    for solver in ("ddpm", "dpmpp-2m"):
        made = pipe("a red disc", num_inference_steps=2, seed=0, solver=solver, progress=False)
        assert made.images[0].size == (32, 32)
    with pytest.raises(UserError, match="learned_variance needs a discrete process"):
        run_stage("diffusion", config, work, f"out={tmp_path}/no", *where, "objective.process=flow")


def test_stage_2_tells_of_captions_that_are_cut(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**STAGE_2, "vae": str(work / "ae/vae"), "sample_prompts": ["a"]}
    where = [f"out={tmp_path}/run", f"data.root={work}/pictures", "text.window=4"]
    run_stage("diffusion", config, work, *where, dry=True)
    assert "3 captions are longer than the text encoder's window of 4" in capsys.readouterr().out


def test_a_vq_autoencoder_goes_through_both_stages(work: Path, tmp_path: Path) -> None:
    where = [f"data.root={work}/pictures", "optim.steps=2"]
    run_stage("autoencoder", STAGE_1, work, f"out={tmp_path}/ae", "model.kind=vq", *where)
    config = {**STAGE_2, "vae": str(tmp_path / "ae/vae")}
    run_stage("diffusion", config, work, f"out={tmp_path}/run", *where)
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "run/model")
    pictures = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (
        0.1 < pipe.bundle.autoencoder.encode(pictures).std() < 10
    )  # the measured scale is applied
    assert pipe("a red disc", num_inference_steps=2, seed=0, progress=False).nfe == 2


def test_a_dry_run_reads_all_data_steps_once_and_saves_once(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dry"
    run_stage("autoencoder", STAGE_1, work, f"out={out}", f"data.root={work}/pictures", dry=True)
    assert "checkpoints take up to" in capsys.readouterr().out
    assert not list(out.rglob("step-*"))
    assert not list(out.glob(".*.part"))
    assert not (out / "vae").exists()
    kept = (out / "config.yaml").read_text()
    where = [f"out={out}", f"data.root={work}/pictures"]
    run_stage("autoencoder", STAGE_1, work, *where, "optim.lr=0.5", dry=True)
    assert (out / "config.yaml").read_text() == kept
    assert not list(out.glob("*.previous.yaml"))
    broken = picture_folder(tmp_path / "broken")
    (broken / "7.png").write_bytes((broken / "7.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"7\.png"):
        run_stage(
            "autoencoder", STAGE_1, work, f"out={tmp_path}/b", f"data.root={broken}", dry=True
        )


def test_steps_that_are_not_finite_are_skipped_then_end_the_run(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 steps in a row"):
        run_stage(
            "autoencoder",
            STAGE_1,
            work,
            f"out={tmp_path}/nan",
            f"data.root={work}/pictures",
            "optim.lr=1e38",
            "evaluate_every=100",
            "optim.warmup=0",
            "optim.steps=50",
            "max_bad_steps=3",
        )
    tensors = newest(tmp_path / "nan")
    assert tensors


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_users_mistake_is_one_line_and_status_2(stage: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"out: {tmp_path}/out\nvae: none\ndata: {{root: {tmp_path}/none}}\n")
    override = ["vae=x"] if stage == "autoencoder" else []
    done = subprocess.run(
        [sys.executable, str(ROOT / f"training/{stage}.py"), "--config", str(path), *override],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("autoencoder", "data.size=33", r"data\.size=33"),
        ("autoencoder", "out=pictures/run data.root=pictures", "name another with out=DIR"),
        ("autoencoder", "model.norm_groups=5", "model: norm_groups=5"),
        ("autoencoder", "optim.betas=[1.5,0.9]", r"optim\.betas\.0"),
        ("diffusion", "unet.channels=[64]", "unet: channels has 1 levels"),
        ("diffusion", "unet.channels=[64,72]", "unet: channels must be multiples of 32"),
        ("diffusion", "unet.channels=[32,64]", "64 or more: .* would not see the time"),
        ("diffusion", "text.heads=3", "text: heads=3 does not divide width=32"),
        ("diffusion", "text.vocabulary=99", r"text\.vocabulary"),
        ("diffusion", "data.size=33", r"data\.size=33"),
        ("diffusion", "out=pictures/run data.root=pictures", "name another with out=DIR"),
        ("diffusion", "objective.min_snr_gamma=5 objective.prediction=flow", "set it to null"),
    ],
)
def test_a_shape_that_does_not_fit_is_a_line_with_its_key(
    work: Path,
    tmp_path: Path,
    stage: str,
    change: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = STAGE_1 if stage == "autoencoder" else {**STAGE_2, "vae": str(work / "ae/vae")}
    where = f"out={tmp_path}/out", f"data.root={work}/pictures"
    with pytest.raises(UserError, match=told) as error:
        run_stage(stage, config, tmp_path, *where, *change.split())
    assert "\n" not in str(error.value)
