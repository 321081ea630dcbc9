"""Fine-tune a model on a folder of your own pictures.

    accelerate launch training/finetune.py --data DIR --method lora

DIR holds pictures and captions (metadata.jsonl, .csv or .parquet, or a .txt beside each picture),
or pictures alone with --instance-prompt; or it is a parquet file, tar shards, or a folder of them.
They are checked before anything starts. OUT then holds the LoRA file (--method lora), or a model
folder in the diffusers layout. Run the same command again to resume.

Methods: lora (a small file beside the model: styles, subjects), dreambooth (one subject, with
--instance-prompt "a sks dog" --prior-prompt "a dog"), textual-inversion (a new word, --token),
full (every weight of the U-Net).

Everything else is key=value: optim.accumulation=4, objective.offset_noise=0.1 and so on;
docs/finetune.md has it all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.data.check import Checked, check_pictures
from latentdiff.data.folder import list_folder
from latentdiff.data.variants import Size, Variant, variants
from latentdiff.diffusion.sampling import Edit
from latentdiff.editing import Inpaint
from latentdiff.errors import UserError
from latentdiff.learning.accumulate import in_parts
from latentdiff.learning.captions import Captions, CaptionStates
from latentdiff.learning.checkpoint import pack_optimizer, unpack_optimizer
from latentdiff.learning.config import override, put, read_yaml
from latentdiff.learning.denoising import (
    Conditioned,
    bound_terms,
    draw_times,
    noised_batch,
    offset_noise,
)
from latentdiff.learning.ema import EMA, trained
from latentdiff.learning.finetune_config import FinetuneConfig, Method, resolve
from latentdiff.learning.inpainting_masks import Holes, middle
from latentdiff.learning.losses import weighted_mse
from latentdiff.learning.methods import (
    make_optimizer,
    make_trainable,
    min_snr_gamma,
    with_objective,
    without_dropout,
    without_lora,
)
from latentdiff.learning.order import Key, Shares, generator, spread_uniform
from latentdiff.learning.prior_pictures import draw_missing, drawn_from, prior_examples
from latentdiff.learning.results import save_outcome
from latentdiff.learning.run import Run, learning_rate
from latentdiff.learning.samples import Samples, assign_buckets, encode_samples
from latentdiff.learning.textual_inversion import check_words
from latentdiff.pictures import centre_square, grid
from latentdiff.pipeline import LatentDiffusionPipeline


def main(
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="The pictures.")] = None,
    method: Annotated[Method | None, typer.Option(help="What is trained. Default: lora.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id. Default: the bundled model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: runs/DATA-METHOD.")
    ] = None,
    instance_prompt: Annotated[
        str | None, typer.Option(help="One caption for all pictures, instead of their own.")
    ] = None,
    prior_prompt: Annotated[
        list[str] | None,
        typer.Option(help="What the model must not unlearn; repeat it, or @FILE, one a line."),
    ] = None,
    token: Annotated[
        list[str] | None, typer.Option(help="Textual inversion: the new word, <my-style>.")
    ] = None,
    start_from: Annotated[
        str | None, typer.Option(help="Textual inversion: a known word to start from.")
    ] = None,
    bad: Annotated[
        str | None, typer.Option(help="Faulty pictures: refuse or skip. Default: refuse.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step, in all.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's rank. Default: 16.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side. Default: the model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all randomness. Default: 0.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the result at the end.")
    ] = None,
    inpaint: Annotated[
        bool, typer.Option("--inpaint", help="Make an inpainting model of it (not by LoRA).")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file of the same keys.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any key, as optim.lr=1e-4.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read all data, one step, one save, then stop.")
    ] = False,
) -> None:
    """Fine-tune a model on a folder of pictures."""
    try:
        options: dict[str, object] = {
            "method": method,
            "model": model,
            "out": None if out is None else str(out),
            "seed": seed,
            "inpaint": inpaint or None,
            "data.root": None if data is None else str(data),
            "data.instance_prompt": instance_prompt,
            "data.bad": bad,
            "data.size": size,
            "prior.prompts": prior_prompt,
            "inversion.tokens": token,
            "inversion.start_from": start_from,
            "optim.steps": steps,
            "optim.batch_size": batch_size,
            "optim.lr": lr,
            "lora.rank": rank,
            "card.push_to_hub": push_to_hub,
        }
        values = {} if config is None else read_yaml(config)
        for key, value in options.items():
            if value is not None:
                values = put(values, key, value)
        values = override(values, overrides or [])
        train(resolve(values, "finetune" if config is None else str(config)), dry_run)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


main.__doc__ = __doc__


def train(config: FinetuneConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    may_split = config.method != "textual-inversion" and config.optimizer == "adamw"
    with Run(config, dry, may_split=may_split) as run:
        fit(config, run)


def fit(config: FinetuneConfig, run: Run) -> None:
    """Build -> prepare -> loop -> save."""
    optim, objective, seed = config.optim, config.objective, config.seed
    loaded = Bundle.load(config.model, dtype="float32", device=run.device)
    bundle = with_objective(loaded, objective)
    gamma = min_snr_gamma(bundle, objective)
    samples = collect_samples(run, config, loaded)  # draws its own pictures as it is
    found = run.resume()
    masked = pictures_to_mask(config, bundle, samples)
    if not found:
        draw_samples(run, config, bundle, samples, masked, 0)  # before
    bundle = make_trainable(bundle, config)
    holes = None
    if bundle.kind == "inpainting":
        crops = variants(config.data.crops, config.data.flip)
        holes = Holes(samples.examples, samples.buckets, crops)
    learns_text = any(p.requires_grad for p in bundle.text.model.parameters())
    texts = [example.captions for example in samples.examples]
    keeps_predictions = samples.count < len(texts) and config.prior.target == "prediction"
    dropped = config.prior.caption_dropout if keeps_predictions else objective.caption_dropout
    dropout = [
        objective.caption_dropout if n < samples.count else dropped for n in range(len(texts))
    ]
    captions = Captions(bundle.text, texts, dropout, seed)
    for line in captions.warnings():
        run.say(line)
    states = None if learns_text else CaptionStates(captions, bundle.text, config.out / "cache")
    module = Conditioned(bundle.unet, bundle.text)
    optimizer = make_optimizer(iter(trained(module).values()), config)
    start = 0
    if found:
        module.load_state_dict(found[0]["model"], strict=False)
    shown = run.shown(bundle, module)
    wrapped, optimizer = run.accelerator.prepare(module, optimizer)
    parameters = list(trained(module).values())
    ema = EMA(module, optim.ema_decay)
    if found:
        tensors, state = found
        ema.load_state_dict(tensors["ema"], int(str(state["ema_updates"])))
        unpack_optimizer(optimizer, tensors["optimizer"])
        start = int(str(state["step"]))
        if state["samples"] != samples.digest:
            run.say("not the pictures and captions that this run began with: it goes on with these")
        del found, tensors

    def save(step: int) -> None:
        tensors = {
            "model": dict(zip(ema.names, parameters, strict=True)),
            "ema": ema.state_dict(),
            "optimizer": pack_optimizer(optimizer),
        }
        run.save(step, tensors, {"ema_updates": ema.updates, "samples": samples.digest})

    def draw(step: int) -> None:
        with ema.applied(), shown.whole() as whole:
            draw_samples(run, config, whole, samples, masked, step)

    if start and (start % config.evaluate_every == 0 or start == optim.steps):
        draw(start)  # the run may have been killed between its save and this

    stop = min(start + 1, optim.steps) if run.dry else optim.steps
    shares = Shares(
        samples.order(seed),
        range(start, stop),
        optim.batch_size,
        run.accelerator.process_index,
        run.accelerator.num_processes,
    )

    def terms(keys: Sequence[Key]) -> dict[str, Tensor]:
        """The loss of a micro-batch, a function of its keys and the weights."""
        step = keys[0][0]
        places, numbers = [place for _, place, _ in keys], [sample for _, _, sample in keys]
        at = seed, step, places
        chosen = list(zip(numbers, samples.variants(*at, numbers), strict=True))
        latents, noise = samples.latents(bundle.vae, *at, chosen)
        if objective.offset_noise:
            noise += objective.offset_noise * offset_noise(*at, noise.shape[1])
        latents, noise = latents.to(run.device), noise.to(run.device)
        uniform = spread_uniform(*at, optim.batch_size).to(run.device)
        t = draw_times(bundle.process, uniform, objective.times)
        batch = noised_batch(bundle.process, bundle.prediction, latents, noise, t, gamma)
        seen = [batch.x] if holes is None else [batch.x, holes.beside(bundle, *at, chosen)]
        words = (captions.tokens if states is None else states.of)(step, places, numbers)
        torch.manual_seed(int(generator(seed, 10, step, places[0]).integers(2**63)))  # dropout
        x, target = torch.cat(seen, 1), batch.target
        prior = torch.tensor([number >= samples.count for number in numbers], device=run.device)
        if keeps_predictions and (run.split or prior.any()):
            with torch.no_grad(), without_lora(module), run.accelerator.autocast():
                before = module(x, batch.t, words)[:, : latents.shape[1]].float()
            target = torch.where(prior.view(-1, 1, 1, 1), before, target)
        output = wrapped(x, batch.t, words)
        weights = batch.weights * samples.weights[numbers].to(run.device)
        loss = weighted_mse(output[:, : latents.shape[1]], target, weights)
        if not bundle.learns_variance:
            return {"loss": loss}
        step_terms = bound_terms(bundle.process, bundle.prediction, output, latents, noise, t)
        bound = (bundle.process.t_max + 1) * step_terms.mean()
        # Nichol & Dhariwal 2021, eq. 16
        return {"loss": loss + objective.bound_weight * bound, "bound": bound.detach()}

    module.train()
    with run.signals(), run.bar(start, stop) as bar:
        for keys in shares:
            rate = learning_rate(optim, keys[0][0])
            values = run.gradients([wrapped], parameters, keys, terms)
            if run.optimize(rate, (optimizer, parameters)):
                ema.update()

            bar.update()
            done = keys[0][0] + 1
            if done % config.log_every == 0 or done == stop:
                losses = {name: value.item() for name, value in values.items()}
                run.record(done, {**losses, "lr": rate})
                bar.set_postfix({"loss": f"{losses['loss']:.4f}", "bad": run.bad_steps})
            stopping = run.stopping
            if done % config.checkpoint_every == 0 or done == stop or stopping:
                save(done)
            if done % config.evaluate_every == 0 or done == stop:
                draw(done)
            if stopping:
                raise SystemExit(128 + stopping)

    if run.dry:
        run.say("dry run: data, one step and one save are fine")
        return
    with ema.applied(), shown.whole() as whole:
        own = samples.examples[: samples.count]  # without prior pictures
        for line in save_outcome(whole, config, own) if run.main else ():
            run.say(line)


def collect_samples(run: Run, config: FinetuneConfig, bundle: Bundle) -> Samples:
    """The folder's pictures, checked, and the model's own; all as latents."""
    data = config.data
    size = bundle.size if data.size is None else (data.size, data.size)
    unit = bundle.factor * 2 ** (len(bundle.unet.config["block_out_channels"]) - 1)
    least = min(size) // 2 if data.least_side is None else data.least_side
    where = {key: tuple(values) for key, values in data.where.items()}
    listed = list_folder(data.root, where=where)
    checked = check_pictures(listed, least, prompt=data.instance_prompt, progress=run.main)
    for fault in checked.faults:
        run.say(fault.line)
    if checked.must_mend and data.bad == "refuse":
        raise UserError(f"{checked.summary()} cannot be used: mend them, or use --bad skip")
    if not checked.examples:
        raise UserError(f"{data.root}: no picture is left to learn from")
    check_words(
        config.inversion.tokens, [caption for e in checked.examples for caption in e.captions]
    )
    run.say(f"{len(checked.examples)} pictures to learn from")

    cache, skip = config.out / "cache", data.bad == "skip"
    buckets = assign_buckets(checked.sizes, size, unit, data.buckets)
    with run.accelerator.main_process_first():
        samples = encode_samples(
            bundle.vae, checked, buckets, variants(data.crops, data.flip), cache, skip=skip
        )
    prior = config.prior
    if not prior.prompts:
        return samples
    if bundle.kind != "text-to-image":
        raise UserError(f"{bundle.name} draws no prior pictures: it is an {bundle.kind} model")
    source = f"{drawn_from(bundle)} {config.seed} {prior.steps} {prior.guidance_scale} {size}"
    examples = prior_examples(config.out / "prior", prior.prompts, prior.count, source)

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        steps, scale = prior.steps, prior.guidance_scale
        return pictures_of(run, bundle, prompts, seeds, steps=steps, scale=scale, size=size)

    if run.main:
        drawn = draw_missing(examples, config.seed, draw, progress=True)
        run.say(f"{drawn} prior pictures drawn, {len(examples) - drawn} were there")
    run.accelerator.wait_for_everyone()
    with run.accelerator.main_process_first():
        kept = encode_samples(
            bundle.vae, Checked(examples, [], []), [size] * len(examples), [Variant()], cache
        )
    return samples.joined(kept, prior.weight)


def pictures_of(
    run: Run,
    bundle: Bundle,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int = 20,
    scale: float = 4.0,
    size: Size | None = None,
    edits: Sequence[Edit] = (),
) -> list[Image.Image]:
    """What the model draws at present; with edits, the size is that of their pictures."""
    height, width = (None, None) if edits else size or bundle.size
    with run.accelerator.autocast(), without_dropout(bundle):
        return LatentDiffusionPipeline(bundle)(
            prompts,
            num_inference_steps=steps,
            guidance_scale=scale,
            height=height,
            width=width,
            seed=seeds,
            edits=edits,
            progress=False,
        ).images


def pictures_to_mask(config: FinetuneConfig, bundle: Bundle, samples: Samples) -> list[Image.Image]:
    """Squares that samples of an inpainting model are drawn into; they may be gone later."""
    if bundle.kind == "text-to-image" and not config.inpaint:
        return []
    some = samples.examples[: len(config.sample_prompts) or 8]
    return [centre_square(example.open(), min(bundle.size)) for example in some]


def draw_samples(
    run: Run,
    config: FinetuneConfig,
    bundle: Bundle,
    samples: Samples,
    masked: list[Image.Image],
    step: int,
) -> None:
    """A grid at fixed seeds; an inpainting model fills the middle of the pictures."""
    if not run.main:
        return
    prompts = config.sample_prompts or [e.captions[0] for e in samples.examples[:8]]
    if bundle.kind == "text-to-image":
        # Prompts that are alike, as with one caption for all pictures, show different draws.
        seeds = [config.seed + prompts[:n].count(prompt) for n, prompt in enumerate(prompts)]

        def draw(part: Sequence[tuple[str, int]]) -> list[Image.Image]:
            return pictures_of(run, bundle, [p for p, _ in part], [seed for _, seed in part])

        drawn = list(in_parts(list(zip(prompts, seeds, strict=True)), len(prompts), draw))
    else:
        drawn = []
        for number, prompt in enumerate(prompts):
            edit = Inpaint(masked[number % len(masked)], middle(bundle))
            drawn += pictures_of(run, bundle, [prompt], [config.seed], edits=[edit])
    run.picture(step, "samples", grid(drawn, 8))


if __name__ == "__main__":
    typer.run(main)
