"""Pretrain the model that looks facts up in its context: a word tokenizer, and a Llama of half a million parameters.

Run from the repository root: python -m assets.make_lookup_model [--output_dir assets/lookup-model]

It takes some minutes on 2 CPU cores. The same machine, torch version and thread count give the same weights. Half of
each batch is a list of words that is copied: it makes looking up appear within some hundred steps.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from assets.book import ANIMALS, COMMA, ONE, THINGS, TWO, conversation, draw_book, text_of
from open_instruct.data.chat import CHAT_TEMPLATES, render, token_spans

ROWS = 24  # books of a step, and as many lists to copy
MOST_FACTS = 48
TURNS = 8  # questions about each book
CONTEXT_LENGTH = 512


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, split at white space."""
    words = {word for wording in (*ONE, *TWO) for word in wording.replace("{}", "").split()}
    special = ["<pad>", "<unk>", "</s>"]
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = [*special, *roles, *dict.fromkeys((COMMA, *sorted(words), *ANIMALS, *THINGS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(role, normalized=False, special=False) for role in roles])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATES["tulu"]
    return fast


def books(rng: random.Random, tokenizer: PreTrainedTokenizerFast, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return conversations about books of one length, as ids and labels [ROWS, T]; -100 where nothing is learned."""
    num_facts, batch = rng.randint(4, most), []
    for _ in range(ROWS):
        facts = draw_book(rng, num_facts)
        messages = [{"role": "system", "content": text_of(facts)}]
        for _ in range(TURNS):
            asked = rng.sample(facts, rng.choice((1, 1, 2)))
            messages += conversation(asked, rng.choice(ONE if len(asked) == 1 else TWO))
        batch.append(messages)
    texts, spans = render(tokenizer, batch)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    length = max(len(ids) for ids in encoded["input_ids"])
    ids = torch.zeros(ROWS, length, dtype=torch.long)
    labels = torch.full((ROWS, length), -100)
    for row, (tokens, offsets, answers) in enumerate(
        zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
    ):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        for start, end in token_spans(offsets, answers):
            labels[row, start:end] = ids[row, start:end]
    return ids, labels


def copies(length: int, vocabulary_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lists of random tokens that come twice, as ids and labels [ROWS, length]."""
    half = torch.randint(0, vocabulary_size, (ROWS, length // 2))
    ids = torch.cat([half, half, torch.zeros(ROWS, length - 2 * half.shape[1], dtype=torch.long)], 1)
    labels = ids.clone()
    labels[:, : half.shape[1] + 1] = -100
    labels[:, 2 * half.shape[1] :] = -100
    return ids, labels


def recall(logits: torch.Tensor, labels: torch.Tensor, things: torch.Tensor) -> float:
    """Return the share of the labelled things that are predicted right."""
    asked = torch.isin(labels[:, 1:], things)
    return (logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean().item()


def main() -> None:
    """Train until the longest books are answered, save, and record what the model can do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="assets/lookup-model")
    parser.add_argument("--num_steps", type=int, default=1200)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(2)
    rng = random.Random(arguments.seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    things = torch.tensor(tokenizer.convert_tokens_to_ids(list(THINGS)))
    most, right, started = 8, 0.0, time.time()
    for step in range(1, arguments.num_steps + 1):
        ids, labels = books(rng, tokenizer, most)
        copied, copied_labels = copies(min(ids.shape[1], 128), len(tokenizer))
        total = torch.zeros(())
        for inputs, targets in ((ids, labels), (copied, copied_labels)):
            logits = model(input_ids=inputs).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
            loss.backward()
            total += loss.detach()
            if targets is labels:
                right = recall(logits, labels, things)
        rate = min(1.0, step / 100) * min(1.0, 4 * (1 - (step - 1) / arguments.num_steps))
        optimizer.param_groups[0]["lr"] = arguments.learning_rate * rate
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        most = min(MOST_FACTS, most + 2) if right > 0.9 else most
        if step % 50 == 0:
            print(
                f"step {step}/{arguments.num_steps}  loss {total.item():.4f}  {right:.1%} of facts right, books of up "
                f"to {most} facts  {time.time() - started:.0f} s",
                flush=True,
            )
    model.eval()
    with torch.no_grad():
        tests = [books(rng, tokenizer, MOST_FACTS) for _ in range(20)]
        right = sum(recall(model(input_ids=ids).logits, labels, things) for ids, labels in tests) / len(tests)
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    record = {
        "command_arguments": {k: v for k, v in vars(arguments).items() if k != "output_dir"},
        "torch": torch.__version__,
        "recall": right,
    }
    Path(arguments.output_dir, "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {right:.1%} right, {time.time() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
