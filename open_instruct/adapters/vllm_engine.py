"""Answers computed by vLLM in this process, for files too large for the own loop: `--engine vllm`.

Soft prompts are merged into a temporary checkpoint, which vLLM serves as a server would; LoRA adapters are given to it
as they are. Prompts are the same token ids as with the own loop, so greedy answers are the same but for near ties.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from open_instruct.adapters import merging
from open_instruct.adapters.base_changes import BaseChanges
from open_instruct.adapters.folders import AdapterFolder, quantisation
from open_instruct.adapters.generation import Sampling, seed_of, turn_ends
from open_instruct.errors import InputError
from open_instruct.serving.checkpoint import read_prefixes, read_tokens
from open_instruct.serving.vllm_command import CONNECTOR, PROCESSOR

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
BEYOND_LORA = ("use_dora", "modules_to_save", "trainable_token_indices")  # settings of an adapter
MEMORY = 0.6  # share of a GPU that vLLM takes: the base of the own loop stays there too


def check_engine(folders: Sequence[AdapterFolder]) -> None:
    """Refuse what vLLM can't answer with, before anything is loaded.

    Raises:
        InputError: vLLM is not installed, or it can't serve an adapter.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError("--engine vllm: vLLM is not installed in this environment: pip install vllm, or leave it out")
    for folder in folders:
        if folder.prompt_kind and not folder.lora:  # which would change the base that the others share
            continue
        if not (folder.method and folder.method.known_to_vllm) or any(map(folder.settings.get, BEYOND_LORA)):
            raise InputError(
                f"--engine vllm: adapter {folder.name} is {folder.title}, which vLLM does not know: merge it with "
                "merge_peft.py and give the result as --model_name_or_path, or leave --engine out"
            )
        if quantisation([folder]):
            raise InputError(
                f"--engine vllm: adapter {folder.name} was trained on a quantised base, which vLLM would not have: "
                "merge it with merge_peft.py and give the result as --model_name_or_path, or leave --engine out"
            )
        if not folder.base_changes.same(BaseChanges()):
            raise InputError(
                f"--engine vllm: adapter {folder.name} was trained on its base {folder.base_changes.text()}, which "
                "vLLM would load without: merge it with merge_peft.py and give the result as --model_name_or_path, or "
                "leave --engine out"
            )


class VllmEngine:
    """vLLM with a base and adapters on it."""

    def __init__(
        self, base: Any, name: str, folders: Sequence[AdapterFolder], tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> None:
        """Merge the soft prompts, and start vLLM.

        Args:
            base: the base as it is loaded here; vLLM loads its own.
            name: name or folder of the base.
            folders: adapters, after `check_engine`.
            tokenizer: decodes the answers.
            options: `trust_remote_code` and `allow_pickle` of `merging.merge`.
        """
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self.tokenizer = tokenizer
        self.end_ids, self.end_text = turn_ends(base, tokenizer)
        self.folder = tempfile.TemporaryDirectory(prefix="merged-")
        self.tokens: dict[str, list[int]] = {}
        dtype = str(base.dtype).removeprefix("torch.")
        settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": options["trust_remote_code"]}
        prompts = [folder for folder in folders if folder.prompt_kind]
        if prompts:
            words = [f"{folder.name}={folder.path}" for folder in prompts]
            merged = Path(self.folder.name) / "merged"
            merging.merge(words, str(merged), name, dtype, any_base=True, **options)
            for adapter, entry in read_tokens(merged).items():
                self.tokens[adapter] = list(range(entry["first"], entry["first"] + entry["number"]))
            name, settings["logits_processors"] = str(merged), [PROCESSOR]
            if read_prefixes(merged):
                settings["kv_transfer_config"] = KVTransferConfig(**CONNECTOR)
        loras = [folder for folder in folders if not folder.prompt_kind]
        if loras:
            rank = max(int(folder.settings["r"]) for folder in loras)
            # vLLM 0.32 on CPUs gives requests without LoRA the last slot's, where others in the batch have one.
            settings |= {"enable_lora": True, "max_loras": len(loras) + 1}
            settings["max_lora_rank"] = next((size for size in LORA_RANKS if size >= rank), rank)
        if torch.cuda.is_available():
            settings["gpu_memory_utilization"] = MEMORY
        else:
            settings["enforce_eager"] = True
        self.loras = {folder.name: (number, folder.path) for number, folder in enumerate(loras, 1)}
        self.engine: Any = LLM(model=name, **settings)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        name: str,
        sampling: Sampling,
        max_length: int | None,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[str]]]:
        """Yield the answers of one adapter; see `generation.generate`. What is drawn at random is vLLM's."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        inputs, params, indices = [], [], []
        for index, prompt in enumerate(prompts):
            max_tokens = sampling.max_new_tokens
            if max_length is not None:
                max_tokens = min(max_tokens, max_length - len(prompt))
            if max_tokens <= 0:
                yield index, [""] * sampling.num_return_sequences
                continue
            indices.append(index)
            inputs.append({"prompt_token_ids": [*self.tokens.get(name, []), *prompt]})
            params.append(
                SamplingParams(
                    n=sampling.num_return_sequences,
                    max_tokens=max_tokens,
                    temperature=sampling.temperature if sampling.do_sample else 0.0,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    repetition_penalty=sampling.repetition_penalty,
                    seed=seed_of(seeds[index] if seeds else sampling.seed, prompt, 0) if sampling.do_sample else None,
                    stop_token_ids=self.end_ids,
                    stop=[self.end_text] if self.end_text else None,
                )
            )
        lora = LoRARequest(name, self.loras[name][0], str(self.loras[name][1])) if name in self.loras else None
        outputs = self.engine.generate(inputs, params, lora_request=lora, use_tqdm=False) if inputs else []
        for index, output in zip(indices, outputs, strict=True):
            yield index, [self.text_of(answer.token_ids) for answer in output.outputs]

    def text_of(self, ids: Sequence[int]) -> str:
        """Return an answer as the own loop writes it."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return (text.partition(self.end_text)[0] if self.end_text else text).strip()
