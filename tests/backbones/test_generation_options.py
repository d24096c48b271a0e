"""Generation with the options of transformers' GenerationConfig, through the modules."""

import pytest
import torch
from tiny import CONFIGS, RECORDS, tiny_artifact
from transformers import GenerationConfig

from cvae_lightning.backbones.generation import ELSEWHERE, check_options, expansion
from cvae_lightning.losses import ReconstructionLoss
from cvae_lightning.modules import ContinuousCVAE, EntangledLM, SharedDiscreteCVAE

XS = [r.x for r in RECORDS]
TERMS = {"reconstruction_loss": ReconstructionLoss()}


def discrete(folder, family="llama", **options):
    torch.manual_seed(1)
    model = SharedDiscreteCVAE(tiny_artifact(folder, family), TERMS, **{"num_latents": 3} | options)
    if model.norms is not None:
        for linear in model.norms.maps:
            torch.nn.init.normal_(linear.weight, std=0.5)
    return model


def continuous(folder, **options):
    torch.manual_seed(1)
    model = ContinuousCVAE(tiny_artifact(folder), TERMS, latent_dim=2, **options)
    if model.norms is not None:
        for linear in model.norms.maps:
            torch.nn.init.normal_(linear.weight, std=0.5)
    return model


@pytest.mark.parametrize("options", [{}, {"norm_dim": 4}, {"prefix_length": 2}], ids=["token", "norms", "two tokens"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_transformers_generate_continues_like_the_fast_path(tmp_path, family, options):
    model = discrete(tmp_path, family, **options)
    expected = model.generate_all(XS, max_new_tokens=8)
    assert model.generate_all(XS, max_new_tokens=8, num_beams=1, batch_size=6) == expected  # any option takes that path
    assert model.generate(XS, "all", max_new_tokens=8, repetition_penalty=1.0) == expected
    latents = [0, 2, 1, 2, 0]
    found = model.generate(XS, latents, max_new_tokens=8, renormalize_logits=True, batch_size=2)
    assert found == [row[k] for row, k in zip(expected, latents, strict=True)]
    beams = model.generate(XS, latents, max_new_tokens=6, num_beams=3, num_return_sequences=2, batch_size=7)
    assert [len(several) for several in beams] == [2] * 5
    assert beams == [model.generate([x], k, max_new_tokens=6, num_beams=3, num_return_sequences=2)[0]
                     for x, k in zip(XS, latents, strict=True)]  # fmt: skip


@pytest.mark.parametrize("injection", ["prefix", "both"])
def test_a_gaussian_latent_too(tmp_path, injection):
    model = continuous(tmp_path, injection=injection)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    expected = model.generate(XS, z, max_new_tokens=8)
    assert model.generate(XS, z, max_new_tokens=8, num_beams=1) == expected
    options = {"num_return_sequences": 3, "do_sample": True, "top_k": 1, "max_new_tokens": 8}
    assert model.generate(XS, z, batch_size=6, **options) == [[y] * 3 for y in expected]


def test_padding_spares_no_repeated_token_of_a_gaussian_latent(tmp_path):
    """With vectors as prompts, transformers would leave out as many tokens of y as are padded."""
    model, xs = continuous(tmp_path), ["12", "7345", "9", "345678"]
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "repetition_penalty": 3.0}
    one_by_one = [model.generate([x], z[i : i + 1], **options)[0] for i, x in enumerate(xs)]
    assert model.generate(xs, z, **options) == one_by_one != model.generate(xs, z, max_new_tokens=8)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["fast path", "beams"])
@pytest.mark.parametrize("kind", ["tokens", "norms", "vectors"])
def test_a_long_prompt_does_not_cut_short_what_stands_beside_it(tmp_path, kind, options):
    vectors, norms = kind == "vectors", 4 * (kind == "norms")
    model = continuous(tmp_path, injection="both") if vectors else discrete(tmp_path, norm_dim=norms)
    with torch.no_grad():
        model.lm.get_output_embeddings().weight[model.template.end_id] = 0.0  # y takes all the room that it has
    xs = ["12", "7" * 50, "345", "1" * 30, "9" * 50]
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)) if vectors else [2, 0, 1, 2, 1]
    options = {"max_new_tokens": 20} | options
    found = model.generate(xs, z, **options)
    assert found == [model.generate([x], z[i : i + 1], **options)[0] for i, x in enumerate(xs)]
    lengths = [len(y) for y in found]
    assert lengths[1] < 10 < lengths[0]
    if not vectors:
        every = model.generate(xs, "all", batch_size=12, **options)
        assert every == [model.generate([x], "all", **options)[0] for x in xs]
        assert [row[k] for row, k in zip(every, z, strict=True)] == found


def test_options_do_what_they_say(tmp_path):
    model = discrete(tmp_path)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0, "generator_seed": 5}
    once, again = (model.generate(XS, 0, top_p=0.9, **options) for _ in range(2))
    assert once == again
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert model.generate(XS, 0, top_p=0.9, **options | {"generator_seed": 6}) != once
    assert torch.equal(torch.rand(3), expected)  # a seed of its own leaves the global generator alone
    greedy = model.generate(XS, 0, max_new_tokens=12)
    assert model.generate(XS, 0, top_k=1, **options) == greedy
    assert model.generate(XS, 0, top_p=1e-6, **options) == greedy
    long = model.generate(XS, 0, min_new_tokens=10, max_new_tokens=12)
    assert all(10 <= len(y) <= 12 for y in long)
    char = max("0123456789", key="".join(greedy).count)
    without = model.generate(XS, 0, max_new_tokens=12, bad_words_ids=model.template._ids([char]))
    assert not any(char in y for y in without)
    assert any(char in y for y in greedy)
    cut = model.generate(XS, 0, max_new_tokens=12, stop_strings=[char])
    assert cut == [y[: y.index(char) + 1] if char in y else y for y in greedy]


def test_sampling_is_from_the_whole_distribution_and_the_models_own_options_do_not_leak(tmp_path):
    model = discrete(tmp_path)
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 1, "generator_seed": 0}
    model.lm.generation_config = own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=50.0)
    many = model.generate(["12"], 0, num_return_sequences=600, **options)[0]
    fast = model.generate(["12"] * 600, 0, **options)
    share = {y: many.count(y) / 600 for y in {*many, *fast}}
    assert len(share) > 3
    assert max(abs(share[y] - fast.count(y) / 600) for y in share) < 0.08
    assert model.lm.generation_config is own


def test_markers_are_never_generated_and_an_end_of_ones_own_ends(tmp_path):
    model = discrete(tmp_path)
    with torch.no_grad():  # the model would rather write a latent token than anything else
        model.lm.get_output_embeddings().weight[model.template.latent_ids] *= 50
    for options in ({}, {"num_beams": 2}, {"suppress_tokens": model.template._ids(["1"])[0]}):
        assert all(set(y) <= set("0123456789;=") for y in model.generate(XS, 0, max_new_tokens=6, **options))
    greedy = model.generate(XS, 0, max_new_tokens=6)
    end = greedy[0][2]
    found = model.generate(XS, 0, max_new_tokens=6, eos_token_id=model.template._ids([end])[0][0])
    assert found == [y[: y.index(end) + 1] if end in y else y for y in greedy]


def test_wrong_options_are_one_clear_error(tmp_path):
    model = discrete(tmp_path)
    for options, message in (
        ({"top_pp": 0.9}, "no option 'top_pp'; did you mean top_p"),
        ({"frobnicate": 1}, "those of GenerationConfig"),
        ({"top_p": 0.9}, "do_sample"),
        ({"top_p": 1.9, "do_sample": True}, "`top_p` must be a share"),
        ({"top_p": "much", "do_sample": True}, "options"),
        ({"temperature": 0.0, "do_sample": True}, "`temperature` must be above 0"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"max_length": 7}, "give max_new_tokens"),
        ({"output_scores": True}, "texts are returned"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search, whose code lies on the hub"),
        ({"num_beams": 4, "num_beam_groups": 2}, "hub"),
    ):
        for z in (0, "all"):
            with pytest.raises(ValueError, match=message):
                model.generate(XS, z, **options)
    entangled = EntangledLM(str(tmp_path / "out"), model=tiny_artifact(tmp_path / "base"))
    assert len(entangled.generate(XS, num_beams=2, max_new_tokens=3)) == 5
    with pytest.raises(ValueError, match="no option 'beams'"):
        entangled.generate(XS, beams=2)


def test_every_option_of_the_config_is_known_or_refused_with_its_reason():
    places = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"transformers_version"}
    refused = {*ELSEWHERE, *(name for name in places if name.startswith("output_")), "return_dict_in_generate"}
    assert refused <= places
    for name in places - refused:
        check_options({name: None})
    for name in refused:
        with pytest.raises(ValueError, match=f"{name} is no option of generate: "):
            check_options({name: 1})
    assert expansion({}) == 1
    assert expansion({"num_beams": 4, "num_return_sequences": 2}) == 4
