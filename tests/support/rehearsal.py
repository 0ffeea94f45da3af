"""A small speculator on the pretended device, and on the CPU the same one to compare it with."""

from __future__ import annotations

import functools
from unittest import mock

import torch

from dvi.decode.speculator import SelfSpeculator
from dvi.model.llama_path import DirectPath
from dvi.records import SamplingParams
from tests.support.drafter_doubles import small_config
from tests.support.tiny_models import tiny_model

VOCAB_SIZE = 64
PROMPTS = [[5, 9, 33], [7], [1, 2, 3, 4, 50, 6, 7]]
# By what the output owes to draws and seen tokens: the branches of a round.
SAMPLING = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.2},
    "sampled": {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "presence_penalty": 0.1},
    "gumbel": {"temperature": 1.0, "coupling": "gumbel"},
}


def params_of(name: str, *, max_new_tokens: int = 12, **options) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, **SAMPLING[name], **options)


@functools.cache
def speculator_on(device: torch.device | str, path: str) -> SelfSpeculator:
    """In float64, one for all tests; on DEVICE it needs the mode. Some of its drafts are accepted and some are not."""
    return new_speculator(device, path)


def new_speculator(device: torch.device | str, path: str, *, draft_vocab_size: int = 0) -> SelfSpeculator:
    model = tiny_model("llama", num_layers=3, hidden_size=16, vocab_size=VOCAB_SIZE, seed=3)
    with torch.no_grad():
        for layer in model.model.layers[1:]:  # the deep layers change little, so that drafts are accepted
            layer.self_attn.o_proj.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(0.2)
    # The lean path asks for plain parameters, to tell sharded and quantised ones by; on the device none is.
    asks = mock.patch.object(DirectPath, "supports", lambda model: path == "direct")
    with asks, torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = small_config(draft_vocab_size=draft_vocab_size)
        return SelfSpeculator(model.to(device), None, split_layer=1, drafter=config, path=path)
