"""The adapter of a run: a new one, or a trained one whose training continues, for every method.

PEFT's own `is_trainable=True` refuses soft prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from open_instruct.adapters import folders
from open_instruct.adapters.base_changes import BaseChanges
from open_instruct.adapters.folders import AdapterFolder
from open_instruct.adapters.loaded import check_patterns, needed_packages, new_tokens_of, read_weights
from open_instruct.errors import BUGS, InputError, input_faults, one_line, warn
from open_instruct.flags import Flags, check_flags
from open_instruct.methods import METHODS, Method, method_of
from open_instruct.methods.base import TrainedAdapter
from open_instruct.model.fit import try_out
from open_instruct.model.sizes import check_memory
from open_instruct.model.training_model import causal_of
from open_instruct.model.weights import read_tensors
from open_instruct.training.base_model import BaseModelSettings, absolute, skeleton
from open_instruct.training.faults import is_out_of_memory
from open_instruct.training.run_folder import NETWORK


def adopt_adapter(flags: Flags, origins: dict[str, str]) -> tuple[Flags, dict[str, str], AdapterFolder | None]:
    """Take method, size and base from the adapter whose training continues, where no flag names them.

    Returns:
        Flags and origins with what the adapter decides, and the adapter; None where the run makes a new one.

    Raises:
        InputError: the adapter can't be read, can't be continued, or contradicts the flags.
    """
    if not flags.adapter_name_or_path:
        return flags, origins, None
    folder = folders.read_folder("the adapter", flags.adapter_name_or_path)
    if folder.lora:
        raise InputError(
            f"--adapter_name_or_path {folder.path} holds {folder.title}, and a pair can't be trained further: name "
            f"{folder.files} or {folder.lora.files} to continue one of them alone"
        )
    values: dict[str, Any] = {}
    method = method_of(flags.method, flags.peft_config)
    if method.trains_base:  # no method was chosen
        quantising = [m for m in METHODS.values() if m.quantises_base and folder.trained_on(f"use_{m.name}")]
        maker = quantising[0] if quantising else folder.method
        if maker is None:
            known = ", ".join(m.title for m in METHODS.values() if m.peft_types)
            raise InputError(
                f"--adapter_name_or_path {folder.path} is {folder.title}, which can't be trained here: use {known}"
            )
        method = maker
        values |= quantisation_of(folder, origins)
    if new_tokens_of(folder):
        raise InputError(
            f"--adapter_name_or_path {folder.path} has new tokens, which can't be trained on: merge it with "
            "merge_peft.py, and train on the result"
        )
    given = BaseChanges(flags.model_revision, absolute(flags.config_name), flags.additional_model_arguments)
    values |= base_values(given, folder)
    if folder.peft_type not in method.continues_from:
        raise InputError(
            f"--adapter_name_or_path {folder.path} is {folder.title}, and the method is {method.name}: drop the "
            "method's flag"
        )
    values |= method.flags_of(folder.path)
    values |= method.adopt(folder.settings, (folder.path / NETWORK).is_file())
    check_adopted(values, folder)
    for name, value in values.items():
        if name in origins and getattr(flags, name) not in (None, value):
            raise InputError(f"--{name} {getattr(flags, name)} contradicts the {value} of {folder.path}: drop the flag")
    if folder.record.get("rendering") and not (flags.columns or flags.template or flags.shots):
        warn(
            f"{folder.path} was trained on rows with --columns, --template or --shots, and this run reads rows as they "
            "are: give these flags again to keep the form"
        )
    values["model_name_or_path"] = folders.base_name(flags.model_name_or_path, [folder])
    adopted = replace(flags, **values)
    taken = {name: "adapter" for name in values if name != "model_name_or_path"}
    check_flags(adopted, origins | taken)
    if method.keeps_network(adopted) and not (folder.path / NETWORK).is_file():
        raise InputError(
            f"{folder.path} does not hold its network ({NETWORK}), which only runs of this project keep: continue with "
            f"{method.network_remedy}"
        )
    return adopted, origins | taken, folder


def base_values(given: BaseChanges, folder: AdapterFolder) -> dict[str, str]:
    """Return the flags with which the adapter's base was loaded, where they were not given.

    One that the run did not have is allowed, and said: the adapter has not seen such a base.

    Raises:
        InputError: one was given with another value.
    """
    values, recorded = {}, folder.base_changes
    equal = [ours == theirs for ours, theirs in zip(given.comparable(), recorded.comparable(), strict=True)]
    for (name, value), is_equal in zip(asdict(given).items(), equal, strict=True):
        old = getattr(recorded, name)
        if value is None and old is not None:
            values[name] = old
        elif not is_equal and old is not None:
            raise InputError(f"--{name} {value} contradicts the {old} of {folder.path}: drop the flag")
        elif not is_equal and folder.record:
            warn(f"{folder.path} was trained without --{name} {value}: training continues on another form of its base")
    return values


def quantisation_of(folder: AdapterFolder, origins: Mapping[str, str]) -> dict[str, Any]:
    """Return the flags that quantise a base as the adapter's was, where no flag says how.

    Raises:
        InputError: the record of the run is damaged.
    """
    names = ("load_in_4bit", "load_in_8bit", "quantisation_config")
    if any(name in origins for name in (*names, "skip_modules")):
        return {}
    if configuration := folder.trained_on("quantisation_config"):  # complete, with the modules that were skipped
        return {"quantisation_config": configuration}
    return {name: True for name in names[:2] if folder.trained_on(name)}


def check_adopted(values: Mapping[str, Any], folder: AdapterFolder) -> None:
    """Refuse values of an adapter's settings that a flag could not have.

    Raises:
        InputError: naming one.
    """
    kinds = get_type_hints(Flags)
    for name, value in values.items():
        if not is_of(value, kinds[name]):
            raise InputError(f"the adapter's settings in {folder.path} can't be used (--{name} {value!r}): repair them")


def is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is one that a flag of this type could have."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in members
    if origin is list:
        return isinstance(value, list) and all(is_of(item, members[0]) for item in value)
    if members:
        return any(is_of(value, member) for member in members)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def put_adapter_on(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    settings: Any,
    folder: AdapterFolder | None,
    revision: str | None = None,
) -> Any:
    """Return the base with a new adapter, or with the trained one. On the meta device the adapter has no values.

    Args:
        model: the base, with values or on the meta device.
        tokenizer: the base's tokenizer.
        method: the method that makes the adapter.
        settings: an instance of the method's `settings_class`.
        folder: folder of the trained adapter, or None.
        revision: branch, tag or commit of the base; the adapter records it, so that plain PEFT loads the same one.

    Raises:
        InputError: the trained adapter does not fit the base, or PEFT can't put a new one on it.
    """
    if folder is None:
        if model.device.type != "meta":
            check_memory(method.num_numbers(model, settings), settings, model.device)
        try:
            wrapped: Any = method.wrap(model, tokenizer, settings)
        except (InputError, *BUGS):
            raise
        except Exception as error:  # PEFT's refusals of a model have many types
            if is_out_of_memory(error):
                raise InputError(f"there is no memory for an adapter with {settings}: give a smaller one") from None
            is_quantised = getattr(model, "is_quantized", False)
            kind = f"{'quantised ' if is_quantised else ''}{model.config.model_type}"
            remedy = (
                "use --use_prompt_tuning, which needs no layers of PEFT" if is_quantised else "choose another method"
            )
            raise InputError(
                f"{method.title} can't be put on a {kind} model ({one_line(error, 200)}): {remedy}"
            ) from error
        set_revision(wrapped, revision)
        return wrapped
    weights: dict[str, Tensor] | None = None
    network: dict[str, Tensor] | None = None
    if model.device.type != "meta":
        weights = read_weights(folder, model)
        if method.keeps_network(settings):
            network = read_tensors(folder.path / NETWORK, "the adapter's network", f"use {method.network_remedy}")
    check_patterns(folder, model)
    what, remedy = f"--adapter_name_or_path {folder.path}", "give the base that it was trained on"
    with input_faults(what, remedy), needed_packages(what):
        wrapped = method.wrap_trained(model, tokenizer, settings, TrainedAdapter(folder.config, weights, network))
    set_revision(wrapped, revision)
    if weights is not None:
        try_out(wrapped, what, remedy, training=True)
    return wrapped


def set_revision(model: Any, revision: str | None) -> None:
    """Record the base's revision in an adapter's settings."""
    for adapted in (model, causal_of(model)):  # LoRA beneath a soft prompt is known to the base alone
        for config in getattr(adapted, "peft_config", {}).values():
            config.revision = revision


def copy_for_saving(
    base: BaseModelSettings,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    settings: Any,
    folder: AdapterFolder | None,
    trained: dict[str, Tensor],
) -> Any:
    """Build the model on the meta device, with values for the trained parameters only.

    That is enough for saving, and a frozen base takes no memory.
    """
    model = put_adapter_on(skeleton(base, config), tokenizer, method, settings, folder, base.revision)
    problems = model.load_state_dict(trained, strict=False, assign=True)
    assert not problems.unexpected_keys, problems.unexpected_keys
    causal = causal_of(model)
    causal.tie_weights()
    with suppress(OSError):  # many a base has no generation_config
        causal.generation_config = GenerationConfig.from_pretrained(base.name, revision=base.revision)
    return model
