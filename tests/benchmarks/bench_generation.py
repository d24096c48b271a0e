"""G1: greedy generation under all K latents from one shared prefix against K calls of Hugging Face `generate`."""

from __future__ import annotations

import tempfile
import warnings

import torch
from measure import Figure, options, report, seconds
from setting import Sentences, artifact, build
from torch import Tensor

from cvae_lightning.modules import SharedDiscreteCVAE

EXAMPLES, LENGTH = 8, 64


def separate(module: SharedDiscreteCVAE, xs: list[str]) -> list[list[str]]:
    """Generate with one call of `generate` for each latent, as one writes it first."""
    t, m = module.template, module.template.marker_ids
    ids, mask = t.prefixes(xs)
    banned = [m[token] for token in m if token != "</y>"] + t.latent_ids
    columns = []
    for latent in t.latent_ids:
        tail = torch.tensor([[m["<z>"], latent, m["</z>"], m["<y>"]]]).expand(len(xs), -1)
        prompt, seen = torch.cat([ids, tail], -1), torch.cat([mask, torch.ones_like(tail, dtype=torch.bool)], -1)
        produced = module.lm.generate(
            input_ids=prompt,
            attention_mask=seen.long(),
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=t.end_id,
            pad_token_id=t.pad_id,
            suppress_tokens=banned,
        )
        columns.append(t.decode(produced[:, prompt.shape[1] :]))
    return [list(row) for row in zip(*columns, strict=True)]


def end_sooner_or_later(module: SharedDiscreteCVAE) -> None:
    """Give random weights something of a trained model: rows that end at different lengths."""
    with torch.no_grad():
        weight: Tensor = module.lm.get_output_embeddings().weight
        weight[module.template.end_id] *= 4.0


def main() -> None:
    """Measure and report."""
    warnings.filterwarnings("ignore")
    given = options(__doc__ or "")
    width, layers, vocab = (64, 2, 2000) if given.quick else (256, 4, 8192)
    figures = []
    for prefix, latents, gated in ((32, 4, True), (128, 4, True), (256, 8, True), (1024, 8, False)):
        with tempfile.TemporaryDirectory() as folder:
            module = build(SharedDiscreteCVAE, artifact(folder, "gpt2", width, layers, vocab), latents).eval()
        end_sooner_or_later(module)
        xs = [record.x for record in Sentences(prefix, LENGTH, EXAMPLES, vocab).all]
        ours = module.generate_all(xs, max_new_tokens=LENGTH)
        same = sum(a == b for p, q in zip(ours, separate(module, xs), strict=True) for a, b in zip(p, q, strict=True))
        lengths = [len(y.split()) for row in ours for y in row]
        sides = {
            "separate": lambda module=module, xs=xs: separate(module, xs),
            "ours": lambda module=module, xs=xs: module.generate_all(xs, max_new_tokens=LENGTH),
        }
        best = seconds(sides, given.repeat)
        note = f"{best['separate']:.2f} s / {best['ours']:.2f} s; {same} of {len(lengths)} texts equal, "
        note += f"{sum(lengths) / len(lengths):.0f} tokens on average"
        ratio = best["separate"] / best["ours"]
        figures.append(Figure(f"G1 ({prefix},{latents})", ratio, 2 if gated else None, 4, note))
    report("Controlled generation, K `generate` calls / ours", figures, given)


if __name__ == "__main__":
    main()
