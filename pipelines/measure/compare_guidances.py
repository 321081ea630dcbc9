r"""Draw the same prompts and seeds under guides of several strengths, and measure what each does.

    python pipelines/measure/compare_guidances.py --clip runs/emoji64-clip/model \
        --classifier runs/emoji64-classifier/model

For every setting: CLIP's cosine of picture and prompt, the probability that the classifier gives
the emoji's own label on the finished latents, and how many pictures have as their nearest real one
the emoji that was asked for. The first two are also what the guides climb; the third is not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

from latentdiff.data.examples import Example, load_pictures
from latentdiff.data.folder import read_folder
from latentdiff.diffusion.edits import Edit
from latentdiff.errors import UserError
from latentdiff.guidance import PAG, SEG, Classifier, ClassifierGuide, Clip, ClipGuide
from latentdiff.metrics.nearest import blurred_thumbnails, nearest
from latentdiff.pictures import grid, save_png, to_pil
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.random_numbers import philox
from latentdiff.registry import check_name


def settings(clip: Clip, classifier: Classifier, labels: list[str]) -> dict[str, list[Edit]]:
    """The guidances to compare, by their names in the table."""
    return {
        "none": [],
        "CLIP 0.3": [ClipGuide(clip, 0.3)],
        "CLIP 1": [ClipGuide(clip, 1.0)],
        "CLIP 3": [ClipGuide(clip, 3.0)],
        "CLIP 1, through": [ClipGuide(clip, 1.0, through=True)],
        "classifier 1": [ClassifierGuide(classifier, labels, 1.0)],
        "classifier 5": [ClassifierGuide(classifier, labels, 5.0)],
        "PAG 1": [PAG(1.0)],
        "SEG 1": [SEG(1.0)],
    }


def main(
    clip: Annotated[Path, typer.Option(help="Folder of a CLIP.")],
    classifier: Annotated[Path, typer.Option(help="Folder of a classifier.")],
    model: Annotated[Path | None, typer.Option(help="Default: the bundled one.")] = None,
    data: Annotated[Path, typer.Option(help="Picture folder.")] = Path("data/emoji128"),
    label: Annotated[
        str, typer.Option(help="Metadata field that the classifier predicts.")
    ] = "group",
    count: Annotated[int, typer.Option(help="How many captions of training pictures.")] = 32,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of captions and noise.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Only these rows of the table.")] = None,
    out: Annotated[Path, typer.Option(help="The grid of pictures.")] = Path("guides.png"),
) -> None:
    """Measure guides on fixed prompts and seeds; prints a Markdown table."""
    try:
        pipe = LatentDiffusionPipeline.from_pretrained(model)
        device = pipe.bundle.device
        parts = Clip.load(clip, device), Classifier.load(classifier, device)
        real = Real(data, pipe.bundle.size[0])
        asked = real.captions(count, seed)
        labels = [str(example.fields[label]) for example in asked]
        table = settings(*parts, labels)
        for name in only or []:
            check_name("row", name, table)
        rows: list[Image.Image] = []
        print("| guide | CLIP's cosine | classifier's probability | shows the asked emoji |")
        print("|---|---|---|---|")
        for name, guides in table.items():
            if only and name not in only:
                continue
            latents = draw(pipe, asked, guides, steps, guidance_scale, seed)
            pictures = pipe.bundle.autoencoder.decode(latents)
            rows += [to_pil(picture) for picture in pictures[:8].cpu()]
            score, sure = scores(*parts, pipe, asked, latents, pictures, labels)
            shown = real.shown(pictures, asked)
            print(f"| {name} | {score:.3f} | {sure:.3f} | {shown} of {count} |", flush=True)
        print(save_png(grid(rows, 8), out))
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def draw(
    pipe: LatentDiffusionPipeline,
    asked: Sequence[Example],
    guides: Sequence[Edit],
    steps: int,
    scale: float,
    seed: int,
) -> Tensor:
    """Latents of a picture for each of the captions."""
    return pipe(
        [example.captions[0] for example in asked],
        num_inference_steps=steps,
        guidance_scale=scale,
        seed=seed,
        edits=guides,
        output_type="latent",
        progress=False,
    ).images


@torch.no_grad()
def scores(
    clip: Clip,
    classifier: Classifier,
    pipe: LatentDiffusionPipeline,
    asked: Sequence[Example],
    latents: Tensor,
    pictures: Tensor,
    labels: Sequence[str],
) -> tuple[float, float]:
    """Mean cosine to the captions, and mean probability of the labels without noise."""
    texts = clip.texts([example.captions[0] for example in asked])
    process = pipe.bundle.process
    level = process.level(process.t_min)
    sure = classifier.log_probability(latents, level, classifier.places(labels)).exp()
    return clip.score(pictures, texts).mean().item(), sure.mean().item()


class Real:
    """The real pictures of a folder, to know a drawn one by."""

    def __init__(self, root: Path, size: int) -> None:
        where = {"style": ("noto",), "split": ("train",), "skin_tone": ("",)}
        self.examples = read_folder(root, where=where)
        pictures = load_pictures(self.examples, size, progress=False)
        self.thumbnails = blurred_thumbnails(pictures)

    def captions(self, count: int, seed: int) -> list[Example]:
        """Pictures whose first captions are asked for."""
        order = philox(seed, 6).permutation(len(self.examples))
        return [self.examples[number] for number in order[:count]]

    def shown(self, pictures: Tensor, asked: Sequence[Example]) -> int:
        """Count the drawn pictures [N, 3, H, W] whose nearest real picture is the one asked for."""
        _, at = nearest(blurred_thumbnails(pictures.clamp(-1, 1)), self.thumbnails)
        return sum(
            self.examples[int(number)] is example for number, example in zip(at, asked, strict=True)
        )


if __name__ == "__main__":
    typer.run(main)
