"""Guides by gradient on tiny real parts: CLIP and a classifier, their folders, and the pipeline."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WINDOW, tiny_bundle, tiny_classifier, tiny_clip_of_pictures, vae_of
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from latentdiff import PAG, Classifier, ClassifierGuide, Clip, ClipGuide, LatentDiffusionPipeline
from latentdiff.diffusion.denoiser import Estimate
from latentdiff.diffusion.edits import Edit
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.editing import RunContext
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.classifier import LatentClassifier
from latentdiff.pictures import to_pil

BUNDLE = tiny_bundle()
PROMPTS = ["a red heart", "a sad dog"]


CLIP, CLASSIFIER = tiny_clip_of_pictures(), tiny_classifier()


def draw(*edits: Edit | str, **arguments: Any) -> Tensor:
    settings = {"num_inference_steps": 3, "seed": 0, "output_type": "latent", "progress": False}
    pipe = LatentDiffusionPipeline(BUNDLE)
    return pipe(PROMPTS, edits=edits, **(settings | arguments)).images


class Exact(DiffusersAutoencoder):
    """Without scale, and without the step down to float32."""

    def decode(self, latents: Tensor) -> Tensor:
        decode: Any = self.module.decode
        return decode(latents).sample


@pytest.mark.parametrize("through", [False, True])
def test_the_gradient_of_clip_is_that_of_finite_differences(through: bool) -> None:
    """Through the decoder, and through a denoiser, in float64 and with the networks' own parts."""
    clip = Clip(tiny_clip_of_pictures().model.double(), CLIP.tokenizer)
    autoencoder = Exact(vae_of(tiny_bundle()).double())
    level = BUNDLE.process.level(400.0)
    context = RunContext(16, 16, autoencoder, ["a red heart"])
    guide, finish = ClipGuide(clip, scale=2.0, through=through).bind(context)
    x = NoiseStreams(0, count=1).draw((4, 8, 8)).double()

    def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
        return Estimate(torch.tanh(1.5 * x))

    shift = (guide.denoiser(denoise)(x, level).x0 - denoise(x, level).x0)[0]
    assert torch.equal(finish(x), x)
    texts = clip.texts(["a red heart"])
    spot = torch.zeros_like(x)
    for channel, row, column in ((0, 0, 0), (1, 3, 5), (3, 7, 2)):
        spot.zero_()[0, channel, row, column] = 1e-5
        ends = []
        for sign in (1, -1):
            there = denoise(x + sign * spot, level).x0
            x0 = there if through else denoise(x, level).x0 + sign * spot
            ends.append(clip.temperature * clip.score(autoencoder.decode(x0), texts).item())
        slope = (ends[0] - ends[1]) / 2e-5
        power = level.alpha if through else level.alpha**2 + level.sigma**2
        expected = 2.0 * level.sigma**2 / power * slope
        assert abs(shift[channel, row, column].item() - expected) < 1e-6 + 1e-5 * abs(expected)


def test_clip_is_transformers_clip_and_its_processor(tmp_path: Path) -> None:
    CLIP.save(tmp_path / "clip")
    theirs: Any = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    look = CLIPImageProcessorPil.from_pretrained(tmp_path / "clip")
    ours = Clip.load(tmp_path / "clip")
    for shape in ((3, 12, 12), (3, 24, 36), (3, 7, 9)):
        pixels = NoiseStreams(5, count=2).draw(shape).clamp(-1, 1) * 0.4
        pictures = [to_pil(picture) for picture in pixels]
        seen = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
        words = tokenizer(PROMPTS, padding="max_length", max_length=WINDOW, return_tensors="pt")
        with torch.no_grad():
            output = theirs(pixel_values=look(pictures, return_tensors="pt").pixel_values, **words)
            got = ours.pictures(seen / 127.5 - 1) @ ours.texts(PROMPTS).T
        # Their processor rounds to whole values after it resizes; ours must not. Half a grey value
        # moves these logits by up to 0.03, another filter by 0.18 and more.
        close = 1e-5 if shape[1] == 12 else 0.04
        torch.testing.assert_close(
            got * ours.temperature, output.logits_per_image, atol=close, rtol=0
        )


def test_a_classifier_survives_its_folder(tmp_path: Path) -> None:
    again = Classifier.load(CLASSIFIER.save(tmp_path / "classifier"))
    assert again.labels == CLASSIFIER.labels
    level, x = BUNDLE.process.level(300.0), NoiseStreams(0, count=3).draw((4, 8, 8))
    places = again.places(["cat", "heart", "heart"])
    got = again.log_probability(x, level, places)
    assert torch.equal(got, CLASSIFIER.log_probability(x, level, places))
    every = [again.log_probability(x, level, torch.full((3,), k)).exp() for k in range(3)]
    torch.testing.assert_close(sum(every), torch.ones(3))


def test_both_steer_the_pipeline_up_their_score_beside_everything_else(tmp_path: Path) -> None:
    plain = draw()
    assert torch.equal(draw(ClipGuide(CLIP, 0.0), ClassifierGuide(CLASSIFIER, "cat", 0.0)), plain)

    def clip_score(latents: Tensor) -> Tensor:
        return CLIP.score(BUNDLE.autoencoder.decode(latents), CLIP.texts(PROMPTS))

    for through in (False, True):
        steered = draw(ClipGuide(CLIP, 3.0, through=through))
        assert (clip_score(steered) > clip_score(plain)).all()
    level, places = BUNDLE.process.level(0.0), CLASSIFIER.places(["heart", "cat"])
    labelled = draw(ClassifierGuide(CLASSIFIER, ["heart", "cat"], 20.0))
    gain = CLASSIFIER.log_probability(labelled, level, places)
    assert (gain > CLASSIFIER.log_probability(plain, level, places)).all()

    CLIP.save(tmp_path / "clip")
    CLASSIFIER.save(tmp_path / "c")
    named = (f"clip:3:{tmp_path}/clip", f"classifier:2:{tmp_path}/c:cat", "pag:2")
    values = (ClipGuide(CLIP, 3.0), ClassifierGuide(CLASSIFIER, "cat", 2.0), PAG(2.0))
    together = {"solver": "heun", "guidance": "apg", "guidance_scale": 3.0}
    assert torch.equal(draw(*named, **together), draw(*values, **together))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"image_std": [0.5, 0, 0.5]}, "image_std must be three numbers"),
        ({"model_type": "t5"}, "no CLIP"),
        ({"vision_config": {"hidden_size": 32}}, "vision_model"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "not a sensible value"),
        ({"vision_config": 3}, "describes no"),
    ],
)
def test_a_bad_clip_folder_is_told(damage: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = CLIP.save(tmp_path / "clip")
    path = folder / ("preprocessor_config.json" if "image_std" in damage else "config.json")
    config = json.loads(path.read_text())
    for key, value in damage.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        Clip.load(folder)


def test_bad_guides_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        draw(f"clip:3:{tmp_path}")
    with pytest.raises(UserError, match="unknown label 'kat': did you mean 'cat'"):
        draw(ClassifierGuide(CLASSIFIER, "kat"))
    with pytest.raises(UserError, match="3 labels were given for 2"):
        draw(ClassifierGuide(CLASSIFIER, ["cat"] * 3))
    other = Classifier(LatentClassifier(3, ["cat"], 8))
    with pytest.raises(UserError, match="latents of 3 channels, but the model's have 4"):
        draw(ClassifierGuide(other, "cat"))
    for text in ("clip:3", "clip::x", "classifier:3:folder", "pag:inf", "seg:1:2"):
        with pytest.raises(UserError, match="a guide reads"):
            draw(text)
    with torch.no_grad():
        ready = BUNDLE.conditioner.encode(PROMPTS, BUNDLE.size).condition
    pipe, quick = LatentDiffusionPipeline(BUNDLE), {"num_inference_steps": 1, "progress": False}
    with pytest.raises(UserError, match="needs a prompt in words, or a text of its own"):
        pipe(prompt_embeds=ready, edits=[ClipGuide(CLIP)], **quick)
    pipe(prompt_embeds=ready, edits=[ClipGuide(CLIP, text="a cat")], **quick)
    x, level = torch.zeros(1, 4, 8, 8), BUNDLE.process.level(300.0)
    with pytest.raises(UserError, match="run it in the pipeline"):
        ClipGuide(CLIP).denoiser(lambda x, level: Estimate(x))(x, level)
    folder = CLASSIFIER.save(tmp_path / "c")
    (folder / "config.json").write_text('{"_class_name": "LatentClassifier", "labels": ["a"]}')
    with pytest.raises(UserError, match=str(folder)):
        Classifier.load(folder)
