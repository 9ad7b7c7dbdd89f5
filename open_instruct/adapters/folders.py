"""Trained adapters on disk, in PEFT's format, whatever tool wrote them: found, read, and checked against their base.

Command lines use this module before anything heavy is imported. So it reads `adapter_config.json` as the JSON that it
is, and imports peft, transformers and torch only inside the two functions that need them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from open_instruct.adapters.base_changes import BaseChanges, same_base
from open_instruct.errors import InputError, input_faults, one_line, warn
from open_instruct.files import check_path, check_readable
from open_instruct.flags import FIELDS
from open_instruct.flags.quantisation import bits_of, form_of_base
from open_instruct.methods import METHODS, Method, method_of_pair, method_of_type, placement
from open_instruct.methods.prompt_and_lora import PARTS

if TYPE_CHECKING:
    from peft import PeftConfig

BASE = "base"  # the name that stands for the plain model
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
REPAIR = "repair the file, or copy the adapter again"
TEXTS = ("base_model_name_or_path", "revision")  # values of adapter_config.json that are texts, where there are any


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Args:
        name: how the user refers to it.
        path: its folder.
        settings: content of its `adapter_config.json`.
        part: sub-folder of its files, where a soft prompt and LoRA were trained together.
        lora: of such a soft prompt, the LoRA.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    part: str = ""
    lora: AdapterFolder | None = None

    @property
    def files(self) -> Path:
        """Folder of its files in PEFT's format."""
        return self.path / self.part

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method: LORA, IA3, PROMPT_TUNING, P_TUNING, PREFIX_TUNING and so on."""
        return str(self.settings["peft_type"])

    @property
    def is_own(self) -> bool:
        """Whether it is a soft prompt in a format of our own, which plain PEFT refuses; see `methods.placement`."""
        return self.peft_type in placement.PEFT_TYPES

    @property
    def method(self) -> Method | None:
        """The method that makes such adapters; None where this project knows none."""
        return method_of_pair(self.peft_type, self.lora.peft_type) if self.lora else method_of_type(self.peft_type)

    @cached_property
    def config(self) -> PeftConfig:
        """PEFT's own object of the settings. Building it imports peft, and with it torch.

        Raises:
            InputError: PEFT can't read the settings.
        """
        from peft import PeftConfig

        with input_faults(f"adapter {self.name} ({self.files / CONFIG})", REPAIR):
            if self.is_own:
                from open_instruct.model.placed_prompts import config_of

                return config_of(self.settings)
            return PeftConfig.from_pretrained(str(self.files))

    @property
    def title(self) -> str:
        """The method's name in prose, and the places of a soft prompt of our own."""
        places = f" at {' and '.join(self.settings[placement.NAME])}" if self.is_own else ""
        return self.method.title + places if self.method else self.peft_type

    @property
    def prompt_kind(self) -> str | None:
        """Parts of its soft prompt: "embeddings" or "keys_values"; None where it has no soft prompt."""
        return self.method.prompt_kind if self.method else None

    @property
    def num_virtual_tokens(self) -> int:
        """P of a soft prompt, else 0."""
        return int(self.settings["num_virtual_tokens"]) if self.prompt_kind else 0

    @property
    def trained_base(self) -> str | None:
        """Name of the base model that it was trained on, where it names one."""
        return self.settings.get("base_model_name_or_path") or None

    @cached_property
    def record(self) -> dict[str, Any]:
        """Content of the run.json of the run that trained it; empty where another tool did.

        Raises:
            InputError: it can't be read; without it, the wrong base might be used.
        """
        path = self.path / "run.json"
        if not path.exists():
            return {}
        with input_faults(f"adapter {self.name}: {path}", REPAIR):
            if not path.is_file():  # reading a pipe would wait for ever
                raise ValueError("it is no file")
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not isinstance(content.get("flags", {}), dict):
                raise ValueError("it holds no flags")
            return content

    @property
    def hard_prompt(self) -> Any:
        """Text or messages that stood between its soft prompt and every example in training, or None.

        Raises:
            InputError: the record of the run is damaged.
        """
        if self.record.get("hard_prompt") is None:
            return None
        from open_instruct.data.hard_prompt import recorded  # imports transformers

        return recorded(self.record["hard_prompt"], f"adapter {self.name}: {self.path / 'run.json'}")

    def trained_on(self, flag: str) -> Any:
        """Return the value of a flag in the run that trained it, or None.

        Raises:
            InputError: the record of the run is damaged.
        """
        entry = self.record.get("flags", {}).get(flag)
        if entry is None:
            return None
        value = entry.get("value") if isinstance(entry, dict) else entry
        default = FIELDS[flag].default
        kind = str if default is None else type(default)  # of the flags that describe a base
        if not isinstance(entry, dict) or not isinstance(value, (kind, NoneType)):
            path = self.path / "run.json"
            raise InputError(f"adapter {self.name}: {path} can't be used (its flag {flag} is {value!r}): {REPAIR}")
        return value

    @property
    def base_changes(self) -> BaseChanges:
        """What its base was besides its name."""
        revision = self.trained_on("model_revision") or self.settings.get("revision")
        return BaseChanges(revision, self.trained_on("config_name"), self.trained_on("additional_model_arguments"))


def parse_adapters(words: Sequence[str] | None) -> list[AdapterFolder]:
    """Return the adapters of `--adapter DIR` or `--adapter NAME=DIR`, each read and checked.

    Raises:
        InputError: a name is used twice, or a folder holds no usable adapter.
    """
    folders: dict[str, AdapterFolder] = {}
    for word in words or []:
        name, separator, source = word.partition("=")
        if not separator or Path(word).is_dir():
            name, source = re.sub(r"[^\w.-]", "_", Path(word).name or "adapter"), word
        if not re.fullmatch(r"[\w.-]+", name):
            raise InputError(
                f"--adapter {word} is named {name!r}: a name is made of letters, digits, points, dashes and underscores"
            )
        if name == BASE:
            raise InputError(
                f"--adapter {word} is named {BASE!r}, which stands for the plain model: "
                f"give another name, --adapter NAME={source}"
            )
        if name in folders:
            raise InputError(
                f"two adapters are named {name!r} ({folders[name].path} and {source}): "
                f"give names, --adapter NAME={source}"
            )
        folders[name] = read_folder(name, source)
    return list(folders.values())


def read_folder(name: str, source: str) -> AdapterFolder:
    """Read an adapter's settings, or those of a soft prompt and LoRA that were trained together.

    Args:
        name: how the user refers to it.
        source: a folder, or a repository on the Hub, which is downloaded.

    Raises:
        InputError: there is no such folder, or no adapter in it, or it has its weights only as pickle; or two adapters
            are no soft prompt and LoRA on one base.
    """
    path = Path(source)
    if not path.is_dir():
        if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise InputError(f"no such adapter folder: {source}")
        path = download(source)
    check_readable(path)
    if (path / CONFIG).is_file() or not all((path / part).is_dir() for part in PARTS):
        return read_part(name, path, source)
    prompt, lora = (read_part(name, path, f"{source}/{part}", part) for part in PARTS)
    pair = replace(prompt, lora=lora)
    bases = [adapter.trained_base or "" for adapter in (prompt, lora)]
    if pair.method is None or not same_base(*bases):
        both = " and ".join(f"{adapter.part} ({adapter.peft_type})" for adapter in (prompt, lora))
        raise InputError(
            f"adapter folder {source} holds {both}, which are no soft prompt and LoRA that were trained together: name "
            "one of these sub-folders"
        )
    return pair


def read_part(name: str, path: Path, source: str, part: str = "") -> AdapterFolder:
    """Read the settings of one adapter of PEFT; see `read_folder`, and `AdapterFolder` for `part`."""
    files = path / part
    if not (files / CONFIG).is_file():
        hint = (
            "it holds a full model, which is a base: use --model_name_or_path"
            if (files / "config.json").is_file()
            else "name the folder that a run saved into"
        )
        raise InputError(f"adapter folder {source} has no {CONFIG}: {hint}")
    if not (files / WEIGHTS).is_file():
        if (files / "adapter_model.bin").is_file():
            raise InputError(
                f"adapter folder {source} has its weights only as pickle (adapter_model.bin), and loading one can run "
                "code that is in it: convert it to safetensors where you trust it"
            )
        raise InputError(f"adapter folder {source} has no {WEIGHTS}: it is incomplete")
    return AdapterFolder(name, path, read_settings(files / CONFIG, source), part)


def read_settings(path: Path, source: str) -> dict[str, Any]:
    """Return the content of an `adapter_config.json` that has what this package relies on.

    Raises:
        InputError: it is no JSON object, names no method, or a soft prompt's length is missing.
    """
    with input_faults(f"adapter {source}: {path}", REPAIR):
        settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise InputError(unreadable(source, f"its {CONFIG} names no peft_type"))
    for name in TEXTS:
        if not isinstance(settings.get(name), (str, NoneType)):
            raise InputError(unreadable(source, f"its {name} is {settings[name]!r}, not a text"))
    if reason := placement.bad_places(settings):
        raise InputError(unreadable(source, reason))
    num_virtual_tokens = settings.get("num_virtual_tokens")
    method = method_of_type(settings["peft_type"])
    is_soft_prompt = method is not None and method.is_soft_prompt
    if is_soft_prompt and not (type(num_virtual_tokens) is int and num_virtual_tokens > 0):
        raise InputError(unreadable(source, f"its num_virtual_tokens is {num_virtual_tokens!r}, not a positive number"))
    return settings


def download(name: str) -> Path:
    """Return the local folder of an adapter on the Hub.

    Raises:
        InputError: it can't be fetched.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", WEIGHTS, *(f"{part}/{WEIGHTS}" for part in PARTS)]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises dozens of types; each means that there is no adapter to use
        raise InputError(unreadable(name, error)) from error


def unreadable(source: str, reason: Exception | str) -> str:
    """Return the error message for an adapter that can't be loaded."""
    return f"adapter {source} can't be loaded ({one_line(reason, 400)}): check the name, the folder and the network"


def base_name(requested: str | None, folders: Sequence[AdapterFolder], any_base: bool = False) -> str:
    """Return the base model of a command: the requested one, or else the one that the adapters name.

    Args:
        requested: value of --model_name_or_path; None where it was not given.
        folders: the adapters.
        any_base: accept a base under another name than the adapters'.

    Raises:
        InputError: none is known, or an adapter was trained on another one.
    """
    if requested is None:
        names = [folder.trained_base for folder in folders if folder.trained_base]
        if not names:
            reason = ", as the adapter names none" if folders else ""
            raise InputError(f"no base model is known: give --model_name_or_path{reason}")
        requested = names[0]
        if Path(requested).is_absolute() and not Path(requested).is_dir():
            raise InputError(
                f"the adapter's base model was at {requested}, which is not there: "
                "say where it is now, --model_name_or_path DIR"
            )
    for folder in folders:
        if folder.trained_base and not any_base and not same_base(requested, folder.trained_base):
            raise InputError(
                f"adapter {folder.name} was trained on {folder.trained_base}, and the base model here is {requested}: "
                "give that one, or --any_base if both are one model under two names"
            )
    return requested


def quantisation(folders: Sequence[AdapterFolder], stated: str | None = None) -> str | None:
    """Return the form of the base on which all adapters were trained: "4bit", "8bit", JSON, or None for full precision.

    Where they differ it is None, with a warning. JSON is a quantisation configuration's.

    Args:
        folders: the adapters.
        stated: the form that the user names, which holds for adapters that record none.

    Raises:
        InputError: an adapter records another form than the stated one.
    """
    forms = set()
    for folder in folders:
        bits = "8bit" if folder.trained_on("load_in_8bit") else None
        bits = "4bit" if folder.trained_on("use_qlora") or folder.trained_on("load_in_4bit") else bits
        recorded = form_of_base(bits, folder.trained_on("quantisation_config"), None)
        if stated and folder.record and bits_of(recorded) != stated:
            raise InputError(
                f"adapter {folder.name} was trained on a base in {bits or 'full precision'}, not in {stated}: "
                "drop the flag that says so (--qlora)"
            )
        forms.add(recorded or stated)
    if len(forms) > 1:
        names = ", ".join(folder.name for folder in folders)
        warn(f"{names} were trained on differently quantised bases, and share one in full precision here")
    return forms.pop() if len(forms) == 1 else None


def check_mergeable(folders: Sequence[AdapterFolder], output: str) -> None:
    """Refuse what can't become a new plain checkpoint in the folder `output`.

    Raises:
        InputError: the folder exists; or there is no adapter, one that no plain checkpoint can hold, or several of
            which one changes weights.
    """
    if os.path.lexists(output) or Path(output).name in ("", ".."):
        raise InputError(f"--output {output} exists already: name another folder")
    check_path(Path(output), f"--output {output}")
    if not folders:
        raise InputError("nothing to merge: give --adapter DIR")
    for folder in folders:
        if folder.method is None or folder.is_own or not folder.method.merges_into:
            mergeable = ", ".join(
                method.title for method in METHODS.values() if method.merges_into and not method.quantises_base
            )
            raise InputError(f"adapter {folder.name} is {folder.title}, which can't be merged here: use {mergeable}")
        if folder.hard_prompt is not None:
            raise InputError(
                f"adapter {folder.name} was trained behind a hard prompt, which a merged checkpoint does not hold: use "
                "the adapter as it is, with generate_peft.py and evaluate_peft.py"
            )
    into_weights = [folder for folder in folders if folder.method and folder.method.merges_into != "tokens"]
    if len(folders) > 1 and into_weights:
        names = ", ".join(f"{folder.name} ({folder.title})" for folder in into_weights)
        raise InputError(
            f"{names} would change the weights that the others share: merge it alone, only soft prompts go together"
        )


def check_prompt(folder: AdapterFolder) -> None:
    """Refuse an adapter that is no soft prompt.

    Raises:
        InputError: it has no virtual tokens.
    """
    if not folder.prompt_kind:
        raise InputError(f"adapter {folder.name} is {folder.title}, which has no virtual tokens to inspect")
