"""The part of a model card that says how to prompt the model, and code that runs as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cvae_lightning.export.folder import plain_tokenizer
from cvae_lightning.modules import ContinuousCVAE, SharedDiscreteCVAE
from cvae_lightning.template import latent_token

PROBES = ("12+7=19; 5 3 1", " two  words\n", "Grüße, 你好")


def prompt(module: SharedDiscreteCVAE | ContinuousCVAE) -> str:
    """Return what stands before y, in words."""
    bos = _bos(module)
    if isinstance(module, SharedDiscreteCVAE):
        slot = _slot(module, "k")
        after = f"""k is a number from 0 to {module.num_latents - 1}; there is no blank between the tokens. The \
router's answer is the next token after `<z>`, restricted to `<z_0>` … `<z_{module.num_latents - 1}>`. An x that \
itself holds one of these markers must be tokenised alone, with `split_special_tokens=True`."""
    else:
        slot = "·" * module.prefix.length
        after = f"Each · ({module.prefix.length} in all) is a vector computed from z, which `load_export` puts there."
    return f"""```text
generator  {bos}<x>…</x><z>{slot}</z><y>
router     {bos}<x>…</x><z>
```

{after} y ends with `</y>`, at which generation stops."""


def plain_usage(module: SharedDiscreteCVAE, xs: Sequence[str]) -> str:
    """Return how to use a plain folder with transformers alone."""
    bos, latents = _bos(module), module.num_latents
    room = str(module.max_new_tokens)
    if module.positions:
        room = f'min({room}, model.config.max_position_embeddings - batch["input_ids"].shape[1])'
    if string_prompt_is_exact(module, xs):
        encode = """def encode(prompts):
    return tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")"""
        note = ""
    else:  # the tokenizer treats x otherwise when it stands between markers than when it stands alone
        encode = """def encode(prompts):  # this tokenizer must see x alone, as it did in training
    parts = [re.fullmatch(r"(.*?<x>)(.*)(</x><z>.*)", text, re.DOTALL).groups() for text in prompts]
    plain = {"add_special_tokens": False}
    ids = [
        tokenizer(a, **plain).input_ids
        + tokenizer(x, split_special_tokens=True, **plain).input_ids
        + tokenizer(b, **plain).input_ids
        for a, x, b in parts
    ]
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt")"""
        note = "import re\n\n"
    code = f'''{note}from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
xs = {_texts(xs)}


{encode}


# y under every latent
batch = encode([f"{bos}<x>{{x}}</x><z>{_slot(module, "{k}")}</z><y>" for x in xs for k in range({latents})])
produced = model.generate(**batch, max_new_tokens={room})[:, batch["input_ids"].shape[1] :]
ys = tokenizer.batch_decode(produced, skip_special_tokens=True)
print([ys[i : i + {latents}] for i in range(0, len(ys), {latents})])

# the router p(z|x)
batch = encode([f"{bos}<x>{{x}}</x><z>" for x in xs])
positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)  # the padding stands on the left
logits = model(**batch, position_ids=positions).logits[:, -1]
latents = tokenizer.convert_tokens_to_ids([f"<z_{{k}}>" for k in range({latents})])
print(logits[:, latents].softmax(-1).tolist())'''
    return f"With `transformers` alone:\n\n```python\n{code}\n```"


def load_usage(module: SharedDiscreteCVAE | ContinuousCVAE, xs: Sequence[str]) -> str:
    """Return how to use an export with this package."""
    if isinstance(module, SharedDiscreteCVAE):
        kind = ', "exact"' if module.posterior_kind == "amortized" else ""  # the network may have been left out
        calls = f"""print(model.generate(xs, 0))  # y under latent 0; also "router", "argmax", one latent for each x
print(model.generate(xs, "all"))  # under every latent
print(model.route(xs).exp().tolist())  # p(z|x)
ys = model.generate(xs, "argmax")
print(model.infer(xs, ys{kind}).exp().tolist())  # q(z|x,y)
print(model.log_evidence(xs, ys).tolist())  # log p(y|x), in nats"""
    else:
        calls = """print(model.generate(xs, "router", generator_seed=0))  # under a z from p(z|x); also "mean", a tensor
mean, logvar = model.route(xs)  # p(z|x)
print(model.generate(xs, mean))"""
    code = f"""from cvae_lightning import load_export

model = load_export(".")  # this folder
xs = {_texts(xs)}
{calls}"""
    return f"With `cvae_lightning`:\n\n```python\n{code}\n```"


def string_prompt_is_exact(module: SharedDiscreteCVAE, xs: Sequence[str]) -> bool:
    """Return whether the whole prompt as one text becomes the very tokens that the model was trained on."""
    template = module.template
    tokenizer = plain_tokenizer(template.tokenizer, template.pad_id)
    m, first = template.marker_ids, template.latent_prefixes[0]
    for x in (*xs, *PROBES):
        text = f"{_bos(module)}<x>{x}</x><z>{_slot(module, '0')}</z><y>"
        expected = [*template.bos, m["<x>"], *template._ids([x])[0], m["</x>"], m["<z>"], *first, m["</z>"], m["<y>"]]
        if tokenizer(text, add_special_tokens=False)["input_ids"] != expected:
            return False
    return True


def _bos(module: Any) -> str:
    """Return the text of the token that begins every prompt, if the tokenizer has one."""
    return module.template.tokenizer.bos_token if module.template.bos else ""


def _slot(module: SharedDiscreteCVAE, k: str) -> str:
    """Return the tokens of latent ``k``, which may be a placeholder."""
    parts = range(module.template.prefix_length)
    return "".join(latent_token(0, part).replace("<z_0", f"<z_{k}", 1) for part in parts)


def _texts(xs: Sequence[str]) -> str:
    return repr(list(xs) or ["..."])
