"""Trained adapters on one base model: found, checked, loaded, switched.

Any folder in PEFT's format will do, whatever tool wrote it. Several adapters of any methods share one base in memory; one is active
at a time.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from open_instruct.errors import InputError
from open_instruct.model import loading

BASE = "base"  # the name under which the plain model is asked for
SOFT_PROMPTS = {"PROMPT_TUNING": "prompt tuning", "P_TUNING": "P-tuning", "PREFIX_TUNING": "prefix tuning"}
KNOWN = ("LORA", "IA3", *SOFT_PROMPTS)
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk."""

    name: str
    path: Path
    config: PeftConfig

    @property
    def method(self) -> str:
        """PEFT's name of the method: LORA, IA3, PROMPT_TUNING, P_TUNING, PREFIX_TUNING and so on."""
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    @property
    def title(self) -> str:
        """The method's name in prose."""
        return SOFT_PROMPTS.get(self.method, {"LORA": "LoRA"}.get(self.method, self.method))

    @property
    def num_virtual_tokens(self) -> int:
        """P of a soft prompt, else 0."""
        return self.config.num_virtual_tokens if self.method in SOFT_PROMPTS else 0

    @property
    def record(self) -> dict[str, Any]:
        """run.json of the run that trained it; empty where another tool did."""
        try:
            found = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("flags"), dict) else {}

    def trained_on(self, flag: str) -> Any:
        """Value of a flag in the run that trained it, or None."""
        return self.record.get("flags", {}).get(flag, {}).get("value")


def parse_adapters(words: Sequence[str] | None) -> list[AdapterFolder]:
    """Adapters of `--adapter DIR` or `--adapter NAME=DIR`, each read and checked.

    Raises:
        InputError: a name twice, or a folder that holds no usable adapter.
    """
    found: dict[str, AdapterFolder] = {}
    for word in words or []:
        name, separator, place = word.partition("=")
        if not separator or Path(word).is_dir():
            name, place = Path(word).name or "adapter", word
        if not separator or Path(word).is_dir():
            name = re.sub(r"[^\w.-]", "_", name)
        if not re.fullmatch(r"[\w.-]+", name):
            raise InputError(
                f"--adapter {word} is named {name!r}: a name is made of letters, digits, points, dashes and underscores"
            )
        if name == BASE:
            raise InputError(
                f"--adapter {word} is named {BASE!r}, which stands for the plain model: give another name, --adapter NAME={place}"
            )
        if name in found:
            raise InputError(
                f"two adapters are named {name!r} ({found[name].path} and {place}): give names, --adapter NAME={place}"
            )
        found[name] = read_folder(name, place)
    return list(found.values())


def read_folder(name: str, place: str) -> AdapterFolder:
    """Read an adapter's configuration, from a folder or the Hub.

    Raises:
        InputError: no such folder, no adapter in it, or weights only as pickle.
    """
    path = Path(place)
    if not path.is_dir():
        if path.exists() or place.startswith((".", "/", "~")) or place.count("/") != 1:
            raise InputError(f"no such adapter folder: {place}")
        from huggingface_hub import snapshot_download

        with loading.readable(f"adapter {place}"):
            path = Path(
                snapshot_download(place, allow_patterns=["*.json", "*.jinja", "*.model", "adapter_model.safetensors"])
            )
    if not (path / "adapter_config.json").is_file():
        full = (path / "config.json").is_file()
        hint = (
            "it holds a whole model, which is a base: use --model_name_or_path"
            if full
            else "name the folder that a run saved into"
        )
        raise InputError(f"adapter folder {place} has no adapter_config.json: {hint}")
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise InputError(
                f"adapter folder {place} has its weights only as pickle (adapter_model.bin), and loading one can run code that is in it: "
                "convert it to safetensors where you trust it"
            )
        raise InputError(f"adapter folder {place} has no {WEIGHTS}: it is incomplete")
    with loading.readable(f"adapter {place}"):
        config = PeftConfig.from_pretrained(str(path))
    return AdapterFolder(name, path, config)


def base_name(asked: str | None, folders: Sequence[AdapterFolder], any_base: bool = False) -> str:
    """The base model of a command: the one that was asked for, or the one that the adapters name.

    Raises:
        InputError: none is known, or an adapter was trained on another one.
    """
    recorded = {folder.name: folder.config.base_model_name_or_path for folder in folders}
    if asked is None:
        names = [name for name in recorded.values() if name]
        if not names:
            raise InputError(
                "no base model is known: give --model_name_or_path" + (", as the adapter names none" if folders else "")
            )
        asked = names[0]
        if Path(asked).is_absolute() and not Path(asked).is_dir():
            raise InputError(
                f"the adapter's base model was at {asked}, which is not there: say where it is now, --model_name_or_path DIR"
            )
    for name, trained in recorded.items():
        if trained and not any_base and not same_base(asked, trained):
            raise InputError(
                f"adapter {name} was trained on {trained}, and the base model here is {asked}: give that one, or --any_base if both are "
                "one model under two names"
            )
    return asked


def same_base(one: str, other: str) -> bool:
    """Whether two names mean the same base: the same folder, equal content, or a last part in common where one has moved."""
    first, second = Path(one), Path(other)
    if one == other or (first.is_dir() and second.is_dir() and first.resolve() == second.resolve()):
        return True
    if first.is_dir() and second.is_dir():
        keys = [loading.weights_key(name, loading.load_config(name)) for name in (one, other)]
        return keys[0] == keys[1]
    return first.name.lower() == second.name.lower()


def quantisation(folders: Sequence[AdapterFolder]) -> str | None:
    """In which form all of these adapters knew their base: "4bit", "8bit", or None for whole weights or where they differ."""
    forms = set()
    for folder in folders:
        four = folder.trained_on("use_qlora") or folder.trained_on("load_in_4bit")
        forms.add("4bit" if four else "8bit" if folder.trained_on("load_in_8bit") else None)
    if len(forms) > 1:
        names = ", ".join(folder.name for folder in folders)
        print(
            f"warning: {names} were trained on differently quantised bases, and share one of whole weights here",
            file=sys.stderr,
        )
    return forms.pop() if len(forms) == 1 else None


class Adapters:
    """A base model with adapters by name, of which one at a time is active.

    `models` maps names to what runs: the base itself under "base", a PeftModel for each adapter. Call `use` before running one, as
    layers of LoRA and IA3 stand in the shared base and act on every model until they are switched off.
    """

    def __init__(self, base: nn.Module, folders: Sequence[AdapterFolder]) -> None:
        """Load the adapters onto the base.

        Raises:
            InputError: an adapter does not fit the base.
        """
        self.base: Any = base
        self.folders = {folder.name: folder for folder in folders}
        self.models: dict[str, Any] = {BASE: base}
        self.keys: dict[
            str, str
        ] = {}  # inside PEFT, which allows no dots, and mistakes some names for parts of its own
        for folder in folders:
            if folder.method not in KNOWN:
                raise InputError(
                    f"adapter {folder.name} is {folder.title}, which can't be used here: known are {', '.join(KNOWN)}"
                )
            self.keys[folder.name] = f"adapter_{len(self.keys)}"
            check_shapes(folder, base)
            try:
                self.models[folder.name] = PeftModel.from_pretrained(
                    base, str(folder.path), adapter_name=self.keys[folder.name]
                ).eval()
            except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
                text, trained = (
                    " ".join(str(error).split())[:300],
                    folder.config.base_model_name_or_path or "another model",
                )
                raise InputError(
                    f"adapter {folder.name}, trained on {trained}, does not fit the base {name_of(base)}: {text}"
                ) from None
        self.use(BASE)

    def use(self, name: str) -> Any:
        """Make one adapter (or "base") active and return the model to run."""
        if name not in self.models:
            raise InputError(f"no adapter {name!r}: there are {', '.join(self.models)}")
        for module in self.base.modules():
            if isinstance(module, BaseTunerLayer):
                key = self.keys.get(name, "")
                mine = any(key in getattr(module, part) for part in module.adapter_layer_names)
                if mine:
                    module.set_adapter(key)
                module.enable_adapters(mine)
                module.requires_grad_(False)
            elif isinstance(module, AuxiliaryTrainingWrapper):  # whole layers that an adapter replaces
                mine = self.keys.get(name, "") in module._adapters
                if mine:
                    module.set_adapter([self.keys[name]])
                module.enable_adapters(mine)
                module.requires_grad_(False)
        return self.models[name]


def check_shapes(folder: AdapterFolder, base: Any) -> None:
    """A soft prompt of another width or depth would fail late, or not at all.

    Raises:
        InputError: naming both models.
    """
    config = base.config.get_text_config()
    expected = config.hidden_size
    if folder.method == "PREFIX_TUNING":
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        expected = 2 * config.num_hidden_layers * heads * size
    if folder.method in SOFT_PROMPTS:
        try:
            with safe_open(str(folder.path / WEIGHTS), "pt") as file:
                shape = tuple(file.get_slice("prompt_embeddings").get_shape())
        except (SafetensorError, OSError) as error:
            raise InputError(f"adapter {folder.name} ({folder.path}) can't be read: {error}") from None
        if shape != (folder.num_virtual_tokens, expected):
            trained = folder.config.base_model_name_or_path or "another model"
            raise InputError(
                f"adapter {folder.name} holds {shape[0]} × {shape[1]} numbers for {trained}, and the base {name_of(base)} needs "
                f"{folder.num_virtual_tokens} × {expected}: give the base that it was trained on"
            )


def name_of(base: Any) -> str:
    """What a model was loaded from."""
    return base.config._name_or_path or type(base).__name__


def chat_template(path: Path) -> str | None:
    """The chat template that an adapter's folder holds."""
    if not (path / "tokenizer_config.json").is_file():
        return None
    return loading.load_tokenizer(str(path)).chat_template


def load_tokenizer(
    base: str, folders: Sequence[AdapterFolder], trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The first adapter's own tokenizer, with the chat template that it was trained with, or the base's."""
    places = [str(folder.path) for folder in folders if (folder.path / "tokenizer_config.json").is_file()]
    tokenizer = loading.load_tokenizer(places[0] if places else base, trust_remote_code=trust_remote_code)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    return tokenizer


def load_base(
    name: str,
    dtype: str,
    folders: Sequence[AdapterFolder] = (),
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Any:
    """The base model as its adapters knew it, on the GPU if there is one, in evaluation mode. `dtype`: one of `--dtype`."""
    revisions = {folder.trained_on("model_revision") for folder in folders}
    if len(revisions) > 1:
        raise InputError(
            f"the adapters were trained on different revisions of the base ({', '.join(map(str, revisions))}): use them one at a time"
        )
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "revision": revisions.pop() if revisions else None,
    }
    quantise = quantisation(folders)
    config = loading.load_config(name, **options)
    kind = (
        (getattr(config.get_text_config(), "dtype", None) or torch.float32)
        if dtype == "stored"
        else loading.choose_dtype(dtype)
    )
    model = loading.load_model(name, config, kind, loading.choose_attention(None), quantise, allow_pickle, **options)
    if not quantise:
        model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.config.use_cache = True
    return model.eval()
