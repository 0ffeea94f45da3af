"""Pretrains a small Llama, such as the bundled reference model, from a corpus, on one device; writes a HF folder.

    python scripts/pretrain_reference.py --corpus corpus.jsonl.xz --preset 25m --output checkpoints/reference-25m

The corpus has one document a line: {"d": domain, "m": [[role, text], ...]} with roles user, assistant or text. A killed
run goes on from its last state when started again with the same arguments.

One file though it is long: a program on its own, read from top to bottom, which imports nothing of this repository.
"""
# L tokens of a sequence, S sequences, B sequences of one step.

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import math
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
MARKERS = {"user": "<|user|>", "assistant": "<|assistant|>", "text": ""}
SPECIAL_TOKENS = [BOS, EOS, MARKERS["user"], MARKERS["assistant"]]  # ids 0..3
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|assistant|>' if m['role']=='assistant' else '<|user|>' }}"
    "{{ m['content'] }}{% if m['role']=='assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STATE_FILE = "training_state.pt"
MAX_SHARD_SIZE = "15MB"
SAMPLE_PROMPTS = (
    "What is the capital of Peru?",
    "A box holds 12 pencils. Tom buys 3 boxes and gives away 10 pencils. How many pencils are left?",
    "Write a Python function that returns the largest number of a list.",
    "Give a shell command using tar: Extract an archive into a folder.",
    "You are a lighthouse keeper. Describe the night of a storm.",
)


@dataclass(frozen=True)
class Preset:
    """Shape of a model and how it is trained. batch_size counts sequences; max_tokens are seen in training."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    sequence_len: int
    batch_size: int
    lr: float
    max_tokens: int
    head_dim: int = 64
    context_len: int = 2048

    def model_config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context_len,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            bos_token_id=SPECIAL_TOKENS.index(BOS),
            eos_token_id=SPECIAL_TOKENS.index(EOS),
            pad_token_id=SPECIAL_TOKENS.index(EOS),
        )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="11m",
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=704,
            num_layers=12,
            num_heads=4,
            num_kv_heads=2,
            sequence_len=512,
            batch_size=16,
            lr=1e-3,
            max_tokens=10_000_000,
        ),
        # Deep and narrow: the cheaper one layer and the head are beside the whole, the more drafting can gain.
        Preset(
            name="25m",
            vocab_size=8192,
            hidden_size=320,
            intermediate_size=864,
            num_layers=16,
            num_heads=5,
            num_kv_heads=5,
            sequence_len=2048,
            batch_size=32,
            lr=1.5e-3,
            max_tokens=200_000_000,
        ),
    )
}


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on besides its corpus. `mix` maps domains to weights, see `mixed`."""

    preset: Preset
    minutes: float | None = None
    seed: int = 0
    mix: dict[str, float] = field(default_factory=dict)

    def progress(self, *, tokens: int, seconds: float) -> float:
        """0 at the start, 1 or more when the budget of tokens or that of minutes is used up."""
        return max(tokens / self.preset.max_tokens, seconds / (60 * self.minutes) if self.minutes else 0.0)


@dataclass(frozen=True)
class Document:
    domain: str
    messages: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """As the chat template writes it, and always closed, so that packed documents are apart."""
        parts = [BOS]
        for role, text in self.messages:
            parts += [MARKERS[role], text, EOS if role == "assistant" else ""]
        closed = "".join(parts)
        return closed if closed.endswith(EOS) else closed + EOS


@dataclass
class TrainingState:
    """Where a run is. `recent_losses` are of the last steps, in nats a token, kept on the device."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent_losses: deque[Tensor] = field(default_factory=lambda: deque(maxlen=100))

    @property
    def loss(self) -> float:
        return torch.stack(list(self.recent_losses)).mean().item()


def read_corpus(path: Path) -> list[Document]:
    """The documents of a .jsonl or .jsonl.xz file. Raises ValueError naming the line that is not one."""
    if not path.is_file():
        raise ValueError(f"--corpus must be a .jsonl or .jsonl.xz file, got {path}, which does not exist")
    documents = []
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                document = Document(entry["d"], tuple((role, text) for role, text in entry["m"]))
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                form = '{"d": domain, "m": [[role, text], ...]}'
                raise ValueError(f"{path}:{number} must be {form}: {error!r}") from None
            if unknown := {role for role, _ in document.messages} - set(MARKERS):
                raise ValueError(f"{path}:{number}: a role must be one of {', '.join(MARKERS)}, got {unknown.pop()!r}")
            documents.append(document)
    return documents


def mixed(documents: Sequence[Document], mix: dict[str, float], *, seed: int) -> list[Document]:
    """The documents shuffled, each domain repeated by its weight: 2 takes all twice, 0.5 half of them, 0 none."""
    if unknown := set(mix) - {document.domain for document in documents}:
        domains = ", ".join(sorted({document.domain for document in documents}))
        raise ValueError(f"--mix must name domains of the corpus ({domains}), got {unknown.pop()!r}")
    rng = random.Random(seed)
    chosen = []
    for document in documents:
        weight = mix.get(document.domain, 1.0)
        chosen += [document] * (int(weight) + (rng.random() < weight % 1))
    rng.shuffle(chosen)
    return chosen


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens and the chat template of the reference model."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text for document in documents for _, text in document.messages), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, sequence_len: int) -> Tensor:
    """int64 [S, L]: the documents one after the other, cut into sequences; the last incomplete one is dropped."""
    parts = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(documents), 1000):  # in parts: encodings take a hundred times the memory of their ids
        texts = [document.text for document in documents[start : start + 1000]]
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        parts += [torch.tensor(encoding.ids) for encoding in encodings]
    tokens = torch.cat(parts)
    num_sequences = len(tokens) // sequence_len
    if num_sequences == 0:
        raise ValueError(
            f"{len(documents)} documents must fill at least one sequence of {sequence_len} tokens, "
            f"got {len(tokens)} tokens; use a larger corpus"
        )
    return tokens[: num_sequences * sequence_len].view(num_sequences, sequence_len)


def batches(tokens_SL: Tensor, *, batch_size: int, seed: int, first_step: int) -> Iterator[Tensor]:
    """Batches [B, L] without end, each epoch in its own order; step n's batch depends on n and the seed alone."""
    batch_size = min(batch_size, len(tokens_SL))
    steps_per_epoch = len(tokens_SL) // batch_size
    step = first_step
    while True:
        epoch, index = divmod(step, steps_per_epoch)
        order_S = torch.randperm(len(tokens_SL), generator=torch.Generator().manual_seed(seed + epoch))
        yield tokens_SL[order_S[index * batch_size : (index + 1) * batch_size]]
        step += 1


def lr_factor(progress: float, *, warmup: float = 0.02, floor: float = 0.1) -> float:
    """Linear warm-up over the first `warmup` of the budget, then a cosine from 1 down to `floor`."""
    if progress < warmup:
        return max(progress / warmup, 1e-2)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (min(progress, 1.0) - warmup) / (1 - warmup)))


def make_optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms have nothing to gain from shrinking."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def save_state(path: Path, model: LlamaForCausalLM, optimizer, state: TrainingState, arguments: dict) -> None:
    """Replaces the file in one move: a killed run leaves the old state or the new one, never half of one."""
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "recent_losses": list(state.recent_losses),
        "counts": {"step": state.step, "tokens": state.tokens, "seconds": state.seconds},
        "arguments": arguments,
    }
    unfinished = path.with_suffix(".new")
    torch.save(content, unfinished)
    os.replace(unfinished, path)


def load_state(path: Path, model: LlamaForCausalLM, optimizer, arguments: dict, device: torch.device) -> TrainingState:
    """Puts model and optimizer where the run stopped. Raises ValueError when it was started with other arguments."""
    content = torch.load(path, map_location=device, weights_only=True)
    if content["arguments"] != arguments:
        raise ValueError(
            f"{path} must belong to a run with the same arguments, got one with {content['arguments']} "
            f"for a run with {arguments}; use them again or choose another --output"
        )
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    state = TrainingState(**content["counts"])
    state.recent_losses.extend(content["recent_losses"])
    return state


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokens_SL: Tensor,
    *,
    recipe: Recipe,
    state_path: Path,
    report_every: int,
) -> TrainingState:
    """Trains `model` in place until the budget is used up. Every `report_every` steps it saves and prints a sample."""
    preset = recipe.preset
    is_cuda = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if is_cuda else "no", cpu=not is_cuda)
    if accelerator.num_processes > 1:
        raise ValueError(f"training needs 1 process, got {accelerator.num_processes}; start the script by python alone")
    model, optimizer = accelerator.prepare(model, make_optimizer(model, preset.lr))
    state = TrainingState()
    arguments = dataclasses.asdict(recipe) | {"num_sequences": len(tokens_SL)}
    if state_path.exists():
        state = load_state(state_path, model, optimizer, arguments, accelerator.device)
    bar = tqdm(total=preset.max_tokens, initial=state.tokens, unit="tok", unit_scale=True, disable=None)
    model.train()
    tokens_SL = tokens_SL.to(accelerator.device)
    for batch_BL in batches(tokens_SL, batch_size=preset.batch_size, seed=recipe.seed, first_step=state.step):
        progress = recipe.progress(tokens=state.tokens, seconds=state.seconds)
        if progress >= 1:
            break
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = preset.lr * lr_factor(progress)
        loss = model(input_ids=batch_BL, labels=batch_BL, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        state.tokens += batch_BL.numel()
        state.recent_losses.append(loss.detach())
        if state.step % 10 == 0:
            bar.set_postfix(loss=f"{state.loss:.3f}")  # waits for the device, hence not at every step
        bar.update(batch_BL.numel())
        state.seconds += time.perf_counter() - started
        if state.step % report_every == 0:
            save_state(state_path, model, optimizer, state, arguments)
            prompt = SAMPLE_PROMPTS[state.step // report_every % len(SAMPLE_PROMPTS)]
            tqdm.write(f"step {state.step}, {state.tokens} tokens, loss {state.loss:.3f}; {prompt}", file=sys.stderr)
            tqdm.write(f"    {continuation(model, tokenizer, prompt)!r}", file=sys.stderr)
            model.train()
    bar.close()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # in place: `model` computes in its own dtype again
    return state


@torch.no_grad()
def continuation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The greedy answer to `prompt`, at most 64 tokens. Leaves the model in evaluation mode."""
    model.eval()
    text = f"{BOS}{MARKERS['user']}{prompt}{MARKERS['assistant']}"
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    output_ids = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=64, do_sample=False
    )
    return tokenizer.decode(output_ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, tokens_SL: Tensor) -> float:
    """Nats a token over all sequences."""
    model.eval()
    losses = [model(input_ids=row_L[None], labels=row_L[None]).loss for row_L in tokens_SL.to(model.device)]
    return torch.stack(losses).mean().item()


def card(name: str, *, recipe: Recipe, report: dict, documents: Sequence[Document], samples: dict[str, str]) -> str:
    """The model's README.md. report: what `pretrain` returns; samples: continuations by prompt."""
    preset = recipe.preset
    num_documents = Counter(document.domain for document in documents)
    num_characters = Counter()
    for document in documents:
        num_characters[document.domain] += sum(len(text) for _, text in document.messages)
    sources = "\n".join(
        f"| {domain} | {count} | {num_characters[domain] / 1e6:.2f} | {recipe.mix.get(domain, 1):g} |"
        for domain, count in num_documents.most_common()
    )
    answers = "\n".join(f"* {prompt}\n  > {' '.join(answer.split())}" for prompt, answer in samples.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A small Llama for tests, demos and benchmarks of speculative decoding. It writes in the form of its training text and is
wrong about most facts. Chat template: `<s><|user|>...<|assistant|>...</s>`.

| | |
|---|---|
| preset of `scripts/pretrain_reference.py` | {preset.name}, seed {recipe.seed} |
| parameters | {report["num_parameters"] / 1e6:.2f} M, bfloat16 |
| layers, width, MLP | {preset.num_layers}, {preset.hidden_size}, {preset.intermediate_size} |
| heads, KV heads, width of each | {preset.num_heads}, {preset.num_kv_heads}, {preset.head_dim} |
| vocabulary, context | {preset.vocab_size} (byte-level BPE, untied head), {preset.context_len} |
| tokens seen | {report["tokens_seen"] / 1e6:.2f} M, {report["epochs"]:.2f} epochs |
| steps | {report["steps"]} of {preset.batch_size} sequences of {preset.sequence_len} tokens |
| optimizer | AdamW, peak learning rate {preset.lr:g}, cosine |
| time | {report["minutes"]:.1f} minutes on {report["device"]} |
| training loss at the end | {report["train_loss"]:.3f} nats a token |
| held-out loss | {report["heldout_loss"]:.3f} nats a token |

## Training text

| domain | documents | M characters | weight |
|---|---|---|---|
{sources}

## Samples

Greedy, at most 64 tokens, not chosen.

{answers}

## Licence

Apache-2.0 for the weights; the training text keeps the licences of its sources.
"""


def pretrain(*, corpus: Path, output: Path, recipe: Recipe, report_every: int = 250) -> dict:
    """Everything from the corpus to the finished folder; returns the figures of the last line of output."""
    if (output / "config.json").exists():
        raise ValueError(f"--output must be a new folder or an unfinished run, got the finished model {output}")
    preset = recipe.preset
    documents = read_corpus(corpus)
    chosen = mixed(documents, recipe.mix, seed=recipe.seed)
    # Documents, not sequences, are held out, with all their copies: a repeated one would be known by heart.
    heldout = dict.fromkeys(list(dict.fromkeys(chosen))[: max(4, min(400, len(documents) // 100))])
    chosen = [document for document in chosen if document not in heldout]

    output.mkdir(parents=True, exist_ok=True)
    if not (output / STATE_FILE).exists():
        train_tokenizer(chosen, preset.vocab_size).save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    tokens_SL = pack(chosen, tokenizer, preset.sequence_len)
    heldout_SL = pack(list(heldout), tokenizer, preset.sequence_len)

    set_seed(recipe.seed)
    model = LlamaForCausalLM(preset.model_config())
    state = train(model, tokenizer, tokens_SL, recipe=recipe, state_path=output / STATE_FILE, report_every=report_every)

    model.to(torch.bfloat16)  # before measuring: the figures and samples are of the weights that are written
    is_cuda = model.device.type == "cuda"
    report = {
        "preset": preset.name,
        "num_parameters": model.num_parameters(),
        "steps": state.step,
        "tokens_seen": state.tokens,
        "epochs": state.tokens / tokens_SL.numel(),
        "train_loss": state.loss,
        "heldout_loss": mean_loss(model, heldout_SL),
        "minutes": state.seconds / 60,
        "device": torch.cuda.get_device_name() if is_cuda else f"{torch.get_num_threads()} CPU threads",
    }
    samples = {prompt: continuation(model, tokenizer, prompt) for prompt in SAMPLE_PROMPTS}
    readme = card(output.name, recipe=recipe, report=report, documents=documents, samples=samples)
    (output / "README.md").write_text(readme, encoding="utf-8")
    model.save_pretrained(output, max_shard_size=MAX_SHARD_SIZE)
    (output / STATE_FILE).unlink(missing_ok=True)
    return report


def parse_mix(entries: Sequence[str]) -> dict[str, float]:
    """{"math": 2.0} of ["math=2"]."""
    mix = {}
    for entry in entries:
        domain, _, weight = entry.partition("=")
        try:
            mix[domain] = float(weight)
        except ValueError:
            raise ValueError(f"--mix must look like domain=weight, got {entry!r}; try math=2") from None
        if not 0 <= mix[domain] < math.inf:
            raise ValueError(f"a weight of --mix must be >= 0 and finite, got {entry!r}; 0 leaves a domain out")
    return mix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help=".jsonl or .jsonl.xz file, see above")
    parser.add_argument("--preset", choices=PRESETS, required=True, help="size of the model")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model; a run's state lies there too")
    parser.add_argument("--max-tokens", type=int, help="stop after so many tokens; default 10 M (11m) or 200 M (25m)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes of training, if that comes first")
    parser.add_argument("--seed", type=int, default=0, help="of weights, shuffling and mix (default 0)")
    mix_help = "repeat a domain (2), thin it (0.5) or leave it out (0)"
    parser.add_argument("--mix", nargs="+", default=[], metavar="DOMAIN=WEIGHT", help=mix_help)
    options = parser.parse_args()
    for flag, value in (("--max-tokens", options.max_tokens), ("--minutes", options.minutes)):
        if value is not None and value <= 0:
            parser.error(f"{flag} must be > 0, got {value}; leave it out for the default")
    preset = PRESETS[options.preset]
    try:
        recipe = Recipe(
            preset=dataclasses.replace(preset, max_tokens=options.max_tokens or preset.max_tokens),
            minutes=options.minutes,
            seed=options.seed,
            mix=parse_mix(options.mix),
        )
        report = pretrain(corpus=options.corpus, output=options.output, recipe=recipe)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps({"output": str(options.output), **report}))


if __name__ == "__main__":
    main()
