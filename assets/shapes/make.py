"""Trains the small frozen parts that stand beside this file, on captioned shapes.

    python assets/shapes/make.py vae  [--steps 16000] [--more]   an AutoencoderKL, f = 8
    python assets/shapes/make.py text [--steps 1000]             two CLIP text encoders and their tokenizer
    python assets/shapes/make.py image [--steps 500]             an encoder of latents, for training.alignment
    python assets/shapes/make.py pipeline --run outputs/demo/stage3   the averaged weights of a finished run

The first three are ordinary diffusers and transformers classes in their ordinary folder layout, so the code that loads
them is the code that loads SDXL's. They see the training split alone: the held-out pairs stay unseen. `--more` goes on
from the autoencoder that is there.
"""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from data import shapes
from inference.description import find

HERE = Path(__file__).parent


# --- the autoencoder --------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """1.7 M parameters, 8 latent channels, no attention: what it learns holds at every resolution."""
    channels = (16, 32, 64, 96)
    return AutoencoderKL(
        latent_channels=8,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=2,  # small groups normalise a plain picture's colour away
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
    )


def pictures(scenes: list[shapes.Scene], resolution: int) -> torch.Tensor:
    """Rendered scenes, (n, 3, resolution, resolution) in [-1, 1]."""
    stack = np.stack([shapes.render(scene, resolution) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def crop(pictures: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """One window of `size` for the whole batch, anywhere."""
    top, left = torch.randint(pictures.shape[-1] - size + 1, (2,), generator=generator).tolist()
    return pictures[..., top : top + size, left : left + size]


def train_vae(steps: int, more: bool, batch: int = 8, lr: float = 1.2e-3, kl_weight: float = 1e-4) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = AutoencoderKL.from_pretrained(HERE / "vae", low_cpu_mem_usage=False) if more else new_vae()
    vae = vae.to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.997))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    cosine = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.03)
    start = time.time()
    for step in range(steps):
        first = (step + more * 10**6) * batch
        scenes = [shapes.scene(0, i) for i in range(first, first + batch)]
        # one batch in three is a window of the large pictures, at the cost of small ones
        x = crop(pictures(scenes, 128), 64, generator) if step % 3 == 1 else pictures(scenes, 64)
        posterior = vae.encode(x).latent_dist
        warm = (
            1.0 if more else min(1.0, 10 * step / steps)
        )  # noise and prior come late: at first they would drown the shapes
        decoded = vae.decode(posterior.sample(generator) if warm == 1.0 else posterior.mean).sample
        edges = sum((torch.diff(decoded, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (-1, -2))
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        plain = x.flatten(2).median(-1).values[..., None, None]
        weight = 1 + 3 * ((x - plain).abs().amax(1, keepdim=True) > 0.1)  # shapes cover a tenth of the picture
        error = decoded - x
        pixels = (weight * (error.abs() + 2 * error.square())).mean()
        loss = pixels + edges + warm * kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        cosine.step()
        if step >= min(200, steps // 10):
            average.update_parameters(vae)
        if step % 200 == 0:
            seconds = time.time() - start
            print(f"step {step} loss {loss.item():.4f} kl {kl.item():.2f} seconds {seconds:.0f}", flush=True)
        if (step + 1) % 3000 == 0 or step + 1 == steps:
            save_vae(average.module, scenes=1000 if step + 1 == steps else 100)


@torch.no_grad()
def save_vae(vae: AutoencoderKL, scenes: int) -> None:
    """Measure the latents' scale and the reader's score of the reconstructions, and write the folder."""
    latents = vae.encode(pictures([shapes.scene(1, i) for i in range(512)], 64)).latent_dist.sample()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    report = {"parameters": sum(p.numel() for p in vae.parameters())}
    for resolution in (64, 128):
        report[f"{resolution}px"] = measure_vae(vae, resolution, scenes)
    print(json.dumps(report), flush=True)
    vae.save_pretrained(HERE / "vae")
    (HERE / "vae" / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")


def measure_vae(vae: AutoencoderKL, resolution: int, scenes: int) -> dict[str, float]:
    """Reader's accuracy and PSNR on reconstructions, half of them with pairs the training never showed."""
    right, error = [], []
    for first in range(0, scenes, 20):
        truth = [shapes.scene(2, i, held_out=bool(i % 2)) for i in range(first, first + 20)]
        x = pictures(truth, resolution)
        decoded = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        error.append((decoded - x).square().mean().item() / 4)
        right.append(shapes.mark(truth, (decoded.permute(0, 2, 3, 1).numpy() + 1) / 2)["all"])
    return {"readable": float(np.mean(right)), "psnr": float(-10 * np.log10(np.mean(error)))}


# --- the text encoders ------------------------------------------------------------------------------------

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32


def train_tokenizer(captions: list[str]) -> None:
    """A CLIP BPE with every byte in it, so that any prompt can be read, and merges learnt from the captions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    for folder, pad in (("tokenizer", END), ("tokenizer_2", "!")):  # OpenCLIP pads with token 0, CLIP with its end
        CLIPTokenizer(
            vocab=vocabulary, merges=merges, bos_token=START, eos_token=END, unk_token=END, pad_token=pad,
            model_max_length=LENGTH,
        ).save_pretrained(HERE / folder)  # fmt: skip


def new_encoders(vocabulary: int) -> tuple[nn.Module, nn.Module]:
    """The pair that SDXL joins, small: (CLIP-L-like, OpenCLIP-bigG-like)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(width: int, activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
            num_attention_heads=width // 32, max_position_embeddings=LENGTH, projection_dim=width,
            hidden_act=activation, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )  # fmt: skip

    return CLIPTextModel(config(64, "quick_gelu")), CLIPTextModelWithProjection(config(128, "gelu"))


def new_image_tower(width: int) -> nn.Module:
    """What the captions are matched with: a small convolution net over 64 px pictures, not kept."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 256), nn.GELU(), nn.Linear(256, width))


def variations(scene: shapes.Scene, index: int) -> list[shapes.Scene]:
    """The scene, and it with another colour, with another shape and with both; no pair of them is held out."""
    first, *rest = scene.things
    pairs = [(colour, shape) for colour, shape in shapes.PAIRS if colour != first.colour and shape != first.shape]
    corners = [[(c, s) for s in (first.shape, shape) for c in (first.colour, colour)] for colour, shape in pairs]
    shown = [corner for corner in corners if not set(corner) & set(shapes.HELD_OUT)]
    chosen = shown[int(np.random.default_rng([3, index]).integers(len(shown)))]
    things = [dataclasses.replace(first, colour=colour, shape=shape) for colour, shape in chosen]
    return [dataclasses.replace(scene, things=(thing, *rest)) for thing in things]


def interaction(states: Tensor, mask: Tensor) -> Tensor:
    """How far states are from a sum of what the colour and what the shape says, as a share of their spread.

    states (4, b, n, d) of the four `variations`, mask (b, n) of their tokens.
    """
    plain, colour, shape, both = states[:, mask]
    return (plain + both - colour - shape).square().mean() / (plain - both).square().mean()


def train_text(steps: int, batch: int = 96, lr: float = 1e-3, additive: float = 10.0) -> None:
    """Contrastive language-image training of both encoders against one image tower each (Radford et al. 2021).

    Among the wrong captions are some that are wrong in one word (Yuksekgonul et al. 2022), and the penultimate states,
    which a denoiser reads, are asked to be additive in colour and shape: what is so of the pairs that are shown
    holds for those that are not, and a denoiser can draw them.
    """
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    train_tokenizer([caption for i in range(4000) for caption in shapes.captions(shapes.scene(0, i), 0, i).values()])
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "tokenizer")
    small, large = new_encoders(len(tokenizer))
    towers = nn.ModuleList([new_image_tower(64), new_image_tower(128)])
    temperature = nn.Parameter(torch.tensor(2.5))
    parameters = [*small.parameters(), *large.parameters(), *towers.parameters(), temperature]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, fused=True)
    cosine = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)

    def read(captions: list[str]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """(unit embeddings, penultimate states) of each encoder, and the mask of tokens."""
        tokens = tokenizer(captions, padding="longest", max_length=LENGTH, truncation=True, return_tensors="pt")
        narrow = small(tokens.input_ids, output_hidden_states=True)
        wide = large(tokens.input_ids, output_hidden_states=True)
        both = [(narrow.pooler_output, narrow.hidden_states[-2]), (wide.text_embeds, wide.hidden_states[-2])]
        return [(F.normalize(text, dim=-1), states) for text, states in both], tokens.attention_mask.bool()

    def look(scenes: list[shapes.Scene]) -> list[Tensor]:
        x = pictures(scenes, 64)
        return [F.normalize(tower(x), dim=-1) for tower in towers]

    start = time.time()
    for step in range(steps):
        indices = range(step * batch, (step + 1) * batch)
        scenes = [shapes.scene(0, i) for i in indices]
        length = [2, 3, 3, 3][step % 4]  # mostly full captions: short ones fit many pictures of a batch
        varied = [
            [list(shapes.captions(other, 0, i).values())[length] for other in variations(scene, i)]
            for scene, i in zip(scenes, indices, strict=True)
        ]
        texts, mask = read([captions[corner] for corner in range(4) for captions in varied])
        same = torch.arange(batch)
        loss = torch.zeros(())
        for image, (text, states) in zip(look(scenes), texts, strict=True):
            logits = temperature.exp() * image @ text.T
            loss = loss + F.cross_entropy(logits, same) + F.cross_entropy(logits[:, :batch].T, same)
            loss = loss + additive * interaction(states.unflatten(0, (4, batch)), mask[:batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        cosine.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item() / 4:.4f} seconds {time.time() - start:.0f}", flush=True)

    small.eval().save_pretrained(HERE / "text_encoder")
    large.eval().save_pretrained(HERE / "text_encoder_2")
    report = {}
    with torch.no_grad():
        for split, held_out in (("seen pairs", False), ("held-out pairs", True)):
            scenes = [shapes.scene(2, i, held_out=held_out) for i in range(256)]
            texts, _ = read([shapes.prompt(scene) for scene in scenes])
            found = [
                (image @ text.T).argmax(1).eq(torch.arange(256)).float().mean().item()
                for image, (text, _) in zip(look(scenes), texts, strict=True)
            ]
            report[split] = {"text_encoder": found[0], "text_encoder_2": found[1], "choices": 256}
    print(json.dumps(report))
    (HERE / "text_encoder_2" / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")


# --- the image encoder ------------------------------------------------------------------------------------


def new_image_encoder(channels: int) -> nn.Module:
    """DINOv2 in small, on latents: a token for every two by two cells."""
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(
        Dinov2Config(
            num_channels=channels, image_size=16, patch_size=2, hidden_size=64, num_hidden_layers=3,
            num_attention_heads=4,
        )
    )  # fmt: skip


def train_image(steps: int, scenes: int = 2000, batch: int = 128, lr: float = 2e-3) -> None:
    """Contrastive training of the mean of its tokens against the finished text_encoder_2, at 64 and 128 px in turns."""
    from models.autoencoder import AutoencoderConfig
    from models.text import TextConfig

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae, start = AutoencoderConfig(path="assets/shapes").build(), time.time()
    text = TextConfig(path="assets/shapes", encoders=["text_encoder_2"], tokenizers=["tokenizer_2"]).build()

    def read(captions: list[str]) -> Tensor:
        pooled = [text.encode(captions[i : i + 250])[2] for i in range(0, len(captions), 250)]
        return F.normalize(torch.cat([part for part in pooled if part is not None]), dim=-1)

    def see(found: list[shapes.Scene], resolution: int) -> Tensor:
        return torch.cat([vae.encode(pictures(found[i : i + 50], resolution)) for i in range(0, len(found), 50)])

    views = [(64, list(range(2 * scenes))), (128, list(range(2 * scenes, 3 * scenes)))]
    latents = [see([shapes.scene(0, i) for i in indices], size) for size, indices in views]
    captions = [[list(shapes.captions(shapes.scene(0, i), 0, i).values()) for i in indices] for _, indices in views]
    texts = [torch.stack([read([four[k] for four in view]) for k in (2, 3)]) for view in captions]  # long and full
    print(f"encoded in {time.time() - start:.0f} seconds", flush=True)

    encoder = new_image_encoder(vae.channels)
    head, temperature = nn.Linear(64, 128), nn.Parameter(torch.tensor(2.5))
    parameters = [*encoder.parameters(), *head.parameters(), temperature]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, fused=True)
    cosine = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)

    def look(x: Tensor) -> Tensor:
        return F.normalize(head(encoder(x).last_hidden_state[:, 1:].mean(1)), dim=-1)

    for step in range(steps):
        x, options = latents[step % 2], texts[step % 2]
        rows = torch.randperm(len(x), generator=generator)[:batch]
        logits = temperature.exp() * look(x[rows]) @ options[step // 2 % 2][rows].T
        loss = (F.cross_entropy(logits, torch.arange(batch)) + F.cross_entropy(logits.T, torch.arange(batch))) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        cosine.step()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} seconds {time.time() - start:.0f}", flush=True)

    encoder.eval().save_pretrained(HERE / "image_encoder")
    report: dict[str, float] = {"parameters": sum(p.numel() for p in encoder.parameters())}
    with torch.no_grad():
        for name, held_out in (("seen pairs", False), ("held-out pairs", True)):
            found = [shapes.scene(2, i, held_out=held_out) for i in range(256)]
            wanted = read([shapes.prompt(scene) for scene in found])
            for size in (64, 128):
                hits = (look(see(found, size)) @ wanted.T).argmax(1).eq(torch.arange(256))
                report[f"{name}, {size}px"] = hits.float().mean().item()
    print(json.dumps(report))
    (HERE / "image_encoder" / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")


# --- the pipeline -----------------------------------------------------------------------------------------


def keep_pipeline(run: Path) -> None:
    """Copy what sampling needs of a run's newest checkpoint, and its exam."""
    checkpoint, folder = find(run), HERE / "pipeline"
    (folder / "denoiser").mkdir(parents=True, exist_ok=True)
    for name in ("pipeline.json", "denoiser/config.json", "denoiser/ema.safetensors"):
        shutil.copyfile(checkpoint / name, folder / name)
    shutil.copyfile(run / "evaluation.json", folder / "evaluation.json")
    shutil.copyfile(run / "config.yaml", folder / "config.yaml")


def readable_by_all(folder: Path) -> None:
    """safetensors makes files that only their owner may read."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vae", "text", "image", "pipeline"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--run", type=Path, default=Path("outputs/demo/stage3"))
    options = parser.parse_args()
    if options.part == "vae":
        train_vae(options.steps or 16_000, options.more)
    elif options.part == "text":
        train_text(options.steps or 1_000)
    elif options.part == "image":
        train_image(options.steps or 500)
    else:
        keep_pipeline(options.run)
    readable_by_all(HERE)
